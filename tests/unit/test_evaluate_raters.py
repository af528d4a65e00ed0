"""Evaluations against several raters: what they ignore, tables of each, the first samples, raters as the reference."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from skimage import io

from nnunet_multimodal.cli import main
from nnunet_multimodal.errors import UserError
from nnunet_multimodal.evaluate.reliability import draw_reliability
from nnunet_multimodal.metrics.calibration import expected_calibration_error, reliability_curve
from nnunet_multimodal.raters.consensus import majority
from tests.nnunet import LABELS
from tests.unit.test_evaluate import EVALUATED, blobs, describe, left_out, read, save

RATERS = ("jo", "kim", "lee")


@pytest.fixture
def folders(tmp_path):
    """Cases with references, predictions, samples and raters: folders.write(kind), then folders.run(...)."""
    gt, pred, raters = tmp_path / "gt", tmp_path / "pred", tmp_path / "raters"

    def write(kind="labels", cases="ab", samples=4):
        describe(pred, kind)
        gt.mkdir(exist_ok=True)
        for seed, case in enumerate(cases):
            save(gt / f"{case}.nii.gz", blobs(seed))
            save(pred / f"{case}.nii.gz", blobs(100 + seed))
            for i in range(samples):
                save(pred / "samples" / f"{case}__{i:03d}.nii.gz", blobs(200 + 10 * seed + i))
            for i, name in enumerate(RATERS):
                save(raters / f"{case}__{name}.nii.gz", blobs(300 + 10 * seed + i))

    def run(*arguments, references=gt, output="evaluation"):
        flags = ["-np", "1", "-o", str(pred / f"{output}.json"), *map(str, arguments)]
        assert main(["evaluate", str(references), str(pred), *flags]) == 0
        assert not list(pred.glob(".*"))
        return SimpleNamespace(
            json=json.loads((pred / f"{output}.json").read_text()),
            csv=pd.read_csv(pred / f"{output}.csv", dtype={"values": str}).set_index(["case", "label"]),
        )

    return SimpleNamespace(gt=gt, pred=pred, raters=raters, write=write, run=run)


def agreement(folders, name="evaluation"):
    table = pd.read_csv(folders.pred / f"{name}_agreement.csv", dtype={"values": str})
    return table.set_index(["case", "label", "rater"])


# --- what raters ignore


@pytest.mark.parametrize("kind", ["ignore", "regions_ignore"])
def test_a_rater_who_ignores_everything_is_left_out_and_named(folders, kind, capsys):
    folders.write(kind)
    expected = folders.run("--raters", folders.raters)
    save(folders.raters / "a__max.nii.gz", np.full((8, 10, 12), 3, np.uint8))
    found = folders.run("--raters", folders.raters)
    pd.testing.assert_frame_equal(found.csv, expected.csv)
    assert left_out(found) == [("a", "raters", "a rater ignores every voxel")]
    assert "left out of raters: 1 case, a rater ignores every voxel: a (max)\n" in capsys.readouterr().out
    assert "max" not in agreement(folders).index.get_level_values("rater")


def test_a_wrong_prediction_is_wrong_whatever_one_rater_ignores(folders):
    folders.write("ignore", cases="a", samples=0)
    lesion, wrong = np.zeros((2, 8, 10, 12), np.uint8)
    lesion[1:4, 1:4, 1:4], wrong[5:, 6:, 8:] = 1, 1
    save(folders.pred / "a.nii.gz", wrong)
    for name in RATERS:
        save(folders.raters / f"a__{name}.nii.gz", lesion)
    save(folders.raters / "a__max.nii.gz", np.full_like(lesion, 3))
    row = folders.run("--raters", folders.raters).csv.loc["a", "organ"]
    assert row["GED2"] == pytest.approx(2)
    assert row[["M_IoU", "rater_Dice", "within_raters"]].tolist() == pytest.approx([0, 0, 0])
    half = np.where(np.arange(12) < 6, lesion, 3).astype(np.uint8)  # the prediction lies in the other half
    save(folders.raters / "a__max.nii.gz", half)
    found = folders.run("--raters", folders.raters)
    assert ("a", "raters", "a rater ignores every voxel") not in left_out(found)
    row = found.csv.loc["a", "organ"]
    assert row["rater_Dice"] == row["M_IoU"] == pytest.approx(0)
    assert row["GED2"] > 1
    assert row["interrater_Dice"] == 1


def test_a_case_of_which_nobody_says_anything_is_in_no_mean(folders, capsys):
    folders.write("ignore", cases="abc")
    silent = np.full((8, 10, 12), 3, np.uint8)
    for name in RATERS:
        save(folders.raters / f"b__{name}.nii.gz", silent)
    for case in "abc":
        uniform = np.full((3, 8, 10, 12), 1 / 3, np.float32)
        np.savez_compressed(folders.pred / f"{case}.npz", probabilities=uniform)
    found = folders.run("--raters", folders.raters)
    entries = [(entry["case"], entry["what"], entry["detail"]) for entry in found.json["left_out"]]
    assert entries == [("b", "samples, ECE", "jo, kim, lee")]
    measured = found.csv.loc[["a", "c"]].xs("organ", level="label")
    for column in ("GED2", "M_IoU", "rater_Dice", "volume_coverage", "within_raters", "ECE", "sample_Dice_q50"):
        assert np.isnan(found.csv.loc[("b", "organ"), column]), column
        assert found.csv.loc[("mean", "organ"), column] == pytest.approx(measured[column].mean()), column
        assert found.json["cases_in_mean"]["1"][column] == 2
    assert found.csv.loc[("b", "organ"), "Dice"] >= 0
    assert "b" not in agreement(folders).index.get_level_values("case")

    save(folders.gt / "a.nii.gz", silent)
    save(folders.gt / "b.nii.gz", silent)
    capsys.readouterr()
    found = folders.run("--raters", folders.raters)
    entries = left_out(found)
    assert ("b", "case", "every voxel is ignored") in entries
    assert ("a", "Dice, HD95 and NSD", "the reference ignores every voxel") in entries
    assert len(entries) == 2
    assert "left out: 1 case, every voxel is ignored: b\n" in capsys.readouterr().out
    assert "b" not in found.csv.index
    assert found.csv.loc[("a", "organ"), ["Dice", "HD95_mm", "NSD", "n_ref", "n_pred"]].isna().all()
    assert found.csv.loc[("a", "organ"), "GED2"] > 0
    assert found.csv.loc[("mean", "organ"), "Dice"] == found.csv.loc[("c", "organ"), "Dice"]

    found = folders.run()  # the reference is the only rater
    assert sorted(case for case, what, _ in left_out(found) if what == "case") == ["a", "b"]
    assert set(found.csv.index.get_level_values("case")) == {"c", "mean"}


def test_probabilities_are_compared_with_those_who_say_something(folders):
    folders.write("ignore", cases="a")
    drawn = [read(folders.raters / f"a__{name}.nii.gz") for name in RATERS]
    drawn[0][:5], drawn[1][:3], drawn[2][:2] = 3, 3, 3
    for name, rater in zip(RATERS, drawn, strict=True):
        save(folders.raters / f"a__{name}.nii.gz", rater)
    (folders.raters / "raters.csv").write_text("case,rater,weight\na,jo,3\n")
    rng = np.random.default_rng(0)
    p = rng.dirichlet((1, 1, 1), (8, 10, 12)).transpose(3, 0, 1, 2).astype(np.float32)
    np.savez_compressed(folders.pred / "a.npz", probabilities=p)
    found = folders.run("--raters", folders.raters)
    maps, weights = np.stack(drawn), np.array([3.0, 1, 1])[:, None, None, None]
    said = weights * (maps != 3)
    known = said.sum(0) > 0
    for name, label in EVALUATED["ignore"].items():
        mean = (said * (maps == label)).sum(0)[known] / said.sum(0)[known]
        assert found.csv.loc[("a", name), "ECE"] == pytest.approx(expected_calibration_error(p[label][known], mean))
        assert sum(found.json["reliability"][str(label)]["count"]) == known.sum() == 6 * 10 * 12


# --- a table for each rater


def dice(a, b, label):
    a, b = np.isin(a, label), np.isin(b, label)
    return 2 * (a & b).sum() / (a.sum() + b.sum()) if a.any() or b.any() else 1.0


@pytest.mark.parametrize("kind", ["labels", "regions"])
def test_every_rater_beside_prediction_samples_and_the_others(folders, kind, capsys):
    folders.write(kind)
    (folders.raters / "b__lee.nii.gz").unlink()
    (folders.raters / "raters.csv").write_text("case,rater,weight\na,jo,2\n")
    found, table = folders.run("--raters", folders.raters), agreement(folders)
    names = [*EVALUATED[kind], "foreground_mean"]
    assert len(table) == len(names) * (3 + 2 + 3)
    rows = {}
    for case, raters in (("a", RATERS), ("b", RATERS[:2])):
        maps = {name: read(folders.raters / f"{case}__{name}.nii.gz") for name in raters}
        weights = {name: 2.0 if (case, name) == ("a", "jo") else 1.0 for name in raters}
        prediction = read(folders.pred / f"{case}.nii.gz")
        samples = [read(folders.pred / "samples" / f"{case}__{i:03d}.nii.gz") for i in range(4)]
        for rater, (name, label) in itertools.product(raters, EVALUATED[kind].items()):
            others = [other for other in raters if other != rater]
            own = [weights[other] for other in others]
            rows[case, name, rater] = {
                "weight": weights[rater] / sum(weights.values()),
                "prediction_Dice": dice(prediction, maps[rater], label),
                "sample_Dice": np.mean([dice(sample, maps[rater], label) for sample in samples]),
                "others_Dice": np.average([dice(maps[rater], maps[o], label) for o in others], weights=own),
                "prediction_others_Dice": np.average([dice(prediction, maps[o], label) for o in others], weights=own),
            }
    for key, expected in rows.items():
        for column, value in expected.items():
            assert table.loc[key, column] == pytest.approx(value), (key, column)
        advantage = expected["prediction_others_Dice"] >= expected["others_Dice"] - 1e-9
        assert table.loc[key, "advantage"] == advantage
    for rater, name in itertools.product(RATERS, names):
        cases = "ab" if rater != "lee" else "a"
        for column in ("weight", "prediction_Dice", "sample_Dice", "others_Dice", "advantage"):
            values = [table.loc[(case, name, rater), column] for case in cases]
            assert table.loc[("mean", name, rater), column] == pytest.approx(np.mean(values))
            if column != "advantage":
                both = [table.loc[("a", each, rater), column] for each in EVALUATED[kind]]
                assert table.loc[("a", "foreground_mean", rater), column] == pytest.approx(np.mean(both))
    for name, label in EVALUATED[kind].items():
        own = found.json["agreement"][str(label)]
        assert {rater: row["cases"] for rater, row in own.items()} == {"jo": 2, "kim": 2, "lee": 1}
        assert own["kim"]["others_Dice"] == pytest.approx(table.loc[("mean", name, "kim"), "others_Dice"])
        mean = sum(rows["a", name, r]["weight"] * rows["a", name, r]["prediction_Dice"] for r in RATERS)
        assert found.csv.loc[("a", name), "rater_Dice"] == pytest.approx(mean)
        mean = sum(rows["a", name, r]["weight"] * rows["a", name, r]["others_Dice"] for r in RATERS)
        assert found.csv.loc[("a", name), "interrater_Dice"] == pytest.approx(mean)
    printed = capsys.readouterr().out
    shown = table.loc[("mean", "foreground_mean", "lee"), "prediction_Dice"]
    assert any(line.split()[:3] == ["lee", "1", f"{shown:.3f}"] for line in printed.splitlines())


def test_only_raters_have_a_table(folders):
    folders.write()
    folders.run("--raters", folders.raters)
    assert len(agreement(folders)) == 3 * (2 + 1) * 3
    for i in range(4):  # of one case: the prediction's Dice is known all the same
        (folders.pred / "samples" / f"b__{i:03d}.nii.gz").unlink()
    folders.run("--raters", folders.raters)
    table = agreement(folders)
    assert np.isnan(table.loc[("b", "organ", "jo"), "sample_Dice"])
    assert np.isfinite(table.loc[("b", "organ", "jo"), ["prediction_Dice", "others_Dice"]]).all()
    assert folders.run().json["agreement"] == {}
    assert not list(folders.pred.glob("*agreement*"))


# --- the first samples


@pytest.mark.parametrize("weights", [None, [0.1, 0.2, 0.3, 0.4]])
def test_the_first_samples_have_columns_of_their_own(folders, weights, capsys):
    folders.write(cases="a")
    (folders.pred / "a.json").write_text(json.dumps({"samples": 4, "sample_weights": weights}))
    found = folders.run("--raters", folders.raters, "--samples", 4, 2, 2)
    assert "GED² 2" in capsys.readouterr().out
    columns = ("GED2", "sample_diversity", "fraction_better", "sample_Dice_q50", "M_IoU", "volume_CRPS")
    for column in columns:
        np.testing.assert_array_equal(found.csv[f"{column}_4"], found.csv[column])
    for i in (2, 3):
        (folders.pred / "samples" / f"a__00{i}.nii.gz").unlink()
    own = None if weights is None else weights[:2]
    (folders.pred / "a.json").write_text(json.dumps({"samples": 2, "sample_weights": own}))
    fewer = folders.run("--raters", folders.raters, output="fewer")
    for column in columns:
        np.testing.assert_allclose(found.csv[f"{column}_2"], fewer.csv[column], err_msg=column)
        mean = found.json["foreground_mean"][f"{column}_2"]
        assert mean == pytest.approx(fewer.json["foreground_mean"][column])
    assert found.json["cases_in_mean"]["1"]["GED2_2"] == 1
    assert "rater_Dice_2" not in found.csv.columns


def test_more_samples_than_there_are_is_an_error(folders):
    folders.write()
    (folders.pred / "samples" / "b__003.nii.gz").unlink()
    with pytest.raises(UserError, match=r"--samples 4: b has 3 in .*samples; predict with --samples 4"):
        folders.run("--samples", 2, 4)
    assert not (folders.pred / "evaluation.json").exists()
    with pytest.raises(UserError, match="--samples is 0; give numbers of at least 1"):
        folders.run("--samples", 0, 3)
    (folders.pred / "a.json").write_text(json.dumps({"sample_weights": [0, 0, 0.5, 0.5]}))
    with pytest.raises(UserError, match=r"--samples 2: the first 2 of .*a\.json have no weight"):
        folders.run("--samples", 2)
    for file in (folders.pred / "samples").iterdir():
        file.unlink()
    for flags in ((), ("--raters", folders.raters)):  # of raters the prediction would be the one sample
        with pytest.raises(UserError, match="samples has no samples; predict with --samples 1 --save-samples"):
            folders.run("--samples", 1, *flags)
    with pytest.raises(UserError, match="--samples has no meaning with --all-subsets"):
        folders.run("--samples", 1, "--all-subsets", "-i", "i", "-d", 1, "-c", "2d", "-tr", "nnUNetTrainer")


# --- the picture of the calibration


def test_reliability_is_drawn_where_there_are_probabilities(folders, capsys):
    folders.write()
    rng = np.random.default_rng(0)
    for case in "ab":
        p = rng.dirichlet((1, 1, 1), (8, 10, 12)).transpose(3, 0, 1, 2).astype(np.float32)
        np.savez_compressed(folders.pred / f"{case}.npz", probabilities=p)
    folders.run("--raters", folders.raters)
    picture = folders.pred / "evaluation_reliability.png"
    assert str(picture) in capsys.readouterr().out
    first = io.imread(picture)
    assert first.shape[1] > 1.5 * first.shape[0] / 4.2 * 3.2  # two labels side by side
    folders.run()
    assert not np.array_equal(io.imread(picture), first)
    for case in "ab":
        (folders.pred / f"{case}.npz").unlink()
    folders.run()
    assert not picture.exists()


def test_many_labels_are_drawn_in_rows(tmp_path):
    p = np.array([0.05, 0.5, 0.55, 0.95])
    curves = {f"${i}_x": reliability_curve(p, p > 0.1 * i) for i in range(6)}
    draw_reliability(curves, tmp_path / "six.png")
    draw_reliability(dict(list(curves.items())[:4]), tmp_path / "four.png")
    six, four = (io.imread(tmp_path / f"{name}.png") for name in ("six", "four"))
    assert six.shape[0] == 2 * four.shape[0]
    assert six.shape[1] == four.shape[1]
    assert (six[four.shape[0] :, -six.shape[1] // 4 :] == 255).all()  # two panels are not needed


# --- raters without a reference


@pytest.mark.parametrize("kind", ["labels", "regions_ignore"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_majority_is_the_reference_where_there_are_raters_alone(folders, kind, weighted, capsys):
    folders.write(kind)
    if weighted:
        (folders.raters / "raters.csv").write_text("case,rater,weight\na,jo,5\nb,lee,0\n")
    if "ignore" in kind:
        own = read(folders.raters / "a__kim.nii.gz")
        own[:2] = 3
        save(folders.raters / "a__kim.nii.gz", own)
    labels = LabelManager(LABELS[kind], [1, 2])
    for case in "ab":
        names = RATERS[:2] if weighted and case == "b" else RATERS
        maps = np.stack([read(folders.raters / f"{case}__{name}.nii.gz") for name in names])
        weights = np.array([5.0 if weighted and (case, name) == ("a", "jo") else 1 for name in names])
        save(folders.gt / f"{case}.nii.gz", majority(maps, weights, labels).astype(np.uint8))
    expected = folders.run("--raters", folders.raters)
    assert "the majority of the raters" not in capsys.readouterr().out
    table = agreement(folders)
    for flags in ((), ("--raters", folders.raters)):
        found = folders.run(*flags, references=folders.raters)
        said = f"reference of Dice, HD95 and NSD: the majority of the raters in {folders.raters}\n"
        assert said in capsys.readouterr().out
        pd.testing.assert_frame_equal(found.csv, expected.csv)
        pd.testing.assert_frame_equal(agreement(folders), table)
    assert found.json["metric_per_case"][0]["reference_file"] == f"majority of {folders.raters}"
    assert len(found.json["metric_per_case"][0]["rater_files"]) == 3


def test_raters_alone_are_what_they_are_taken_for(folders, tmp_path):
    folders.write()
    with pytest.raises(UserError, match=r"raters has no reference but raters, and --raters names others: .*gt; leave"):
        folders.run("--raters", folders.gt, references=folders.raters)
    save(folders.raters / "b__kim.nii.gz", blobs(0), origin=(0, 0, 0))
    found = folders.run(references=folders.raters)
    assert left_out(found) == [("b", "case", "geometry differs")]
    (folders.pred / "b.nii.gz").unlink()
    with pytest.raises(SystemExit, match=r"no prediction: b\n.*--chill"):
        folders.run(references=folders.raters)
    found = folders.run("--chill", references=folders.raters)
    assert left_out(found) == [("b", "case", "no prediction")]
    save(folders.raters / "a.nii.gz", blobs(0))  # a reference among them: the others are cases without a prediction
    with pytest.raises(SystemExit, match=r"no prediction: a__jo, a__kim"):
        folders.run(references=folders.raters)
