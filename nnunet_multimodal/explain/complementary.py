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
from types import SimpleNamespace
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
    """nnU-Net's sliding window over Grad-CAM maps instead of logits."""

    _factors: list[tuple[Tensor, Tensor]]
    _pairs: Sequence[Pair]
    label_manager: Any

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
        """Maps on the image's grid (pairs, auxiliaries, *spatial), and weights (pairs, auxiliaries), NaN if undefined.

        Args:
            preprocessed: a case.
            pairs: as :meth:`pairs` tells.
        """
        network = unwrap(self.network)
        network.load_state_dict(self.list_of_parameters[0])
        network.to(self.device).eval().requires_grad_(False)
        count = len(pairs[0].auxiliaries)
        self._factors, self._pairs = self._channel_weights(preprocessed.data, pairs), pairs
        number = len(pairs) * count + len(pairs)
        labels, self.label_manager = self.label_manager, SimpleNamespace(num_segmentation_heads=number)
        try:
            blended = self.predict_logits_from_preprocessed_data(preprocessed.data).float()
        finally:
            self.label_manager = labels
        maps, given = blended[: -len(pairs)].relu_(), blended[-len(pairs) :] > 0.5
        total = (maps.unflatten(0, (-1, count)) * given[:, None]).double().flatten(2).sum(2)
        weights = total / total.sum(1, keepdim=True)  # 0 / 0 is NaN
        whole = self.to_image_grid(maps, preprocessed.properties)
        return whole.reshape(len(pairs), count, *whole.shape[1:]), weights.cpu().numpy()

    def _channel_weights(self, data: Tensor, pairs: Sequence[Pair]) -> list[tuple[Tensor, Tensor]]:
        """Of every pair, (K, C) each: alpha, and the background level of the complementary information."""
        network = unwrap(self.network)
        features = network.backbone.topology.features_per_stage[0]
        gradients, levels = (
            [torch.zeros(len(pair.auxiliaries), features, device=self.device) for pair in pairs] for _ in range(2)
        )
        voxels, tiles = torch.zeros(len(pairs), device=self.device), 0
        for tile in self.tiles(data):
            tiles += 1
            with torch.enable_grad(), _captured(network, leaves=True) as kappa:
                subtasks = network.backbone(*network.split(tile)).subtasks
            for index, pair in enumerate(pairs):
                chosen = _given(subtasks, pair)
                score = (subtasks.logits[0][:, pair.segmentor, pair.channel] * chosen).sum()
                (gradient,) = torch.autograd.grad(score, kappa[pair.segmentor], retain_graph=True)
                gradients[index] += (gradient[0] * chosen).flatten(2).sum(2)
                levels[index] += kappa[pair.segmentor][0].detach().flatten(2).median(2).values
                voxels[index] += chosen.sum()
        return [
            (gradient / count.clamp_min(1), level / max(tiles, 1))
            for gradient, level, count in zip(gradients, levels, voxels, strict=True)
        ]

    @torch.no_grad()
    def _internal_maybe_mirror_and_predict(self, x: Tensor) -> Tensor:
        """Maps of all pairs (1, P * K + P, *D): those of the auxiliaries, and where the region is."""
        network = unwrap(self.network)
        with _captured(network, leaves=False) as kappa:
            subtasks = network.backbone(*network.split(x)).subtasks
        maps, given = [], []
        for (alpha, level), pair in zip(self._factors, self._pairs, strict=True):
            constant = torch.einsum("kc,kc->k", alpha, level).view(1, -1, *(1,) * (x.ndim - 2))
            maps.append(torch.einsum("kc,bkc...->bk...", alpha, kappa[pair.segmentor].float()) - constant)
            given.append(_given(subtasks, pair)[:, None].float())
        return torch.cat((*maps, *given), 1)


@contextmanager
def _captured(network: Any, leaves: bool) -> Iterator[dict[int, Tensor]]:
    """The complementary information (B, K, C, *D) of every segmentor at full resolution, filled as the network runs.

    Args:
        network: of CIML.
        leaves: gradients end there.
    """
    found: dict[int, Tensor] = {}

    def keep(segmentor: int, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        found[segmentor] = output[0].detach().requires_grad_() if leaves else output[0]
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
    """The voxels (B, *D) bool that a segmentor gives to a region."""
    logits, active = subtasks.logits[0][:, pair.segmentor], subtasks.active[:, pair.segmentor]
    if subtasks.has_regions:
        return logits[:, pair.channel] > 0
    own = logits.masked_fill(~active.view(*active.shape, *(1,) * (logits.ndim - 2)), -torch.inf)
    return own.argmax(1) == pair.channel
