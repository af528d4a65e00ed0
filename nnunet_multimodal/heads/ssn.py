"""Stochastic segmentation networks: a low-rank Gaussian over whole logit maps (Monteiro et al., NeurIPS 2020).

Three 1x1 convolutions of the last decoder features give the mean, the covariance factor P and the log diagonal of
Sigma = P P^T + D over all voxels and classes together (Eq. 5). The loss is the Monte-Carlo estimate of the negative
log-likelihood of the label map (Eq. 6, 7).

Deviations from the paper, and why:

- The likelihood is divided by the number of (not ignored) voxels and multiplied by ``loss_weight``. Eq. 7 is a sum over
  up to a million voxels, and the paper's Adam does not mind its scale; nnU-Net's SGD and clipping are made for losses
  of the order of one. What the covariance explains is a small part of a voxel's mean loss, because most voxels are
  certain: on lung nodules (109 held-out slices of 64 x 64 pixels, four raters, 1,500 steps, one run each) weights 1,
  20 and 100 reach a D_GED^2 of 0.46, 0.29 and 0.30.
- nnU-Net's loss of the mean (Dice and cross-entropy) stays, with ``mean_loss_weight``: the mean is what users predict,
  and the likelihood alone leaves it worse than nnU-Net's. On the same nodules it also helped the samples (0.28).
- P is divided by sqrt(rank), so that the variance at the start does not depend on the rank.
- Samples come in antithetic pairs (noise and its negative), as in the authors' code: less variance for the same work.
- Training starts with that loss of the mean alone, for ``warm_up`` of the epochs. The paper does so for
  its toy problem, where the covariance otherwise outruns the mean (5.1).
- P and D are zero (D: ``EPSILON``) outside nnU-Net's non-zero mask, where the label is certain and the covariance would
  grow for ever; the paper masks the background of brain scans for the same reason (5.1).
- A sample is mean + P eps + sqrt(D) eps'. Sigma is never factorised, so there is nothing that can fail on it and no
  fallback; the authors' code falls back on the diagonal when torch's LowRankMultivariateNormal cannot factorise it.
- The log diagonal starts at ``INITIAL_LOG_DIAGONAL`` instead of 0, a standard deviation of 0.14 instead of 1: with
  nnU-Net's SGD and a loss per voxel it stays near its start, and noise of single voxels speckles the samples.
- The log diagonal is cut off at ``MAX_LOG_DIAGONAL``: its exponential would overflow in the end, first of all in the
  half precision in which nnU-Net blends tiles.
- Region-based training: the log-probability of a label map is a sum of Bernoulli instead of categorical terms.
- Everything after the 1x1 convolutions is float32, whatever autocast says. The convolutions follow autocast like
  nnU-Net's own last layers; P stays in their type and is converted a piece at a time, because it is by far the largest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from nnunet_multimodal.backbones.base import UNetTopology, full_precision
from nnunet_multimodal.heads.base import DistributionLoss, SegmentationLoss, Step, encode_target
from nnunet_multimodal.heads.deterministic import DeterministicHead
from nnunet_multimodal.heads.streamed import Noise, SampleLogLikelihood

EPSILON = 1e-5  # paper: added to the diagonal
INITIAL_LOG_DIAGONAL, MAX_LOG_DIAGONAL = -4.0, 16.0
# voxels whose samples are worked on at once: few for little memory, enough to outweigh starting threads or kernels
CHUNK = {"cpu": 2**14, "cuda": 2**17}
GROUP, DRAW_CHUNK = 4, 2**16  # samples and voxels of a whole image


@dataclass(frozen=True)
class LowRankGaussianLogits:
    """N(loc, P P^T + D) over all classes and voxels of a logit map together (Eq. 5).

    Attributes:
        loc: (B, C, *D).
        cov_factor: P, (B, R, C, *D), R the rank; R = 0 is the diagonal model.
        cov_diag: the diagonal of D, (B, C, *D), > 0.
    """

    loc: Tensor
    cov_factor: Tensor
    cov_diag: Tensor

    @property
    def mean(self) -> Tensor:
        """The most likely logit map (B, C, *D)."""
        return self.loc

    def rsample(self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None) -> Tensor:
        """Differentiable samples (*sample_shape, B, C, *D), in antithetic pairs (the second half mirrors the first)."""
        count = math.prod(sample_shape)
        batch, rank = self.cov_factor.shape[:2]
        shape, pairs = self.loc.shape, -(-count // 2)
        weights = self.loc.new_empty(batch, pairs, rank).normal_(generator=generator)
        noise = self.loc.new_empty(pairs, *shape).normal_(generator=generator)
        low_rank = weights @ self.cov_factor.to(self.loc.dtype).flatten(2)  # (B, pairs, C *D)
        deviation = low_rank.transpose(0, 1).view(pairs, *shape) + noise * self.cov_diag.sqrt()
        samples = self.loc + torch.cat((deviation, -deviation[: count - pairs]))
        return samples.view(*sample_shape, *shape)

    def scaled(self, temperature: float = 1.0, class_scale: Tensor | None = None) -> LowRankGaussianLogits:
        """The distribution with other deviations from the same mean (paper, Fig. 6).

        Args:
            temperature: factor on Sigma^(1/2).
            class_scale: (C,), factor on each class's part of it; negative ones mirror that part at the mean.
        """
        scale = torch.full((self.loc.shape[1],), temperature, dtype=self.loc.dtype, device=self.loc.device)
        if class_scale is not None:
            scale = scale * class_scale.to(scale)
        scale = scale.view(-1, *(1,) * (self.loc.ndim - 2))
        return replace(self, cov_factor=self.cov_factor * scale.to(self.cov_factor), cov_diag=self.cov_diag * scale**2)

    def blendable(self) -> Tensor:
        """Mean, factor and sqrt(D), in which samples are linear: (B, C (R + 2), *D) (paper, 5.3)."""
        return torch.cat((self.loc, self.cov_factor.to(self.loc.dtype).flatten(1, 2), self.cov_diag.sqrt()), 1)

    def draw(self, num_samples: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Independent samples (C, *D) of a single image, float32, one at a time.

        Held at once are ``GROUP`` samples, because converting P costs more than multiplying it.

        Args:
            num_samples: how many.
            generator: on the CPU or on the device that does the work, to which the parameters come in pieces.
        """
        device, loc = generator.device, self.loc[0].flatten(1)
        factor, scale = self.cov_factor[0].flatten(2), self.cov_diag[0].flatten(1)
        weights = torch.randn(num_samples, len(factor), generator=generator, device=device)
        for group in weights.split(GROUP):
            samples = torch.empty(len(group), *loc.shape, device=loc.device)
            for start in range(0, loc.shape[1], DRAW_CHUNK):
                at = slice(start, start + DRAW_CHUNK)
                mean, spread = (x[:, at].to(device, torch.float32) for x in (loc, scale))
                noise = torch.empty(len(group), *mean.shape, device=device).normal_(generator=generator)
                low_rank = group @ factor[..., at].to(device, torch.float32).flatten(1)
                samples[..., at] = low_rank.view(noise.shape).add_(mean).addcmul_(noise, spread.sqrt()).to(loc.device)
            yield from samples.view(-1, *self.loc.shape[1:])

    def log_likelihood(
        self,
        target: Tensor,
        num_samples: int = 20,
        regions: bool = False,
        valid: Tensor | None = None,
        generator: torch.Generator | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """Log-likelihood of label maps, estimated from samples (Eq. 6); needs next to no memory beyond its gradients.

        See :mod:`nnunet_multimodal.heads.streamed` for how.

        Args:
            target: (B, C, *D), 1 or True where a voxel is of that class (or in that region); may be soft.
            num_samples: M, even: antithetic pairs.
            regions: Bernoulli probabilities of overlapping regions instead of categorical ones.
            valid: (B, 1, *D) bool, the voxels that count; all if not given.
            generator: on the CPU, whatever the device: it seeds the generators of the chunks.
            chunk: voxels that are worked on at once.

        Returns:
            (B,) nats, summed over voxels.

        Raises:
            ValueError: ``num_samples`` is odd or not positive, or the shapes differ.
        """
        if num_samples < 2 or num_samples % 2:
            raise ValueError(f"num_samples is {num_samples}; samples come in antithetic pairs, use an even number >= 2")
        if target.shape != self.loc.shape:
            raise ValueError(f"target has shape {tuple(target.shape)} and the logits {tuple(self.loc.shape)}")
        log_likelihoods = SampleLogLikelihood.apply(
            self.loc.flatten(2),
            self.cov_factor.flatten(3),
            self.cov_diag.sqrt().flatten(2),
            target.flatten(2),
            None if valid is None else valid.flatten(2),
            Noise(num_samples // 2, int(torch.randint(2**62, (), generator=generator)), self.loc.device),
            regions,
            chunk or CHUNK.get(self.loc.device.type, CHUNK["cpu"]),
        )
        return log_likelihoods.logsumexp(0) - math.log(num_samples)


class SSNHead(DeterministicHead):
    """Mean, covariance factor and diagonal; the mean's layers are nnU-Net's segmentation layers.

    Args:
        topology: the network's.
        num_classes: C.
        rank: R of the covariance factor; 0 leaves the diagonal alone.
        num_samples: M of the training loss, even.
        warm_up: part of the training's epochs in which the mean is trained alone, 0 to 1.
        loss_weight: factor on the negative log-likelihood per voxel.
        mean_loss_weight: factor on nnU-Net's loss of the mean, after the warm-up.

    Raises:
        ValueError: an option out of its range.
    """

    NEEDS_FOREGROUND = True
    STOCHASTIC = True

    def __init__(
        self,
        topology: UNetTopology,
        num_classes: int,
        rank: int = 10,
        num_samples: int = 20,
        warm_up: float = 0.1,
        loss_weight: float = 20.0,
        mean_loss_weight: float = 1.0,
    ) -> None:
        super().__init__(topology, num_classes)
        if (
            rank < 0
            or num_samples < 2
            or num_samples % 2
            or not 0 <= warm_up <= 1
            or min(loss_weight, mean_loss_weight) < 0
        ):
            raise ValueError(
                f"rank {rank}, num_samples {num_samples}, warm_up {warm_up}, loss_weight {loss_weight}, "
                f"mean_loss_weight {mean_loss_weight} for SSN: the rank and the weights must be >= 0, the number of "
                "samples even and the warm-up between 0 and 1; correct them in the plans file"
            )
        self.rank, self.num_samples = rank, num_samples
        self.warm_up, self.loss_weight, self.mean_loss_weight = warm_up, loss_weight, mean_loss_weight
        features = topology.features_per_stage[0]
        self.log_diagonal_layer = topology.conv_op(features, num_classes, 1, bias=True)
        self.factor_layer = topology.conv_op(features, rank * num_classes, 1, bias=True) if rank else None

    def forward(
        self,
        features: Sequence[Tensor],
        bottleneck: Tensor,
        foreground: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> LowRankGaussianLogits:
        """See ``nnunet_multimodal.heads.base``."""
        finest = features[0]
        loc, log_diagonal = self.mean_logits(features, bottleneck, logits), self.log_diagonal_layer(finest)
        if self.factor_layer is None:
            factor = loc.new_zeros(len(loc), 0, *loc.shape[1:])
        else:
            factor = self.factor_layer(finest).unflatten(1, (self.rank, self.num_classes)) / math.sqrt(self.rank)
        with full_precision(loc.device):
            diagonal = (log_diagonal.float() + INITIAL_LOG_DIAGONAL).clamp(max=MAX_LOG_DIAGONAL).exp()
            if foreground is not None:
                diagonal = diagonal * foreground
                factor = factor * foreground[:, None].to(factor.dtype)
            return LowRankGaussianLogits(loc.float(), factor, diagonal + EPSILON)

    @property
    def num_blended(self) -> int:
        """C (R + 2)."""
        return self.num_classes * (self.rank + 2)

    def blended(self, parameters: Tensor, foreground: Tensor) -> LowRankGaussianLogits:
        """The distribution over a whole image; nothing varies outside nnU-Net's non-zero mask."""
        loc, factor, scale = parameters[None].split(
            (self.num_classes, self.rank * self.num_classes, self.num_classes), 1
        )
        factor *= foreground
        factor = factor.unflatten(1, (self.rank, self.num_classes))
        return LowRankGaussianLogits(loc, factor, (scale.float() * foreground).square_())

    def build_loss(self, segmentation_loss: SegmentationLoss, label_manager: LabelManager) -> DistributionLoss:
        """Negative log-likelihood (Eq. 7), after the warm-up, and nnU-Net's loss of the mean."""

        def loss(distribution: LowRankGaussianLogits, target: Tensor, step: Step) -> Tensor:
            mean_loss = segmentation_loss(distribution.mean, target)
            if step.progress <= self.warm_up:
                # DistributedDataParallel stops on a parameter without a gradient
                return mean_loss + 0 * (distribution.cov_factor.sum() + distribution.cov_diag.sum())
            nats = self.negative_log_likelihood(distribution, target, label_manager)
            return self.loss_weight * nats + self.mean_loss_weight * mean_loss

        return loss

    def negative_log_likelihood(
        self, distribution: LowRankGaussianLogits, target: Tensor, label_manager: LabelManager
    ) -> Tensor:
        """Nats per voxel of nnU-Net's target (B, 1, *D), or for regions (B, C, *D) and the ignored voxels."""
        with full_precision(target.device):
            indicator, valid = encode_target(target, self.num_classes, label_manager)
            nats = distribution.log_likelihood(indicator, self.num_samples, label_manager.has_regions, valid)
            voxels = target[0, 0].numel() if valid is None else valid.flatten(1).sum(1).clamp(min=1)
            return -(nats / voxels).mean().float()

    def compute_conv_feature_map_size(self, patch_size: Sequence[int], deep_supervision: bool) -> int:
        """Feature map elements of one sample, nnU-Net's measure of memory: two tensors are kept for one that it counts.

        Factor and diagonal are kept, the mean once more in single precision, and in the loss their gradients. All are
        gone in the backward pass of the finest decoder stage, which itself needs gradients of two maps of its features.
        """
        maps = max(0, 2 * (self.rank + 3) * self.num_classes - 2 * self.topology.features_per_stage[0])
        needed = maps * int(np.prod(patch_size, dtype=np.int64))
        return super().compute_conv_feature_map_size(patch_size, deep_supervision) + needed // 2


class SSNDiagonalHead(SSNHead):
    """Independent voxels, the paper's baseline: the same head with a covariance factor of rank 0."""

    def __init__(self, topology: UNetTopology, num_classes: int, **options: Any) -> None:
        super().__init__(topology, num_classes, rank=0, **options)
