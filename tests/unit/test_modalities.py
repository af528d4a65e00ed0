import math

import pytest
import torch

from nnunet_multimodal.modalities import check_groups, split_present


def split(x):
    """Modalities of one channel each."""
    values, present = split_present(x[:, :, None])
    return values[:, :, 0], present


def test_any_nan_makes_a_channel_absent_and_zero():
    x = torch.ones(2, 3, 4, 5)
    x[0, 1, 2, 3] = math.nan
    values, present = split(x)
    assert present.tolist() == [[True, False, True], [True, True, True]]
    assert values[0, 1].abs().max() == 0
    assert torch.equal(values[1], x[1])


def test_a_channel_of_zeros_is_absent_unless_all_are():
    x = torch.ones(2, 2, 3, 3, 3)
    x[0, 0] = 0
    x[1] = 0
    _, present = split(x)
    assert present.tolist() == [[False, True], [True, True]]


def test_one_voxel_is_enough_to_be_present():
    x = torch.zeros(1, 2, 4, 4)
    x[0, 0, 1, 1] = -1e-3
    assert split(x)[1].tolist() == [[True, False]]


def test_a_sample_of_nan_alone_becomes_zeros_and_all_present():
    values, present = split(torch.full((1, 2, 3, 3), math.nan))
    assert present.all()
    assert torch.equal(values, torch.zeros_like(values))


def test_air_beside_nan_is_present_and_the_nan_stays_absent():
    x = torch.zeros(1, 3, 3, 3)
    x[0, 1, 0, 0] = math.nan
    values, present = split(x)
    assert present.tolist() == [[True, False, True]]
    assert torch.equal(values, torch.zeros_like(values))


def test_a_modality_of_several_channels_is_absent_as_a_whole():
    x = torch.ones(2, 2, 2, 3, 3)
    x[0, 1, 0, 0] = math.nan
    x[1, :, 0] = math.nan  # no modality is complete
    values, present = split_present(x)
    assert present.tolist() == [[True, False], [True, True]]
    assert values[0, 1].abs().max() == 0
    assert values[1].abs().max() == 0


def test_no_gradient_reaches_an_absent_channel():
    x = torch.randn(1, 2, 3, 3)
    x[0, 1, 0, 0] = math.nan
    x.requires_grad_()
    split(x)[0].square().sum().backward()
    assert torch.equal(x.grad[0, 1], torch.zeros(3, 3))
    torch.testing.assert_close(x.grad[0, 0], 2 * x[0, 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_keeps_the_type(dtype):
    assert split(torch.ones(1, 2, 3, 3, dtype=dtype))[0].dtype == dtype


def test_groups_name_every_channel_once_and_are_of_equal_size():
    assert check_groups([[0, 2], [3, 1]], 4) == ((0, 2), (3, 1))
    for groups in ([[0], [1]], [[0], [1], [1]], [[0], [1], [3]]):
        with pytest.raises(ValueError, match=r"each of the 3 image channels 0..2 exactly once"):
            check_groups(groups, 3)
    with pytest.raises(ValueError, match="equal size"):
        check_groups([[0, 1], [2]], 3)
