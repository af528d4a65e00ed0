"""What a modality is, and when it is absent.

A modality is one image channel of the nnU-Net dataset, or a group of channels. Channels that nnU-Net's cascade adds
(the previous stage, one-hot) belong to no modality and always follow the image channels.

An absent modality is an all-NaN channel of the preprocessed data. Spatial augmentation and masks may set a part of it
to zero, so a channel with any NaN is absent. So is a channel that is zero everywhere: what z-score normalisation makes
of a placeholder of constant value (nnU-Net's CT normalisation does not, and its noise augmentation, one sample in ten,
undoes it in training: zeros are for prediction, NaN is for both). A modality of several channels is absent if one of
them is. A patch in which nothing is present (a tile of air) counts as all present, but for channels with NaN.
"""

from collections.abc import Sequence

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
