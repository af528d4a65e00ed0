"""Parts of pictures: slices, outlines, colours, and PNG files that are whole or not there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from nnunet_multimodal.files import written_beside
from nnunet_multimodal.metrics.distribution import Label

# Okabe and Ito's colours, told apart with any colour vision
COLOURS = ("#56B4E9", "#E69F00", "#CC79A7", "#009E73", "#F0E442", "#D55E00", "#0072B2")
INCHES = 2.1  # of a panel
DPI = 130


def new_figure(rows: int, columns: int, title: str, height: float = 1.0) -> tuple[Figure, np.ndarray]:
    """A figure and its panels (rows, columns), without axes.

    Args:
        rows: of panels.
        columns: of panels.
        title: above them all.
        height: of a panel, in units of its width.
    """
    height = min(max(height, 0.3), 3)
    figure = Figure(figsize=(INCHES * columns, (INCHES * height + 0.25) * rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.suptitle(title, fontsize=10)
    return figure, axes


def show_image(axis: Any, image: np.ndarray, title: str = "", aspect: float = 1.0) -> None:
    """A slice (Y, X) in grey; ``aspect`` is a voxel's height over its width."""
    low, high = np.percentile(image, (1, 99))
    axis.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=aspect, interpolation="nearest")
    axis.set_title(title, fontsize=7)


def outline(axis: Any, labels: np.ndarray, values: Sequence[Label], colour: str | None = None) -> None:
    """Outlines of labels or regions in a slice (Y, X), each in its colour or all in one."""
    for number, value in enumerate(values):
        mask = np.isin(labels, value)
        if mask.any() and not mask.all():
            axis.contour(mask, [0.5], colors=[colour or colour_of(number)], linewidths=0.9)


def colour_of(number: int) -> str:
    """Of a label, by its place."""
    return COLOURS[number % len(COLOURS)]


def label_legend(figure: Figure, names: Sequence[str], more: Mapping[str, str] | None = None) -> None:
    """Names of labels in their colours, and of ``more`` (name -> colour), below the panels."""
    colours = {name: colour_of(number) for number, name in enumerate(names)} | dict(more or {})
    patches = [Patch(facecolor="none", edgecolor=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(6, len(patches)), frameon=False, fontsize=7)


def foreground(label_map: np.ndarray, values: Sequence[Label]) -> np.ndarray:
    """Where a label map has any of some labels or regions: neither background nor the ignore label."""
    return np.isin(label_map, np.hstack([np.ravel(value) for value in values]))


def widest_slice(values: Sequence[Label], *label_maps: np.ndarray | None) -> int:
    """The slice with the most foreground of the first label map (Z, Y, X) that has any; the middle one without any.

    Args:
        values: of the labels or regions.
        label_maps: None for one that is not there.
    """
    given = [label_map for label_map in label_maps if label_map is not None]
    for label_map in given:
        voxels = foreground(label_map, values).reshape(len(label_map), -1).sum(1)
        if voxels.any():
            return int(voxels.argmax())
    return len(given[0]) // 2


def save_png(figure: Figure, file: Path) -> None:
    """Write the figure; the file is whole or not there."""
    with written_beside(file) as beside:
        figure.savefig(beside, dpi=DPI, format="png")
