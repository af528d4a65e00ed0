"""Commands that are submitted: as they are built, as SLURM gets them, and run for once on this machine."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_multimodal import submit
from nnunet_multimodal.cli import main
from nnunet_multimodal.errors import UserError

PREDICT = "nnunet-multimodal predict -i images -o predictions -d 1 -c 3d_fullres"
TRAIN = "nnunet-multimodal train 1 3d_fullres 0 -tr CRNPTrainer --c"
needs_submitit = pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="submitit is not installed")


@pytest.fixture
def submitted(monkeypatch, tmp_path):
    """What SLURM is given, by commands of its names that write it down: submitted(argv) -> the script's lines."""
    (tmp_path / "bin").mkdir()
    for name, script in (("srun", ""), ("sbatch", f'cp "$1" {tmp_path}/script; echo Submitted batch job 77')):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")

    def submitted(*argv):
        assert main(["submit", "--logs", str(tmp_path / "logs"), *argv]) == 0
        return (tmp_path / "script").read_text().splitlines()

    return submitted


def flags(lines):
    """#SBATCH --key=value, as a dict."""
    return dict(line.removeprefix("#SBATCH --").split("=", 1) for line in lines if line.startswith("#SBATCH --"))


@pytest.mark.parametrize("command", [PREDICT, "nnUNetv2_predict -i images", "nnunet-multimodal evaluate gt pred"])
def test_an_array_gives_each_job_its_part(command):
    commands = submit.array_commands(command.split(), 3)
    assert [shlex.join(c) for c in commands] == [f"{command} -num_parts 3 -part_id {i}" for i in range(3)]


def test_an_array_gives_each_job_its_number_where_the_command_asks_for_it():
    commands = submit.array_commands(["nnUNetv2_train", "1", "3d_fullres", "{}", "-p", "plans_{}"], 2)
    assert [shlex.join(c) for c in commands] == [f"nnUNetv2_train 1 3d_fullres {i} -p plans_{i}" for i in range(2)]
    assert submit.array_commands(["nnUNetv2_train", "1"], None) == [["nnUNetv2_train", "1"]]


def test_training_on_several_gpus_or_nodes_is_started_by_torchrun():
    assert submit.torchrun_processes(TRAIN.split(), nodes=2, gpus=4) == 4
    assert submit.torchrun_processes(TRAIN.split(), nodes=2, gpus=0) == 1  # -device cpu
    assert submit.torchrun_processes(TRAIN.split(), nodes=1, gpus=2) == 2
    assert submit.torchrun_processes(TRAIN.split(), nodes=1, gpus=1) == 0
    assert submit.torchrun_processes(["nnUNetv2_train", "-num_gpus", "4"], nodes=1, gpus=4) == 0
    assert shlex.join(submit.under_torchrun(TRAIN.split(), 4, 2, "node7", "3042")) == (
        "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint node7:29542 --rdzv-id 3042 --nproc-per-node 4 "
        "-m nnunet_multimodal train 1 3d_fullres 0 -tr CRNPTrainer --c"
    )
    assert shlex.join(submit.under_torchrun(TRAIN.split(), 4, 1, "node7", "3042")).startswith(
        "torchrun --standalone --nproc-per-node 4 -m nnunet_multimodal train 1"
    )


@pytest.mark.parametrize(("time", "minutes"), [("48:00:00", 2880), ("2-01:30:00", 2970), ("00:00:01", 1)])
def test_times_are_those_of_slurm(time, minutes):
    assert submit.minutes(time) == minutes


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--array", "0", "--", *PREDICT.split()), "--array 0: give the number of jobs"),
        (("--array", "2", "--", "nnUNetv2_train", "1"), "'nnUNetv2_train 1' has no -num_parts; write {}"),
        (("--", "nnUNetv2_train", "1", "2d", "{}"), "give --array"),
        (("--nodes", "2", "--", *PREDICT.split()), "--nodes 2: only 'nnunet-multimodal train' knows several machines"),
        (("--nodes", "0", "--", *PREDICT.split()), "give at least 1 node and 0 GPUs"),
    ],
)
def test_flags_that_do_not_fit_the_command_are_refused(argv, message):
    with pytest.raises(UserError) as error:
        main(["submit", *argv])
    assert message in str(error.value)


def test_without_submitit_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"pip install 'nnunet-multimodal\[slurm\]'"):
        main(["submit", "--", *PREDICT.split()])


@needs_submitit
def test_slurm_gets_the_flags_of_the_documented_scripts(submitted):
    training = flags(
        submitted("--nodes", "2", "--gpus", "4", "--cpus", "48", "--time", "48:00:00", "--", *TRAIN.split())
    )
    expected = {"nodes": "2", "ntasks-per-node": "1", "gpus-per-node": "4", "cpus-per-task": "48", "time": "2880"}
    assert expected.items() <= training.items()
    assert not {"array", "partition", "mem"} & set(training)
    array = ("--array", "20", "--partition", "gpu", "--mem", "64", "--slurm", "qos=long", "mail-user=a@b.c")
    lines = submitted(*array, "--cpus", "8", "--", *PREDICT.split())
    expected = {"array": "0-19%20", "partition": "gpu", "mem": "64GB", "qos": "long", "mail-user": "a@b.c"}
    assert {**expected, "gpus-per-node": "1", "time": "1440"}.items() <= flags(lines).items()
    assert flags(lines)["job-name"] == "nnunet-multimodal_predict"
    (call,) = [line for line in lines if line.startswith("srun")]
    assert "--cpus-per-task=8 " in call
    assert "gpus-per-node" not in flags(submitted("--gpus", "0", "--", *PREDICT.split()))


@needs_submitit
def test_documented_commands(documented, submitted):
    lines = []
    documented.run(lambda command: lines.append(submitted(*command[2:])))
    nodes, folds, parts, evaluation = map(flags, lines)
    assert (nodes["nodes"], nodes["gpus-per-node"], nodes["cpus-per-task"]) == ("2", "4", "48")
    assert (folds["array"], folds["time"], parts["array"]) == ("0-4%5", "2880", "0-19%20")
    assert evaluation["dependency"] == "afterok:JOB"
    assert "gpus-per-node" not in evaluation


@needs_submitit
def test_every_job_of_an_array_has_its_command(submitted, tmp_path, capsys):
    from submitit.core.utils import DelayedSubmission

    submitted("--array", "3", "--", *PREDICT.split())
    printed = capsys.readouterr().out
    for index in range(3):
        job = DelayedSubmission.load(tmp_path / "logs" / f"77_{index}_submitted.pkl")
        command = f"{PREDICT} -num_parts 3 -part_id {index}"
        assert (job.function, job.args) == (submit.run_task, (command.split(), 0, 1))
        assert f"77_{index}: {command}\n" in printed


def test_times_and_flags_of_another_form_are_refused():
    for flag in ("account", "account="):
        with pytest.raises(UserError, match="give KEY=VALUE"):
            main(["submit", "--slurm", flag, "--", *PREDICT.split()])
    for time in ("48", "0:00:00", "soon"):
        with pytest.raises(UserError, match=f"--time {time}: give"):
            main(["submit", "--time", time, "--", *PREDICT.split()])


@needs_submitit
def test_what_slurm_refuses_is_told(submitted, monkeypatch, tmp_path):
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho invalid partition >&2; exit 1\n")
    with pytest.raises(UserError, match=r"(?s)SLURM takes no such job:.*invalid partition"):
        submitted("--partition", "none", "--", *PREDICT.split())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"srun.*--local runs the command here"):
        submitted("--", *PREDICT.split())


@needs_submitit
def test_the_nodes_of_a_job_meet_at_the_first(monkeypatch, capfd):
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: ran.append(shlex.join(command)))
    for name, value in {
        "SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "3042", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_PROCID": "1",
        "SLURM_ARRAY_JOB_ID": "3040", "SLURM_ARRAY_TASK_ID": "2",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    submit.run_task(TRAIN.split(), 4, 2)
    assert ran == [shlex.join(submit.under_torchrun(TRAIN.split(), 4, 2, "gpu07", "3042"))]
    assert capfd.readouterr().out == f"{ran[0]}\n"


@needs_submitit
def test_two_parts_run_on_this_machine(tmp_path, monkeypatch, capfd):
    """The command is one of this Python's folder, found though PATH does not have it."""
    script = "import json, os, sys; json.dump([sys.argv[1:], os.environ['HELLO']], open(sys.argv[1], 'w'))"
    (tmp_path / "write.py").write_text(script)
    monkeypatch.setenv("HELLO", "from here")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    python = Path(sys.executable).name
    argv = ["submit", "--local", "--gpus", "0", "--array", "2", "--logs", str(tmp_path / "logs")]
    assert main([*argv, "--", python, str(tmp_path / "write.py"), str(tmp_path / "{}.json"), "--c"]) == 0
    for index in range(2):
        file = tmp_path / f"{index}.json"
        assert json.loads(file.read_text()) == [[str(file), "--c"], "from here"]
    assert main([*argv, "--", python, "-c", "print('so far'); exit({})"]) == 1
    printed = capfd.readouterr().out
    (failed,) = [line for line in printed.splitlines() if " failed: " in line]
    assert "returned non-zero exit status 1" in Path(failed.split(" failed: ")[1]).read_text()
    outputs = [file.read_text() for file in (tmp_path / "logs").glob("*_log.out")]
    assert sum("so far\n" in output for output in outputs) == 2
