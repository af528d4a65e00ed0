"""What MoSE's loss is made of: the cost of every sample against every annotation, and the cheapest transport.

Citation and deviations: :mod:`nnunet_multimodal.heads.mose`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nnunet_multimodal.backbones.base import full_precision
from nnunet_multimodal.metrics.transport import transport_plan

SMOOTH = 1.0  # of the IoU
CHUNK = {"cpu": 2**20, "cuda": 2**24}  # logits that are worked on at once
MIN_WEIGHT = 1e-30  # of a gate: its logarithm's gradient must survive
LARGE_COST = 1e3  # in place of what overflowed: GradScaler skips such a step
COSTS = ("iou", "cross_entropy", "iou+cross_entropy")


def pairwise_cost(samples: Tensor, annotations: Tensor, valid: Tensor | None, kind: str, has_regions: bool) -> Tensor:
    """Cost (B, N, M), float32, of every sample against every annotation.

    ``iou``: 1 - (|p y| + 1) / (|p| + |y| - |p y| + 1), mean over foreground classes or regions, p probabilities;
    ``cross_entropy``: mean over voxels (summed over regions). Both are made of sums over voxels.

    Args:
        samples: logits (B, N, C, *D).
        annotations: indicators (B, M, C, *D).
        valid: voxels that count (B, M, *D) bool; None: all.
        kind: one of them, or both with a ``+`` between: their sum.
        has_regions: sigmoid instead of softmax.
    """
    y, counts = annotations.flatten(3), None if valid is None else valid.flatten(2)
    common, sizes, log_likelihood = _SumsOverVoxels.apply(samples.flatten(3), y, counts, kind, has_regions)
    cost = torch.zeros((), device=samples.device)
    if "iou" in kind:
        inside = y[:, :, 0 if has_regions else 1 :]
        area = (
            inside.sum(3, dtype=torch.float32)
            if counts is None
            else torch.einsum("bmcv,bmv->bmc", inside.float(), counts.float())
        )
        union = sizes + area[:, None] - common
        cost = cost + 1 - ((common + SMOOTH) / (union + SMOOTH)).mean(3)
    if "cross_entropy" in kind:
        voxels = y.shape[3] if counts is None else counts.sum(2)[:, None].clamp_min(1)
        cost = cost - log_likelihood / voxels
    return cost


class _SumsOverVoxels(torch.autograd.Function):
    """What the costs need: sums of p y (B, N, M, C), p (B, N, M or 1, C) and log p[y] (B, N, M); C without background.

    Both passes take a chunk of voxels (V) at a time, and nothing but the logits is kept for the second. A sum that
    ``kind`` does not need is None. Of two classes the softmax is the sigmoid of their difference.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, y: Tensor, valid: Tensor | None, kind: str, has_regions: bool
    ) -> tuple[Tensor | None, ...]:
        """Arguments as in :func:`pairwise_cost`, with (B, N, C, V), (B, M, C, V), (B, M, V)."""
        ctx.save_for_backward(logits, y, valid)
        ctx.has_regions = has_regions
        total: list[Any] = [None, None, None]
        for _, x, own, counts, is_sigmoid in _pieces(logits, y, valid, has_regions):
            parts: list[Any] = [None, None, None]
            log_p = None if is_sigmoid else x.log_softmax(2)
            p = x.sigmoid() if log_p is None else log_p[:, :, 1:].exp()
            if "iou" in kind:
                parts[0] = torch.einsum("bncv,bmcv->bnmc", p, own if log_p is None else own[:, :, 1:])
                parts[1] = torch.einsum("bncv,bmv->bnmc", p, counts)
            if "cross_entropy" in kind and log_p is not None:
                parts[2] = torch.einsum("bncv,bmcv->bnm", log_p, own)
            elif "cross_entropy" in kind:  # y log p + (1 - y) log(1 - p) = y x - softplus(x)
                softplus = x.clamp_min(0).sub_(torch.maximum(p, 1 - p).log_()).sum(2)
                parts[2] = torch.einsum("bncv,bmcv->bnm", x, own) - torch.einsum("bnv,bmv->bnm", softplus, counts)
            total = [part if before is None else before + part for before, part in zip(total, parts, strict=True)]
        return tuple(total)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The derivatives, written out."""
        logits, y, valid = ctx.saved_tensors
        common, sizes, log_likelihood = grads
        result = torch.empty_like(logits)
        with full_precision(logits.device):
            for place, x, own, counts, is_sigmoid in _pieces(logits, y, valid, ctx.has_regions):
                p = x.sigmoid() if is_sigmoid else x.softmax(2)
                grad = torch.zeros_like(p)
                if common is not None and sizes is not None:
                    first = 0 if is_sigmoid else 1
                    inside = grad[:, :, first:]
                    inside += torch.einsum("bnmc,bmcv->bncv", common, own[:, :, first:])
                    inside += torch.einsum("bnmc,bmv->bncv", sizes, counts)
                    grad = p * (1 - p) * grad if is_sigmoid else p * (grad - (p * grad).sum(2, keepdim=True))
                if log_likelihood is not None:
                    grad += torch.einsum("bnm,bmcv->bncv", log_likelihood, own)
                    grad -= p * torch.einsum("bnm,bmv->bnv", log_likelihood, counts)[:, :, None]
                result[:, :, -grad.shape[2] :, place] = grad
                if grad.shape[2] < logits.shape[2]:
                    result[:, :, :1, place] = -grad
        return result, None, None, None, None


def _pieces(
    logits: Tensor, y: Tensor, valid: Tensor | None, has_regions: bool
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, bool]]:
    """Place, logits, indicators (0 where nothing counts), what counts (B, M or 1, V), whether a sigmoid's logits."""
    is_two = not has_regions and logits.shape[2] == 2
    size = max(1, CHUNK.get(logits.device.type, CHUNK["cpu"]) // math.prod(logits.shape[:3]))
    for start in range(0, logits.shape[3], size):
        place = slice(start, start + size)
        x, own = logits[..., place].float(), y[..., place].float()
        counts = torch.ones_like(own[:, :1, 0]) if valid is None else valid[..., place].float()
        own = own if valid is None else own * counts[:, :, None]
        yield (
            (place, x[:, :, 1:] - x[:, :, :1], own[:, :, 1:], counts, True)
            if is_two
            else (place, x, own, counts, has_regions)
        )


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
