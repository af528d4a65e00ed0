"""How well samples of a segmentation agree with what the raters drew.

Monteiro et al., *Stochastic Segmentation Networks*, NeurIPS 2020: the squared generalised energy distance (Eq. 8), the
sample diversity (below it), the Dice of the mean prediction, DSC_nod (section 5.2), and how the samples' Dice compares
with the mean prediction's (Fig. 5 and the quantile in section 5.3). Samples and raters may carry weights (Gao et al.,
ICLR 2023: each expert's samples weigh what its gate says). Theirs is M-IoU too, the IoU of samples and raters brought
together by optimal transport; with as many samples as raters, all of equal weight, it is the best assignment.

Volumes: the continuous ranked probability score of the samples' voxel counts against each rater's, and how many raters
lie in the samples' central 95 %.

The prediction's agreement with the raters beside theirs with one another: leave one rater out and compare him, and the
prediction in his place, with the others; the prediction must do at least as well as half of the raters. Both are the
alternative annotator test's (Calderon et al., ACL 2025), here in one case and without a test. A rater whom the
prediction repeats would speak for it, where others of his kind have no twin: with two raters who drew something and an
empty one, an empty prediction would have the majority. So the prediction is within the raters only if it does as well
as half of their weight whichever rater is left out.

The distance of two label maps is d = 1 - IoU, averaged over the labels; 0 for a label that both lack. Expectations
include every map's pair with itself. Dice is 1 for a label that both lack.

A rater may say nothing of some voxels (nnU-Net's ignore label). Then

- a sample or the prediction meets a rater on the voxels of which this rater says something (M-IoU, Dice, volumes), two
  raters meet where both do (a pair without such a voxel has no part in a mean), two samples where any rater does;
- the energy distance is that of what is seen: every sample is looked at through each rater's voxels, with the rater's
  weight, and a rater through his own; what is not seen belongs to no label. As a distance of two distributions it is
  never negative, and 0 for equal ones; where all raters say something of the same voxels it is Eq. 8 on these. (Eq. 8
  of distances that are each taken on other voxels can be far below 0.) The less raters have in common, the smaller it
  is, as then what they see differs whatever they draw;
- a rater who says nothing at all is left out, and without any other all measures are NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from nnunet_multimodal.metrics.overlaps import Label, count_through_masks, pairwise_iou_distance
from nnunet_multimodal.metrics.transport import transport_plan
from nnunet_multimodal.metrics.views import Raters, Rows, listen, normalised

INTERVAL = (0.025, 0.975)  # of the samples' volumes
ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class DistributionScores:
    """One case: samples and mean prediction against the raters.

    Attributes:
        generalized_energy_distance: D_GED^2, between 0 and 2.
        sample_diversity: expected distance of two samples.
        rater_diversity: expected distance of two raters.
        matched_iou: M-IoU, between 0 and 1.
        dice: Dice of the mean prediction, averaged over the raters.
        dice_nod: the same over the raters that drew something; NaN where none did.
        rater_dice: (R,), Dice of the mean prediction with every rater.
        rater_sample_dice: (R,), Dice of the samples with every rater, averaged over the samples.
        interrater_dice: (R,), Dice of every rater, averaged over the others; NaN for a single one.
        others_dice: (R,), Dice of the mean prediction, averaged over the same others.
        rater_weights: (R,), sum 1; 0 for raters who say nothing, whose Dice is NaN.
        volume_crps: mean over the raters and labels, in voxels.
        volume_coverage: weight of the raters whose volume lies in the samples' interval, mean over the labels.
        sample_dice: (S,), Dice of every sample, averaged over the raters.
        sample_weights: (S,), sum 1.
    """

    generalized_energy_distance: float
    sample_diversity: float
    rater_diversity: float
    matched_iou: float
    dice: float
    dice_nod: float
    rater_dice: np.ndarray
    rater_sample_dice: np.ndarray
    interrater_dice: np.ndarray
    others_dice: np.ndarray
    rater_weights: np.ndarray
    volume_crps: float
    volume_coverage: float
    sample_dice: np.ndarray
    sample_weights: np.ndarray

    @property
    def fraction_better(self) -> float:
        """Weight of the samples whose Dice is higher than the mean prediction's."""
        if np.isnan(self.dice):
            return np.nan
        return float(self.sample_weights[self.sample_dice > self.dice + ROUNDING].sum())  # equal ones differ by that

    @property
    def mean_interrater_dice(self) -> float:
        """Dice of the raters with one another, averaged over the raters; NaN for a single one."""
        known = np.isfinite(self.interrater_dice)
        total = self.rater_weights[known].sum()
        return float(self.interrater_dice[known] @ self.rater_weights[known] / total) if total > 0 else np.nan

    @property
    def advantage(self) -> np.ndarray:
        """(R,), 1 where the prediction agrees with the others at least as well as this rater does, else 0, or NaN."""
        return np.where(
            np.isnan(self.interrater_dice), np.nan, self.others_dice >= self.interrater_dice - ROUNDING
        ).astype(float)

    @property
    def within_raters(self) -> float:
        """1 if, whichever rater is left out, the prediction does as well with the others as half of the raters do."""
        known, v = np.isfinite(self.interrater_dice), self.rater_weights
        total = v[known].sum()
        if not total > 0:
            return np.nan
        left = v[known] < 1
        least = np.min((self.dice - v[known] * self.rater_dice[known])[left] / (1 - v[known])[left], initial=np.inf)
        reached = known & (least >= self.interrater_dice - ROUNDING)
        return float(v[reached].sum() >= total / 2 - ROUNDING)

    def sample_dice_quantile(self, quantile: float) -> float:
        """The Dice that this fraction of the samples' weight reaches at most; always that of one of them."""
        return weighted_quantile(self.sample_dice, self.sample_weights, quantile)


@dataclass(frozen=True, eq=False)
class CaseDistribution:
    """The scores of one case, of every label alone (`by_label`) and averaged over the labels (`average`).

    In the average a sample's Dice is that of its labels' mean, as in the paper's Fig. 5. `first` has the scores of the
    first samples alone, by their number.
    """

    average: DistributionScores
    by_label: Mapping[Label, DistributionScores]
    first: Mapping[int, CaseDistribution] = field(default_factory=dict)


def score_distribution(
    prediction: np.ndarray,
    samples: np.ndarray,
    raters: np.ndarray,
    labels: Sequence[Label],
    sample_weights: Sequence[float] | np.ndarray | None = None,
    rater_weights: Sequence[float] | np.ndarray | None = None,
    valid: np.ndarray | None = None,
    first: Sequence[int] = (),
    sample_groups: Sequence[int] | None = None,
) -> CaseDistribution:
    """All measures of this module for one case, from one count of all pairs.

    Args:
        prediction: the mean prediction, a label map (\\*D).
        samples: label maps (S, \\*D), integers.
        raters: label maps (R, \\*D), integers.
        labels: foreground labels or regions.
        sample_weights: (S,); equal if not given. Only their ratios matter.
        rater_weights: (R,); equal if not given. Only their ratios matter.
        valid: bool (\\*D), voxels that count, or (R, \\*D), those of which each rater says something; all if not given.
        first: numbers of samples of which, from the first one on, there are scores as well.
        sample_groups: (S,); samples with the same number share the weight of what they are drawn from (an expert), the
            first samples among themselves. Each is alone if not given.

    Raises:
        ValueError: shapes, types, weights or numbers do not fit.
    """
    w, there = normalised(sample_weights, len(samples), "sample_weights"), listen(raters, rater_weights, labels, valid)
    for number in first:
        if not 0 < number <= len(samples):
            raise ValueError(f"first is {number}; there are {len(samples)} samples")
    if len(there.maps):
        overlaps = count_through_masks([samples, there.maps, prediction[None]], labels, there.masks)
        distance, dice, sizes = overlaps.iou_distance(), overlaps.dice(), overlaps.sizes_a
        rows = Rows.of(len(samples), there, predictions=1)

    def score(number: int) -> CaseDistribution:
        own = w if number == len(w) else first_weights(w, sample_groups, number)
        if not len(there.maps):
            nothing = _nothing(own, len(raters))
            return CaseDistribution(nothing, dict.fromkeys(labels, nothing))
        few = rows.first(number)
        by_label = {
            label: _score(distance[i : i + 1], dice[i : i + 1], sizes[i : i + 1], few, there, own)
            for i, label in enumerate(labels)
        }
        return CaseDistribution(_score(distance, dice, sizes, few, there, own), by_label)

    return replace(score(len(samples)), first={number: score(number) for number in first})


def first_weights(weights: np.ndarray, groups: Sequence[int] | None, number: int) -> np.ndarray:
    """Weights (number,) of the first so many samples, whose groups (S,) keep the weight that they have among all (S,).

    Raises:
        ValueError: they have no weight.
    """
    own = weights[:number]
    if groups is not None:
        of_group = np.bincount(groups, weights)
        first = np.asarray(groups[:number])
        own = of_group[first] / np.bincount(first)[first]
    return normalised(own, number, "sample_weights")


def generalized_energy_distance(
    samples: np.ndarray,
    raters: np.ndarray,
    labels: Sequence[Label],
    sample_weights: Sequence[float] | np.ndarray | None = None,
    rater_weights: Sequence[float] | np.ndarray | None = None,
    valid: np.ndarray | None = None,
) -> float:
    """D_GED^2 of samples (S, \\*D) and raters (R, \\*D), Eq. 8; arguments as in `score_distribution`."""
    w, there = normalised(sample_weights, len(samples), "sample_weights"), listen(raters, rater_weights, labels, valid)
    if not len(there.maps):
        return np.nan
    distance = count_through_masks([samples, there.maps], labels, there.masks).iou_distance().mean(0)
    return _energy_distance(distance, Rows.of(len(samples), there, predictions=0), w, there.weights)


def matched_iou(
    samples: np.ndarray,
    raters: np.ndarray,
    labels: Sequence[Label],
    sample_weights: Sequence[float] | np.ndarray | None = None,
    rater_weights: Sequence[float] | np.ndarray | None = None,
    valid: np.ndarray | None = None,
) -> float:
    """M-IoU of samples (S, \\*D) and raters (R, \\*D); arguments as in `score_distribution`."""
    w, there = normalised(sample_weights, len(samples), "sample_weights"), listen(raters, rater_weights, labels, valid)
    if not len(there.maps):
        return np.nan
    distance = np.empty((len(samples), len(there.maps)))
    for number in np.unique(there.own):
        theirs, mask = there.own == number, None if there.masks is None else there.masks[number]
        distance[:, theirs] = pairwise_iou_distance(samples, there.maps[theirs], labels, mask)
    return _matched_iou(distance, w, there.weights)


def continuous_ranked_probability_score(samples: np.ndarray, weights: np.ndarray, observed: float) -> float:
    """CRPS of weighted samples (S,): E|X - y| - E|X - X'| / 2, y the observed; in the samples' unit, 0 is best."""
    spread = weights @ np.abs(samples[:, None] - samples) @ weights
    return float(weights @ np.abs(samples - observed) - spread / 2)


def sample_diversity(
    samples: np.ndarray,
    labels: Sequence[Label],
    sample_weights: Sequence[float] | np.ndarray | None = None,
    valid: np.ndarray | None = None,
) -> float:
    """Expected distance of two samples of (S, \\*D), pairs with themselves included."""
    w = normalised(sample_weights, len(samples), "sample_weights")
    return float(w @ pairwise_iou_distance(samples, samples, labels, valid) @ w)


def valid_voxels(raters: np.ndarray, ignore_label: int | None) -> np.ndarray | None:
    """Where no rater of (R, \\*D) has the ignore label, (\\*D); None (all) without an ignore label."""
    return None if ignore_label is None else ~(raters == ignore_label).any(0)


def weighted_quantile(values: np.ndarray, weights: np.ndarray, quantile: float) -> float:
    """The smallest value that, with all below it, has at least this fraction of the weight.

    Raises:
        ValueError: the quantile is not between 0 and 1.
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile is {quantile}; it lies between 0 and 1")
    values, weights = values[weights > 0], weights[weights > 0]
    order = np.argsort(values)
    reached = np.cumsum(weights[order]) / weights.sum()
    index = int(np.searchsorted(reached, quantile - 1e-9))  # 20 times 0.05 is 1 but for rounding
    return float(values[order][min(index, len(values) - 1)])


def _score(
    distance: np.ndarray, dice: np.ndarray, sizes: np.ndarray, rows: Rows, raters: Raters, w: np.ndarray
) -> DistributionScores:
    """From distances and Dice (L, KN, KN) and voxels (L, KN)."""
    distance, v, own = distance.mean(0), raters.weights, rows.own
    volumes, theirs = sizes[:, rows.samples].astype(float), sizes[:, own].astype(float)  # (L, S, R), (L, R)
    low, high = (np.array([[weighted_quantile(x, w, q) for x in label.T] for label in volumes]) for q in INTERVAL)
    crps = [
        [continuous_ranked_probability_score(x, w, y) for x, y in zip(label.T, row, strict=True)]
        for label, row in zip(volumes, theirs, strict=True)
    ]
    predicted = np.ascontiguousarray(dice[:, rows.prediction, own])  # (L, R)
    sampled = dice[:, rows.samples, own].mean(0)  # (S, R)
    drawn = theirs > 0
    with np.errstate(invalid="ignore"):  # 0 / 0: no rater drew the label
        nod = (predicted * drawn) @ v / (drawn @ v)  # (L,)
    others = v * raters.common * ~np.eye(len(v), dtype=bool)  # (R, R)
    with np.errstate(invalid="ignore"):  # 0 / 0: there is no other one
        others = others / others.sum(1, keepdims=True)
    between = dice[:, rows.cross, rows.cross.T].mean(0)  # (R, R)

    def of_all(values: np.ndarray) -> np.ndarray:
        """Of the raters who say nothing as well."""
        every = np.full(len(raters.says), np.nan)
        every[raters.says] = values
        return every

    return DistributionScores(
        generalized_energy_distance=_energy_distance(distance, rows, w, v),
        sample_diversity=float(w @ distance[np.ix_(rows.together, rows.together)] @ w),
        rater_diversity=_mean_of_pairs(distance[rows.cross, rows.cross.T], v, raters.common),
        matched_iou=_matched_iou(distance[rows.samples, own], w, v),
        dice=float(predicted.mean(0) @ v),
        dice_nod=float(np.mean(nod[np.isfinite(nod)])) if np.isfinite(nod).any() else np.nan,
        rater_dice=of_all(predicted.mean(0)),
        rater_sample_dice=of_all(w @ sampled),
        interrater_dice=of_all((others * between).sum(1)),
        others_dice=of_all(others @ predicted.mean(0)),
        rater_weights=np.nan_to_num(of_all(v)),
        volume_crps=float((np.array(crps) @ v).mean()),
        volume_coverage=float((((theirs >= low) & (theirs <= high)) @ v).mean()),
        sample_dice=sampled @ v,
        sample_weights=w,
    )


def _nothing(w: np.ndarray, raters: int) -> DistributionScores:
    """No rater says anything."""
    own, sampled = np.full(raters, np.nan), np.full(len(w), np.nan)
    nan = float("nan")
    return DistributionScores(nan, nan, nan, nan, nan, nan, own, own, own, own, np.zeros(raters), nan, nan, sampled, w)


def _mean_of_pairs(distance: np.ndarray, v: np.ndarray, common: np.ndarray) -> float:
    """Expectation of distances (R, R) over the pairs that have a voxel in common."""
    if common.all():
        return float(v @ distance @ v)
    weights = np.outer(v, v) * common
    return float((weights * distance).sum() / weights.sum())


def _matched_iou(distance: np.ndarray, w: np.ndarray, v: np.ndarray) -> float:
    """From the distances (S, R)."""
    plan = transport_plan(distance[None], w[None], v[None])[0]
    return 1 - float((plan * distance).sum())


def _energy_distance(distance: np.ndarray, rows: Rows, w: np.ndarray, v: np.ndarray) -> float:
    """From the distances (KN, KN) of all that was counted."""
    among = np.concatenate((rows.seen.ravel(), rows.own))
    u = np.concatenate((np.outer(rows.seen_weights, w).ravel(), -v))
    return float(-u @ distance[np.ix_(among, among)] @ u)  # this product has the three terms of Eq. 8
