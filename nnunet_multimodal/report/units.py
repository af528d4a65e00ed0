"""Volumes and what is measured of them, all in one unit; and why a volume has no interval."""

from __future__ import annotations

import math
from dataclasses import replace

from nnunet_multimodal.metrics.case import mean
from nnunet_multimodal.report.evaluations import Evaluation, Measures
from nnunet_multimodal.report.gather import VOLUME_KEYS, Predictions, Study

CRPS = "volume_CRPS"  # of evaluations, in voxels


def crps_unit(study: Study) -> str:
    """The unit of the study's volumes; voxels where the voxel size of any case with a CRPS is not known."""
    measured = [
        (run, case)
        for run in study.predictions
        if run.evaluation
        for case, rows in run.evaluation.cases.items()
        if any(math.isfinite(row.get(CRPS, math.nan)) for row in rows.values())
    ]
    return study.unit if all(run.voxel_size(case, study.unit) for run, case in measured) else "voxels"


def with_crps_in(study: Study, unit: str) -> Study:
    """The study with CRPS in this unit, and its means over the cases taken anew, whose voxels may differ in size."""
    runs = [
        run if run.evaluation is None else replace(run, evaluation=_converted(run, run.evaluation, unit))
        for run in study.predictions
    ]
    return replace(study, predictions=tuple(runs))


def _converted(run: Predictions, evaluation: Evaluation, unit: str) -> Evaluation:
    if unit == "voxels":
        return evaluation
    cases = {
        case: {label: _times(row, run.voxel_size(case, unit) or math.nan) for label, row in rows.items()}
        for case, rows in evaluation.cases.items()
    }
    means = {}
    for label, row in evaluation.mean.items():
        own = mean([rows[label][CRPS] for rows in cases.values() if CRPS in rows.get(label, {})])
        means[label] = {**row, CRPS: own} if CRPS in row else row
    return replace(evaluation, cases=cases, mean=means)


def _times(row: Measures, voxel_size: float) -> Measures:
    return {**row, CRPS: row[CRPS] * voxel_size} if CRPS in row else row


def no_interval(run: Predictions, case: str, label: str, unit: str) -> str:
    """Why a label's volume has no interval over samples; empty where it has one."""
    summary = run.summaries.get(case)
    if summary is None:
        return "No samples are known of this case: nnunet-multimodal predict writes them to CASE.json."
    told = summary.get("labels", {}).get(label, {}).get(VOLUME_KEYS[unit])
    if not told:
        return f"CASE.json tells no volume in {unit} of this label."
    if not run.volume(case, label, unit):
        return "A number of this volume in CASE.json is not finite."
    return "" if summary.get("samples", 0) > 1 else "An interval takes at least two samples."
