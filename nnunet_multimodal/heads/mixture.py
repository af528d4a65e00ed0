"""The distributions that MoSE's head gives: weighted samples of a patch, and the mixture of a whole image."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nnunet_multimodal.backbones.base import full_precision

if TYPE_CHECKING:
    from nnunet_multimodal.heads.mose import MoSEHead

MIN_PROBABILITY = 1e-6


@dataclass(frozen=True)
class ExpertMixture:
    """Weighted samples of a mixture of experts, and what further samples can be made of.

    Attributes:
        samples: logits (B, N, C, *D).
        sample_weights: (B, N), which sum to 1.
        features: what samples are made of (B, F, *D).
        expert_weights: pi (B, K).
        has_regions: output channels are regions.
    """

    samples: Tensor
    sample_weights: Tensor
    features: Tensor
    expert_weights: Tensor
    has_regions: bool

    @cached_property
    def mean(self) -> Tensor:
        """Logits (B, C, *D) of the weighted mean probability."""
        return mixture_logits(self.samples.unbind(1), self.sample_weights.unbind(1), self.has_regions)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Samples (*sample_shape, B, C, *D), drawn by their weights."""
        chosen = torch.multinomial(self.sample_weights, math.prod(sample_shape), replacement=True)  # (B, count)
        batch = torch.arange(len(chosen), device=chosen.device)[:, None]
        drawn = self.samples[batch, chosen].transpose(0, 1)
        return drawn.reshape(*sample_shape, *drawn.shape[1:])

    def blendable(self) -> Tensor:
        """Mean, features and the experts' weights everywhere: (B, C + F + K, *D)."""
        space = self.features.shape[2:]
        weights = self.expert_weights.view(*self.expert_weights.shape, *(1,) * len(space)).expand(-1, -1, *space)
        return torch.cat((self.mean, self.features.to(self.mean.dtype), weights.to(self.mean.dtype)), 1)


@dataclass(frozen=True)
class ImageMixture:
    """The mixture of a whole image, of blended features.

    Attributes:
        head: makes samples.
        loc: logits of the mean (1, C, *D).
        features: (F, *D).
        expert_weights: (K,), which sum to 1.
        temperature: factor on deviations from the mean.
        class_scale: (C,), factors on those of each class; None: 1.
    """

    head: MoSEHead
    loc: Tensor
    features: Tensor
    expert_weights: Tensor
    temperature: float = 1.0
    class_scale: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """(1, C, *D)."""
        return self.loc

    @property
    def num_experts(self) -> int:
        """K; samples of ``draw_compact`` are of the experts in turn."""
        return self.head.num_experts

    def scaled(self, temperature: float = 1.0, class_scale: Tensor | None = None) -> ImageMixture:
        """With other deviations from the same mean."""
        return replace(self, temperature=self.temperature * temperature, class_scale=class_scale)

    def draw(self, num_samples: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Independent samples (C, *D), float32, of equal weight: experts are drawn by theirs."""
        weights = self.expert_weights.to(generator.device)
        experts = torch.multinomial(weights, num_samples, replacement=True, generator=generator)
        yield from self._decode(experts, generator)

    def draw_compact(self, num_samples: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Samples (C, *D) of all experts in turn, for the weights that ``compact_weights`` tells.

        Raises:
            ValueError: fewer samples than experts.
        """
        if num_samples < self.head.num_experts:
            raise ValueError(f"{num_samples} samples of {self.head.num_experts} experts; take one of each at least")
        yield from self._decode(torch.arange(num_samples) % self.head.num_experts, generator)

    def compact_weights(self, num_samples: int) -> Tensor:
        """Weights (num_samples,) of the samples of ``draw_compact``: each expert's, shared by its samples."""
        experts = torch.arange(num_samples) % self.head.num_experts
        weights = self.expert_weights.cpu()[experts] / experts.bincount(minlength=self.head.num_experts)[experts]
        return weights / weights.sum()

    def _decode(self, experts: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        for expert in experts.tolist():
            noise = torch.randn(self.head.latent_dimension, generator=generator, device=generator.device)
            sample = self.head.decode_image(self.features, expert, noise)
            if self.temperature != 1 or self.class_scale is not None:
                scale = torch.full((len(sample),), self.temperature)
                scale = scale if self.class_scale is None else scale * self.class_scale.cpu()
                mean = self.loc[0].to(sample)
                sample = mean + scale.to(sample).view(-1, *(1,) * (sample.ndim - 1)) * (sample - mean)
            yield sample


def mixture_logits(samples: Any, weights: Sequence[Tensor], has_regions: bool) -> Tensor:
    """Logits (B, C, *D), float32, of the weighted mean probability.

    Args:
        samples: N logit maps (B, C, *D), one after the other.
        weights: N weights (B,).
        has_regions: sigmoid instead of softmax.
    """
    probability: Any = 0.0
    for sample, weight in zip(samples, weights, strict=True):
        with full_precision(sample.device):
            own = sample.float().sigmoid() if has_regions else sample.float().softmax(1)
            probability = probability + own * weight.view(-1, *(1,) * (own.ndim - 1))
    with full_precision(probability.device):
        if has_regions:
            return probability.logit(MIN_PROBABILITY)
        return probability.clamp_min(MIN_PROBABILITY).log()
