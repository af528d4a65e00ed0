"""The demo, run as a user runs it, on a miniature dataset with regions."""

import json
import math

import matplotlib.image
import pytest

from nnunet_multimodal.cli import main
from nnunet_multimodal.datasets.synthetic import write_dataset

REGIONS = {"background": 0, "whole": [1, 2, 3], "inner": [2, 3], "core": 3}


def demo(data, out, *more):
    length = ("--epochs", "1", "--iterations", "2", "--planner", "nnUNetPlannerTiny", "--device", "cpu")
    arguments = ("demo", "--data", data, "--out", out, "--trainers", "CRNPTrainer", *length, *more)
    return main([str(argument) for argument in arguments])


def snapshot(folder):
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "Dataset017_Regions"
    write_dataset(folder, num_training=5, num_test=0)
    for image in folder.glob("imagesTr/*_0002.nii.gz"):  # two modalities are enough and faster
        image.unlink()
    regions = {"channel_names": {"0": "T1", "1": "T2"}, "labels": REGIONS, "regions_class_order": [1, 2, 3]}
    file = folder / "dataset.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **regions}))
    return folder


@pytest.fixture(scope="module")
def out(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    before = snapshot(data)
    assert demo(data, out) == 0, "\n".join(log.read_text()[-2000:] for log in (out / "logs").glob("*.log"))
    assert snapshot(data) == before
    return out


def leaves(value):
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
    else:
        yield value


def test_results_have_every_region_of_the_held_out_case(out):
    results = json.loads((out / "results.json").read_text())
    assert set(results["table"]["CRNPTrainer"]["structures"]) == {"whole", "inner", "core"}
    assert 0 <= results["table"]["CRNPTrainer"]["mean"]["dice"] <= 1
    assert results["table"]["CRNPTrainer"]["training_s"] > 0
    splits = json.loads((out / "nnUNet_preprocessed" / "Dataset017_Regions" / "splits_final.json").read_text())
    assert list(results["cases"]["CRNPTrainer"]) == splits[0]["val"]
    assert all(value is None or not isinstance(value, float) or math.isfinite(value) for value in leaves(results))
    assert str(out.parent) not in json.dumps(results)


def test_dice_is_that_of_nnunet_and_hd95_is_there_where_both_have_the_region(out):
    results = json.loads((out / "results.json").read_text())
    summary = json.loads((out / "evaluation" / "CRNPTrainer" / "summary.json").read_text())
    (case,) = results["cases"]["CRNPTrainer"].values()
    for name, key in (("whole", "(1, 2, 3)"), ("inner", "(2, 3)"), ("core", "3")):
        metrics = summary["metric_per_case"][0]["metrics"][key]
        assert case[name]["dice"] == pytest.approx(metrics["Dice"])
        assert (case[name]["hd95_mm"] is None) == (metrics["n_pred"] == 0)


def test_picture_and_uncertainty_are_there(out):
    picture = matplotlib.image.imread(out / "results.png")
    assert picture.shape[0] > 300
    assert picture.std() > 0.05
    (case,) = json.loads((out / "results.json").read_text())["cases"]["CRNPTrainer"]
    assert sorted(file.name for file in (out / "uncertainty").glob("*.nii.gz")) == [
        f"{case}_{channel:04d}.nii.gz" for channel in range(2)
    ]


def test_a_second_run_does_nothing_again_and_a_deleted_table_is_made_again(out, data):
    (out / "results.json").unlink()
    made = {file: time for file, time in snapshot(out).items() if file.name not in ("results.json", "results.png")}
    assert demo(data, out) == 0
    assert (out / "results.json").exists()
    assert {file: file.stat().st_mtime_ns for file in made} == made


@pytest.mark.parametrize(("option", "name"), [(("--seed", 1), "seed"), (("--fold", 1), "fold")])
def test_changed_settings_are_refused(out, data, capsys, option, name):
    assert demo(data, out, *option) == 1
    error = capsys.readouterr().err
    assert f"{name} is 1" in error
    assert str(out / "demo.json") in error
    assert "--out" in error
