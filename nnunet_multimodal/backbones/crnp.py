"""Cross-modal random network prediction: fusion at the bottleneck, weighted by uncertainty.

Wang, Zhang, Chen, Ma, Avery, Hull, Carneiro: *Uncertainty-aware Multi-modal Learning via Cross-modal Random Network
Prediction*, ECCV 2022. Implements Eq. 2 (random network prediction), Eq. 4 (uncertainty of the other modalities, for
any number of them), Eq. 5 (fusion, the three functions of Table 6) and Eq. 6 (attention, the variants of Table 5).

Deviations from the paper, each with its reason:

- One decoder. The paper's separate decoders serve annotations that differ per modality, which nnU-Net datasets do not
  have. Skips are the modalities' features of a stage, concatenated and reduced by a 1x1 convolution.
- The uncertainty is element-wise by default, as in the authors' code; the squared norm of Eq. 4 is
  ``uncertainty="norm"``. Element-wise needs as many random features as features, so their number is F instead of 256.
- RNP and model are trained in one backward pass instead of alternately: the RNP sees detached features and the model a
  detached uncertainty, so the two gradients touch disjoint parameters. One RNP step per iteration (authors' code: 3).
- The RNP loss enters the objective with a small factor and its parameters with the learning rate divided by the same
  factor. For SGD the step is that of the undivided loss, while the RNP's gradient is too small to set off nnU-Net's
  clipping of the total norm (it is scaled down with the rest where the model's does) and leaves the loss curve
  comparable with plain nnU-Net's. The authors' own clipping of the RNP's gradient at 0.1 is not used.
- The RNP loss is the squared error over the mean square of the features (normalised least mean squares), which makes
  one learning rate safe for features of any scale, such as those of residual encoders. Learning rate 0.1 with nnU-Net's
  Nesterov momentum instead of the authors' 1e-2: in 54 steps on PET/CT/MR features the error fell to 0.48 of the
  target's power with 0.1 and to 1.16 with 0.005; it diverged from 2 on. The regulariser of Eq. 2 is the weight decay.
- Attention tokens are spatial positions and the embedding is the channels of all modalities; the authors' code has it
  the other way round, which ties the weights to one patch size. Projected to F dimensions.
- Attention has a residual path and normalised input. Without them it loses accuracy (Handwritten: 1.3 points).
- Cross-attention for more than two modalities: a modality's queries attend to the positions of all others.
- Absent modalities have no part in uncertainty, attention, skips and bottleneck. A modality without a present partner
  passes the fusion function unchanged, also where it would be *replaced* by zero times itself.
- Vectors (classification): one position has no spatial norm, so u is normalised over its features instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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

NEGATIVE_SLOPE = 0.25  # paper, 4.2
LOSS_FACTOR = 1e-3  # see the deviations
LEARNING_RATE_SCALE = 10.0  # relative to nnU-Net's 1e-2; see the deviations

FUSIONS = ("residual", "replace", "concat")
UNCERTAINTIES = ("elementwise", "norm")
ATTENTIONS = ("self", "cross", "none")
ENCODERS = ("shared", "separate")


def _random_layers(*shape: int) -> Tensor:
    """Kaiming-normal weights of a 1x1 layer for every modality: (M, out, in)."""
    return torch.randn(shape) * math.sqrt(2 / (1 + NEGATIVE_SLOPE**2) / shape[-1])


class RandomNetworkPrediction(nn.Module):
    """For each modality a frozen random network and a smaller one that learns to predict it (Eq. 2).

    Both are 1x1 convolutions without bias. The prediction fits well where features are dense in training, so its
    error measures how unusual a feature is. Input is detached: nothing here reaches an encoder.

    Args:
        num_modalities: M.
        in_features: F.
        out_features: F_out of both networks.
    """

    target_in: Tensor
    target_hidden: Tensor
    target_out: Tensor

    def __init__(self, num_modalities: int, in_features: int, out_features: int) -> None:
        super().__init__()
        hidden = max(1, in_features // 2)
        # buffers: in the checkpoint, never trained
        self.register_buffer("target_in", _random_layers(num_modalities, hidden, in_features))
        self.register_buffer("target_hidden", _random_layers(num_modalities, hidden, hidden))
        self.register_buffer("target_out", _random_layers(num_modalities, out_features, hidden))
        self.predictor_in = nn.Parameter(_random_layers(num_modalities, hidden, in_features))
        self.predictor_out = nn.Parameter(_random_layers(num_modalities, out_features, hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, M, F, N) -> prediction minus target (B, M, F_out, N), float32."""
        with full_precision(x.device):
            x = x.detach().float()
            target = _layers(x, self.target_in, self.target_hidden, self.target_out)
            return _layers(x, self.predictor_in, self.predictor_out) - target


def _layers(x: Tensor, *weights: Tensor) -> Tensor:
    for i, weight in enumerate(weights):
        if i > 0:
            x = F.leaky_relu(x, NEGATIVE_SLOPE)
        x = torch.einsum("mof,bmfn->bmon", weight, x)
    return x


def relative_error(error: Tensor, x: Tensor) -> Tensor:
    """Mean squared RNP error of each modality over the mean square of its features: (B, M), float32.

    Args:
        error: (B, M, F_out, N).
        x: the features (B, M, F, N) that it was computed from; no gradient reaches them.
    """
    return error.square().mean((2, 3)) / (x.detach().float().square().mean((2, 3)) + 1e-5)


def cross_modal_uncertainty(error: Tensor, present: Tensor, uncertainty: str = "elementwise") -> Tensor:
    """u(p), the summed squared RNP error of the other present modalities (Eq. 4), normalised per channel.

    Args:
        error: (B, M, F_out, N).
        present: (B, M) bool.
        uncertainty: ``elementwise`` (B, M, F_out, N) or ``norm`` (B, M, 1, N).

    Returns:
        Each channel divided by its L2 norm over the N positions (over the channels if N = 1), without gradient.
    """
    with full_precision(error.device):
        squared = error.detach().square() * present[:, :, None, None]
        if uncertainty == "norm":
            squared = squared.sum(2, keepdim=True)
        others = 1 - torch.eye(error.shape[1], device=error.device, dtype=squared.dtype)
        u = torch.einsum("pq,bqfn->bpfn", others, squared)
        return F.normalize(u, dim=3 if error.shape[3] > 1 else 2)


class PositionAttention(nn.Module):
    """Scaled dot-product attention over spatial positions (Eq. 6), for any number of positions.

    Args:
        num_modalities: M.
        features: F.
        attention: ``self`` (the channels of all modalities are one token) or ``cross`` (each modality's positions
            attend to those of the others).
    """

    def __init__(self, num_modalities: int, features: int, attention: str) -> None:
        super().__init__()
        self.cross = attention == "cross"
        token = features if self.cross else num_modalities * features
        self.scale = nn.Parameter(torch.ones(features, 1))
        self.query_key_value = nn.Linear(token, 3 * features)
        self.out = nn.Linear(features, token)

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        """Features (B, M, F, N), zero where absent, and present (B, M) -> the same shape."""
        batch, modalities, features, positions = x.shape
        # per modality and without a mean, so that zeros (an absent modality) stay zeros
        normalised = (x * torch.rsqrt(x.float().square().mean(2, keepdim=True) + 1e-5)).to(x.dtype) * self.scale
        if self.cross:
            tokens = normalised.transpose(2, 3).flatten(1, 2)  # (B, M*N, F)
            mask = self._others(present).repeat_interleave(positions, 1).repeat_interleave(positions, 2)
        else:
            tokens = normalised.flatten(1, 2).transpose(1, 2)  # (B, N, M*F)
            mask = None
        query, key, value = self.query_key_value(tokens).chunk(3, -1)
        attended = self.out(F.scaled_dot_product_attention(query, key, value, attn_mask=mask))
        if self.cross:
            attended = attended.view(batch, modalities, positions, features).transpose(2, 3)
        else:
            attended = attended.transpose(1, 2).view(batch, modalities, features, positions)
        return x + attended

    @staticmethod
    def _others(present: Tensor) -> Tensor:
        """Which modality may look at which: (B, M, M) bool; itself only where there is no other."""
        own = torch.eye(present.shape[1], dtype=torch.bool, device=present.device)
        others = present[:, None, :] & ~own
        return others | (own & ~others.any(2, keepdim=True))


class CRNPFusion(nn.Module):
    """Uncertainty-weighted fusion of the modalities' features, on maps (B, M, F, *d) or vectors (B, M, F).

    Args:
        num_modalities: M, at least 2.
        features: F.
        rnp_features: F_out of the random networks; F if not given. ``elementwise`` needs F.
        uncertainty: ``elementwise`` or ``norm``.
        fusion: ``residual`` x + u x, ``replace`` u x, or ``concat`` with a 1x1 projection (Table 6).
        attention: ``self``, ``cross`` or ``none`` (Table 5).

    Raises:
        ValueError: an option that does not exist, fewer than two modalities, or random features that do not fit.
    """

    def __init__(
        self,
        num_modalities: int,
        features: int,
        *,
        rnp_features: int | None = None,
        uncertainty: str = "elementwise",
        fusion: str = "residual",
        attention: str = "self",
    ) -> None:
        super().__init__()
        if num_modalities < 2:
            raise ValueError(f"crnp: fusion needs at least 2 modalities, got {num_modalities}")
        self.uncertainty = check_choice("crnp", "uncertainty", uncertainty, UNCERTAINTIES)
        self.fusion = check_choice("crnp", "fusion", fusion, FUSIONS)
        check_choice("crnp", "attention", attention, ATTENTIONS)
        rnp_features = rnp_features or features
        if uncertainty == "elementwise" and rnp_features != features:
            raise ValueError(
                f"crnp: rnp_features={rnp_features} must equal the {features} bottleneck features for an element-wise "
                "product; leave it out or use uncertainty='norm'"
            )
        self.rnp = RandomNetworkPrediction(num_modalities, features, rnp_features)
        self.projection = nn.Linear(2 * features, features) if fusion == "concat" else None
        self.attention = None if attention == "none" else PositionAttention(num_modalities, features, attention)

    def forward(self, x: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Fuse.

        Args:
            x: (B, M, F, *d).
            present: (B, M) bool.

        Returns:
            The fused features (B, M, F, *d), zero where absent, and each modality's relative RNP error (B, M), whose
            mean over the present ones is the loss of Eq. 2 and which, in evaluation, scores how unusual a case is.
        """
        shape = x.shape
        x = x.reshape(*shape[:3], -1)
        mask = present[:, :, None, None]
        error = self.rnp(x)
        u = cross_modal_uncertainty(error, present, self.uncertainty).to(x.dtype)
        partner = (present.sum(1, keepdim=True) > present.long())[:, :, None, None]
        if self.fusion == "residual":
            fused = x + u * x
        elif self.fusion == "replace":
            fused = torch.where(partner, u * x, x)
        else:
            assert self.projection is not None
            projected = self.projection(torch.cat((x, u * x), 2).transpose(2, 3)).transpose(2, 3)
            fused = torch.where(partner, projected, x)
        fused = fused * mask
        if self.attention is not None:
            fused = self.attention(fused, present) * mask
        return fused.reshape(shape), relative_error(error, x) * present


class CRNPBackbone(Backbone):
    """An encoder per modality (shared weights by default), CRNP fusion at the bottleneck, one decoder.

    Options are those of :class:`CRNPFusion` and ``encoder``, ``shared`` or ``separate``.
    """

    MIN_MODALITIES = 2

    def __init__(
        self,
        topology: UNetTopology,
        num_modalities: int,
        channels_per_modality: int,
        cascade_channels: int,
        *,
        encoder: str = "shared",
        **fusion: Any,
    ) -> None:
        super().__init__()
        self.topology = topology
        self.num_modalities = num_modalities
        count = 1 if check_choice("crnp", "encoder", encoder, ENCODERS) == "shared" else num_modalities
        self.encoders = nn.ModuleList(
            topology.build_encoder(channels_per_modality + cascade_channels) for _ in range(count)
        )
        self.fusion = CRNPFusion(num_modalities, topology.bottleneck_features, **fusion)
        self.reductions = nn.ModuleList(ModalityReduction(num_modalities, f, f) for f in topology.features_per_stage)
        self.decoder = topology.build_decoder()

    def encode(self, x: Tensor, cascade: Tensor) -> list[Tensor]:
        """Features of every stage, finest first, each (B, M, F_s, *D_s)."""
        shape = x.shape
        x = append_cascade(x, cascade)
        if len(self.encoders) == 1:
            return [s.view(*shape[:2], *s.shape[1:]) for s in self.encoders[0](x.flatten(0, 1))]
        encoded = [encoder(x[:, m]) for m, encoder in enumerate(self.encoders)]
        return [torch.stack(stage, 1) for stage in zip(*encoded, strict=True)]

    def forward(self, x: Tensor, cascade: Tensor, present: Tensor) -> BackboneOutput:
        """See ``nnunet_multimodal.backbones.base``."""
        stages = self.encode(x, cascade)
        stages[-1], rnp_error = self.fusion(stages[-1], present)
        mixing = torch.diag_embed(present.to(stages[-1].dtype))
        skips = [reduce(stage, mixing) for reduce, stage in zip(self.reductions, stages, strict=True)]
        auxiliary = {"rnp": LOSS_FACTOR * rnp_error.sum() / present.sum()} if self.training else {}
        return BackboneOutput(self.decoder(skips), skips[-1], auxiliary)

    @torch.no_grad()
    def modality_uncertainty(self, x: Tensor, cascade: Tensor, present: Tensor) -> Tensor:
        """Mean squared RNP error of each modality over its features (Fig. 3): (B, M, *d), zero where absent.

        High where a modality's features are rare in training. Its mean over a case is a score for cases unlike the
        training data.
        """
        x = self.encode(x, cascade)[-1]
        error = self.fusion.rnp(x.flatten(3))
        return (error.square().mean(2) * present[:, :, None]).view(*x.shape[:2], *x.shape[3:])

    def compute_conv_feature_map_size(self, patch_size: Sequence[int]) -> int:
        """Feature map elements of one sample, nnU-Net's measure of memory."""
        encoder: Any = self.encoders[0]
        passes = 1 + FURTHER_PASS * (self.num_modalities - 1)
        size = int(passes * encoder.compute_conv_feature_map_size(patch_size))
        # RNP (two hidden and two output layers), uncertainty, fusion, attention: about ten maps of the bottleneck
        deepest = np.prod(self.topology.stage_sizes(patch_size)[-1], dtype=np.int64)
        size += 10 * self.num_modalities * self.topology.features_per_stage[-1] * deepest
        return size + self.decoder.compute_conv_feature_map_size(patch_size)

    def encoder_modalities(self) -> dict[str, list[list[int]]]:
        """The shared encoder sees every modality, separate ones their own."""
        single = [[m] for m in range(self.num_modalities)]
        if len(self.encoders) == 1:
            return {"encoders.0": single}
        return {f"encoders.{m}": [group] for m, group in enumerate(single)}

    def parameter_groups(self) -> Iterable[dict[str, Any]]:
        """The predictors: a learning rate of their own that undoes the factor of their loss, momentum 0.9."""
        yield {
            "params": list(self.fusion.rnp.parameters()),
            "lr_scale": LEARNING_RATE_SCALE / LOSS_FACTOR,
            "weight_decay_scale": LOSS_FACTOR,
            "momentum": 0.9,
        }
