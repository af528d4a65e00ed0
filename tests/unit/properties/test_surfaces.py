"""Surface distances: what holds for all masks and spacings."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.spatial.distance import cdist

from nnunet_multimodal.metrics.surface import (
    dice,
    hausdorff_distance,
    normalised_surface_distance,
    surface_distances,
)
from tests.unit.properties import checked


@st.composite
def masks(draw, count, empty=True):
    """Masks on one grid, and its spacing; distances of its voxels can be compared without rounding."""
    shape = draw(array_shapes(min_dims=2, max_dims=3, max_side=6))
    spacing = draw(st.lists(st.sampled_from([0.5, 1.0, 1.25, 3.0]), min_size=len(shape), max_size=len(shape)))
    found = draw(arrays(bool, (count, *shape)))
    for mask in () if empty else found:
        mask.flat[draw(st.integers(0, mask.size - 1))] = True
    return found, spacing


def surface_mm(mask, spacing):
    """Positions of the voxels of which a face neighbour is missing."""
    inside, margin = mask.copy(), np.pad(mask, 1)
    for axis, step in itertools.product(range(mask.ndim), (-1, 1)):
        inside &= np.roll(margin, step, axis)[(slice(1, -1),) * mask.ndim]
    return np.argwhere(mask & ~inside) * np.array(spacing)


@checked
@given(
    pair=masks(2, empty=False),
    percentile=st.sampled_from([50, 95, 100]),
    tolerance=st.sampled_from([0, 0.5, 1, 1.5, 3]),
)
def test_surface_measures_agree_with_all_pairs_of_boundary_voxels(pair, percentile, tolerance):
    (a, b), spacing = pair
    distances = cdist(surface_mm(a, spacing), surface_mm(b, spacing))
    sides = distances.min(1), distances.min(0)
    expected = max(np.percentile(side, percentile) for side in sides)
    assert hausdorff_distance(a, b, spacing, percentile) == pytest.approx(expected)
    within = np.mean(np.concatenate(sides) <= tolerance)
    assert normalised_surface_distance(a, b, spacing, tolerance) == pytest.approx(within)


@checked
@given(data=st.data(), pair=masks(2))
def test_surface_measures_do_not_depend_on_orientation_margin_or_order(data, pair):
    both, spacing = pair
    axes = data.draw(st.permutations(range(len(spacing))))
    turned = np.transpose(both, (0, *(axis + 1 for axis in axes)))
    turned = np.flip(turned, data.draw(st.sets(st.sampled_from(range(1, turned.ndim)))))
    margin = data.draw(
        st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=len(spacing), max_size=len(spacing))
    )
    turned = np.pad(turned, [(0, 0), *margin])[::-1]
    own, other = surface_distances(*both, spacing), surface_distances(*turned, [spacing[axis] for axis in axes])
    np.testing.assert_allclose(np.sort(own.from_prediction), np.sort(other.from_truth))
    np.testing.assert_allclose(np.sort(own.from_truth), np.sort(other.from_prediction))
    assert own.hausdorff() == pytest.approx(other.hausdorff())
    assert own.within(1) == pytest.approx(other.within(1))
    assert dice(*both) == dice(*turned)


@checked
@given(pair=masks(2), factor=st.floats(1e-3, 1e3), tolerance=st.sampled_from([0, 0.5, 1, 1.5, 3]))
def test_surface_measures_scale_with_the_spacing(pair, factor, tolerance):
    both, spacing = pair
    scaled = [factor * size for size in spacing]
    assert hausdorff_distance(*both, scaled) == pytest.approx(factor * hausdorff_distance(*both, spacing))
    expected = normalised_surface_distance(*both, spacing, tolerance)
    assert normalised_surface_distance(*both, scaled, factor * tolerance) == pytest.approx(expected)


@checked
@given(three=masks(3, empty=False))
def test_hausdorff_distance_is_a_metric(three):
    (a, b, c), spacing = three
    ab, bc, ac = (hausdorff_distance(*pair, spacing, 100) for pair in ((a, b), (b, c), (a, c)))
    assert ac <= ab + bc + 1e-9
    assert (ab == 0) == np.array_equal(surface_mm(a, spacing), surface_mm(b, spacing))


@checked
@given(pair=masks(1), tolerance=st.sampled_from([0, 1, 1000]))
def test_surface_measures_of_empty_masks(pair, tolerance):
    (mask,), spacing = pair
    empty = np.zeros_like(mask)
    for both in ((mask, empty), (empty, mask)):
        assert hausdorff_distance(*both, spacing) == (np.inf if mask.any() else 0)
        assert normalised_surface_distance(*both, spacing, tolerance) == (0 if mask.any() else 1)
        assert dice(*both) == (0 if mask.any() else 1)
