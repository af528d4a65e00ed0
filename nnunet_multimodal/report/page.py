"""From a study to the text of the page: tables, plots, and the data that its script reads."""

from __future__ import annotations

import base64
import gzip
import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.colors import to_hex

from nnunet_multimodal.evaluate.report import FOREGROUND, HEADINGS
from nnunet_multimodal.lookup import split_length
from nnunet_multimodal.report import plots
from nnunet_multimodal.report.evaluations import AVERAGE, SubsetCell, Subsets
from nnunet_multimodal.report.gather import Predictions, Study

HERE = Path(__file__).parent
PACKAGES = ("nnunet-multimodal", "nnunetv2", "torch", "numpy")
SCRIPTS = ("volumes.js", "case.js", "numbers.js", "viewer.js")
CASE_COLUMNS = ("Dice", "HD95_mm", "NSD", "GED2", "ECE")
INKS = ("#ffffff", "#1b1f24")  # on the darker and the lighter half of the colour map
SCRIPT_SAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


class Heat(NamedTuple):
    """A cell of the table of subsets: text, tooltip, and its colours, empty without a value."""

    text: str
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
    environment.filters |= {"number": number, "breakable": breakable}
    return environment.get_template("page.html").render(
        title=title,
        study=study,
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        versions={"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        css=Markup((HERE / "static" / "report.css").read_text()),
        script=script(),
        viewer=viewer() if views else "",
        licences=(HERE / "static" / "NIIVUE_LICENSES.txt").read_text() if views else "",
        data=safe_json({"cases": case_data(study), "runs": [run.name for run in study.predictions]}),
        views=[safe_json(view) for view in views],
        view_names=[view["case"] for view in views],
        shrunk=_shrunk(views),
        headings=HEADINGS,
        foreground=FOREGROUND,
        means=mean_table(study),
        heat=[heat_table(subsets, metric) for subsets in study.subsets for metric in subsets.values("metric")],
        case_columns=[column for column in CASE_COLUMNS if any(_has(run, column) for run in study.predictions)],
        rows=case_rows(study),
        **_plots(study),
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


def breakable(text: str) -> Markup:
    """A long name that may break after _, / and + and before capitals."""
    return Markup("<wbr>").join(re.split(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[_/+])", text))


def mean_table(study: Study) -> dict[str, Any]:
    """Columns, and a row for each evaluated folder and label: what ``evaluate`` prints, of all folders."""
    evaluated = [(run, run.evaluation) for run in study.predictions if run.evaluation]
    found = [row for _, evaluation in evaluated for row in evaluation.mean.values()]
    columns = [c for c in HEADINGS if any(math.isfinite(row.get(c, math.nan)) for row in found)]
    rows = []
    for run, evaluation in evaluated:
        labels = [*evaluation.labels, FOREGROUND] if len(evaluation.labels) > 1 else list(evaluation.labels)
        rows += [
            {
                "run": run.name,
                "label": "mean" if label == FOREGROUND else label,
                "cases": len(evaluation.cases),
                "values": [evaluation.mean[label].get(column) for column in columns],
            }
            for label in labels
        ]
    return {"columns": columns, "rows": rows}


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
                        "volume": (summary.get("labels", {}).get(label, {}).get("volume_ml") or {}),
                        "shown": case in run.files,
                    }
                )
    return rows


def case_data(study: Study) -> dict[str, Any]:
    """What the script tells of a case beside its pictures: volumes and contributions."""
    data: dict[str, Any] = {case: {"runs": {}, "explained": []} for case in study.cases}
    for run in study.predictions:
        for case in run.cases:
            summary = run.summaries.get(case, {})
            data[case]["runs"][run.name] = {
                "labels": summary.get("labels", {}),
                "references_ml": {
                    label: plots.reference_volume_ml(run, case, label) for label in summary.get("labels", {})
                },
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
        return Heat("–", "no value")
    digits = 3 if metric == "Dice" else 1
    interval = f"95 % [{number(cell.low, digits)}, {number(cell.high, digits)}], {cell.n:g} cases"
    if cell.without_value:
        interval += f", {cell.without_value:g} without a distance"
    if math.isfinite(cell.p_holm):
        interval += f", p against the baseline {cell.p_holm:.3g} (Holm)"
    star = "*" if cell.p_holm < 0.05 else ""
    share = (cell.mean - low) / ((high - low) or 1)
    return Heat(number(cell.mean, digits) + star, interval, to_hex(colormaps["cividis"](share)), INKS[share > 0.5])


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


def _plots(study: Study) -> dict[str, Any]:
    """Data URIs; empty where there is nothing to draw."""
    runs = study.predictions
    calibrated = [(run.name, run.evaluation) for run in runs if run.evaluation and run.evaluation.reliability]
    sampled = any(_has(run, "sample_Dice_q50") for run in runs)
    labels = dict.fromkeys(
        label for run in runs for summary in run.summaries.values() for label in summary.get("labels", {})
    )
    volumes = {label: plots.volumes(runs, label) for label in labels}
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
    return (
        f"Volumes are shown with {min(shares):.0f} to {max(shares):.0f} times fewer voxels than the files have, and "
        "grey values with loss (8 bits, WebP): for a look, not for measuring. All numbers are of the files."
    )
