"""Transport and statistics: what holds for all weights and values."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.optimize import linear_sum_assignment

from nnunet_multimodal.heads.transport_cost import pairwise_cost, transport_terms
from nnunet_multimodal.metrics.statistics import bootstrap_interval, holm, paired_p_value
from nnunet_multimodal.metrics.transport import transport_plan
from tests.unit.properties import PROFILE, checked, solved

# --- transport


@st.composite
def transports(draw, at_most):
    """Costs (B, N, M), and whole numbers of what sources have and sinks get."""
    batch, n, m = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    cost = draw(arrays(np.int64, (batch, n, m), elements=st.integers(-2, 5)))
    sources = draw(arrays(np.int64, (batch, n), elements=st.integers(0, 3)))
    sinks = draw(arrays(np.int64, (batch, m), elements=st.integers(0, 3)))
    for has, gets in zip(sources, sinks, strict=True):
        missing = gets.sum() - has.sum()
        has[draw(st.integers(0, n - 1))] += max(missing, 0)
        if not at_most:
            gets[draw(st.integers(0, m - 1))] += max(-missing, 0)
    return cost, sources, sinks


@pytest.mark.parametrize("at_most", [False, True])
@solved
@given(data=st.data())
def test_transport_is_the_cheapest_assignment_of_units(at_most, data):
    cost, sources, sinks = data.draw(transports(at_most))
    unit = data.draw(st.sampled_from([1, 0.1, 1 / 3]))
    plan = transport_plan(cost.astype(float), sources * unit, sinks * unit, at_most)
    assert plan.shape == cost.shape
    assert plan.min() >= 0
    np.testing.assert_allclose(plan.sum(1), sinks * unit, atol=1e-6)
    taken = plan.sum(2) - sources * unit
    assert taken.max() <= 1e-6
    assert at_most or taken.min() >= -1e-6
    for own, matrix, has, gets in zip(plan, cost, sources, sinks, strict=True):
        units = matrix[np.ix_(np.repeat(np.arange(len(has)), has), np.repeat(np.arange(len(gets)), gets))]
        best = units[linear_sum_assignment(units)].sum() * unit
        assert (own * matrix).sum() == pytest.approx(best, abs=1e-5)


@solved
@given(data=st.data(), n=st.integers(1, 4), m=st.integers(1, 3), batch=st.integers(1, 3))
def test_a_tighter_limit_never_makes_transport_cheaper(data, n, m, batch):
    def positive(count):
        values = torch.tensor(data.draw(arrays(np.float32, (batch, count), elements=st.integers(1, 4))))
        return values / values.sum(1, keepdim=True)

    cost = torch.tensor(data.draw(arrays(np.float32, (batch, n, m), elements=st.integers(0, 8)))) / 8
    weights, annotations = positive(n), positive(m)
    limits = [1.0, *(limit for limit in (0.9, 0.6, 0.3) if limit * n > 1)]
    found = [transport_terms(cost, weights, annotations, limit) for limit in limits]
    lowest = (cost.amin(1) * annotations).sum(1)
    torch.testing.assert_close(found[0][0], lowest)
    for (looser, _), (tighter, divergence) in itertools.pairwise([(lowest, None), *found]):
        assert (tighter >= looser - 1e-5).all()
        assert (divergence >= -1e-5).all()
    rows, columns = (data.draw(st.permutations(range(count))) for count in (n, m))
    own, permuted = (
        transport_terms(cost, weights, annotations, limits[-1])[0],
        transport_terms(cost[:, rows][:, :, columns], weights[:, rows], annotations[:, columns], limits[-1])[0],
    )
    torch.testing.assert_close(own, permuted, atol=1e-5, rtol=1e-5)


@st.composite
def annotated(draw):
    """Samples' and annotations' indicators (B, N, C, *D), (B, M, C, *D), and whether they are regions."""
    regions, batch = draw(st.booleans()), draw(st.integers(1, 2))
    classes = draw(st.integers(1 if regions else 2, 4))
    shape = draw(array_shapes(min_dims=2, max_dims=3, max_side=3))
    numbers = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    if regions:
        return [draw(arrays(bool, (batch, number, classes, *shape))) for number in numbers], True
    maps = [draw(arrays(np.int64, (batch, number, *shape), elements=st.integers(0, classes - 1))) for number in numbers]
    return [np.moveaxis(np.eye(classes, dtype=bool)[labels], -1, 2) for labels in maps], False


@checked
@given(data=st.data(), pair=annotated())
def test_the_cost_of_certain_samples_counts_voxels_that_count(data, pair):
    (samples, annotations), regions = pair
    valid = data.draw(st.none() | arrays(bool, (*annotations.shape[:2], *annotations.shape[3:])))
    logits = torch.tensor(samples) * 100.0 - 50
    voxels = None if valid is None else torch.tensor(valid)
    found = pairwise_cost(logits, torch.tensor(annotations), voxels, "iou", regions)
    counted = np.ones((*annotations.shape[:2], *annotations.shape[3:]), bool) if valid is None else valid
    for b, n, m in np.ndindex(*found.shape):
        a, y = (x[:, counted[b, m]] for x in (samples[b, n], annotations[b, m]))
        a, y = (a, y) if regions else (a[1:], y[1:])
        expected = 1 - np.mean(((a & y).sum(1) + 1) / ((a | y).sum(1) + 1))
        assert found[b, n, m].item() == pytest.approx(expected, abs=1e-5)


# --- statistics

p_values = st.lists(st.integers(0, 64).map(lambda k: k / 64) | st.just(math.nan), max_size=8)


@checked
@given(p=p_values, alpha=st.integers(0, 63).map(lambda k: (k + 0.5) / 64))
def test_holm_rejects_what_the_step_down_procedure_rejects(p, alpha):
    known = [value for value in p if not np.isnan(value)]
    rejected = 0
    for rank, value in enumerate(sorted(known)):
        if value * (len(known) - rank) > alpha:
            break
        rejected += 1
    corrected = holm(p)
    assert sum(value <= alpha for value in corrected) == rejected
    assert [np.isnan(value) for value in corrected] == [np.isnan(value) for value in p]
    pairs = sorted((raw, own) for raw, own in zip(p, corrected, strict=True) if not np.isnan(raw))
    assert all(raw <= own <= 1 for raw, own in pairs)
    assert all(first[1] <= second[1] for first, second in itertools.pairwise(pairs))


@checked
@given(data=st.data(), p=p_values)
def test_holm_does_not_depend_on_the_order(data, p):
    order = data.draw(st.permutations(range(len(p))))
    np.testing.assert_array_equal(np.array(holm(p))[order], holm([p[i] for i in order]))


@checked
@given(sizes=st.sets(st.integers(1, 200), min_size=1, max_size=8), data=st.data())
def test_the_signed_rank_test_counts_all_signs(sizes, data):
    differences = np.array([size * data.draw(st.sampled_from([-1, 1])) for size in sorted(sizes)])
    b = np.array([data.draw(st.integers(0, 100)) for _ in differences])
    ranks = np.arange(1, 1 + len(differences))
    sums = [np.dot(ranks, signs) for signs in itertools.product((0, 1), repeat=len(ranks))]
    observed = ranks @ (differences > 0)
    tail = min(np.mean(np.array(sums) <= observed), np.mean(np.array(sums) >= observed))
    order = data.draw(st.permutations(range(len(differences))))
    a, b = (b + differences)[order].tolist(), b[order].tolist()
    assert paired_p_value([*a, math.nan, 1], [*b, 2, math.nan]) == pytest.approx(min(1, 2 * tail))
    assert paired_p_value(b, a) == paired_p_value(a, b)


@solved
@given(data=st.data(), pairs=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=6))
def test_inf_counts_as_more_than_any_other_difference(data, pairs):
    lost = [(data.draw(st.booleans()), data.draw(st.booleans())) for _ in pairs]
    found = []
    for worst in (math.inf, 1e6):
        a, b = zip(*[[worst if gone else value for value, gone in zip(*both, strict=True)]
                     for both in zip(pairs, lost, strict=True)], strict=True)  # fmt: skip
        found.append(paired_p_value(a, b))
    assert found[0] == found[1]


@settings(PROFILE, max_examples=10)
@given(
    values=st.lists(st.integers(0, 64), min_size=2, max_size=6), factor=st.integers(1, 8), shift=st.integers(-20, 20)
)
def test_the_interval_moves_and_stretches_with_the_values(values, factor, shift):
    low, high = bootstrap_interval(values)
    assert min(values) <= low <= high <= max(values)
    moved = bootstrap_interval([factor * value + shift for value in values])
    assert moved == pytest.approx((factor * low + shift, factor * high + shift))
