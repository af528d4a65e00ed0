"""kill -9 in every stage: nothing half-written is taken for whole, and the same command again completes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_multimodal import cli
from nnunet_multimodal.errors import UserError
from tests.nnunet import DATASET, PLANS, segmentation

WORKER = Path(__file__).parents[1] / "killed_worker.py"
TRAINER = "SSNTrainer_2epochs_1iterations"


@pytest.fixture(scope="module")
def nnunet(datasets, tmp_path_factory):
    return datasets("labels").with_results(tmp_path_factory.mktemp("killed") / "results")


def killed(nnunet, where, *command):
    """Start a command that is killed; it must not end by itself."""
    with nnunet.environment(nnUNet_compile="f", nnUNet_n_proc_DA="1" if "plan" in command[0] else "0"):
        environment = {**os.environ, "KILL_AT": where, "PYTHONPATH": str(WORKER.parents[1])}
    ended = subprocess.run(
        [sys.executable, str(WORKER), *map(str, command)], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True, check=False, timeout=300,
    )  # fmt: skip
    assert ended.returncode == -signal.SIGKILL, ended.stdout.decode()[-3000:]


def ours(nnunet, *arguments):
    with nnunet.environment():
        return cli.main(list(map(str, arguments)))


def test_planning(nnunet):
    plan = ("nnUNetv2_plan_experiment", "-d", 900, "-pl", "nnUNetPlannerCRNP", "-gpu_memory_target", 0.02,
            "-overwrite_plans_name", "killed")  # fmt: skip
    file = nnunet.preprocessed / DATASET / "killed.json"
    killed(nnunet, "replace 1", *plan)
    assert not file.exists()
    nnunet(*plan, nnUNet_n_proc_DA="1")
    plans = json.loads(file.read_text())
    plans["configurations"]["mine"] = {"inherits_from": "2d"}
    file.write_text(json.dumps(plans))
    killed(nnunet, "replace 1", *plan)
    assert json.loads(file.read_text()) == plans
    nnunet(*plan, nnUNet_n_proc_DA="1")
    assert json.loads(file.read_text()) == plans


def test_preprocessing(nnunet):
    plans = {**nnunet.plans(), "plans_name": "torn"}
    for name, configuration in plans["configurations"].items():
        configuration["data_identifier"] = f"torn_{name}"
    nnunet.write_plans(plans)
    preprocess = ("nnUNetv2_preprocess", "-d", 900, "-plans_name", "torn", "-c", "2d", "-np", 1)
    train = ("nnUNetv2_train", 900, "2d", 0, "-tr", TRAINER, "-p", "torn", "-device", "cpu")
    killed(nnunet, "pickle 2", *preprocess)
    folder = nnunet.preprocessed / DATASET / "torn_2d"
    assert len(list(folder.glob("*_seg.b2nd"))) == 2
    with pytest.raises(
        UserError, match=r"torn_2d has 1 whole cases of 5 .*not whole: case_1.*nnUNetv2_preprocess again"
    ):
        nnunet(*train)
    nnunet(*preprocess)
    nnunet(*train)


def test_training_while_a_checkpoint_is_written(nnunet):
    fold = nnunet.model(TRAINER, "2d") / "fold_0"
    train = ("nnUNetv2_train", 900, "2d", 0, "-tr", TRAINER, "-p", PLANS, "-device", "cpu")
    killed(nnunet, "replace 2", *train)  # the first is checkpoint_best of the first epoch
    assert torch.load(fold / "checkpoint_best.pth", weights_only=False)["current_epoch"] == 1
    assert not (fold / "checkpoint_final.pth").exists()
    nnunet(*train, "--c")
    assert torch.load(fold / "checkpoint_final.pth", weights_only=False)["current_epoch"] == 2


def test_prediction_and_evaluation(nnunet, tmp_path):
    if not (nnunet.model(TRAINER, "2d") / "fold_0" / "checkpoint_final.pth").exists():
        nnunet.train(TRAINER, "2d")
    images = nnunet.raw / DATASET / "imagesTr"

    def predict(name, *more):
        model = ("-d", 900, "-c", "2d", "-tr", TRAINER, "-p", PLANS, "-f", 0, "-device", "cpu")
        samples = ("--disable_tta", "--samples", 3, "--save-samples", "-npp", 0)
        return ("predict", "-i", images, "-o", tmp_path / name, *model, *samples, *more)

    assert ours(nnunet, *predict("whole")) == 0
    killed(nnunet, "replace 12", "nnunet-multimodal", *predict("torn"))
    complete = {file.stem for file in (tmp_path / "torn").glob("case_*.json")}
    assert 0 < len(complete) < 5
    times = {name: (tmp_path / "torn" / f"{name}.json").stat().st_mtime_ns for name in complete}
    assert ours(nnunet, *predict("torn", "--continue_prediction")) == 0
    assert times == {name: (tmp_path / "torn" / f"{name}.json").stat().st_mtime_ns for name in complete}
    names = sorted(file.relative_to(tmp_path / "whole") for file in (tmp_path / "whole").rglob("*.nii.gz"))
    assert len(names) == 5 * (1 + 3 + 3)
    for name in names:
        torn, whole = (segmentation(tmp_path / folder / name) for folder in ("torn", "whole"))
        np.testing.assert_allclose(torn, whole, rtol=0, atol=1e-5, err_msg=str(name))  # another process may round

    evaluate = ("evaluate", nnunet.raw / DATASET / "labelsTr", tmp_path / "torn", "-np", 1)
    killed(nnunet, "replace 2", "nnunet-multimodal", *evaluate)  # the first is evaluation.csv
    assert not (tmp_path / "torn" / "evaluation.json").exists()
    assert ours(nnunet, *evaluate) == 0
    assert len(json.loads((tmp_path / "torn" / "evaluation.json").read_text())["metric_per_case"]) == 5
