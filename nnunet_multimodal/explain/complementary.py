"""Complementary information of CIML's segmentors, seen: Grad-CAM maps and their shares (Shen et al., 2024, Eq. 14-17).

For a segmentor's region k and an auxiliary segmentor j, with the complementary information A_j (C channels) of the gate
at full resolution: zeta_j = ReLU(sum_c alpha_c A_j,c), alpha_c the gradient of the region's logit averaged over voxels,
and the weight omega_j = sum(zeta_j) / sum_i sum(zeta_i).

The paper takes the logit of a chosen voxel and averages the gradient over all voxels. Here the logits are summed over
the voxels that the segmentor gives to the region, in all tiles of an image, so that one alpha holds for the whole of
it; where it gives none, maps are zero and weights not defined. The gradient is averaged over these voxels: over all of
them it vanishes but for the image's borders, since nnU-Net's instance normalisation takes out what is added everywhere.
For the same reason A_j,c is taken relative to its background level, the median over a tile averaged over the tiles. The
sums of the weights are over these voxels too, where the paper sums over all: most of an image is background, and there
the remains of noise would outweigh what is told about the region.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nnunet_multimodal.backbones.base import SubtaskLogits
from nnunet_multimodal.backbones.ciml import CIMLBackbone
from nnunet_multimodal.decomposition import output_names
from nnunet_multimodal.errors import UserError
from nnunet_multimodal.inference.base import ModelPredictor, Preprocessed
from nnunet_multimodal.network import MultimodalUNet, unwrap


class Pair(NamedTuple):
    """A segmentor and a region that it answers for, with the segmentors that it hears, by number and by name."""

    segmentor: int
    channel: int
    auxiliaries: tuple[int, ...]
    primary_name: str
    region_name: str
    auxiliary_names: tuple[str, ...]


def has_complementary_information(predictor: ModelPredictor) -> bool:
    """Whether it is a model of CIML, with messages."""
    network = unwrap(predictor.network)
    return (
        isinstance(network, MultimodalUNet)
        and isinstance(network.backbone, CIMLBackbone)
        and len(network.backbone.segmentors[0].gates) > 0
    )


class ComplementaryPredictor(ModelPredictor):
    """nnU-Net's tiles, for Grad-CAM maps instead of logits."""

    def pairs(self) -> list[Pair]:
        """What there are maps of; of CIML's models with one fold.

        Raises:
            UserError: several folds.
        """
        if len(self.list_of_parameters) > 1:
            raise UserError(f"{len(self.list_of_parameters)} folds have maps of their own; name one with -f")
        network = unwrap(self.network)
        names = self.modality_names(network.groups)
        primary = ["+".join(names[m] for m in subtask.modalities) for subtask in network.backbone.subtasks]
        labels = self.plans_manager.get_label_manager(self.dataset_json)
        regions = {channel: name for name, channel in output_names(self.dataset_json, labels).items()}
        pairs = []
        for s, subtask in enumerate(network.backbone.subtasks):
            others = tuple(o for o in range(len(primary)) if o != s)
            heard = tuple(primary[o] for o in others)
            pairs += [Pair(s, c, others, primary[s], regions[c], heard) for c in subtask.channels]
        return pairs

    def explain(self, preprocessed: Preprocessed, pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
        """Maps on the image's grid (pairs, auxiliaries, *spatial), and weights (pairs, auxiliaries).

        Maps of segmentors that are absent, or that an absent one would have sent, are zero; their weights NaN, as are
        those of a region that is not predicted.

        Args:
            preprocessed: a case.
            pairs: as :meth:`pairs` tells.
        """
        network = unwrap(self.network)
        network.load_state_dict(self.list_of_parameters[0])
        network.to(self.device).eval().requires_grad_(False)
        here = [
            any(not preprocessed.absent[c] for m in subtask.modalities for c in network.groups[m])
            for subtask in network.backbone.subtasks
        ]
        factors = [f for s in range(len(here)) for f in self._factors(preprocessed.data, s, pairs)]
        count = len(pairs[0].auxiliaries)
        blended = self.blend(preprocessed.data, len(pairs) * (count + 1), lambda tile: self._maps(tile, pairs, factors))
        maps, weights = [], np.full((len(pairs), count), np.nan)
        for index, pair in enumerate(pairs):
            *heat, given = blended[index * (count + 1) : (index + 1) * (count + 1)]
            zeta = torch.stack(heat).relu_()
            maps.append(self.to_image_grid(zeta, preprocessed.properties))
            sent = [here[auxiliary] for auxiliary in pair.auxiliaries]
            total = (zeta * (given > 0.5)).flatten(1).double().sum(1).numpy()
            if total.sum() > 0:
                weights[index, sent] = total[sent] / total.sum()
        return np.stack(maps), weights

    def _factors(self, data: Tensor, segmentor: int, pairs: Sequence[Pair]) -> list[tuple[Tensor, Tensor]]:
        """Of a segmentor's pairs, (K, C) each: alpha, and the background level of the complementary information."""
        network = unwrap(self.network)
        own = [pair for pair in pairs if pair.segmentor == segmentor]
        shape = len(own[0].auxiliaries), network.backbone.topology.features_per_stage[0]
        gradients = [torch.zeros(shape, device=self.device) for _ in own]
        voxels = [torch.zeros((), device=self.device) for _ in own]
        level, tiles = torch.zeros(shape, device=self.device), 0
        for tile in self.tiles(data):
            with torch.enable_grad(), self.half_precision(), _captured(network, leaf=segmentor) as kappa:
                subtasks = network.backbone(*network.split(tile)).subtasks
            level += kappa[segmentor][0].detach().float().flatten(2).median(2).values
            tiles += 1
            for index, pair in enumerate(own):
                chosen = _given(subtasks, pair)
                if chosen.any():
                    score = (subtasks.logits[0][:, pair.segmentor, pair.channel].float() * chosen).sum()
                    (gradient,) = torch.autograd.grad(score, kappa[segmentor], retain_graph=index + 1 < len(own))
                    gradients[index] += torch.einsum("kc...,...->kc", gradient[0].float(), chosen[0].float())
                    voxels[index] += chosen.sum()
        return [(g / count.clamp_min(1), level / max(tiles, 1)) for g, count in zip(gradients, voxels, strict=True)]

    @torch.no_grad()
    def _maps(self, tile: Tensor, pairs: Sequence[Pair], factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Of every pair K maps and where the region is, (1, P * (K + 1), *D), of a tile."""
        network = unwrap(self.network)
        image, cascade, present = network.split(tile)
        with self.half_precision(), _captured(network) as kappa:
            subtasks = network.backbone(image, cascade, present).subtasks
        here = torch.stack([present[:, list(t.modalities)].any(1) for t in network.backbone.subtasks], 1)
        maps = []
        for (alpha, level), pair in zip(factors, pairs, strict=True):
            heat = torch.einsum("kc,bkc...->bk...", alpha, kappa[pair.segmentor].float())
            shape = (1, -1, *(1,) * (tile.ndim - 2))
            constant = torch.einsum("kc,kc->k", alpha, level).view(shape)
            maps.append((heat - constant) * here[:, list(pair.auxiliaries)].view(shape))
            maps.append(_given(subtasks, pair)[:, None].float())
        return torch.cat(maps, 1)


@contextmanager
def _captured(network: Any, leaf: int | None = None) -> Iterator[dict[int, Tensor]]:
    """The complementary information (B, K, C, *D) of every segmentor at full resolution, filled as the network runs.

    Args:
        network: of CIML, without parameters that want a gradient.
        leaf: the segmentor whose information gradients are taken of; the others keep nothing for a backward pass.
    """
    found: dict[int, Tensor] = {}

    def keep(segmentor: int, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        found[segmentor] = output[0].detach().requires_grad_() if segmentor == leaf else output[0]
        return found[segmentor], output[1]

    hooks = [
        segmentor.gates[0].register_forward_hook(lambda _, __, output, s=s: keep(s, output))
        for s, segmentor in enumerate(network.backbone.segmentors)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _given(subtasks: SubtaskLogits, pair: Pair) -> Tensor:
    """The voxels (B, *D) bool that a segmentor, if it is there, gives to a region."""
    logits, active = subtasks.logits[0][:, pair.segmentor], subtasks.active[:, pair.segmentor]
    active = active.view(*active.shape, *(1,) * (logits.ndim - 2))
    if subtasks.has_regions:
        return (logits[:, pair.channel] > 0) & active[:, pair.channel]
    own = logits.masked_fill(~active, -torch.inf)
    return (own.argmax(1) == pair.channel) & active[:, pair.channel]
