import math

import pytest
import torch

from nnunet_multimodal.modalities import ModalityDropout, check_dedicated, check_groups, split_present


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


# --- modality dropout


def dropped(x, progress=1.0, groups=((0,), (1,), (2,)), seed=0, **options):
    """Which modalities are absent after it: (B, M) bool."""
    out = ModalityDropout(**options)(x, groups, progress, torch.Generator().manual_seed(seed))
    return torch.stack([out[:, list(group)].flatten(1).isnan().any(1) for group in groups], 1)


def test_every_size_of_subset_is_as_likely_and_every_subset_of_a_size():
    lost = dropped(torch.ones(30_000, 3, 2, 2))
    kept = (~lost).float()
    sizes = kept.sum(1).long().bincount(minlength=4) / len(kept)
    assert sizes[0] == 0
    torch.testing.assert_close(sizes[1:], torch.full((3,), 1 / 3), atol=0.015, rtol=0)
    single = kept[kept.sum(1) == 1].mean(0)
    torch.testing.assert_close(single, torch.full((3,), 1 / 3), atol=0.02, rtol=0)


def test_a_sample_keeps_at_least_one_of_the_modalities_that_it_has():
    x = torch.ones(500, 3, 2, 2)
    x[:, 0, 0, 0] = math.nan
    x[250:, 1] = 0  # a placeholder that stock preprocessing made zero
    lost = dropped(x)
    assert lost[:, 0].all()
    assert not lost[250:, 2].any()
    assert (~lost[:250, 1:]).any(1).all()
    assert lost[:250, 1].any()
    assert lost[:250, 2].any()


def test_other_channels_and_the_batch_itself_are_left_alone():
    x = torch.ones(64, 5, 2, 2)
    out = ModalityDropout()(x, ((0, 2), (1,)), 1.0, torch.Generator().manual_seed(0))
    assert out[:, 3:].isfinite().all()
    assert x.isfinite().all()
    whole = out.isnan().flatten(2).all(2)
    assert torch.equal(whole, out.isnan().flatten(2).any(2))
    assert torch.equal(whole[:, 0], whole[:, 2])


def test_warm_up_raises_the_rate_from_nothing():
    x = torch.ones(4000, 3, 2, 2)
    assert not dropped(x, 0.0, warm_up=0.5).any()
    half, all_ = (dropped(x, progress, warm_up=0.5).any(1).float().mean().item() for progress in (0.25, 0.5))
    assert half == pytest.approx(all_ / 2, abs=0.03)
    assert dropped(x, 0.0, warm_up=0.0).any()
    assert not dropped(x, probability=0.0).any()


def test_air_loses_nothing():
    assert not dropped(torch.zeros(8, 3, 2, 2)).any()


@pytest.mark.parametrize("options", [{"probability": 1.5}, {"warm_up": -0.1}])
def test_rates_are_between_0_and_1(options):
    with pytest.raises(ValueError, match=r"modality_dropout: .*between 0 and 1; correct it in the plans"):
        ModalityDropout(**options)


def test_a_dedicated_network_names_what_it_looks_at():
    assert check_dedicated(None, 3) == []
    assert check_dedicated([2, 0], 3) == [1]
    for wrong in ([], [3], [0, 0]):
        with pytest.raises(ValueError, match=r"some of the 3 modalities 0..2, each once"):
            check_dedicated(wrong, 3)
