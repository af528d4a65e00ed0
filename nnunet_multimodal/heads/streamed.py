"""Log-likelihoods of label maps under samples of a low-rank Gaussian, streamed over chunks of voxels.

The samples' voxels are worked on a chunk at a time and never held together. The backward pass draws noise again, from
generators seeded by chunk and pair, and only for the samples that have a share in the gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Noise:
    """Standard normal noise that can be drawn again, piece by piece, for any of the antithetic pairs."""

    pairs: int
    seed: int
    device: torch.device

    def weights(self, batch: int, rank: int, dtype: torch.dtype) -> Tensor:
        """Noise of the factor (B, pairs, rank)."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        return torch.randn(batch, self.pairs, rank, generator=generator, device=self.device, dtype=dtype)

    def voxels(self, position: int, pairs: Sequence[int], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Noise of the diagonal (len(pairs), *shape) for a chunk, by its position in the batch."""
        noise = torch.empty(len(pairs), *shape, device=self.device, dtype=dtype)
        generator = torch.Generator(self.device)
        for piece, pair in zip(noise, pairs, strict=True):
            piece.normal_(generator=generator.manual_seed(self.seed + 1 + position * self.pairs + pair))
        return noise


class SampleLogLikelihood(torch.autograd.Function):
    """log p(y | eta^(m)) of every sample: (M, B), the second half of M antithetic to the first.

    With y the indicator of the labels, log p(y | eta) = <y, eta> - A(eta) and its gradient is y - A'(eta), where A is
    logsumexp over the classes or, for regions, the sum of softplus. Sums over voxels are in float64: the log-likelihood
    of a whole map reaches a million nats, and differences of one nat decide which samples count.
    """

    @staticmethod
    def forward(ctx, loc, factor, scale, target, valid, draw, regions, chunk):
        """loc, scale, target (B, C, N), factor (B, R, C, N), valid (B, 1, N) or None -> (M, B)."""
        ctx.save_for_backward(loc, factor, scale, target, valid)
        ctx.draw, ctx.regions, ctx.chunk = draw, regions, chunk
        exact = torch.float32 if loc.device.type == "mps" else torch.float64  # mps has no double precision
        result = torch.zeros(2, draw.pairs, len(loc), dtype=exact, device=loc.device)
        weights = draw.weights(len(loc), factor.shape[1], loc.dtype)
        for piece in _pieces(loc, factor, scale, target, valid, chunk):
            deviation, _ = piece.deviation(draw, weights, range(draw.pairs))
            linear = (deviation.flatten(1) @ piece.target.flatten()).to(exact)
            constant = (piece.target * piece.loc).sum(dtype=exact)
            for half, sign in enumerate((1, -1)):
                partition = _log_partition(piece.loc + sign * deviation, regions)
                if piece.valid is not None:
                    partition *= piece.valid
                result[half, :, piece.sample] += constant + sign * linear - partition.flatten(1).sum(1, dtype=exact)
        return result.flatten(0, 1)

    @staticmethod
    def backward(ctx, gradient):
        """Gradient (M, B) -> gradients of loc, factor and scale."""
        loc, factor, scale, target, valid = ctx.saved_tensors
        draw = ctx.draw
        weights = draw.weights(len(loc), factor.shape[1], loc.dtype)
        gradient = gradient.view(2, draw.pairs, len(loc)).to(loc.dtype)
        pairs = _pairs_that_count(gradient)
        d_loc, d_factor, d_scale = torch.empty_like(loc), torch.empty_like(factor), torch.empty_like(scale)
        for piece in _pieces(loc, factor, scale, target, valid, ctx.chunk):
            own = pairs[piece.sample]
            deviation, noise = piece.deviation(draw, weights, own)
            d_logits = []
            for half, sign in enumerate((1, -1)):
                probability = _probabilities(piece.loc + sign * deviation, ctx.regions)
                if piece.valid is not None:
                    probability *= piece.valid
                outer = gradient[half, own, piece.sample].view(-1, 1, 1)
                d_logits.append(probability.sub_(piece.target).mul_(-outer))
            d_deviation = d_logits[0] - d_logits[1]
            at = piece.sample, slice(None), piece.voxels
            d_loc[at] = (d_logits[0] + d_logits[1]).sum(0)
            d_scale[at] = (noise * d_deviation).sum(0)
            d_own = weights[piece.sample, own].T @ d_deviation.flatten(1)  # (R, C n)
            d_factor[piece.sample, ..., piece.voxels] = d_own.view(factor.shape[1], *piece.loc.shape)
        return d_loc, d_factor, d_scale, None, None, None, None, None


@dataclass(frozen=True)
class Piece:
    """Some voxels of one sample of the batch, in full precision."""

    sample: int
    position: int
    voxels: slice
    loc: Tensor  # (C, n)
    factor: Tensor  # (R, C, n)
    scale: Tensor  # (C, n)
    target: Tensor  # (C, n), zero where not valid
    valid: Tensor | None  # (1, n)

    def deviation(self, draw: Noise, weights: Tensor, pairs: Sequence[int]) -> tuple[Tensor, Tensor]:
        """P eps + sqrt(D) eps' of the pairs (len(pairs), C, n), and eps'."""
        noise = draw.voxels(self.position, pairs, self.loc.shape, self.loc.dtype)
        low_rank = weights[self.sample, list(pairs)] @ self.factor.flatten(1)
        return torch.addcmul(low_rank.view(noise.shape), noise, self.scale), noise


def _pieces(
    loc: Tensor, factor: Tensor, scale: Tensor, target: Tensor, valid: Tensor | None, chunk: int
) -> Iterator[Piece]:
    dtype = loc.dtype
    for position, (sample, start) in enumerate(itertools.product(range(len(loc)), range(0, loc.shape[2], chunk))):
        voxels = slice(start, start + chunk)
        keep = None if valid is None else valid[sample, :, voxels].to(dtype)
        y = target[sample, :, voxels].to(dtype)
        yield Piece(
            sample,
            position,
            voxels,
            loc[sample, :, voxels],
            factor[sample, :, :, voxels].to(dtype),
            scale[sample, :, voxels],
            y if keep is None else y * keep,
            keep,
        )


def _log_partition(logits: Tensor, regions: bool) -> Tensor:
    """A(eta) of logits (S, C, n): (S, 1 or C, n)."""
    return F.softplus(logits) if regions else logits.logsumexp(1, keepdim=True)


def _probabilities(logits: Tensor, regions: bool) -> Tensor:
    """A'(eta) of logits (S, C, n)."""
    return logits.sigmoid() if regions else logits.softmax(1)


def _pairs_that_count(gradient: Tensor) -> list[list[int]]:
    """The pairs whose share of the gradient (2, pairs, B) is above its rounding error, for each sample of the batch.

    A sample's share is its likelihood's. Over the many voxels of a map nearly all shares are zero beside the largest.
    Shares that are not finite count, so that they stay visible in the gradient.
    """
    shares = gradient.abs().amax(0)  # (pairs, B)
    threshold = shares.amax(0) * torch.finfo(gradient.dtype).eps / (2 * len(shares))
    return [[pair for pair, counts in enumerate(column) if counts] for column in (~(shares <= threshold)).T.tolist()]
