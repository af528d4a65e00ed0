"""The report on a small study, made with this package's own writers, and as nnU-Net writes its files."""

import base64
import csv
import gzip
import html.parser
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from PIL import Image

from nnunet_multimodal.cli import main
from nnunet_multimodal.errors import UserError
from nnunet_multimodal.evaluate.subset_report import Measured, Scores, as_csv, summarise
from nnunet_multimodal.inference.quantities import RunningQuantities
from nnunet_multimodal.metrics.case import CaseMeasures
from nnunet_multimodal.report import evaluations, gather, models, page, read_views, volumes

CASES = ("case_1", "case_10", "case_2")
LABEL = "tumour <b>&core"  # of a label map, to be shown as it is
SHAPE, SPACING_MM = (6, 10, 12), (2.0, 1.5, 1.0)  # (Z, Y, X)
CHANNELS = ("CT", "PET")
TRAINER = "SSNTrainer_3epochs"
LOG = """
This is the configuration used by this training:
2026-11-21 15:02:47.276726: Epoch 0 
2026-11-21 15:02:47.276837: Current learning rate: 0.01 
2026-11-21 15:06:22.749192: train_loss -0.3531 
2026-11-21 15:06:22.749415: val_loss -0.4019 
2026-11-21 15:06:22.749485: Pseudo dice [np.float32(0.5), np.float32(nan), np.float32(0.7)] 
2026-11-21 15:06:22.749634: Epoch time: 215.47 s 
2026-11-21 15:06:22.749702: Yayy! New best EMA pseudo Dice: 0.7825999855995178 
2026-11-21 15:06:24.073638: Epoch 1 
2026-11-21 15:06:24.073753: Current learning rate: 0.00925 
2026-11-21 15:07:00.000000: Step skipped (1 of at most 10 an epoch): loss or gradient not finite
2026-11-21 15:11:03.526818: train_loss nan 
2026-11-21 15:11:03.527030: val_loss 1.2e-05 
2026-11-21 15:11:03.527081: Pseudo dice [nan, nan] 
2026-11-21 15:11:03.527145: Epoch time: 20.0 s 
2026-11-21 15:11:04.997690: Epoch 2 
2026-11-21 15:11:04.997810: Current learning rate: 0.00849 
"""  # noqa: W291  (nnU-Net's lines end in a space)
DATASET = {
    "channel_names": dict(zip("01", CHANNELS, strict=True)),
    "labels": {"background": 0, LABEL: 1},
    "numTraining": 3,
    "file_ending": ".nii.gz",
}
PLANS = {
    "dataset_name": "Dataset007_Study",
    "plans_name": "nnUNetPlans",
    "image_reader_writer": "SimpleITKIO",
    "label_manager": "LabelManager",
    "experiment_planner_used": "ExperimentPlanner",
    "foreground_intensity_properties_per_channel": {"0": {"percentile_00_5": -75.0, "percentile_99_5": 185.0}},
    "configurations": {
        "3d_fullres": {
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": 2,
            "patch_size": [32, 48, 48],
            "spacing": [4.0, 3.0, 3.0],
            "normalization_schemes": ["CTNormalization", "ZScoreNormalization"],
            "architecture": {
                "network_class_name": "a.b.PlainConvUNet",
                "arch_kwargs": {"features_per_stage": [16, 32]},
            },
        },
        "3d_big": {"inherits_from": "3d_fullres", "batch_size": 4, "nnunet_multimodal": {"ssn": {"rank": 7}}},
    },
}


def save(file, array, direction=(1, 0, 0, 0, 1, 0, 0, 0, 1)):
    file.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(SPACING_MM[::-1])
    image.SetDirection([float(value) for value in direction])
    SimpleITK.WriteImage(image, str(file))


def box(shift):
    """A label map (Z, Y, X) with a box."""
    array = np.zeros(SHAPE, np.uint8)
    array[1:4, 2 : 6 + shift, 3:8] = 1
    return array


def write_predictions(folder, cases=CASES, samples=3):
    for index, case in enumerate(cases):
        prediction = box(index)
        save(folder / f"{case}.nii.gz", prediction)
        quantities = RunningQuantities({LABEL: 1}, math.prod(SPACING_MM) / 1000)
        if not samples:
            continue
        for sample in range(samples):
            drawn = box(index + sample - 1)
            save(folder / "samples" / f"{case}__{sample:03d}.nii.gz", drawn)
            quantities.add(drawn)
        save(folder / "uncertainty" / f"{case}_entropy.nii.gz", 0.7 * prediction.astype(np.float32))
        summary = {
            "case": case, "samples": samples, "sample_weights": None, "samples_wanted": samples, "seed": 5,
            "temperature": 1.0, "class_scale": [], "compact": False, "drop": [], "drawn_from": "distribution",
            "trainer": TRAINER, "absent": ["PET"] if index == 2 else [], "spacing": list(SPACING_MM),
            "labels": quantities.summary(prediction),
        }  # fmt: skip
        (folder / f"{case}.json").write_text(json.dumps(summary))
        probabilities = np.stack([1 - 0.9 * prediction, 0.9 * prediction]).astype(np.float32)
        np.savez_compressed(folder / f"{case}.npz", probabilities=probabilities)
    (folder / "dataset.json").write_text(json.dumps(DATASET))
    (folder / "plans.json").write_text(json.dumps(PLANS))


def write_model(folder):
    fold = folder / "fold_0"
    (fold / "validation").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(PLANS))
    (folder / "dataset.json").write_text(json.dumps(DATASET))
    (fold / "training_log_2026_11_21_15_02_46.txt").write_text(LOG)
    debug = {
        "torch_version": "2.9.0",
        "device": "cuda:0",
        "gpu_name": "None",
        "hostname": "secret-host",
        "num_epochs": "3",
    }
    (fold / "debug.json").write_text(json.dumps(debug))
    measures = {"Dice": 0.625, "IoU": 0.4545, "n_pred": 10, "n_ref": 12}
    summary = {
        "foreground_mean": measures,
        "mean": {"1": measures},
        "metric_per_case": [
            {"metrics": {"1": measures}, "prediction_file": "/v/case_1.nii.gz", "reference_file": "/g/case_1.nii.gz"}
        ],
    }
    (fold / "validation" / "summary.json").write_text(json.dumps(summary))
    (fold / "checkpoint_final.pth").touch()


def write_subsets(folder):
    folder.mkdir()
    subsets = [(0,), (1,), (0, 1)]
    measured = [
        Measured(model, subset, case, CaseMeasures({1: (m := {"Dice": 0.5 + 0.1 * i + 0.05 * s, "HD95_mm": 3.0})}, m))
        for i, model in enumerate(("A_5epochs", "B_5epochs"))
        for s, subset in enumerate(subsets)
        for case in CASES
    ]
    scores = summarise(measured, Scores(("A_5epochs", "B_5epochs"), "A_5epochs", CHANNELS, (1,), (LABEL,)))
    (folder / "subsets.csv").write_text(as_csv(scores))
    return scores


def write_explained(folder):
    folder.mkdir()
    with (folder / "contributions.csv").open("w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(
            ("case", "modality", "label", "volume_ml", "volume_without_ml", "changed", "Dice", "Dice_without")
        )
        writer.writerow(("case_1", "CT", LABEL, 0.3, 0.1, 0.25, 0.75, 0.5))
        writer.writerow(("case_2", "CT", LABEL, 0.3, 0.1, 0.75, 0.5, 0.5))
        writer.writerow(("case_1", "PET", LABEL, 0.3, 0.3, 0, "", ""))
    save(folder / "complementary" / "case_1_CT_core_from_PET.nii.gz", np.full(SHAPE, 0.5, np.float32))


def make_study(root, cases=CASES, evaluated=True):
    """Images, references, predictions (evaluated by our command), a model, subsets and explanations below root."""
    rng = np.random.default_rng(0)
    for index, case in enumerate(cases):
        save(root / "labels" / f"{case}.nii.gz", box(1))
        for channel in range(2 if index < 2 else 1):
            image = rng.normal(0, 10, SHAPE) + 50 * box(1) * (channel + 1)
            save(root / "images" / f"{case}_{channel:04d}.nii.gz", image.astype(np.float32))
    write_predictions(root / "results" / "predictions", cases)
    write_model(root / "results" / "Dataset007_Study" / f"{TRAINER}__nnUNetPlans__3d_big")
    write_subsets(root / "results" / "subsets")
    write_explained(root / "results" / "explained")
    if evaluated:
        assert main(["evaluate", str(root / "labels"), str(root / "results" / "predictions"), "-np", "1"]) == 0
    return root


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def written(study):
    """The study's page."""
    file = study / "report.html"
    assert main(["report", str(study / "results"), "-i", str(study / "images"), "-o", str(file)]) == 0
    return file.read_text()


class WellFormed(html.parser.HTMLParser):
    """Checks that elements close in order, and collects what the page has."""

    VOID = frozenset({"meta", "link", "input", "img", "br", "wbr"})

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.tags, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        own = dict(attributes)
        assert len(own) == len(attributes), f"twice the same attribute: {attributes}"
        self.ids += [own["id"]] if "id" in own else []
        self.links += [value for name, value in attributes if name in ("src", "href", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> without a beginning"
        assert self.open.pop() == tag, f"</{tag}> after {self.open}"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data


def json_of(text, pattern):
    return [
        json.loads(found) for found in re.findall(rf'<script type="application/json" {pattern}>(.*?)</script>', text)
    ]


class TestGather:
    def test_log_gives_the_epochs_that_ended(self):
        first, second = models.parse_log(LOG)
        assert first == (0, -0.3531, -0.4019, pytest.approx(0.6), 0.01, 215.47)
        assert second.number == 1
        assert math.isnan(second.train_loss)
        assert math.isnan(second.pseudo_dice)
        assert (second.val_loss, second.learning_rate, second.seconds) == (1.2e-05, 0.00925, 20.0)

    def test_an_epoch_that_was_trained_again_counts_as_in_the_later_log(self, tmp_path):
        folder = tmp_path / "T__nnUNetPlans__3d_fullres"
        write_model(folder)
        again = LOG.replace("train_loss nan", "train_loss 0.125").replace("Epoch 0", "Epoch 2")
        (folder / "fold_0" / "training_log_2026_11_22_00_00_00.txt").write_text(again)
        epochs = models.read_model(folder).folds[0].epochs
        assert [epoch.number for epoch in epochs] == [0, 1, 2]
        assert epochs[1].train_loss == 0.125

    def test_model(self, study):
        model = models.read_model(study / "results" / "Dataset007_Study" / f"{TRAINER}__nnUNetPlans__3d_big")
        assert (model.trainer, model.plans, model.configuration) == (TRAINER, "nnUNetPlans", "3d_big")
        assert model.settings["batch size"] == "4"  # its own
        assert model.settings["patch"] == "32 × 48 × 48"  # inherited
        assert "'rank': 7" in model.options
        (fold,) = model.folds
        assert fold.finished
        assert fold.skipped_steps == 1
        assert fold.validation_dice == 0.625
        assert fold.environment == {"torch": "2.9.0", "device": "cuda:0", "epochs planned": "3"}
        assert model.train_command(fold) == f"nnUNetv2_train Dataset007_Study 3d_big 0 -tr {TRAINER} -p nnUNetPlans"

    def test_evaluation_has_the_numbers_of_the_csv(self, study):
        folder = study / "results" / "predictions"
        evaluation = evaluations.read_evaluation(folder / "evaluation.json", DATASET)
        table = pd.read_csv(folder / "evaluation.csv").set_index(["case", "label"])
        assert set(evaluation.cases) == set(CASES)
        for case, rows in evaluation.cases.items():
            for label, row in rows.items():
                for column, value in row.items():
                    assert value == pytest.approx(table.loc[(case, label), column], nan_ok=True)
        assert evaluation.mean[LABEL]["Dice"] == pytest.approx(table.loc[("mean", LABEL), "Dice"])
        assert evaluation.reliability[LABEL]["expected_calibration_error"] > 0

    def test_nnunets_summary_gets_the_datasets_names(self, tmp_path):
        rows = {"(1, 2)": {"Dice": 0.5}, "2": {"Dice": None}}
        entry = {"metrics": rows, "prediction_file": "p/a.png", "reference_file": "g/a.png"}
        file = tmp_path / "summary.json"
        file.write_text(json.dumps({"metric_per_case": [entry], "mean": rows, "foreground_mean": {"Dice": 0.5}}))
        dataset = {"labels": {"background": 0, "whole": [1, 2], "core": [2]}, "file_ending": ".png"}
        evaluation = evaluations.read_evaluation(file, dataset)
        assert evaluation.labels == ("whole", "core")
        assert evaluation.cases["a"]["whole"]["Dice"] == 0.5
        assert math.isnan(evaluation.cases["a"]["core"]["Dice"])

    def test_subsets_are_what_was_written(self, tmp_path):
        scores = write_subsets(tmp_path / "s")
        table = evaluations.read_subsets(tmp_path / "s" / "subsets.csv", "s")
        assert table.modalities == list(CHANNELS)
        assert len(table.cells) == len(scores.cells)
        for (key, cell), read in zip(scores.cells.items(), table.cells, strict=True):
            assert (read.model, read.label, read.metric) == (key.model, key.label, key.metric)
            assert read.mean == pytest.approx(cell.mean, rel=1e-5)
            assert read.p_holm == pytest.approx(cell.p_holm, rel=1e-5, nan_ok=True)

    def test_everything_below_the_folder_is_found(self, study):
        found = gather.gather_study([study / "results"], study / "images", None)
        assert [model.trainer for model in found.models] == [TRAINER]
        (run,) = found.predictions
        assert run.name == "predictions"
        assert [file.name for file in run.files["case_10"].samples] == [f"case_10__{i:03d}.nii.gz" for i in range(3)]
        assert run.maps["case_1"].keys() == run.maps["case_10"].keys() == {"entropy"}
        assert found.explanations[0].maps["case_1"].keys() == {"complementary: CT_core_from_PET"}
        assert found.images["case_1"].keys() == set(CHANNELS)
        assert found.images["case_2"].keys() == {"CT"}
        assert found.references["case_2"] == study / "labels" / "case_2.nii.gz"  # where the evaluation says
        assert found.subsets[0].values("model") == ["A_5epochs", "B_5epochs"]

    def test_a_map_is_of_the_longest_case_that_fits(self, tmp_path):
        for name in ("a_entropy", "a_b_entropy", "a_b_c_x", "z_entropy"):
            (tmp_path / f"{name}.nii.gz").touch()
        found = gather.find_maps(tmp_path, ["a", "a_b"])
        assert {case: sorted(maps) for case, maps in found.items()} == {"a": ["entropy"], "a_b": ["c_x", "entropy"]}

    def test_short_names_are_different(self):
        folders = [Path("/r/a/x"), Path("/r/b/x"), Path("/r/b/y")]
        assert list(gather.short_names(folders).values()) == ["a/x", "b/x", "y"]

    def test_an_evaluation_elsewhere_goes_to_its_predictions(self, tmp_path):
        write_predictions(tmp_path / "p", samples=0)
        save(tmp_path / "gt" / "case_1.nii.gz", box(0))
        assert (
            main(["evaluate", str(tmp_path / "gt"), str(tmp_path / "p"), "-np", "1", "-o", str(tmp_path / "e.json")])
            == 0
        )
        (run,) = gather.gather_study([tmp_path / "p", tmp_path / "e.json"], None, None).predictions
        assert run.evaluation.cases["case_1"][LABEL]["Dice"] == 1
        (alone,) = gather.gather_study([tmp_path / "e.json"], None, None).predictions
        assert (alone.name, alone.cases, alone.files) == ("e", ["case_1"], {})

    def test_crnps_uncertainty(self, tmp_path):
        save(tmp_path / "case_1_0001.nii.gz", np.ones(SHAPE, np.float32))
        (tmp_path / "uncertainty.json").write_text(json.dumps({"case_1": {"CT": 1.5, "PET": 2.5}}))
        explanation = gather.read_explanation(tmp_path, "u")
        assert explanation.maps["case_1"].keys() == {"uncertainty: PET"}
        rows = explanation.tables["uncertainty"]
        assert [(row["modality"], row["uncertainty"]) for row in rows] == [("CT", "1.5"), ("PET", "2.5")]

    def test_refusals(self, tmp_path, study):
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match="holds no model"):
            gather.gather_study([tmp_path / "empty"], None, None)
        with pytest.raises(UserError, match="neither a folder"):
            gather.gather_study([tmp_path / "nowhere"], None, None)
        with pytest.raises(UserError, match=r"-i .* is not a folder"):
            gather.gather_study([study / "results"], tmp_path / "nowhere", None)
        write_model(tmp_path / "renamed")
        with pytest.raises(UserError, match="TRAINER__PLANS__CONFIGURATION"):
            gather.gather_study([tmp_path / "renamed"], None, None)


class TestVolumes:
    @pytest.mark.parametrize("factors", [(1, 2, 3), (4, 4, 4), (1, 1, 1)])
    def test_shrinking_against_loops(self, factors):
        rng = np.random.default_rng(1)
        labels = rng.integers(0, 4, (5, 7, 8)).astype(np.uint8)
        image = rng.normal(size=labels.shape)
        shape = [-(-size // factor) for size, factor in zip(labels.shape, factors, strict=True)]
        small_image, small_labels = np.zeros(shape), np.zeros(shape)
        for index in np.ndindex(*shape):
            inside = [
                np.minimum(range(i * f, (i + 1) * f), size - 1)
                for i, f, size in zip(index, factors, labels.shape, strict=True)
            ]
            small_image[index] = image[np.ix_(*inside)].mean()
            small_labels[index] = np.bincount(labels[np.ix_(*inside)].ravel()).argmax()
        np.testing.assert_allclose(volumes.shrink_image(image, factors), small_image, atol=1e-6)
        np.testing.assert_array_equal(volumes.shrink_labels(labels, factors), small_labels)

    def test_the_finest_axes_are_shrunk_first(self):
        assert volumes.shrink_factors((10, 100, 100), (5, 1, 1), 30000) == (1, 2, 2)
        assert volumes.shrink_factors((10, 100, 100), (5, 1, 1), 100000) == (1, 1, 1)
        assert volumes.shrink_factors((1, 4, 4), (999, 1, 1), 1) == (1, 4, 4)

    @pytest.mark.parametrize(
        "direction", [(1, 0, 0, 0, 1, 0, 0, 0, 1), (0, 0, -1, 1, 0, 0, 0, -1, 0), (-1, 0, 0, 0, -1, 0, 0, 0, 1)]
    )
    @pytest.mark.parametrize("reader", [SimpleITKIO, NibabelIO])
    def test_patient_axes_are_those_of_simpleitk(self, tmp_path, direction, reader):
        array = np.arange(math.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
        save(tmp_path / "a.nii.gz", array, direction)
        expected = SimpleITK.DICOMOrient(SimpleITK.ReadImage(str(tmp_path / "a.nii.gz")), "LPS")
        data, properties = reader().read_images((str(tmp_path / "a.nii.gz"),))
        turned, grid = volumes.to_patient_axes(data[0], volumes.grid_of(data.shape[1:], properties))
        np.testing.assert_array_equal(turned, SimpleITK.GetArrayFromImage(expected))
        np.testing.assert_allclose(grid.spacing_mm, expected.GetSpacing()[::-1], atol=1e-5)
        voxel = (2, 3, 1)
        lps = expected.TransformIndexToPhysicalPoint(voxel)
        np.testing.assert_allclose(grid.affine @ [*voxel, 1], [-lps[0], -lps[1], lps[2], 1], atol=1e-4)

    def test_views_hold_the_volumes(self, study):
        found = gather.gather_study([study / "results"], study / "images", None)
        view = next(view for view in read_views(found, 2, 1.0) if view["case"] == "case_10")
        assert view["shape"] == view["original_shape"] == list(SHAPE)
        assert view["labels"] == {LABEL: [1]}
        assert [image["name"] for image in view["images"]] == list(CHANNELS)
        assert (view["images"][0]["low"], view["images"][0]["high"]) == (-75, 185)  # CT: of the plans
        run = view["runs"]["predictions"]
        np.testing.assert_array_equal(unzip(run["prediction"], SHAPE), box(1))
        np.testing.assert_array_equal(unzip(run["samples"], (2, *SHAPE)), [box(0), box(1)])
        np.testing.assert_array_equal(unzip(view["reference"], SHAPE), box(1))
        entropy = unfold(run["maps"][0]["data"], view)
        assert run["maps"][0]["high"] == pytest.approx(0.7)
        assert entropy[box(1) == 1].mean() > 200  # WebP loses a little
        assert entropy[box(1) == 0].mean() < 20
        ct = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(study / "images" / "case_10_0000.nii.gz")))
        grey = np.clip((ct + 75) / 260 * 255, 0, 255)
        assert np.abs(unfold(view["images"][0]["data"], view) - grey).mean() < 8

    def test_views_are_no_larger_than_they_may_be(self):
        rng = np.random.default_rng(0)
        noise = rng.normal(size=(20, 32, 32)).astype(np.float32)
        grid = volumes.Grid(noise.shape, np.diag([1.0, 1, 1, 1]), True)
        case = volumes.CaseVolumes("c", grid, {"x": (1,)}, {"a": noise}, {"a": (-2.0, 2.0)}, None, {}, {})
        case = volumes.CaseVolumes(**{**vars(case), "runs": {"r": volumes.Drawn((noise > 0).astype(np.uint8), (), {})}})
        free, bound = (volumes.encode_case(case, size) for size in (1e9, 7e3))
        assert free["shape"] == [20, 32, 32]
        assert len(json.dumps(bound)) <= 7e3 < len(json.dumps(free))
        centre = np.array(bound["affine"]) @ [0, 0, 0, 1]  # of the first block: the mean of its voxels
        factors = np.array(free["shape"]) / bound["shape"]
        np.testing.assert_allclose(centre[:3], (np.ceil(factors) - 1)[::-1] / 2)

    def test_other_grids_are_refused(self, study, tmp_path):
        write_predictions(tmp_path / "p")
        (tmp_path / "labels").mkdir()
        for case in CASES:
            image = SimpleITK.GetImageFromArray(box(0))
            SimpleITK.WriteImage(image, str(tmp_path / "labels" / f"{case}.nii.gz"))
        with pytest.raises(UserError, match=r"spacing.*must be on one grid"):
            read_views(gather.gather_study([tmp_path / "p"], None, tmp_path / "labels"), 1, 1)


def unzip(text, shape):
    return np.frombuffer(gzip.decompress(base64.b64decode(text)), np.uint8).reshape(shape)


def unfold(text, view):
    """A mosaic's slices (Z, Y, X)."""
    whole = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("L")).astype(float)
    depth, height, width = view["shape"]
    places = [divmod(z, view["columns"]) for z in range(depth)]
    return np.stack([whole[r * height : (r + 1) * height, c * width : (c + 1) * width] for r, c in places])


class TestPage:
    def test_is_well_formed_and_needs_nothing_else(self, written):
        parsed = WellFormed(written)
        assert len(set(parsed.ids)) == len(parsed.ids)
        assert all(link.startswith(("data:", "#")) for link in parsed.links)
        for anchor in (link[1:] for link in parsed.links if link.startswith("#")):
            assert anchor in parsed.ids
        assert "secret-host" not in written
        assert str(Path.home()) not in written

    def test_text_of_names_is_escaped(self, written):
        assert LABEL in WellFormed(written).text
        assert "<b>" not in re.sub(r"<script.*?</script>", "", written, flags=re.S)

    def test_json_cannot_end_its_element(self):
        content = {"</script><script>alert(1)</script>": ["<!--", "&", "\u2028", math.nan, (1, 2)]}
        text = str(page.safe_json(content))
        assert not set(text) & {"<", ">", "&", "\u2028"}
        assert json.loads(text) == {"</script><script>alert(1)</script>": ["<!--", "&", "\u2028", None, [1, 2]]}

    def test_numbers_are_those_of_the_files(self, written, study):
        table = pd.read_csv(study / "results" / "predictions" / "evaluation.csv").set_index(["case", "label"])
        rows = re.findall(r'<tr data-case="(\S+)" data-run="predictions"[^>]*>(.*?)</tr>', written, flags=re.S)
        assert [case for case, _ in rows] == sorted(CASES)
        for case, cells in rows:
            dice = float(re.search(r'data-value="([^"]*)" data-dice', cells)[1])
            assert dice == pytest.approx(table.loc[(case, LABEL), "Dice"])
            assert "PET" in cells if case == "case_2" else "PET" not in cells
        (data,) = json_of(written, 'id="data"')
        own = data["cases"]["case_1"]["runs"]["predictions"]
        voxel_ml = math.prod(SPACING_MM) / 1000
        assert own["references_ml"][LABEL] == pytest.approx(box(1).sum() * voxel_ml)
        assert own["labels"][LABEL]["volume_ml"]["prediction"] == pytest.approx(box(0).sum() * voxel_ml)
        changed = re.search(
            r">CT</th>.*?<td class=\"n\">2</td><td class=\"n\">(\S+)</td>.*?<td class=\"n\">(\S+)</td>", written, re.S
        )
        assert changed.groups() == ("0.500", "0.125")

    def test_sections_without_results_say_so(self, tmp_path, capsys):
        write_predictions(tmp_path / "p", samples=0)
        assert main(["report", str(tmp_path / "p"), "-o", str(tmp_path / "r.html")]) == 0
        text = re.sub(r"\s+", " ", WellFormed((tmp_path / "r.html").read_text()).text)
        for sentence in (
            "No evaluation of the predictions", "No trained model was named", "No table of subsets",
            "No measures of samples", "No volumes with intervals", "No reliability curves",
            "No explanation of the predictions", "No training log", "No images are shown",
            "No references are shown",
        ):  # fmt: skip
            assert sentence in text
        assert "3 cases" in capsys.readouterr().out

    def test_a_model_alone(self, tmp_path):
        write_model(tmp_path / "T__nnUNetPlans__3d_fullres")
        assert main(["report", str(tmp_path / "T__nnUNetPlans__3d_fullres"), "-o", str(tmp_path / "r.html")]) == 0
        text = (tmp_path / "r.html").read_text()
        assert "No pictures" in WellFormed(text).text
        assert 'id="viewer-code"' not in text
        assert "0.625" in text

    def test_2d_images_without_a_physical_size(self, tmp_path):
        folder = tmp_path / "p"
        folder.mkdir()
        (folder / "dataset.json").write_text(json.dumps({**DATASET, "file_ending": ".png"}))
        (folder / "plans.json").write_text(json.dumps({**PLANS, "image_reader_writer": "NaturalImage2DIO"}))
        array = np.zeros((30, 40), np.uint8)
        array[5:10, 5:25] = 1
        Image.fromarray(array).save(folder / "a.png")
        (view,) = read_views(gather.gather_study([folder], None, None), 1, 1)
        assert view["shape"] == [1, 30, 40]
        assert not view["oriented"]
        np.testing.assert_array_equal(unzip(view["runs"]["p"]["prediction"], (30, 40)), array)

    def test_a_page_is_not_overwritten_without_the_flag(self, study, tmp_path):
        file = tmp_path / "r.html"
        file.write_text("mine")
        arguments = ["report", str(study / "results"), "-o", str(file), "--megabytes", "0.1"]
        with pytest.raises(UserError, match="--overwrite"):
            main(arguments)
        assert file.read_text() == "mine"
        assert main([*arguments, "--overwrite"]) == 0
        assert file.read_text() != "mine"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["-o", "r.txt"], "ends in .html"),
            (["-o", "r.html", "--samples", "-1"], "--samples"),
            (["-o", "r.html", "--megabytes", "0"], "--megabytes"),
        ],
    )
    def test_flags_out_of_range(self, study, tmp_path, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=message):
            main(["report", str(study / "results"), *arguments])
        assert not list(tmp_path.iterdir())
