"""Several raters from their files to a trained model, through nnU-Net's own commands."""

import gzip
import json
import os
import shutil
from pathlib import Path

import blosc2
import numpy as np
import pytest
import SimpleITK
import torch

from nnunet_multimodal import cli
from nnunet_multimodal.errors import UserError
from nnunet_multimodal.preprocessing import MultimodalPreprocessor
from nnunet_multimodal.raters.preprocessing import raters_folder
from tests.nnunet import DATASET, PLANS, RATERS, NnUNet, make_dataset, segmentation, write_raters, write_raw


def consensus(nnunet, *flags):
    with nnunet.environment():
        return cli.main(["consensus", "-d", "900", "-np", "1", *flags])


@pytest.fixture(scope="module", params=["labels", "regions_ignore"])
def nnunet(request, tmp_path_factory):
    """Planned with stock plans, preprocessed with stock classes and then with ours."""
    made = make_dataset(tmp_path_factory.mktemp(request.param), request.param)
    write_raters(made, "ignore" in request.param)
    assert consensus(made, "--overwrite") == 0
    raters_folder(data_folder(made)).mkdir()  # of an earlier preprocessing
    made("nnUNetv2_preprocess", "-d", 900, "-plans_name", PLANS, "-c", "2d", "3d_fullres", "-np", 1)
    assert not raters_folder(data_folder(made)).exists()
    plain = {file.name: contents(file) for file in data_folder(made).glob("*.b2nd")}
    plans = made.plans()
    for configuration in ("2d", "3d_fullres"):
        plans["configurations"][configuration]["preprocessor_name"] = "MultimodalPreprocessor"
    made.write_plans(plans)
    made("nnUNetv2_preprocess", "-d", 900, "-plans_name", PLANS, "-c", "2d", "3d_fullres", "-np", 1)
    again = {file.name: contents(file) for file in data_folder(made).glob("*.b2nd")}
    assert plain.keys() == again.keys()
    assert all(np.array_equal(plain[name], again[name]) for name in plain)
    return made


def data_folder(nnunet):
    plans = nnunet.plans()["configurations"]["3d_fullres"]
    return nnunet.preprocessed / DATASET / plans["data_identifier"]


def contents(file):
    return np.asarray(blosc2.open(str(file))[:])


def set_policy(nnunet, policy):
    plans = nnunet.plans()
    for configuration in ("2d", "3d_fullres"):
        options = plans["configurations"][configuration]["nnunet_multimodal"]
        options.pop("raters", None)
        options |= {"raters": {"policy": policy}} if policy else {}
    nnunet.write_plans(plans)


def test_raters_lie_with_the_data_in_step_with_the_image(nnunet):
    folder = raters_folder(data_folder(nnunet))
    for case, names in RATERS.items():
        stack = contents(folder / f"case_{case}.b2nd")
        own = contents(data_folder(nnunet) / f"case_{case}_seg.b2nd")
        assert stack.shape == (4, *own.shape[1:])
        assert np.array_equal(stack[:1], own)
        for channel, name in enumerate(names, 1):
            # B and C are A moved by a voxel or two of the image; at the image's own spacing nothing else happens
            raw = segmentation(nnunet.raw / DATASET / "ratersTr" / f"case_{case}__{name}.nii.gz")
            assert np.bincount(stack[channel].ravel(), minlength=4).tolist() == pytest.approx(
                (np.bincount(raw.ravel(), minlength=4) * stack[channel].size / raw.size).tolist(), rel=0.15, abs=30
            )
        assert all(np.array_equal(channel, own[0]) for channel in stack[1 + len(names) :])
        described = json.loads((folder / f"case_{case}.json").read_text())
        assert list(described["raters"]) == list(names)


def test_each_step_has_the_raters_and_their_weights(nnunet):
    trainer = nnunet.trainer("MoSETrainer_1epoch_2iterations")
    with nnunet.environment():
        trainer.initialize()
        loader = trainer.get_dataloaders()[0]
        batch = next(loader)
        regions = trainer.label_manager.has_regions
        target = batch["target"]
        channels = {level.shape[1] for level in target}
        assert channels == {(3 if regions else 1) + 3}
        assert set(np.unique(target[0][:, -3:])) <= {0, 1, 2, 3}
        seen = []
        forward = trainer.loss.forward
        trainer.loss.forward = lambda output, own: seen.append((trainer.loss.step.raters, own)) or forward(output, own)
        trainer.train_step(batch)
    raters, own = seen[0]
    assert own[0].shape[1] == (3 if regions else 1)
    assert torch.equal(raters.labels.cpu(), target[0][:, -3:])
    given = {"case_0": [2 / 3, 1 / 3, 0], "case_1": [0.5, 0.5, 0], "case_2": [1, 0, 0], "case_4": [0.5, 0.5, 0]}
    for key, weights in zip(batch["keys"], raters.weights, strict=True):
        assert weights.tolist() == pytest.approx(given.get(key, [1 / 3] * 3))
    assert trainer.loss.step.raters is None


def test_stock_trainers_and_ours_train_on_the_same_data(nnunet, tmp_path):
    for trainer in ("nnUNetTrainer", "MoSETrainer"):
        name = f"{trainer}_1epoch_2iterations"
        nnunet.train(name, "3d_fullres")
        predicted = nnunet.predict(name, "3d_fullres", tmp_path / trainer)
        assert len(list(predicted.glob("case_*.nii.gz"))) == 5
    nnunet.train("SSNTrainer_1epoch_2iterations", "2d")


@pytest.mark.parametrize("trainer", ["EarlyFusionTrainer", "SSNTrainer", "CIMLTrainer"])
@pytest.mark.parametrize("policy", ["random", "mean"])
def test_policies_for_losses_of_one_target(nnunet, trainer, policy):
    set_policy(nnunet, policy)
    made = nnunet.trainer(f"{trainer}_1epoch_2iterations", "2d")
    with nnunet.environment():
        if trainer == "CIMLTrainer" and policy == "mean" and not made.label_manager.has_regions:
            with pytest.raises(UserError, match="'random' or 'consensus'"):
                made.initialize()
        else:
            made.initialize()
            loader = made.get_dataloaders()[0]
            made.loss.step.progress = 1.0
            assert np.isfinite(made.train_step(next(loader))["loss"])
    set_policy(nnunet, None)


def test_raters_of_an_earlier_preprocessing_are_refused(nnunet):
    folder = raters_folder(data_folder(nnunet))
    aside = folder.with_name("aside")
    folder.rename(aside)
    try:
        for trainer in ("SSNTrainer", "MoSETrainer"):
            made = nnunet.trainer(f"{trainer}_1epoch_2iterations")
            with nnunet.environment():
                made.initialize()
                with pytest.raises(UserError, match=r"ratersTr has raters, and .*MultimodalPrep"):
                    made.get_dataloaders()
    finally:
        aside.rename(folder)
    file = folder / "case_0.b2nd"
    kept = file.read_bytes()
    file.unlink()
    blosc2.asarray(np.zeros((4, 3, 3, 3), np.int16), urlpath=str(file))
    made = nnunet.trainer("SSNTrainer_1epoch_2iterations")
    with nnunet.environment():
        made.initialize()
        made.get_dataloaders()
        with pytest.raises(UserError, match=r"has shape \(3, 3, 3\) .*earlier preprocessing"):
            made.raters.load_case("case_0")
    file.unlink()
    file.write_bytes(kept)


def preprocess(nnunet, output, case="case_0"):
    """A case in this process, into a new folder."""
    output.mkdir()
    trainer = nnunet.trainer("MoSETrainer_1epoch_2iterations")
    raw = nnunet.raw / DATASET
    images, label = sorted(raw.glob(f"imagesTr/{case}_*")), raw / "labelsTr" / f"{case}.nii.gz"
    plan = trainer.plans_manager, trainer.configuration_manager, trainer.dataset_json
    MultimodalPreprocessor(verbose=False).run_case_save(str(output / case), [*map(str, images)], str(label), *plan)


def move(file):
    image = SimpleITK.ReadImage(str(file))
    image.SetOrigin((50, 0, 0))
    SimpleITK.WriteImage(image, str(file))


def stretch_and_flip(file):
    image = SimpleITK.ReadImage(str(file))
    image.SetSpacing((3, 3, 3))
    image.SetDirection((-1, 0, 0, 0, 1, 0, 0, 0, 1))
    SimpleITK.WriteImage(image, str(file))


def relabel(file):
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(file)) * 7, str(file))


def cut_off(file):
    """The last half of the voxels is not there; ITK's reader makes zeros of it."""
    content = gzip.decompress(file.read_bytes())
    file.write_bytes(gzip.compress(content[: len(content) // 2]))


DAMAGES = {
    move: r"case_0__A.nii.gz has origin \(50.0, 0.0, 0.0\) and .*case_0_0000.nii.gz .*; resample the label map",
    stretch_and_flip: r"case_0__A.nii.gz has spacing .*3.0.*; resample",
    relabel: "case_0__A.nii.gz: labels .*7.* and dataset.json declares 0, 1, 2",
    cut_off: r"case_0__A.nii.gz cannot be read .*; copy it again",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_raters_are_refused_before_and_in_preprocessing(nnunet, tmp_path, damage):
    file = nnunet.raw / DATASET / "ratersTr" / "case_0__A.nii.gz"
    preprocess(nnunet, tmp_path / "whole")
    assert contents(tmp_path / "whole" / "raters" / "case_0.b2nd").shape[0] == 4
    shutil.copy2(file, tmp_path / "kept")
    try:
        damage(file)
        with pytest.raises(UserError, match=DAMAGES[damage]):
            preprocess(nnunet, tmp_path / "damaged")
        with pytest.raises(UserError, match=DAMAGES[damage]):
            consensus(nnunet, "--check")
    finally:
        shutil.copy2(tmp_path / "kept", file)


def start(nnunet, name="MoSETrainer_1epoch_2iterations"):
    """A trainer as its training starts, and what its log says of raters."""
    trainer = nnunet.trainer(name)
    with nnunet.environment():
        trainer.initialize()
        trainer.get_tr_and_val_datasets()
    lines = Path(trainer.log_file).read_text().splitlines()
    return trainer, [line for line in lines if "aters" in line]


def test_raters_that_changed_since_are_refused_where_raw_data_is(nnunet, tmp_path):
    trainer, log = start(nnunet)
    assert "Raters of 4 cases, 1 to 3 each, policy 'random'" in log[-1]
    raw = nnunet.raw / DATASET
    case = next(case for case, described in trainer.raters.described.items() if "A" in described)
    file, table = raw / "ratersTr" / f"{case}__A.nii.gz", raw / "ratersTr" / "raters.csv"
    for each in (file, table):
        shutil.copy2(each, tmp_path)

    def refused():
        with pytest.raises(UserError, match=rf"raters was made of other files .*of {case} .*rater A.*preprocess again"):
            start(nnunet)
        for each in (file, table):
            shutil.copy2(tmp_path / each.name, each)

    table.write_text(f"case,rater,weight\n{case},A,0.3\n")
    refused()
    table.unlink()
    file.unlink()
    refused()
    relabel(file)
    refused()
    content = bytearray(file.read_bytes())
    content[4] ^= 1  # a time in its header, and as long as it was
    file.write_bytes(content)
    refused()
    (raw / "ratersTr").rename(tmp_path / "ratersTr")
    try:
        with pytest.raises(UserError, match="raters was made of other files"):
            start(nnunet)
    finally:
        (tmp_path / "ratersTr").rename(raw / "ratersTr")
    os.utime(file)  # a copy of the same content
    start(nnunet)
    raw.rename(tmp_path / DATASET)
    try:
        assert "Raters of 4 cases" in start(nnunet)[1][-1]
    finally:
        (tmp_path / DATASET).rename(raw)


def test_the_log_says_that_there_are_no_raters(nnunet, tmp_path):
    folder, raw = raters_folder(data_folder(nnunet)), nnunet.raw / DATASET
    folder.rename(tmp_path / "raters")
    raw.rename(tmp_path / DATASET)
    try:
        for name in ("MoSETrainer", "SSNTrainer"):
            trainer, log = start(nnunet, f"{name}_1epoch_2iterations")
            assert trainer.raters is None
            assert "No raters, training on one annotation of each case, that in labelsTr" in log[-1]
        assert not start(nnunet, "EarlyFusionTrainer_1epoch_2iterations")[1]
    finally:
        (tmp_path / "raters").rename(folder)
        (tmp_path / DATASET).rename(raw)


def test_weights_stay_where_they_are_drawn_from(nnunet):
    """Nothing can be fetched from the meta device."""
    trainer = nnunet.trainer("SSNTrainer_1epoch_2iterations")
    with nnunet.environment():
        trainer.initialize()
        batch = next(trainer.get_dataloaders()[0])
    trainer.device = torch.device("meta")
    targets = trainer._with_raters(batch)["target"]
    assert {target.device.type for target in targets} == {"meta"}
    assert [target.shape[2:] for target in targets] == [target.shape[2:] for target in batch["target"]]


@pytest.mark.parametrize("backbone", ["CRNP", "ShaSpec", "CIML"])
def test_every_backbone_takes_a_step_with_raters(nnunet, backbone):
    trainer = nnunet.trainer(f"{backbone}MoSETrainer_1epoch_2iterations", "2d")
    with nnunet.environment():
        trainer.initialize()
        loader = trainer.get_dataloaders()[0]
        before = [parameter.clone() for parameter in trainer.network.parameters()]
        assert np.isfinite(trainer.train_step(next(loader))["loss"])
    assert trainer.raters.num_raters == 3
    assert any(not torch.equal(*pair) for pair in zip(before, trainer.network.parameters(), strict=True))


# --- the command


def test_the_consensus_of_each_kind(tmp_path, capsys):
    nnunet = NnUNet(tmp_path)
    write_raw(nnunet, "labels")
    folder = write_raters(nnunet, ignore=False)
    with pytest.raises(UserError, match="label maps of 5 of the cases; --overwrite"):
        consensus(nnunet)
    assert consensus(nnunet, "--check") == 0
    assert "5 cases with 1 to 3 raters, with weights" in capsys.readouterr().out
    assert consensus(nnunet, "--overwrite") == 0
    labels = nnunet.raw / DATASET / "labelsTr"
    first = segmentation(labels / "case_0.nii.gz")
    assert np.array_equal(first, segmentation(folder / "case_0__A.nii.gz"))  # twice the weight
    assert consensus(nnunet, "--overwrite", "--method", "staple") == 0
    staple = segmentation(labels / "case_3.nii.gz")
    assert np.array_equal(staple, segmentation(folder / "case_3__A.nii.gz"))  # between B and C
    with pytest.raises(UserError, match=r"case_1 has no rater 'C'\ncase_2 has no rater 'C'"):
        consensus(nnunet, "--overwrite", "--method", "C")
    assert np.array_equal(segmentation(labels / "case_3.nii.gz"), staple)
    assert SimpleITK.ReadImage(str(labels / "case_3.nii.gz")).GetSpacing() == pytest.approx((1.0, 1.1, 1.5))
    assert not list(labels.glob(".part*"))


def test_what_is_wrong_with_raters_is_all_said_at_once(tmp_path):
    nnunet = NnUNet(tmp_path)
    write_raw(nnunet, "labels")
    folder = write_raters(nnunet, ignore=False)
    moved = SimpleITK.ReadImage(str(folder / "case_0__B.nii.gz"))
    moved.SetSpacing((1.0, 1.0, 1.0))
    SimpleITK.WriteImage(moved, str(folder / "case_0__B.nii.gz"))
    other = SimpleITK.ReadImage(str(folder / "case_1__A.nii.gz")) * 9
    SimpleITK.WriteImage(other, str(folder / "case_1__A.nii.gz"))
    (folder / "case_3__C.nii.gz").write_bytes(b"nothing")
    images = nnunet.raw / DATASET / "imagesTr"
    (images / "case_4_0000.nii.gz").write_bytes(b"nothing")
    with pytest.raises(UserError) as error:
        consensus(nnunet, "--check")
    for message in (
        "case_0__B.nii.gz has spacing",
        "case_1__A.nii.gz: labels 9, 18",
        "case_3__C.nii.gz cannot be",
        "case_4_0000.nii.gz cannot be",
    ):
        assert message in str(error.value)
    kept = (images / "case_0_0000.nii.gz").read_bytes()
    (images / "case_0_0000.nii.gz").write_bytes(kept[:-100])
    with pytest.raises(UserError, match=r"case_0_0000.nii.gz cannot be read"):  # which nnU-Net chooses its reader by
        consensus(nnunet, "--check")
    (images / "case_0_0000.nii.gz").write_bytes(kept)
    for file in folder.glob("case_2__*"):
        file.rename(folder / "case_9__B.nii.gz")
    with pytest.raises(UserError, match=r"case_9_0000.nii.gz is not there(.|\n)*case_2 has an image and no rater"):
        consensus(nnunet, "--check")


def test_samples_with_weights_against_the_raters(tmp_path):
    nnunet = make_dataset(tmp_path, "labels")
    folder = write_raters(nnunet, ignore=False).rename(tmp_path / "raters")
    trainer = "MoSETrainer_1epoch_2iterations"
    nnunet.train(trainer, "2d")
    output = tmp_path / "out"
    images = str(nnunet.raw / DATASET / "imagesTr")
    model = ["-d", "900", "-p", PLANS, "-tr", trainer, "-c", "2d", "-f", "0", "-device", "cpu", "--disable_tta"]
    flags = ["--samples", "6", "--save-samples", "--save_probabilities", "--disable_progress_bar"]
    with nnunet.environment():
        cli.main(["predict", "-i", images, "-o", str(output), *model, *flags, "--compact", "--save-distribution"])
        first = segmentation(output / "samples" / "case_0__005.nii.gz")
        summary = json.loads((output / "case_0.json").read_text())
        assert len(summary["sample_weights"]) == 6
        assert sum(summary["sample_weights"]) == pytest.approx(1)
        assert summary["sample_weights"][:2] == pytest.approx(summary["sample_weights"][2:4])  # the experts again
        assert np.load(output / "distribution" / "case_0.npz")["fold_0_expert_weights"].shape == (2,)
        stock = nnunet.predict(trainer, "2d", tmp_path / "stock", "--disable_tta")
        assert np.array_equal(segmentation(stock / "case_0.nii.gz"), segmentation(output / "case_0.nii.gz"))
        labels = str(nnunet.raw / DATASET / "labelsTr")
        assert cli.main(["evaluate", labels, str(output), "--raters", str(folder), "-np", "1"]) == 0
        compact = json.loads((output / "evaluation.json").read_text())
        cli.main(["predict", "-i", images, "-o", str(output), *model, *flags])  # drawn by weight instead
        drawn = ["evaluate", str(folder), str(output), "-np", "1", "--samples", "2", "6", "-o"]
        assert cli.main([*drawn, str(output / "drawn.json")]) == 0
    assert json.loads((output / "case_0.json").read_text())["sample_weights"] is None
    assert segmentation(output / "samples" / "case_0__005.nii.gz").shape == first.shape
    measured = json.loads((output / "drawn.json").read_text())
    columns = ("GED2", "M_IoU", "ECE", "interrater_Dice", "within_raters", "volume_CRPS", "volume_coverage")
    for column in columns:
        assert np.isfinite([found["foreground_mean"][column] for found in (compact, measured)]).all(), column
    assert measured["foreground_mean"]["GED2_6"] == measured["foreground_mean"]["GED2"]
    assert measured["foreground_mean"]["GED2_2"] > 0
    assert compact["agreement"]["1"].keys() == measured["agreement"]["1"].keys() == {"A", "B", "C"}
    assert compact["agreement"]["1"]["B"]["cases"] == 4
    for name in ("evaluation", "drawn"):
        assert all((output / f"{name}_{end}").is_file() for end in ("agreement.csv", "reliability.png"))
    plain = "EarlyFusionTrainer_1epoch_2iterations"
    nnunet.train(plain, "2d")
    model[model.index(trainer)] = plain
    with nnunet.environment(), pytest.raises(UserError, match=f"--compact: {plain} has no weights"):
        cli.main(["predict", "-i", images, "-o", str(output), *model, *flags, "--compact"])
