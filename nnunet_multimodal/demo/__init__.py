"""Plain nnU-Net and CRNP side by side, on synthetic data or on yours.

Runs nnU-Net's own commands: fingerprint, plan, preprocess, and for every trainer train, predict and evaluate, all
with the same plans and the same length. Ends with a table (Dice and HD95 per structure, training time), the same in
OUT/results.json, and a picture in OUT/results.png.

Interrupted, the same command goes on where it was. What is deleted from OUT is made again.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnunet_multimodal.demo.settings import Settings

TRAINERS = ("nnUNetTrainer", "CRNPTrainer")
SYNTHETIC_LENGTH = (6, 50)  # epochs, iterations
REAL_LENGTH = (24, 100)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The demo's options."""
    parser.add_argument(
        "--out", type=Path, default=Path("nnunet_multimodal_demo"), metavar="DIR",
        help="everything is kept here (default: ./nnunet_multimodal_demo)",
    )  # fmt: skip
    parser.add_argument(
        "--data", type=Path, metavar="DIR",
        help="a raw dataset of yours (imagesTr, labelsTr, dataset.json); only read. Default: synthetic data",
    )  # fmt: skip
    parser.add_argument(
        "--channel-names", nargs="+", metavar="NAME", help="where --data has no dataset.json: CT PET T1"
    )
    parser.add_argument("--labels", nargs="+", metavar="NAME", help="likewise: the foreground labels 1, 2, ...")
    parser.add_argument("--dataset-id", type=_integer(1, 999), help="default: 900, or 901 with --data")
    parser.add_argument("--trainers", nargs="+", default=list(TRAINERS), help=f"default: {' '.join(TRAINERS)}")
    lengths = "default: {} on synthetic data, {} on yours"
    parser.add_argument("--epochs", type=_integer(1), help=lengths.format(SYNTHETIC_LENGTH[0], REAL_LENGTH[0]))
    parser.add_argument(
        "--iterations", type=_integer(1), help=f"of an epoch; {lengths.format(SYNTHETIC_LENGTH[1], REAL_LENGTH[1])}"
    )
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), help="default: cuda where there is one, else cpu")
    parser.add_argument("--fold", type=_integer(0, 4), default=0, help="default: 0; with --data its cases are held out")
    parser.add_argument(
        "--planner",
        help="default: nnUNetPlannerTiny on synthetic data; on yours nnUNetPlannerCPU, on a GPU nnU-Net's default",
    )
    parser.add_argument("--configuration", choices=("2d", "3d_lowres", "3d_fullres"), default="3d_fullres")
    parser.add_argument("--spacing", nargs=3, type=float, metavar=("Z", "Y", "X"), help="target spacing in mm")
    parser.add_argument(
        "--seed", type=_integer(0), default=0, help="of the synthetic data and the trainings (default: 0)"
    )


def run(args: argparse.Namespace) -> int:
    """Run or go on with the demo; returns the exit status."""
    from nnunet_multimodal.demo import data
    from nnunet_multimodal.demo.report import report
    from nnunet_multimodal.demo.runner import run_steps
    from nnunet_multimodal.demo.settings import DemoError
    from nnunet_multimodal.demo.steps import demo_steps

    try:
        settings = resolve(args)
        if settings.data is not None:
            data.training_cases(settings, data.describe(settings))
        settings.record()
        steps = demo_steps(settings)
        run_steps(settings, steps)
        report(settings, steps)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def resolve(args: argparse.Namespace) -> Settings:
    """Settings from the command line: defaults filled in, values checked.

    Raises:
        DemoError: a value that cannot be.
    """
    from nnunet_multimodal.demo.settings import DemoError, Settings
    from nnunet_multimodal.lookup import split_length

    synthetic = args.data is None
    out = args.out.resolve()
    data = None if synthetic else args.data.resolve()
    if data is not None and (out == data or data in out.parents):
        raise DemoError(f"--out {out} lies in --data {data}, which is only read; give a folder elsewhere")
    if synthetic and (args.channel_names or args.labels):
        raise DemoError("--channel-names and --labels describe a dataset of yours; give its folder with --data")
    for trainer in args.trainers:
        if split_length(trainer)[1:] != (None, None):
            raise DemoError(f"--trainers {trainer} has a length; give the base name, and the length with --epochs")
        if not _is_trainer(trainer):
            raise DemoError(f"--trainers {trainer}: nnU-Net finds no trainer of this name")
    device = args.device or ("cuda" if _cuda_is_available() else "cpu")
    epochs, iterations = SYNTHETIC_LENGTH if synthetic else REAL_LENGTH
    return Settings(
        out=out,
        data=data,
        channel_names=tuple(args.channel_names) if args.channel_names else None,
        labels=tuple(args.labels) if args.labels else None,
        dataset=_dataset_name(data, args.dataset_id),
        trainers=tuple(dict.fromkeys(args.trainers)),
        epochs=args.epochs or epochs,
        iterations=args.iterations or iterations,
        device=device,
        fold=args.fold,
        planner=args.planner or _default_planner(synthetic, device),
        configuration=args.configuration,
        spacing_mm=tuple(args.spacing) if args.spacing else None,
        seed=args.seed,
    )


def _is_trainer(name: str) -> bool:
    from nnunet_multimodal.lookup import COMBINATIONS

    if name in {*TRAINERS, *COMBINATIONS}:
        return True  # nnU-Net's search imports all its trainers
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    try:
        recursive_find_trainer_class_by_name(name)
    except RuntimeError:
        return False
    return True


def _dataset_name(data: Path | None, dataset_id: int | None) -> str:
    if data is None:
        return f"Dataset{dataset_id or 900:03d}_Demo"
    named = re.fullmatch(r"Dataset(\d{3})_(.+)", data.name)
    if named is None:
        return f"Dataset{dataset_id or 901:03d}_{data.name}"
    return f"Dataset{dataset_id or int(named[1]):03d}_{named[2]}"


def _default_planner(synthetic: bool, device: str) -> str:
    if synthetic:
        return "nnUNetPlannerTiny"
    return "nnUNetPlannerCPU" if device == "cpu" else "ExperimentPlanner"


def _cuda_is_available() -> bool:
    import torch

    return torch.cuda.is_available()


def _integer(lowest: int, highest: int | None = None) -> Callable[[str], int]:
    """An argument type: an integer within bounds."""

    def parse(text: str) -> int:
        value = int(text)
        if value < lowest or (highest is not None and value > highest):
            bounds = f"{lowest} or more" if highest is None else f"{lowest} to {highest}"
            raise argparse.ArgumentTypeError(f"{value} is not allowed; use {bounds}")
        return value

    parse.__name__ = "integer"
    return parse
