import itertools

import numpy as np
import pytest

from nnunet_multimodal.metrics.transport import transport_plan

RNG = np.random.default_rng(0)


def masses(batch, count):
    values = RNG.random((batch, count)) + 0.1
    return values / values.sum(1, keepdims=True)


def test_equal_masses_are_an_assignment():
    cost = RNG.random((3, 4, 4))
    plan = transport_plan(cost, np.full((3, 4), 0.25), np.full((3, 4), 0.25))
    for own, matrix in zip((plan * cost).sum((1, 2)), cost, strict=True):
        best = min(matrix[list(order), range(4)].mean() for order in itertools.permutations(range(4)))
        assert own == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("limit", [0.1, 0.25, 0.5, 1.0])
def test_limits_and_demands_are_kept_and_nothing_is_cheaper(limit):
    """The same program without the pairs that are left out beforehand."""
    from scipy.optimize import linprog

    cost, sinks = RNG.random((5, 12, 4)), masses(5, 4)
    plan = transport_plan(cost, np.full((5, 12), limit), sinks, at_most=True)
    np.testing.assert_allclose(plan.sum(1), sinks, atol=1e-9)
    assert plan.sum(2).max() <= limit + 1e-9
    assert plan.min() >= 0
    for own, matrix, gets in zip((plan * cost).sum((1, 2)), cost, sinks, strict=True):
        expected = linprog(
            matrix.ravel(),
            A_ub=np.kron(np.eye(12), np.ones((1, 4))),
            b_ub=np.full(12, limit),
            A_eq=np.kron(np.ones((1, 12)), np.eye(4)),
            b_eq=gets,
        )
        assert own == pytest.approx(expected.fun, abs=1e-9)


def test_sources_of_different_size():
    cost = np.array([[[0.0, 0.0], [1.0, 2.0], [5.0, 6.0]]])
    plan = transport_plan(cost, np.array([[0.5, 0.3, 9.0]]), np.array([[0.5, 0.5]]), at_most=True)
    np.testing.assert_allclose(plan[0], [[0.0, 0.5], [0.3, 0.0], [0.2, 0.0]], atol=1e-9)


def test_weighted_sources_give_all_they_have():
    cost, sources, sinks = RNG.random((4, 7, 3)), masses(4, 7), masses(4, 3)
    plan = transport_plan(cost, sources, sinks)
    np.testing.assert_allclose(plan.sum(2), sources, atol=1e-9)
    np.testing.assert_allclose(plan.sum(1), sinks, atol=1e-9)


def test_a_rater_who_is_not_there_gets_nothing():
    plan = transport_plan(RNG.random((1, 4, 3)), np.full((1, 4), 0.5), np.array([[0.5, 0.5, 0.0]]), at_most=True)
    assert not plan[..., 2].any()


@pytest.mark.parametrize(
    ("sources", "sinks", "at_most", "message"),
    [
        ([[0.2, 0.2]], [[0.5, 0.5]], True, "too little"),
        ([[0.5, 0.6]], [[0.5, 0.5]], False, "not equal"),
        ([[-0.5, 1.5]], [[0.5, 0.5]], False, "< 0"),
        ([[0.5, 0.5, 0.0]], [[0.5, 0.5]], False, "needs sources"),
    ],
)
def test_what_cannot_be_is_refused(sources, sinks, at_most, message):
    with pytest.raises(ValueError, match=message):
        transport_plan(np.zeros((1, 2, 2)), np.array(sources), np.array(sinks), at_most)


def test_weights_that_sum_to_a_rounding_more_than_one_are_transported():
    plan = transport_plan(np.zeros((1, 2, 1)), np.full((1, 2), 0.5), np.array([[1 + 2e-7]]), at_most=True)
    np.testing.assert_allclose(plan, 0.5, atol=1e-6)
