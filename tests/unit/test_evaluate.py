import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import SimpleITK
from nnunetv2.evaluation.evaluate_predictions import compute_metrics, load_summary_json
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from skimage import io

from nnunet_multimodal import evaluate
from nnunet_multimodal.cli import main
from nnunet_multimodal.evaluate.cases import find_cases
from nnunet_multimodal.metrics.calibration import expected_calibration_error
from nnunet_multimodal.metrics.distribution import score_distribution
from nnunet_multimodal.metrics.surface import hausdorff_distance, normalised_surface_distance
from tests.nnunet import LABELS

SPACING_MM = (1.5, 1.1, 1.0)  # (Z, Y, X)
EVALUATED = {
    "labels": {"organ": 1, "lesion": 2},
    "regions": {"whole": (1, 2), "lesion": 2},
    "ignore": {"organ": 1, "lesion": 2},
    "regions_ignore": {"whole": (1, 2), "lesion": 2},
}


def blobs(seed, shape=(8, 10, 12)):
    """A label map with an organ and a lesion in it, both at random places."""
    rng = np.random.default_rng(seed)
    label_map = np.zeros(shape, dtype=np.uint8)
    for label, size in ((1, 5), (2, 3)):
        corner = [rng.integers(0, max(side - size, 1)) for side in shape]
        label_map[tuple(slice(c, c + size) for c in corner)] = label
    return label_map


def save(file, array, **geometry):
    file.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(geometry.get("spacing", SPACING_MM[::-1][: array.ndim]))
    image.SetOrigin(geometry.get("origin", (3.0, -4.0, 100.0)[: array.ndim]))
    SimpleITK.WriteImage(image, str(file))


def describe(pred, kind="labels", ending=".nii.gz", reader="SimpleITKIO"):
    """dataset.json and plans.json of a folder of predictions."""
    pred.mkdir(exist_ok=True)
    description = {"labels": LABELS[kind], "channel_names": {"0": "T1"}, "numTraining": 3, "file_ending": ending}
    description["regions_class_order"] = [1, 2]
    (pred / "dataset.json").write_text(json.dumps(description))
    plans = {"image_reader_writer": reader, "label_manager": "LabelManager", "configurations": {}}
    (pred / "plans.json").write_text(json.dumps(plans))


@pytest.fixture
def folders(tmp_path):
    """Three cases of every kind of labels: folders.write(kind), then folders.run(...)."""
    gt, pred, raters = tmp_path / "gt", tmp_path / "pred", tmp_path / "raters"

    def write(kind="labels", ending=".nii.gz", reader="SimpleITKIO", cases=("a", "b", "c")):
        describe(pred, kind, ending, reader)
        gt.mkdir(exist_ok=True)
        for seed, case in enumerate(cases):
            reference = blobs(seed)
            if "ignore" in kind:
                reference[:, :, -4:] = 3
            save(gt / f"{case}{ending}", reference)
            save(pred / f"{case}{ending}", blobs(100 + seed))

    def run(*arguments, processes=1):
        assert main(["evaluate", str(gt), str(pred), "-np", str(processes), *map(str, arguments)]) == 0
        assert not list(pred.glob(".*"))
        results = json.loads((pred / "evaluation.json").read_text())
        return SimpleNamespace(
            json=results, csv=pd.read_csv(pred / "evaluation.csv", dtype={"values": str}).set_index(["case", "label"])
        )

    return SimpleNamespace(gt=gt, pred=pred, raters=raters, write=write, run=run)


def read(file):
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file)))


def left_out(results):
    return sorted((entry["case"], entry["what"], entry["why"]) for entry in results.json["left_out"])


@pytest.mark.parametrize("kind", list(EVALUATED))
def test_overlap_is_that_of_nnunet_and_distances_are_those_of_the_masks(folders, kind):
    folders.write(kind)
    found = folders.run("--tolerance_mm", 2)
    for case in "abc":
        files = [str(folder / f"{case}.nii.gz") for folder in (folders.gt, folders.pred)]
        labels = list(EVALUATED[kind].values())
        expected = compute_metrics(*files, SimpleITKIO(), labels, 3 if "ignore" in kind else None)["metrics"]
        reference, prediction = map(read, files)
        for name, label in EVALUATED[kind].items():
            row = found.csv.loc[case, name]
            assert row["values"] == str(label)
            for column, theirs in (("Dice", "Dice"), ("n_ref", "n_ref"), ("n_pred", "n_pred")):
                assert row[column] == pytest.approx(expected[label][theirs]), column
            counts = reference != 3
            masks = [np.isin(array, label) & counts for array in (prediction, reference)]
            assert row["HD95_mm"] == pytest.approx(hausdorff_distance(*masks, SPACING_MM))
            assert row["NSD"] == pytest.approx(normalised_surface_distance(*masks, SPACING_MM, 2))
    assert "GED2" not in found.csv.columns
    assert not found.json["left_out"]


def test_means_over_cases_and_labels(folders, capsys):
    folders.write()
    found = folders.run()
    cases = found.csv.loc[["a", "b", "c"]]
    for column in ("Dice", "HD95_mm", "NSD", "n_ref"):
        for label in ("organ", "lesion", "foreground_mean"):
            values = cases[column].xs(label, level="label")
            assert found.csv.loc[("mean", label), column] == pytest.approx(values.mean())
        for case in ("a", "b", "c", "mean"):
            both = found.csv.loc[(case, ["organ", "lesion"]), column]
            assert found.csv.loc[(case, "foreground_mean"), column] == pytest.approx(both.mean())
    assert found.json["mean"]["2"]["Dice"] == pytest.approx(found.csv.loc[("mean", "lesion"), "Dice"])
    assert found.json["foreground_mean"]["NSD"] == pytest.approx(found.csv.loc[("mean", "foreground_mean"), "NSD"])
    printed = capsys.readouterr().out
    assert "HD95 mm" in printed
    assert f"{found.json['mean']['2']['Dice']:.3f}" in printed
    assert "3 cases evaluated" in printed


def test_nnunet_can_read_the_results(folders):
    folders.write("regions")
    folders.run()
    summary = load_summary_json(str(folders.pred / "evaluation.json"))
    assert set(summary["mean"]) == {(1, 2), 2}
    assert summary["metric_per_case"][0]["prediction_file"] == str(folders.pred / "a.nii.gz")


def test_a_missing_prediction_is_an_error_unless_chilled(folders, capsys):
    folders.write()
    (folders.pred / "b.nii.gz").unlink()
    with pytest.raises(SystemExit, match=r"left out: 1 case, no prediction: b\n.*--chill"):
        folders.run()
    found = folders.run("--chill")
    assert left_out(found) == [("b", "case", "no prediction")]
    assert "left out: 1 case, no prediction: b\n" in capsys.readouterr().out
    assert [case["case"] for case in found.json["metric_per_case"]] == ["a", "c"]


def test_a_prediction_without_reference_is_left_out(folders):
    folders.write()
    (folders.gt / "b.nii.gz").unlink()
    found = folders.run()
    assert left_out(found) == [("b", "case", "no reference")]
    assert found.json["cases_in_mean"]["1"]["Dice"] == 2


@pytest.mark.parametrize(
    ("shape", "geometry", "named"),
    [
        ((8, 10, 11), {}, r"shape \(8, 10, 11\)"),
        ((8, 10, 12), {"spacing": (1.0, 1.1, 1.6)}, "spacing"),
        ((8, 10, 12), {"origin": (3.0, -4.0, 99.0)}, "origin"),
    ],
)
def test_another_geometry_is_left_out(folders, shape, geometry, named):
    folders.write()
    save(folders.pred / "c.nii.gz", blobs(0, shape), **geometry)
    save(folders.pred / "b.nii.gz", blobs(0), spacing=(1.0000001, 1.1, 1.5))  # float32 in other words
    found = folders.run()
    assert left_out(found) == [("c", "case", "geometry differs")]
    (entry,) = found.json["left_out"]
    assert entry["detail"].startswith("c.nii.gz has ")
    assert pd.Series([entry["detail"]]).str.contains(named).all()
    assert "c" not in found.csv.index


def test_labels_that_are_missing_are_in_no_mean(folders, capsys):
    folders.write()
    save(folders.pred / "a.nii.gz", np.where(read(folders.pred / "a.nii.gz") == 2, 0, 1).astype(np.uint8))
    for folder in (folders.gt, folders.pred):
        save(folder / "b.nii.gz", np.minimum(read(folder / "b.nii.gz"), 1))
    found = folders.run()
    assert left_out(found) == [
        ("a", "HD95 of lesion", "not in prediction"),
        ("b", "Dice, HD95 and NSD of lesion", "neither in prediction nor in reference"),
    ]
    assert "left out of HD95 of lesion: 1 case, not in prediction: a\n" in capsys.readouterr().out
    lesion = found.csv.xs("lesion", level="label")
    assert lesion.loc["a", "Dice"] == lesion.loc["a", "NSD"] == 0
    assert lesion.loc["a", "HD95_mm"] == np.inf
    assert lesion.loc["b", ["Dice", "HD95_mm", "NSD"]].isna().all()
    assert lesion.loc["mean", "HD95_mm"] == lesion.loc["c", "HD95_mm"]
    assert lesion.loc["mean", "Dice"] == pytest.approx((0 + lesion.loc["c", "Dice"]) / 2)
    assert found.json["cases_in_mean"]["2"] == {"Dice": 2, "HD95_mm": 1, "NSD": 2, "n_ref": 3, "n_pred": 3}
    assert found.json["metric_per_case"][0]["metrics"]["2"]["HD95_mm"] is None
    assert found.csv.loc[("b", "foreground_mean"), "Dice"] == found.csv.loc[("b", "organ"), "Dice"]


@pytest.mark.parametrize("kind", ["labels", "regions_ignore"])
@pytest.mark.parametrize("weights", [None, [1, 2, 3]])
@pytest.mark.parametrize("raters", [0, 2])
def test_samples_are_compared_with_raters_or_the_reference(folders, kind, weights, raters):
    folders.write(kind, cases=("a",))
    samples = [blobs(200 + i) for i in range(3)]
    for i, sample in enumerate(samples):
        save(folders.pred / "samples" / f"a__{i:03d}.nii.gz", sample)
    (folders.pred / "a.json").write_text(json.dumps({"sample_weights": weights}))
    drawn = [blobs(300 + i) for i in range(raters)] or [read(folders.gt / "a.nii.gz")]
    if raters:
        drawn[1][:2] = 3 if "ignore" in kind else 0
        for name, rater in zip(("jo", "kim"), drawn, strict=True):
            save(folders.raters / f"a__{name}.nii.gz", rater)
    found = folders.run(*(("--raters", folders.raters) if raters else ()))

    valid = np.stack(drawn) != 3 if "ignore" in kind else None
    labels = EVALUATED[kind]
    prediction = read(folders.pred / "a.nii.gz")
    scores = score_distribution(
        prediction, np.stack(samples), np.stack(drawn), list(labels.values()), weights, valid=valid
    )
    for name, expected in (
        ("foreground_mean", scores.average), *((name, scores.by_label[label]) for name, label in labels.items())
    ):  # fmt: skip
        row = found.csv.loc["a", name]
        assert row["GED2"] == pytest.approx(expected.generalized_energy_distance)
        assert row["sample_diversity"] == pytest.approx(expected.sample_diversity)
        assert row["rater_diversity"] == pytest.approx(expected.rater_diversity)
        assert row["rater_Dice"] == pytest.approx(expected.dice)
        assert row["rater_Dice_nod"] == pytest.approx(expected.dice_nod)
        assert row["fraction_better"] == pytest.approx(expected.fraction_better)
        assert row["sample_Dice_q95"] == pytest.approx(expected.sample_dice_quantile(0.95))
        pd.testing.assert_series_equal(
            row.drop("values"), found.csv.loc["mean", name].drop("values"), check_names=False
        )


def test_what_the_distribution_lacks_is_reported(folders):
    folders.write()
    for case in "ab":
        save(folders.pred / "samples" / f"{case}__000.nii.gz", blobs(1))
    save(folders.raters / "a__jo.nii.gz", blobs(2))
    save(folders.raters / "c__jo.nii.gz", np.minimum(blobs(3), 1))
    found = folders.run("--raters", folders.raters)
    assert left_out(found) == [("b", "samples, ECE", "no raters"), ("c", "samples", "no samples")]
    assert found.csv["GED2"].xs("lesion", level="label").notna().to_dict() == {
        "a": True, "b": False, "c": False, "mean": True
    }  # fmt: skip
    save(folders.pred / "samples" / "c__000.nii.gz", blobs(1))
    save(folders.pred / "samples" / "a__000.nii.gz", blobs(1), origin=(0, 0, 0))
    found = folders.run("--raters", folders.raters)
    assert left_out(found) == [
        ("a", "samples, ECE", "geometry differs"),
        ("b", "samples, ECE", "no raters"),
        ("c", "rater_Dice_nod of lesion", "no rater drew it"),
    ]
    assert found.csv.loc[("a", "organ"), "Dice"] >= 0
    assert np.isnan(found.csv.loc[("a", "organ"), "GED2"])


def test_without_samples_the_prediction_is_the_one_sample(folders):
    folders.write()
    for case in "abc":
        for name in ("jo", "kim"):
            save(folders.raters / f"{case}__{name}.nii.gz", blobs(ord(case) + len(name)))
    found = folders.run("--raters", folders.raters)
    assert not found.json["left_out"]
    assert (found.csv["sample_diversity"] == 0).all()
    assert (found.csv["GED2"] > 0).all()
    assert (found.csv["fraction_better"] == 0).all()
    np.testing.assert_allclose(found.csv["sample_Dice_q50"], found.csv["rater_Dice"])


@pytest.mark.parametrize("kind", ["labels", "regions_ignore"])
def test_calibration_of_saved_probabilities(folders, kind):
    folders.write(kind, cases=("a", "b"))
    expected, probabilities = {}, {}
    rng = np.random.default_rng(0)
    for case in "ab":
        p = rng.dirichlet((1, 1, 1), (8, 10, 12)).transpose(3, 0, 1, 2).astype(np.float32)
        p = p if kind == "labels" else p[:2]
        np.savez_compressed(folders.pred / f"{case}.npz", probabilities=p)
        reference = read(folders.gt / f"{case}.nii.gz")
        for name, channel in zip(EVALUATED[kind], p[-2:], strict=True):
            mask = np.isin(reference, EVALUATED[kind][name])
            expected[case, name] = expected_calibration_error(channel[reference != 3], mask[reference != 3])
            probabilities.setdefault(name, []).append((channel[reference != 3], mask[reference != 3]))
    found = folders.run()
    for key, value in expected.items():
        assert found.csv.loc[key, "ECE"] == pytest.approx(value)
    assert found.csv.loc[("mean", "foreground_mean"), "ECE"] == pytest.approx(np.mean(list(expected.values())))
    for name, label in EVALUATED[kind].items():
        curve = found.json["reliability"][str(label)]
        pooled = [np.concatenate(arrays) for arrays in zip(*probabilities[name], strict=True)]
        assert curve["expected_calibration_error"] == pytest.approx(expected_calibration_error(*pooled))
        assert sum(curve["count"]) == len(pooled[0])
        assert len(curve["edges"]) == 11


def test_reference_of_the_calibration_is_the_mean_of_the_raters(folders):
    folders.write(cases=("a",))
    drawn = [blobs(1), blobs(2), blobs(3)]
    for i, rater in enumerate(drawn):
        save(folders.raters / f"a__{i}.nii.gz", rater)
    mean = np.stack([np.mean([rater == label for rater in drawn], axis=0) for label in range(3)])
    np.savez_compressed(folders.pred / "a.npz", probabilities=mean.astype(np.float32))
    assert folders.run("--raters", folders.raters).csv["ECE"].max() < 1e-6
    assert folders.run().csv["ECE"].min() > 0.01


def test_png_images_are_measured_in_pixels(folders):
    folders.write(ending=".png", reader="NaturalImage2DIO", cases=())
    for seed, case in enumerate("ab"):
        io.imsave(folders.gt / f"{case}.png", blobs(seed, (30, 40)), check_contrast=False)
        io.imsave(folders.pred / f"{case}.png", blobs(10 + seed, (30, 40)), check_contrast=False)
        (folders.pred / "samples").mkdir(exist_ok=True)
        io.imsave(folders.pred / "samples" / f"{case}__000.png", blobs(20 + seed, (30, 40)), check_contrast=False)
    np.savez_compressed(folders.pred / "a.npz", probabilities=np.full((3, 1, 30, 40), 1 / 3, dtype=np.float32))
    found = folders.run()
    masks = [blobs(seed, (30, 40)) == 2 for seed in (10, 0)]
    assert found.csv.loc[("a", "lesion"), "HD95_mm"] == pytest.approx(hausdorff_distance(*masks, (1, 1)))
    assert 0 < found.csv.loc[("mean", "foreground_mean"), "GED2"] <= 2
    assert left_out(found) == [("b", "ECE", "no probabilities")]
    io.imsave(folders.pred / "a.png", np.zeros((30, 40, 3), dtype=np.uint8), check_contrast=False)
    with pytest.raises(ValueError, match=r"a\.png has 3 channels"):
        folders.run()


def test_two_dimensional_nifti_is_measured_in_mm(folders):
    folders.write(cases=())
    for folder, seed in ((folders.gt, 0), (folders.pred, 1)):
        save(folder / "a.nii.gz", blobs(seed, (30, 40)))
    masks = [blobs(seed, (30, 40)) == 1 for seed in (1, 0)]
    found = folders.run()
    assert found.csv.loc[("a", "organ"), "HD95_mm"] == pytest.approx(hausdorff_distance(*masks, SPACING_MM[1:]))


@pytest.mark.parametrize("reader", ["NibabelIO", "NibabelIOWithReorient", "SimpleITKIOWithReorient"])
def test_other_readers_of_nnunet(folders, reader):
    folders.write()
    expected = folders.run().csv
    folders.write(reader=reader)
    pd.testing.assert_frame_equal(folders.run().csv, expected)
    save(folders.pred / "c.nii.gz", blobs(0), origin=(0.0, 0.0, 0.0))
    assert left_out(folders.run()) == [("c", "case", "geometry differs")]


def test_processes_change_nothing(folders):
    folders.write()
    save(folders.pred / "samples" / "a__000.nii.gz", blobs(7))
    expected = folders.run(processes=1)
    found = folders.run(processes=2)
    pd.testing.assert_frame_equal(found.csv, expected.csv)
    assert found.json == expected.json


def test_files_belong_to_the_case_before_the_last_double_underscore(tmp_path):
    for name in (
        "gt/a",
        "pred/a",
        "gt/a__b",
        "pred/a__b",
        "gt/.a",
        *(f"pred/samples/a__{i:03d}" for i in (999, 1000, 2)),
    ):
        save(tmp_path / f"{name}.nii.gz", blobs(0))
    save(tmp_path / "pred/samples/a__b__000.nii.gz", blobs(0))
    cases, missing = find_cases(tmp_path / "gt", tmp_path / "pred", None, ".nii.gz")
    samples = {files.case: [file.name for file in files.samples] for files in cases}
    assert samples == {"a": [f"a__{i}.nii.gz" for i in ("002", "999", "1000")], "a__b": ["a__b__000.nii.gz"]}
    assert missing == []


def test_output_goes_where_it_is_asked_to(folders, tmp_path):
    folders.write()
    elsewhere = tmp_path / "new" / "result.json"
    for name in ("dataset", "plans"):
        (folders.pred / f"{name}.json").rename(tmp_path / f"{name}.json")
    flags = ["-djfile", str(tmp_path / "dataset.json"), "-pfile", str(tmp_path / "plans.json"), "-o", str(elsewhere)]
    assert main(["evaluate", str(folders.gt), str(folders.pred), "-np", "1", *flags]) == 0
    assert sorted(file.name for file in elsewhere.parent.iterdir()) == ["result.csv", "result.json"]
    assert not (folders.pred / "evaluation.json").exists()


def test_an_evaluation_that_is_cut_off_leaves_no_json_of_an_earlier_one(folders, monkeypatch):
    folders.write()
    command = ["evaluate", str(folders.gt), str(folders.pred), "-np", "1"]
    assert main(command) == 0

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "as_json", killed)
    with pytest.raises(KeyboardInterrupt):
        main(command)
    assert (folders.pred / "evaluation.csv").exists()
    assert not (folders.pred / "evaluation.json").exists()


def test_errors_name_the_file_and_the_remedy(folders, tmp_path):
    folders.write(cases=("a",))
    with pytest.raises(SystemExit, match=r"-o is .*result\.txt.*\.json"):
        folders.run("-o", tmp_path / "result.txt")
    with pytest.raises(SystemExit, match="tolerance_mm is -1"):
        folders.run("--tolerance_mm", -1)
    with pytest.raises(SystemExit, match="nowhere is not a folder"):
        folders.run("--raters", tmp_path / "nowhere")
    with pytest.raises(SystemExit, match=r"other\.json is not there.*-pfile"):
        folders.run("-pfile", tmp_path / "other.json")
    save(folders.pred / "samples" / "a__000.nii.gz", blobs(0))
    (folders.pred / "a.json").write_text(json.dumps({"sample_weights": [0.5, 0.5]}))
    with pytest.raises(ValueError, match=r"a\.json has 2 sample_weights and there are 1 samples"):
        folders.run()
    (folders.pred / "a.json").unlink()
    np.savez_compressed(folders.pred / "a.npz", probabilities=np.zeros((2, 8, 10, 12), dtype=np.float32))
    with pytest.raises(ValueError, match=r"a\.npz has shape \(2, 8, 10, 12\), not \(3, 8, 10, 12\)"):
        folders.run()
    (folders.gt / "a.nii.gz").rename(folders.gt / "z.nii.gz")
    with pytest.raises(SystemExit, match=r"(?s)no reference: a.*nothing to evaluate"):
        folders.run("--chill")
