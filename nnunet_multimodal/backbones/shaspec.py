"""ShaSpec: shared and specific features of every modality, for missing ones in training and at prediction.

Wang, Chen, Ma, Avery, Hull, Carneiro: *Multi-modal Learning with Missing Modality via Shared-Specific Feature
Modelling*, CVPR 2023. Implements Eq. 1 (a shared encoder and one for each modality), Eq. 2 (residual fusion), Eq. 3
(decoding the concatenated embeddings), Eq. 4 (substitution of absent ones), Eq. 5 (domain classification, DCO), Eq. 6
to 8 (distribution alignment, DAO, all four variants of Table 4) and Eq. 9 (their weights). Dedicated training is the
option ``dedicated`` of the plans file, dropping modalities the trainers' ``ModalityDropout``.

Deviations from the paper or the authors' code, each with its reason:

- The projection's output is normalised (``projection="normalised"``, the plan's normalisation layer) or starts at zero
  (``"zero"``). With weight standardisation and nothing behind it, as in the authors' code, it is some fifty times
  larger than the features that it should be a residual of.
- An absent modality's shared features are the mean of the present ones' (Eq. 4); the authors' code takes the first
  present one (``substitution="first"``). That is at the bottleneck. In the skips its features are left out
  (``skips="present"``); the paper does not say, the authors' code feeds zeros through the encoder. Substituted there as
  well (``skips="substituted"``), a lone modality's features fill every slot, so the decoder is told the same whichever
  it is: on four synthetic modalities the Dice of one alone fell from 0.62 to 0.48 (``docs/benchmarks.md``).
- The alignment is the mean over a sample's pairs of present modalities, not their sum, so that its weight does not
  depend on how many are present; the authors' code sums a ring of four. The Kullback-Leibler divergence is symmetric,
  for the same reason that all pairs are taken: modalities have no order.
- Losses are computed in float32, from features before substitution; samples with fewer than two modalities align
  nothing.
- At prediction the encoders of a modality that the whole batch lacks are not run (they are where the network is
  compiled, whose graph must not depend on the data).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_multimodal.backbones.base import (
    FURTHER_PASS,
    Backbone,
    BackboneOutput,
    ModalityReduction,
    UNetTopology,
    append_cascade,
    check_choice,
    full_precision,
)

ALIGNMENTS = ("l1", "mse", "kl", "ce")
SUBSTITUTIONS = ("mean", "first")
SKIPS = ("present", "substituted")
PROJECTIONS = ("normalised", "zero")
KL_FEATURES = 32  # of the linear projection in Eq. 7; the paper says "low-dimensional"


def substitution_weights(present: Tensor, substitution: str = "mean") -> Tensor:
    """Which present modalities stand in for each absent one (Eq. 4): (B, M) bool -> (B, M, M), zero rows if present."""
    weights = present.float()
    if substitution == "first":
        weights = weights * (weights.cumsum(1) == 1)
    weights = weights / weights.sum(1, keepdim=True)
    return weights[:, None] * (~present)[:, :, None]


def mean_over_pairs(distance: Tensor, present: Tensor) -> Tensor:
    """Mean of (B, M, M) over each sample's pairs of present modalities (B, M), then over the samples that have any."""
    pairs = present[:, :, None] & present[:, None]
    pairs = pairs & ~torch.eye(present.shape[1], dtype=torch.bool, device=present.device)
    count = pairs.sum((1, 2))
    return ((distance * pairs).sum((1, 2)) / count.clamp_min(1)).sum() / (count > 0).sum().clamp_min(1)


class ResidualProjection(nn.Module):
    """f(i) = f_proj([r(i), s(i)]) + r(i), Eq. 2: one 3x3(x3) convolution for all modalities.

    Args:
        topology: says convolution and normalisation.
        projection: ``normalised`` or ``zero``, see the deviations.
    """

    def __init__(self, topology: UNetTopology, projection: str) -> None:
        super().__init__()
        features = topology.bottleneck_features
        self.convolution = topology.conv_op(2 * features, features, 3, padding=1, bias=True)
        if check_choice("shaspec", "projection", projection, PROJECTIONS) == "normalised":
            if topology.norm_op is None:
                raise ValueError(
                    "shaspec: the plan's network has no normalisation layer; use projection='zero' in the plans file"
                )
            self.norm = topology.build_norm(features)
            self.scale = None
        else:
            self.norm = nn.Identity()
            self.scale = nn.Parameter(torch.zeros(features, *(1,) * topology.dim))

    def forward(self, shared: Tensor, specific: Tensor) -> Tensor:
        """Both (B, M, F, *d) -> the same shape."""
        residual = self.norm(self.convolution(torch.cat((shared, specific), 2).flatten(0, 1)))
        if self.scale is not None:
            residual = residual * self.scale
        return shared + residual.view(shared.shape)


class ShaSpecBackbone(Backbone):
    """A shared encoder and one for each modality, fused by a residual at the bottleneck; one decoder.

    Options:
        substitution: of an absent modality, ``mean`` of the present ones or the ``first`` of them.
        skips: an absent modality is left out (``present``) or ``substituted`` like at the bottleneck.
        projection: ``normalised`` or ``zero``.
        alignment: DAO, ``l1`` (Eq. 8, p = 1), ``mse``, ``kl`` (Eq. 7) or ``ce`` (Eq. 6).
        alignment_weight: alpha of Eq. 9.
        classification_weight: beta of Eq. 9.
    """

    MIN_MODALITIES = 2

    def __init__(
        self,
        topology: UNetTopology,
        num_modalities: int,
        channels_per_modality: int,
        cascade_channels: int,
        *,
        substitution: str = "mean",
        skips: str = "present",
        projection: str = "normalised",
        alignment: str = "l1",
        alignment_weight: float = 0.1,
        classification_weight: float = 0.02,
    ) -> None:
        super().__init__()
        if num_modalities < 2:
            raise ValueError(f"shaspec: shared features need at least 2 modalities, got {num_modalities}")
        self.topology = topology
        self.num_modalities = num_modalities
        self.substitution = check_choice("shaspec", "substitution", substitution, SUBSTITUTIONS)
        self.skips = check_choice("shaspec", "skips", skips, SKIPS)
        self.alignment = check_choice("shaspec", "alignment", alignment, ALIGNMENTS)
        self.alignment_weight = _check_weight("alignment_weight", alignment_weight)
        self.classification_weight = _check_weight("classification_weight", classification_weight)
        features, channels = topology.bottleneck_features, channels_per_modality + cascade_channels
        self.shared = topology.build_encoder(channels)
        self.specific = nn.ModuleList(topology.build_encoder(channels) for _ in range(num_modalities))
        self.projection = ResidualProjection(topology, projection)
        self.reductions = nn.ModuleList(ModalityReduction(num_modalities, f, f) for f in topology.features_per_stage)
        self.decoder = topology.build_decoder()
        self.domain_classifier = nn.Linear(features, num_modalities)
        self.alignment_layer = {
            "kl": lambda: nn.Linear(features, KL_FEATURES, bias=False),
            "ce": lambda: nn.Linear(features, num_modalities),
        }.get(alignment, nn.Identity)()

    def forward(self, x: Tensor, cascade: Tensor, present: Tensor) -> BackboneOutput:
        """See ``nnunet_multimodal.backbones.base``."""
        run = self._modalities_to_run(present)
        stages, specific = self.encode(x, cascade, run)
        shared, here = stages[-1], present[:, run]
        substitutes = substitution_weights(present, self.substitution)[:, :, run].to(shared.dtype)
        own = torch.diag_embed(present.to(shared.dtype))[:, :, run]
        fused = self.projection(shared, specific)
        # f(i) where present, the mean of r where absent
        bottleneck = self.reductions[-1](torch.cat((fused, shared), 1), torch.cat((own, substitutes), 2))
        mixing = own if self.skips == "present" else own + substitutes
        skips = [reduce(stage, mixing) for reduce, stage in zip(self.reductions[:-1], stages[:-1], strict=True)]
        auxiliary = {}
        if self.training:
            auxiliary = {
                "alignment": self.alignment_weight * self.alignment_loss(shared, here),
                "classification": self.classification_weight * self.classification_loss(specific, here),
            }
        return BackboneOutput(self.decoder([*skips, bottleneck]), bottleneck, auxiliary)

    def encode(self, x: Tensor, cascade: Tensor, run: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """Shared features of every stage (B, N, F_s, *D_s), finest first, and specific ones of the last (B, N, F, *d).

        Args:
            x: modalities (B, M, G, *D).
            cascade: (B, K, *D).
            run: N modalities to encode.
        """
        x = append_cascade(x[:, run], cascade)
        shared = [s.unflatten(0, x.shape[:2]) for s in self.shared(x.flatten(0, 1))]
        specific = [self.specific[m](x[:, index])[-1] for index, m in enumerate(run)]
        return shared, torch.stack(specific, 1)

    def _modalities_to_run(self, present: Tensor) -> list[int]:
        """All; at prediction those that some sample has, unless the graph is being compiled."""
        if self.training or torch.compiler.is_compiling():
            return list(range(self.num_modalities))
        return present.any(0).nonzero().flatten().tolist()

    def alignment_loss(self, shared: Tensor, present: Tensor) -> Tensor:
        """DAO of the shared bottleneck features (B, M, F, *d): a scalar, float32."""
        with full_precision(shared.device):
            r = shared.float().flatten(3)
            if self.alignment in ("l1", "mse"):
                difference = r[:, :, None] - r[:, None]
                distance = difference.abs() if self.alignment == "l1" else difference.square()
                return mean_over_pairs(distance.mean((3, 4)), present)
            log_q = F.log_softmax(self.alignment_layer(r.mean(3)), -1)  # (B, M, F')
            if self.alignment == "kl":
                divergence = (log_q.exp()[:, :, None] * (log_q[:, :, None] - log_q[:, None])).sum(-1)
                return mean_over_pairs(divergence, present)
            several = present & (present.sum(1, keepdim=True) > 1)
            return -(log_q.mean(-1) * several).sum() / several.sum().clamp_min(1)

    def classification_loss(self, specific: Tensor, present: Tensor) -> Tensor:
        """DCO of the specific bottleneck features (B, M, F, *d): a scalar, float32 (Eq. 5)."""
        with full_precision(specific.device):
            log_p = F.log_softmax(self.domain_classifier(specific.float().flatten(3).mean(3)), -1)  # (B, M, M)
            return -(log_p.diagonal(dim1=1, dim2=2) * present).sum() / present.sum()

    @torch.no_grad()
    def modality_features(self, x: Tensor, cascade: Tensor, present: Tensor) -> dict[str, Tensor]:
        """Globally pooled ``shared`` and ``specific`` bottleneck features (B, M, F) as in Fig. 5, zero where absent."""
        stages, specific = self.encode(x, cascade, range(self.num_modalities))
        features = {"shared": stages[-1], "specific": specific}
        return {kind: f.flatten(3).mean(3) * present[:, :, None] for kind, f in features.items()}

    def compute_conv_feature_map_size(self, patch_size: Sequence[int]) -> int:
        """Feature map elements of one sample, nnU-Net's measure of memory."""
        encoder: Any = self.shared
        passes = 1 + FURTHER_PASS * (2 * self.num_modalities - 1)
        size = int(passes * encoder.compute_conv_feature_map_size(patch_size))
        # concatenation, convolution, normalisation, sum, alignment: about six maps of the bottleneck
        deepest = np.prod(self.topology.stage_sizes(patch_size)[-1], dtype=np.int64)
        size += 6 * self.num_modalities * self.topology.features_per_stage[-1] * deepest
        return size + self.decoder.compute_conv_feature_map_size(patch_size)

    def encoder_modalities(self) -> dict[str, list[list[int]]]:
        """The shared encoder sees every modality, the specific ones their own."""
        single = [[m] for m in range(self.num_modalities)]
        return {"shared": single, **{f"specific.{m}": [group] for m, group in enumerate(single)}}


def _check_weight(name: str, value: float) -> float:
    if not 0 <= value < math.inf:
        raise ValueError(f"shaspec: {name}={value!r} is not a number of at least 0; correct it in the plans file")
    return value
