"""One picture of a case: what was seen, what was predicted, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nnunet_multimodal.explain.leave_out import Contribution
from nnunet_multimodal.metrics.distribution import Label
from nnunet_multimodal.pictures import colour_of, new_figure, outline, save_png, show_image, widest_slice

COLUMNS = 6


@dataclass(frozen=True)
class Sheet:
    """What is shown of a case.

    Attributes:
        case: its name.
        images: channels that there are, by name, each (*spatial).
        prediction: label map (*spatial).
        reference: label map, or None.
        maps: title and array (*spatial), 0 to 1.
        contributions: of each modality and label.
        labels: values of the labels or regions.
    """

    case: str
    images: Mapping[str, np.ndarray]
    prediction: np.ndarray
    reference: np.ndarray | None
    maps: Sequence[tuple[str, np.ndarray]]
    contributions: Sequence[Contribution]
    labels: Sequence[Label]


def draw_sheet(sheet: Sheet, file: Path) -> None:
    """Write the picture as PNG."""
    index = widest_slice(sheet.labels, sheet.prediction, sheet.reference)
    panels: list[tuple[str, np.ndarray, np.ndarray | None]] = [
        (name, image[index], None) for name, image in sheet.images.items()
    ]
    background = next(iter(sheet.images.values()))[index]
    named = [("reference", sheet.reference), ("prediction", sheet.prediction)]
    label_maps = [(name, labels[index]) for name, labels in named if labels is not None]
    panels += [(title, background, array[index]) for title, array in sheet.maps]
    count = len(panels) + len(label_maps) + bool(sheet.contributions)
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    figure, grid = new_figure(rows, columns, f"{sheet.case}, slice {index}")
    axes = list(grid.flat)
    images, maps = panels[: len(sheet.images)], panels[len(sheet.images) :]
    for title, image, _ in images:
        show_image(axes.pop(0), image, title)
    for title, labels in label_maps:
        axis = axes.pop(0)
        show_image(axis, background, title)
        outline(axis, labels, sheet.labels)
    for title, image, overlay in maps:
        axis = axes.pop(0)
        show_image(axis, image, title)
        assert overlay is not None
        axis.imshow(overlay, cmap="viridis", vmin=0, vmax=1, alpha=0.6)
        outline(axis, sheet.prediction[index], sheet.labels, "white")
    if sheet.contributions:
        _bars(axes.pop(0), sheet.contributions)
    save_png(figure, file)


def _bars(axis: Any, contributions: Sequence[Contribution]) -> None:
    """What is lost without a modality: Dice against the reference, or agreement with the whole prediction."""
    axis.set_axis_on()
    labels = list(dict.fromkeys(c.label for c in contributions))
    modalities = list(dict.fromkeys(c.modality for c in contributions))
    against_reference = not np.isnan(contributions[0].dice)
    height = 0.8 / len(labels)
    for number, label in enumerate(labels):
        own = [c for c in contributions if c.label == label]
        values = [c.dice - c.dice_without if against_reference else c.changed for c in own]
        places = np.arange(len(modalities)) + number * height
        axis.barh(places, values, height, color=colour_of(number), label=label)
    axis.set_yticks(np.arange(len(modalities)) + 0.4 - height / 2, modalities, fontsize=6)
    axis.tick_params(axis="x", labelsize=6)
    axis.invert_yaxis()
    axis.legend(fontsize=5, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=len(labels))
    axis.set_title("Dice lost without" if against_reference else "changed without (1 - Dice)", fontsize=7)


def draw_weights(weights: Sequence[tuple[str, str, str, float]], file: Path) -> None:
    """Complementary information weights as a heat map (Shen et al., 2024, Fig. 18).

    Args:
        weights: primary modalities, region, auxiliary modalities, weight.
        file: a PNG.
    """
    rows = list(dict.fromkeys((primary, region) for primary, region, _, _ in weights))
    columns = list(dict.fromkeys([primary for primary, _ in rows] + [auxiliary for _, _, auxiliary, _ in weights]))
    table = np.full((len(rows), len(columns)), np.nan)
    for primary, region, auxiliary, weight in weights:
        table[rows.index((primary, region)), columns.index(auxiliary)] = weight
    figure = Figure(figsize=(max(4.5, 2.2 + 0.9 * len(columns)), 1.2 + 0.45 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    image = axis.imshow(table, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for row, column in np.argwhere(~np.isnan(table)):
        value = table[row, column]
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), [f"{primary}: {region}" for primary, region in rows])
    axis.set_xlabel("heard from")
    figure.suptitle("Complementary information weights", fontsize=10)
    figure.colorbar(image)
    save_png(figure, file)
