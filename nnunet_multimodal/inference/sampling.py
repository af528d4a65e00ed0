"""Coherent samples of whole images: the parameters of a distribution blended over tiles, then sampled once.

nnU-Net's sliding window blends logits. Here it blends the parameters that samples are linear in (Monteiro et al.,
NeurIPS 2020, 5.3), so that one forward pass per tile serves any number of samples and no sample has a seam.

- A stochastic head's parameters are blended without mirroring, which would mix the signs of the factors; the mean alone
  is mirrored, so that it is nnUNetv2_predict's. The folds of a model form a mixture with equal weights.
- A deterministic model, also one of nnU-Net's own trainers, has members instead: its folds times its mirrors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from nnunet_multimodal.inference.base import ModelPredictor
from nnunet_multimodal.network import MultimodalUNet, unwrap


@dataclass(frozen=True)
class ImageDistribution:
    """Distribution over the logit maps of a whole image on the network's grid.

    Attributes:
        mean: (C, *D), what nnUNetv2_predict exports.
        folds: a stochastic model's distribution of every fold (``heads.base.ImageLogits``); empty for a deterministic
            one.
        members: a deterministic model's logit maps (C, *D); empty for a stochastic one.
    """

    mean: Tensor
    folds: tuple[Any, ...] = ()
    members: tuple[Tensor, ...] = ()

    def count(self, num_samples: int) -> int:
        """How many samples there will be: no more than there are members."""
        return num_samples if self.folds else min(num_samples, len(self.members))

    def numbers(self, num_samples: int) -> list[int]:
        """Of the samples in the order that ``draw`` yields them: the first numbers are of all folds in turn."""
        step = max(1, len(self.folds))
        return [number for fold in range(step) for number in range(fold, num_samples, step)]

    def weights(self, num_samples: int) -> list[float]:
        """Of the samples that ``draw`` yields with ``compact``, by their numbers; they sum to 1."""
        shares = [self._share(index, num_samples) for index in range(len(self.folds))]
        own = [fold.compact_weights(n) * n for fold, n in zip(self.folds, shares, strict=True) if n]
        weights = torch.empty(num_samples)
        weights[self.numbers(num_samples)] = torch.cat(own) / num_samples
        return weights.tolist()

    def groups(self, num_samples: int) -> list[int]:
        """Of the samples that ``draw`` yields with ``compact``, by their numbers: those of an expert have the same."""
        experts, step = self.folds[0].num_experts, len(self.folds)
        return [number % step * experts + number // step % experts for number in range(num_samples)]

    def _share(self, fold: int, num_samples: int) -> int:
        return len(range(fold, num_samples, len(self.folds)))

    def draw(
        self,
        num_samples: int,
        generator: torch.Generator,
        temperature: float = 1.0,
        class_scale: Tensor | None = None,
        compact: bool = False,
    ) -> Iterator[Tensor]:
        """Samples (C, *D), float32, one at a time; folds take equal shares, members are not repeated.

        A fold's samples come one after the other, as drawing them holds memory; ``numbers`` mixes the folds.

        Args:
            num_samples: how many; see ``count``.
            generator: on the device that does the work.
            temperature: factor on all deviations from the mean (of the fold).
            class_scale: (C,), factors on the deviations of each class or region.
            compact: samples with ``weights``, of models that have them.
        """
        changed = temperature != 1 or class_scale is not None
        for index, fold in enumerate(self.folds):
            share = self._share(index, num_samples)
            if share:
                fold = fold.scaled(temperature, class_scale) if changed else fold
                yield from (fold.draw_compact if compact else fold.draw)(share, generator)
        if self.members:
            order = torch.randperm(len(self.members), generator=generator, device=generator.device)
            scale = torch.full((len(self.mean),), temperature)
            scale = (scale if class_scale is None else scale * class_scale).view(-1, *(1,) * (self.mean.ndim - 1))
            for index in order[:num_samples].tolist():
                member = self.members[index].float()
                yield self.mean + scale * (member - self.mean) if changed else member


class SamplePredictor(ModelPredictor):
    """nnU-Net's predictor, whose sliding window blends distributions instead of logits."""

    network: Any
    label_manager: Any
    list_of_parameters: Any

    def initialize_from_trained_model_folder(self, *args: Any, **kwargs: Any) -> None:
        """nnU-Net's; what the window blends is decided by the model's head."""
        super().initialize_from_trained_model_folder(*args, **kwargs)
        self._blend_distributions()

    def manual_initialization(self, *args: Any, **kwargs: Any) -> None:
        """nnU-Net's; what the window blends is decided by the network's head."""
        super().manual_initialization(*args, **kwargs)
        self._blend_distributions()

    def _blend_distributions(self) -> None:
        self.network = unwrap(self.network)  # torch.compile knows nothing of the network's other methods
        self.num_classes = self.label_manager.num_segmentation_heads
        self.stochastic = isinstance(self.network, MultimodalUNet) and self.network.head.STOCHASTIC
        mirrors = len(self._mirrors())
        members = self.num_classes * (mirrors + 2 if mirrors else 1)  # the mean as well, if there are several
        channels = self.network.head.num_blended if self.stochastic else members
        self.label_manager = SimpleNamespace(num_segmentation_heads=channels)  # nnU-Net sizes its buffer by it

    @torch.inference_mode()
    def predict_distribution(self, data: Tensor, foreground: Tensor) -> ImageDistribution:
        """Run the sliding window of every fold.

        Args:
            data: preprocessed image (and cascade) channels (K, *D).
            foreground: nnU-Net's non-zero mask (1, *D) bool.
        """
        all_folds, blended, folds = self.list_of_parameters, [], []
        try:
            for weights in all_folds:
                self.list_of_parameters = [weights]
                blended.append(self.predict_logits_from_preprocessed_data(data))
                if self.stochastic:  # with this fold's weights still in the network
                    folds.append(self.network.head.blended(blended[-1], foreground))
        finally:
            self.list_of_parameters = all_folds
        mean = sum(fold[: self.num_classes] for fold in blended) / len(blended)
        if self.stochastic:
            return ImageDistribution(mean, tuple(folds))
        several = self.num_classes if self._mirrors() else 0
        members = itertools.chain.from_iterable(fold[several:].split(self.num_classes) for fold in blended)
        return ImageDistribution(mean, members=tuple(members))

    @property
    def has_weights(self) -> bool:
        """Whether its distributions can be told by few samples with weights."""
        return self.stochastic and self.network.head.FITS_RATERS

    @property
    def num_experts(self) -> int:
        """How many there are, of models whose samples have weights."""
        return self.network.head.num_experts

    def predict_samples(
        self, data: Tensor, num_samples: int, generator: torch.Generator, foreground: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Samples (C, *D) of a preprocessed image (K, *D), one at a time; see :class:`ImageDistribution`."""
        foreground = torch.ones_like(data[:1], dtype=torch.bool) if foreground is None else foreground
        return self.predict_distribution(data, foreground).draw(num_samples, generator)

    def _mirrors(self) -> list[tuple[int, ...]]:
        """Axes to flip, for every mirrored pass, in nnU-Net's order."""
        axes = [axis + 2 for axis in self.allowed_mirroring_axes or ()] if self.use_mirroring else []
        return [c for size in range(1, len(axes) + 1) for c in itertools.combinations(axes, size)]

    @torch.inference_mode()
    def _internal_maybe_mirror_and_predict(self, x: Tensor) -> Tensor:
        if self.stochastic:
            parameters = self.network.distribution(x).blendable()
            members = [parameters[:, : self.num_classes]]
        else:
            members = [self.network(x)]
        members += [self.network(x.flip(axes)).flip(axes) for axes in self._mirrors()]
        if len(members) == 1:
            return parameters if self.stochastic else members[0]
        mean = members[0].clone()
        for member in members[1:]:
            mean += member
        mean /= len(members)
        return torch.cat((mean, *((parameters[:, self.num_classes :],) if self.stochastic else members)), 1)
