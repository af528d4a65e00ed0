"""What MoSE's loss is made of: the cost of every sample against every annotation, and the cheapest transport.

Citation and deviations: :mod:`nnunet_multimodal.heads.mose`.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nnunet_multimodal.metrics.transport import transport_plan

SMOOTH = 1.0  # of the IoU
CHUNK = {"cpu": 2**22, "cuda": 2**24}  # logits that are worked on at once
MIN_WEIGHT = 1e-30  # of a gate: its logarithm's gradient must survive
LARGE_COST = 1e3  # in place of what overflowed: GradScaler skips such a step
COSTS = ("iou", "cross_entropy", "iou+cross_entropy")


def pairwise_cost(samples: Tensor, annotations: Tensor, valid: Tensor | None, kind: str, has_regions: bool) -> Tensor:
    """Cost (B, N, M), float32, of every sample against every annotation.

    ``iou``: 1 - (|p y| + 1) / (|p| + |y| - |p y| + 1), mean over foreground classes or regions, p probabilities;
    ``cross_entropy``: mean over voxels (summed over regions). Both are made of sums over voxels, which are taken a
    chunk at a time, and again in the backward pass: nothing but the logits is kept for it.

    Args:
        samples: logits (B, N, C, *D).
        annotations: indicators (B, M, C, *D).
        valid: voxels that count (B, M, *D) bool; None: all.
        kind: one of them, or both with a ``+`` between: their sum.
        has_regions: sigmoid instead of softmax.
    """
    logits, y = samples.flatten(3), annotations.flatten(3)
    size = max(1, CHUNK.get(logits.device.type, CHUNK["cpu"]) // math.prod(logits.shape[:3]))
    pieces = zip(
        logits.split(size, 3),
        y.split(size, 3),
        itertools.repeat(None) if valid is None else valid.flatten(2).split(size, 2),
        strict=False,
    )
    sums = [
        checkpoint(_sums, *piece, kind, has_regions, use_reentrant=False, preserve_rng_state=False) for piece in pieces
    ]
    total = {name: torch.stack([part[name] for part in sums]).sum(0) for name in sums[0]}
    cost = torch.zeros((), device=logits.device)
    if "iou" in kind:
        union = total["samples"] + total["annotations"] - total["common"]
        cost = cost + 1 - ((total["common"] + SMOOTH) / (union + SMOOTH)).mean(3)
    if "cross_entropy" in kind:
        cost = cost - total["log_likelihood"] / total["voxels"].clamp_min(1)
    return cost


def _sums(logits: Tensor, y: Tensor, valid: Tensor | None, kind: str, has_regions: bool) -> dict[str, Tensor]:
    """What the costs need of some voxels (V): logits (B, N, C, V), y (B, M, C, V), valid (B, M, V) or None."""
    logits, y = logits.float(), y.float()
    counts = torch.ones_like(y[:, :1, 0]) if valid is None else valid.float()  # (B, M or 1, V)
    y = y * counts[:, :, None]
    sums: dict[str, Tensor] = {}
    if "cross_entropy" in kind:
        log_p = F.logsigmoid(logits) if has_regions else logits.log_softmax(2)
        inside = torch.einsum("bncv,bmcv->bnm", log_p, y)
        if has_regions:
            inside = inside + torch.einsum("bncv,bmcv->bnm", F.logsigmoid(-logits), counts[:, :, None] - y)
        sums |= {"log_likelihood": inside, "voxels": counts.sum(2)[:, None]}  # (B, N, M), (B, 1, M or 1)
    if "iou" in kind:
        if has_regions:
            p = logits.sigmoid()
        elif logits.shape[2] == 2:
            p, y = (logits[:, :, 1:] - logits[:, :, :1]).sigmoid(), y[:, :, 1:]
        else:
            p, y = logits.softmax(2)[:, :, 1:], y[:, :, 1:]
        sums["common"] = torch.einsum("bncv,bmcv->bnmc", p, y)
        sums["samples"] = torch.einsum("bncv,bmv->bnmc", p, counts)  # (B, N, M or 1, C)
        sums["annotations"] = y.sum(3)[:, None]
    return sums


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
