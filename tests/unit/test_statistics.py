import numpy as np
import pytest

from nnunet_multimodal.metrics.statistics import bootstrap_interval, holm, paired_p_value


def test_the_interval_of_a_mean_is_that_of_its_normal_distribution_for_many_cases():
    values = np.random.default_rng(0).normal(0.8, 0.1, 400)
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(values.mean() - 1.96 * values.std() / 20, abs=1e-3)
    assert high == pytest.approx(values.mean() + 1.96 * values.std() / 20, abs=1e-3)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval([*values, np.nan, np.inf]) == (low, high)


def test_an_interval_needs_two_cases():
    assert np.isnan(bootstrap_interval([0.5])).all()
    assert np.isnan(bootstrap_interval([np.nan, np.inf, 0.5])).all()
    assert bootstrap_interval([0.5, 0.5]) == (0.5, 0.5)


def test_the_test_is_exact_for_few_cases():
    """All of n differences positive: 2 / 2^n."""
    for n in (3, 5, 8):
        a = np.linspace(0.6, 0.9, n)
        assert paired_p_value(a, a - np.linspace(0.01, 0.05, n)) == pytest.approx(2 / 2**n)


def test_pairs_without_a_value_do_not_count_and_inf_is_the_worst():
    a, b = [1.0, 2.0, 3.0, 4.0, np.nan], [2.5, np.inf, 4.2, 6.0, 1.0]
    assert paired_p_value(a, b) == pytest.approx(2 / 2**4)
    assert paired_p_value(b, a) == paired_p_value(a, b)
    assert paired_p_value([np.inf, 1.0], [np.inf, 1.0]) == 1.0
    assert np.isnan(paired_p_value([np.nan], [1.0]))


def test_holm_by_hand():
    """Sorted 0.01, 0.03, 0.04 times 3, 2, 1, and never below the one before."""
    assert holm([0.04, 0.01, np.nan, 0.03]) == pytest.approx([0.06, 0.03, np.nan, 0.06], nan_ok=True)
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
