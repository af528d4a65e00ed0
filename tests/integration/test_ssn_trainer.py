"""SSNTrainer through nnU-Net's commands, and ``nnunet-multimodal predict`` on its models and on nnU-Net's own."""

import json
import shutil

import numpy as np
import pytest
import SimpleITK

from nnunet_multimodal import cli
from tests.contracts import TrainerContract
from tests.nnunet import DATASET, PLANS, segmentation

SHORT, TWICE = "SSNTrainer_1epoch_2iterations", "SSNTrainer_2epochs_2iterations"


class TestSSNTrainer(TrainerContract):
    trainer = "SSNTrainer"


def test_head_and_backbone_combine(datasets, tmp_path):
    nnunet = datasets("regions_ignore")
    for trainer in ("CRNPSSNTrainer_1epoch_2iterations", "SSNDiagonalTrainer_1epoch_2iterations"):
        nnunet.train(trainer)
        output = nnunet.predict(trainer, "3d_fullres", tmp_path / trainer)
        assert segmentation(output / "case_0.nii.gz").shape == (18, 20, 22)


def test_training_sees_nnunets_nonzero_mask(datasets):
    """A patch that sticks out of the image: what sticks out is outside, and the network's input has no channel more."""
    nnunet = datasets("labels")
    trainer = nnunet.trainer(SHORT)
    with nnunet.environment():
        trainer.initialize()
        batch = next(trainer.get_dataloaders()[0])
    image, foreground = trainer.network.split_foreground(batch["data"])
    assert image.shape[1] == 3
    assert foreground.any()
    padding = (image == 0).all(1, keepdim=True)
    assert not (foreground & padding).float().mean() > 0.01


def predict(nnunet, trainer, output, *more, configuration="3d_fullres", images=None):
    images = images or nnunet.raw / DATASET / "imagesTr"
    model = ["-d", "900", "-tr", trainer, "-p", PLANS, "-c", configuration, "-f", "0", "-device", "cpu"]
    with nnunet.environment():
        assert cli.main(["predict", "-i", str(images), "-o", str(output), *model, *map(str, more)]) == 0
    return output


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def trained(datasets, tmp_path_factory):
    """Data with a model of SSNTrainer and one of nnU-Net's own trainer."""
    nnunet = datasets("labels").with_results(tmp_path_factory.mktemp("results"))
    for trainer in (SHORT, "nnUNetTrainer_1epoch_2iterations"):
        nnunet.train(trainer)
    return nnunet


@pytest.mark.parametrize("trainer", [SHORT, "nnUNetTrainer_1epoch_2iterations"])
def test_the_prediction_is_nnunets_and_its_commands_work_on_the_folder(trained, tmp_path, trainer):
    stock = trained.predict(trainer, "3d_fullres", tmp_path / "stock", "--save_probabilities")
    ours = predict(trained, trainer, tmp_path / "ours", "--samples", 3, "--save_probabilities", "--save-samples")
    for case in range(5):
        a, b = (np.load(folder / f"case_{case}.npz")["probabilities"] for folder in (stock, ours))
        np.testing.assert_allclose(a, b, atol=1e-6)  # nnU-Net exports in another process, with other threads
        assert np.array_equal(*(segmentation(folder / f"case_{case}.nii.gz") for folder in (stock, ours)))
    labels = trained.raw / DATASET / "labelsTr"
    trained(
        "nnUNetv2_evaluate_folder", labels, ours, "-djfile", ours / "dataset.json", "-pfile", ours / "plans.json",
        "-np", 1,
    )  # fmt: skip
    assert len(json.loads((ours / "summary.json").read_text())["metric_per_case"]) == 5
    trained("nnUNetv2_ensemble", "-i", stock, ours, "-o", tmp_path / "ensemble", "-np", 1)
    assert len(list((tmp_path / "ensemble").glob("case_*.nii.gz"))) == 5


def test_everything_that_can_be_written_is(trained, tmp_path):
    output = predict(trained, SHORT, tmp_path, "--samples", 3, "--save-samples", "--save-distribution")
    assert names(output / "samples")[:4] == [f"case_{c}__00{i}.nii.gz" for c, i in ((0, 0), (0, 1), (0, 2), (1, 0))]
    image = SimpleITK.ReadImage(str(trained.raw / DATASET / "imagesTr" / "case_0_0000.nii.gz"))
    maps = {}
    for name in ("entropy", "expected_entropy", "mutual_information"):
        written = SimpleITK.ReadImage(str(output / "uncertainty" / f"case_0_{name}.nii.gz"))
        assert written.GetSpacing() == image.GetSpacing()
        assert written.GetOrigin() == image.GetOrigin()
        maps[name] = SimpleITK.GetArrayFromImage(written)
        assert maps[name].min() >= 0
    assert maps["entropy"].max() <= np.log(3) + 1e-5
    total = maps["expected_entropy"] + maps["mutual_information"]
    np.testing.assert_allclose(maps["entropy"], total, atol=1e-5)
    parameters = np.load(output / "distribution" / "case_0.npz")
    assert parameters["fold_0_cov_factor"].shape[:3] == (1, 10, 3)
    assert parameters["fold_0_cov_diag"].shape == (1, *parameters["mean"].shape)
    assert not [path for path in output.rglob("*") if path.name.startswith(".")]


def test_derived_quantities_are_those_of_the_samples(trained, tmp_path):
    output = predict(trained, SHORT, tmp_path, "--samples", 5, "--save-samples")
    summary = json.loads((output / "case_0.json").read_text())
    samples = [segmentation(output / "samples" / f"case_0__{i:03d}.nii.gz") for i in range(5)]
    image = SimpleITK.ReadImage(str(output / "case_0.nii.gz"))
    voxel_ml = np.prod(image.GetSpacing()) / 1000
    for name, label in (("organ", 1), ("lesion", 2)):
        quantities = summary["labels"][name]
        volumes = [np.count_nonzero(sample == label) * voxel_ml for sample in samples]
        prediction = np.count_nonzero(segmentation(output / "case_0.nii.gz") == label) * voxel_ml
        assert quantities["volume_ml"]["prediction"] == pytest.approx(prediction, rel=1e-4)
        assert quantities["volume_ml"]["mean"] == pytest.approx(np.mean(volumes), rel=1e-4)
        assert quantities["volume_ml"]["p97.5"] == pytest.approx(np.percentile(volumes, 97.5), rel=1e-4)
        assert quantities["probability_present"] == np.mean(np.array(volumes) > 0)
        assert quantities["lesion_count"]["p2.5"] <= quantities["lesion_count"]["p97.5"]
    assert summary["samples"] == 5


def test_a_seed_gives_the_same_samples_whatever_else_is_predicted(trained, tmp_path):
    flags = ("--samples", 2, "--save-samples", "--maps")
    whole = predict(trained, SHORT, tmp_path / "whole", *flags)
    part = predict(trained, SHORT, tmp_path / "part", *flags, "-num_parts", 2, "-part_id", 1, "-npp", 0)
    other = predict(trained, SHORT, tmp_path / "other", *flags, "--seed", 1)
    assert names(part / "samples") == [f"case_{c}__00{i}.nii.gz" for c in (1, 3) for i in (0, 1)]
    assert not (part / "uncertainty").exists()
    same = [segmentation(folder / "samples" / "case_1__001.nii.gz") for folder in (whole, part, other)]
    assert np.array_equal(same[0], same[1])
    assert not np.array_equal(same[0], same[2])


def test_temperature_zero_leaves_the_prediction_alone(trained, tmp_path):
    output = predict(trained, SHORT, tmp_path, "--samples", 2, "--save-samples", "--temperature", 0)
    prediction = segmentation(output / "case_0.nii.gz")
    assert np.array_equal(segmentation(output / "samples" / "case_0__001.nii.gz"), prediction)
    entropy = segmentation(output / "uncertainty" / "case_0_mutual_information.nii.gz")
    assert entropy.max() < 1e-5


def test_an_interrupted_prediction_is_continued_where_it_stopped(trained, tmp_path):
    output = predict(trained, SHORT, tmp_path, "--samples", 2)
    before = {path.name: path.stat().st_mtime_ns for path in output.glob("case_*.json")}
    (output / "case_3.json").unlink()
    predict(trained, SHORT, tmp_path, "--samples", 2, "--continue_prediction")
    after = {path.name: path.stat().st_mtime_ns for path in output.glob("case_*.json")}
    assert [name for name in after if after[name] != before[name]] == ["case_3.json"]


@pytest.mark.parametrize(
    "changed", [("-step_size", 1), ("--disable_tta",), ("-chk", "checkpoint_best.pth"), ("-tr", TWICE), ("-f", "all")]
)
def test_what_another_model_predicted_is_predicted_again(trained, tmp_path, capsys, changed):
    (tmp_path / "images").mkdir()
    for file in (trained.raw / DATASET / "imagesTr").glob("case_[01]_*"):
        shutil.copy(file, tmp_path / "images")
    fold = trained.model(SHORT, "3d_fullres")
    if "all" in changed and not (fold / "fold_all").is_dir():
        shutil.copytree(fold / "fold_0", fold / "fold_all")
    twice = trained.model(TWICE, "3d_fullres")
    if TWICE in changed and not twice.is_dir():
        shutil.copytree(fold, twice)
    flags = ("--samples", 2, "--maps", "--continue_prediction")
    output = predict(trained, SHORT, tmp_path / "out", *flags, images=tmp_path / "images")
    first = {file.name: file.stat().st_mtime_ns for file in output.glob("case_*.json")}
    (output / "case_1.json").unlink()
    capsys.readouterr()
    predict(trained, SHORT, output, *flags, *changed, images=tmp_path / "images")
    assert f"{output}: predicted with another model or other flags, and now again: case_0\n" in capsys.readouterr().out
    again = {file.name: file.stat().st_mtime_ns for file in output.glob("case_*.json")}
    assert all(again[name] != first[name] for name in first)
    predict(trained, SHORT, output, *flags, *changed, images=tmp_path / "images")
    assert "now again" not in capsys.readouterr().out
    assert again == {file.name: file.stat().st_mtime_ns for file in output.glob("case_*.json")}


def test_predicting_again_leaves_nothing_of_the_earlier_run(trained, tmp_path):
    flags = ("--save-samples", "--save_probabilities")
    predict(trained, SHORT, tmp_path, "--samples", 3, *flags)
    predict(trained, SHORT, tmp_path, "--samples", 2, "--save-samples", "--maps", "entropy", "--continue_prediction")
    assert names(tmp_path / "samples") == [f"case_{c}__00{i}.nii.gz" for c in range(5) for i in (0, 1)]
    assert names(tmp_path / "uncertainty") == [f"case_{c}_entropy.nii.gz" for c in range(5)]
    assert not list(tmp_path.glob("*.npz"))


def test_cascades_regions_and_two_dimensions(datasets, tmp_path):
    nnunet = datasets("regions_ignore")
    nnunet.train(SHORT, "2d")
    output = predict(nnunet, SHORT, tmp_path / "2d", "--samples", 2, "--class-scale", "whole=2", configuration="2d")
    assert list(json.loads((output / "case_0.json").read_text())["labels"]) == ["whole", "lesion"]

    nnunet = datasets("labels")
    for fold in range(5):
        nnunet.train(SHORT, "3d_lowres", fold)
    nnunet.train(SHORT, "3d_cascade_fullres")
    lowres = predict(nnunet, SHORT, tmp_path / "lowres", "--samples", 2, configuration="3d_lowres")
    flags = ("--samples", 2, "-prev_stage_predictions", lowres)
    output = predict(nnunet, SHORT, tmp_path / "cascade", *flags, configuration="3d_cascade_fullres")
    assert len(list(output.glob("case_*.json"))) == 5
    with pytest.raises(ValueError, match=r"3d_lowres comes before.*-prev_stage_predictions"):
        predict(nnunet, SHORT, tmp_path / "cascade", "--samples", 2, configuration="3d_cascade_fullres")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--samples", 0), "--samples 0"),
        (("--class-scale", "liver=2"), "liver=2.*background, organ, lesion"),
        (("--class-scale", "organ=big"), "organ=big"),
        (("--class-scale", "organ=nan"), "organ=nan"),
        (("--seed", -1), "--seed -1"),
        (("--temperature", "inf"), "--temperature inf"),
        (("-part_id", 2), "-part_id 2"),
        (("-f", 3), "no fold_3"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_written(trained, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        predict(trained, SHORT, tmp_path / "output", *flags)
    assert not (tmp_path / "output").exists()


def test_case_names_of_nnunets_own_files_are_refused(trained, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "plans_0000.nii.gz").touch()
    with pytest.raises(ValueError, match="case named 'plans'"):
        predict(trained, SHORT, tmp_path / "output", images=tmp_path / "images")


def test_the_command_says_what_is_wrong_without_a_traceback(monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["nnunet-multimodal", "predict", "-i", "x", "-o", "y", "-d", "900", "-c", "2d", "--samples", "0"]
    )
    with pytest.raises(SystemExit, match="nnunet-multimodal: --samples 0"):
        cli.entry_point()


def test_an_empty_folder_is_refused(trained, tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match=r"no image ending in _0000\.nii\.gz"):
        predict(trained, SHORT, tmp_path / "output", images=tmp_path / "images")
