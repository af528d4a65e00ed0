"""How well samples of a segmentation agree with what the raters drew.

Monteiro et al., *Stochastic Segmentation Networks*, NeurIPS 2020: the squared generalised energy distance (Eq. 8), the
sample diversity (below it), the Dice of the mean prediction, DSC_nod (section 5.2), and how the samples' Dice compares
with the mean prediction's (Fig. 5 and the quantile in section 5.3). Samples and raters may carry weights (Gao et al.,
ICLR 2023: each expert's samples weigh what its gate says). Theirs is M-IoU too, the IoU of samples and raters brought
together by optimal transport; with as many samples as raters, all of equal weight, it is the best assignment.

Volumes: the continuous ranked probability score of the samples' voxel counts against each rater's, and how many raters
lie in the samples' central 95 %.

The distance of two label maps is d = 1 - IoU, averaged over the labels; 0 for a label that both lack. Expectations
include every map's pair with itself. Dice is 1 for a label that both lack.

Counting voxels is all the work. Each label becomes one bit per voxel, so 64 voxels of a pair are compared by one AND
and one count of bits: exact, in one thread, and in little memory beyond the label maps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nnunet_multimodal.metrics.transport import transport_plan

Label = int | tuple[int, ...]
"""A label, or a region: the union of several."""

INTERVAL = (0.025, 0.975)  # of the samples' volumes
CHUNK = 2**16  # voxels at a time; 100 maps of this size are 0.8 MB of bits


@dataclass(frozen=True, eq=False)
class Overlaps:
    """Voxel counts of label maps A and B.

    Attributes:
        intersections: (L, A, B), for each label the voxels that have it in both maps of a pair.
        sizes_a: (L, A), the voxels that have it in each map of A.
        sizes_b: (L, B), the same for B.
    """

    intersections: np.ndarray
    sizes_a: np.ndarray
    sizes_b: np.ndarray

    def iou_distance(self) -> np.ndarray:
        """1 - IoU, (L, A, B); 0 where both lack the label."""
        union = self.sizes_a[:, :, None] + self.sizes_b[:, None] - self.intersections
        return np.where(union > 0, 1 - self.intersections / np.maximum(union, 1), 0.0)

    def dice(self) -> np.ndarray:
        """Dice coefficient, (L, A, B); 1 where both lack the label."""
        total = self.sizes_a[:, :, None] + self.sizes_b[:, None]
        return np.where(total > 0, 2 * self.intersections / np.maximum(total, 1), 1.0)


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
        interrater_dice: (R,), Dice of every rater, averaged over the others; NaN for a single one.
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
    interrater_dice: np.ndarray
    volume_crps: float
    volume_coverage: float
    sample_dice: np.ndarray
    sample_weights: np.ndarray

    @property
    def fraction_better(self) -> float:
        """Weight of the samples whose Dice is higher than the mean prediction's."""
        return float(self.sample_weights[self.sample_dice > self.dice + 1e-9].sum())  # equal ones differ by rounding

    @property
    def within_raters(self) -> float:
        """1 if the prediction agrees with the raters at least as well as the one who agrees least with the others."""
        if np.isnan(self.interrater_dice).all():
            return np.nan
        return float(self.dice >= np.nanmin(self.interrater_dice) - 1e-9)

    def sample_dice_quantile(self, quantile: float) -> float:
        """The Dice that this fraction of the samples' weight reaches at most; always that of one of them."""
        return weighted_quantile(self.sample_dice, self.sample_weights, quantile)


@dataclass(frozen=True, eq=False)
class CaseDistribution:
    """The scores of one case, of every label alone (`by_label`) and averaged over the labels (`average`).

    In the average a sample's Dice is that of its labels' mean, as in the paper's Fig. 5.
    """

    average: DistributionScores
    by_label: Mapping[Label, DistributionScores]


def score_distribution(
    prediction: np.ndarray,
    samples: np.ndarray,
    raters: np.ndarray,
    labels: Sequence[Label],
    sample_weights: Sequence[float] | np.ndarray | None = None,
    rater_weights: Sequence[float] | np.ndarray | None = None,
    valid: np.ndarray | None = None,
) -> CaseDistribution:
    """All measures of this module for one case, from one count of all pairs.

    Args:
        prediction: the mean prediction, a label map (\\*D).
        samples: label maps (S, \\*D), integers.
        raters: label maps (R, \\*D), integers.
        labels: foreground labels or regions.
        sample_weights: (S,); equal if not given. Only their ratios matter.
        rater_weights: (R,); equal if not given. Only their ratios matter.
        valid: bool (\\*D), voxels that count; all if not given. See `valid_voxels`.

    Raises:
        ValueError: shapes, types or weights do not fit.
    """
    w, v = _both_weights(samples, raters, sample_weights, rater_weights)
    overlaps = _count([samples, raters, prediction[None]], None, labels, valid)
    distance, dice = overlaps.iou_distance(), overlaps.dice()
    sizes = overlaps.sizes_a[:, :-1]  # (L, S + R)
    scores = {
        label: _score(distance[i : i + 1], dice[i : i + 1], sizes[i : i + 1], w, v) for i, label in enumerate(labels)
    }
    return CaseDistribution(_score(distance, dice, sizes, w, v), scores)


def generalized_energy_distance(
    samples: np.ndarray,
    raters: np.ndarray,
    labels: Sequence[Label],
    sample_weights: Sequence[float] | np.ndarray | None = None,
    rater_weights: Sequence[float] | np.ndarray | None = None,
    valid: np.ndarray | None = None,
) -> float:
    """D_GED^2 of samples (S, \\*D) and raters (R, \\*D), Eq. 8; arguments as in `score_distribution`."""
    w, v = _both_weights(samples, raters, sample_weights, rater_weights)
    return _energy_distance(_count([samples, raters], None, labels, valid).iou_distance().mean(0), w, v)


def matched_iou(
    samples: np.ndarray,
    raters: np.ndarray,
    labels: Sequence[Label],
    sample_weights: Sequence[float] | np.ndarray | None = None,
    rater_weights: Sequence[float] | np.ndarray | None = None,
    valid: np.ndarray | None = None,
) -> float:
    """M-IoU of samples (S, \\*D) and raters (R, \\*D); arguments as in `score_distribution`."""
    w, v = _both_weights(samples, raters, sample_weights, rater_weights)
    return _matched_iou(pairwise_iou_distance(samples, raters, labels, valid), w, v)


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
    w = _weights(sample_weights, len(samples), "sample_weights")
    return float(w @ pairwise_iou_distance(samples, samples, labels, valid) @ w)


def pairwise_iou_distance(
    a: np.ndarray, b: np.ndarray, labels: Sequence[Label], valid: np.ndarray | None = None
) -> np.ndarray:
    """1 - IoU, averaged over the labels, of all pairs of label maps (A, \\*D) and (B, \\*D): (A, B)."""
    return count_overlaps(a, b, labels, valid).iou_distance().mean(0)


def count_overlaps(a: np.ndarray, b: np.ndarray, labels: Sequence[Label], valid: np.ndarray | None = None) -> Overlaps:
    """Voxel counts of all pairs of label maps (A, \\*D) and (B, \\*D), of which those with valid (\\*D) count.

    Raises:
        ValueError: shapes or types do not fit.
    """
    return _count([a], None if a is b else [b], labels, valid)


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
    distance: np.ndarray, dice: np.ndarray, sizes: np.ndarray, w: np.ndarray, v: np.ndarray
) -> DistributionScores:
    """Distances and Dice (L, K, K) of samples, raters and the mean prediction, in this order; voxels (L, S + R)."""
    distance = distance.mean(0)
    s, r = slice(0, len(w)), slice(len(w), -1)
    drawn, volumes, theirs = sizes[:, len(w) :] > 0, sizes[:, : len(w)].astype(float), sizes[:, len(w) :].astype(float)
    interval = [[weighted_quantile(own, w, q) for own in volumes] for q in INTERVAL]
    covered = (theirs >= np.array(interval[0])[:, None]) & (theirs <= np.array(interval[1])[:, None])  # (L, R)
    crps = [
        [continuous_ranked_probability_score(own, w, y) for y in row] for own, row in zip(volumes, theirs, strict=True)
    ]
    between = dice[:, r, r].mean(0)  # (R, R)
    alone = len(v) < 2
    with np.errstate(invalid="ignore"):  # 0 / 0: no rater drew the label
        nod = (dice[:, -1, r] * drawn) @ v / (drawn @ v)  # (L,)
    return DistributionScores(
        generalized_energy_distance=_energy_distance(distance[:-1, :-1], w, v),
        sample_diversity=float(w @ distance[s, s] @ w),
        rater_diversity=float(v @ distance[r, r] @ v),
        matched_iou=_matched_iou(distance[s, r], w, v),
        dice=float(dice[:, -1, r].mean(0) @ v),
        interrater_dice=np.full(1, np.nan) if alone else (between.sum(1) - np.diag(between)) / (len(v) - 1),
        volume_crps=float((np.array(crps) @ v).mean()),
        volume_coverage=float((covered @ v).mean()),
        dice_nod=float(np.mean(nod[np.isfinite(nod)])) if np.isfinite(nod).any() else np.nan,
        sample_dice=dice[:, s, r].mean(0) @ v,
        sample_weights=w,
    )


def _matched_iou(distance: np.ndarray, w: np.ndarray, v: np.ndarray) -> float:
    """From the distances (S, R)."""
    plan = transport_plan(distance[None], w[None], v[None])[0]
    return 1 - float((plan * distance).sum())


def _energy_distance(distance: np.ndarray, w: np.ndarray, v: np.ndarray) -> float:
    """From the distances (S + R, S + R) of samples and raters together."""
    u = np.concatenate((w, -v))  # expanding - u' d u gives the three terms of Eq. 8
    return float(-u @ distance @ u)


def _count(
    rows: Sequence[np.ndarray], columns: Sequence[np.ndarray] | None, labels: Sequence[Label], valid: np.ndarray | None
) -> Overlaps:
    """Overlaps of stacks of label maps, of the rows with themselves if there are no columns."""
    _check([*rows, *(columns or ())], labels, valid)
    rows = [stack.reshape(len(stack), -1) for stack in rows]
    columns = None if columns is None else [stack.reshape(len(stack), -1) for stack in columns]
    valid = None if valid is None else valid.reshape(-1)
    num_rows = sum(map(len, rows))
    num_columns = num_rows if columns is None else sum(map(len, columns))
    intersections = np.zeros((len(labels), num_rows, num_columns), dtype=np.int64)
    sizes_a, sizes_b = (np.zeros((len(labels), n), dtype=np.int64) for n in (num_rows, num_columns))
    for start in range(0, rows[0].shape[1], CHUNK):
        chunk = slice(start, start + CHUNK)
        for i, label in enumerate(labels):
            left = _bits(rows, chunk, label, valid)
            right = left if columns is None else _bits(columns, chunk, label, valid)
            intersections[i] += _common_bits(left, right)
            sizes_a[i] += _count_bits(left)
            sizes_b[i] += _count_bits(right)
    return Overlaps(intersections, sizes_a, sizes_b)


def _bits(stacks: Sequence[np.ndarray], chunk: slice, label: Label, valid: np.ndarray | None) -> np.ndarray:
    """One bit per voxel of a chunk, set where the map has the label: (maps, words) uint64."""
    packed = []
    for stack in stacks:
        values = stack[:, chunk]
        first, *others = label if isinstance(label, tuple) else (label,)
        inside = values == first
        for other in others:
            inside |= values == other
        if valid is not None:
            inside &= valid[chunk]
        packed.append(np.packbits(inside, axis=1))
    bits = np.concatenate(packed)
    words = np.pad(bits, ((0, 0), (0, -bits.shape[1] % 8)))
    return np.ascontiguousarray(words).view(np.uint64)  # the maps may lie in memory in any order


def _common_bits(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Bits set in both, (A, B), of (A, words) and (B, words); half the work where both are the same array."""
    same = left is right
    used = (np.bitwise_or.reduce(left) & np.bitwise_or.reduce(right)) != 0  # most of an image has no lesion
    left, right = left.compress(used, axis=1), right.compress(used, axis=1)
    counts = np.zeros((len(left), len(right)), dtype=np.int64)
    for i, bits in enumerate(left):
        first = i if same else 0
        counts[i, first:] = _count_bits(bits & right[first:])
    return np.maximum(counts, counts.T) if same else counts


def _count_bits(words: np.ndarray) -> np.ndarray:
    """Set bits of each row."""
    return _bit_count(words).sum(1, dtype=np.int64)


def _bit_count_by_table(words: np.ndarray) -> np.ndarray:
    """numpy.bitwise_count for NumPy 1, four numbers per word."""
    return _BITS_OF_16[words.view(np.uint16)]


_BITS_OF_16 = np.unpackbits(np.arange(2**16, dtype=np.uint16).view(np.uint8).reshape(-1, 2), axis=1).sum(
    1, dtype=np.uint8
)
_bit_count = getattr(np, "bitwise_count", _bit_count_by_table)


def _weights(weights: Sequence[float] | np.ndarray | None, count: int, name: str) -> np.ndarray:
    """Weights of sum 1, float64."""
    if weights is None:
        return np.full(count, 1 / count)
    array = np.asarray(weights, dtype=np.float64)
    if array.shape != (count,) or not (array >= 0).all() or not 0 < array.sum() < np.inf:
        raise ValueError(f"{name} is {weights}; give {count} numbers >= 0 of which one is positive")
    return array / array.sum()


def _both_weights(
    samples: np.ndarray,
    raters: np.ndarray,
    sample_weights: Sequence[float] | np.ndarray | None,
    rater_weights: Sequence[float] | np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    return (
        _weights(sample_weights, len(samples), "sample_weights"),
        _weights(rater_weights, len(raters), "rater_weights"),
    )


def _check(stacks: Sequence[np.ndarray], labels: Sequence[Label], valid: np.ndarray | None) -> None:
    shape = stacks[0].shape[1:]
    for stack in stacks:
        if stack.dtype.kind not in "iub":
            raise ValueError(f"label maps have type {stack.dtype}; round them and give integers")
        if not len(stack) or stack.shape[1:] != shape or not shape:
            shapes = ", ".join(str(s.shape) for s in stacks)
            raise ValueError(f"label maps have shapes {shapes}; give (N, *D) with N > 0 and one grid *D for all")
    if not labels or () in labels:
        raise ValueError(f"labels is {labels}; give at least one label or region, none of them empty")
    if valid is not None and (valid.shape != shape or valid.dtype != bool):
        raise ValueError(f"valid is {valid.dtype} {valid.shape}; give bool {shape}")
