"""CIML: a segmentor for each sub-task, messages between them, and a gate that lets complementary information through.

Shen, Li, Chen, Wang, Zhu, Li, Wang, Jin: *Complementary Information Mutual Learning for Multimodality Medical Image
Segmentation*, arXiv:2401.02717, 2024. Implements the task decomposition (3.1), message passing between encoders and
decoders of all segmentors, the cross-modality information gate (Fig. 12, Table 1), Eq. 7 to 10 (reparameterised
complementary information with a Kullback-Leibler term) and the averaged output (4.1.1). The ablations of Table 5 are
the options ``messages``, ``attention`` and ``variational``.

Deviations from the paper, each with its reason:

- A skip is the concatenation of the own embedding and the summed complementary information, reduced by a 1x1
  convolution to the planned width, so that segmentors keep nnU-Net's planned decoder. Table 1 feeds the doubled width
  to the decoder's first convolution, of which this is the factorised form.
- The standard deviation is the sigmoid of its convolution; the paper does not say how it is kept positive. Above the
  prior's it could tell something by how much it spreads, which the mean, all that evaluation passes on, would lack (on
  ``benchmarks/shape_composition.py`` a softplus made no difference).
- The decoder reads the sum over the messages, so one sample is drawn of the sum of their Gaussians.
- The Kullback-Leibler term is the mean over the elements of each gate, averaged over the stages and over the messages
  that there are, so that its weight depends neither on the patch nor on the number of segmentors.
- ``messages`` alone (Table 5, "+ Message") is the sum of 1x1 convolutions of the messages; the paper's one-layer
  fusion with a sigmoid is not described further.
- Segmentors' losses are summed: each has parameters of its own, which nnU-Net's learning rate then suits.
- Labels that are no regions (softmax): a segmentor decides between its own labels and "another one". Averaged label by
  label; what is left is background.
- An absent modality's segmentor neither sends nor predicts. A region all of whose segmentors are absent is predicted by
  all that are there; in training too, so it is learnt wherever training cases lack modalities (``CIMLModalityDropout``)
  and is a guess elsewhere.
- Segmentors run one after the other: on a CPU all at once, as grouped convolutions, is between 9 % faster and
  16 % slower in training (``benchmarks/ciml_cost.py``; not measured on a GPU). Gates run twice in training, a slab of
  voxels at a time: what they make for every message of every segmentor is not kept but made again in the backward
  pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nnunet_multimodal.backbones.base import (
    Backbone,
    BackboneOutput,
    SubtaskLogits,
    UNetTopology,
    full_precision,
)
from nnunet_multimodal.decomposition import check_subtasks, decompose

MIN_VARIANCE = 1e-8
SLAB = {"cpu": 2**20, "cuda": 2**25}  # elements of the messages that a gate works on at once in training


class InformationGate(nn.Module):
    """The cross-modality information gate of one stage of one segmentor (Fig. 12).

    Args:
        topology: says convolution, normalisation and nonlinearity.
        num_messages: K, from the other segmentors.
        features: F.
        attention: a map weights each message.
        variational: complementary information is drawn from a Gaussian in training, and has a Kullback-Leibler term.
    """

    def __init__(
        self, topology: UNetTopology, num_messages: int, features: int, attention: bool, variational: bool
    ) -> None:
        super().__init__()
        self.num_messages = num_messages
        hidden, channels = 4 * (num_messages + 1), num_messages * features
        self.attention = None
        if attention:
            self.attention = nn.Sequential(
                topology.conv_op(num_messages + 1, hidden, 3, padding=1),
                topology.build_norm(hidden),
                topology.build_nonlin(),
                topology.conv_op(hidden, num_messages, 1),
                topology.build_norm(num_messages),
                nn.Sigmoid(),
            )
        # a 1x1 convolution for each message
        self.mean = topology.conv_op(channels, channels, 1, groups=num_messages)
        self.deviation = topology.conv_op(channels, channels, 1, groups=num_messages) if variational else None

    def attend(self, own: Tensor, present: Tensor, *messages: Tensor) -> Tensor | None:
        """A map for each message (B, K, *D), from the averages over the channels; None without attention.

        Args:
            own: the segmentor's embedding (B, F, *D).
            present: which messages are sent (B, K), bool.
            messages: K of the others' embeddings, each (B, F, *D).
        """
        if self.attention is None:
            return None
        sent = present.view(*present.shape, *(1,) * (own.ndim - 2))
        averages = torch.stack([message.mean(1) for message in messages], 1) * sent
        return self.attention(torch.cat((averages, own.mean(1, keepdim=True)), 1))

    def forward(self, messages: Tensor, weights: Tensor | None, present: Tensor) -> tuple[Tensor, Tensor | None]:
        """The Gaussian of the complementary information of each message, voxel by voxel; in evaluation its mean alone.

        Args:
            messages: (B, K, F, *D).
            weights: the attention's (B, K, *D), or None.
            present: which messages are sent (B, K), bool.

        Returns:
            mean and variance (B, K, F, *D), zero where nothing is sent; the variance is None in evaluation.
        """
        sent = present.view(*present.shape, *(1,) * (messages.ndim - 2))  # (B, K, 1, *1)
        messages = (messages if weights is None else messages * weights[:, :, None]).flatten(1, 2)
        mean = self.mean(messages).unflatten(1, (self.num_messages, -1)) * sent
        if self.deviation is None or not self.training:
            return mean, None
        deviation = self.deviation(messages).unflatten(1, (self.num_messages, -1))
        return mean, to_variance(deviation) * sent


def to_variance(deviation: Tensor) -> Tensor:
    """The variance, 0 to 1 and float32, that a convolution's output stands for."""
    with full_precision(deviation.device):
        return deviation.float().sigmoid().square() + MIN_VARIANCE


def sample(mean: Tensor, variance: Tensor) -> Tensor:
    """Complementary information drawn from N(mean, variance), by reparameterisation (Eq. 9)."""
    deviation = variance.clamp_min(MIN_VARIANCE).sqrt()  # without the bound, no gradient where nothing is sent
    return mean + (deviation * torch.randn_like(deviation)).to(mean.dtype)


def divergence_from_standard(mean: Tensor, variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)), Eq. 10: its mean over elements (B, K, ...) -> (B, K), float32."""
    with full_precision(mean.device):
        variance = variance.clamp_min(MIN_VARIANCE)
        divergence = 0.5 * (mean.float().square() + variance - 1 - variance.log())
        return divergence.flatten(2).mean(2)


class Segmentor(nn.Module):
    """Encoder, gates and decoder of one sub-task.

    Args:
        topology: the plan's.
        input_channels: of its primary modalities and the cascade.
        num_classes: C.
        num_messages: K; 0 without message passing.
        attention: see :class:`InformationGate`.
        variational: see :class:`InformationGate`.
    """

    def __init__(
        self,
        topology: UNetTopology,
        input_channels: int,
        num_classes: int,
        num_messages: int,
        attention: bool,
        variational: bool,
    ) -> None:
        super().__init__()
        features = topology.features_per_stage
        self.encoder: Any = topology.build_encoder(input_channels)
        count = len(features) if num_messages else 0
        self.gates: Any = nn.ModuleList(
            InformationGate(topology, num_messages, f, attention, variational) for f in features[:count]
        )
        self.reductions = nn.ModuleList(topology.conv_op(2 * f, f, 1) for f in features[:count])
        self.decoder = topology.build_decoder()
        self.seg_layers = topology.build_segmentation_layers(num_classes)

    def forward(
        self, embeddings: Sequence[Tensor], messages: Sequence[Sequence[Tensor]], present: Tensor
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Features of every stage, logits of every stage, Kullback-Leibler terms of every stage.

        Args:
            embeddings: its encoder's, finest first, each (B, F_s, *D_s).
            messages: the embeddings of the K others; not read without message passing.
            present: which of them are sent (B, K).
        """
        skips, divergences = list(embeddings), []
        for stage, gate in enumerate(self.gates):
            sent = [other[stage] for other in messages]
            if self.training and torch.is_grad_enabled():
                skips[stage], divergence = self.hear_in_slabs(stage, embeddings[stage], present, sent)
            else:
                weights = gate.attend(embeddings[stage], present, *sent)
                skips[stage], divergence = self.hear(stage, embeddings[stage], weights, present, *sent)
            if divergence is not None:
                divergences.append(divergence)
        features = self.decoder(skips)
        logits = [layer(f) for layer, f in zip(self.seg_layers, features, strict=True)]
        return [*features, skips[-1]], logits, divergences

    def hear_in_slabs(
        self, stage: int, own: Tensor, present: Tensor, messages: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """What :meth:`hear` gives, for training: nothing of it is kept for the backward pass but the attention.

        A gate has several feature maps for each message, half of them in single precision, and is quick to run again.
        But for the attention all of it is voxel by voxel, so that the maps of a slab at a time are enough.
        """
        again = partial(checkpoint, use_reentrant=False)
        weights = again(self.gates[stage].attend, own, present, *messages)
        elements = len(messages) * math.prod(own[:, :, :1].shape)
        size = max(1, SLAB.get(own.device.type, SLAB["cpu"]) // elements)
        split = [tensor.split(size, 2) for tensor in (own, *messages)]
        of_weights = [None] * len(split[0]) if weights is None else weights.split(size, 2)
        slabs = [
            again(self.hear, stage, piece, own_weights, present, *sent)
            for own_weights, piece, *sent in zip(of_weights, *split, strict=True)
        ]
        skips, divergences = zip(*slabs, strict=True)
        skip = skips[0] if len(skips) == 1 else torch.cat(skips, 2)
        if divergences[0] is None:
            return skip, None
        shares = [piece.shape[2] / own.shape[2] for piece in split[0]]
        return skip, sum(share * divergence for share, divergence in zip(shares, divergences, strict=True))

    def hear(
        self, stage: int, own: Tensor, weights: Tensor | None, present: Tensor, *messages: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """A stage's skip: its embedding with what the others' (B, F, *D) add to it, and the divergences (B, K)."""
        mean, variance = self.gates[stage](torch.stack(messages, 1), weights, present)
        complement, divergence = mean.sum(1), None
        if variance is not None:
            complement = sample(complement, variance.sum(1))  # a sum of independent Gaussians, drawn at once
            divergence = divergence_from_standard(mean, variance)
        return self.reductions[stage](torch.cat((own, complement), 1)), divergence


class CIMLBackbone(Backbone):
    """A segmentor for each sub-task, which reads the others' encoders through a gate at every stage.

    Options:
        segmentors: ``{"modalities": [0], "channels": [0, 1]}`` for each: the primary modalities, and the output
            channels (regions; with plain labels their numbers, without background) that it predicts. One for each
            modality that predicts everything, if not given. Resolved from dataset.json by the trainer.
        has_regions: output channels are regions (sigmoid) and not labels (softmax); resolved by the trainer.
        messages, attention, variational: the steps of Table 5.
        kl_weight: beta of Eq. 8.
    """

    MIN_MODALITIES = 2
    PREDICTS = True
    owned: Tensor  # (S, C) bool

    def __init__(
        self,
        topology: UNetTopology,
        num_modalities: int,
        channels_per_modality: int,
        cascade_channels: int,
        *,
        num_classes: int,
        segmentors: Sequence[dict[str, Sequence[int]]] | None = None,
        has_regions: bool = False,
        messages: bool = True,
        attention: bool = True,
        variational: bool = True,
        kl_weight: float = 0.5,
    ) -> None:
        super().__init__()
        if num_modalities < self.MIN_MODALITIES:
            raise ValueError(f"ciml: messages need at least 2 modalities, got {num_modalities}")
        if not 0 <= kl_weight < math.inf:
            raise ValueError(
                f"ciml: kl_weight={kl_weight!r} is not a number of at least 0; correct it in the plans file"
            )
        self.topology, self.num_modalities, self.num_classes = topology, num_modalities, num_classes
        self.has_regions, self.kl_weight = has_regions, kl_weight
        self.subtasks = check_subtasks(segmentors, num_modalities, num_classes, has_regions)
        count = len(self.subtasks)
        self.segmentors: Any = nn.ModuleList(
            Segmentor(
                topology,
                len(subtask.modalities) * channels_per_modality + cascade_channels,
                num_classes,
                count - 1 if messages else 0,
                attention,
                variational,
            )
            for subtask in self.subtasks
        )
        owned = torch.zeros(count, num_classes, dtype=torch.bool)
        for s, subtask in enumerate(self.subtasks):
            owned[s, list(subtask.channels)] = True
            owned[s, 0] |= not has_regions  # everyone tells its labels from everything else
        self.register_buffer("owned", owned, persistent=False)

    def forward(self, x: Tensor, cascade: Tensor, present: Tensor) -> BackboneOutput:
        """See ``nnunet_multimodal.backbones.base``."""
        here = torch.stack([present[:, list(t.modalities)].any(1) for t in self.subtasks], 1)  # (B, S)
        embeddings = self.encode(x, cascade)
        features, logits, divergences = [], [], []
        for s, segmentor in enumerate(self.segmentors):
            others = [o for o in range(len(self.subtasks)) if o != s]
            messages = [embeddings[o] for o in others]
            own_features, own_logits, own_divergences = segmentor(embeddings[s], messages, here[:, others])
            features.append(own_features)
            logits.append(own_logits)
            if own_divergences:
                weight = (here[:, s, None] & here[:, others]).float()
                divergence = torch.stack(own_divergences).mean(0)  # (B, K)
                divergences.append((divergence * weight).sum() / weight.sum().clamp_min(1))
        share = here / here.sum(1, keepdim=True)  # (B, S)
        stages = list(zip(*features, strict=True))
        merged = [
            torch.einsum("bs...,bs->b...", torch.stack(stage, 1), share.to(stage[0].dtype))
            for stage in (stages if self.features_are_read else stages[-1:])
        ]
        auxiliary = {"kl": self.kl_weight * torch.stack(divergences).sum()} if divergences else {}
        stacked = tuple(torch.stack(stage, 1) for stage in zip(*logits, strict=True))
        subtasks = SubtaskLogits(stacked, self.active(here), self.has_regions)
        return BackboneOutput(tuple(merged[:-1]), merged[-1], auxiliary, subtasks)

    def encode(self, x: Tensor, cascade: Tensor) -> list[list[Tensor]]:
        """Embeddings of every segmentor, finest first, each (B, F_s, *D_s)."""
        return [
            segmentor.encoder(torch.cat((x[:, list(subtask.modalities)].flatten(1, 2), cascade), 1))
            for segmentor, subtask in zip(self.segmentors, self.subtasks, strict=True)
        ]

    def active(self, here: Tensor) -> Tensor:
        """Which segmentor answers for which output channel, by those that are there (B, S): (B, S, C) bool."""
        active = self.owned & here[:, :, None]
        return active | (here[:, :, None] & ~active.any(1, keepdim=True))

    def compute_conv_feature_map_size(self, patch_size: Sequence[int]) -> int:
        """Feature map elements of one sample, nnU-Net's measure of memory; gates keep next to nothing."""
        sizes = [np.prod(size, dtype=np.int64) for size in self.topology.stage_sizes(patch_size)]
        total = 0
        for segmentor in self.segmentors:
            total += segmentor.encoder.compute_conv_feature_map_size(patch_size)
            total += segmentor.decoder.compute_conv_feature_map_size(patch_size)
            total += sum(self.num_classes * size for size in sizes[1:-1])  # coarse logits; the head counts the finest
        return total

    def encoder_modalities(self) -> dict[str, list[list[int]]]:
        """Every encoder sees the primary modalities of its sub-task."""
        return {f"segmentors.{s}.encoder": [list(t.modalities)] for s, t in enumerate(self.subtasks)}

    def decoders(self) -> list[str]:
        """One for each segmentor."""
        return [f"segmentors.{s}.decoder" for s in range(len(self.segmentors))]

    def unused_without_deep_supervision(self) -> Iterable[nn.Parameter]:
        """The coarser segmentation layers."""
        for segmentor in self.segmentors:
            yield from segmentor.seg_layers[1:].parameters()

    @classmethod
    def dataset_options(
        cls,
        dataset_json: dict[str, Any],
        label_manager: LabelManager,
        groups: Sequence[Sequence[int]],
        stated: dict[str, Any],
    ) -> dict[str, Any]:
        """The decomposition that dataset.json states, and what kind of output there is."""
        if stated.get("segmentors") is not None:
            return {"has_regions": bool(label_manager.has_regions)}
        return decompose(dataset_json, label_manager, groups)
