"""One logit map, as in nnU-Net itself: a 1x1 convolution per resolution."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor, nn

from nnunet_multimodal.backbones.base import UNetTopology
from nnunet_multimodal.heads.base import DistributionLoss, Head, LogitDistribution, SegmentationLoss


@dataclass(frozen=True)
class DeterministicLogits:
    """All mass on one logit map (B, C, *D)."""

    mean: Tensor

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """The mean, as often as asked for: (*sample_shape, B, C, *D)."""
        return self.mean.expand(*sample_shape, *self.mean.shape)


class DeterministicHead(Head):
    """nnU-Net's segmentation layers, one for every decoder stage, finest first."""

    def __init__(self, topology: UNetTopology, num_classes: int) -> None:
        super().__init__()
        self.topology = topology
        self.num_classes = num_classes
        # nnU-Net's loader of pretrained weights skips keys that contain ".seg_layers."
        self.seg_layers = topology.build_segmentation_layers(num_classes)

    def forward(
        self,
        features: Sequence[Tensor],
        bottleneck: Tensor,
        foreground: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> LogitDistribution:
        """See ``nnunet_multimodal.heads.base``."""
        return DeterministicLogits(self.mean_logits(features, bottleneck, logits))

    def mean_logits(self, features: Sequence[Tensor], bottleneck: Tensor, logits: Tensor | None = None) -> Tensor:
        """The finest layer's logits, or the backbone's."""
        return self.seg_layers[0](features[0]) if logits is None else logits

    def drop_segmentation_layers(self) -> None:
        """The backbone predicts by itself."""
        self.seg_layers = nn.ModuleList()

    def coarse_logits(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Logits of every coarser stage, finest first."""
        return tuple(layer(f) for layer, f in zip(self.seg_layers[1:], features[1:], strict=True))

    def unused_without_deep_supervision(self) -> Iterable[nn.Parameter]:
        """Parameters of the coarser layers."""
        return self.seg_layers[1:].parameters()

    def build_loss(self, segmentation_loss: SegmentationLoss, label_manager: LabelManager) -> DistributionLoss:
        """nnU-Net's loss of the mean."""
        return lambda distribution, target, step: segmentation_loss(distribution.mean, target)

    def compute_conv_feature_map_size(self, patch_size: Sequence[int], deep_supervision: bool) -> int:
        """Feature map elements of one sample, nnU-Net's measure of memory."""
        sizes = self.topology.stage_sizes(patch_size)[: -1 if deep_supervision else 1]
        return sum(self.num_classes * np.prod(size, dtype=np.int64) for size in sizes)
