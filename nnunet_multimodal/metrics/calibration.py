"""Do probabilities mean what they say? The reliability curve and the expected calibration error.

Voxels are sorted into bins of equal width by the predicted probability of a label; a calibrated model's mean
probability (confidence) in a bin is the part of its voxels that have the label (frequency). The expected calibration
error is the mean distance of the two, each bin with its part of the voxels (Naeini et al., AAAI 2015, for two classes;
Guo et al., ICML 2017, for the confidence of the class that wins). It is taken of the label's own probability, not of
the winning class, so that the reference may be soft: the raters' mean (Gao et al., ICLR 2023).

A bin holds its lower edge, the last one both. Where nearly all voxels are background and known to be, the error is
small whatever the lesion's probabilities are worth: compare it only between methods on the same images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BINS = 10
ROUNDING = 1e-5  # weighted means in float32 may exceed 1


@dataclass(frozen=True, eq=False)
class ReliabilityCurve:
    """Sums over the voxels of each bin; curves of several images add up with +.

    Attributes:
        count: (bins,), voxels.
        confidence_sum: (bins,), sum of their predicted probabilities.
        frequency_sum: (bins,), sum of their reference.
    """

    count: np.ndarray
    confidence_sum: np.ndarray
    frequency_sum: np.ndarray

    @property
    def edges(self) -> np.ndarray:
        """Limits of the bins, (bins + 1,)."""
        return np.linspace(0, 1, len(self.count) + 1)

    @property
    def confidence(self) -> np.ndarray:
        """Mean probability of each bin, NaN where it is empty."""
        return self._mean(self.confidence_sum)

    @property
    def frequency(self) -> np.ndarray:
        """Mean reference of each bin, NaN where it is empty."""
        return self._mean(self.frequency_sum)

    @property
    def expected_calibration_error(self) -> float:
        """Mean of |confidence - frequency| over the voxels, between 0 and 1; NaN without a voxel."""
        total = self.count.sum()
        return float(np.abs(self.confidence_sum - self.frequency_sum).sum() / total) if total else np.nan

    def __add__(self, other: ReliabilityCurve) -> ReliabilityCurve:
        if len(self.count) != len(other.count):
            raise ValueError(f"curves of {len(self.count)} and {len(other.count)} bins; give both the same number")
        return ReliabilityCurve(
            self.count + other.count,
            self.confidence_sum + other.confidence_sum,
            self.frequency_sum + other.frequency_sum,
        )

    def _mean(self, sums: np.ndarray) -> np.ndarray:
        return np.where(self.count > 0, sums / np.maximum(self.count, 1), np.nan)


def reliability_curve(
    probability: np.ndarray, reference: np.ndarray, bins: int = BINS, valid: np.ndarray | None = None
) -> ReliabilityCurve:
    """Sort the voxels of an image into bins.

    Args:
        probability: predicted probability of a label or region, any shape.
        reference: the label's mask, or the part of the raters that drew it, the same shape.
        bins: number of bins between 0 and 1.
        valid: bool, the same shape: voxels that count; all if not given.

    Raises:
        ValueError: the shapes differ, there is no bin, or values are not within 0 and 1.
    """
    if bins < 1:
        raise ValueError(f"bins is {bins}; give at least one")
    for name, array in (("reference", reference), ("valid", valid)):
        if array is not None and array.shape != probability.shape:
            raise ValueError(f"probability has shape {probability.shape} and {name} {array.shape}; they must be equal")
    if valid is not None:
        probability, reference = probability[valid], reference[valid]
    probability, reference = probability.ravel(), reference.ravel()
    for name, array in (("probability", probability), ("reference", reference)):
        if array.size and not (array.min() >= -ROUNDING and array.max() <= 1 + ROUNDING):  # also refuses NaN
            raise ValueError(f"{name} spans {array.min()} to {array.max()}; values lie between 0 and 1")
    index = np.minimum((probability * bins).astype(np.intp), bins - 1)
    sums = (np.bincount(index, weights=weights, minlength=bins) for weights in (None, probability, reference))
    return ReliabilityCurve(*sums)


def expected_calibration_error(
    probability: np.ndarray, reference: np.ndarray, bins: int = BINS, valid: np.ndarray | None = None
) -> float:
    """The expected calibration error of an image; arguments as in `reliability_curve`."""
    return reliability_curve(probability, reference, bins, valid).expected_calibration_error
