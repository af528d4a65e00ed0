"""Submit a command to SLURM, through submitit (pip install 'nnunet-multimodal[slurm]').

  nnunet-multimodal submit --time 48:00:00 --gpus 1 --array 5 -- nnUNetv2_train 1 3d_fullres {} -tr CRNPTrainer --c
  nnunet-multimodal submit --time 8:00:00 --array 20 -- nnunet-multimodal predict -i images -o predictions …
  nnunet-multimodal submit --nodes 2 --gpus 4 -- nnunet-multimodal train 1 3d_fullres 0 -tr CRNPTrainer --c

With --array N the command is submitted N times, as one array: {} in it becomes 0 to N-1; without {} the flags
-num_parts N -part_id 0 to N-1 are added, which the predicting commands and nnunet-multimodal evaluate take.
nnunet-multimodal train is started by torchrun where there is more than one GPU or node. The environment goes along, and
what the command prints goes to --logs. What SLURM has other flags for, --slurm KEY=VALUE passes on.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from nnunet_multimodal.errors import UserError

INDEX = "{}"  # in a command: the number of the array's job
TRAIN = ("nnunet-multimodal", "train")
IN_PARTS = (
    ("nnUNetv2_predict",), ("nnUNetv2_predict_from_modelfolder",),
    ("nnunet-multimodal", "predict"), ("nnunet-multimodal", "evaluate"),
)  # fmt: skip
TIME = re.compile(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)")  # SLURM reads 48 as minutes, 48:00 as minutes too
FIRST_PORT, PORTS = 29500, 1000  # jobs that share a machine must not share a port


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SLURM's names where it has them, and the command."""
    parser.add_argument("--partition", help="of the cluster (default: the cluster's)")
    parser.add_argument("--time", default="24:00:00", help="[D-]HH:MM:SS, the limit of each job (default: 24:00:00)")
    parser.add_argument("--nodes", type=int, default=1, help="machines of each job (default: 1)")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of each machine (default: 1)")
    parser.add_argument("--cpus", type=int, help="CPUs of each machine (default: the cluster's)")
    parser.add_argument("--mem", type=float, metavar="GB", help="memory of each machine (default: the cluster's)")
    parser.add_argument("--array", type=int, metavar="N", help="submit the command N times, see above")
    parser.add_argument("--name", help="of the job (default: the command's first words)")
    parser.add_argument("--slurm", nargs="+", default=[], metavar="KEY=VALUE", help="other flags of sbatch")
    parser.add_argument(
        "--logs", type=Path, default=Path("slurm_logs"), metavar="FOLDER",
        help="output and submitit's files, seen by all machines (default: slurm_logs)",
    )  # fmt: skip
    parser.add_argument(
        "--local", action="store_true", help="run the jobs on this machine instead, all at once, and wait for them"
    )
    parser.add_argument("argv", nargs="+", metavar="COMMAND", help="what is run, after --")


def run(args: argparse.Namespace) -> int:
    """Submit, and say what was submitted; returns the exit status, with ``--local`` 1 if a job failed.

    Raises:
        UserError: submitit or SLURM is not there, SLURM refuses the job, or flags do not fit the command.
    """
    commands = array_commands(args.argv, args.array)
    processes = torchrun_processes(args.argv, args.nodes, args.gpus)
    flags = parameters(args)
    try:
        executor = import_submitit().AutoExecutor(args.logs, cluster="local" if args.local else "slurm")
    except RuntimeError as error:  # no srun
        raise UserError(f"{error} --local runs the command here") from error
    executor.update_parameters(**flags)
    tasks = [(command, processes, args.nodes) for command in commands]
    try:
        jobs = executor.map_array(run_task, *zip(*tasks, strict=True))
    except RuntimeError as error:  # what sbatch says
        raise UserError(f"SLURM takes no such job: {error}") from error
    for job, command in zip(jobs, commands, strict=True):
        print(f"{job.job_id}: {shlex.join(command)}")
    print(f"output: {args.logs}/JOB_TASK_log.out and .err")
    if not args.local:
        return 0
    failed = [job for job in jobs if job.exception() is not None]
    for job in failed:
        print(f"{job.job_id} failed: {job.paths.stderr}")
    return int(bool(failed))


def import_submitit() -> ModuleType:
    """The library, which is an extra.

    Raises:
        UserError: it is not there.
    """
    try:
        import submitit
    except ImportError as error:
        raise UserError(f"{error}; pip install 'nnunet-multimodal[slurm]'") from error
    return submitit


def array_commands(command: Sequence[str], number: int | None) -> list[list[str]]:
    """The command of each job of an array, or the one command.

    Raises:
        UserError: a command that knows no parts and does not say where the job's number belongs.
    """
    indexed = any(INDEX in word for word in command)
    if number is None:
        if indexed:
            raise UserError(f"{INDEX} in {shlex.join(command)!r} is the number of an array's job; give --array")
        return [list(command)]
    if number < 1:
        raise UserError(f"--array {number}: give the number of jobs, at least 1")
    if indexed:
        return [[word.replace(INDEX, str(index)) for word in command] for index in range(number)]
    if not any(tuple(command[: len(words)]) == words for words in IN_PARTS):
        raise UserError(f"--array: {shlex.join(command)!r} has no -num_parts; write {INDEX} where the number belongs")
    return [[*command, "-num_parts", str(number), "-part_id", str(index)] for index in range(number)]


def torchrun_processes(command: Sequence[str], nodes: int, gpus: int) -> int:
    """Processes that torchrun starts on each machine; 0 for a command that is run as it is.

    Raises:
        UserError: a command that knows one machine, on several.
    """
    if nodes < 1 or gpus < 0:
        raise UserError(f"--nodes {nodes} --gpus {gpus}: give at least 1 node and 0 GPUs")
    if tuple(command[:2]) == TRAIN and (nodes > 1 or gpus > 1):
        return max(gpus, 1)
    if nodes > 1:
        raise UserError(
            f"--nodes {nodes}: only {' '.join(TRAIN)!r} knows several machines, not {shlex.join(command)!r}"
        )
    return 0


def under_torchrun(command: Sequence[str], processes: int, nodes: int, host: str, job: str) -> list[str]:
    """`nnunet-multimodal train` with torchrun before it, as each machine starts it.

    Args:
        command: which begins with TRAIN.
        processes: of each machine.
        nodes: number of machines.
        host: the first of them.
        job: its number.
    """
    if nodes == 1:
        meeting = ["--standalone"]  # takes a free port
    else:
        port = FIRST_PORT + int(job) % PORTS
        meeting = ["--nnodes", str(nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{host}:{port}"]
        meeting += ["--rdzv-id", job]
    return ["torchrun", *meeting, "--nproc-per-node", str(processes), "-m", "nnunet_multimodal", *command[1:]]


def run_task(command: Sequence[str], processes: int, nodes: int) -> None:
    """What a job runs on each of its machines: the command, found beside this Python first."""
    if processes:
        environment = import_submitit().JobEnvironment()
        command = under_torchrun(command, processes, nodes, environment.hostnames[0], environment.raw_job_id)
    print(shlex.join(command), flush=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    subprocess.run(command, check=True, env={**os.environ, "PATH": path})


def parameters(args: argparse.Namespace) -> dict[str, Any]:
    """What submitit calls the flags.

    Raises:
        UserError: a time or a --slurm that is not of its form.
    """
    others = dict(text.partition("=")[::2] for text in args.slurm)
    if not all(others.values()):
        raise UserError(f"--slurm {' '.join(args.slurm)}: give KEY=VALUE, such as account=mine")
    return {
        "name": args.name or "_".join(word for word in args.argv[:2] if not word.startswith("-")),
        "timeout_min": minutes(args.time),
        "nodes": args.nodes,
        "tasks_per_node": 1,
        "gpus_per_node": args.gpus or None,
        "cpus_per_task": args.cpus,
        "mem_gb": args.mem,
        "slurm_partition": args.partition,
        "slurm_array_parallelism": args.array,
        # srun of SLURM 22.05 and 23.02 does not take it from sbatch
        "slurm_srun_args": None if args.cpus is None else [f"--cpus-per-task={args.cpus}"],
        "slurm_additional_parameters": others or None,
    }


def minutes(time: str) -> int:
    """Of [D-]HH:MM:SS, rounded up.

    Raises:
        UserError: another form, or no time.
    """
    match = TIME.fullmatch(time)
    days, hours, mins, seconds = (int(text or 0) for text in (match.groups() if match else (0, 0, 0, 0)))
    total = (days * 24 + hours) * 60 + mins + (seconds > 0)
    if not total:
        raise UserError(f"--time {time}: give hours, minutes and seconds, such as 48:00:00 or 2-00:00:00")
    return total
