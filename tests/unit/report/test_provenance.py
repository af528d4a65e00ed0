"""Where things come from: what commands leave on disk, and what the page makes of it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from nnunet_multimodal import __version__
from nnunet_multimodal import provenance as left
from nnunet_multimodal.cli import main
from nnunet_multimodal.report import gather, models, provenance
from tests.unit.report.study import CASES, LOG, TRAINER, WellFormed, box, made, save, write_model, write_predictions

VERSIONS = "nnunet-multimodal 0.0.1, nnunetv2 2.8.0, torch 2.8.0, python 3.11.1"
CHECKPOINT = "fold_0/checkpoint_final.pth (12.3 MB, 2025-11-24 16:00 UTC)"


class Log:
    """What a trainer would write to its log."""

    def __init__(self):
        self.text = ""

    def print_to_log_file(self, line, also_print_to_console=True):
        assert not also_print_to_console
        self.text += f"2026-11-21 15:02:47.100000: {line} \n"


@pytest.fixture(scope="module")
def found(study):
    return gather.gather_study([study / "results"], None, None)


def told(record):
    """Row -> what it says, and of whom."""
    return {row.name: [tuple(value) for value in row.values] for row in record.rows}


def alone(record):
    """Row -> the one thing that it says."""
    return {name: text for name, ((text, of),) in told(record).items() if not of}


class TestLeft:
    @pytest.mark.parametrize(
        ("argv", "expected"),
        [
            (["/venv/bin/nnunet-multimodal", "predict", "-i", "/a b"], ["nnunet-multimodal", "predict", "-i", "/a b"]),
            (["/x/nnunet_multimodal/__main__.py", "train", "1"], ["nnunet-multimodal", "train", "1"]),
            (["/venv/bin/nnUNetv2_train", "1", "2d", "0"], ["nnUNetv2_train", "1", "2d", "0"]),
            (["/x/pytest/__main__.py", "-q"], None),
            (["mine.py"], None),
            ([""], None),
        ],
    )
    def test_the_command_is_that_of_the_process(self, monkeypatch, argv, expected):
        monkeypatch.setattr("sys.argv", argv)
        assert left.made()["command"] == expected
        assert left.made()["versions"]["nnunet-multimodal"] == __version__
        assert left.made()["versions"].keys() == {"python", "nnunet-multimodal", "nnunetv2", "torch"}

    def test_a_start_is_read_as_it_was_logged(self, monkeypatch):
        monkeypatch.setattr("sys.argv", ["nnunet-multimodal", "train", "1", "2d", "0", "--seed", "5"])
        log = Log()
        left.log_start(log, seed=5, processes=2)  # the command, then our trainer
        left.log_start(log)
        start = left.logged_start(f"something\n{log.text}else\n")
        assert start == {**left.made(), "seed": 5, "processes": 2}
        assert left.logged_start("") == {}
        assert left.logged_start(log.text.splitlines()[0][:-9]) == {}  # killed while it wrote


class TestTraining:
    def test_a_start_tells_versions_and_command(self, found):
        (model,) = found.models
        own = alone(provenance.of_model(model))
        assert own["versions"] == "nnunet-multimodal 0.0.1, nnunetv2 2.8.0, torch 2.9.0, python not recorded"
        assert own["command"] == "nnUNetv2_train 7 3d_big 0 -pretrained_weights start.pth"
        assert own["seed"] == "none"
        assert (own["device"], own["epochs planned"]) == ("cuda:0", "3")
        assert "a command like it" not in own

    def test_what_nnunets_own_training_does_not_tell_is_not_recorded(self, tmp_path):
        folder = tmp_path / "nnUNetTrainer__nnUNetPlans__3d_fullres"
        write_model(folder)
        (log,) = (folder / "fold_0").glob("training_log_*")
        log.write_text("\n".join(line for line in LOG.splitlines() if left.STARTED not in line))
        own = alone(provenance.of_model(models.read_model(folder)))
        unknown = provenance.UNKNOWN
        assert own["versions"] == f"nnunet-multimodal {unknown}, nnunetv2 {unknown}, torch 2.9.0, python {unknown}"
        assert (own["seed"], own["command"]) == (unknown, unknown)
        expected = "nnUNetv2_train Dataset007_Study 3d_fullres 0 -tr nnUNetTrainer -p nnUNetPlans"
        assert own["a command like it"] == expected
        (folder / "fold_0" / "debug.json").unlink()
        assert alone(provenance.of_model(models.read_model(folder)))["versions"] == unknown

    def test_every_start_of_every_fold_is_told(self, tmp_path):
        folder = tmp_path / f"{TRAINER}__nnUNetPlans__3d_fullres"
        write_model(folder)
        shutil.copytree(folder / "fold_0", folder / "fold_1")
        log = Log()
        left.log_start(log, seed=5, processes=1)
        again = log.text + "2026-11-22 15:02:47.276726: Epoch 2 \n"
        (folder / "fold_1" / "training_log_2026_11_22_00_00_00.txt").write_text(again)
        (folder / "fold_1" / "training_log_2026_11_23_00_00_00.txt").write_text(log.text)  # --val: trains no epoch
        rows = told(provenance.of_model(models.read_model(folder)))
        assert rows["seed"] == [("none", "fold 0; fold 1, start 1"), ("5", "fold 1, start 2")]
        assert rows["processes"] == [(provenance.UNKNOWN, "fold 0; fold 1, start 1"), ("1", "fold 1, start 2")]
        assert rows["plans"] == [("nnUNetPlans", "")]


class TestPredictions:
    def test_settings_of_every_case(self, tmp_path):
        write_predictions(tmp_path / "p")
        file = tmp_path / "p" / f"{CASES[0]}.json"
        other = {"seed": 7, "drop": ["CT", "PET"], "temperature": 0.5, "mirroring": False}
        file.write_text(json.dumps({**json.loads(file.read_text()), **other}))
        (run,) = gather.gather_study([tmp_path / "p"], None, None).predictions
        rows = told(provenance.of_predictions(run))
        assert rows["seed"] == [("7", "1 case"), ("5", "2 cases")]
        assert rows["modalities dropped"] == [("CT, PET", "1 case"), ("none", "2 cases")]
        assert rows["mirrored"] == [("no", "1 case"), ("yes", "2 cases")]
        assert rows["temperature"] == [("0.5", "1 case"), ("1", "2 cases")]
        own = {name: values[0][0] for name, values in rows.items()}
        assert (own["trainer"], own["plans"], own["samples"]) == (TRAINER, "nnUNetPlans", "3")
        assert (own["checkpoints"], own["step of the window"]) == (CHECKPOINT, "0.5")
        assert own["model"] == f"Dataset007_Study/{TRAINER}__nnUNetPlans__3d_big"
        assert (own["class scale"], own["compact (samples with weights)"]) == ("none", "no")
        assert (own["versions"], own["command"]) == (VERSIONS, "nnunet-multimodal predict -i images")

    def test_nnunets_arguments(self, tmp_path):
        write_predictions(tmp_path / "p", samples=0)
        arguments = {
            "list_of_lists_or_source_folder": "/home/me/imagesTs/",
            "output_folder_or_list_of_truncated_output_files": "/home/me/p",
            "save_probabilities": True,
            "folder_with_segs_from_prev_stage": "/home/me/lowres",
            "num_parts": 2,
        }
        (tmp_path / "p" / gather.ARGUMENTS).write_text(json.dumps(arguments))
        (run,) = gather.gather_study([tmp_path / "p"], None, None).predictions
        own = alone(provenance.of_predictions(run))
        assert (own["images"], own["previous stage"]) == ("imagesTs", "lowres")
        assert (own["probabilities saved"], own["parts"]) == ("yes", "2")
        assert {own[name] for name in ("trainer", "checkpoints", "mirrored", "versions", "command")} == {
            provenance.UNKNOWN
        }
        assert "seed" not in own

    def test_many_different_values_are_cut_off(self):
        rows = provenance.rows_of({str(case): {"seed": str(case)} for case in range(20)}, provenance._count)
        assert [value.text for value in rows[0].values] == [*map(str, range(6)), "and 14 more"]


class TestOthers:
    def test_evaluation(self, rated_study):
        (run,) = gather.gather_study([rated_study / "results"], None, None).predictions
        own = alone(provenance.of_evaluation(run.name, run.evaluation))
        assert (own["file"], own["references"], own["raters"]) == ("evaluation.json", "labels", "raters")
        assert (own["tolerance of the surface distance"], own["first samples measured too"]) == ("1 mm", "none")
        assert f"nnunet-multimodal {__version__}" in own["versions"]
        assert own["command"] == provenance.UNKNOWN  # of a test, which is none

    def test_evaluation_of_raters_alone(self, rated_study, tmp_path):
        for place, folder in (("raters", "raters"), ("results/predictions", "p")):
            shutil.copytree(rated_study / place, tmp_path / folder)
        arguments = ["--samples", "2", "--tolerance_mm", "2", "-np", "1"]
        assert main(["evaluate", str(tmp_path / "raters"), str(tmp_path / "p"), *arguments]) == 0
        (run,) = gather.gather_study([tmp_path / "p"], None, None).predictions
        own = alone(provenance.of_evaluation(run.name, run.evaluation))
        assert (own["references"], own["raters"]) == ("majority of raters", "raters")
        assert (own["tolerance of the surface distance"], own["first samples measured too"]) == ("2 mm", "2")

    def test_nnunets_summary(self, found):
        own = alone(provenance.of_evaluation("v", found.models[0].folds[0].validation))
        assert (own["file"], own["references"], own["raters"]) == ("summary.json", "g", "none")
        assert own["tolerance of the surface distance"] == "not measured"
        assert own["versions"] == own["command"] == provenance.UNKNOWN
        assert "first samples measured too" not in own

    def test_subsets(self, found):
        rows = told(provenance.of_subsets(found.subsets[0]))
        assert rows["model"] == [("Dataset007/A_5epochs", "A_5epochs"), ("Dataset007/B_5epochs", "B_5epochs")]
        assert rows["step of the window"] == [("0.5", "A_5epochs"), ("0.25", "B_5epochs")]
        assert rows["checkpoints"] == [("fold_0/checkpoint_final.pth (2.0 MB, 2025-11-24 16:00 UTC)", "")]
        assert rows["baseline"] == [("A_5epochs", "")]
        assert rows["command"] == [("nnunet-multimodal evaluate --all-subsets labelsTs", "")]

    def test_explanation(self, found):
        (explanation,) = found.explanations
        own = alone(provenance.of_explanation(explanation))
        assert (own["checkpoints"], own["mirrored"], own["versions"]) == (CHECKPOINT, "yes", VERSIONS)
        assert own["command"] == "nnunet-multimodal explain -o=explained"
        assert "attribution" not in own
        more = {"explain": {**explanation.made_with["explain"], "attribution": "gradcam"}}
        assert alone(provenance.of_explanation(replace(explanation, made_with=more)))["attribution"] == "gradcam"
        own = alone(provenance.of_explanation(replace(explanation, made_with={})))
        assert set(own.values()) == {provenance.UNKNOWN}

    def test_results_of_earlier_versions_have_nothing_recorded(self, tmp_path):
        save(tmp_path / "case_1_0001.nii.gz", box(0))
        (tmp_path / "uncertainty.json").write_text(json.dumps({"case_1": {"CT": 1.5, "PET": 2.5}}))
        (explanation,) = gather.gather_study([tmp_path], None, None).explanations
        assert set(alone(provenance.of_explanation(explanation)).values()) == {provenance.UNKNOWN}


class TestPage:
    def test_no_folder_of_a_machine_is_on_the_page(self, written):
        for secret in ("/home/", "Users", "secret-host", str(Path.home())):
            assert secret not in written
        text = " ".join(WellFormed(written).text.split())
        for heading in (
            "This page", f"Training: {TRAINER}, 3d_big", "Predictions: predictions", "Evaluation: predictions",
            "Subsets of the modalities: subsets", "Explanation: explained", f"Plans of {TRAINER}",
        ):  # fmt: skip
            assert heading in text
        assert "nnUNetv2_train 7 3d_big 0 -pretrained_weights start.pth" in text

    @pytest.mark.parametrize(
        ("typed", "expected"),
        [
            (["predict", "-i", "/a/b c/"], "nnunet-multimodal predict -i 'b c'"),
            (["predict", "-o=../../x/out"], "nnunet-multimodal predict -o=out"),
            (["predict", "-i", r"D:\me\images"], "nnunet-multimodal predict -i images"),
            (["predict", "--class-scale", "a=2", "-o", "."], "nnunet-multimodal predict --class-scale a=2 -o ."),
            (["predict", "-i", "/"], "nnunet-multimodal predict -i /"),
            (["predict", "-i/home/me/images"], "nnunet-multimodal predict -iimages"),
            (["predict", "-i", "/home/me/M\udcfcller"], r"nnunet-multimodal predict -i 'M\udcfcller'"),
        ],
    )
    def test_commands_without_folders(self, typed, expected):
        assert provenance.shown_command(made(*typed)["command"]) == expected
