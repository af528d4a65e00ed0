import os

import numpy as np
import pytest
import torch
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from skimage import io

from nnunet_multimodal.errors import UserError
from nnunet_multimodal.heads.base import RaterLabels, encode_target
from nnunet_multimodal.losses import SoftTargets, accept_soft_targets
from nnunet_multimodal.raters.consensus import majority, staple
from nnunet_multimodal.raters.files import describe, find_raters, has_changed, read_rater
from nnunet_multimodal.raters.preprocessing import list_raters
from nnunet_multimodal.raters.training import AppendRaters, RaterPolicy, SetRatersAside, split_targets

PLAIN = LabelManager({"background": 0, "a": 1, "b": 2}, None)
IGNORE = LabelManager({"background": 0, "a": 1, "b": 2, "ignore": 3}, None)
REGIONS = LabelManager({"background": 0, "whole": [1, 2], "core": 2}, [1, 2])
REGIONS_IGNORE = LabelManager({"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, [1, 2])


# --- files


def write(folder, names, weights=None):
    for name in names:
        (folder / f"{name}.nii.gz").touch()
    if weights is not None:
        (folder / "raters.csv").write_text("\n".join(["case,rater,weight", *weights]) + "\n")


def test_files_are_found_by_case_and_rater(tmp_path):
    write(tmp_path, ["a__1__x", "a__1__y", "b__z"], ["a__1,x,3"])
    raters = find_raters(tmp_path, ".nii.gz")
    assert {case: [(r.name, r.weight) for r in found] for case, found in raters.items()} == {
        "a__1": [("x", 0.75), ("y", 0.25)],
        "b": [("z", 0.5)],
    }
    assert find_raters(tmp_path / "not_there", ".nii.gz") == {}


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        (["case"], None, "not CASE__RATER"),
        (["__x"], None, "not CASE__RATER"),
        (["a__x"], ["a,y,1"], "there is no a__y"),
        (["a__x"], ["a,x,-1"], "'a,x,-1' is not"),
        (["a__x"], ["a,x,nan"], "'a,x,nan' is not"),
        (["a__x"], ["a,x"], "'a,x' is not"),
        (["a__x"], ["a,x,1", "a,x,2"], "twice"),
        (["a__x"], ["a,x,0"], "all raters of a have weight 0"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, names, weights, message):
    write(tmp_path, names, weights)
    with pytest.raises(UserError, match=message):
        find_raters(tmp_path, ".nii.gz")


def test_a_rater_with_another_ending_is_refused_by_name(tmp_path):
    write(tmp_path, ["a__x"])
    (tmp_path / "dataset.json").touch()
    (tmp_path / "a__x.json").touch()  # nnU-Net's, beside a TIFF
    assert list(find_raters(tmp_path, ".nii.gz")) == ["a"]
    (tmp_path / "a__y.nrrd").touch()
    with pytest.raises(UserError, match=r"a__y\.nrrd does not end in \.nii\.gz"):
        find_raters(tmp_path, ".nii.gz")


def test_a_table_with_other_columns_is_refused(tmp_path):
    write(tmp_path, ["a__x"])
    (tmp_path / "raters.csv").write_text("name,weight\n")
    with pytest.raises(UserError, match="begins with 'name,weight'"):
        find_raters(tmp_path, ".nii.gz")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_table_of_a_spreadsheet_is_read(tmp_path, encoding):
    write(tmp_path, ["a__\xe4", "a__x"])
    (tmp_path / "raters.csv").write_text("case,rater,weight\r\na,\xe4,3\r\n", encoding=encoding)
    assert {rater.name: rater.weight for rater in find_raters(tmp_path, ".nii.gz")["a"]} == {"\xe4": 0.75, "x": 0.25}


@pytest.mark.parametrize(("encoding", "why"), [("latin-1", "codec can't decode"), ("utf-16", "codec can't decode")])
def test_a_table_that_is_not_utf_8_is_refused(tmp_path, encoding, why):
    write(tmp_path, ["a__\xe4"])
    (tmp_path / "raters.csv").write_text("case,rater,weight\na,\xe4,1\n", encoding=encoding)
    with pytest.raises(UserError, match=rf"raters.csv cannot be read \(.*{why}.*\); save it as CSV in UTF-8"):
        find_raters(tmp_path, ".nii.gz")


@pytest.mark.parametrize("factor", [1.0, 2.0**-170, 2.0**-1074, 2.0**130, 2.0**1020])
def test_weights_count_in_relation_to_each_other(tmp_path, factor):
    """In float32 such factors are 0 or infinite; in proportion 3 to 1 and 2 nobody has a majority."""
    write(tmp_path, ["a__x", "a__y", "a__z"], [f"a,x,{3 * factor}", f"a,y,{factor}", f"a,z,{2 * factor}"])
    weights = np.array([rater.weight for rater in find_raters(tmp_path, ".nii.gz")["a"]])
    assert np.array_equal(weights / weights.sum(), [1 / 2, 1 / 6, 1 / 3])
    maps = np.array([[2, 1, 1, 1], [0, 1, 2, 0], [0, 1, 0, 1]])
    assert majority(maps, weights, PLAIN).tolist() == [0, 1, 1, 1]
    assert majority(maps, weights, REGIONS).tolist() == [0, 1, 1, 1]
    assert np.isfinite(weights.astype(np.float32) / weights.astype(np.float32).sum()).all()


def test_a_folder_is_listed_once_as_long_as_it_stays_the_same(tmp_path):
    assert list_raters(tmp_path / "not_there", ".nii.gz") == ({}, 0)
    write(tmp_path, ["a__x", "a__y", "b__x"], ["a,x,3"])
    raters, most = list_raters(tmp_path, ".nii.gz")
    assert (list(raters), most) == (["a", "b"], 2)
    assert list_raters(tmp_path, ".nii.gz")[0] is raters
    write(tmp_path, ["a__z"])
    assert [rater.name for rater in list_raters(tmp_path, ".nii.gz")[0]["a"]] == ["x", "y", "z"]
    (tmp_path / "raters.csv").write_text("case,rater,weight\n")
    assert list_raters(tmp_path, ".nii.gz")[0]["a"][0].weight == 0.5


def test_a_rater_is_known_again_by_weight_and_content(tmp_path):
    write(tmp_path, ["a__x"])
    (rater,) = find_raters(tmp_path, ".nii.gz")["a"]
    rater.file.write_bytes(b"one")
    known = describe(rater)
    assert not has_changed(rater, known)
    os.utime(rater.file, ns=(0, 0))
    assert not has_changed(rater, known)
    assert has_changed(rater._replace(weight=0.25), known)
    for content in (b"two", b"longer"):
        rater.file.write_bytes(content)
        assert has_changed(rater, known)


@pytest.mark.parametrize(
    ("shape", "value", "message"),
    [
        ((8, 9), 1, None),
        ((8, 9, 3), 1, "a__x.png has 3 channels; a label map has one"),
        ((8, 8), 1, r"a__x.png has shape \(1, 8, 8\) and image.png \(1, 8, 9\); resample"),
        ((8, 9), 4, "a__x.png: labels 4, and dataset.json declares 0, 1, 2"),
        ((8, 8), 4, r"has shape .*\n.*labels 4"),
    ],
)
def test_a_rater_is_checked_as_other_label_maps_are(tmp_path, shape, value, message):
    file = tmp_path / "a__x.png"
    io.imsave(file, np.full(shape, value, np.uint8), check_contrast=False)
    arguments = NaturalImage2DIO(), file, "image.png", (1, 8, 9), {"spacing": (999, 1, 1)}, [0, 1, 2]
    if message is None:
        assert np.array_equal(read_rater(*arguments), np.ones((1, 1, 8, 9)))
    else:
        with pytest.raises(UserError, match=message):
            read_rater(*arguments)


# --- consensus


def test_the_majority_wins_and_ties_go_to_the_lower_label():
    maps = np.array([[0, 1, 1, 2, 3], [0, 1, 2, 2, 3], [1, 2, 0, 0, 3], [1, 1, 0, 3, 3]])
    assert majority(maps, np.ones(4), IGNORE).tolist() == [0, 1, 0, 2, 3]
    assert majority(maps, np.array([1.0, 1, 3, 1]), IGNORE).tolist() == [1, 1, 0, 0, 3]
    assert majority(maps[:1], np.ones(1), IGNORE).tolist() == maps[0].tolist()


def test_regions_are_voted_on_one_by_one():
    """No label has a majority of voxel 0 and the region of both has one."""
    maps = np.array([[1, 2, 0, 3], [2, 2, 0, 3], [0, 1, 1, 3]])
    assert majority(maps, np.ones(3), REGIONS_IGNORE).tolist() == [1, 2, 0, 3]
    assert majority(maps[:, :3], np.ones(3), REGIONS).tolist() == [1, 2, 0]


def test_staple_outvotes_a_rater_who_is_often_wrong():
    rng = np.random.default_rng(0)
    truth = np.zeros((1, 24, 24), int)
    truth[0, 4:14, 6:20] = 1
    truth[0, 8:12, 8:16] = 2
    good = [np.where(rng.random(truth.shape) < 0.02, rng.integers(0, 3, truth.shape), truth) for _ in range(3)]
    bad = [np.where(rng.random(truth.shape) < 0.6, rng.integers(0, 3, truth.shape), truth)]
    for labels in (PLAIN, REGIONS):
        agreed = staple(np.stack(good + bad), np.ones(4), labels)
        assert (agreed == truth).mean() > 0.99
    assert np.array_equal(staple(truth[None], np.ones(1), PLAIN), truth)
    assert np.array_equal(staple(np.stack([truth, 1 - truth]), np.array([1.0, 0]), PLAIN), truth)


def test_staple_leaves_ignored_voxels_to_the_others():
    rng = np.random.default_rng(0)
    truth = np.zeros((1, 16, 16), int)
    truth[0, 3:12, 3:12] = 1
    maps = np.stack([truth] * 3)
    maps[0] = np.where(rng.random(truth.shape) < 0.05, 1 - maps[0], maps[0])
    maps[1:, 0, 8:] = 3
    maps[:, 0, 15] = 3
    for labels in (IGNORE, REGIONS_IGNORE):
        agreed = staple(maps, np.ones(3), labels)
        assert np.array_equal(agreed[0, :8], truth[0, :8])
        assert np.array_equal(agreed[0, 8:15], maps[0, 0, 8:15])
        assert (agreed[0, 15] == 3).all()


# --- augmentation


@pytest.mark.parametrize("cascade", [False, True])
def test_the_consensus_alone_is_seen_between_the_two_transforms(cascade):
    segmentation = torch.arange(5 + cascade).view(-1, 1, 1).expand(-1, 2, 2)
    data = SetRatersAside(cascade)(image=torch.zeros(1, 2, 2), segmentation=segmentation)
    assert data["segmentation"][:, 0, 0].tolist() == ([0, 5] if cascade else [0])
    data["segmentation"] = torch.ones(3, 2, 2, dtype=torch.bool)
    joined = AppendRaters()(**data)["segmentation"]
    assert joined[:, 0, 0].tolist() == [1, 1, 1, 1, 2, 3, 4]
    target, raters = split_targets([joined[None]], 4, regions=True)
    assert (target[0].dtype, target[0].shape[1], raters[0][0, :, 0, 0].tolist()) == (torch.bool, 3, [1, 2, 3, 4])


def test_without_raters_nothing_changes():
    segmentation = torch.arange(2).view(-1, 1, 1).expand(-1, 2, 2)
    data = AppendRaters()(**SetRatersAside(True)(image=torch.zeros(1, 2, 2), segmentation=segmentation))
    assert torch.equal(data["segmentation"], segmentation)


# --- policies

LABELS = torch.tensor([[[0, 1, 3], [2, 1, 3]], [[0, 3, 1], [0, 3, 1]]])[..., None]  # (B, R, 3, 1)
WEIGHTS = torch.tensor([[0.25, 0.75], [1.0, 0.0]])


def test_the_mean_is_the_weighted_probability_and_ignored_votes_do_not_count():
    target = RaterPolicy(IGNORE, 3, "mean")(None, [LABELS], WEIGHTS)
    assert target[0, :, :, 0].T.tolist() == [[0.25, 0.0, 0.75], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    indicator, valid = encode_target(target, 3, IGNORE)
    assert torch.equal(indicator, target)
    assert valid[:, 0, :, 0].tolist() == [[True, True, False], [True, False, True]]
    regions = RaterPolicy(REGIONS_IGNORE, 2, "mean")([None], [LABELS], WEIGHTS)[0]
    assert regions[0, :, :, 0].tolist() == [[0.75, 1.0, 0.0], [0.75, 0.0, 0.0], [0.0, 0.0, 1.0]]


def test_a_rater_is_drawn_by_weight_the_same_at_every_resolution():
    torch.manual_seed(0)
    policy = RaterPolicy(IGNORE, 3, "random")
    drawn = [policy([None, None], [LABELS, LABELS[:, :, ::2]], WEIGHTS) for _ in range(400)]
    for fine, coarse in drawn:
        assert torch.equal(fine[:, :, ::2], coarse)
        assert torch.equal(fine[1], LABELS[1, :1])
    second = np.mean([fine[0, 0, 0, 0].item() == 2 for fine, _ in drawn])
    assert 0.68 < second < 0.82
    regions = RaterPolicy(REGIONS_IGNORE, 2, "random")(None, [LABELS], torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert regions.dtype == torch.bool
    assert regions[0, :, :, 0].tolist() == [[True, True, False], [True, False, False], [False, False, True]]


def test_the_consensus_is_nnunets_target():
    target = object()
    assert RaterPolicy(PLAIN, 3)(target, [LABELS], WEIGHTS) is target
    with pytest.raises(ValueError, match=r"policy='best'.*consensus, random, mean"):
        RaterPolicy(PLAIN, 3, "best")


def stock(ignore=None):
    dice = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
    return DC_and_CE_loss(dice, {}, 1.0, 1.0, ignore, MemoryEfficientSoftDiceLoss)


def test_soft_targets_of_one_opinion_have_nnunets_loss():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 8, 8), torch.randint(0, 4, (2, 1, 8, 8))
    soft = RaterPolicy(IGNORE, 3, "mean")(None, [labels.expand(-1, 2, -1, -1)], WEIGHTS)
    loss = SoftTargets(stock(3))
    torch.testing.assert_close(loss(logits, soft), stock(3)(logits, labels))
    torch.testing.assert_close(loss(logits, labels), stock(3)(logits, labels))


def test_losses_of_labels_alone_refuse_soft_targets():
    with pytest.raises(UserError, match=r"segmentors of CIML.*'random' or 'consensus'"):
        accept_soft_targets(stock(), PLAIN, predicts=True)
    with pytest.raises(UserError, match="CrossEntropyLoss"):
        accept_soft_targets(torch.nn.CrossEntropyLoss(), PLAIN, predicts=False)
    loss = torch.nn.BCEWithLogitsLoss()
    assert accept_soft_targets(loss, REGIONS, predicts=True) is loss


def test_labels_are_encoded_for_each_rater():
    indicator, valid = RaterLabels(LABELS, WEIGHTS).encode(3, IGNORE)
    assert indicator.shape == (2, 2, 3, 3, 1)
    assert valid[0, 0, :, 0].tolist() == [True, True, False]
    assert indicator[0, 1, :, 0, 0].tolist() == [False, False, True]
    regions, _ = RaterLabels(LABELS, WEIGHTS).encode(2, REGIONS)
    assert regions[0, 1, :, 0, 0].tolist() == [True, True]
    assert regions[0, 0, :, 1, 0].tolist() == [True, False]
