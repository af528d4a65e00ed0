"""What an output head is given and returns.

Contract, checked by ``tests/contracts.py``: a head is an ``nn.Module`` with

- ``__init__(topology, num_classes, **options)``,
- ``forward(features, bottleneck) -> LogitDistribution`` for the finest features,
- ``coarse_logits(features)``: one logit map per coarser feature map, for deep supervision,
- ``unused_without_deep_supervision()``: the parameters that ``coarse_logits`` alone uses,
- ``build_loss(segmentation_loss)``: from nnU-Net's loss ``(logits, target)`` to one ``(distribution, target)``,
- ``compute_conv_feature_map_size(patch_size, deep_supervision)``, nnU-Net's measure of memory in planning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

SegmentationLoss = Callable[[Tensor, Tensor], Tensor]


class LogitDistribution(Protocol):
    """A distribution over whole logit maps (B, C, *D)."""

    @property
    def mean(self) -> Tensor:
        """The logits that nnU-Net's predictor, ensembling and export see: (B, C, *D)."""

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Differentiable samples: (*sample_shape, B, C, *D)."""
