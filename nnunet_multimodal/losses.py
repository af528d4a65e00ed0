"""The training objective: a segmentation term at every resolution plus the backbone's auxiliary terms."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor, nn

from nnunet_multimodal.errors import UserError
from nnunet_multimodal.heads.base import DistributionLoss, SegmentationLoss, Step
from nnunet_multimodal.network import MultimodalUNet, NetworkOutput


class SubtaskLoss:
    """The summed losses of segmentors, each on the output channels that it answers for.

    Args:
        segmentation_loss: nnU-Net's of all channels.
        label_manager: nnU-Net's.
    """

    def __init__(self, segmentation_loss: nn.Module, label_manager: LabelManager) -> None:
        self.segmentation_loss = deepcopy(segmentation_loss)
        dice: Any = getattr(self.segmentation_loss, "dc", None)
        if hasattr(dice, "ddp"):  # who answers for what differs between processes, whose Dice cannot be taken together
            dice.ddp = False
        self.label_manager = label_manager

    def __call__(self, logits: Tensor, active: Tensor, target: Tensor) -> Tensor:
        """A scalar.

        Args:
            logits: of S segmentors (B, S, C, *D).
            active: who answers for what (B, S, C), bool, on the CPU: it decides what is computed.
            target: nnU-Net's, labels (B, 1, *D) or regions (B, C, *D) and the ignored voxels.
        """
        total = logits.flatten()[:1].float().sum() * 0.0  # a gradient for those who answer for nothing
        for s in range(logits.shape[1]):
            for channels in active[:, s].unique(dim=0):
                if channels.any():
                    samples = (active[:, s] == channels).all(1)
                    own = self.select(target[samples], channels)
                    loss = self.segmentation_loss(logits[samples, s][:, channels], own)
                    total = total + loss * samples.float().mean()
        return total

    def select(self, target: Tensor, channels: Tensor) -> Tensor:
        """The target of some output channels (C,) bool: regions of others left out, labels of others background."""
        if self.label_manager.has_regions:
            return torch.cat((target[:, : len(channels)][:, channels], target[:, len(channels) :]), 1)
        number = torch.where(channels, channels.cumsum(0) - 1, 0)
        if self.label_manager.has_ignore_label:
            number = torch.cat((number, torch.tensor([self.label_manager.ignore_label])))
        return number.to(target.device)[target.long()].to(target.dtype)


class SoftTargets:
    """nnU-Net's Dice and cross-entropy, also for probabilities as targets.

    Args:
        loss: nnU-Net's, of label maps.
    """

    def __init__(self, loss: DC_and_CE_loss) -> None:
        self.loss = loss

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """A scalar, for label maps (B, 1, *D) or for probabilities (B, C, *D), which are all zero where ignored."""
        if target.shape[1] == 1:
            return self.loss(logits, target)
        valid = target.sum(1, keepdim=True) > 0
        dice = self.loss.dc(logits, target, loss_mask=valid) if self.loss.weight_dice else 0.0
        cross_entropy = -(target * logits.float().log_softmax(1)).sum() / valid.sum().clamp_min(1)
        return self.loss.weight_ce * cross_entropy + self.loss.weight_dice * dice


def accept_soft_targets(loss: nn.Module, label_manager: LabelManager, predicts: bool) -> SegmentationLoss:
    """A loss that takes the raters' mean as well.

    Args:
        loss: nnU-Net's; the one of regions takes soft targets as it is.
        label_manager: nnU-Net's.
        predicts: the backbone has segmentors with losses of their own.

    Raises:
        UserError: this loss is of labels alone.
    """
    if label_manager.has_regions:
        return loss
    if predicts or not isinstance(loss, DC_and_CE_loss):
        what = "segmentors of CIML" if predicts else type(loss).__name__
        raise UserError(
            f"the raters' policy is 'mean', and {what} take label maps alone; give 'random' or 'consensus' in the plans"
        )
    return SoftTargets(loss)


class Objective(nn.Module):
    """Weighted sum over resolutions, as nnU-Net's deep supervision, plus auxiliary losses.

    Args:
        distribution_loss: loss of the head's distribution at full resolution; None if the segmentors' losses are all.
        segmentation_loss: nnU-Net's loss of logits, for the coarser resolutions.
        weights: of the resolutions, finest first; None without deep supervision.
        subtask_loss: of backbones with several segmentors, at every resolution, and instead of the loss of the coarser
            ones.

    Attributes:
        step: what the trainer says of the training and the batch.
    """

    def __init__(
        self,
        distribution_loss: DistributionLoss | None,
        segmentation_loss: SegmentationLoss,
        weights: Sequence[float] | None,
        subtask_loss: SubtaskLoss | None = None,
    ) -> None:
        super().__init__()
        self.distribution_loss = distribution_loss
        self.segmentation_loss = segmentation_loss
        self.subtask_loss = subtask_loss
        self.weights = weights
        self.step = Step()

    def forward(self, output: NetworkOutput | Tensor, target: Any) -> Tensor:
        """Scalar loss of a network's output against nnU-Net's target (a list, finest first, with deep supervision).

        Plain logits come from nnU-Net's online validation without deep supervision.
        """
        if isinstance(output, Tensor):
            return self.segmentation_loss(output, target)
        first, *others = self.terms(output, target).values()
        total = sum(others, first)
        # a loss that is not finite must not have a gradient that is: the step would be taken
        return total * torch.where(total.detach().isfinite(), 1.0, torch.nan)

    def terms(self, output: NetworkOutput, target: Any) -> dict[str, Tensor]:
        """What the loss is the sum of, by name."""
        targets, weights = ([target], [1.0]) if self.weights is None else (target, self.weights)
        active = None if output.subtasks is None else output.subtasks.active.cpu()
        levels = enumerate(zip(weights, targets, (None, *output.coarse_logits), strict=True))
        terms = {
            f"segmentation at resolution {level}": weight * self._at(output, level, target, active)
            for level, (weight, target, _) in levels
            if weight
        }
        return {**terms, **output.auxiliary_losses}

    def _at(self, output: NetworkOutput, level: int, target: Tensor, active: Tensor | None) -> Tensor:
        """The segmentation term of a resolution."""
        terms = []
        if level == 0 and self.distribution_loss is not None:
            terms.append(self.distribution_loss(output.distribution, target, self.step))
        if output.subtasks is not None and active is not None and self.subtask_loss is not None:
            terms.append(self.subtask_loss(output.subtasks.logits[level], active, target))
        elif level > 0:
            terms.append(self.segmentation_loss(output.coarse_logits[level - 1], target))
        return sum(terms[1:], terms[0])


def build_objective(
    network: MultimodalUNet,
    segmentation_loss: nn.Module,
    weights: Sequence[float] | None,
    label_manager: LabelManager,
    soft_targets: bool = False,
) -> Objective:
    """The objective of a network, from nnU-Net's loss and weights of the resolutions.

    Raises:
        UserError: targets are soft and the loss takes label maps alone.
    """
    of_logits: SegmentationLoss = segmentation_loss
    if soft_targets:
        of_logits = accept_soft_targets(segmentation_loss, label_manager, network.backbone.PREDICTS)
    subtask_loss = SubtaskLoss(segmentation_loss, label_manager) if network.backbone.PREDICTS else None
    # what the segmentors learn, a deterministic head need not learn again
    repeated = subtask_loss is not None and not network.head.STOCHASTIC
    distribution_loss = None if repeated else network.build_loss(of_logits, label_manager)
    return Objective(distribution_loss, of_logits, weights, subtask_loss)
