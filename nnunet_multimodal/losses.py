"""The training objective: a segmentation term at every resolution plus the backbone's auxiliary terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from nnunet_multimodal.heads.base import DistributionLoss, SegmentationLoss
from nnunet_multimodal.network import NetworkOutput


class Objective(nn.Module):
    """Weighted sum over resolutions, as nnU-Net's deep supervision, plus auxiliary losses.

    Args:
        distribution_loss: loss of the head's distribution at full resolution.
        segmentation_loss: nnU-Net's loss of logits, for the coarser resolutions.
        weights: of the resolutions, finest first; None without deep supervision.

    Attributes:
        progress: how much of the training will be done after this epoch, 0 to 1; the trainer sets it.
    """

    def __init__(
        self,
        distribution_loss: DistributionLoss,
        segmentation_loss: SegmentationLoss,
        weights: Sequence[float] | None,
    ) -> None:
        super().__init__()
        self.distribution_loss = distribution_loss
        self.segmentation_loss = segmentation_loss
        self.weights = weights
        self.progress = 1.0

    def forward(self, output: NetworkOutput | Tensor, target: Any) -> Tensor:
        """Scalar loss of a network's output against nnU-Net's target (a list, finest first, with deep supervision).

        Plain logits come from nnU-Net's online validation without deep supervision.
        """
        if isinstance(output, Tensor):
            return self.segmentation_loss(output, target)
        if self.weights is None:
            loss = self.distribution_loss(output.distribution, target, self.progress)
        else:
            loss = self.weights[0] * self.distribution_loss(output.distribution, target[0], self.progress)
            for weight, logits, coarse_target in zip(self.weights[1:], output.coarse_logits, target[1:], strict=True):
                if weight != 0:
                    loss = loss + weight * self.segmentation_loss(logits, coarse_target)
        return sum(output.auxiliary_losses.values(), loss)
