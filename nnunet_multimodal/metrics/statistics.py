"""Intervals of means and paired comparisons, over cases."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

RESAMPLES = 9999


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean by resampling cases; NaN with fewer than two finite values."""
    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    if len(finite) < 2:
        return np.nan, np.nan
    if np.ptp(finite) == 0:
        return float(finite[0]), float(finite[0])
    rng = np.random.default_rng(seed)
    interval = stats.bootstrap((finite,), np.mean, n_resamples=RESAMPLES, method="percentile", random_state=rng)
    return float(interval.confidence_interval.low), float(interval.confidence_interval.high)


def paired_p_value(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided Wilcoxon signed-rank test over the cases that have both; inf is the worst value, NaN none.

    Returns:
        1 if nothing differs; NaN with no pair.
    """
    pairs = np.array([a, b], dtype=float)
    pairs = pairs[:, ~np.isnan(pairs).any(0)]
    if not pairs.size:
        return np.nan
    finite = np.abs(pairs[np.isfinite(pairs)])
    pairs[np.isinf(pairs)] = 2 * (finite.max() if finite.size else 0) + 1  # beyond all others
    difference = pairs[0] - pairs[1]
    return float(stats.wilcoxon(difference).pvalue) if difference.any() else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Holm 1979), in the order given; NaN stays and does not count."""
    p = np.asarray(p_values, dtype=float)
    order = [i for i in np.argsort(p, kind="stable") if not np.isnan(p[i])]
    corrected, largest = np.full(len(p), np.nan), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p[index]))
        corrected[index] = largest
    return corrected.tolist()
