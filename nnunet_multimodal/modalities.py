"""What a modality is, and when it is absent.

A modality is one image channel of the nnU-Net dataset, or a group of channels. Channels that nnU-Net's cascade adds
(the previous stage, one-hot) belong to no modality and always follow the image channels.

An absent modality is an all-NaN channel of the preprocessed data. Spatial augmentation and masks may set a part of it
to zero, so a channel with any NaN is absent. So is a channel that is zero everywhere: what z-score normalisation makes
of a placeholder of constant value (nnU-Net's CT normalisation does not, and its noise augmentation, one sample in ten,
undoes it in training: zeros are for prediction, NaN is for both). A modality of several channels is absent if one of
them is. A patch in which nothing is present (a tile of air) counts as all present, but for channels with NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def split_present(x: Tensor) -> tuple[Tensor, Tensor]:
    """Decode absent modalities; done once, at the entry of a network.

    Args:
        x: modalities (B, M, G, *D) of G channels each, any float type.

    Returns:
        The same with zero in place of everything absent, and which modalities are present (B, M), bool.
    """
    # one reduction sees both signs of absence: it is NaN if there is any, and NaN > 0 is False
    largest = x.detach().abs().flatten(3).amax(-1)  # (B, M, G)
    present, unknown = (largest > 0).all(2), largest.isnan().any(2)
    air = ~present.any(1, keepdim=True)
    present = torch.where(air, ~unknown | unknown.all(1, keepdim=True), present)
    kept = (present & ~unknown).view(*present.shape, *(1,) * (x.ndim - 2))
    return torch.where(kept, x, torch.zeros((), dtype=x.dtype, device=x.device)), present


def check_groups(groups: Sequence[Sequence[int]], num_channels: int) -> tuple[tuple[int, ...], ...]:
    """Validate a grouping of image channels into modalities, such as ``[[0], [1, 2]]``.

    Raises:
        ValueError: a channel is missing, named twice or out of range, or the groups are not of equal size.
    """
    checked = tuple(tuple(int(channel) for channel in group) for group in groups)
    if sorted(channel for group in checked for channel in group) != list(range(num_channels)):
        raise ValueError(
            f"modalities {list(map(list, checked))} must name each of the {num_channels} image channels "
            f"0..{num_channels - 1} exactly once; correct 'modalities' under 'nnunet_multimodal' in the plans file"
        )
    if len({len(group) for group in checked}) > 1:
        raise ValueError(
            f"modalities {list(map(list, checked))} must be groups of equal size; "
            "correct 'modalities' under 'nnunet_multimodal' in the plans file"
        )
    return checked


def check_dedicated(dedicated: Sequence[int] | None, num_modalities: int) -> list[int]:
    """The modalities that a network dedicated to some of them does not look at; none if it is not.

    Raises:
        ValueError: it names none, one twice, or one that does not exist.
    """
    if dedicated is None:
        return []
    if not dedicated or not set(dedicated) <= set(range(num_modalities)) or len(set(dedicated)) < len(dedicated):
        raise ValueError(
            f"dedicated {list(dedicated)} must name some of the {num_modalities} modalities 0..{num_modalities - 1}, "
            "each once; correct 'dedicated' under 'nnunet_multimodal' in the plans file"
        )
    return [modality for modality in range(num_modalities) if modality not in dedicated]


@dataclass(frozen=True)
class ModalityDropout:
    """Makes modalities absent at random in training, so that a network learns every subset of them.

    A sample keeps a subset of the modalities that it has: their number is uniform from 1 to all, then each subset of
    that size is as likely (Wang et al., CVPR 2023, the authors' code). Nothing is left without any.

    Args:
        probability: of a sample to lose modalities at all, once warmed up; its subset may still be all of them.
        warm_up: the part of the epochs over which the probability rises linearly from 0.

    Raises:
        ValueError: a number outside 0 to 1.
    """

    probability: float = 1.0
    warm_up: float = 0.1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value <= 1:
                raise ValueError(
                    f"modality_dropout: {name}={value!r} is not between 0 and 1; correct it in the plans file"
                )

    def rate(self, progress: float) -> float:
        """The probability after a part of the epochs, 0 to 1."""
        return self.probability * (min(1.0, progress / self.warm_up) if self.warm_up else 1.0)

    def __call__(
        self,
        x: Tensor,
        groups: Sequence[Sequence[int]],
        progress: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Images (B, C, *D) with NaN in every channel of the modalities that a sample loses.

        Args:
            x: image channels and any number of others behind them.
            groups: image channels of each of M modalities.
            progress: the part of the epochs that are done.
            generator: of random numbers, on the CPU.
        """
        batch, device = len(x), x.device
        # as in split_present: NaN > 0 is False, and a tile of air has nothing to lose
        present = torch.stack([x[:, list(g)].flatten(2).abs().amax(2).gt(0).all(1) for g in groups], 1)  # (B, M)
        order = torch.rand(present.shape, generator=generator).to(device).masked_fill(~present, 2.0)
        count = present.sum(1)
        kept = (torch.rand(batch, generator=generator).to(device) * count).long().clamp(max=count - 1) + 1
        drops = (torch.rand(batch, generator=generator) < self.rate(progress)).to(device)
        lost = present & (order.argsort(1).argsort(1) >= kept[:, None]) & drops[:, None]
        channels = torch.zeros(x.shape[:2], dtype=torch.bool, device=device)
        for modality, group in enumerate(groups):
            channels[:, list(group)] = lost[:, modality, None]
        return x.masked_fill(channels.view(*channels.shape, *(1,) * (x.ndim - 2)), math.nan)
