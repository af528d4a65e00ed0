"""nnUNetv2_train on any number of machines, and with a seed.

  torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
      -m nnunet_multimodal train 1 3d_fullres 0 -tr CRNPTrainer

nnU-Net's own -num_gpus knows one machine. Under torchrun this command takes its rank from the environment; every other
flag, the trainers (nnU-Net's too), the folders and the batch size of the plans, which all processes share, are
nnU-Net's. All machines must see the same nnUNet_preprocessed and nnUNet_results. Without torchrun it trains in one
process, as nnUNetv2_train does.

--seed repeats the initial weights, the batches, what losses draw and which modalities are dropped: bit for bit on CPUs
of the same kind, with the same versions, threads and processes, with nnUNet_n_proc_DA=0. On GPUs it takes deterministic
kernels, and torch warns of operations that have none. It does not cover these, nor nnU-Net's background workers, which
augment and arrive in no fixed order, nor --c, which starts to draw anew.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as trainer_module  # noqa: N813
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from torch import distributed
from torch.backends import cudnn
from torch.nn.parallel import DistributedDataParallel

from nnunet_multimodal.doctor import cpu_cores
from nnunet_multimodal.errors import UserError
from nnunet_multimodal.images import read_json
from nnunet_multimodal.provenance import log_start

BACKENDS = {"cuda": "nccl", "cpu": "gloo"}
CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # without it matrix products on GPUs may differ from run to run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """nnUNetv2_train's flags, without -num_gpus, and a seed."""
    parser.add_argument("dataset", help="dataset name or id")
    parser.add_argument("configuration", help="such as 3d_fullres")
    parser.add_argument("fold", type=_fold, help="0 to 4, or all")
    parser.add_argument("-tr", default="nnUNetTrainer", help="trainer (default: nnUNetTrainer)")
    parser.add_argument("-p", default="nnUNetPlans", help="plans identifier (default: nnUNetPlans)")
    parser.add_argument("-pretrained_weights", metavar="FILE", help="nnU-Net checkpoint to start from")
    parser.add_argument("--npz", action="store_true", help="save the validation's probabilities")
    going_on = parser.add_mutually_exclusive_group()
    going_on.add_argument("--c", action="store_true", help="continue from the latest checkpoint")
    going_on.add_argument("--val", action="store_true", help="only validate")
    parser.add_argument("--val_best", action="store_true", help="validate checkpoint_best")
    parser.add_argument("--disable_checkpointing", action="store_true", help="write no checkpoint")
    parser.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="device (default: cuda)")
    parser.add_argument("--backend", choices=("nccl", "gloo"), help="default: nccl on GPUs, gloo on CPUs")
    parser.add_argument("--seed", type=int, help="of everything that this process draws; see above (default: none)")


def _fold(text: str) -> int | str:
    return text if text == "all" else int(text)


def run(args: argparse.Namespace) -> int:
    """Train and validate; returns the exit status.

    Raises:
        UserError: flags that exclude each other, or no such device.
    """
    if args.val_best and args.disable_checkpointing:
        raise UserError("--val_best needs the checkpoint that --disable_checkpointing leaves out; give one of them")
    if args.pretrained_weights and args.c:
        raise UserError("-pretrained_weights begins a training and --c goes on with one; give one of them")
    with kernels(deterministic=args.seed is not None):
        _train(args)
    return 0


def _train(args: argparse.Namespace) -> None:
    under_torchrun = "RANK" in os.environ
    device = local_device(args.device)
    dataset = maybe_convert_to_dataset_name(int(args.dataset) if args.dataset.isdigit() else args.dataset)
    read_json(Path(nnUNet_preprocessed) / dataset / f"{args.p}.json", "configurations")
    trainer = get_trainer_from_args(
        args.dataset, args.configuration, args.fold, args.tr, args.p, args.c, torch.device(device.type)
    )
    trainer.disable_checkpointing = args.disable_checkpointing
    if under_torchrun:
        distributed.init_process_group(args.backend or BACKENDS[device.type])
        take_part(trainer, device)
    if args.seed is not None:
        seed_everything(args.seed + (distributed.get_rank() if under_torchrun else 0))
    with wrapped_for(device):
        maybe_load_checkpoint(trainer, args.c, args.val, args.pretrained_weights)
        if not args.val:
            processes = distributed.get_world_size() if under_torchrun else 1
            log_start(trainer, seed=args.seed, processes=processes)  # of nnU-Net's own trainers too
            trainer.run_training()
    if args.val_best:
        trainer.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_best.pth"))
    trainer.perform_actual_validation(args.npz)
    if under_torchrun:
        distributed.destroy_process_group()


def local_device(kind: str) -> torch.device:
    """This process's device, the one of its rank on its machine; threads as nnU-Net has them.

    On CPUs the processes of a machine share the cores that they may use.

    Raises:
        UserError: fewer GPUs than processes, or a kind that several processes cannot train on.
    """
    index, processes = (int(os.environ.get(name, default)) for name, default in (
        ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)
    ))  # fmt: skip
    if kind == "cuda":
        if index >= torch.cuda.device_count():
            raise UserError(
                f"process {index} of this machine has no GPU: there are {torch.cuda.device_count()}; give torchrun "
                "--nproc-per-node as many processes as there are, or -device cpu"
            )
        torch.set_num_threads(1)
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    if kind == "mps" and "RANK" in os.environ:
        raise UserError("-device mps trains in one process; start it without torchrun")
    if kind == "cpu":
        torch.set_num_threads(max(1, cpu_cores() // processes))
    return torch.device(kind)


def take_part(trainer: Any, device: torch.device) -> None:
    """Make a trainer one of the process group's. nnU-Net's constructor would take the rank for a GPU's index."""
    trainer.is_ddp = True
    trainer.local_rank = distributed.get_rank()  # who logs and writes: one process of all machines
    trainer.device = device


@contextmanager
def wrapped_for(device: torch.device) -> Iterator[None]:
    """nnU-Net wraps its network for the GPU of its rank; here it is wrapped for ``device``."""

    def wrap(network: torch.nn.Module, device_ids: Any = None) -> DistributedDataParallel:
        return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)

    original = trainer_module.DDP
    trainer_module.DDP = wrap
    try:
        yield
    finally:
        trainer_module.DDP = original


@contextmanager
def kernels(deterministic: bool) -> Iterator[None]:
    """Deterministic kernels where there are some, torch warns where not; or, as in nnU-Net, the fastest of cuDNN.

    nnU-Net's predictor, so its validation at the end, times cuDNN's kernels again and takes the fastest of these.

    Afterwards all is as before.
    """
    fastest, repeatable = cudnn.benchmark, cudnn.deterministic
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    workspace = os.environ.get(CUBLAS_WORKSPACE)
    cudnn.benchmark, cudnn.deterministic = not deterministic, deterministic
    if deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
        os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")  # read when cuBLAS starts
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = fastest, repeatable
        torch.use_deterministic_algorithms(strict, warn_only=warns)
        if workspace is None:
            os.environ.pop(CUBLAS_WORKSPACE, None)


def seed_everything(seed: int) -> None:
    """Python's, NumPy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (nnU-Net's loaders draw from it)
    torch.manual_seed(seed)
