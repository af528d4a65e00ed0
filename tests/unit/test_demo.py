"""What the demo does besides running nnU-Net's commands."""

import argparse
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from nnunet_multimodal import demo
from nnunet_multimodal.demo import data, steps
from nnunet_multimodal.demo.picture import largest_slice
from nnunet_multimodal.demo.report import (
    Score,
    _results,
    format_table,
    list_structures,
    summarise,
    training_seconds,
    typical_case,
)
from nnunet_multimodal.demo.runner import environment, run_steps
from nnunet_multimodal.demo.settings import DemoError
from nnunet_multimodal.demo.steps import Step


def settings(*arguments):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return demo.resolve(parser.parse_args([*map(str, arguments), "--device", "cpu"]))


@pytest.fixture
def raw(tmp_path):
    """Five cases of two channels without a dataset.json; the files are empty."""
    folder = tmp_path / "raw" / "tumours"
    for split, names in {
        "imagesTr": [f"case{case}_{channel:04d}.nii.gz" for case in range(5) for channel in range(2)],
        "labelsTr": [f"case{case}.nii.gz" for case in range(5)],
    }.items():
        (folder / split).mkdir(parents=True)
        for name in names:
            (folder / split / name).touch()
    return folder


NAMES = ("--channel-names", "CT", "PET", "--labels", "tumour", "node")


def test_importing_the_command_imports_neither_torch_nor_matplotlib():
    import subprocess

    code = "import sys, nnunet_multimodal.demo; print({'torch', 'matplotlib', 'nnunetv2'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_defaults_and_names_of_datasets(tmp_path):
    synthetic = settings("--out", tmp_path)
    assert (synthetic.dataset, synthetic.dataset_id) == ("Dataset900_Demo", "900")
    assert synthetic.planner == "nnUNetPlannerTiny"
    assert settings("--data", "/x/sts", "--out", tmp_path).dataset == "Dataset901_sts"
    assert settings("--data", "/x/Dataset007_A_B", "--out", tmp_path).dataset == "Dataset007_A_B"
    assert settings("--data", "/x/Dataset007_A_B", "--dataset-id", 12, "--out", tmp_path).dataset == "Dataset012_A_B"
    assert settings("--data", "/x/sts", "--out", tmp_path).planner == "nnUNetPlannerCPU"


def test_values_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(DemoError, match="only read"):
        settings("--data", tmp_path, "--out", tmp_path / "out")
    with pytest.raises(DemoError, match="CRNPTrainer_5epochs has a length"):
        settings("--trainers", "CRNPTrainer_5epochs")
    with pytest.raises(DemoError, match="--data"):
        settings("--labels", "tumour")


def test_a_trainer_that_nobody_has_is_refused_at_the_start(monkeypatch):
    searched = []
    search = "nnunetv2.utilities.find_objects.recursive_find_python_class"  # imports all trainers: seconds
    monkeypatch.setattr(search, lambda folder, name, *_, **__: searched.append(name))
    with pytest.raises(DemoError, match="CNRPTrainer: nnU-Net finds no trainer"):
        settings("--trainers", "nnUNetTrainer", "CRNPTrainer", "CNRPTrainer")
    assert searched == ["CNRPTrainer"]


def test_a_dataset_without_json_needs_its_names(raw, tmp_path):
    with pytest.raises(DemoError, match=r"dataset.json does not exist; .*--channel-names"):
        data.describe(settings("--data", raw, "--out", tmp_path / "out"))
    description = data.describe(settings("--data", raw, "--out", tmp_path / "out", *NAMES))
    assert description == {
        "channel_names": {"0": "CT", "1": "PET"},
        "labels": {"background": 0, "tumour": 1, "node": 2},
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(description))
    assert data.describe(settings("--data", raw, "--out", tmp_path / "out")) == description
    with pytest.raises(DemoError, match="already names"):
        data.describe(settings("--data", raw, "--out", tmp_path / "out", *NAMES))


def test_wrong_data_is_named(raw, tmp_path):
    s = settings("--data", raw, "--out", tmp_path / "out", *NAMES)
    (raw / "imagesTr" / "case3_0001.nii.gz").unlink()
    with pytest.raises(DemoError, match=r"case3 has 1 channel files.*2 are named"):
        data.training_cases(s, data.describe(s))
    (raw / "labelsTr" / "case3.nii.gz").unlink()
    with pytest.raises(DemoError, match="4 labelled cases"):
        data.training_cases(s, data.describe(s))
    shutil.rmtree(raw / "labelsTr")
    with pytest.raises(DemoError, match="labelsTr is not a folder"):
        data.describe(s)


def test_data_is_linked_and_held_out_cases_are_those_of_the_fold(raw, tmp_path):
    s = settings("--data", raw, "--out", tmp_path / "out", *NAMES)
    assert not data.is_complete(s)
    data.link_dataset(s)
    assert data.is_complete(s)
    assert (s.raw / "imagesTr" / "case0_0001.nii.gz").resolve() == raw / "imagesTr" / "case0_0001.nii.gz"
    assert json.loads((s.raw / "dataset.json").read_text())["numTraining"] == 5
    s.preprocessed.mkdir(parents=True)
    (s.preprocessed / "splits_final.json").write_text(json.dumps([{"train": [], "val": ["case4", "case2"]}]))
    assert not data.is_linked(s)
    data.link_held_out(s)
    cases = data.held_out_cases(s)
    assert data.is_linked(s)
    assert list(cases) == ["case2", "case4"]
    assert [file.name for file in cases["case4"][0]] == ["case4_0000.nii.gz", "case4_0001.nii.gz"]


def test_a_deleted_file_of_the_dataset_is_missed(tmp_path):
    s = settings("--out", tmp_path)
    data.make_synthetic(s)
    assert data.is_complete(s)
    (s.raw / "imagesTs" / "demo_021_0001.nii.gz").unlink()
    assert not data.is_complete(s)


def test_files_listed_in_dataset_json_are_linked_by_nnunets_names(raw, tmp_path):
    listed = {
        f"p{n}": {"images": [f"imagesTr/case{n}_0001.nii.gz"], "label": f"labelsTr/case{n}.nii.gz"} for n in range(5)
    }
    description = {"channel_names": {"0": "PET"}, "labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps({**description, "dataset": listed}))
    s = settings("--data", raw, "--out", tmp_path / "out")
    data.link_dataset(s)
    assert (s.raw / "imagesTr" / "p3_0000.nii.gz").resolve() == raw / "imagesTr" / "case3_0001.nii.gz"
    assert "dataset" not in json.loads((s.raw / "dataset.json").read_text())


def test_changed_settings_are_refused_and_further_trainers_are_not(tmp_path):
    settings("--out", tmp_path).record()
    settings("--out", tmp_path, "--trainers", "EarlyFusionTrainer").record()
    with pytest.raises(DemoError, match=r"epochs is 9, but .* was made with \d+ \(recorded in .*demo.json\)"):
        settings("--out", tmp_path, "--epochs", 9).record()


def test_a_folder_of_other_results_is_not_touched(tmp_path):
    (tmp_path / "nnUNet_raw").mkdir()
    with pytest.raises(DemoError, match=r"nnUNet_raw exists but .*demo.json does not"):
        settings("--out", tmp_path).record()


def test_training_continues_from_a_whole_checkpoint_and_removes_a_broken_one(tmp_path):
    import zipfile

    s = settings("--out", tmp_path)
    fold = s.fold_folder("CRNPTrainer")
    fold.mkdir(parents=True)
    (train,) = (step for step in steps.demo_steps(s) if step.name == "train CRNPTrainer")
    (fold / "checkpoint_best.pth").write_bytes(b"half of a check")
    assert train.prepare() == []
    assert not (fold / "checkpoint_best.pth").exists()
    with zipfile.ZipFile(fold / "checkpoint_best.pth", "w") as file:
        file.writestr("data", "whole")
    assert train.prepare() == ["--c"]
    assert not train.is_done()


def test_training_time_counts_a_repeated_epoch_once(tmp_path):
    s = settings("--out", tmp_path)
    fold = s.fold_folder("CRNPTrainer")
    fold.mkdir(parents=True)
    lines = "2025-01-01 10:00:00: Epoch {} \n2025-01-01 10:00:09: Epoch time: {} s \n"
    (fold / "training_log_2025_1_1_10_00_00.txt").write_text(lines.format(0, 5.0) + lines.format(1, 7.5))
    (fold / "training_log_2025_1_1_11_00_00.txt").write_text(lines.format(1, 6.0) + lines.format(2, 4.0))
    assert training_seconds(s, "CRNPTrainer") == 15.0


def test_environment_keeps_what_the_user_set(tmp_path, monkeypatch):
    for name in ("OMP_WAIT_POLICY", "nnUNet_def_n_proc", "nnUNet_n_proc_DA"):
        monkeypatch.delenv(name, raising=False)
    s = settings("--out", tmp_path)
    assert environment(s, training=True)["nnUNet_n_proc_DA"] == "0"
    assert environment(s, training=False)["nnUNet_n_proc_DA"] == "1"
    assert environment(s, training=False)["OMP_WAIT_POLICY"] == "PASSIVE"
    assert environment(s, training=False)["nnUNet_raw"] == str(tmp_path / "nnUNet_raw")
    monkeypatch.setenv("nnUNet_def_n_proc", "3")
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    assert environment(s, training=True)["nnUNet_def_n_proc"] == "3"
    assert environment(s, training=True)["nnUNet_n_proc_DA"] == "2"


def python_step(code, is_done, **more):
    """A step whose command is a few lines of Python."""
    return Step("try", is_done, ("nnUNetv2_try", "1"), program=("-c", code), **more)


def test_a_failing_command_shows_the_end_of_its_log(tmp_path):
    s = settings("--out", tmp_path)
    code = "print('\\n'.join(f'line {n}' for n in range(40))); raise SystemExit(3)"
    with pytest.raises(DemoError) as error:
        run_steps(s, [python_step(code, lambda: False)])
    message = str(error.value)
    assert "exit status 3" in message
    assert "line 39" in message
    assert "line 10\n" not in message
    assert str(tmp_path / "logs" / "01_try.log") in message
    assert "nnUNetv2_try 1" in message


def test_a_command_that_leaves_nothing_is_an_error(tmp_path):
    with pytest.raises(DemoError, match="not all of its output is there"):
        run_steps(settings("--out", tmp_path), [python_step("pass", lambda: False)])


def test_a_step_runs_once_and_removes_what_it_makes_stale(tmp_path):
    made, stale = tmp_path / "made", tmp_path / "stale"
    stale.mkdir()
    step = python_step("open('made', 'a').write('x')", made.exists, makes_stale=(stale, tmp_path / "none"))
    for _ in range(2):
        run_steps(settings("--out", tmp_path), [step])
    assert made.read_text() == "x"
    assert not stale.exists()


def test_an_interruption_ends_the_command_and_its_workers(tmp_path):
    import os
    import signal
    import threading
    import time

    sleep = "import time; time.sleep(99)"
    code = f"import subprocess, sys; worker = subprocess.Popen([sys.executable, '-c', {sleep!r}])\n"
    code += f"open('worker', 'w').write(str(worker.pid)); {sleep}"

    def interrupt():
        while not (tmp_path / "worker").exists() or not (tmp_path / "worker").read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run_steps(settings("--out", tmp_path), [python_step(code, lambda: False)])
    state = Path("/proc") / (tmp_path / "worker").read_text() / "stat"
    time.sleep(0.2)
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_structures_of_labels_and_regions():
    labels = list_structures({"background": 0, "organ": 1, "lesion": 2, "ignore": 3})
    assert [(s.name, s.labels, s.key) for s in labels] == [("organ", (1,), "1"), ("lesion", (2,), "2")]
    regions = list_structures({"background": 0, "whole": [1, 2], "lesion": 2, "single": [3], "ignore": 4})
    assert [s.key for s in regions] == ["(1, 2)", "2", "(3,)"]
    np.testing.assert_array_equal(regions[0].mask(np.array([0, 1, 2, 3])), [False, True, True, False])


def test_means_leave_out_what_is_not_there():
    structures = list_structures({"background": 0, "organ": 1, "lesion": 2})
    scores = {
        "a": {"organ": Score(0.8, 2.0), "lesion": Score(0.0, math.inf)},
        "b": {"organ": Score(0.6, 4.0), "lesion": Score(math.nan, math.nan)},
    }
    summary = summarise(scores, structures)
    assert summary["structures"]["organ"] == pytest.approx({"dice": 0.7, "hd95_mm": 3.0, "hd95_infinite": 0})
    assert summary["structures"]["lesion"]["dice"] == 0.0
    assert math.isnan(summary["structures"]["lesion"]["hd95_mm"])
    assert summary["mean"] == pytest.approx({"dice": 0.35, "hd95_mm": 3.0})
    text = format_table({"CRNPTrainer": {**summary, "training_s": 12.3}}, structures)
    assert "0.700     3.00" in text
    assert "without 1 infinite" in text
    assert typical_case({"CRNPTrainer": scores}) == "b"


def test_the_cores_are_those_that_the_process_may_use(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 4, 5}, raising=False)
    assert _results(settings("--out", tmp_path), [], {}, {})["machine"]["cores"] == 3


def test_the_slice_shows_every_structure():
    truth = np.zeros((4, 8, 8), dtype=int)
    truth[1] = 1
    truth[2, :2] = 1
    truth[2, 5, 5] = 2
    assert largest_slice(truth, list_structures({"background": 0, "organ": 1, "lesion": 2})) == 2
