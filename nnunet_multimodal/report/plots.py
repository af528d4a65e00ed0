"""The page's plots as SVG, in colours that can be told apart with any colour vision (Okabe and Ito)."""

from __future__ import annotations

import base64
import io
import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nnunet_multimodal.evaluate.report import FOREGROUND
from nnunet_multimodal.report.gather import Predictions
from nnunet_multimodal.report.models import TrainedModel

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
SAMPLE_COLUMNS = ("sample_Dice_q05", "sample_Dice_q50", "sample_Dice_q95")


def training_curves(models: Sequence[TrainedModel]) -> str:
    """Losses and nnU-Net's pseudo Dice of every fold, by epochs; a data URI."""
    figure = _figure(9.5, 3.6)
    losses, dice = figure.subplots(1, 2)
    number = 0
    for model in models:
        for fold in model.folds:
            if not fold.epochs:
                continue
            epochs = np.array(fold.epochs)
            style = {"color": COLOURS[number % len(COLOURS)], "linewidth": 1.3}
            own = {"marker": MARKERS[number % len(MARKERS)], "markersize": 4, "markevery": max(1, len(epochs) // 8)}
            losses.plot(epochs[:, 0], epochs[:, 1], **style, **own)
            losses.plot(epochs[:, 0], epochs[:, 2], **style, linestyle=":")
            dice.plot(epochs[:, 0], epochs[:, 3], label=f"{model.trainer}, fold {fold.name}", **style, **own)
            number += 1
    losses.set(xlabel="epoch", ylabel="loss", title="loss: training (solid), validation (dotted)")
    dice.set(xlabel="epoch", ylabel="pseudo Dice", title="pseudo Dice, mean over the labels", ylim=(0, 1))
    for axis in (losses, dice):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_below(figure, dice)
    return _uri(figure)


def reliability(runs: Sequence[Predictions]) -> str:
    """Frequency against predicted probability, a panel for each label; a data URI."""
    labels = list(dict.fromkeys(label for run in runs if run.evaluation for label in run.evaluation.reliability))
    figure = _figure(3.2 * max(2, len(labels)), 3.6)
    axes = figure.subplots(1, len(labels), squeeze=False)[0]
    for axis, label in zip(axes, labels, strict=True):
        axis.plot([0, 1], [0, 1], color="#888888", linewidth=0.8, linestyle="--")
        for index, run in enumerate(runs):
            curve = run.evaluation.reliability.get(label) if run.evaluation else None
            if curve is not None:
                points = [(c, f) for c, f in zip(curve["confidence"], curve["frequency"], strict=True) if f is not None]
                axis.plot(*zip(*points, strict=True), label=run.name, **_style(index))
        axis.set(xlabel="predicted probability", ylabel="frequency in the reference", title=label, aspect="equal")
        axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    _legend_below(figure, axes[0])
    return _uri(figure)


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
        axis.plot(x, own, MARKERS[index % len(MARKERS)], color=colour, markersize=5, label=run.name)
    axis.set(ylabel="Dice, mean over the labels", ylim=(-0.02, 1.02), title="samples: 5–95 % (bar), median; prediction")
    axis.set_xticks(range(len(cases)), cases, rotation=90 if len(cases) > 6 else 0, fontsize=8)
    _legend_below(figure, axis)
    return _uri(figure)


def volumes(runs: Sequence[Predictions], label: str) -> str:
    """Predicted volume with the samples' interval against the reference's, by cases; a data URI, or "" without any."""
    figure = _figure(4.6, 4.4)
    axis = figure.subplots()
    largest = highest = 0.0
    for index, run in enumerate(runs):
        points = [point for case in run.summaries if (point := volume_point(run, case, label)) is not None]
        if not points:
            continue
        truth, own, low, high = np.array(points).T
        largest, highest = max(largest, np.max([truth, own])), max(highest, np.max(high))
        axis.vlines(truth, low, high, color=COLOURS[index % len(COLOURS)], linewidth=1.5, alpha=0.6)
        axis.plot(truth, own, label=run.name, **{**_style(index), "linestyle": ""})
    if not largest:
        return ""
    axis.plot([0, 1.05 * largest], [0, 1.05 * largest], color="#888888", linewidth=0.8, linestyle="--")
    axis.set(
        xlabel="volume of the reference (ml)", ylabel="predicted volume (ml), bar: 95 % of the samples", title=label
    )
    axis.set(xlim=(0, 1.05 * largest), ylim=(0, 1.05 * np.clip(highest, largest, 2 * largest)))
    _legend_below(figure, axis)
    return _uri(figure)


def volume_point(run: Predictions, case: str, label: str) -> tuple[float, float, float, float] | None:
    """Reference's volume, predicted one, and 2.5 and 97.5 % of the samples', in ml; None where one is not known."""
    own = run.summaries.get(case, {}).get("labels", {}).get(label, {}).get("volume_ml")
    truth = reference_volume_ml(run, case, label)
    if own is None or truth is None:
        return None
    return truth, own["prediction"], own["p2.5"], own["p97.5"]


def reference_volume_ml(run: Predictions, case: str, label: str) -> float | None:
    """From the evaluation's voxels and the voxels' size in CASE.json."""
    measured = run.evaluation.cases.get(case, {}).get(label, {}) if run.evaluation else {}
    summary = run.summaries.get(case, {})
    physical = summary.get("labels", {}).get(label, {}).get("volume_ml") is not None
    if "n_ref" not in measured or not physical or "spacing" not in summary:
        return None
    return measured["n_ref"] * math.prod(summary["spacing"]) / 1000


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


def _legend_below(figure: Figure, axis: Any) -> None:
    for own in figure.axes:
        own.spines[["top", "right"]].set_visible(False)
        own.grid(alpha=0.25, linewidth=0.6)
        own.title.set_fontsize(9)
    handles, names = axis.get_legend_handles_labels()
    if handles:
        room = int(figure.get_figwidth() * 13)  # letters
        names = [textwrap.fill(name, room - 6) for name in names]
        columns = max(1, room // (max(len(line) for name in names for line in name.splitlines()) + 6))
        figure.legend(handles, names, loc="outside lower left", fontsize=8, ncols=columns, frameon=False)


def _uri(figure: Figure) -> str:
    file = io.BytesIO()
    with rc_context({"svg.hashsalt": "report", "font.size": 9}):  # the same page from the same results
        figure.savefig(file, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode("ascii")
