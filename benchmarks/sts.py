"""Plain nnU-Net and CRNP on real PET/CT/MR data (25 patients with soft-tissue sarcoma), 20 to train and 5 held out.

Runs ``nnunet-multimodal demo --data`` on a plan that a CPU can train, or goes on with the run in the work folder. The
tumour is near the middle of every crop, so two floors without any learning are computed on the same held-out cases: a
centred ellipsoid, its size chosen on the training cases, and a threshold of the PET.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import _common as common
import numpy as np
import SimpleITK
from tqdm import tqdm

from nnunet_multimodal.cli import main as nnunet_multimodal
from nnunet_multimodal.metrics.surface import dice, hausdorff_distance

DATA = "sts_petct_mr"
PET_CHANNEL = 1
# the data's README, on another plan of this size: 24 epochs of 100 iterations
PUBLISHED = {"centred ellipsoid": 0.69, "PET threshold": 0.58, "nnU-Net, 24 epochs": 0.827}
ELLIPSOID, THRESHOLD = "centred ellipsoid", "PET threshold"
FRACTIONS = np.arange(0.3, 1.05, 0.05)  # of the crop's extent
TRAINERS = ("nnUNetTrainer", "CRNPTrainer")

Scores = dict[str, dict[str, float]]  # case -> metric -> value


def run_demo(args: argparse.Namespace, data: Path) -> None:
    """Train, predict and evaluate; what is done already is kept.

    Exits with the demo's status if it fails.
    """
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / ".gitignore").write_text("*\n")
    command = ["demo", "--data", str(data), "--channel-names", "CT", "PET", "T1", "--labels", "tumour"]
    command += ["--spacing", *map(str, args.spacing), "--planner", args.planner, "--device", args.device]
    command += ["--epochs", str(args.epochs), "--iterations", str(args.iterations), "--fold", str(args.fold)]
    command += ["--seed", str(args.seed), "--trainers", *args.trainers, "--out", str(args.work)]
    status = nnunet_multimodal(command)
    if status:
        sys.exit(status)


def read_result(args: argparse.Namespace, data: Path, cases: list[str], trainer: str) -> dict[str, Any]:
    """Scores of the held-out cases, which nnU-Net predicts at the end of a training, and the training's time.

    Exits with a message if the training is not complete.
    """
    name = f"{trainer}_{args.epochs}epochs_{args.iterations}iterations__*__3d_fullres"
    folders = list(args.work.glob(f"nnUNet_results/Dataset*/{name}/fold_{args.fold}"))
    if len(folders) != 1 or not (folders[0] / "validation" / "summary.json").exists():
        sys.exit(f"--work has {len(folders)} trainings {name}, fold {args.fold}; one with its validation is needed")
    scores: Scores = {}
    for case in cases:
        truth, spacing_mm = read_label(data, case)
        prediction = (
            SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folders[0] / "validation" / f"{case}.nii.gz"))) > 0
        )
        scores[case] = {"dice": dice(prediction, truth), "hd95_mm": hausdorff_distance(prediction, truth, spacing_mm)}
    return {**summarise(scores), "training_s": round(training_seconds(folders[0]))}


def training_seconds(fold: Path) -> float:
    """Time of all epochs as nnU-Net logged it; the last run of an epoch that an interruption made it repeat."""
    seconds: dict[str, float] = {}
    for log in sorted(fold.glob("training_log_*.txt")):
        epoch = ""
        for found in re.finditer(r": Epoch (\d+)\s*$|Epoch time: ([\d.]+) s", log.read_text(), re.MULTILINE):
            if found[1] is not None:
                epoch = found[1]
            else:
                seconds[epoch] = float(found[2])
    return sum(seconds.values())


def summarise(scores: Scores) -> dict[str, Any]:
    """Means over the cases, and the cases; an infinite or missing distance is left out of its mean and counted."""
    dice = [score["dice"] for score in scores.values()]
    distances = [score["hd95_mm"] for score in scores.values()]
    finite = [d for d in distances if d is not None and np.isfinite(d)]
    return {
        "dice": round(float(np.mean(dice)), 4),
        "hd95_mm": round(float(np.mean(finite)), 2) if finite else None,
        "hd95_without_value": len(distances) - len(finite),
        "cases": {
            case: {key: None if v is None or not np.isfinite(v) else round(v, 4) for key, v in score.items()}
            for case, score in scores.items()
        },
    }


def read_split(args: argparse.Namespace) -> dict[str, list[str]]:
    """Training and validation cases of the fold, as nnU-Net drew them."""
    (file,) = args.work.glob("nnUNet_preprocessed/Dataset*/splits_final.json")
    return json.loads(file.read_text())[args.fold]


def read_plan(args: argparse.Namespace) -> dict[str, Any]:
    """What of the plan one needs to judge the figures."""
    file = next(args.work.glob("nnUNet_results/Dataset*/*__3d_fullres/plans.json"))
    plan = json.loads(file.read_text())["configurations"]["3d_fullres"]
    network = plan["architecture"]["arch_kwargs"]
    return {
        "spacing_mm": plan["spacing"],
        "patch_size": plan["patch_size"],
        "batch_size": plan["batch_size"],
        "features_per_stage": network["features_per_stage"],
    }


def read_label(data: Path, case: str) -> tuple[np.ndarray, tuple[float, ...]]:
    """Tumour mask (Z, Y, X) and spacing in mm."""
    image = SimpleITK.ReadImage(str(data / "labelsTr" / f"{case}.nii.gz"))
    return SimpleITK.GetArrayFromImage(image) > 0, image.GetSpacing()[::-1]


def ellipsoid(shape: tuple[int, ...], axial: float, in_plane: float) -> np.ndarray:
    """Centred, with axes that are these fractions of the crop's extent."""
    z, y, x = np.ogrid[tuple(slice(-1 + 1 / size, 1, 2 / size) for size in shape)]
    return (z / axial) ** 2 + (y / in_plane) ** 2 + (x / in_plane) ** 2 <= 1


def best_ellipsoid(data: Path, cases: list[str]) -> tuple[float, float]:
    """The fractions of highest mean Dice over the training cases."""
    masks = [read_label(data, case)[0] for case in cases]
    candidates = list(itertools.product(FRACTIONS, FRACTIONS))
    means = [
        np.mean([dice(ellipsoid(mask.shape, *candidate), mask) for mask in masks])
        for candidate in tqdm(candidates, desc="ellipsoid", leave=False, disable=None)
    ]
    axial, in_plane = candidates[int(np.argmax(means))]
    return round(float(axial), 2), round(float(in_plane), 2)


def threshold_pet(data: Path, case: str) -> np.ndarray:
    """PET above 0.4 times its 99.9th percentile."""
    pet = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(data / "imagesTr" / f"{case}_{PET_CHANNEL:04d}.nii.gz")))
    return pet > 0.4 * np.percentile(pet, 99.9)


def floors(data: Path, split: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """What reaches how much without learning, on the held-out cases."""
    size = best_ellipsoid(data, split["train"])
    scores: dict[str, Scores] = {ELLIPSOID: {}, THRESHOLD: {}}
    for case in split["val"]:
        truth, spacing_mm = read_label(data, case)
        for name, mask in ((ELLIPSOID, ellipsoid(truth.shape, *size)), (THRESHOLD, threshold_pet(data, case))):
            scores[name][case] = {"dice": dice(mask, truth), "hd95_mm": hausdorff_distance(mask, truth, spacing_mm)}
    result = {name: summarise(of) for name, of in scores.items()}
    result[ELLIPSOID]["axial_and_in_plane_fraction"] = size
    return result


def draw(args: argparse.Namespace, methods: dict[str, dict[str, Any]]) -> None:
    """Mean Dice and HD95 as bars, every held-out case as a dot."""
    fig, axes = common.figure(9, 3.2, 2)
    colours = ["#c8c8c8", "#c8c8c8", "#8a8a8a", "#2c6fbb", "#8fb8de"]
    for ax, (key, label) in zip(axes[0], (("dice", "Dice"), ("hd95_mm", "HD95 (mm)")), strict=True):
        for place, (method, colour) in enumerate(zip(methods.values(), itertools.cycle(colours))):
            mean = method[key]
            cases = [score[key] for score in method["cases"].values() if score[key] is not None]
            ax.bar(place, mean or 0, 0.65, color=colour)
            ax.plot(place + np.linspace(-0.2, 0.2, len(cases)), cases, "o", color="black", ms=3, alpha=0.7)
            text = "-" if mean is None else f"{mean:.3f}" if key == "dice" else f"{mean:.1f}"
            ax.annotate(text, (place, 0), (0, 4), textcoords="offset points", ha="center", fontweight="bold")
        ax.set_xticks(range(len(methods)), [re.sub(" |(?=Trainer)", "\n", name) for name in methods])
        ax.set(ylabel=label)
    axes[0, 0].set(ylim=(0, 1.15), title="held-out cases (bars: mean)")
    baseline = "nnU-Net, 24 epochs"
    axes[0, 0].axhline(PUBLISHED[baseline], color="#c0392b", lw=1, ls="--", label=f"data's notes: {baseline}")
    axes[0, 0].legend(frameon=False, loc="upper left")
    axes[0, 1].set(title="lower is better")
    common.save(fig, args, "sts")


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--work", type=Path, metavar="DIR", help="keeps the demo; default: work/sts beside OUT")
    p.add_argument("--trainers", nargs="+", default=list(TRAINERS))
    p.add_argument("--epochs", type=int, default=12)
    p.add_argument("--iterations", type=int, default=100)
    p.add_argument("--fold", type=int, default=0)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--spacing", type=float, nargs=3, default=[4, 3, 3], metavar=("Z", "Y", "X"))
    p.add_argument("--planner", default="nnUNetPlannerCPU")
    p.add_argument("--note", default="", help="recorded with the figures, for what a reader should know of the run")
    args = p.parse_args()
    args.work = args.work or args.out.resolve().parent / "work" / "sts"
    data = common.data_folder(DATA)
    run_demo(args, data)
    split = read_split(args)
    methods = floors(data, split)
    methods |= {trainer: read_result(args, data, split["val"], trainer) for trainer in args.trainers}
    for name, method in methods.items():
        print(f"{name:20} Dice {method['dice']:.4f}  HD95 {method['hd95_mm']} mm")
    draw(args, methods)
    figures = {
        "repeats": 1,
        "note": args.note,
        "plan": read_plan(args),
        "training_cases": len(split["train"]),
        "published_dice": PUBLISHED,
        "methods": methods,
    }
    common.write(args, "sts", figures)


if __name__ == "__main__":
    main()
