"""Overlap and surface distance of two masks.

The Dice coefficient (Dice, Ecology 26, 1945) and the Hausdorff distance with a percentile in place of the maximum
(Huttenlocher, Klanderman, Rucklidge, IEEE TPAMI 15, 1993), HD95 for short: the larger of the two directed distances.

A mask's surface is its voxels that have a face neighbour outside of the mask, and the distance is between the centres
of such voxels. What lies beyond the array's edge is outside. Every surface voxel counts once, whatever area it stands
for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import binary_erosion, distance_transform_edt, find_objects


def dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Dice coefficient of two masks.

    Args:
        prediction: bool, any shape.
        truth: bool, the same shape.

    Returns:
        2 |A ∩ B| / (|A| + |B|) between 0 and 1; 1.0 where both masks are empty.

    Raises:
        ValueError: the shapes differ.
    """
    prediction, truth = _as_masks(prediction, truth)
    total = np.count_nonzero(prediction) + np.count_nonzero(truth)
    return 2.0 * np.count_nonzero(prediction & truth) / total if total else 1.0


def hausdorff_distance(
    prediction: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float], percentile: float = 95.0
) -> float:
    """Distance between the surfaces of two masks.

    Args:
        prediction: bool, (Y, X) or (Z, Y, X).
        truth: bool, the same shape.
        spacing_mm: size of a voxel along each axis of the arrays, in their order (SimpleITK's spacing reversed).
        percentile: of the distances from one surface to the other; 100 is the Hausdorff distance itself.

    Returns:
        Millimetres, the larger of both directions; 0.0 where both masks are empty and inf where only one is.

    Raises:
        ValueError: the shapes differ, the spacing does not fit them, or the percentile is not within 0 and 100.
    """
    prediction, truth = _as_masks(prediction, truth)
    if len(spacing_mm) != truth.ndim or not all(0 < size < np.inf for size in spacing_mm):
        raise ValueError(f"spacing_mm is {tuple(spacing_mm)}; masks of shape {truth.shape} need {truth.ndim} sizes > 0")
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile is {percentile}; it lies between 0 and 100")
    if not (prediction.any() and truth.any()):
        return np.inf if prediction.any() or truth.any() else 0.0
    (box,) = find_objects((prediction | truth).astype(np.uint8))  # nothing outside of it matters
    surfaces = (_surface(prediction[box]), _surface(truth[box]))
    directed = (
        np.percentile(distance_transform_edt(~other, sampling=spacing_mm)[surface], percentile)
        for surface, other in (surfaces, surfaces[::-1])
    )
    return float(max(directed))


def _as_masks(prediction: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction has shape {prediction.shape} and truth {truth.shape}; both must be on one grid")
    return prediction.astype(bool, copy=False), truth.astype(bool, copy=False)


def _surface(mask: np.ndarray) -> np.ndarray:
    return mask & ~binary_erosion(mask)
