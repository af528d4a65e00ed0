"""Optimal transport between a few weighted things, exactly and for a whole batch at once.

A linear program of all items together, solved by HiGHS through SciPy: tiny, sparse, and without a loop over items.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.optimize import linprog


def transport_plan(cost: np.ndarray, sources: np.ndarray, sinks: np.ndarray, at_most: bool = False) -> np.ndarray:
    """Cheapest ways to bring what the sources have to the sinks.

    Args:
        cost: (B, N, M), of one unit from source n to sink m.
        sources: (B, N), what each has, >= 0.
        sinks: (B, M), what each gets, >= 0.
        at_most: sources need not give all they have; otherwise both sums must be equal.

    Returns:
        (B, N, M), >= 0: sums over N are ``sinks``, those over M ``sources``, or not above them.

    Raises:
        ValueError: shapes do not fit, masses are negative, or sources have too little (or, if exact, another sum).
    """
    batch, n, m = cost.shape
    sources, sinks = np.asarray(sources, np.float64), np.asarray(sinks, np.float64)
    if sources.shape != (batch, n) or sinks.shape != (batch, m):
        raise ValueError(f"cost {cost.shape} needs sources {(batch, n)}, sinks {(batch, m)}, not {sources.shape}, "
                         f"{sinks.shape}")  # fmt: skip
    has, gets = sources.sum(1), sinks.sum(1)
    enough = has >= gets - 1e-6 * np.abs(gets) if at_most else np.isclose(has, gets, rtol=1e-6, atol=1e-9)
    if min(sources.min(initial=0), sinks.min(initial=0)) < 0 or not enough.all():
        raise ValueError(f"sources have {has} and sinks get {gets}: {'too little' if at_most else 'not equal'}, or < 0")
    scale = has / np.where(gets > 0, gets, 1)  # rounding must not make it infeasible
    sinks = sinks * (np.minimum(scale, 1) if at_most else scale)[:, None]
    used = _cheap_enough(cost, sources, sinks) if at_most else np.ones(cost.shape, bool)
    if not used.any():
        return np.zeros(cost.shape)
    given = sparse.kron(sparse.eye_array(batch * n), np.ones((1, m))).tocsc()[:, used.ravel()]
    taken = sparse.kron(sparse.eye_array(batch), sparse.hstack([sparse.eye_array(m)] * n)).tocsc()[:, used.ravel()]
    if at_most:
        limits, equal = {"A_ub": given, "b_ub": sources.ravel()}, (taken, sinks.ravel())
    else:  # the last source's row follows from the others
        kept = np.arange(batch * n) % n < n - 1
        limits = {}
        equal = sparse.vstack((given.tocsr()[kept], taken)), np.concatenate((sources.ravel()[kept], sinks.ravel()))
    result = linprog(np.asarray(cost, np.float64)[used], **limits, A_eq=equal[0], b_eq=equal[1], method="highs-ds")
    if result.x is None:
        raise ValueError(f"no transport plan for costs from {cost.min()} to {cost.max()}: {result.message}")
    plan = np.zeros(cost.shape)
    plan[used] = np.maximum(result.x, 0)
    return plan


def _cheap_enough(cost: np.ndarray, sources: np.ndarray, sinks: np.ndarray) -> np.ndarray:
    """Which pairs (B, N, M) a cheapest plan may use, where sources need not give all they have.

    All sources that are cheaper for a sink than one it uses must be empty, so they have less than all sinks get.
    """
    order = np.argsort(cost, 1, kind="stable")
    has = np.take_along_axis(np.broadcast_to(sources[:, :, None], cost.shape), order, 1)
    cheaper = has.cumsum(1) - has
    allowed = np.empty(cost.shape, bool)
    np.put_along_axis(allowed, order, cheaper < sinks.sum(1)[:, None, None] * (1 + 1e-9), 1)
    return allowed
