"""All measures of one case side by side, and their means over cases: what ``nnunet-multimodal evaluate`` reports.

Of every label or region, with the columns' names:

- ``Dice`` (as nnU-Net: NaN where prediction and reference lack the label), ``HD95_mm`` (NaN there too; inf where one of
  them lacks it), ``NSD`` (normalised surface distance at the tolerance; NaN there too), ``n_ref`` and ``n_pred``
  (voxels), of the prediction against the reference;
- of samples and prediction against the raters, see `nnunet_multimodal.metrics.distribution`: ``GED2``,
  ``sample_diversity``, ``rater_diversity``, ``rater_Dice`` and ``rater_Dice_nod`` (the prediction's, averaged over the
  raters: all of them, and those that drew something), ``fraction_better``, ``sample_Dice_q05``, ``…_q50``, ``…_q95``,
  ``M_IoU``, ``interrater_Dice`` (of the raters with one another) and ``within_raters`` (1 if the prediction agrees
  with the raters, whoever is left out, at least as well as half of them, by weight, do with the others),
  ``volume_CRPS`` (voxels), ``volume_coverage``; ``GED2_16`` and so on are those of the first 16 samples;
- ``ECE``: expected calibration error of the label's probability against the raters' mean.

Of every rater besides (`CaseMeasures.raters`): ``weight`` (its share in the case), ``prediction_Dice`` and
``sample_Dice`` (the samples' mean) with this rater, ``others_Dice`` of this rater with the others and
``prediction_others_Dice`` of the prediction with the same others, and ``advantage``: 1 if the latter is no smaller.

Voxels that the reference ignores belong to nothing: they are taken out of both masks before surfaces are found. What a
rater ignores counts for the other ones: the raters' mean is that of those who do not ignore the voxel.

The mean over the labels has no inf and no NaN among its terms. Of the distribution it is the paper's own average: of
distances, and of the samples' Dice before a quantile or a comparison is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from nnunet_multimodal.metrics.calibration import ReliabilityCurve, reliability_curve
from nnunet_multimodal.metrics.distribution import (
    CaseDistribution,
    DistributionScores,
    Label,
    score_distribution,
    valid_voxels,
)
from nnunet_multimodal.metrics.surface import dice, surface_distances

OVERLAP = ("Dice", "HD95_mm", "NSD", "n_ref", "n_pred")
QUANTILES = {"sample_Dice_q05": 0.05, "sample_Dice_q50": 0.5, "sample_Dice_q95": 0.95}
DISTRIBUTION = (
    "GED2", "sample_diversity", "rater_diversity", "rater_Dice", "rater_Dice_nod", "fraction_better", *QUANTILES,
    "M_IoU", "interrater_Dice", "within_raters", "volume_CRPS", "volume_coverage",
)  # fmt: skip
OF_SAMPLES = ("GED2", "sample_diversity", "fraction_better", *QUANTILES, "M_IoU", "volume_CRPS", "volume_coverage")
CALIBRATION = ("ECE",)

Measures = dict[str, float]


@dataclass(frozen=True, eq=False)
class RaterMeasures:
    """Measures of a rater in one case: column -> number, of every label (`by_label`) and of their mean (`average`)."""

    by_label: Mapping[Label, Measures]
    average: Measures


@dataclass(frozen=True, eq=False)
class CaseMeasures:
    """Measures of one case: column -> number, of every label (`by_label`) and of their mean (`average`).

    `raters` are those that have a name and say something.
    """

    by_label: Mapping[Label, Measures]
    average: Measures
    curves: Mapping[Label, ReliabilityCurve] = field(default_factory=dict)
    raters: Mapping[str, RaterMeasures] = field(default_factory=dict)


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
        sample_groups: (S,), see :func:`score_distribution`, or None.
        rater_weights: (R,), or None for equal ones.
        probabilities: of every label in their order, (L, \\*D), or None.
        rater_names: (R,), of those of whom there are measures, or none.
    """

    prediction: np.ndarray
    reference: np.ndarray
    spacing_mm: Sequence[float]
    samples: np.ndarray | None = None
    raters: np.ndarray | None = None
    sample_weights: Sequence[float] | None = None
    sample_groups: Sequence[int] | None = None
    rater_weights: Sequence[float] | None = None
    probabilities: np.ndarray | None = None
    rater_names: Sequence[str] = ()


def measure_case(
    case: CaseArrays,
    labels: Sequence[Label],
    tolerance_mm: float,
    ignore_label: int | None = None,
    first: Sequence[int] = (),
) -> CaseMeasures:
    """Everything that the arrays of a case allow, and what they allow of the first so many samples.

    Raises:
        ValueError: shapes, types, weights, numbers or the tolerance do not fit.
    """
    valid = valid_voxels(case.reference[None], ignore_label)
    by_label = {label: _overlap(case, label, tolerance_mm, valid) for label in labels}
    average = {column: mean([measures[column] for measures in by_label.values()]) for column in OVERLAP}
    raters = case.reference[None] if case.raters is None else case.raters
    valid = None if ignore_label is None else raters != ignore_label
    agreement: dict[str, RaterMeasures] = {}
    if case.samples is not None or case.rater_names:
        samples = case.prediction[None] if case.samples is None else case.samples
        first = () if case.samples is None else first
        scores = score_distribution(
            case.prediction,
            samples,
            raters,
            labels,
            case.sample_weights,
            case.rater_weights,
            valid,
            first,
            case.sample_groups,
        )
        if case.samples is not None:
            average.update(_distribution(scores.average))
            for label, measures in by_label.items():
                measures.update(_distribution(scores.by_label[label]))
            for number, few in scores.first.items():
                average.update(_of_first(few.average, number))
                for label, measures in by_label.items():
                    measures.update(_of_first(few.by_label[label], number))
        agreement = _agreement(case, scores)
    curves = {}
    if case.probabilities is not None:
        weights = np.ones(len(raters)) if case.rater_weights is None else np.array(case.rater_weights)
        for label, probability in zip(labels, case.probabilities, strict=True):
            drawn, known = _mean_mask(raters, weights / weights.sum(), label, valid)
            curve = reliability_curve(probability, drawn, valid=known)
            by_label[label]["ECE"] = curve.expected_calibration_error
            if curve.count.any():
                curves[label] = curve
        average["ECE"] = mean([measures["ECE"] for measures in by_label.values()])
    return CaseMeasures(by_label, average, curves, agreement)


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
    found = dict.fromkeys(column for case in cases for column in case.average)
    known = (*OVERLAP, *DISTRIBUTION, *CALIBRATION)
    first = [column for column in found if column not in known]  # of the first so many samples
    columns = [column for column in (*OVERLAP, *DISTRIBUTION, *first, *CALIBRATION) if column in found]

    def collect(label: Label, column: str) -> list[float]:
        return [case.by_label[label][column] for case in cases if column in case.by_label[label]]

    means = {label: {column: mean(collect(label, column)) for column in columns} for label in labels}
    counts = {label: {c: int(np.isfinite(collect(label, c)).sum()) for c in columns} for label in labels}
    average = {
        column: mean([case.average[column] for case in cases if column in case.average])
        if column not in (*OVERLAP, *CALIBRATION)
        else mean([means[label][column] for label in labels])
        for column in columns
    }
    return CaseMeasures(means, average), counts


def _overlap(case: CaseArrays, label: Label, tolerance_mm: float, valid: np.ndarray | None) -> Measures:
    predicted, there = label_mask(case.prediction, label), label_mask(case.reference, label)
    if valid is not None:
        if not valid.any():
            return dict.fromkeys(OVERLAP, np.nan)
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
        "interrater_Dice": scores.mean_interrater_dice,
        "within_raters": scores.within_raters,
        "volume_CRPS": scores.volume_crps,
        "volume_coverage": scores.volume_coverage,
    }


def _of_first(scores: DistributionScores, number: int) -> Measures:
    found = _distribution(scores)
    return {f"{column}_{number}": found[column] for column in OF_SAMPLES}


def _agreement(case: CaseArrays, scores: CaseDistribution) -> dict[str, RaterMeasures]:
    """Name -> measures of the raters who say something."""

    def measures(scores: DistributionScores, rater: int) -> Measures:
        found = {
            "weight": scores.rater_weights,
            "prediction_Dice": scores.rater_dice,
            "sample_Dice": scores.rater_sample_dice,
            "others_Dice": scores.interrater_dice,
            "prediction_others_Dice": scores.others_dice,
            "advantage": scores.advantage,
        }
        row = {column: float(values[rater]) for column, values in found.items()}
        return row if case.samples is not None else {**row, "sample_Dice": np.nan}

    return {
        name: RaterMeasures(
            {label: measures(own, rater) for label, own in scores.by_label.items()}, measures(scores.average, rater)
        )
        for rater, name in enumerate(case.rater_names)
        if np.isfinite(scores.average.rater_dice[rater])
    }


def _mean_mask(
    raters: np.ndarray, weights: np.ndarray, label: Label, valid: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """The part of the raters (\\*D) that drew a label, of those who do not ignore the voxel, and where there are any.

    Args:
        raters: label maps (R, \\*D).
        weights: (R,), sum 1.
        label: label or region.
        valid: bool (R, \\*D), what they do not ignore, or None for all.
    """
    drawn, known = np.zeros((2, *raters.shape[1:]), np.float32)
    for index, weight in enumerate(np.float32(weights)):  # one at a time: they are large
        drawn += weight * label_mask(raters[index], label)
        if valid is not None:
            known += weight * valid[index]
    if valid is None or valid.all():
        return drawn, None
    return np.divide(drawn, known, out=drawn, where=known > 0), known > 0
