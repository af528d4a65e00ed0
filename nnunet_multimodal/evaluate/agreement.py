"""The prediction's and the samples' Dice with every rater, beside that of the raters with one another.

What to compare: ``others_Dice``, this rater with the others, and ``prediction_others_Dice``, the prediction in this
rater's place. ``advantage`` is 1 where the latter is no smaller; its mean over cases is what the alternative annotator
test (Calderon et al., ACL 2025) is made of. A rater's mean tells something if a name is one person in all cases.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from nnunet_multimodal.evaluate.cases import Settings
from nnunet_multimodal.evaluate.report import FOREGROUND, MEAN, as_cell, as_key
from nnunet_multimodal.metrics.case import CaseMeasures, Measures, RaterMeasures, mean

Results = Mapping[str, CaseMeasures]
HEADINGS = {
    "prediction_Dice": "prediction",
    "sample_Dice": "samples",
    "others_Dice": "others",
    "prediction_others_Dice": "prediction with others",
    "advantage": "advantage",
}
SHOWN = 10  # raters on the screen


def mean_over_cases(results: Results, settings: Settings) -> dict[str, tuple[int, RaterMeasures]]:
    """Rater -> number of cases and means over them, in the order of the names; empty without raters."""
    found: dict[str, list[RaterMeasures]] = {}
    for measures in results.values():
        for name, own in measures.raters.items():
            found.setdefault(name, []).append(own)
    means = {}
    for name, cases in sorted(found.items()):
        by_label = {label: _mean([own.by_label[label] for own in cases]) for label in settings.labels}
        means[name] = len(cases), RaterMeasures(by_label, _mean([own.average for own in cases]))
    return means


def _mean(rows: list[Measures]) -> Measures:
    return {column: mean([row[column] for row in rows]) for column in rows[0]}


def as_csv(results: Results, settings: Settings) -> str:
    """A row for each case, label and rater, and for the raters' means over the cases; NaN as an empty cell."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    columns = ("weight", *HEADINGS)
    writer.writerow(["case", "label", "values", "rater", *columns])
    means = {name: own for name, (_, own) in mean_over_cases(results, settings).items()}
    for case, raters in (*((case, measures.raters) for case, measures in results.items()), (MEAN, means)):
        for label, name in (*zip(settings.labels, settings.names, strict=True), (None, FOREGROUND)):
            for rater, own in raters.items():
                row = own.average if label is None else own.by_label[label]
                values = "" if label is None else as_key(label)
                writer.writerow([case, name, values, rater, *(as_cell(row[column]) for column in columns)])
    return file.getvalue()


def as_json(results: Results, settings: Settings) -> dict[str, dict[str, Any]]:
    """Label -> rater -> number of cases and means over them."""
    means = mean_over_cases(results, settings)
    rows = {
        as_key(label): {rater: {"cases": n, **own.by_label[label]} for rater, (n, own) in means.items()}
        for label in settings.labels
    }
    return {**rows, FOREGROUND: {rater: {"cases": n, **own.average} for rater, (n, own) in means.items()}}


def format_table(results: Results, settings: Settings) -> str:
    """Dice of the first raters, mean over labels and cases; empty without raters."""
    means = mean_over_cases(results, settings)
    if not means:
        return ""
    rows = [["rater", "cases", *HEADINGS.values()]]
    for name, (cases, own) in list(means.items())[:SHOWN]:
        rows.append([name, str(cases), *(f"{own.average[column]:.3f}" for column in HEADINGS)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join((row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:]))) for row in rows]
    lines += [f"and {len(means) - SHOWN} more raters"] if len(means) > SHOWN else []
    legend = """
Dice with this rater of the prediction and the samples; with the others of this rater and the prediction; advantage:
cases in which the prediction agrees with the others at least as well as this rater does"""
    return "\n".join(lines) + legend
