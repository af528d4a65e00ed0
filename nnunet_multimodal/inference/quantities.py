"""What people want to know of a label map, with intervals over its samples: volumes, lesions, presence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.ndimage import find_objects, generate_binary_structure, label

from nnunet_multimodal.metrics.distribution import weighted_quantile

PERCENTILES = (2.5, 50.0, 97.5)
Label = int | Sequence[int]


class RunningQuantities:
    """Volume, lesion count and presence of every label, sample by sample.

    Args:
        labels: names and values; a region has several.
        voxel_ml: volume of a voxel in millilitres; None if the images have no physical size.
    """

    def __init__(self, labels: Mapping[str, Label], voxel_ml: float | None) -> None:
        self.labels, self.voxel_ml = labels, voxel_ml
        self.voxels: dict[str, list[int]] = {name: [] for name in labels}
        self.lesions: dict[str, list[int]] = {name: [] for name in labels}
        self.weights: list[float] = []

    def add(self, segmentation: np.ndarray, weight: float = 1.0) -> None:
        """Count a sample's label map (2D or 3D) in."""
        self.weights.append(weight)
        for name, (voxels, lesions) in measure(segmentation, self.labels).items():
            self.voxels[name].append(voxels)
            self.lesions[name].append(lesions)

    def summary(self, prediction: np.ndarray) -> dict[str, dict[str, Any]]:
        """For every label: volume and lesion count of the prediction and over the samples, and presence.

        Args:
            prediction: label map of the mean prediction.

        Returns:
            By label ``voxels``, ``volume_ml`` (None without a physical size) and ``lesion_count``, each with the keys
            of :func:`distribution_of`, and ``probability_present``, the weight of the samples that have the label.
        """
        own = measure(prediction, self.labels)
        result = {}
        weights = np.array(self.weights) / np.sum(self.weights)
        for name in self.labels:
            voxels = distribution_of(own[name][0], self.voxels[name], weights)
            result[name] = {
                "volume_ml": None if self.voxel_ml is None else {k: v * self.voxel_ml for k, v in voxels.items()},
                "voxels": voxels,
                "lesion_count": distribution_of(own[name][1], self.lesions[name], weights),
                "probability_present": float(weights @ (np.array(self.voxels[name]) > 0)),
            }
        return result


def measure(segmentation: np.ndarray, labels: Mapping[str, Label]) -> dict[str, tuple[int, int]]:
    """Voxels and lesions (components, neighbours by face, edge or corner) of every label in a label map."""
    (box,) = find_objects((segmentation != 0).astype(np.uint8)) or ((slice(0),) * segmentation.ndim,)
    neighbours = generate_binary_structure(segmentation.ndim, segmentation.ndim)
    result = {}
    for name, values in labels.items():
        mask = np.isin(segmentation[box], values)
        # not cc3d, which fails on some masks of single-voxel noise ("maximum length exception", 4.1.1)
        result[name] = int(np.count_nonzero(mask)), int(label(mask, neighbours)[1])
    return result


def distribution_of(prediction: float, samples: Sequence[float], weights: np.ndarray | None = None) -> dict[str, float]:
    """``prediction`` as it is, and over the samples ``mean``, ``sd`` (0 for one), ``p2.5``, ``p50``, ``p97.5``.

    Percentiles of equal weights lie between samples, those of other ``weights`` (which sum to 1) are one of them.
    """
    values = np.asarray(samples, dtype=np.float64)
    w = np.full(len(values), 1 / len(values)) if weights is None else weights
    values, w = values[w > 0], w[w > 0]
    mean, effective = float(w @ values), 1 - float(w @ w)
    if np.ptp(w) < 1e-9:
        percentiles = np.percentile(values, PERCENTILES)
    else:
        percentiles = np.array([weighted_quantile(values, w, p / 100) for p in PERCENTILES])
    return {
        "prediction": float(prediction),
        "mean": mean,
        "sd": float(np.sqrt(w @ (values - mean) ** 2 / effective)) if effective > 1e-9 else 0.0,
        **{f"p{p:g}": float(v) for p, v in zip(PERCENTILES, percentiles, strict=True)},
    }
