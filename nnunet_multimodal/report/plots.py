"""The page's plots as SVG, in colours that can be told apart with any colour vision (Okabe and Ito)."""

from __future__ import annotations

import base64
import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nnunet_multimodal.evaluate.report import FOREGROUND
from nnunet_multimodal.report.gather import Predictions
from nnunet_multimodal.report.models import TrainedModel

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX*"  # one more than colours: both come back together after 56
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "report",
    "font.size": 9,
    "text.parse_math": False,
}  # the same page from the same results
PANELS = 4  # side by side
SAMPLE_COLUMNS = ("sample_Dice_q05", "sample_Dice_q50", "sample_Dice_q95")


@rc_context(STYLE)
def training_curves(models: Sequence[TrainedModel]) -> str:
    """Losses and nnU-Net's pseudo Dice of every fold, by epochs; a data URI."""
    figure = _figure(9.5, 3.6)
    losses, dice = figure.subplots(1, 2)
    number = 0
    trainers = [model.trainer for model in models]
    for model in models:
        name = model.trainer
        if trainers.count(name) > 1:
            name = f"{model.dataset}, {name}, {model.plans}, {model.configuration}"
        for fold in model.folds:
            if not fold.epochs:
                continue
            epochs = np.array(fold.epochs)
            style = {"color": COLOURS[number % len(COLOURS)], "linewidth": 1.3}
            own = {"marker": MARKERS[number % len(MARKERS)], "markersize": 4, "markevery": max(1, len(epochs) // 8)}
            losses.plot(epochs[:, 0], epochs[:, 1], **style, **own)
            losses.plot(epochs[:, 0], epochs[:, 2], **style, linestyle=":")
            dice.plot(epochs[:, 0], epochs[:, 3], label=f"{name}, fold {fold.name}", **style, **own)
            number += 1
    losses.set(xlabel="epoch", ylabel="loss", title="loss: training (solid), validation (dotted)")
    dice.set(xlabel="epoch", ylabel="pseudo Dice", title="pseudo Dice, mean over the labels", ylim=(0, 1))
    for axis in (losses, dice):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_below(figure, dice)
    return _uri(figure)


@rc_context(STYLE)
def reliability(runs: Sequence[Predictions]) -> str:
    """Frequency against predicted probability, a panel for each label; a data URI."""
    labels = list(dict.fromkeys(label for run in runs if run.evaluation for label in run.evaluation.reliability))
    columns = min(PANELS, len(labels))
    rows = math.ceil(len(labels) / columns)
    figure = _figure(3.2 * max(2, columns), 3.6 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in axes[len(labels) :]:
        unused.remove()
    for axis, label in zip(axes, labels, strict=False):
        axis.plot([0, 1], [0, 1], color="#888888", linewidth=0.8, linestyle="--")
        for index, run in enumerate(runs):
            curve = run.evaluation.reliability.get(label) if run.evaluation else None
            if curve is not None:
                points = [(c, f) for c, f in zip(curve["confidence"], curve["frequency"], strict=True) if f is not None]
                axis.plot(*zip(*points, strict=True), label=_shown(run.name), **_style(index))
        axis.set(xlabel="predicted probability", ylabel="frequency in the reference", title=label, aspect="equal")
        axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    _legend_below(figure, *axes[: len(labels)])
    return _uri(figure)


@rc_context(STYLE)
def sample_quality(runs: Sequence[Predictions]) -> str:
    """Dice of the samples (5, 50 and 95 % quantiles) and of the prediction by cases; a data URI."""
    sampled = [(i, run, e) for i, run in enumerate(runs) if (e := run.evaluation) and e.has(SAMPLE_COLUMNS[1])]
    cases = sorted({case for _, _, evaluation in sampled for case in evaluation.cases})
    figure = _figure(max(5.5, 0.22 * len(cases) * (1 + 0.35 * len(sampled)) + 2), 3.6)
    axis = figure.subplots()
    for place, (index, run, evaluation) in enumerate(sampled):
        rows = [evaluation.cases.get(case, {}).get(FOREGROUND, {}) for case in cases]
        low, middle, high = (np.array([row.get(c, math.nan) for row in rows]) for c in SAMPLE_COLUMNS)
        own = np.array([row.get("rater_Dice", math.nan) for row in rows])
        x = np.arange(len(cases)) + (place - (len(sampled) - 1) / 2) * 0.7 / len(sampled)
        colour = COLOURS[index % len(COLOURS)]
        axis.vlines(x, low, high, color=colour, linewidth=2, alpha=0.6)
        axis.plot(x, middle, "_", color=colour, markersize=9)
        axis.plot(x, own, MARKERS[index % len(MARKERS)], color=colour, markersize=5, label=_shown(run.name))
    axis.set(ylabel="Dice, mean over the labels", ylim=(-0.02, 1.02), title="samples: 5–95 % (bar), median; prediction")
    axis.set_xticks(range(len(cases)), cases, rotation=90 if len(cases) > 6 else 0, fontsize=8)
    _legend_below(figure, axis)
    return _uri(figure)


@rc_context(STYLE)
def volumes(
    runs: Sequence[Predictions], label: str, unit: str, raters: Mapping[str, Mapping[str, Sequence[int | None]]]
) -> str:
    """Predicted volume with the samples' interval against the reference's, by cases; a data URI, or "" without any.

    Args:
        runs: folders of predictions.
        label: whose volumes.
        unit: ml or voxels.
        raters: case -> label -> voxels of each rater, drawn from the smallest to the largest.
    """
    figure = _figure(4.6, 4.4)
    axis = figure.subplots()
    points = [volume_points(run, label, unit, raters) for run in runs]
    found = [point for own in points for point in own]
    largest = max((max(point.reference, point.predicted, *point.raters) for point in found), default=0.0)
    if not largest:
        return ""
    highest = max(point.high for point in found)
    for index, (run, own) in enumerate(zip(runs, points, strict=True)):
        if not own:
            continue
        colour, aside = COLOURS[index % len(COLOURS)], (index - (len(runs) - 1) / 2) * 0.008 * largest
        x, y = np.array([point.reference for point in own]) + aside, np.array([point.predicted for point in own])
        axis.vlines(x, [point.low for point in own], [point.high for point in own], color=colour, lw=1.5, alpha=0.6)
        rated = [point for point in own if point.raters]
        low, high = [min(point.raters) for point in rated], [max(point.raters) for point in rated]
        axis.hlines([point.predicted for point in rated], low, high, color=colour, lw=1.5, linestyle=":", alpha=0.8)
        axis.plot(x, y, label=_shown(run.name), **{**_style(index), "linestyle": ""})
    axis.plot([0, 1.05 * largest], [0, 1.05 * largest], color="#888888", linewidth=0.8, linestyle="--")
    axis.set(
        xlabel=f"volume of the reference ({unit})",
        ylabel=f"predicted volume ({unit}), bar: 95 % of the samples",
        title=label,
    )
    axis.set(xlim=(-0.02 * largest, 1.05 * largest), ylim=(0, 1.05 * np.clip(highest, largest, 2 * largest)))
    _legend_below(figure, axis)
    return _uri(figure)


class VolumePoint(NamedTuple):
    """Volumes of a label in a case: reference, prediction, 2.5 and 97.5 % of the samples, each rater's."""

    reference: float
    predicted: float
    low: float
    high: float
    raters: Sequence[float]


def volume_points(
    run: Predictions, label: str, unit: str, raters: Mapping[str, Mapping[str, Sequence[int | None]]]
) -> list[VolumePoint]:
    """Of the cases of which prediction and reference are known."""
    points = []
    for case in run.summaries:
        own, reference = run.volume(case, label, unit), reference_volume(run, case, label, unit)
        if own and reference is not None:
            every = rater_volumes(run, case, raters.get(case, {}), unit).get(label, ())
            known = [volume for volume in every if volume is not None]
            points.append(VolumePoint(reference, own["prediction"], own["p2.5"], own["p97.5"], known))
    return points


def reference_volume(run: Predictions, case: str, label: str, unit: str) -> float | None:
    """From the evaluation's voxels and the voxels' size in CASE.json."""
    voxels = run.evaluation.cases.get(case, {}).get(label, {}).get("n_ref", math.nan) if run.evaluation else math.nan
    size = run.voxel_size(case, unit)
    return None if size is None or math.isnan(voxels) else voxels * size


def rater_volumes(
    run: Predictions, case: str, voxels: Mapping[str, Sequence[int | None]], unit: str
) -> dict[str, list[float | None]]:
    """Label -> each rater's volume; empty where the voxels' size is not known."""
    size = run.voxel_size(case, unit)
    if size is None:
        return {}
    return {label: [None if count is None else size * count for count in own] for label, own in voxels.items()}


def _style(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 5,
        "linewidth": 1.3,
    }


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def _shown(name: str) -> str:
    """A name in a legend, from which matplotlib leaves out what begins with _."""
    return f" {name}" if name.startswith("_") else name


def _legend_below(figure: Figure, *axes: Any) -> None:
    """What the axes draw, each name once."""
    for own in figure.axes:
        own.spines[["top", "right"]].set_visible(False)
        own.grid(alpha=0.25, linewidth=0.6)
        own.title.set_fontsize(9)
    found = {name: handle for axis in axes for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    if found:
        room = int(figure.get_figwidth() * 13)  # letters
        names = [textwrap.fill(name, room - 6) for name in found]
        columns = max(1, room // (max(len(line) for name in names for line in name.splitlines()) + 6))
        figure.legend(found.values(), names, loc="outside lower left", fontsize=8, ncols=columns, frameon=False)


def _uri(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode("ascii")
