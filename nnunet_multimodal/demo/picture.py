"""One held-out case as a picture: modalities, truth, predictions, and each modality's uncertainty below it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nnunet_multimodal.demo import data
from nnunet_multimodal.demo.report import Structure, read_images, read_segmentation
from nnunet_multimodal.demo.settings import UNCERTAINTY_TRAINER, Settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart with any colour vision
COLOURS = ("#56B4E9", "#E69F00", "#CC79A7", "#009E73", "#F0E442", "#D55E00", "#0072B2")


def draw(settings: Settings, structures: list[Structure], description: dict, case: str, file: Path) -> None:
    """Draw a slice of ``case`` and write it beside ``file``, then rename."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    image_files, truth_file = data.held_out_cases(settings)[case]
    images, spacing_mm = read_images(image_files, description)
    names = data.channel_names(description)
    segmentations = {"truth": truth_file}
    segmentations |= {trainer: settings.predictions(trainer) / truth_file.name for trainer in settings.trainers}
    volumes = {
        title: read_segmentation(path, description)[0].reshape(images.shape[1:])
        for title, path in segmentations.items()
    }
    index = largest_slice(volumes["truth"], structures)
    maps = _uncertainty(settings, image_files, description)

    rows, columns = 1 + (maps is not None), len(images) + len(volumes)
    height = images.shape[2] * spacing_mm[1] / (images.shape[3] * spacing_mm[2])
    figure = Figure(figsize=(2.3 * columns, 2.3 * height * rows + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    aspect = spacing_mm[1] / spacing_mm[2]
    for ax, image, name in zip(axes[0], images, names, strict=False):
        _show_image(ax, image[index], aspect)
        ax.set_title(name)
    background = images[0, index]
    for ax, (title, volume) in zip(axes[0, len(images) :], volumes.items(), strict=True):
        _show_image(ax, background, aspect)
        _overlay(ax, volume[index], structures)
        ax.set_title(title)
    if maps is not None:
        _show_uncertainty(figure, axes[1], maps[:, index], names, aspect)
    _legend(figure, axes[-1, len(images) :] if maps is not None else None, structures)
    where = "z" if images.shape[1] > 1 else "image"
    figure.suptitle(f"{settings.dataset}, held-out case {case}, {where} = {index}", fontsize="medium")
    beside = file.with_name(f".{file.name}.part")
    figure.savefig(beside, format="png", dpi=150)
    beside.replace(file)


def largest_slice(truth: np.ndarray, structures: list[Structure]) -> int:
    """Index along the first axis where most structures are, and among those most of their voxels."""
    areas = np.stack([structure.mask(truth).sum(axis=(1, 2)) for structure in structures])  # (S, Z)
    return int(np.argmax((areas > 0).sum(axis=0) * (areas.sum(axis=0).max() + 1) + areas.sum(axis=0)))


def _uncertainty(settings: Settings, image_files: list[Path], description: dict) -> np.ndarray | None:
    """Maps (M, Z, Y, X) of the case; None where no trainer has them."""
    if UNCERTAINTY_TRAINER not in settings.trainers:
        return None
    files = [settings.uncertainty() / file.name for file in image_files]
    return read_images([file for file in files if file.exists()], description)[0]


def _show_image(ax: Axes, image: np.ndarray, aspect: float) -> None:
    low, high = np.percentile(image, (0.5, 99.5))
    ax.imshow(image, cmap="gray", vmin=low, vmax=high, aspect=aspect, interpolation="nearest")


def _overlay(ax: Axes, segmentation: np.ndarray, structures: list[Structure]) -> None:
    """Structures in their order: filled faintly, with a firm outline, so that nested regions all show."""
    from matplotlib.colors import to_rgba

    for structure, colour in zip(structures, _colours(structures), strict=True):
        mask = structure.mask(segmentation)
        if mask.any():
            fill = np.zeros((*mask.shape, 4))
            fill[mask] = to_rgba(colour, 0.35)
            ax.imshow(fill, aspect=ax.get_aspect(), interpolation="nearest")
            ax.contour(mask, levels=[0.5], colors=[colour], linewidths=1.2)


def _show_uncertainty(figure: Any, axes: np.ndarray, maps: np.ndarray, names: list[str], aspect: float) -> None:
    """One colour scale for all modalities: their values are comparable."""
    high = np.percentile(maps, 99.8)
    for ax, uncertainty, name in zip(axes, maps, names, strict=False):
        shown = ax.imshow(uncertainty, cmap="magma", vmin=0, vmax=high, aspect=aspect, interpolation="nearest")
        ax.set_title(f"RNP error of {name}")
    scale = axes[len(maps)].inset_axes((0.02, 0.05, 0.07, 0.9))  # in the next cell, so that no image is narrowed
    figure.colorbar(shown, cax=scale, label=f"RNP error ({UNCERTAINTY_TRAINER})")


def _legend(figure: Any, free: np.ndarray | None, structures: list[Structure]) -> None:
    """In the free cells of the second row, or below the only one."""
    from matplotlib.patches import Patch

    patches = [
        Patch(facecolor=(*_rgb(colour), 0.35), edgecolor=colour, linewidth=1.2, label=structure.name)
        for structure, colour in zip(structures, _colours(structures), strict=True)
    ]
    if free is None:
        figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    else:
        free[-1].legend(handles=patches, loc="center", frameon=False)


def _rgb(colour: str) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    return to_rgb(colour)


def _colours(structures: list[Structure]) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(len(structures))]
