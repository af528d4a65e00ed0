"""The network of every method: a backbone and an output head behind nnU-Net's calling convention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from dynamic_network_architectures.initialization.weight_init import InitWeights_He, init_last_bn_before_add_to_0
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from nnunet_multimodal.backbones import BACKBONES
from nnunet_multimodal.backbones.base import Backbone, SubtaskLogits, UNetTopology
from nnunet_multimodal.heads import HEADS
from nnunet_multimodal.heads.base import DistributionLoss, Head, LogitDistribution, SegmentationLoss
from nnunet_multimodal.modalities import check_dedicated, check_groups, split_present


@dataclass(frozen=True)
class NetworkOutput:
    """What the training objective needs; passes through nnU-Net's training and validation steps unchanged.

    Attributes:
        distribution: at full resolution.
        coarse_logits: mean logits of the coarser decoder stages, finest first; empty without deep supervision.
        auxiliary_losses: scalars by name, already weighted; empty in evaluation mode.
        subtasks: logits of the segmentors, of backbones that have several.
    """

    distribution: LogitDistribution
    coarse_logits: tuple[Tensor, ...] = ()
    auxiliary_losses: dict[str, Tensor] = field(default_factory=dict)
    subtasks: SubtaskLogits | None = None

    def __getitem__(self, index: int) -> Tensor:
        """Mean logits by resolution, finest first: nnU-Net's validation step takes ``output[0]``."""
        return (self.distribution.mean, *self.coarse_logits)[index]


class MultimodalUNet(nn.Module):
    """A segmentation network for several modalities.

    In training it returns a :class:`NetworkOutput`. In evaluation it does so with deep supervision on (nnU-Net's online
    validation); off, it returns plain logits (B, C, *D), which is what nnU-Net's predictor wants.

    Args:
        input_channels: image channels, then those of nnU-Net's cascade.
        num_classes: C, output channels (classes, or regions).
        backbone: a name in ``nnunet_multimodal.backbones.BACKBONES``.
        head: a name in ``nnunet_multimodal.heads.HEADS``.
        num_image_channels: how many of the input channels are image channels; all of them if not given.
        modalities: image channels of each modality, such as ``[[0], [1, 2]]``; one channel each if not given.
        dedicated: the only modalities that the network looks at, such as ``[0, 2]``; all others count as absent. All of
            them if not given.
        backbone_kwargs: options of the backbone.
        head_kwargs: options of the head.
        deep_supervision: see above; can be set later as an attribute.
        **unet: the topology, as nnU-Net's plans hold it (:class:`~nnunet_multimodal.backbones.base.UNetTopology`).

    Raises:
        ValueError: a name or an option that does not exist (naming those that do), or groups that do not fit.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        backbone: str,
        head: str = "deterministic",
        num_image_channels: int | None = None,
        modalities: Sequence[Sequence[int]] | None = None,
        dedicated: Sequence[int] | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        head_kwargs: dict[str, Any] | None = None,
        deep_supervision: bool = False,
        **unet: Any,
    ) -> None:
        super().__init__()
        topology = build(UNetTopology, "network topology", unet)
        self.num_input_channels = input_channels
        self.num_image_channels = num_image_channels or input_channels
        single = [[channel] for channel in range(self.num_image_channels)]
        self.groups = check_groups(modalities or single, self.num_image_channels)
        order = [channel for group in self.groups for channel in group]
        self.channel_order = None if order == sorted(order) else order
        self.num_modalities = len(self.groups)
        self.unused = check_dedicated(dedicated, self.num_modalities)
        backbone_class = look_up("backbone", backbone, BACKBONES)
        own = {"num_classes": num_classes} if backbone_class.PREDICTS else {}
        self.backbone: Backbone = build(
            backbone_class,
            f"backbone {backbone!r}",
            {**(backbone_kwargs or {}), **own},
            topology,
            self.num_modalities,
            len(self.groups[0]),
            input_channels - self.num_image_channels,
        )
        self.head: Head = build(
            look_up("head", head, HEADS), f"head {head!r}", head_kwargs or {}, topology, num_classes
        )
        if self.backbone.PREDICTS:
            self.head.drop_segmentation_layers()
            self.backbone.features_are_read = self.head.STOCHASTIC
        self.deep_supervision = deep_supervision
        if not deep_supervision:  # DistributedDataParallel stops on a parameter that gets no gradient
            for part in (self.backbone, self.head):
                for parameter in part.unused_without_deep_supervision():
                    parameter.requires_grad_(False)

    @property
    def decoder(self) -> MultimodalUNet:
        """nnU-Net's trainer sets ``network.decoder.deep_supervision``; it is ours."""
        return self

    def forward(self, x: Tensor) -> NetworkOutput | Tensor:
        """Image and cascade channels (B, input_channels, *D) -> see the class."""
        x, foreground = self.split_foreground(x)
        output = self.backbone(*self.split(x))
        subtasks = output.subtasks
        logits = None if subtasks is None else self.average(subtasks, 0)
        if not (self.training or self.deep_supervision):
            return self.head.mean_logits(output.features, output.bottleneck, logits)
        distribution = self.head(output.features, output.bottleneck, foreground, logits)
        coarse: tuple[Tensor, ...] = ()
        if self.deep_supervision and subtasks is None:
            coarse = self.head.coarse_logits(output.features)
        elif self.deep_supervision:
            coarse = tuple(self.average(subtasks, level) for level in range(1, len(subtasks.logits)))
        return NetworkOutput(distribution, coarse, output.auxiliary_losses, subtasks)

    def average(self, subtasks: SubtaskLogits, level: int) -> Tensor:
        """Their average; without a gradient, and what is kept for one, where segmentors are trained by themselves."""
        trained = (level == 0 and self.head.STOCHASTIC) or not self.training
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            return subtasks.average(level)

    def distribution(self, x: Tensor) -> LogitDistribution:
        """The head's whole distribution at full resolution, for images and cascade channels as in ``forward``."""
        output = self.backbone(*self.split(x))
        logits = None if output.subtasks is None else output.subtasks.average()
        return self.head(output.features, output.bottleneck, logits=logits)

    def split_foreground(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Input (B, input_channels, *D), and nnU-Net's non-zero mask (B, 1, *D) bool or None.

        In training :mod:`nnunet_multimodal.transforms` puts the mask between image and cascade channels.
        """
        if x.shape[1] == self.num_input_channels:
            return x, None
        image, foreground, cascade = x.tensor_split((self.num_image_channels, self.num_image_channels + 1), 1)
        return torch.cat((image, cascade), 1), foreground > 0

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Input (B, input_channels, *D) -> modalities (B, M, G, *D), cascade (B, K, *D), present (B, M)."""
        image, cascade = x[:, : self.num_image_channels], x[:, self.num_image_channels :]
        if self.channel_order is not None:
            image = image[:, self.channel_order]
        image = image.unflatten(1, (self.num_modalities, -1))
        if self.unused:
            image = image.clone()
            image[:, self.unused] = math.nan
        image, present = split_present(image)
        return image, cascade, present

    def modality_features(self, x: Tensor) -> dict[str, Tensor]:
        """Globally pooled features (B, M, F) of each modality by kind, for backbones that have several kinds."""
        return self.backbone.modality_features(*self.split(x))

    @torch.no_grad()
    def modality_uncertainty(self, x: Tensor) -> Tensor:
        """Uncertainty of each modality at the resolution of the input: (B, M, *D), for backbones that measure it."""
        coarse = self.backbone.modality_uncertainty(*self.split(x))
        return F.interpolate(coarse, x.shape[2:], mode="bilinear" if x.ndim == 4 else "trilinear", align_corners=False)

    def build_loss(self, segmentation_loss: SegmentationLoss, label_manager: LabelManager) -> DistributionLoss:
        """The head's loss at full resolution, from nnU-Net's."""
        return self.head.build_loss(segmentation_loss, label_manager)

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Feature map elements of one sample; nnU-Net's planner compares it with its reference networks'."""
        backbone = self.backbone.compute_conv_feature_map_size(input_size)
        return backbone + self.head.compute_conv_feature_map_size(input_size, self.deep_supervision)

    def further_parameters(self) -> int:
        """Number of the backbone's parameters beyond one encoder and one decoder, as nnU-Net's own network has them."""
        one = next(iter(self.backbone.encoder_modalities())), self.backbone.decoders()[0]
        backbone, *nnunets = (self.backbone, *map(self.backbone.get_submodule, one))
        count, *of_one = (sum(p.numel() for p in module.parameters()) for module in (backbone, *nnunets))
        return count - sum(of_one)

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """nnU-Net's initialisation, applied to every module."""
        InitWeights_He(1e-2)(module)
        init_last_bn_before_add_to_0(module)
        if isinstance(module, Head):  # after its layers
            module.initialize()


def unwrap(network: Any) -> Any:
    """The network without DistributedDataParallel and torch.compile around it."""
    if isinstance(network, DistributedDataParallel):
        network = network.module
    return network._orig_mod if isinstance(network, OptimizedModule) else network


def look_up(kind: str, name: str, registry: dict[str, Any]) -> Any:
    """The class of that name.

    Raises:
        ValueError: no such name; lists those that exist.
    """
    if name not in registry:
        raise ValueError(f"{kind} {name!r} does not exist; there are: {', '.join(registry)}")
    return registry[name]


def build(cls: Callable[..., Any], what: str, options: dict[str, Any], *args: Any) -> Any:
    """Call a constructor, with an error that users can act on where an option of the plans file does not exist.

    Raises:
        ValueError: an option does not fit the constructor.
    """
    try:
        return cls(*args, **options)
    except TypeError as error:
        hint = f" (known: {', '.join(f.name for f in fields(cls))})" if cls is UNetTopology else ""
        raise ValueError(f"options {options} do not fit the {what}: {error}{hint}; correct the plans file") from error
