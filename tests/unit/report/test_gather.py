"""What is on disk, as the report finds and reads it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nnunet_multimodal.cli import main
from nnunet_multimodal.errors import UserError
from nnunet_multimodal.report import evaluations, gather, models
from tests.unit.report.study import (
    CASES,
    CHANNELS,
    DATASET,
    LABEL,
    LOG,
    RATERS,
    SHAPE,
    SPACING_MM,
    TRAINER,
    box,
    save,
    write_model,
    write_predictions,
    write_subsets,
)


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

    def test_evaluations_elsewhere_have_names_of_their_own(self, tmp_path):
        write_predictions(tmp_path / "p", samples=0)
        rows = {"metric_per_case": [], "mean": {}, "foreground_mean": {}}
        for file in (tmp_path / "p.json", tmp_path / "a" / "e.json", tmp_path / "b" / "e.json"):
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(rows))
        named = [tmp_path / "p.json", tmp_path / "a" / "e.json", tmp_path / "b" / "e.json", tmp_path / "p.json"]
        runs = gather.gather_study([tmp_path / "p", *named], None, None).predictions
        assert [run.name for run in runs] == ["p", "p.json", "a/e", "b/e"]

    def test_a_folder_may_be_named_twice(self, study):
        results = study / "results"
        found = gather.gather_study([results, results / "predictions", results], None, None)
        assert [run.name for run in found.predictions] == ["predictions"]
        assert len(found.models) == len(found.subsets) == len(found.explanations) == 1

    def test_raters_are_those_of_the_evaluation_or_of_the_folder(self, rated_study, tmp_path):
        results, folder = rated_study / "results", rated_study / "raters"
        expected = {case: {rater: folder / f"{case}__{rater}.nii.gz" for rater in RATERS} for case in CASES[:2]}
        assert gather.gather_study([results], None, None).raters == expected
        other = {case: {"D": tmp_path / f"{case}__D.nii.gz"} for case in ("case_1", "no case of these")}
        for files in other.values():
            save(files["D"], box(0))
        found = gather.gather_study([results], None, None, tmp_path).raters
        assert found == {"case_1": other["case_1"]}

    def test_raters_that_are_no_longer_there_are_left_out(self, rated_study):
        (run,) = gather.gather_study([rated_study / "results"], None, None).predictions
        gone = {"case_1": {"A": Path("nowhere/case_1__A.nii.gz")}}
        evaluation = replace(run.evaluation, raters={**run.evaluation.raters, **gone})
        assert gather._find_raters(None, [replace(run, evaluation=evaluation)]).keys() == {"case_10"}

    def test_volumes_are_in_ml_or_where_there_is_no_size_in_voxels(self, study):
        found = gather.gather_study([study / "results"], None, None)
        (run,) = found.predictions
        assert (found.unit, run.voxel_size("case_1", "ml")) == ("ml", pytest.approx(math.prod(SPACING_MM) / 1000))
        own = {"labels": {LABEL: {"volume_ml": None, "voxels": {"prediction": 7.0}}}, "spacing": [1, 1]}
        run = replace(run, summaries={"case_1": own})
        assert gather.Study(predictions=(run,)).unit == "voxels"
        assert (run.volume("case_1", LABEL, "voxels"), run.voxel_size("case_1", "voxels")) == ({"prediction": 7.0}, 1)
        assert (run.volume("case_1", LABEL, "ml"), run.voxel_size("case_1", "ml")) == ({}, None)
        assert gather.Study().unit == "ml"
        own["labels"][LABEL]["voxels"]["prediction"] = math.nan  # which Python's JSON can have
        assert run.volume("case_1", LABEL, "voxels") == {}

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
        nowhere = tmp_path / "nowhere"
        for number, flag in enumerate(("-i", "-ref", "--raters")):
            folders = [nowhere if number == own else None for own in range(3)]
            with pytest.raises(UserError, match=rf"{flag} .* is not a folder"):
                gather.gather_study([study / "results"], *folders)
        write_model(tmp_path / "renamed")
        with pytest.raises(UserError, match="TRAINER__PLANS__CONFIGURATION"):
            gather.gather_study([tmp_path / "renamed"], None, None)
