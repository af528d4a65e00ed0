"""Stochastic segmentation networks on lung nodules that four raters outlined (LIDC), split by patient.

Three models of the same plan and length, deterministic, diagonal and low-rank, each trained on one rater per slice,
drawn at random once ("one"), and on every rater's label as a training case of its own ("all"). All runs through
nnU-Net's own commands and ``nnunet-multimodal predict``; the work folder keeps what is done. The measures are those of
Monteiro et al., *Stochastic Segmentation Networks*, NeurIPS 2020, section 5.2 and Table 1; floors without any learning
are computed on the same held-out slices.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _common as common
import numpy as np
from _lidc_report import (
    Case,
    draw_samples,
    draw_scores,
    floors,
    quantile_cases,
    rater_scores,
    read_prediction,
    score,
    summarise,
)
from skimage import io
from sts import training_seconds

DATA = "lidc_multirater"
DATASETS = {"one": "Dataset501_LIDCOneRater", "all": "Dataset502_LIDCAllRaters"}
TRAINERS = {"deterministic": "EarlyFusionTrainer", "diagonal": "SSNDiagonalTrainer", "low-rank": "SSNTrainer"}
PLANS = "nnUNetLIDCPlans"
RATERS = 4
SEEDED_TRAINING = """
import random, sys, numpy, torch
from nnunetv2.run.run_training import get_trainer_from_args
dataset, trainer, plans, device, seed, threads = sys.argv[1:]
random.seed(int(seed)); numpy.random.seed(int(seed)); torch.manual_seed(int(seed))
torch.set_num_threads(int(threads))
trainer = get_trainer_from_args(dataset, "2d", "all", trainer, plans, device=torch.device(device))
trainer.run_training()
"""  # nnUNetv2_train -f all, but for its validation at the end, on the training cases


class Slices:
    """The data, their middle ``crop`` x ``crop`` pixels, and which patients are held out.

    No patient is held out in two folds.
    """

    def __init__(self, folder: Path, crop: int, held_out: int, seed: int, fold: int = 0) -> None:
        with np.load(folder / "lidc_dev.npz") as data:
            images, masks = data["images"], data["masks"]  # (N, 128, 128), (N, 4, 128, 128), uint8
            self.patients = data["patient"]
        start = (images.shape[-1] - crop) // 2
        middle = (..., slice(start, start + crop), slice(start, start + crop))
        self.images, self.masks = images[middle], masks[middle]
        self.nodule_pixels_lost = 1 - self.masks.sum(dtype=np.int64) / masks.sum(dtype=np.int64)
        generator = np.random.default_rng(seed)
        patients = np.unique(self.patients)
        first = generator.choice(patients, held_out, replace=False)
        self.rater = generator.integers(RATERS, size=len(self.images))  # the one of setting "one"
        order = np.concatenate((first, generator.permutation(np.setdiff1d(patients, first))))
        self.held_out = set(order[fold * held_out : (fold + 1) * held_out].tolist())

    def names(self, held_out: bool) -> Iterator[tuple[int, str]]:
        """Index and case name of the slices of one side of the split."""
        for index, patient in enumerate(self.patients):
            if (patient in self.held_out) == held_out:
                yield index, f"{patient}_{index:04d}"


def convert(args: argparse.Namespace, slices: Slices) -> None:
    """Both raw datasets, and the raters' masks of the held-out slices."""
    for setting, dataset in DATASETS.items():
        raw = args.work / "nnUNet_raw" / dataset
        if (raw / "dataset.json").exists():
            continue
        for folder in ("imagesTr", "labelsTr", "imagesTs"):
            (raw / folder).mkdir(parents=True, exist_ok=True)
        cases = 0
        for index, name in slices.names(held_out=False):
            for rater in [slices.rater[index]] if setting == "one" else range(RATERS):
                case = f"{name}__{rater}"
                write_png(raw / "imagesTr" / f"{case}_0000.png", slices.images[index])
                write_png(raw / "labelsTr" / f"{case}.png", slices.masks[index, rater])
                cases += 1
        for index, name in slices.names(held_out=True):
            write_png(raw / "imagesTs" / f"{name}_0000.png", slices.images[index])
        description = {
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, "nodule": 1},
            "numTraining": cases,
            "file_ending": ".png",
        }
        (raw / "dataset.json").write_text(json.dumps(description, indent=1))
    raters = args.work / "raters"
    raters.mkdir(exist_ok=True)
    for index, name in slices.names(held_out=True):
        for rater in range(RATERS):
            write_png(raters / f"{name}__{rater}.png", slices.masks[index, rater])


def write_png(path: Path, array: np.ndarray) -> None:
    io.imsave(path, array, check_contrast=False)


def environment(args: argparse.Namespace, training: bool) -> dict[str, str]:
    folders = {name: str(args.work / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    return {
        **os.environ,
        **folders,
        "OMP_NUM_THREADS": str(args.threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "nnUNet_compile": "f",
        "nnUNet_def_n_proc": "1",
        "nnUNet_npp": "1",
        "nnUNet_nps": "1",
        "nnUNet_n_proc_DA": "0" if training else "1",  # nnU-Net's planning fails with 0
        "PYTHONUNBUFFERED": "1",
    }


def run(args: argparse.Namespace, name: str, done: Path, *command: str, training: bool = False) -> None:
    """One command, its output in logs/NAME.log, unless ``done`` exists.

    Exits with a message if it fails.
    """
    if done.exists():
        return
    log = args.work / "logs" / f"{name}.log"
    log.parent.mkdir(exist_ok=True)
    print(name, flush=True)
    with log.open("w") as output:
        program = [sys.executable, *command] if command[0] == "-c" else [script(command[0]), *command[1:]]
        status = subprocess.run(
            program, env=environment(args, training), stdout=output, stderr=subprocess.STDOUT, check=False
        ).returncode
    if status or not done.exists():
        sys.exit(f"{name} ended with exit status {status}; its log is {log}")


def script(command: str) -> str:
    """The script that pip installed for a command, beside the Python that runs us."""
    folders = os.pathsep.join([str(Path(sys.executable).parent), sysconfig.get_path("scripts")])
    found = shutil.which(command, path=folders) or shutil.which(command)
    return found or sys.exit(f"{command} is not installed beside {sys.executable}")


def plan_and_preprocess(args: argparse.Namespace) -> None:
    """One plan, made on setting "one", for both."""
    preprocessed = {setting: args.work / "nnUNet_preprocessed" / name for setting, name in DATASETS.items()}
    one, every = DATASETS["one"], DATASETS["all"]
    plan = preprocessed["one"] / f"{PLANS}.json"
    for setting, dataset in DATASETS.items():
        run(
            args, f"fingerprint_{setting}", preprocessed[setting] / "dataset_fingerprint.json",
            "nnUNetv2_extract_fingerprint", "-d", dataset[7:10], "-np", "1",
        )  # fmt: skip
    run(
        args, "plan", plan,
        "nnUNetv2_plan_experiment", "-d", one[7:10], "-pl", args.planner, "-overwrite_plans_name", PLANS,
        "-gpu_memory_target", str(args.gpu_memory_target),
    )  # fmt: skip
    run(
        args, "plan_all", preprocessed["all"] / plan.name,
        "nnUNetv2_move_plans_between_datasets", "-s", one, "-t", every, "-sp", PLANS,
    )  # fmt: skip
    for setting, dataset in DATASETS.items():
        description = preprocessed[setting] / "dataset.json"
        if not description.exists():
            shutil.copy(args.work / "nnUNet_raw" / dataset / "dataset.json", description)
        run(
            args, f"preprocess_{setting}", preprocessed[setting] / "gt_segmentations",
            "nnUNetv2_preprocess", "-d", dataset[7:10], "-plans_name", PLANS, "-c", "2d", "-np", "1",
        )  # fmt: skip


def model_name(args: argparse.Namespace, model: str) -> str:
    """The trainer's name with the length of the training."""
    return f"{TRAINERS[model]}_{args.epochs}epochs_{args.iterations}iterations"


def train(args: argparse.Namespace, model: str, setting: str) -> Path:
    """Train unless it is done; returns nnU-Net's folder of the model."""
    trainer, dataset = model_name(args, model), DATASETS[setting]
    folder = args.work / "nnUNet_results" / dataset / f"{trainer}__{PLANS}__2d"
    options = (dataset[7:10], trainer, PLANS, args.device, str(args.seed), str(args.threads))
    final = folder / "fold_all" / "checkpoint_final.pth"
    run(args, f"train_{model}_{setting}", final, "-c", SEEDED_TRAINING, *options, training=True)
    return folder


def predictions_folder(args: argparse.Namespace, model: str, setting: str) -> Path:
    """Of one model, length included."""
    return args.work / "predictions" / f"{model_name(args, model)}_{setting}"


def predict(args: argparse.Namespace, model: str, setting: str, last: str) -> Path:
    """Mean prediction and samples of the held-out slices, unless they are there; returns their folder."""
    out = predictions_folder(args, model, setting)
    images = args.work / "nnUNet_raw" / DATASETS[setting] / "imagesTs"
    run(
        args, f"predict_{out.name}", out / f"{last}.json",
        "nnunet-multimodal", "predict", "-i", str(images), "-o", str(out), "-d", DATASETS[setting][7:10], "-c", "2d",
        "-f", "all", "-tr", model_name(args, model), "-p", PLANS, "-device", args.device, "--disable_tta",
        "--samples", str(args.samples), "--seed", str(args.seed), "--save-samples", "--maps", "--continue_prediction",
        "--disable_progress_bar", training=True,
    )  # fmt: skip
    return out


def read_plan(args: argparse.Namespace) -> dict[str, Any]:
    """What of the plan one needs to judge the figures."""
    plans = json.loads((args.work / "nnUNet_preprocessed" / DATASETS["one"] / f"{PLANS}.json").read_text())
    plan = plans["configurations"]["2d"]
    return {
        "patch_size": plan["patch_size"],
        "batch_size": plan["batch_size"],
        "features_per_stage": plan["architecture"]["arch_kwargs"]["features_per_stage"],
        "normalization": plan["normalization_schemes"][0],
    }


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--work", type=Path, metavar="DIR", help="keeps all steps; default: work/lidc beside OUT")
    p.add_argument("--planner", default="nnUNetPlannerCPU")
    p.add_argument("--gpu-memory-target", type=float, default=0.06, help="sets the batch, on nnU-Net's scale")
    p.add_argument("--crop", type=int, default=64, metavar="PIXELS", help="edge of the middle that is used, of 128")
    p.add_argument("--held-out", type=int, default=20, metavar="PATIENTS")
    p.add_argument("--models", nargs="+", default=list(TRAINERS), choices=list(TRAINERS))
    p.add_argument("--settings", nargs="+", default=list(DATASETS), choices=list(DATASETS))
    p.add_argument("--epochs", type=int, default=10)
    p.add_argument("--iterations", type=int, default=150)
    p.add_argument("--samples", type=int, default=100)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--name", default="lidc", help="of the results' files, such as lidc_long for a longer training")
    p.add_argument("--note", default="", help="recorded with the figures, for what a reader should know of the run")
    args = p.parse_args()
    args.work = (args.work or args.out.resolve().parent / "work" / "lidc").resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / ".gitignore").write_text("*\n")
    slices = Slices(common.data_folder(DATA), args.crop, args.held_out, args.seed)
    convert(args, slices)
    plan_and_preprocess(args)
    cases = [Case(name, slices.images[i], slices.masks[i]) for i, name in slices.names(held_out=True)]
    methods = {}
    for setting in args.settings:
        for model in args.models:
            folder = train(args, model, setting)
            predictions = predict(args, model, setting, max(case.name for case in cases))
            scores = summarise([score(read_prediction(predictions, case.name), case.raters) for case in cases])
            seconds = round(training_seconds(folder / "fold_all"))
            methods[f"{model}, {setting}"] = {
                "model": model, "setting": setting, "scores": scores, "training_s": seconds,
            }  # fmt: skip
            print_scores(f"{model}, {setting}", scores)
    floor, raters = floors(cases), rater_scores(cases)
    for name, scores in {**floor, "raters": raters}.items():
        print_scores(name, scores)
    draw_scores(args, methods, floor, raters)
    if "low-rank, all" in methods:
        draw_samples(args, quantile_cases(cases, 6), predictions_folder(args, "low-rank", "all"))
    figures = {
        "note": args.note,
        "plan": read_plan(args),
        "nodule_pixels_outside_crop": round(slices.nodule_pixels_lost, 5),
        "patients": {"training": len(np.unique(slices.patients)) - args.held_out, "held_out": args.held_out},
        "slices": {"training": len(slices.images) - len(cases), "held_out": len(cases)},
        "dice_of_empty_prediction_and_empty_annotation": 1,
        "methods": methods,
        "floors": floor,
        "raters": raters,
    }
    common.write(args, args.name, figures)


def print_scores(name: str, scores: dict[str, Any]) -> None:
    columns = (f"{k} {v['mean']:.3f} ± {v['standard_error']:.3f}" for k, v in scores.items())
    print(f"{name:20}", *columns, sep="  ", flush=True)


if __name__ == "__main__":
    main()
