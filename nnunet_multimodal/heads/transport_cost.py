"""What MoSE's loss is made of: the cost of every sample against every annotation, and the cheapest transport.

Citation and deviations: :mod:`nnunet_multimodal.heads.mose`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nnunet_multimodal.metrics.transport import transport_plan

SMOOTH = 1.0  # of the IoU
MIN_WEIGHT = 1e-30  # of a gate: its logarithm's gradient must survive
LARGE_COST = 1e3  # in place of what overflowed: GradScaler skips such a step
COSTS = ("iou", "cross_entropy", "iou+cross_entropy")


def pairwise_cost(samples: Tensor, annotations: Tensor, valid: Tensor | None, kind: str, has_regions: bool) -> Tensor:
    """Cost (B, N, M), float32, of every sample against every annotation.

    ``iou``: 1 - (|p y| + 1) / (|p| + |y| - |p y| + 1), mean over foreground classes or regions, p probabilities;
    ``cross_entropy``: mean over voxels (summed over regions).

    Args:
        samples: logits (B, N, C, *D).
        annotations: indicators (B, M, C, *D).
        valid: voxels that count (B, M, *D) bool; None: all.
        kind: see above.
        has_regions: sigmoid instead of softmax.
    """
    if "+" in kind:
        first, second = kind.split("+")
        cost = pairwise_cost(samples, annotations, valid, first, has_regions)
        return cost + pairwise_cost(samples, annotations, valid, second, has_regions)
    logits, y = samples.flatten(3).float(), annotations.flatten(3).float()
    counts = None if valid is None else valid.flatten(2).float()  # (B, M, V)
    if counts is not None:
        y = y * counts[:, :, None]
    if kind == "cross_entropy":
        log_p = F.logsigmoid(logits) if has_regions else logits.log_softmax(2)
        inside = torch.einsum("bncv,bmcv->bnm", log_p, y)
        if has_regions:
            outside = torch.ones_like(y) if counts is None else counts[:, :, None]
            inside = inside + torch.einsum("bncv,bmcv->bnm", F.logsigmoid(-logits), outside - y)
        voxels = y.shape[-1] if counts is None else counts.sum(2).clamp_min(1)[:, None]
        return -inside / voxels
    if has_regions:
        p = logits.sigmoid()
    elif logits.shape[2] == 2:
        p, y = (logits[:, :, 1:] - logits[:, :, :1]).sigmoid(), y[:, :, 1:]
    else:
        p, y = logits.softmax(2)[:, :, 1:], y[:, :, 1:]
    common = torch.einsum("bncv,bmcv->bnmc", p, y)
    of_samples = p.sum(3)[:, :, None] if counts is None else torch.einsum("bncv,bmv->bnmc", p, counts)
    iou = (common + SMOOTH) / (of_samples + y.sum(3)[:, None] - common + SMOOTH)
    return 1 - iou.mean(3)


def transport_terms(
    cost: Tensor, sample_weights: Tensor, weights: Tensor, limit: float, preference: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Cost of the cheapest transport, and KL(what it takes of each sample || the samples' weights), (B,) each.

    Args:
        cost: (B, N, M).
        sample_weights: (B, N).
        weights: of the annotations (B, M), each row summing to 1; 0 for none.
        limit: gamma, what a sample can take at most.
        preference: how much more a sample may cost that has e times the weight of another, and be taken still.
    """
    fixed = cost.detach()
    if preference:
        fixed = fixed - preference * sample_weights.detach().clamp_min(MIN_WEIGHT).log()[:, :, None]
    if limit >= 1:
        nearest = F.one_hot(fixed.argmin(1), cost.shape[1]).transpose(1, 2)  # (B, N, M)
        plan = nearest * weights[:, None]
    else:
        finite = fixed.nan_to_num(LARGE_COST, LARGE_COST, 0.0).cpu().double().numpy()
        limits = np.full(finite.shape[:2], limit)
        plan = torch.from_numpy(transport_plan(finite, limits, weights.cpu().double().numpy(), at_most=True))
        plan = plan.to(cost)
    taken = plan.sum(2)
    divergence = torch.special.xlogy(taken, taken) - taken * sample_weights.clamp_min(MIN_WEIGHT).log()
    return (plan * cost).sum((1, 2)), divergence.sum(1)
