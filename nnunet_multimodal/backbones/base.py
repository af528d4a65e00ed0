"""What a backbone is given and returns, and the parts that several backbones are made of."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from dynamic_network_architectures.building_blocks.helper import convert_conv_op_to_dim
from dynamic_network_architectures.building_blocks.plain_conv_encoder import PlainConvEncoder
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor, nn
from torch.nn import functional as F

# What an encoder's pass beside the first adds to the peak of a training step, of its feature map elements: nnU-Net's
# measure stands for the peak, and what a step needs there beyond what it keeps is not needed once more for each. On the
# CPU it is 0.8 (benchmarks/planning_memory.py); the rest is reserve.
FURTHER_PASS = 0.9


@dataclass(frozen=True)
class SubtaskLogits:
    """What several segmentors predict, each of which answers for some of the output channels.

    Attributes:
        logits: finest first, each (B, S, C, *D).
        active: who answers for what (B, S, C) bool; each channel has somebody. With labels everyone who is there has
            the background, which is what it does not answer for.
        has_regions: output channels are regions and not labels.
    """

    logits: tuple[Tensor, ...]
    active: Tensor
    has_regions: bool

    def average(self, level: int = 0) -> Tensor:
        """Logits (B, C, *D), float32, of the probabilities, averaged channel by channel over who answers for it."""
        with full_precision(self.active.device):
            logits = self.logits[level].float()
            active = self.active.view(*self.active.shape, *(1,) * (logits.ndim - 3))
            if self.has_regions:
                inside, outside = (F.logsigmoid(sign * logits).masked_fill(~active, -math.inf) for sign in (1, -1))
                return inside.logsumexp(1) - outside.logsumexp(1)
            silent = ~active.any(2, keepdim=True)  # a softmax over nothing would be NaN
            log_p = logits.masked_fill(~(active | silent), -math.inf).log_softmax(2).masked_fill(~active, -math.inf)
            log_p = log_p.logsumexp(1) - active.sum(1).log()
            log_p = log_p[:, 1:]
            return torch.cat(((1 - log_p.exp().sum(1, keepdim=True)).clamp_min(1e-6).log(), log_p), 1)


@dataclass(frozen=True)
class BackboneOutput:
    """Features for the output head.

    Attributes:
        features: decoder features, finest first, each (B, F_s, *D_s).
        bottleneck: the deepest features (B, F, *d).
        auxiliary_losses: scalars that the training objective adds, by name; empty in evaluation mode.
        subtasks: of backbones that predict by themselves; the head then has no segmentation layers.
    """

    features: tuple[Tensor, ...]
    bottleneck: Tensor
    auxiliary_losses: dict[str, Tensor] = field(default_factory=dict)
    subtasks: SubtaskLogits | None = None


class Backbone(nn.Module, ABC):
    """From modalities to decoder features.

    Promises, checked by ``tests/contracts`` for every backbone: the content of an absent modality never changes the
    output, every parameter gets a gradient in every step, and the graph compiles whole, whatever is present.

    The constructor takes ``(topology, num_modalities, channels_per_modality, cascade_channels, **options)``, and
    ``num_classes`` where it ``PREDICTS``.
    """

    MIN_MODALITIES: ClassVar[int] = 1  # fewer make no sense for the method
    PREDICTS: ClassVar[bool] = False  # its output has ``subtasks``
    features_are_read: bool = True  # False: the head takes nothing but ``subtasks``, and ``features`` may be empty
    num_modalities: int

    @abstractmethod
    def forward(self, x: Tensor, cascade: Tensor, present: Tensor) -> BackboneOutput:
        """Compute features.

        Args:
            x: modalities (B, M, G, *D), zero where absent; G channels each.
            cascade: channels of nnU-Net's previous stage (B, K, *D), K = 0 without one.
            present: (B, M) bool.
        """

    @abstractmethod
    def compute_conv_feature_map_size(self, patch_size: Sequence[int]) -> int:
        """Feature map elements of one sample, which nnU-Net's planners compare with their reference networks'."""

    @abstractmethod
    def encoder_modalities(self) -> dict[str, list[list[int]]]:
        """For every encoder, by the name of its submodule: the modalities of each of its inputs.

        ``{"encoder": [[0, 1, 2]]}`` sees all together, ``{"shared": [[0], [1], [2]]}`` one after the other.
        """

    def decoders(self) -> list[str]:
        """Names of the submodules that are nnU-Net's decoder."""
        return ["decoder"]

    def unused_without_deep_supervision(self) -> Iterable[nn.Parameter]:
        """Parameters of logits of coarser stages."""
        return ()

    @classmethod
    def dataset_options(
        cls,
        dataset_json: dict[str, Any],
        label_manager: LabelManager,
        groups: Sequence[Sequence[int]],
        stated: dict[str, Any],
    ) -> dict[str, Any]:
        """Options that follow from the data set; the trainer and our planners write them into the plans.

        Args:
            dataset_json: nnU-Net's.
            label_manager: nnU-Net's.
            groups: image channels of each modality.
            stated: options that the plans file states, which need not follow from anything.

        Raises:
            UserError: dataset.json contradicts itself.
        """
        return {}

    def parameter_groups(self) -> Iterable[dict[str, Any]]:
        """Parameters that need settings of their own, as optimiser groups.

        Besides the optimiser's own keys, ``lr_scale`` and ``weight_decay_scale`` are relative to nnU-Net's values.
        """
        return ()

    def modality_uncertainty(self, x: Tensor, cascade: Tensor, present: Tensor) -> Tensor:
        """Uncertainty of each modality on a coarse grid (B, M, *d), for methods that measure it.

        Raises:
            ValueError: this method does not.
        """
        raise ValueError(f"{type(self).__name__} does not measure the uncertainty of modalities; CRNPTrainer's does")

    def modality_features(self, x: Tensor, cascade: Tensor, present: Tensor) -> dict[str, Tensor]:
        """Globally pooled bottleneck features (B, M, F) of each modality by kind, for methods that have several.

        Raises:
            ValueError: this method does not.
        """
        raise ValueError(f"{type(self).__name__} has no shared and specific features; ShaSpecTrainer's does")


@dataclass(frozen=True)
class UNetTopology:
    """The U-Net that nnU-Net planned: stages, strides, kernels, plain or residual encoder.

    The fields are the constructor arguments of nnU-Net's two U-Nets, as its plans write them down.
    """

    n_stages: int
    features_per_stage: Sequence[int]
    conv_op: type[nn.Module]
    kernel_sizes: Sequence[Any]
    strides: Sequence[Any]
    n_conv_per_stage_decoder: Sequence[int]
    n_conv_per_stage: Sequence[int] | None = None
    n_blocks_per_stage: Sequence[int] | None = None
    conv_bias: bool = False
    norm_op: type[nn.Module] | None = None
    norm_op_kwargs: dict | None = None
    dropout_op: type[nn.Module] | None = None
    dropout_op_kwargs: dict | None = None
    nonlin: type[nn.Module] | None = None
    nonlin_kwargs: dict | None = None

    def __post_init__(self) -> None:
        if (self.n_conv_per_stage is None) == (self.n_blocks_per_stage is None):
            raise ValueError(
                "a plan's network needs either n_conv_per_stage (plain encoder) or n_blocks_per_stage (residual "
                f"encoder); got {self.n_conv_per_stage} and {self.n_blocks_per_stage}"
            )

    @property
    def dim(self) -> int:
        """2 or 3."""
        return convert_conv_op_to_dim(self.conv_op)

    @property
    def bottleneck_features(self) -> int:
        """F, the channels of the deepest stage."""
        return self.features_per_stage[-1]

    def stage_sizes(self, patch_size: Sequence[int]) -> list[list[int]]:
        """Spatial size of every encoder stage's output, finest first."""
        sizes = [list(patch_size)]
        for stride in self.strides:
            steps = [stride] * self.dim if isinstance(stride, int) else stride
            sizes.append([size // step for size, step in zip(sizes[-1], steps, strict=True)])
        return sizes[1:]

    def build_encoder(self, input_channels: int) -> PlainConvEncoder | ResidualEncoder:
        """One encoder; returns the features of every stage, finest first."""
        shared = {
            "input_channels": input_channels,
            "n_stages": self.n_stages,
            "features_per_stage": self.features_per_stage,
            "conv_op": self.conv_op,
            "kernel_sizes": self.kernel_sizes,
            "strides": self.strides,
            "conv_bias": self.conv_bias,
            "norm_op": self.norm_op,
            "norm_op_kwargs": self.norm_op_kwargs,
            "dropout_op": self.dropout_op,
            "dropout_op_kwargs": self.dropout_op_kwargs,
            "nonlin": self.nonlin,
            "nonlin_kwargs": self.nonlin_kwargs,
            "return_skips": True,
        }
        if self.n_conv_per_stage is not None:
            return PlainConvEncoder(n_conv_per_stage=self.n_conv_per_stage, **shared)
        return ResidualEncoder(n_blocks_per_stage=self.n_blocks_per_stage, **shared)

    def build_norm(self, features: int) -> nn.Module:
        """The plan's normalisation, if it has one."""
        return nn.Identity() if self.norm_op is None else self.norm_op(features, **(self.norm_op_kwargs or {}))

    def build_nonlin(self) -> nn.Module:
        """The plan's nonlinearity, if it has one."""
        return nn.Identity() if self.nonlin is None else self.nonlin(**(self.nonlin_kwargs or {}))

    def build_segmentation_layers(self, num_classes: int) -> nn.ModuleList:
        """nnU-Net's: a 1x1 convolution to logits for every decoder stage, finest first."""
        return nn.ModuleList(self.conv_op(f, num_classes, 1, bias=True) for f in self.features_per_stage[:-1])

    def build_decoder(self) -> FeatureDecoder:
        """nnU-Net's decoder without its segmentation layers."""
        strides = [[stride] * self.dim if isinstance(stride, int) else stride for stride in self.strides]
        # UNetDecoder keeps what it is given as `encoder`; a namespace keeps the encoder's weights out of the decoder
        encoder = SimpleNamespace(
            output_channels=list(self.features_per_stage),
            strides=strides,
            kernel_sizes=self.kernel_sizes,
            conv_op=self.conv_op,
            conv_bias=self.conv_bias,
            norm_op=self.norm_op,
            norm_op_kwargs=self.norm_op_kwargs,
            dropout_op=self.dropout_op,
            dropout_op_kwargs=self.dropout_op_kwargs,
            nonlin=self.nonlin,
            nonlin_kwargs=self.nonlin_kwargs,
        )
        return FeatureDecoder(encoder, self.n_conv_per_stage_decoder)


class FeatureDecoder(UNetDecoder):
    """nnU-Net's decoder, ending in features instead of segmentations: what an output head takes."""

    def __init__(self, encoder: SimpleNamespace, n_conv_per_stage: Sequence[int]) -> None:
        super().__init__(encoder, 1, n_conv_per_stage, deep_supervision=False)
        del self.seg_layers

    def forward(self, skips: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Skips of every stage, finest first (the last one is the bottleneck) -> features, finest first."""
        features = [skips[-1]]
        for stage, upsample, skip in zip(self.stages, self.transpconvs, reversed(skips[:-1]), strict=True):
            features.append(stage(torch.cat((upsample(features[-1]), skip), 1)))
        return tuple(reversed(features[1:]))

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> np.int64:
        """nnU-Net's measure of memory, less the segmentation layer that the head has."""
        finest = np.prod([i // j for i, j in zip(input_size, self.encoder.strides[0], strict=True)], dtype=np.int64)
        return super().compute_conv_feature_map_size(input_size) - self.num_classes * finest


def full_precision(device: torch.device) -> AbstractContextManager:
    """Switches autocast off; on mps, where nnU-Net never switches it on and old versions of torch refuse, nothing."""
    return nullcontext() if device.type == "mps" else torch.autocast(device.type, enabled=False)


def check_choice(method: str, option: str, value: str, allowed: Sequence[str]) -> str:
    """The value of a method's option.

    Raises:
        ValueError: it is not one of those allowed.
    """
    if value not in allowed:
        raise ValueError(
            f"{method}: {option}={value!r} is not one of {', '.join(allowed)}; correct it in the plans file"
        )
    return value


def append_cascade(x: Tensor, cascade: Tensor) -> Tensor:
    """The channels of nnU-Net's previous stage (B, K, *D) beside every modality's own: (B, M, G + K, *D)."""
    return torch.cat((x, cascade[:, None].expand(-1, x.shape[1], *(-1,) * (cascade.ndim - 1))), 2)


class ModalityReduction(nn.Module):
    """A 1x1 convolution over the concatenated features of all modalities, each of which may be a mixture of others'.

    The mixture is folded into the (tiny) weights of each sample instead of the features, so nothing of the features'
    size is written or kept for it, and features of modalities that have no part in it need not be there.

    Args:
        num_modalities: M.
        in_features: channels of one modality.
        out_features: channels of the result.
    """

    def __init__(self, num_modalities: int, in_features: int, out_features: int) -> None:
        super().__init__()
        fan_in = num_modalities * in_features
        # He initialisation, as nnU-Net's own convolutions
        self.weight = nn.Parameter(torch.randn(out_features, num_modalities, in_features) * math.sqrt(2 / fan_in))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor, mixing: Tensor) -> Tensor:
        """Reduce.

        Args:
            x: features (B, N, F, *D) of N modalities.
            mixing: (B, M, N), modality m is the sum of ``mixing[:, m, n] * x[:, n]``; a row of zeros leaves it out.

        Returns:
            (B, out_features, *D).
        """
        weight = torch.einsum("omf,bmn->bonf", self.weight, mixing.to(self.weight.dtype))
        reduced = torch.bmm(weight.flatten(2), x.reshape(x.shape[0], x.shape[1] * x.shape[2], -1))
        return (reduced + self.bias.to(reduced.dtype)[:, None]).view(x.shape[0], -1, *x.shape[3:])
