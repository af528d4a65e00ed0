"""MoSE: a mixture of stochastic experts, fitted to the raters of each image by optimal transport.

Gao, Chen, Zhang, He: *Modeling Multimodal Aleatoric Uncertainty in Segmentation with Mixture of Stochastic Experts*,
ICLR 2023. K experts share the backbone. Expert k is a Gaussian over an L-dimensional latent, which modulates the last
decoder features; a gating network weights the experts for every image. N = K S samples with weights pi_k / S are
compared with the annotations: the loss is the cost of the cheapest transport between them, plus the Kullback-Leibler
divergence of the weights from what the transport takes of each sample.

Deviations from the paper and its code, and why:

- The cost is IoU plus cross-entropy (``cost``), as nnU-Net's own loss is Dice plus cross-entropy. The paper takes one
  of them, with Adam; with nnU-Net's SGD the IoU alone starts slowly, as its gradient is small where nothing overlaps.
- The transport with a limit (gamma < 1) is solved exactly, as a linear program of the whole batch; the authors' code
  assigns greedily, which is up to 13 % above the optimum and breaks the limit for raters of unequal weight.
- ``preference`` (0, as in the paper, if not stated) makes an expert cost less by so much for every factor e of its
  weight when annotations are assigned. Experts with the same answer share its weight by chance otherwise. Before gamma
  is 1 it would decide for one expert while they are still alike.
- The Kullback-Leibler term is that of an image, with the paper's weight of 1. The authors' code averages it over the
  samples too, and so has a 16th of it with their 16 samples; with Adam that hardly matters to the gate, which has no
  other term, with nnU-Net's SGD it would learn 16 times slower.
- gamma becomes 1 when the mean loss of an epoch has not improved for ``patience`` of the training, and at the latest
  after half of it. The authors' code watches a running mean over the whole training, which hardly ever stops falling.
- The first of the 1x1 convolutions has no normalisation either; with one, it would take out the modulation again.
- The gate's layers have nnU-Net's initialisation (its last one zero), the other convolutions begin as identity, the
  factors b around 1: with PyTorch's own and SGD a gate learnt the same weights for all images. Beside the averages of
  the deepest features, which instance normalisation makes alike, it sees their maxima. In six epochs on LIDC the
  training loss came to 0.65, with averages alone to 0.81, with layer normalisation in front of the gate to 0.70. The
  maxima's logarithms came to 0.56, and to the same energy distance on held-out patients (0.236 instead of 0.232).
- The mean prediction takes each expert's latents at fixed points of low discrepancy instead of random ones, so that
  nnU-Net's predictor gives the same result every time.
- Deep supervision is nnU-Net's: its own loss of 1x1 convolutions at the coarser stages.
- With a backbone that predicts by itself (CIML) its logits are added to every sample's.
- Over the tiles of an image features and expert weights are blended, and samples made of the blended features. Samples
  are not linear in them, as SSN's are; in exchange there can be any number of samples from one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nnunet_multimodal.backbones.base import UNetTopology, check_choice, full_precision
from nnunet_multimodal.heads.base import DistributionLoss, SegmentationLoss, Step, encode_target
from nnunet_multimodal.heads.deterministic import DeterministicHead
from nnunet_multimodal.heads.mixture import ExpertMixture, ImageMixture, mixture_logits
from nnunet_multimodal.heads.transport_cost import COSTS, MIN_WEIGHT, pairwise_cost, transport_terms

MIN_SCALE = 1e-5  # paper: (features + a(z)) * (b(z) + 1e-5)
INITIAL_DEVIATION = 1 / 8
MIN_IMPROVEMENT = 1e-3  # of an epoch's loss, relative, to count as one
DRAW_CHUNK = 2**18  # voxels of an image that a sample is made of at once
CHUNK = {"cpu": 2**20, "cuda": 2**26}  # elements of the features that are decoded at once in training


class MoSEHead(DeterministicHead):
    """Experts, modulation, gating; nnU-Net's segmentation layers at the coarser stages.

    Args:
        topology: the network's.
        num_classes: C.
        num_experts: K.
        samples_per_expert: S, in training and for the mean prediction.
        latent_dimension: L.
        cost: ``iou``, ``cross_entropy`` or their sum ``iou+cross_entropy``, between a sample and an annotation.
        kl_weight: beta, of an image's Kullback-Leibler term.
        limit: gamma at the beginning: no sample may take more of the annotations than this.
        patience: part of the training without improvement after which gamma becomes 1.
        preference: for heavier experts (see ``transport_terms``) once gamma is 1; 0.01 takes the weight from those that
            repeat others.
        has_regions: output channels are regions; resolved by the trainer.

    Raises:
        ValueError: an option out of its range.
    """

    STOCHASTIC = True
    FITS_RATERS = True
    points: Tensor

    def __init__(
        self,
        topology: UNetTopology,
        num_classes: int,
        num_experts: int = 4,
        samples_per_expert: int = 4,
        latent_dimension: int = 1,
        cost: str = "iou+cross_entropy",
        kl_weight: float = 1.0,
        limit: float = 0.5,
        patience: float = 0.05,
        preference: float = 0.0,
        has_regions: bool = False,
    ) -> None:
        super().__init__(topology, num_classes)
        if min(num_experts, samples_per_expert, latent_dimension) < 1 or not 0 <= kl_weight < math.inf:
            raise ValueError(
                f"num_experts {num_experts}, samples_per_expert {samples_per_expert}, latent_dimension "
                f"{latent_dimension}, kl_weight {kl_weight} for MoSE: the first three must be at least 1, the weight "
                "at least 0; correct them in the plans file"
            )
        samples = num_experts * samples_per_expert
        if not 1 / samples <= limit <= 1 or not 0 <= patience <= 1 or not 0 <= preference < math.inf:
            raise ValueError(
                f"limit {limit}, patience {patience}, preference {preference} for MoSE: the limit must be at least "
                f"1 / {samples} samples and at most 1, the patience between 0 and 1, the preference at least 0; "
                "correct them in the plans file"
            )
        self.cost = check_choice("MoSE", "cost", cost, COSTS)
        self.num_experts, self.samples_per_expert, self.latent_dimension = (
            num_experts, samples_per_expert, latent_dimension,
        )  # fmt: skip
        self.kl_weight, self.limit, self.patience, self.preference = kl_weight, limit, patience, preference
        self.has_regions = has_regions
        features, deepest = topology.features_per_stage[0], topology.bottleneck_features
        spread = torch.linspace(-1, 1, num_experts)[:, None] if num_experts > 1 else torch.zeros(1, 1)
        spread = spread if latent_dimension == 1 else torch.randn(num_experts, latent_dimension)
        self.expert_mean = nn.Parameter(spread)
        self.expert_log_deviation = nn.Parameter(torch.full_like(spread, math.log(INITIAL_DEVIATION)))
        self.shift, self.scale = (nn.Linear(latent_dimension, features) for _ in range(2))
        self.convolutions = nn.ModuleList(
            topology.conv_op(features, out, 1, bias=True) for out in (features, features, features, num_classes)
        )
        self.gating = nn.Sequential(
            nn.Linear(2 * deepest, deepest), nn.LeakyReLU(0.01), nn.Linear(deepest, deepest), nn.LeakyReLU(0.01),
            nn.Linear(deepest, num_experts),
        )  # fmt: skip
        self.register_buffer("points", standard_points(samples_per_expert, latent_dimension), persistent=False)
        self.seg_layers[0] = nn.Identity()  # its place is taken by the experts; the names of the others stay

    @torch.no_grad()
    def initialize(self) -> None:
        """Experts that begin as one segmentation layer of features that each modulates, and a gate that is fair."""
        nn.init.ones_(self.scale.bias)
        for convolution in list(self.convolutions)[:-1]:
            nn.init.dirac_(convolution.get_parameter("weight"))
        *hidden, last = list(self.gating)[::2]
        for layer in hidden:
            nn.init.kaiming_normal_(layer.get_parameter("weight"), 0.01)
            nn.init.zeros_(layer.get_parameter("bias"))
        for parameter in last.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self,
        features: Sequence[Tensor],
        bottleneck: Tensor,
        foreground: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> ExpertMixture:
        """See ``nnunet_multimodal.heads.base``."""
        base = self.base(features, logits)
        pi, latents, weights = self.experts(bottleneck)
        decode: Callable[[Tensor, Tensor], Tensor] = self.decode
        if self.training and torch.is_grad_enabled():  # the backward pass decodes a sample of a piece again
            decode = partial(checkpoint, decode, use_reentrant=False, preserve_rng_state=False)
        size = max(1, CHUNK.get(base.device.type, CHUNK["cpu"]) // math.prod(base.shape[:2]))
        pieces = [
            torch.stack([decode(piece, z) for z in latents.unbind(1)], 1) for piece in base.flatten(2).split(size, 2)
        ]
        samples = torch.cat(pieces, 3).unflatten(3, base.shape[2:])
        return ExpertMixture(samples, weights, base, pi, self.has_regions)

    def mean_logits(self, features: Sequence[Tensor], bottleneck: Tensor, logits: Tensor | None = None) -> Tensor:
        """Logits of the weighted mean probability (B, C, *D), one sample at a time."""
        base = self.base(features, logits)
        _, latents, weights = self.experts(bottleneck)
        samples = (self.decode(base.flatten(2), z).unflatten(2, base.shape[2:]) for z in latents.unbind(1))
        return mixture_logits(samples, weights.unbind(1), self.has_regions)

    def base(self, features: Sequence[Tensor], logits: Tensor | None) -> Tensor:
        """What samples are made of (B, F, *D): the finest features, and the backbone's own logits if it has some."""
        return features[0] if logits is None else torch.cat((features[0], logits.to(features[0].dtype)), 1)

    def experts(self, bottleneck: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Expert weights (B, K), latents (B, N, L) and their weights (B, N), float32; fixed points in evaluation."""
        with full_precision(bottleneck.device):
            positions = bottleneck.float().flatten(2)
            pi = self.gating(torch.cat((positions.mean(2), positions.amax(2)), 1)).softmax(1)
            shape = len(pi), self.num_experts, self.samples_per_expert, self.latent_dimension
            noise = torch.randn(shape, device=pi.device) if self.training else self.points.expand(shape)
            latents = self.expert_mean[:, None] + self.expert_log_deviation.exp()[:, None] * noise
            return pi, latents.flatten(1, 2), pi.repeat_interleave(self.samples_per_expert, 1) / self.samples_per_expert

    def decode(self, base: Tensor, latent: Tensor) -> Tensor:
        """Logits (B, C, V) of a latent (B, L) for each image, in V voxels of :meth:`base`."""
        width = self.shift.out_features
        shift, scale = self.shift(latent), self.scale(latent) + MIN_SCALE
        (weight, bias), *others = (
            (c.get_parameter("weight").flatten(1), c.get_parameter("bias")) for c in self.convolutions
        )
        # the modulation is part of the first of them: W (f + a) b = (W b) f + W (a b)
        x = affine(base[:, :width], weight * scale[:, None], F.linear(shift * scale, weight, bias))
        for weight, bias in others:
            x = affine(F.leaky_relu_(x, 0.01), weight.expand(len(x), -1, -1), bias.expand(len(x), -1))
        return x if base.shape[1] == width else x + base[:, width:]

    @torch.no_grad()
    def decode_image(self, features: Tensor, expert: int, noise: Tensor) -> Tensor:
        """Logits (C, *D), float32, of an expert and standard normal noise (L,), for features of a whole image."""
        device = self.expert_mean.device
        latent = self.expert_mean[expert] + self.expert_log_deviation[expert].exp() * noise.to(device)
        with full_precision(device):
            pieces = [
                self.decode(piece[None].to(device, torch.float32), latent[None])[0]
                for piece in features.flatten(1).split(DRAW_CHUNK, 1)
            ]
        return torch.cat([piece.to(features.device) for piece in pieces], 1).view(-1, *features.shape[1:])

    @property
    def num_blended(self) -> int:
        """C + F + K, and C more with a backbone that predicts."""
        own = self.num_classes + self.shift.out_features + self.num_experts
        return own + (0 if len(self.seg_layers) else self.num_classes)

    def blended(self, parameters: Tensor, foreground: Tensor) -> ImageMixture:
        """The mixture of a whole image; the experts' weights are averaged over nnU-Net's non-zero mask."""
        loc, features, weights = parameters.tensor_split((self.num_classes, len(parameters) - self.num_experts))
        inside = foreground[0].to(weights.device)
        weights = (weights[:, inside] if inside.any() else weights.flatten(1)).double().mean(1)
        head = deepcopy(self)  # the next fold's weights will be loaded into this one
        return ImageMixture(head, loc[None], features, (weights / weights.sum()).float())

    @classmethod
    def dataset_options(cls, label_manager: LabelManager) -> dict[str, Any]:
        """What kind of output there is."""
        return {"has_regions": bool(label_manager.has_regions)}

    def build_loss(self, segmentation_loss: SegmentationLoss, label_manager: LabelManager) -> DistributionLoss:
        """Transport between samples and annotations, and the divergence of the weights; see the module."""

        def loss(distribution: ExpertMixture, target: Tensor, step: Step) -> Tensor:
            with full_precision(target.device):
                annotations, valid, weights = self.annotations(target, step, label_manager)
                if valid is not None:  # who ignores the whole patch costs nothing, and has nothing to say
                    weights = weights * valid.flatten(2).any(2)
                    weights = weights / weights.sum(1, keepdim=True).clamp_min(MIN_WEIGHT)
                cost = pairwise_cost(distribution.samples, annotations, valid, self.cost, self.has_regions)
                limit = annealed_limit(self.limit, self.patience, step)
                preference = self.preference if limit >= 1 else 0.0
                transported, divergence = transport_terms(cost, distribution.sample_weights, weights, limit, preference)
                return transported.mean() + self.kl_weight * divergence.mean()

        return loss

    def annotations(
        self, target: Tensor, step: Step, label_manager: LabelManager
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Indicators (B, M, C, *D), voxels that count (B, M, *D) or None, and weights (B, M) of the annotations.

        Without raters there is one, nnU-Net's target.
        """
        if step.raters is None:
            indicator, valid = encode_target(target, self.num_classes, label_manager)
            return indicator[:, None], valid, target.new_ones(len(target), 1, dtype=torch.float32)
        indicator, valid = step.raters.encode(self.num_classes, label_manager)
        return indicator, valid, step.raters.weights.to(target.device, torch.float32)

    def compute_conv_feature_map_size(self, patch_size: Sequence[int], deep_supervision: bool) -> int:
        """Feature map elements of one sample, nnU-Net's measure of memory: two tensors are kept for one that it counts.

        The logits of every sample are kept.
        """
        samples = self.num_experts * self.samples_per_expert
        kept = samples * self.num_classes * np.prod(patch_size, dtype=np.int64)
        return super().compute_conv_feature_map_size(patch_size, deep_supervision) + int(kept) // 2


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Matrices (B, F', F) and vectors (B, F') of each image applied in every voxel: (B, F, V) -> (B, F', V).

    What a 1x1 convolution does, in two thirds of its time on CPUs.
    """
    return torch.baddbmm(bias[:, :, None].to(x.dtype), weight.to(x.dtype), x)


def standard_points(count: int, dimension: int) -> Tensor:
    """Points (count, dimension) of low discrepancy under the standard normal; one alone is at its mean."""
    if count == 1:
        return torch.zeros(1, dimension)
    sobol = torch.quasirandom.SobolEngine(dimension, scramble=False).draw(count + 1)[1:]
    uniform = (sobol - sobol.mean(0) + 0.5).clamp(0.5 / count, 1 - 0.5 / count)
    return math.sqrt(2) * torch.erfinv(2 * uniform - 1)


def annealed_limit(limit: float, patience: float, step: Step) -> float:
    """gamma in this epoch: ``limit`` until the loss no longer improves or half of the training is done, then 1."""
    epochs = round((len(step.epoch_losses) + 1) / step.progress) if step.progress > 0 else math.inf
    if step.progress > 0.5:
        return 1.0
    best, since = math.inf, 0
    for loss in step.epoch_losses:
        if loss < best - MIN_IMPROVEMENT * abs(best) or best == math.inf:
            best, since = loss, 0
        else:
            since += 1
        if since > patience * epochs:
            return 1.0
    return limit
