"""``nnunet-multimodal train`` on several machines (agents of torchrun on this one), and with a seed."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.backends import cudnn

from nnunet_multimodal.cli import main
from nnunet_multimodal.errors import UserError
from nnunet_multimodal.train import kernels, local_device
from nnunet_multimodal.trainer import MultimodalTrainer
from tests.contracts import fixed_batches
from tests.nnunet import PLANS

WORKER = Path(__file__).parents[1] / "distributed_worker.py"


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start(nnunet, machines, trainer, *flags, folder=None, kill=None):
    """One agent of torchrun for each machine, which starts one process; how they ended."""
    with nnunet.environment():
        own = {"WORKER_FOLDER": str(folder)} if folder else {}
        own |= {"WORKER_KILL": kill} if kill else {}
        environment = {**os.environ, **own, "nnUNet_compile": "f", "PYTHONPATH": str(WORKER.parents[1])}
    rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}", "--rdzv-id", "test")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nnodes", str(machines), *rendezvous)
    launcher = launcher if machines > 1 else (sys.executable,)
    train = (str(WORKER), "train", "900", "3d_fullres", "0", "-tr", trainer, "-p", PLANS, "-device", "cpu", *flags)
    agents = [
        subprocess.Popen([*launcher, *train], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(machines)
    ]
    outputs = [agent.communicate(timeout=300)[0].decode() for agent in agents]
    return [agent.returncode for agent in agents], "\n".join(outputs)


@pytest.fixture
def batches(datasets, tmp_path):
    """Four of nnU-Net's batches in a file."""
    nnunet = datasets("labels")
    trainer = nnunet.trainer("EarlyFusionTrainer")
    with nnunet.environment():
        trainer.initialize()
        loader, _ = fixed_batches(trainer, trainer.get_dataloaders)
        torch.save([next(loader) for _ in range(4)], tmp_path / "batches.pt")
    return tmp_path


@pytest.mark.parametrize("batch_dice", [False, True])
def test_two_machines_train_as_one_process_does(datasets, batches, tmp_path, batch_dice):
    nnunet = datasets("labels").with_results(tmp_path / "results")
    plans = nnunet.plans()
    stated = plans["configurations"]["3d_fullres"]["batch_dice"]
    plans["configurations"]["3d_fullres"]["batch_dice"] = batch_dice
    nnunet.write_plans(plans)
    done = {}
    try:
        for machines in (1, 2):
            codes, output = start(nnunet, machines, "CRNPTrainer_1epoch_20iterations", "--seed", "0", folder=batches)
            assert codes == [0] * machines, output
            done[machines] = [torch.load(batches / f"rank{rank}.pt", weights_only=False) for rank in range(machines)]
    finally:
        plans["configurations"]["3d_fullres"]["batch_dice"] = stated
        nnunet.write_plans(plans)
    ((alone,), (first, second)) = done[1], done[2]
    together = torch.tensor([first["losses"], second["losses"]]).mean(0)
    assert len(alone["losses"]) == 20
    assert alone["losses"][-1] < alone["losses"][0] - 0.2
    torch.testing.assert_close(together, torch.tensor(alone["losses"]), rtol=0, atol=1e-4)
    for key, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][key]), key
        torch.testing.assert_close(weight, alone["weights"][key], rtol=1e-3, atol=1e-4)
    fold = nnunet.model("CRNPTrainer_1epoch_20iterations", "3d_fullres") / "fold_0"
    assert (fold / "validation" / "summary.json").is_file()


def test_a_killed_process_ends_all_and_the_training_goes_on(datasets, tmp_path):
    nnunet = datasets("labels").with_results(tmp_path / "results")
    trainer = "ShaSpecModalityDropoutTrainer_3epochs_3iterations"
    codes, output = start(nnunet, 2, trainer, "--seed", "0", folder=tmp_path, kill="1 1")
    assert 0 not in codes, output
    fold = nnunet.model(trainer, "3d_fullres") / "fold_0"
    assert torch.load(fold / "checkpoint_latest.pth", weights_only=False)["current_epoch"] == 1
    codes, output = start(nnunet, 2, trainer, "--seed", "1", "--c", folder=tmp_path)
    assert codes == [0, 0], output
    assert torch.load(fold / "checkpoint_final.pth", weights_only=False)["current_epoch"] == 3
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1))
    assert len(first["absent"]) == len(second["absent"]) == 6
    assert any(not torch.equal(*subsets) for subsets in zip(first["absent"], second["absent"], strict=True))
    assert all(torch.equal(weight, second["weights"][key]) for key, weight in first["weights"].items())


def test_the_log_names_what_another_process_skipped(datasets, batches, tmp_path):
    given = torch.load(batches / "batches.pt", weights_only=False)
    given[1]["data"][1, 0].flatten()[:3] = torch.inf  # the second process's
    torch.save(given, batches / "batches.pt")
    nnunet = datasets("labels").with_results(tmp_path / "results")
    trainer = "EarlyFusionTrainer_1epoch_3iterations"
    codes, output = start(nnunet, 2, trainer, folder=batches)
    assert codes == [0, 0], output
    logs = (nnunet.model(trainer, "3d_fullres") / "fold_0").glob("training_log*.txt")  # a second one begins its own
    lines = [line for log in logs for line in log.read_text().splitlines() if "Step skipped" in line]
    first, second = given[1]["keys"]
    assert len(lines) == 2
    assert f"process 0 of 2, cases {first}: images are finite; see the other processes'" in lines[0]
    assert f"process 1 of 2, cases {second}: T1 of {second} has 3 infinite voxels" in lines[1]


def train(nnunet, *flags):
    with nnunet.environment():
        return main(["train", "900", "2d", "0", "-p", PLANS, "-device", "cpu", *flags])


def test_a_seed_repeats_a_training_bit_for_bit(datasets, tmp_path, monkeypatch):
    weights, state = [], kernel_state()
    train_step = MultimodalTrainer.train_step
    monkeypatch.setattr(MultimodalTrainer, "train_step", lambda *own: seen.add(kernel_state()) or train_step(*own))
    seen = set()
    for index, seed in enumerate(("7", "7", "8")):
        nnunet = datasets("labels").with_results(tmp_path / str(index))
        assert train(nnunet, "-tr", "SSNModalityDropoutTrainer_1epoch_4iterations", "--seed", seed) == 0
        fold = nnunet.model("SSNModalityDropoutTrainer_1epoch_4iterations", "2d") / "fold_0"
        assert (fold / "validation" / "summary.json").is_file()
        weights.append(torch.load(fold / "checkpoint_final.pth", weights_only=False)["network_weights"])
    assert seen == {(True, True, False, True, ":4096:8")}
    assert kernel_state() == state
    first, again, other = weights
    assert all(torch.equal(weight, again[key]) for key, weight in first.items())
    assert any(not torch.equal(weight, other[key]) for key, weight in first.items())


def kernel_state():
    """What torch is told of kernels: deterministic, no more than a warning, cuDNN's fastest, cuDNN's deterministic."""
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    return strict, warns, cudnn.benchmark, cudnn.deterministic, os.environ.get("CUBLAS_WORKSPACE_CONFIG")


def test_kernels_are_afterwards_as_before(monkeypatch):
    before = kernel_state()
    with kernels(deterministic=False):
        assert kernel_state() == (*before[:2], True, False, before[4])
    assert kernel_state() == before
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    torch.use_deterministic_algorithms(True)
    try:
        with kernels(deterministic=True):
            assert kernel_state() == (True, True, False, True, ":16:8")
        assert kernel_state() == (True, False, *before[2:4], ":16:8")
    finally:
        torch.use_deterministic_algorithms(False)


def test_threads_are_shared_among_the_cores_that_the_process_may_use(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    try:
        assert local_device("cpu") == torch.device("cpu")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_what_cannot_be_is_refused(datasets, monkeypatch):
    nnunet = datasets("labels")
    with pytest.raises(UserError, match="--val_best needs the checkpoint"):
        train(nnunet, "--val_best", "--disable_checkpointing")
    with pytest.raises(UserError, match="give one of them"):
        train(nnunet, "--c", "-pretrained_weights", "a.pth")
    with pytest.raises(SystemExit):
        train(nnunet, "--c", "--val")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="process 3 of this machine has no GPU: there are 2"):
        train(nnunet, "-device", "cuda")
    with pytest.raises(UserError, match="one process"):
        train(nnunet, "-device", "mps")
