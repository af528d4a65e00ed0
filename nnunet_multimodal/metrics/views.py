"""Which voxels each rater says something of, and where what is compared stands among all that was counted.

`nnunet_multimodal.metrics.distribution` says what follows from it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nnunet_multimodal.metrics.overlaps import Label


@dataclass(frozen=True, eq=False)
class Raters:
    """The raters who say something, and of which voxels.

    Attributes:
        maps: (R, \\*D), without a label where they say nothing.
        weights: (R,), sum 1.
        says: whether each of all raters is among them.
        masks: (K, \\*D), the different ones of theirs, and that of all together; None: one, of all voxels.
        own: (R,), which is each rater's.
        together: which is that of all together.
        common: (R, R), whether two raters have a voxel in common.
    """

    maps: np.ndarray
    weights: np.ndarray
    says: np.ndarray
    masks: np.ndarray | None
    own: np.ndarray
    together: int
    common: np.ndarray


def listen(
    raters: np.ndarray,
    weights: Sequence[float] | np.ndarray | None,
    labels: Sequence[Label],
    valid: np.ndarray | None,
) -> Raters:
    """Who says something of voxels that count, and of which.

    Args:
        raters: label maps (R, \\*D).
        weights: (R,), or None for equal ones.
        labels: foreground labels or regions.
        valid: bool (\\*D) or (R, \\*D), or None for all.

    Raises:
        ValueError: weights or `valid` do not fit.
    """
    v, count = normalised(weights, len(raters), "rater_weights"), len(raters)
    if valid is None:
        return Raters(raters, v, np.ones(count, bool), None, np.zeros(count, int), 0, np.ones((count, count), bool))
    if valid.dtype != bool or valid.shape not in (raters.shape, raters.shape[1:]):
        raise ValueError(f"valid is {valid.dtype} {valid.shape}; give bool {raters.shape[1:]} or {raters.shape}")
    every = [valid] * count if valid.ndim < raters.ndim else list(valid)
    says = np.array([mask.any() for mask in every])
    says &= v[says].sum() > 0
    if not says.any():
        return Raters(raters[:0], v[:0], says, None, np.zeros(0, int), 0, np.ones((0, 0), bool))
    every = [mask for mask, own in zip(every, says, strict=True) if own]
    masks: list[np.ndarray] = []
    numbers = []
    for mask in [*every, np.logical_or.reduce(every)]:
        same = (n for n, other in enumerate(masks) if other is mask or np.array_equal(other, mask))
        numbers.append(next(same, len(masks)))
        masks += [mask] if numbers[-1] == len(masks) else []
    *own, together = numbers
    maps = raters[says]
    if len(masks) > 1:
        values = {value for label in labels for value in (label if isinstance(label, tuple) else (label,))}
        maps = np.where(every, maps, next(value for value in itertools.count() if value not in values))
    common = np.array([[(one & other).any() for other in masks] for one in masks])
    v = v if says.all() else v[says] / v[says].sum()
    return Raters(maps, v, says, np.array(masks), np.array(own), together, common[np.ix_(own, own)])


@dataclass(frozen=True, eq=False)
class Rows:
    """Where the maps that are compared stand among all that were counted, N through each of K masks.

    Attributes:
        samples: (S, R), every sample on the voxels of every rater.
        own: (R,), every rater on his voxels.
        cross: (R, R), every rater (rows) on the voxels that he and another one (columns) have in common.
        prediction: (R,), the prediction on the voxels of every rater.
        together: (S,), every sample on the voxels of all raters.
        seen: (K, S), every sample through every mask that is a rater's.
        seen_weights: (K,), these raters' weight, sum 1.
    """

    samples: np.ndarray
    own: np.ndarray
    cross: np.ndarray
    prediction: np.ndarray
    together: np.ndarray
    seen: np.ndarray
    seen_weights: np.ndarray

    @classmethod
    def of(cls, samples: int, raters: Raters, predictions: int) -> Rows:
        """Of stacks of the samples, the raters and, last, the prediction if there is one."""
        s, r = np.arange(samples), samples + np.arange(len(raters.own))
        each = samples + len(r) + predictions
        start, weights = each * raters.own, np.bincount(raters.own, raters.weights)
        return cls(
            samples=start + s[:, None],
            own=start + r,
            cross=start + r[:, None],
            prediction=start + each - 1,
            together=each * raters.together + s,
            seen=each * np.flatnonzero(weights)[:, None] + s,
            seen_weights=weights[weights > 0] / weights.sum(),
        )

    def first(self, number: int) -> Rows:
        """Without the samples after the first ones."""
        return replace(self, samples=self.samples[:number], together=self.together[:number], seen=self.seen[:, :number])


def normalised(weights: Sequence[float] | np.ndarray | None, count: int, name: str) -> np.ndarray:
    """Weights of sum 1, float64."""
    if weights is None:
        return np.full(count, 1 / count)
    array = np.asarray(weights, dtype=np.float64)
    if array.shape != (count,) or not (array >= 0).all() or not 0 < array.sum() < np.inf:
        raise ValueError(f"{name} is {weights}; give {count} numbers >= 0 of which one is positive")
    return array / array.sum()
