"""What an output head is given and returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Protocol

import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor, nn

SegmentationLoss = Callable[[Tensor, Tensor], Tensor]
# (distribution, target, progress): how much of the training will be done after this epoch, 0 to 1
DistributionLoss = Callable[[Any, Tensor, float], Tensor]


class LogitDistribution(Protocol):
    """A distribution over whole logit maps (B, C, *D)."""

    @property
    def mean(self) -> Tensor:
        """The logits that nnU-Net's predictor, ensembling and export see: (B, C, *D)."""

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Differentiable samples: (*sample_shape, B, C, *D)."""


class BlendableLogits(LogitDistribution, Protocol):
    """A distribution that a sliding window can put together from tiles, for samples of whole images."""

    def blendable(self) -> Tensor:
        """(B, K, *D), the mean first: parameters in which every sample is linear, so that a sample of blended
        parameters is the same as blended samples of tiles with the same noise.
        """

    def scaled(self, temperature: float = 1.0, class_scale: Tensor | None = None) -> BlendableLogits:
        """The distribution with all deviations from its mean, or those of a class, multiplied."""

    def draw(self, num_samples: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Samples (C, *D) of a single image, one at a time, in memory that does not depend on their number."""


class Head(nn.Module, ABC):
    """From decoder features to a distribution over logit maps.

    The constructor takes ``(topology, num_classes, **options)``.
    """

    NEEDS_FOREGROUND: ClassVar[bool] = False  # in training, nnU-Net's non-zero mask
    STOCHASTIC: ClassVar[bool] = False  # its distributions are BlendableLogits

    @abstractmethod
    def forward(
        self,
        features: Sequence[Tensor],
        bottleneck: Tensor,
        foreground: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> LogitDistribution:
        """The distribution at full resolution.

        Args:
            features: decoder features, finest first.
            bottleneck: the deepest features.
            foreground: nnU-Net's non-zero mask (B, 1, *D) bool, where it is known.
            logits: (B, C, *D), what the backbone predicts, in place of segmentation layers of the head's own.
        """

    @abstractmethod
    def mean_logits(self, features: Sequence[Tensor], bottleneck: Tensor, logits: Tensor | None = None) -> Tensor:
        """The mean alone (B, C, *D), for nnU-Net's predictor."""

    @abstractmethod
    def drop_segmentation_layers(self) -> None:
        """The backbone predicts by itself."""

    def blended(self, parameters: Tensor, foreground: Tensor) -> BlendableLogits:
        """The distribution over a whole image, for heads that are ``STOCHASTIC``.

        Args:
            parameters: ``BlendableLogits.blendable`` of its tiles, blended: (K, *D), overwritten.
            foreground: nnU-Net's non-zero mask (1, *D) bool.

        Raises:
            ValueError: the head is deterministic.
        """
        raise ValueError(f"{type(self).__name__} is deterministic and has no distribution to blend")

    @property
    def num_blended(self) -> int:
        """K, how many parameters a voxel has; 0 for a deterministic head."""
        return 0

    @abstractmethod
    def coarse_logits(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """A logit map for every coarser stage, finest first: nnU-Net's deep supervision."""

    @abstractmethod
    def unused_without_deep_supervision(self) -> Iterable[nn.Parameter]:
        """The parameters that ``coarse_logits`` alone uses."""

    @abstractmethod
    def build_loss(self, segmentation_loss: SegmentationLoss, label_manager: LabelManager) -> DistributionLoss:
        """The loss at full resolution, from nnU-Net's loss ``(logits, target)`` and its knowledge of the labels."""

    @abstractmethod
    def compute_conv_feature_map_size(self, patch_size: Sequence[int], deep_supervision: bool) -> int:
        """Feature map elements of one sample, nnU-Net's measure of memory."""
