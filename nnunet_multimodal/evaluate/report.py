"""What an evaluation ends with: CSV, JSON, a table on the screen, and what is missing from them."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sized
from dataclasses import asdict
from typing import Any

from nnunet_multimodal.evaluate.cases import CASE, LeftOut, Settings
from nnunet_multimodal.metrics.calibration import ReliabilityCurve
from nnunet_multimodal.metrics.case import CaseMeasures, Measures
from nnunet_multimodal.metrics.distribution import Label
from nnunet_multimodal.provenance import made

MEAN, FOREGROUND = "mean", "foreground_mean"
NAMED = 5  # cases that a line names before it stops
# column -> heading in the table
HEADINGS = {
    "Dice": "Dice",
    "HD95_mm": "HD95 mm",
    "NSD": "NSD",
    "GED2": "GED²",
    "M_IoU": "M-IoU",
    "sample_diversity": "diversity",
    "rater_Dice": "rater Dice",
    "rater_Dice_nod": "nod",
    "interrater_Dice": "raters' own",
    "within_raters": "within",
    "fraction_better": "better",
    "sample_Dice_q95": "q95",
    "volume_CRPS": "CRPS",
    "volume_coverage": "covered",
    "ECE": "ECE",
}
SHOWN_OF_FIRST = ("GED2", "M_IoU")  # of the first so many samples
LEGEND = """
GED²: squared energy distance to the raters; rater Dice: of the prediction, mean over the raters, nod: over those that
drew something; raters' own: Dice of the raters with one another; within: cases where the prediction agrees with the
raters, whoever is left out, at least as well as half of them, by weight, do with the others; better: samples with a
higher Dice than the prediction; q95: 95 % quantile of the samples' Dice; CRPS: of the samples' volumes, in {unit};
covered: raters whose volume is in the samples' 95 %"""


def as_csv(results: Mapping[str, CaseMeasures], means: CaseMeasures, settings: Settings) -> str:
    """A row for each case and label, NaN as an empty cell."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    columns = list(means.average)
    writer.writerow(["case", "label", "values", *columns])
    for case, measures in (*results.items(), (MEAN, means)):
        rows: list[tuple[str, str, Measures]] = [
            (name, as_key(label), measures.by_label[label])
            for name, label in zip(settings.names, settings.labels, strict=True)
        ]
        for name, values, row in (*rows, (FOREGROUND, "", measures.average)):
            writer.writerow([case, name, values, *(as_cell(row.get(column, math.nan)) for column in columns)])
    return file.getvalue()


def as_json(
    results: Mapping[str, CaseMeasures],
    files: Mapping[str, Mapping[str, Any]],
    means: CaseMeasures,
    counts: Mapping[Label, Mapping[str, int]],
    left_out: Iterable[LeftOut],
    agreement: Mapping[str, Mapping[str, Any]],
    settings: Settings,
) -> str:
    """nnU-Net's ``summary.json`` with more in it; NaN and inf as null."""
    content = {
        "metric_per_case": [
            {"case": case, **files[case], "metrics": _by_key(m.by_label), FOREGROUND: m.average}
            for case, m in results.items()
        ],
        "mean": _by_key(means.by_label),
        "foreground_mean": means.average,
        "cases_in_mean": _by_key(counts),
        "left_out": [asdict(entry) for entry in left_out],
        "agreement": agreement,
        "reliability": {as_key(label): _curve(curve) for label, curve in pooled_curves(results.values()).items()},
        "labels": dict(zip(map(as_key, settings.labels), settings.names, strict=True)),
        "ignore_label": settings.ignore_label,
        "tolerance_mm": settings.tolerance_mm,
        "first_samples": list(settings.first),
        "made": made(),
    }
    return json.dumps(_plain(content), indent=1, allow_nan=False) + "\n"


def pooled_curves(results: Iterable[CaseMeasures]) -> dict[Label, ReliabilityCurve]:
    """Each label's curve over the voxels of all cases."""
    pooled: dict[Label, ReliabilityCurve] = {}
    for measures in results:
        for label, curve in measures.curves.items():
            pooled[label] = pooled[label] + curve if label in pooled else curve
    return pooled


def format_table(means: CaseMeasures, settings: Settings) -> str:
    """Means over the cases, a line for each label and one for their mean."""
    columns = [
        own
        for column in HEADINGS
        for own in (column, *(f"{column}_{n}" for n in settings.first if column in SHOWN_OF_FIRST))
        if own in means.average
    ]
    rows = [["", *(HEADINGS.get(column) or " ".join(_of_first(column)) for column in columns)]]
    rows[0][columns.index("NSD") + 1] += f" {settings.tolerance_mm:g} mm"
    named = [*zip(settings.names, means.by_label.values(), strict=True), ("mean", means.average)]
    for name, measures in named if len(named) > 2 else named[:1]:
        digits = {"HD95_mm": 2, "ECE": 5}
        rows.append([name, *(f"{measures[column]:.{digits.get(column, 3)}f}" for column in columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join((row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:]))) for row in rows)
    return "\n".join(line.rstrip() for line in lines) + (LEGEND.format(unit="voxels") if "GED2" in columns else "")


def _of_first(column: str) -> tuple[str, str]:
    """Heading and number of GED2_16."""
    measure, _, number = column.rpartition("_")
    return HEADINGS[measure], number


def format_left_out(left_out: Iterable[LeftOut]) -> str:
    """A line for each reason, with the number of cases and their names; empty without any."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in left_out:
        reasons.setdefault((entry.what, entry.why), []).append(
            entry.case + (f" ({entry.detail})" if entry.detail else "")
        )
    lines = []
    for (what, why), cases in reasons.items():
        named = ", ".join(cases[:NAMED]) + (f" and {len(cases) - NAMED} more" if len(cases) > NAMED else "")
        whole = "left out" if what == CASE else f"left out of {what}"
        lines.append(f"{whole}: {count_cases(cases)}, {why}: {named}\n")
    return "".join(lines)


def count_cases(cases: Sized) -> str:
    """As it stands in a sentence."""
    return f"{len(cases)} case{'' if len(cases) == 1 else 's'}"


def as_key(label: Label) -> str:
    """A label as nnU-Net's ``summary.json`` calls it."""
    return str(label)


def _by_key(measures: Mapping[Label, Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    return {as_key(label): found for label, found in measures.items()}


def _curve(curve: ReliabilityCurve) -> dict[str, Any]:
    return {
        "edges": curve.edges.tolist(),
        "count": curve.count.tolist(),
        "confidence": curve.confidence.tolist(),
        "frequency": curve.frequency.tolist(),
        "expected_calibration_error": curve.expected_calibration_error,
    }


def as_cell(value: float) -> str:
    """A number in a CSV; NaN is an empty cell."""
    return "" if math.isnan(value) else f"{value:.9g}"


def _plain(value: Any) -> Any:
    """JSON has neither NaN nor infinity."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
