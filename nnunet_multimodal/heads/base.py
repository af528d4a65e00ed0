"""What an output head is given and returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor, nn

SegmentationLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class RaterLabels:
    """The annotations of a batch.

    Attributes:
        labels: label maps (B, M, *D).
        weights: (B, M), which sum to 1; 0 where a case has fewer raters.
    """

    labels: Tensor
    weights: Tensor

    def encode(self, num_classes: int, label_manager: LabelManager) -> tuple[Tensor, Tensor | None]:
        """Indicators of classes or regions (B, M, C, *D) bool, and the voxels that count (B, M, *D) or None."""
        labels, ignored = self.labels, label_manager.ignore_label
        if label_manager.has_regions:
            regions = [torch.as_tensor(region, device=labels.device) for region in label_manager.foreground_regions]
            indicator = torch.stack([torch.isin(labels, region) for region in regions], 2)
        else:
            classes = torch.arange(num_classes, device=labels.device).view(-1, *(1,) * (labels.ndim - 2))
            indicator = labels[:, :, None] == classes
        return indicator, None if ignored is None else labels != ignored


@dataclass
class Step:
    """What a loss may know besides output and target; the trainer keeps it up to date.

    Attributes:
        progress: how much of the training will be done after this epoch, 0 to 1.
        epoch_losses: mean training losses of the epochs before.
        raters: the batch's annotations at full resolution; None where there is but one, nnU-Net's target.
    """

    progress: float = 1.0
    epoch_losses: Sequence[float] = ()
    raters: RaterLabels | None = None


DistributionLoss = Callable[[Any, Tensor, Step], Tensor]


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
        """(B, K, *D), the mean first: parameters that can be averaged over tiles."""


class ImageLogits(Protocol):
    """The distribution of a whole image, put together from its tiles."""

    @property
    def mean(self) -> Tensor:
        """(1, C, *D)."""

    def scaled(self, temperature: float = 1.0, class_scale: Tensor | None = None) -> ImageLogits:
        """The distribution with all deviations from its mean, or those of a class, multiplied."""

    def draw(self, num_samples: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Samples (C, *D) of a single image, one at a time, in memory that does not depend on their number."""


class Head(nn.Module, ABC):
    """From decoder features to a distribution over logit maps.

    The constructor takes ``(topology, num_classes, **options)``.
    """

    NEEDS_FOREGROUND: ClassVar[bool] = False  # in training, nnU-Net's non-zero mask
    STOCHASTIC: ClassVar[bool] = False  # its distributions are BlendableLogits
    FITS_RATERS: ClassVar[bool] = False  # its loss takes all annotations of an image at once

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

    def initialize(self) -> None:
        """After nnU-Net's initialisation of the head's layers."""

    @abstractmethod
    def mean_logits(self, features: Sequence[Tensor], bottleneck: Tensor, logits: Tensor | None = None) -> Tensor:
        """The mean alone (B, C, *D), for nnU-Net's predictor."""

    @abstractmethod
    def drop_segmentation_layers(self) -> None:
        """The backbone predicts by itself."""

    def blended(self, parameters: Tensor, foreground: Tensor) -> ImageLogits:
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

    @classmethod
    def dataset_options(cls, label_manager: LabelManager) -> dict[str, Any]:
        """Options that follow from the data set; the trainer writes them into the model's plans."""
        return {}

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


def encode_target(target: Tensor, num_classes: int, label_manager: LabelManager) -> tuple[Tensor, Tensor | None]:
    """nnU-Net's target as indicator of classes or regions (B, C, *D), and the voxels that count (B, 1, *D) or None."""
    if target.shape[1] == num_classes > 1 and not label_manager.has_regions:  # soft; all zero where ignored
        return target, target.sum(1, keepdim=True) > 0 if label_manager.has_ignore_label else None
    if label_manager.has_regions:
        ignored = target[:, num_classes:].bool() if label_manager.has_ignore_label else None
        return target[:, :num_classes], None if ignored is None else ~ignored
    classes = torch.arange(num_classes, device=target.device).view(1, -1, *(1,) * (target.ndim - 2))
    return target == classes, target != label_manager.ignore_label if label_manager.has_ignore_label else None
