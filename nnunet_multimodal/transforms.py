"""What nnU-Net's augmentation does not know of: its own non-zero mask, and several raters.

nnU-Net marks what lies outside an image's content (its non-zero mask, filled holes included) with -1 in the
preprocessed segmentation, and its augmentation forgets the mark when it has used it. Here it becomes one more channel
of the image, right after the image's own, where ``MultimodalUNet.split_foreground`` takes it off.
"""

from __future__ import annotations

from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTransform

from nnunet_multimodal.raters.training import AppendRaters, SetRatersAside

OUTSIDE = -1


class ForegroundToImageTransform(BasicTransform):
    """Append a channel to the image (M, *D): 1 where the segmentation (S, *D) is not ``OUTSIDE``, else 0."""

    def apply(self, data_dict: dict[str, Any], **params: Any) -> dict[str, Any]:
        """Leaves the segmentation as it is."""
        image, segmentation = data_dict["image"], data_dict["segmentation"]
        data_dict["image"] = torch.cat((image, (segmentation[:1] != OUTSIDE).to(image.dtype)))
        return data_dict


def keep_foreground(transforms: ComposeTransforms) -> ComposeTransforms:
    """nnU-Net's transforms with the mask saved right before they forget it.

    Raises:
        ValueError: there is no such place in them.
    """
    at = where_outside_is_forgotten(transforms)
    return ComposeTransforms([*transforms.transforms[:at], ForegroundToImageTransform(), *transforms.transforms[at:]])


def keep_raters(transforms: ComposeTransforms, is_cascaded: bool) -> ComposeTransforms:
    """nnU-Net's transforms for segmentations with raters behind the consensus: all that is spatial is for all of them.

    What comes after, up to the resolutions of deep supervision, is for the consensus alone; the finished target has the
    raters' labels behind it. Without raters nothing changes.

    Raises:
        ValueError: there is no such place in them.
    """
    after = where_outside_is_forgotten(transforms) + 1
    kept = list(transforms.transforms)
    before_downsampling = len(kept) - bool(kept and isinstance(kept[-1], DownsampleSegForDSTransform))
    return ComposeTransforms(
        [
            *kept[:after],
            SetRatersAside(is_cascaded),
            *kept[after:before_downsampling],
            AppendRaters(),
            *kept[before_downsampling:],
        ]
    )


def where_outside_is_forgotten(transforms: ComposeTransforms) -> int:
    """The place of the transform that replaces ``OUTSIDE`` by background.

    Raises:
        ValueError: there is none.
    """
    forgets = [isinstance(t, RemoveLabelTransform) and t.label_value == OUTSIDE for t in transforms.transforms]
    if True not in forgets:
        names = ", ".join(type(t).__name__ for t in transforms.transforms)
        raise ValueError(
            f"nnU-Net's augmentation has no RemoveLabelTransform({OUTSIDE}, 0) that tells where its spatial part ends; "
            f"it has {names}. Install the version of nnunetv2 that this package asks for"
        )
    return forgets.index(True)
