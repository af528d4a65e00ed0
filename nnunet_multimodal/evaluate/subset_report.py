"""The table of all subsets: rows are subsets with dots as in the papers, columns models and labels."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nnunet_multimodal.lookup import split_length
from nnunet_multimodal.metrics.case import CaseMeasures, mean
from nnunet_multimodal.metrics.distribution import Label
from nnunet_multimodal.metrics.statistics import bootstrap_interval, holm, paired_p_value

AVERAGE = ()  # the subset of the row of means
MEAN_LABEL = "mean"
METRICS = {"Dice": "Dice", "HD95_mm": "HD95 (mm)"}
SIGNIFICANT = 0.05

Subset = tuple[int, ...]


class Measured(NamedTuple):
    """One prediction's measures."""

    model: str
    subset: Subset
    case: str
    measures: CaseMeasures


class Key(NamedTuple):
    """A cell of the table."""

    model: str
    subset: Subset
    label: str
    metric: str


@dataclass(frozen=True)
class Cell:
    """Mean over the cases with a finite value, with its interval; p against the baseline, corrected.

    Of ``cases`` measured, ``n`` have a finite value. ``without_value`` have an infinite distance in it (prediction or
    reference lacks a label): it is not in the mean, and the worst of all in the comparison. The correction is over a
    model's cells of the metric.
    """

    mean: float
    low: float
    high: float
    n: int
    without_value: int
    cases: int
    p: float = math.nan
    p_holm: float = math.nan


@dataclass(frozen=True)
class Scores:
    """All cells, and what they are of."""

    models: tuple[str, ...]
    baseline: str
    modalities: tuple[str, ...]
    labels: tuple[Label, ...]
    names: tuple[str, ...]
    cells: dict[Key, Cell] = field(default_factory=dict)

    @property
    def columns(self) -> tuple[str, ...]:
        """Labels, and their mean if there are several."""
        return (*self.names, MEAN_LABEL) if len(self.names) > 1 else self.names

    def short(self, model: str) -> str:
        """A model's name without the length of its training, if that is all models'."""
        lengths = {split_length(name)[1:] for name in self.models}
        return split_length(model)[0] if len(lengths) == 1 else model

    @property
    def subsets(self) -> list[Subset]:
        """Rows, the average last."""
        found = sorted({key.subset for key in self.cells if key.subset}, key=lambda subset: (len(subset), subset))
        return [*found, AVERAGE]


class Value(NamedTuple):
    """Of a case: the mean of what is finite, and the mean of all, infinite if a term is."""

    finite: float
    whole: float

    @classmethod
    def of(cls, terms: Sequence[Value]) -> Value:
        """The mean of several; NaN terms have no part in it."""
        whole = [term.whole for term in terms if not math.isnan(term.whole)]
        return cls(mean([term.finite for term in terms]), float(np.mean(whole)) if whole else math.nan)


def summarise(measured: Sequence[Measured], scores: Scores) -> Scores:
    """Means, intervals and comparisons of every model, subset, label and metric.

    The row of averages is the mean over the subsets of each case, over the cases that have all of a model's subsets.
    """
    values = _values(measured, scores)
    cells = {key: _cell(list(cases.values())) for key, cases in values.items()}
    for model in scores.models:
        for metric in METRICS if model != scores.baseline else ():
            keys = [key for key in cells if key.model == model and key.metric == metric]
            p = [_compare(values[key], values.get(key._replace(model=scores.baseline), {})) for key in keys]
            for key, raw, corrected in zip(keys, p, holm(p), strict=True):
                cells[key] = replace(cells[key], p=raw, p_holm=corrected)
    return replace(scores, cells=cells)


def _values(measured: Sequence[Measured], scores: Scores) -> dict[Key, dict[str, Value]]:
    """Case -> value of every cell."""
    values: dict[Key, dict[str, Value]] = {}
    for entry in measured:
        for metric in METRICS:
            found = [Value(mean([x]), x) for x in (entry.measures.by_label[label][metric] for label in scores.labels)]
            row = dict(zip(scores.names, found, strict=True))
            if len(found) > 1:
                row[MEAN_LABEL] = Value.of(found)
            for label, value in row.items():
                values.setdefault(Key(entry.model, entry.subset, label, metric), {})[entry.case] = value
    subsets = sorted({key.subset for key in values})
    for model in scores.models:
        for label in scores.columns:
            for metric in METRICS:
                rows = [values.get(Key(model, subset, label, metric), {}) for subset in subsets]
                cases = set.intersection(*(set(row) for row in rows))
                values[Key(model, AVERAGE, label, metric)] = {
                    case: Value.of([row[case] for row in rows]) for case in sorted(cases)
                }
    return values


def _cell(cases: Sequence[Value]) -> Cell:
    finite = [value.finite for value in cases]
    low, high = bootstrap_interval(finite)
    without_value = sum(math.isinf(value.whole) for value in cases)
    return Cell(mean(finite), low, high, int(np.isfinite(finite).sum()), without_value, len(cases))


def _compare(cases: dict[str, Value], baseline: dict[str, Value]) -> float:
    both = sorted(cases.keys() & baseline.keys())
    return paired_p_value([cases[case].whole for case in both], [baseline[case].whole for case in both])


def as_csv(scores: Scores) -> str:
    """A row for each cell."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["model", "subset", "label", "metric", "mean", "low", "high", "n", "without_value", "p", "p_holm"])
    for key, cell in scores.cells.items():
        numbers = ["" if math.isnan(x) else f"{x:.6g}" for x in (cell.mean, cell.low, cell.high, cell.p, cell.p_holm)]
        row = [*numbers[:3], cell.n, cell.without_value, *numbers[3:]]
        writer.writerow([key.model, _subset(key.subset, scores), key.label, key.metric, *row])
    return file.getvalue()


def case_csv(scores: Scores, measured: Sequence[Measured]) -> str:
    """A row for each prediction and label."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["model", "subset", "case", "label", *METRICS])
    for entry in measured:
        for name, label in zip(scores.names, scores.labels, strict=True):
            numbers = [entry.measures.by_label[label][metric] for metric in METRICS]
            cells = ["" if math.isnan(x) else f"{x:.6g}" for x in numbers]
            writer.writerow([entry.model, _subset(entry.subset, scores), entry.case, name, *cells])
    return file.getvalue()


def as_markdown(scores: Scores) -> str:
    """A table for each metric: mean [95 % interval], an asterisk where the baseline differs significantly."""
    baseline = scores.short(scores.baseline)
    fewest = min(_cases(subset, scores) for subset in scores.subsets)
    text = [
        "Mean over the n cases that have the subset's modalities [95 % bootstrap interval]; ● present, ○ absent, "
        "∞ cases without a distance, as prediction or reference lacks a label. * differs from "
        f"{baseline} (paired Wilcoxon, p < {SIGNIFICANT} after Holm's correction over a model's cells of a table"
        + (f"; with {fewest} cases p is at least {min(1, 2 / 2**fewest):.2g} before it)." if fewest < 8 else ").")
    ]
    columns = [(model, label) for label in scores.columns for model in scores.models]
    for metric, heading in METRICS.items():
        header = [*scores.modalities, "n", *(f"{label}: {scores.short(model)}" for model, label in columns)]
        aligned = [":-:"] * len(scores.modalities) + ["---:"] * (len(columns) + 1)
        text += ["", f"**{heading}**", "", _line(header), _line(aligned)]
        for subset in scores.subsets:
            dots = ["●" if m in subset else "○" for m in range(len(scores.modalities))] if subset else None
            row = [_format(scores.cells.get(Key(model, subset, label, metric)), metric) for model, label in columns]
            first = dots or ["average", *[""] * (len(scores.modalities) - 1)]
            text.append(_line([*first, str(_cases(subset, scores)), *row]))
    return "\n".join(text) + "\n"


def draw(scores: Scores, file: Path) -> None:
    """Dice of every subset, model and label as a heat map, PNG; beside, then renamed."""
    columns = [(model, label) for label in scores.columns for model in scores.models]
    subsets, models = scores.subsets, len(scores.models)
    dice = np.array(
        [[_mean(scores.cells.get(Key(model, subset, label, "Dice"))) for model, label in columns] for subset in subsets]
    )
    dots, cells = 0.3 * len(scores.modalities), 0.6 * len(columns)
    figure = Figure(figsize=(dots + cells + 1.6, 0.34 * len(subsets) + 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, axes = figure.subplots(1, 2, sharey=True, width_ratios=[dots, cells])
    for row, subset in enumerate(subsets):
        for modality in range(len(scores.modalities)) if subset else ():
            left.plot(modality, row, "o", color="black", fillstyle="full" if modality in subset else "none")
    left.set_xlim(-0.6, len(scores.modalities) - 0.4)
    left.set_xticks(range(len(scores.modalities)), scores.modalities, rotation=90)
    left.xaxis.tick_top()
    left.set_yticks([])
    left.text(len(scores.modalities) - 0.6, len(subsets) - 1, "average", ha="right", va="center")
    left.tick_params(length=0)
    left.spines[:].set_visible(False)
    image = axes.imshow(dice, cmap=colormaps["viridis"], vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(dice):
        if np.isfinite(value):
            colour = "white" if value < 0.6 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(columns)), [scores.short(model) for model, _ in columns], rotation=90, fontsize=8)
    axes.axhline(len(subsets) - 1.5, color="white", linewidth=2)
    for index in range(1, len(scores.columns)):
        axes.axvline(index * models - 0.5, color="white", linewidth=2)
    top = axes.secondary_xaxis("top")
    top.set_xticks([(index + 0.5) * models - 0.5 for index in range(len(scores.columns))], scores.columns)
    for axis in (axes, top):
        axis.tick_params(length=0)
    figure.colorbar(image, ax=axes, label="Dice", fraction=0.05)
    beside = file.with_name(f".{file.name}")
    figure.savefig(beside, dpi=150, format="png")
    beside.replace(file)


def _subset(subset: Subset, scores: Scores) -> str:
    return "+".join(scores.modalities[m] for m in subset) or "average"


def _cases(subset: Subset, scores: Scores) -> int:
    """The cases that were measured with a subset."""
    return max(cell.cases for key, cell in scores.cells.items() if key.subset == subset)


def _mean(cell: Cell | None) -> float:
    return math.nan if cell is None else cell.mean


def _format(cell: Cell | None, metric: str) -> str:
    if cell is None:
        return "–"
    digits = 3 if metric == "Dice" else 1
    value = "–" if math.isnan(cell.mean) else f"{cell.mean:.{digits}f}"
    interval = "" if math.isnan(cell.low) else f" [{cell.low:.{digits}f}, {cell.high:.{digits}f}]"
    star = "*" if cell.p_holm < SIGNIFICANT else ""
    missing = f" ({cell.without_value} ∞)" if cell.without_value else ""
    return f"{value}{star}{interval}{missing}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
