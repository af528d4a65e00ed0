"""From a study to the text of the page: tables, plots, and the data that its script reads."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.colors import to_hex

from nnunet_multimodal import __version__
from nnunet_multimodal.evaluate.agreement import HEADINGS as AGREEMENT_HEADINGS
from nnunet_multimodal.evaluate.report import FOREGROUND, HEADINGS, LEGEND, SHOWN_OF_FIRST
from nnunet_multimodal.lookup import split_length
from nnunet_multimodal.metrics.case import DISTRIBUTION
from nnunet_multimodal.report import plots
from nnunet_multimodal.report.evaluations import AVERAGE, Evaluation, Measures, SubsetCell, Subsets
from nnunet_multimodal.report.gather import Predictions, Study
from nnunet_multimodal.report.provenance import UNKNOWN, records
from nnunet_multimodal.report.units import CRPS, crps_unit, no_interval, with_crps_in

HERE = Path(__file__).parent
SCRIPTS = ("volumes.js", "case.js", "numbers.js", "viewer.js")
CASE_COLUMNS = ("Dice", "HD95_mm", "NSD", "GED2", "ECE")
RATER_COLUMNS = ("rater_Dice", "interrater_Dice")  # the latter only of several raters
INKS = ("#ffffff", "#1b1f24")  # on the darker and the lighter half of the colour map
SCRIPT_SAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


class Heat(NamedTuple):
    """A cell of the table of subsets: text, interval, tooltip, and its colours, empty without a value."""

    text: str
    interval: str
    title: str
    background: str = ""
    ink: str = ""


def render(study: Study, views: Sequence[Mapping[str, Any]], title: str) -> str:
    """The page.

    Args:
        study: what is on disk.
        views: of the cases, from :func:`nnunet_multimodal.report.volumes.encode_case`.
        title: of the page.
    """
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "sortable": sortable, "breakable": breakable}
    unit = crps_unit(study)
    study = with_crps_in(study, unit)
    columns = case_columns(study)
    raters = {view["case"]: view["rater_voxels"] for view in views}
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return environment.get_template("page.html").render(
        title=title,
        study=study,
        made=made,
        version=__version__,
        records=records(study, made),
        unknown=UNKNOWN,
        css=Markup((HERE / "static" / "report.css").read_text()),
        script=script(),
        viewer=viewer() if views else "",
        licences=(HERE / "static" / "NIIVUE_LICENSES.txt").read_text() if views else "",
        data=safe_json(
            {"cases": case_data(study, raters), "runs": [run.name for run in study.predictions], "unit": study.unit}
        ),
        views=[safe_json(view) for view in views],
        view_of={view["case"]: index for index, view in enumerate(views)},
        shrunk=_shrunk(views),
        oriented=any(view["oriented"] for view in views),
        headings=headings(study),
        agreement_headings=AGREEMENT_HEADINGS,
        legend=LEGEND.format(unit=unit).strip(),
        means=mean_table(study, columns),
        distribution=mean_table(study, distribution_columns(study)),
        agreement=agreement_table(study),
        heat=[heat_table(subsets, metric) for subsets in study.subsets for metric in subsets.values("metric")],
        case_columns=columns,
        rows=case_rows(study),
        **_plots(study, raters),
        contributions=mean_contributions(study),
        plans=plan_groups(study),
    )


def script() -> Markup:
    """The files of the page's script, in a scope of their own."""
    code = "\n".join((HERE / "static" / name).read_text() for name in SCRIPTS)
    return Markup('(() => {\n"use strict";\n' + code + "})();")  # package data, not text from a study


def safe_json(content: Any) -> Markup:
    """JSON that no text in it can end the script element of; NaN as null."""
    text = json.dumps(_plain(content), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character, escape in SCRIPT_SAFE.items():
        text = text.replace(character, escape)
    return Markup(text)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def viewer() -> str:
    """niivue, gzipped and in base64."""
    return base64.b64encode(gzip.compress((HERE / "static" / "niivue.umd.js").read_bytes(), mtime=0)).decode("ascii")


def number(value: float | None, digits: int = 3) -> str:
    """As it stands in a table; a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def sortable(value: float | None) -> str:
    """What the script sorts a cell by; empty where there is no number."""
    return "" if value is None or not math.isfinite(value) else str(value)


def breakable(text: str) -> Markup:
    """A long name that may break after _, / and + and before capitals."""
    return Markup("<wbr>").join(re.split(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[_/+])", text))


def case_columns(study: Study) -> list[str]:
    """What the tables of folders and of cases show of an evaluation, as far as there is any."""
    several = any(_has(run, RATER_COLUMNS[1]) for run in study.predictions)
    wanted = (*CASE_COLUMNS, *RATER_COLUMNS) if several else CASE_COLUMNS
    return [column for column in wanted if any(_has(run, column) for run in study.predictions)]


def distribution_columns(study: Study) -> list[str]:
    """Of samples and raters, with those of the first so many samples (GED2_16) behind those of all."""
    found = {c for run in study.predictions if run.evaluation for row in run.evaluation.mean.values() for c in row}
    first = sorted({int(c.rpartition("_")[2]) for c in found if re.fullmatch(rf"({'|'.join(SHOWN_OF_FIRST)})_\d+", c)})
    every = [column for column in HEADINGS if column in DISTRIBUTION]
    return [own for c in every for own in (c, *(f"{c}_{n}" for n in first if c in SHOWN_OF_FIRST)) if own in found]


def headings(study: Study) -> dict[str, str]:
    """Column -> heading, with CRPS's unit, and the tolerance of the surface distance if it is the same everywhere."""
    found = {run.evaluation.tolerance_mm for run in study.predictions if run.evaluation and run.evaluation.has("NSD")}
    named = {c: c.rpartition("_") for c in distribution_columns(study) if c not in HEADINGS}
    return {
        **HEADINGS,
        CRPS: f"{HEADINGS[CRPS]} ({crps_unit(study)})",
        **{column: f"{HEADINGS[measure]} {number}" for column, (measure, _, number) in named.items()},
        "NSD": f"{HEADINGS['NSD']} {found.pop():g} mm" if len(found) == 1 else HEADINGS["NSD"],
    }


def mean_table(study: Study, columns: Sequence[str]) -> dict[str, Any]:
    """Columns that have a number, and each evaluated folder's rows: of its labels, and their mean if there are more."""
    evaluated = [(run.name, run.evaluation) for run in study.predictions if run.evaluation]
    found = [row for _, evaluation in evaluated for row in evaluation.mean.values()]
    columns = [c for c in columns if any(math.isfinite(row.get(c, math.nan)) for row in found)]
    groups = [
        {"run": name, "cases": len(evaluation.cases), "rows": _rows(evaluation.mean, evaluation, columns)}
        for name, evaluation in evaluated
    ]
    return {"columns": columns, "groups": groups if columns else []}


def agreement_table(study: Study) -> list[dict[str, Any]]:
    """Each folder's rows: label, rater, number of cases, and the means over them."""
    return [
        {
            "run": run.name,
            "rows": [
                ("mean" if label == FOREGROUND else label, rater, row["cases"], [row[c] for c in AGREEMENT_HEADINGS])
                for label, raters in run.evaluation.agreement.items()
                if label != FOREGROUND or len(run.evaluation.labels) > 1
                for rater, row in raters.items()
            ],
        }
        for run in study.predictions
        if run.evaluation and run.evaluation.agreement
    ]


def _rows(
    measured: Mapping[str, Measures], evaluation: Evaluation, columns: Sequence[str]
) -> list[tuple[str, list[float | None]]]:
    """Label and its numbers; of several labels their mean too."""
    labels = [*evaluation.labels, FOREGROUND] if len(evaluation.labels) > 1 else list(evaluation.labels)
    there = [label for label in labels if label in measured]
    return [("mean" if k == FOREGROUND else k, [measured[k].get(column) for column in columns]) for k in there]


def _has(run: Predictions, column: str) -> bool:
    return run.evaluation is not None and run.evaluation.has(column)


def case_rows(study: Study) -> list[dict[str, Any]]:
    """A row for each folder, case and label."""
    rows = []
    for run in study.predictions:
        for case in run.cases:
            summary = run.summaries.get(case, {})
            measured = run.evaluation.cases.get(case, {}) if run.evaluation else {}
            labels = dict.fromkeys([*summary.get("labels", {}), *(k for k in measured if k != FOREGROUND)])
            for label in labels or [""]:
                rows.append(
                    {
                        "run": run.name,
                        "case": case,
                        "label": label,
                        "absent": ", ".join(summary.get("absent", ())),
                        "measures": measured.get(label, {}),
                        "volume": run.volume(case, label, study.unit),
                        "no_interval": no_interval(run, case, label, study.unit),
                        "shown": case in run.files,
                    }
                )
    return rows


def case_data(study: Study, raters: Mapping[str, Mapping[str, Sequence[int | None]]]) -> dict[str, Any]:
    """What the script tells of a case beside its pictures: volumes, agreement with the raters, contributions.

    Args:
        study: what is on disk.
        raters: case -> label -> voxels of each rater.
    """
    data: dict[str, Any] = {case: {"runs": {}, "explained": []} for case in study.cases}
    named = headings(study)
    for run in study.predictions:
        for case in run.cases:
            summary = run.summaries.get(case, {})
            data[case]["runs"][run.name] = {
                "labels": summary.get("labels", {}),
                "references": {
                    label: plots.reference_volume(run, case, label, study.unit) for label in summary.get("labels", {})
                },
                "raters": plots.rater_volumes(run, case, raters.get(case, {}), study.unit),
                "no_interval": {
                    label: no_interval(run, case, label, study.unit) for label in summary.get("labels", {})
                },
                "distribution": distribution(run, case, named),
                "agreement": agreement(run, case),
                "absent": summary.get("absent", []),
                "samples": summary.get("samples"),
                "drawn_from": summary.get("drawn_from", ""),
                "weights": summary.get("sample_weights"),
            }
    for explanation in study.explanations:
        for table, rows in explanation.tables.items():
            for row in rows:
                if row["case"] in data:
                    data[row["case"]]["explained"].append({**row, "table": table, "from": explanation.name})
    return data


def distribution(run: Predictions, case: str, named: Mapping[str, str]) -> dict[str, Any] | None:
    """Of a case: headings, and rows of what the evaluation tells of samples and raters; None if it tells nothing."""
    measured = run.evaluation.cases.get(case, {}) if run.evaluation else {}
    every = [column for column in HEADINGS if column in DISTRIBUTION]
    columns = [c for c in every if any(math.isfinite(row.get(c, math.nan)) for row in measured.values())]
    if run.evaluation is None or not columns:
        return None
    return {"columns": [named[c] for c in columns], "rows": _rows(measured, run.evaluation, columns)}


def agreement(run: Predictions, case: str) -> dict[str, Any] | None:
    """Of a case: headings, and label, rater and numbers of what the evaluation tells of every rater."""
    found = run.evaluation.case_agreement.get(case, ()) if run.evaluation else ()
    own = [(label, rater, row) for label, rater, row in found if label != FOREGROUND]
    rows = [(label, rater, [row[column] for column in AGREEMENT_HEADINGS]) for label, rater, row in own]
    return {"columns": list(AGREEMENT_HEADINGS.values()), "rows": rows} if rows else None


def heat_table(subsets: Subsets, metric: str) -> dict[str, Any]:
    """Rows are subsets, columns labels and models; Dice is coloured from 0 to 1, distances by their own range."""
    cells = {(c.subset, c.label, c.model): c for c in subsets.cells if c.metric == metric}
    columns = [(label, model) for label in subsets.values("label") for model in subsets.values("model")]
    finite = [cell.mean for cell in cells.values() if math.isfinite(cell.mean)]
    low, high = (0.0, 1.0) if metric == "Dice" else (min(finite, default=0.0), max(finite, default=1.0))
    rows = [
        {
            "present": None if subset == AVERAGE else [m in subset.split("+") for m in subsets.modalities],
            "cells": [_heat(cells.get((subset, label, model)), metric, low, high) for label, model in columns],
        }
        for subset in subsets.values("subset")
    ]
    models = subsets.values("model")
    same_length = len({split_length(model)[1:] for model in models}) == 1
    return {
        "name": subsets.name,
        "metric": metric.replace("_mm", " (mm)"),
        "modalities": subsets.modalities,
        "labels": subsets.values("label"),
        "models": [split_length(model)[0] for model in models] if same_length else models,
        "rows": rows,
    }


def _heat(cell: SubsetCell | None, metric: str, low: float, high: float) -> Heat:
    if cell is None or not math.isfinite(cell.mean):
        return Heat("–", "", "no value")
    digits = 3 if metric == "Dice" else 1
    interval = f"{number(cell.low, digits)} to {number(cell.high, digits)}"
    title = f"{cell.n:g} cases"
    if cell.without_value:
        title += f", {cell.without_value:g} without a distance"
    if math.isfinite(cell.p_holm):
        title += f", p against the baseline {cell.p_holm:.3g} (Holm)"
    star = "*" if cell.p_holm < 0.05 else ""
    share = (cell.mean - low) / ((high - low) or 1)
    colour = to_hex(colormaps["cividis"](share))
    return Heat(number(cell.mean, digits) + star, interval, title, colour, INKS[share > 0.5])


def plan_groups(study: Study) -> list[dict[str, Any]]:
    """The settings of plans, and the models that have the same."""
    groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for model in study.models:
        own = {"data set": model.dataset, "plans": model.plans, "configuration": model.configuration, **model.settings}
        groups.setdefault(tuple(own.items()), []).append(model.trainer)
    return [{"settings": dict(settings), "models": models} for settings, models in groups.items()]


def mean_contributions(study: Study) -> list[dict[str, Any]]:
    """Of each explanation: what leaving out a modality changes, averaged over the cases, for each label."""
    tables = []
    for explanation in study.explanations:
        groups: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for row in explanation.tables.get("contributions", ()):
            with_, without = (float(row[c]) if row[c] else math.nan for c in ("Dice", "Dice_without"))
            groups.setdefault((row["modality"], row["label"]), []).append((float(row["changed"]), with_ - without))
        rows = []
        for (modality, label), values in groups.items():
            lost = [value for _, value in values if not math.isnan(value)]
            changed = sum(value for value, _ in values) / len(values)
            mean_lost = sum(lost) / len(lost) if lost else None
            rows.append(
                {"modality": modality, "label": label, "changed": changed, "lost": mean_lost, "cases": len(values)}
            )
        if rows:
            tables.append({"name": explanation.name, "rows": rows})
    return tables


def _plots(study: Study, raters: Mapping[str, Mapping[str, Sequence[int | None]]]) -> dict[str, Any]:
    """Data URIs; empty where there is nothing to draw."""
    runs = study.predictions
    calibrated = [(run.name, run.evaluation) for run in runs if run.evaluation and run.evaluation.reliability]
    sampled = any(_has(run, "sample_Dice_q50") for run in runs)
    labels = dict.fromkeys(label for run in runs for label in run.labels)
    volumes = {label: plots.volumes(runs, label, study.unit, raters) for label in labels}
    trained = [model for model in study.models if any(fold.epochs for fold in model.folds)]
    return {
        "training_plot": plots.training_curves(trained) if trained else "",
        "reliability_plot": plots.reliability(runs) if calibrated else "",
        "calibrated": [
            (name, label, curve["expected_calibration_error"])
            for name, evaluation in calibrated
            for label, curve in evaluation.reliability.items()
        ],
        "sample_plot": plots.sample_quality(runs) if sampled else "",
        "volume_plots": {label: uri for label, uri in volumes.items() if uri},
    }


def _shrunk(views: Sequence[Mapping[str, Any]]) -> str:
    """How much smaller the pictures are, in words."""
    if not views:
        return ""
    shares = [math.prod(view["original_shape"]) / math.prod(view["shape"]) for view in views]
    if max(shares) == 1:
        return "Volumes are shown voxel by voxel; grey values are stored with loss (8 bits, WebP)."
    times = " to ".join(dict.fromkeys(f"{share:.0f}" for share in (min(shares), max(shares))))
    return (
        f"Volumes are shown with {times} times fewer voxels than the files have, and "
        "grey values with loss (8 bits, WebP): for a look, not for measuring. All numbers are of the files."
    )
