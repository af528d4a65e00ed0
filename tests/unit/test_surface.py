import itertools

import numpy as np
import pytest

from nnunet_multimodal.metrics.surface import dice, hausdorff_distance, normalised_surface_distance, surface_distances


def mask(shape, *voxels):
    array = np.zeros(shape, dtype=bool)
    for voxel in voxels:
        array[voxel] = True
    return array


def surface_voxels(array):
    """Slow and obvious: voxels with a face neighbour outside of the mask or of the array."""
    found = []
    for voxel in map(tuple, np.argwhere(array)):
        for axis, step in itertools.product(range(array.ndim), (-1, 1)):
            neighbour = list(voxel)
            neighbour[axis] += step
            inside = 0 <= neighbour[axis] < array.shape[axis]
            if not inside or not array[tuple(neighbour)]:
                found.append(voxel)
                break
    return np.array(found)


def nearest(a, b, spacing_mm):
    """Slow and obvious: distances of all pairs of surface voxels, the least of each."""
    a, b = (surface_voxels(array) * np.array(spacing_mm) for array in (a, b))
    distances = np.linalg.norm(a[:, None] - b[None], axis=-1)
    return distances.min(1), distances.min(0)


def oracle(a, b, spacing_mm, percentile):
    return max(np.percentile(distances, percentile) for distances in nearest(a, b, spacing_mm))


def test_dice_of_hand_counted_masks():
    a, b = mask((2, 3), (0, 0), (0, 1), (0, 2)), mask((2, 3), (0, 2), (1, 2))
    assert dice(a, b) == pytest.approx(2 * 1 / 5)
    assert dice(a, a) == 1.0
    assert dice(a, mask((2, 3), (1, 0))) == 0.0


def test_empty_masks():
    empty, full = mask((4, 4)), mask((4, 4), (1, 1))
    assert dice(empty, empty) == 1.0
    assert dice(empty, full) == dice(full, empty) == 0.0
    assert hausdorff_distance(empty, empty, (1, 1)) == 0.0
    assert hausdorff_distance(empty, full, (1, 1)) == np.inf
    assert hausdorff_distance(full, empty, (1, 1)) == np.inf


@pytest.mark.parametrize(("voxel", "expected_mm"), [((3, 1, 1), 6.0), ((1, 4, 1), 3.0), ((3, 1, 4), np.hypot(6, 1.5))])
def test_distance_of_two_voxels_is_in_millimetres(voxel, expected_mm):
    a, b = mask((5, 5, 5), (1, 1, 1)), mask((5, 5, 5), voxel)
    assert hausdorff_distance(a, b, (3.0, 1.0, 0.5)) == pytest.approx(expected_mm)


def test_a_shifted_cube_is_as_far_as_its_shift():
    a, b = np.zeros((2, 12, 12, 12), dtype=bool)
    a[2:8, 2:8, 2:8] = True
    b[4:10, 2:8, 2:8] = True
    assert hausdorff_distance(a, b, (2.5, 1.0, 1.0), percentile=100) == pytest.approx(5.0)
    assert hausdorff_distance(a, a, (2.5, 1.0, 1.0)) == 0.0


def test_percentile_ignores_an_outlier_that_the_maximum_sees():
    a = np.zeros((30, 30), dtype=bool)
    a[5:25, 5:25] = True
    b = a.copy()
    b[0, 0] = True
    assert hausdorff_distance(a, b, (1, 1), percentile=100) == pytest.approx(np.hypot(5, 5))
    assert hausdorff_distance(a, b, (1, 1)) == 0.0


def test_the_larger_direction_counts():
    a, b = mask((1, 9), (0, 0)), mask((1, 9), (0, 0), (0, 8))
    assert hausdorff_distance(a, b, (1, 1), percentile=100) == 8.0
    assert hausdorff_distance(b, a, (1, 1), percentile=100) == 8.0


@pytest.mark.parametrize("shape", [(9, 11), (6, 7, 8)])
@pytest.mark.parametrize("percentile", [50.0, 95.0, 100.0])
def test_agrees_with_all_pairs_of_surface_voxels(shape, percentile):
    rng = np.random.default_rng(0)
    spacing_mm = rng.uniform(0.5, 3, len(shape))
    for density in (0.05, 0.5, 0.9):
        a, b = rng.random((2, *shape)) < density
        assert hausdorff_distance(a, b, spacing_mm, percentile) == pytest.approx(oracle(a, b, spacing_mm, percentile))


@pytest.mark.parametrize("shape", [(9, 11), (6, 7, 8)])
@pytest.mark.parametrize("tolerance_mm", [0.0, 0.7, 2.0])
def test_surface_within_the_tolerance_agrees_with_all_pairs(shape, tolerance_mm):
    rng = np.random.default_rng(0)
    spacing_mm = rng.uniform(0.5, 3, len(shape))
    for density in (0.05, 0.5, 0.9):
        a, b = rng.random((2, *shape)) < density
        found = normalised_surface_distance(a, b, spacing_mm, tolerance_mm)
        assert found == pytest.approx(np.mean(np.concatenate(nearest(a, b, spacing_mm)) <= tolerance_mm))
        assert found == normalised_surface_distance(b, a, spacing_mm, tolerance_mm)


def test_surface_of_a_shifted_cube():
    a, b = np.zeros((2, 12, 12, 12), dtype=bool)
    a[2:8, 2:8, 2:8] = True
    b[3:9, 2:8, 2:8] = True
    assert normalised_surface_distance(a, b, (2, 1, 1), 2) == 1.0
    # of 152 surface voxels each, the outer face (36) and all inside of the next one (16) are off by one voxel
    assert normalised_surface_distance(a, b, (2, 1, 1), 0) == pytest.approx((152 - 36 - 16) / 152)


def test_tolerance_of_whole_voxels_withstands_rounding():
    a, b = mask((1, 9), (0, 0)), mask((1, 9), (0, 3))
    for size_mm in (0.1, 0.7, float(np.float32(0.1)), 1 / 3):
        assert normalised_surface_distance(a, b, (1, size_mm), round(3 * size_mm, 6)) == 1.0
        assert normalised_surface_distance(a, b, (1, size_mm), 2.99 * size_mm) == 0.0


def test_surface_of_empty_masks():
    empty, full = mask((4, 4)), mask((4, 4), (1, 1))
    assert normalised_surface_distance(empty, empty, (1, 1), 1) == 1.0
    assert normalised_surface_distance(empty, full, (1, 1), 100) == 0.0
    assert normalised_surface_distance(full, empty, (1, 1), 100) == 0.0


def test_both_measures_come_from_the_same_distances():
    a, b = np.random.default_rng(0).random((2, 8, 9)) < 0.3
    distances = surface_distances(a, b, (1, 2))
    assert len(distances.from_prediction) == len(surface_voxels(a))
    assert len(distances.from_truth) == len(surface_voxels(b))
    assert distances.hausdorff(90) == hausdorff_distance(a, b, (1, 2), 90)
    assert distances.within(2) == normalised_surface_distance(a, b, (1, 2), 2)


def test_errors_name_the_value():
    a = mask((3, 3), (1, 1))
    with pytest.raises(ValueError, match=r"\(3, 3\).*\(4, 4\)"):
        dice(a, mask((4, 4)))
    with pytest.raises(ValueError, match=r"\(3, 3\).*\(4, 4\)"):
        hausdorff_distance(a, mask((4, 4)), (1, 1))
    with pytest.raises(ValueError, match=r"spacing_mm is \(1, 1, 1\)"):
        hausdorff_distance(a, a, (1, 1, 1))
    with pytest.raises(ValueError, match=r"spacing_mm is \(1, 0\)"):
        hausdorff_distance(a, a, (1, 0))
    with pytest.raises(ValueError, match="percentile is 101"):
        hausdorff_distance(a, a, (1, 1), percentile=101)
    for tolerance_mm in (-1, np.inf, np.nan):
        with pytest.raises(ValueError, match=f"tolerance_mm is {tolerance_mm}"):
            normalised_surface_distance(a, a, (1, 1), tolerance_mm)
    with pytest.raises(ValueError, match=r"spacing_mm is \(1, 1, 1\)"):
        normalised_surface_distance(a, a, (1, 1, 1), 1)
