"""All measures of one case side by side, and their means over cases: what ``nnunet-multimodal evaluate`` reports.

Of every label or region, with the columns' names:

- ``Dice`` (as nnU-Net: NaN where prediction and reference lack the label), ``HD95_mm`` (NaN there too; inf where one of
  them lacks it), ``NSD`` (normalised surface distance at the tolerance; NaN there too), ``n_ref`` and ``n_pred``
  (voxels), of the prediction against the reference;
- of samples and prediction against the raters, see `nnunet_multimodal.metrics.distribution`: ``GED2``,
  ``sample_diversity``, ``rater_diversity``, ``rater_Dice`` and ``rater_Dice_nod`` (the prediction's, averaged over the
  raters: all of them, and those that drew something), ``fraction_better``, ``sample_Dice_q05``, ``…_q50``, ``…_q95``,
  ``M_IoU``, ``interrater_Dice`` (of the raters with one another) and ``within_raters`` (1 if the prediction agrees with
  the raters at least as well as one of them does with the others), ``volume_CRPS`` (voxels), ``volume_coverage``;
- ``ECE``: expected calibration error of the label's probability against the raters' mean.

Voxels that the reference ignores belong to nothing: they are taken out of both masks before surfaces are found.

The mean over the labels has no inf and no NaN among its terms. Of the distribution it is the paper's own average: of
distances, and of the samples' Dice before a quantile or a comparison is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from nnunet_multimodal.metrics.calibration import ReliabilityCurve, reliability_curve
from nnunet_multimodal.metrics.distribution import DistributionScores, Label, score_distribution, valid_voxels
from nnunet_multimodal.metrics.surface import dice, surface_distances

OVERLAP = ("Dice", "HD95_mm", "NSD", "n_ref", "n_pred")
QUANTILES = {"sample_Dice_q05": 0.05, "sample_Dice_q50": 0.5, "sample_Dice_q95": 0.95}
DISTRIBUTION = (
    "GED2", "sample_diversity", "rater_diversity", "rater_Dice", "rater_Dice_nod", "fraction_better", *QUANTILES,
    "M_IoU", "interrater_Dice", "within_raters", "volume_CRPS", "volume_coverage",
)  # fmt: skip
CALIBRATION = ("ECE",)

Measures = dict[str, float]


@dataclass(frozen=True, eq=False)
class CaseMeasures:
    """Measures of one case: column -> number, of every label (`by_label`) and of their mean (`average`)."""

    by_label: Mapping[Label, Measures]
    average: Measures
    curves: Mapping[Label, ReliabilityCurve] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class CaseArrays:
    """What is known of one case, on one grid.

    Attributes:
        prediction: label map (\\*D), 2D or 3D.
        reference: label map (\\*D).
        spacing_mm: size of a voxel along each axis.
        samples: label maps (S, \\*D), or None.
        raters: label maps (R, \\*D); None: the reference alone.
        sample_weights: (S,), or None for equal ones.
        rater_weights: (R,), or None for equal ones.
        probabilities: of every label in their order, (L, \\*D), or None.
    """

    prediction: np.ndarray
    reference: np.ndarray
    spacing_mm: Sequence[float]
    samples: np.ndarray | None = None
    raters: np.ndarray | None = None
    sample_weights: Sequence[float] | None = None
    rater_weights: Sequence[float] | None = None
    probabilities: np.ndarray | None = None


def measure_case(
    case: CaseArrays, labels: Sequence[Label], tolerance_mm: float, ignore_label: int | None = None
) -> CaseMeasures:
    """Everything that the arrays of a case allow.

    Raises:
        ValueError: shapes, types, weights or the tolerance do not fit.
    """
    valid = valid_voxels(case.reference[None], ignore_label)
    by_label = {label: _overlap(case, label, tolerance_mm, valid) for label in labels}
    average = {column: mean([measures[column] for measures in by_label.values()]) for column in OVERLAP}
    raters = case.reference[None] if case.raters is None else case.raters
    valid = valid_voxels(raters, ignore_label)
    if case.samples is not None:
        scores = score_distribution(
            case.prediction, case.samples, raters, labels, case.sample_weights, case.rater_weights, valid
        )
        average.update(_distribution(scores.average))
        for label, measures in by_label.items():
            measures.update(_distribution(scores.by_label[label]))
    curves = {}
    if case.probabilities is not None:
        for label, probability in zip(labels, case.probabilities, strict=True):
            drawn = np.zeros(raters.shape[1:], np.float32)
            weights = np.ones(len(raters)) if case.rater_weights is None else np.array(case.rater_weights)
            for rater, weight in zip(raters, weights / weights.sum(), strict=True):  # one at a time: they are large
                drawn += np.float32(weight) * label_mask(rater, label)
            curves[label] = reliability_curve(probability, drawn, valid=valid)
            by_label[label]["ECE"] = curves[label].expected_calibration_error
        average["ECE"] = mean([measures["ECE"] for measures in by_label.values()])
    return CaseMeasures(by_label, average, curves)


def label_mask(label_map: np.ndarray, label: Label) -> np.ndarray:
    """Where a label map has a label, or any label of a region."""
    return np.isin(label_map, label) if isinstance(label, tuple) else label_map == label


def mean(values: Sequence[float]) -> float:
    """Mean of the finite ones; NaN without any."""
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else np.nan


def mean_over_cases(
    cases: Sequence[CaseMeasures], labels: Sequence[Label]
) -> tuple[CaseMeasures, dict[Label, dict[str, int]]]:
    """Means over the cases, and for every label and column the number of cases in the mean.

    The mean over labels and cases is that of the labels' means, as nnU-Net's ``foreground_mean``; of the distribution's
    columns it is that of the cases' averages.
    """
    columns = [c for c in (*OVERLAP, *DISTRIBUTION, *CALIBRATION) if any(c in case.average for case in cases)]

    def collect(label: Label, column: str) -> list[float]:
        return [case.by_label[label][column] for case in cases if column in case.by_label[label]]

    means = {label: {column: mean(collect(label, column)) for column in columns} for label in labels}
    counts = {label: {c: int(np.isfinite(collect(label, c)).sum()) for c in columns} for label in labels}
    average = {
        column: mean([case.average[column] for case in cases if column in case.average])
        if column in DISTRIBUTION
        else mean([means[label][column] for label in labels])
        for column in columns
    }
    return CaseMeasures(means, average), counts


def _overlap(case: CaseArrays, label: Label, tolerance_mm: float, valid: np.ndarray | None) -> Measures:
    predicted, there = label_mask(case.prediction, label), label_mask(case.reference, label)
    if valid is not None:
        predicted, there = predicted & valid, there & valid
    sizes = {"n_ref": int(np.count_nonzero(there)), "n_pred": int(np.count_nonzero(predicted))}
    distances = surface_distances(predicted, there, case.spacing_mm)
    within = distances.within(tolerance_mm)
    if not any(sizes.values()):
        return {"Dice": np.nan, "HD95_mm": np.nan, "NSD": np.nan, **sizes}
    return {"Dice": dice(predicted, there), "HD95_mm": distances.hausdorff(), "NSD": within, **sizes}


def _distribution(scores: DistributionScores) -> Measures:
    return {
        "GED2": scores.generalized_energy_distance,
        "sample_diversity": scores.sample_diversity,
        "rater_diversity": scores.rater_diversity,
        "rater_Dice": scores.dice,
        "rater_Dice_nod": scores.dice_nod,
        "fraction_better": scores.fraction_better,
        **{column: scores.sample_dice_quantile(quantile) for column, quantile in QUANTILES.items()},
        "M_IoU": scores.matched_iou,
        "interrater_Dice": mean(scores.interrater_dice.tolist()),
        "within_raters": scores.within_raters,
        "volume_CRPS": scores.volume_crps,
        "volume_coverage": scores.volume_coverage,
    }
