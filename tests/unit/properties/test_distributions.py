"""Measures of distributions, calibration, quantities of samples: what holds for all shapes, labels and weights."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from nnunet_multimodal.inference.quantities import distribution_of, measure
from nnunet_multimodal.metrics.calibration import expected_calibration_error, reliability_curve
from nnunet_multimodal.metrics.distribution import (
    continuous_ranked_probability_score,
    generalized_energy_distance,
    matched_iou,
    sample_diversity,
    score_distribution,
    weighted_quantile,
)
from nnunet_multimodal.metrics.overlaps import count_overlaps, pairwise_iou_distance
from tests.unit.properties import checked, solved

# --- distributions of label maps

REGIONS = (1, 2, 3, (1, 2), (2, 3), (1, 2, 3))
label_lists = st.lists(st.sampled_from(REGIONS), min_size=1, max_size=3, unique=True)


@st.composite
def label_maps(draw, *numbers):
    """Stacks of label maps on one grid, whose voxels hardly ever fill whole words of bits."""
    shape = draw(array_shapes(min_dims=1, max_dims=3, max_side=5))
    return [draw(arrays(np.uint8, (draw(number), *shape), elements=st.integers(0, 3))) for number in numbers]


def weights_of(draw, stack):
    """Whole numbers, of which one is positive."""
    return draw(st.lists(st.integers(0, 3), min_size=len(stack), max_size=len(stack)).filter(any))


def iou_distances(a, b, labels):
    """Of all pairs, by scipy."""
    a, b = ([np.isin(stack, label).reshape(len(stack), -1) for label in labels] for stack in (a, b))
    return np.mean([cdist(own, other, "jaccard") for own, other in zip(a, b, strict=True)], 0)


@checked
@given(data=st.data(), stacks=label_maps(st.integers(1, 4), st.integers(1, 4)), labels=label_lists)
def test_distribution_measures_are_expectations_of_jaccard_distances(data, stacks, labels):
    samples, raters = stacks
    w, v = (np.array(weights_of(data.draw, stack), float) for stack in stacks)
    d, own, theirs = (iou_distances(*pair, labels) for pair in ((samples, raters), (samples,) * 2, (raters,) * 2))
    np.testing.assert_allclose(pairwise_iou_distance(samples, raters, labels), d, atol=1e-12)
    w_, v_ = w / w.sum(), v / v.sum()
    expected = 2 * w_ @ d @ v_ - w_ @ own @ w_ - v_ @ theirs @ v_
    found = generalized_energy_distance(samples, raters, labels, w, v)
    assert found == pytest.approx(expected, abs=1e-9)
    assert -1e-9 <= found <= 2
    assert sample_diversity(samples, labels, w) == pytest.approx(w_ @ own @ w_, abs=1e-9)
    overlaps = count_overlaps(samples, raters, labels)
    jaccard = 1 - overlaps.iou_distance()
    np.testing.assert_allclose(overlaps.dice(), 2 * jaccard / (1 + jaccard))


@solved
@given(data=st.data(), stacks=label_maps(st.integers(1, 3), st.integers(1, 3)), labels=label_lists)
def test_matched_iou_is_the_best_assignment_of_units_of_weight(data, stacks, labels):
    samples, raters = stacks
    w, v = (weights_of(data.draw, stack) for stack in stacks)
    units = [np.repeat(np.arange(len(own)), np.multiply(own, sum(other))) for own, other in ((w, v), (v, w))]
    cost = iou_distances(samples, raters, labels)[np.ix_(*units)]
    found = matched_iou(samples, raters, labels, w, v)
    assert found == pytest.approx(1 - cost[linear_sum_assignment(cost)].mean(), abs=1e-6)
    assert -1e-9 <= found <= 1 + 1e-9


@solved
@given(data=st.data(), stacks=label_maps(st.integers(1, 4)), labels=label_lists)
def test_the_same_maps_in_any_order_are_at_no_distance(data, stacks, labels):
    (maps,) = stacks
    w = weights_of(data.draw, maps)
    order = data.draw(st.permutations(np.repeat(np.arange(len(maps)), w).tolist()))
    assert generalized_energy_distance(maps[order], maps, labels, rater_weights=w) == pytest.approx(0, abs=1e-9)
    assert matched_iou(maps[order], maps, labels, rater_weights=w) == pytest.approx(1, abs=1e-6)


FIELDS = (
    "generalized_energy_distance", "sample_diversity", "rater_diversity", "matched_iou", "dice", "dice_nod",
    "volume_crps", "volume_coverage", "fraction_better",
)  # fmt: skip


@solved
@given(data=st.data(), stacks=label_maps(st.just(1), st.integers(1, 4), st.integers(1, 3)), labels=label_lists)
def test_weights_are_repetitions_and_order_and_place_mean_nothing(data, stacks, labels):
    w, v = (weights_of(data.draw, stack) for stack in stacks[1:])
    valid = data.draw(arrays(bool, stacks[0].shape[1:]))
    valid.flat[0] = True
    flat = [stack[:, valid] for stack in stacks]
    voxels = np.random.default_rng(data.draw(st.integers(0, 99))).permutation(int(valid.sum()))
    orders = [[0], *(data.draw(st.permutations(np.repeat(np.arange(len(x)), x).tolist())) for x in (w, v))]
    (mean,), *both = (stack[order][:, voxels] for stack, order in zip(flat, orders, strict=True))
    own = score_distribution(stacks[0][0], *stacks[1:], labels, w, v, valid).average
    other = score_distribution(mean, *both, labels).average
    for field in FIELDS:
        expected = pytest.approx(getattr(other, field), abs=1e-6, nan_ok=True)
        assert getattr(own, field) == expected, field
    for quantile in (0, 0.05, 0.5, 1):
        assert own.sample_dice_quantile(quantile) == pytest.approx(other.sample_dice_quantile(quantile))


@checked
@given(
    data=st.data(),
    values=st.lists(st.integers(-4, 4), min_size=1, max_size=6),
    percent=st.sampled_from([0, 20, 25, 50, 75, 100]) | st.integers(0, 100),
)
def test_a_weighted_quantile_is_the_first_value_that_reaches_it(data, values, percent):
    weights = weights_of(data.draw, values)
    least = max(1, percent * sum(weights))  # percent of the weight, and not nothing
    expected = min(v for v in values if 100 * np.dot(weights, np.array(values) <= v) >= least)
    assert weighted_quantile(np.array(values, float), np.array(weights, float), percent / 100) == expected


@checked
@given(data=st.data(), values=st.lists(st.integers(-9, 9), min_size=1, max_size=6), observed=st.integers(-12, 12))
def test_crps_is_the_area_between_the_distribution_and_the_step(data, values, observed):
    weights = np.array(weights_of(data.draw, values), float)
    weights /= weights.sum()
    steps = sorted({*values, observed})
    area = sum(
        (right - left) * (weights @ (np.array(values) <= left) - (observed <= left)) ** 2
        for left, right in itertools.pairwise(steps)
    )
    found = continuous_ranked_probability_score(np.array(values, float), weights, observed)
    assert found == pytest.approx(area, abs=1e-9)


# --- calibration


@st.composite
def predictions(draw):
    """Probabilities and soft references in parts of 64, so that no bin's edge is rounded."""
    shape = draw(array_shapes(min_dims=1, max_dims=3, max_side=5))
    return [draw(arrays(np.int64, shape, elements=st.integers(0, 64))) for _ in range(2)]


@checked
@given(pair=predictions(), bins=st.integers(1, 20))
def test_calibration_error_is_counted_bin_by_bin(pair, bins):
    p, r = pair
    index = np.minimum(p * bins // 64, bins - 1)
    expected = sum(Fraction(abs(int((p - r)[index == i].sum())), 64 * p.size) for i in range(bins))
    found = expected_calibration_error(p / 64, r / 64, bins)
    assert found == pytest.approx(float(expected), abs=1e-12)
    assert 0 <= found <= 1


@checked
@given(data=st.data(), pair=predictions(), bins=st.integers(1, 12))
def test_curves_of_parts_add_up_to_that_of_the_whole(data, pair, bins):
    p, r = (x / 64 for x in pair)
    first, ignored = (data.draw(arrays(bool, p.shape)) for _ in range(2))
    parts = [reliability_curve(p[part & ~ignored], r[part & ~ignored], bins) for part in (first, ~first)]
    added, whole = parts[0] + parts[1], reliability_curve(p, r, bins, ~ignored)
    for name in ("count", "confidence_sum", "frequency_sum", "confidence", "frequency"):
        np.testing.assert_allclose(getattr(added, name), getattr(whole, name), atol=1e-12)
    assert added.expected_calibration_error == pytest.approx(whole.expected_calibration_error, nan_ok=True)


@checked
@given(pair=predictions(), bins=st.sampled_from([1, 2, 3, 5]), parts=st.integers(2, 4))
def test_wider_bins_never_raise_the_error_and_the_complement_has_the_same(pair, bins, parts):
    p, r = (x / 64 for x in pair)
    assert expected_calibration_error(p, r, bins) <= expected_calibration_error(p, r, bins * parts) + 1e-12
    p = (64 * p + 0.3) / 65  # never on an edge, which belongs to the bin above
    assert expected_calibration_error(1 - p, 1 - r, bins) == pytest.approx(expected_calibration_error(p, r, bins))


# --- quantities


def components(mask):
    """Groups of voxels that touch by a face, an edge or a corner."""
    left, found = set(map(tuple, np.argwhere(mask))), 0
    while left:
        found, grown = found + 1, [left.pop()]
        for voxel in grown:
            near = {other for other in left if max(abs(np.subtract(voxel, other))) <= 1}
            left -= near
            grown.extend(near)
    return found


@checked
@given(label_map=array_shapes(min_dims=2, max_dims=3, max_side=5).flatmap(
    lambda shape: arrays(np.int64, shape, elements=st.integers(0, 2))))  # fmt: skip
def test_lesions_are_what_a_flood_fill_finds(label_map):
    labels = {"first": 1, "second": 2, "both": (1, 2)}
    for name, (voxels, lesions) in measure(label_map, labels).items():
        mask = np.isin(label_map, labels[name])
        assert (voxels, lesions) == (mask.sum(), components(mask))


@checked
@given(data=st.data(), values=st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_quantities_of_samples_do_not_depend_on_their_order(data, values):
    weights = np.array(weights_of(data.draw, values), float)
    weights /= weights.sum()
    order = data.draw(st.permutations(range(len(values))))
    own = distribution_of(1, values, weights)
    assert distribution_of(1, [values[i] for i in order], weights[order]) == pytest.approx(own)
    assert distribution_of(1, [*values, 99], np.append(weights, 0)) == own  # a sample that counts for nothing
    assert own["mean"] == pytest.approx(np.average(values, weights=weights))
    used = [value for value, weight in zip(values, weights, strict=True) if weight]
    assert min(used) <= own["p2.5"] <= own["p50"] <= own["p97.5"] <= max(used)
    assert own["sd"] >= 0
    assert (own["sd"] < 1e-6) == (len(set(used)) == 1)
