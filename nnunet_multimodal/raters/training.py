"""Raters in nnU-Net's training: from its dataset through its augmentation to the loss."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from nnunet_multimodal.backbones.base import check_choice
from nnunet_multimodal.errors import UserError
from nnunet_multimodal.heads.base import RaterLabels
from nnunet_multimodal.raters.files import FOLDER, SEPARATOR, find_raters, has_changed

CONSENSUS, RANDOM, MEAN = "consensus", "random", "mean"
POLICIES = (CONSENSUS, RANDOM, MEAN)


class RaterDataset(nnUNetDatasetBlosc2):
    """nnU-Net's dataset, whose segmentations have a channel for every rater behind the consensus.

    Args:
        dataset: nnU-Net's.
        folder: of the preprocessed raters.

    Raises:
        UserError: a case has no raters there.
    """

    def __init__(self, dataset: nnUNetDatasetBlosc2, folder: Path) -> None:
        super().__init__(dataset.source_folder, dataset.identifiers, dataset.folder_with_segs_from_previous_stage)
        self.folder = folder
        self.described: dict[str, dict[str, Any]] = {}
        self.weights: dict[str, Tensor] = {}
        for case in self.identifiers:
            if not (folder / f"{case}.json").is_file():
                raise UserError(f"{folder} has no raters of {case}; preprocess again, with {FIX}")
            found = json.loads((folder / f"{case}.json").read_text())
            self.described[case] = found["raters"]
            weights = np.zeros(found["channels"])
            weights[: len(found["raters"])] = [rater["weight"] for rater in found["raters"].values()]
            self.weights[case] = torch.from_numpy(weights / weights.sum()).float()

    @property
    def num_raters(self) -> int:
        """Channels of raters that every case has."""
        return len(next(iter(self.weights.values())))

    def count(self) -> str:
        """How many cases there are, and raters of each, in words."""
        counts = [len(raters) for raters in self.described.values()]
        return f"{len(counts)} cases, {min(counts)} to {max(counts)} each"

    def refuse_changed(self, raw: Path, ending: str) -> None:
        """Raw raters are others than those that were preprocessed; nothing is said where raw data is not at hand.

        Args:
            raw: the raw dataset.
            ending: of its files.

        Raises:
            UserError: see above.
        """
        if not (raw / "imagesTr").is_dir():
            return
        there = find_raters(raw / FOLDER, ending)
        for case, described in self.described.items():
            now = {rater.name: rater for rater in there.get(case, ())}
            changed = described.keys() ^ now.keys()
            changed |= {name for name in described.keys() & now.keys() if has_changed(now[name], described[name])}
            if changed:
                raise UserError(
                    f"{self.folder} was made of other files or weights of {case} than {raw / FOLDER} has now (rater "
                    f"{', '.join(sorted(changed))}); preprocess again, with {FIX}"
                )

    @staticmethod
    def refuse_without(raw: Path, folder: Path, stated: bool) -> None:
        """Raters were not preprocessed: an error if there are some, or the plans state a policy for them.

        Args:
            raw: the raw dataset.
            folder: where they would be.
            stated: whether the plans do.

        Raises:
            UserError: see above.
        """
        if stated or any((raw / FOLDER).glob(f"*{SEPARATOR}*")):
            why = "the plans state a policy for raters" if stated else f"{raw / FOLDER} has raters"
            raise UserError(f"{why}, and {folder} is not there; preprocess with {FIX}")

    def load_case(self, identifier: str) -> tuple[Any, Any, Any, dict]:
        """nnU-Net's, with the raters.

        Raises:
            UserError: the raters are on another grid.
        """
        data, _, previous, properties = super().load_case(identifier)
        file = str(self.folder / f"{identifier}.b2nd")
        raters = blosc2.open(file, mode="r", dparams={"nthreads": 1}, **self.mmap_kwargs)
        if raters.shape[1:] != data.shape[1:]:
            raise UserError(
                f"{file} has shape {raters.shape[1:]} and the preprocessed image {data.shape[1:]}: it is of an earlier "
                f"preprocessing; preprocess again, with {FIX}"
            )
        return data, raters, previous, properties


FIX = "nnUNetv2_preprocess and plans whose preprocessor is MultimodalPreprocessor (-preprocessor_name)"


class SetRatersAside(BasicTransform):
    """Take the raters out of the segmentation, between the consensus and a cascade's previous stage.

    Args:
        is_cascaded: the last channel is the previous stage's.
    """

    def __init__(self, is_cascaded: bool) -> None:
        super().__init__()
        self.is_cascaded = is_cascaded

    def apply(self, data_dict: dict[str, Any], **params: Any) -> dict[str, Any]:
        """Leaves the image as it is."""
        segmentation = data_dict["segmentation"]
        last = len(segmentation) - self.is_cascaded
        data_dict["raters"] = segmentation[1:last]
        data_dict["segmentation"] = torch.cat((segmentation[:1], segmentation[last:]))
        return data_dict


class AppendRaters(BasicTransform):
    """Put the raters behind the finished target (labels, or regions and ignored voxels)."""

    def apply(self, data_dict: dict[str, Any], **params: Any) -> dict[str, Any]:
        """Leaves the image as it is."""
        raters = data_dict.pop("raters")
        if len(raters):
            segmentation = data_dict["segmentation"]
            data_dict["segmentation"] = torch.cat((segmentation.to(raters.dtype), raters))
        return data_dict


def split_targets(target: Tensor | list[Tensor], num_raters: int, regions: bool) -> tuple[Any, list[Tensor]]:
    """nnU-Net's target without the raters, and the raters' label maps (B, R, *D) at every resolution, finest first."""
    levels = target if isinstance(target, list) else [target]
    raters = [level[:, -num_raters:] for level in levels]
    own = [level[:, :-num_raters] for level in levels]
    own = [level.bool() if regions else level for level in own]  # as nnU-Net has it
    return own if isinstance(target, list) else own[0], raters


class RaterPolicy:
    """What losses that take one target get of several raters.

    Args:
        label_manager: nnU-Net's.
        num_classes: output channels of the network.
        policy: ``consensus``; ``random``, a rater drawn by weight for every image of every step; ``mean``, the raters'
            mean probability as soft labels.

    Raises:
        ValueError: no such policy.
    """

    def __init__(self, label_manager: LabelManager, num_classes: int, policy: str = CONSENSUS) -> None:
        self.policy = check_choice("raters", "policy", policy, POLICIES)
        self.label_manager, self.num_classes = label_manager, num_classes

    def __call__(self, target: Any, raters: Sequence[Tensor], weights: Tensor) -> Any:
        """The targets in place of nnU-Net's, as many.

        Args:
            target: nnU-Net's, of one resolution or of several, finest first.
            raters: label maps (B, R, *D) of each.
            weights: (B, R), which sum to 1, on the CPU.
        """
        if self.policy == CONSENSUS:
            return target
        if self.policy == RANDOM:
            drawn = torch.multinomial(weights, 1).to(raters[0].device)  # (B, 1), the same at every resolution
            one = torch.ones_like(drawn, dtype=weights.dtype)
            batch = torch.arange(len(drawn), device=drawn.device)[:, None]
            levels = [self._target(RaterLabels(labels[batch, drawn], one), soft=False) for labels in raters]
        else:
            weights = weights.to(raters[0].device)
            levels = [self._target(RaterLabels(labels, weights), soft=True) for labels in raters]
        return levels if isinstance(target, list) else levels[0]

    def _target(self, raters: RaterLabels, soft: bool) -> Tensor:
        if not (soft or self.label_manager.has_regions):
            return raters.labels
        indicator, valid = raters.encode(self.num_classes, self.label_manager)  # (B, R, C, *D), (B, R, *D)
        weights = raters.weights.view(*raters.weights.shape, *(1,) * (indicator.ndim - 2))
        counted = weights if valid is None else weights * valid[:, :, None]
        mean = (indicator * counted).sum(1) / counted.sum(1).clamp_min(1e-6)
        ignored = None if valid is None else (counted.sum(1) == 0)
        if not self.label_manager.has_regions:
            return mean  # all zero where ignored
        target = mean if ignored is None else torch.cat((mean, ignored.to(mean.dtype)), 1)
        return target if soft else target.bool()
