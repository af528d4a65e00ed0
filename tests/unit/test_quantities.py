"""Volumes, lesions and presence of hand-made label maps."""

import numpy as np
import pytest

from nnunet_multimodal.inference.quantities import RunningQuantities, distribution_of, measure

LABELS = {"whole": (1, 2), "core": 2}


def label_map(*voxels):
    array = np.zeros((3, 6, 6), dtype=np.int64)
    for z, y, x, label in voxels:
        array[z, y, x] = label
    return array


def test_voxels_and_components_of_labels_and_regions():
    two = label_map((0, 0, 0, 1), (1, 1, 1, 2), (2, 4, 4, 2), (2, 4, 5, 2))  # the first pair touches by a corner
    assert measure(two, LABELS) == {"whole": (4, 2), "core": (3, 2)}
    assert measure(label_map(), LABELS) == {"whole": (0, 0), "core": (0, 0)}
    assert measure(label_map((0, 2, 3, 1)), LABELS) == {"whole": (1, 1), "core": (0, 0)}


def test_images_of_two_dimensions():
    flat = label_map((0, 1, 1, 1), (0, 2, 2, 1), (0, 5, 5, 2))[:1]
    assert measure(flat, LABELS) == {"whole": (3, 2), "core": (1, 1)}


def test_noise_of_single_voxels_is_counted():
    """cc3d fails on one of these."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        mask = rng.random((1, *rng.integers(1, 40, 2))) > rng.random()
        voxels, lesions = measure(mask.astype(np.int64), {"noise": 1})["noise"]
        assert voxels == mask.sum()
        assert (lesions > 0) == mask.any()


def test_intervals_over_samples_and_presence():
    quantities = RunningQuantities(LABELS, voxel_ml=0.5)
    for voxels in ([(0, 0, 0, 1)], [(0, 0, 0, 1), (0, 3, 3, 2)], [(0, 0, 0, 1)] * 1, []):
        quantities.add(label_map(*voxels))
    summary = quantities.summary(label_map((1, 1, 1, 2)))
    whole, core = summary["whole"], summary["core"]
    assert whole["volume_ml"]["mean"] == pytest.approx(0.5)  # 1, 2, 1, 0 voxels
    assert whole["volume_ml"]["sd"] == pytest.approx(0.5 * np.std([1, 2, 1, 0], ddof=1))
    assert whole["volume_ml"]["p50"] == pytest.approx(0.5)
    assert whole["volume_ml"]["prediction"] == 0.5
    assert whole["lesion_count"]["mean"] == 1
    assert whole["probability_present"] == 0.75
    assert core["probability_present"] == 0.25
    assert core["voxels"]["prediction"] == 1


def test_images_without_physical_size_have_no_volume():
    quantities = RunningQuantities({"cell": 1}, None)
    quantities.add(label_map((0, 0, 0, 1)))
    summary = quantities.summary(label_map())
    assert summary["cell"]["volume_ml"] is None
    assert summary["cell"]["voxels"]["mean"] == 1


def test_percentiles_are_numpys():
    values = list(range(41))
    result = distribution_of(3, values)
    assert result == pytest.approx(
        {"prediction": 3, "mean": 20, "sd": np.std(values, ddof=1), "p2.5": 1, "p50": 20, "p97.5": 39}
    )
    assert distribution_of(1, [5])["sd"] == 0
