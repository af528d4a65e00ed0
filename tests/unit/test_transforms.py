"""nnU-Net's non-zero mask survives its augmentation and reaches the network in step with the image."""

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunet_multimodal.trainers import combinations
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_multimodal.lookup import COMBINATIONS
from nnunet_multimodal.transforms import OUTSIDE, keep_foreground

PATCH = (8, 12, 12)


def training_transforms(trainer=combinations.SSNTrainer, dummy_2d=False, **kwargs):
    rotation = (-0.5, 0.5)
    return trainer.get_training_transforms(
        np.array(PATCH), rotation, [[1, 1, 1], [0.5] * 3], (0, 1, 2), dummy_2d, **kwargs
    )


def sample(channels=2, previous_stage=False):
    """Where the image is 7 the mask is inside; it must be so after any spatial augmentation."""
    segmentation = torch.zeros(1 + previous_stage, *PATCH, dtype=torch.int16)
    segmentation[:1, :, :5] = OUTSIDE
    segmentation[:, 2:6, 7:10, 4:8] = 1
    image = torch.where(segmentation[:1] == OUTSIDE, 0.0, 7.0).repeat(channels, 1, 1, 1)
    return {"image": image, "segmentation": segmentation}


@pytest.mark.parametrize("dummy_2d", [False, True])
@pytest.mark.parametrize("regions", [None, [(1, 2), 2]])
def test_the_mask_follows_the_image_through_the_augmentation(dummy_2d, regions):
    torch.manual_seed(0)
    transforms = training_transforms(dummy_2d=dummy_2d, use_mask_for_norm=[True, True], regions=regions)
    for _ in range(20):
        out = transforms(**sample())
        image, mask = out["image"][:2], out["image"][2]
        assert out["image"].shape == (3, *PATCH)
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        assert (image[:, mask == 0] == 0).all()  # nnU-Net sets the image to zero where its own mask ends
        assert (image[0, mask == 1] != 0).float().mean() > 0.9
        assert out["segmentation"][0].shape[0] == (2 if regions else 1)


def test_a_cascades_channels_come_after_the_mask():
    """Whatever augmentation makes of the previous stage: the image ends where the mask does, not where a label does."""
    transforms = training_transforms(is_cascaded=True, foreground_labels=[1, 2], use_mask_for_norm=[True, True])
    for _ in range(20):
        image = transforms(**sample(previous_stage=True))["image"]
        assert image.shape == (2 + 1 + 2, *PATCH)
        mask = image[2]
        assert set(image[2:].unique().tolist()) <= {0.0, 1.0}
        assert (image[:2, mask == 0] == 0).all()
        assert (image[0, mask == 1] != 0).float().mean() > 0.9


def test_validation_keeps_the_mask_as_it_is():
    transforms = combinations.SSNTrainer.get_validation_transforms([[1, 1, 1]])
    given = sample()
    inside = given["segmentation"][0] != OUTSIDE
    assert torch.equal(transforms(**given)["image"][2] > 0, inside)


@pytest.mark.parametrize("name", sorted(COMBINATIONS))
def test_only_heads_that_want_the_mask_get_it(name):
    image = training_transforms(getattr(combinations, name))(**sample())["image"]
    assert len(image) == (3 if COMBINATIONS[name][1].startswith("ssn") else 2)


def test_the_rest_of_nnunets_augmentation_is_untouched():
    arguments = (np.array(PATCH), (-0.5, 0.5), None, (0, 1, 2), False)
    stock = nnUNetTrainer.get_training_transforms(*arguments).transforms
    ours = combinations.SSNTrainer.get_training_transforms(*arguments).transforms
    names = [type(transform).__name__ for transform in ours]
    assert names[-4:] == ["ForegroundToImageTransform", names[-3], "SetRatersAside", "AppendRaters"]
    names = [*names[:-4], names[-3]]
    assert names == [type(transform).__name__ for transform in stock]


def test_an_augmentation_without_the_place_is_refused():
    with pytest.raises(ValueError, match=r"no RemoveLabelTransform\(-1, 0\)"):
        keep_foreground(ComposeTransforms([]))
