"""What an output head is given and returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

SegmentationLoss = Callable[[Tensor, Tensor], Tensor]


class LogitDistribution(Protocol):
    """A distribution over whole logit maps (B, C, *D)."""

    @property
    def mean(self) -> Tensor:
        """The logits that nnU-Net's predictor, ensembling and export see: (B, C, *D)."""

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Differentiable samples: (*sample_shape, B, C, *D)."""


class Head(nn.Module, ABC):
    """From decoder features to a distribution over logit maps.

    The constructor takes ``(topology, num_classes, **options)``.
    """

    @abstractmethod
    def forward(self, features: Sequence[Tensor], bottleneck: Tensor) -> LogitDistribution:
        """The distribution at full resolution, from decoder features (finest first) and the deepest features."""

    @abstractmethod
    def coarse_logits(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """A logit map for every coarser stage, finest first: nnU-Net's deep supervision."""

    @abstractmethod
    def unused_without_deep_supervision(self) -> Iterable[nn.Parameter]:
        """The parameters that ``coarse_logits`` alone uses."""

    @abstractmethod
    def build_loss(self, segmentation_loss: SegmentationLoss) -> Callable[[Any, Tensor], Tensor]:
        """The loss ``(distribution, target)`` at full resolution, from nnU-Net's loss ``(logits, target)``."""

    @abstractmethod
    def compute_conv_feature_map_size(self, patch_size: Sequence[int], deep_supervision: bool) -> int:
        """Feature map elements of one sample, nnU-Net's measure of memory."""
