"""Volume intervals of a tumour from SSN's samples, on the held-out patients of ``sts.py``, with their coverage.

Goes on in the work folder of ``sts.py``: trains an SSN on the same plan, split and length, draws samples of the
held-out patients with ``nnunet-multimodal predict`` at several temperatures, and scores them with ``nnunet-multimodal
evaluate``. Plain nnU-Net's mirrors, which the same command takes as samples, and the spread of the training patients'
volumes stand beside it. The pictures are those of Monteiro et al., *Stochastic Segmentation Networks*, NeurIPS 2020,
Figures 4 and 5. Whatever is done already is kept; samples older than their model are drawn again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import _common as common
import numpy as np
from _sts_ssn_figures import draw_samples, draw_scores, read_mask, sample_files
from lidc import run
from scipy.stats import binomtest
from sts import read_label, read_plan, read_split, training_seconds

from nnunet_multimodal.inference.quantities import distribution_of
from nnunet_multimodal.metrics.surface import dice

CONFIGURATION, PLANS, LABEL = "3d_fullres", "nnUNetDemoPlans", "tumour"
TRAINERS = ("SSNTrainer", "nnUNetTrainer")
TEMPERATURES = (0.5, 1.0)
# column of nnunet-multimodal evaluate -> ours
SCORES = {
    "Dice": "dice",
    "HD95_mm": "hd95_mm",
    "sample_Dice_q95": "sample_dice_q95",
    "fraction_better": "fraction_better",
    "GED2": "ged2",
    "sample_diversity": "diversity",
}
MEANS = ("relative_width", "relative_interval_score", *SCORES.values(), "sample_dice", "empty_samples")
CAVEAT = (
    "Five patients, one split, one seed: coverage is a count out of five, and its interval (Clopper-Pearson, 95 %) "
    "tells how little that says. Choosing a temperature by this table would be choosing on the test patients."
)
SEEDED_TRAINING = """
import random, sys, numpy, torch
from nnunetv2.run.run_training import run_training
dataset, configuration, fold, trainer, plans, device, seed, threads = sys.argv[1:]
random.seed(int(seed)); numpy.random.seed(int(seed)); torch.manual_seed(int(seed))
torch.set_num_threads(int(threads))
run_training(dataset, configuration, int(fold), trainer, plans, continue_training=True, device=torch.device(device))
"""  # nnUNetv2_train --c, which on a CPU takes all cores


def dataset_name(args: argparse.Namespace) -> str:
    """The dataset that ``sts.py`` made in the work folder.

    Exits with a message if its preprocessed data or held-out images are not there.
    """
    found = sorted(args.work.glob(f"nnUNet_preprocessed/Dataset*/{PLANS}_{CONFIGURATION}"))
    images = args.work / "held_out" / "imagesTs"
    if len(found) != 1 or not (found[0].parent / "splits_final.json").exists() or not images.is_dir():
        sys.exit(
            f"{args.work} has not the preprocessed data, the split and the held-out images of one dataset; "
            "run benchmarks/sts.py first, with the same --work or --out"
        )
    return found[0].parent.name


def model_name(args: argparse.Namespace, trainer: str) -> str:
    """The trainer's name with the length of the training."""
    return f"{trainer}_{args.epochs}epochs_{args.iterations}iterations"


def train(args: argparse.Namespace, dataset: str, trainer: str) -> Path:
    """Train unless it is done; returns nnU-Net's folder of the fold."""
    name = model_name(args, trainer)
    folder = args.work / "nnUNet_results" / dataset / f"{name}__{PLANS}__{CONFIGURATION}" / f"fold_{args.fold}"
    options = (CONFIGURATION, str(args.fold), name, PLANS, args.device, str(args.seed), str(args.threads))
    done = folder / "checkpoint_final.pth"
    run(args, f"train_{name}", done, "-c", SEEDED_TRAINING, dataset[7:10], *options, training=True)
    return folder


def predict(args: argparse.Namespace, dataset: str, trainer: str, temperature: float, fold: Path) -> Path:
    """Mean prediction, entropy and samples of the held-out patients, unless they are there; returns their folder."""
    name = model_name(args, trainer)
    draw = f"{args.samples}samples_seed{args.seed}_temperature{temperature:g}"
    out = args.work / "samples" / f"{name}_fold{args.fold}" / draw
    trained = (fold / "checkpoint_final.pth").stat().st_mtime
    if any(file.stat().st_mtime < trained for file in out.glob("*.json")):
        shutil.rmtree(out)
    images = args.work / "held_out" / "imagesTs"
    run(
        args, f"predict_{name}_{draw}", out / f"{max(read_split(args)['val'])}.json",
        "nnunet-multimodal", "predict", "-i", str(images), "-o", str(out), "-d", dataset[7:10], "-c", CONFIGURATION,
        "-f", str(args.fold), "-tr", name, "-p", PLANS, "-device", args.device, "--samples", str(args.samples),
        "--seed", str(args.seed), "--temperature", str(temperature), "--save-samples", "--maps", "entropy",
        "--continue_prediction", "--disable_progress_bar",
    )  # fmt: skip
    run(
        args, f"evaluate_{name}_{draw}", out / "evaluation.json",
        "nnunet-multimodal", "evaluate", str(args.work / "held_out" / "labelsTs"), str(out), "-np", "1",
    )  # fmt: skip
    return out


def read_cases(folder: Path, raw: Path) -> dict[str, dict[str, Any]]:
    """Volume interval and scores of every held-out patient from what ``predict`` and ``evaluate`` wrote."""
    evaluation = json.loads((folder / "evaluation.json").read_text())
    cases = {}
    for entry in evaluation["metric_per_case"]:
        case = entry["case"]
        truth, spacing_mm = read_label(raw, case)
        quantities = json.loads((folder / f"{case}.json").read_text())["labels"][LABEL]
        sample_dice = [dice(read_mask(file), truth) for file in sample_files(folder, case)]
        scores = {ours: entry["foreground_mean"][column] for column, ours in SCORES.items()}
        cases[case] = {
            **interval(quantities["volume_ml"], volume_ml(truth, spacing_mm)),
            **{key: None if value is None else round(value, 4) for key, value in scores.items()},
            "sample_dice": round(fmean(sample_dice), 4),
            "empty_samples": round(1 - quantities["probability_present"], 4),
        }
    return cases


def interval(volumes_ml: Mapping[str, float], truth_ml: float) -> dict[str, Any]:
    """What a 95 % interval is worth: whether it holds the truth, its width, the truth's distance from the mean in SDs.

    The interval score is the width plus 2 / 0.05 times the distance by which the truth is missed (Gneiting and Raftery,
    JASA 2007, Eq. 43), lower is better: a wide interval that holds everything is not a good one.
    """
    low, high = volumes_ml["p2.5"], volumes_ml["p97.5"]
    missed_by = max(low - truth_ml, truth_ml - high, 0)
    return {
        "volume_ml": {key: round(value, 2) for key, value in volumes_ml.items()},
        "true_volume_ml": round(truth_ml, 2),
        "covered": low <= truth_ml <= high,
        "relative_width": round((high - low) / truth_ml, 4),
        "relative_interval_score": round((high - low + 2 / 0.05 * missed_by) / truth_ml, 4),
        "z": round((truth_ml - volumes_ml["mean"]) / volumes_ml["sd"], 2) if volumes_ml["sd"] else None,
    }


def volume_ml(mask: np.ndarray, spacing_mm: tuple[float, ...]) -> float:
    """Volume of a mask in millilitres."""
    return float(np.count_nonzero(mask) * np.prod(spacing_mm) / 1000)


def summarise(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Coverage with its own interval, means over the patients of what has one, and the patients."""
    covered = sum(case["covered"] for case in cases.values())
    confidence = binomtest(covered, len(cases)).proportion_ci()
    columns = [key for key in next(iter(cases.values())) if key in MEANS]
    found = {column: [v for case in cases.values() if (v := case[column]) is not None] for column in columns}
    return {
        "covered": covered,
        "patients": len(cases),
        "coverage_95_percent_interval": [round(confidence.low, 3), round(confidence.high, 3)],
        **{column: round(fmean(values), 4) if values else None for column, values in found.items()},
        "cases": cases,
    }


def floor(raw: Path, split: dict[str, list[str]]) -> dict[str, Any]:
    """The interval that knows no image: percentiles of the training patients' volumes."""
    volumes = [volume_ml(*read_label(raw, case)) for case in split["train"]]
    spread = distribution_of(float(np.median(volumes)), volumes)
    return summarise({case: interval(spread, volume_ml(*read_label(raw, case))) for case in split["val"]})


def print_table(name: str, summary: dict[str, Any]) -> None:
    """A line for every patient, and one for all."""
    scores = [key for key in summary if key in MEANS]
    head = ["true ml", "predicted", "mean", "SD", "2.5 %", "50 %", "97.5 %", "covered", *map(heading, scores)]
    rows = [["", *head]]
    for case, row in summary["cases"].items():
        volumes = [f"{volume:.1f}" for volume in (row["true_volume_ml"], *row["volume_ml"].values())]
        rows.append([case, *volumes, "yes" if row["covered"] else "no", *(number(row[key]) for key in scores)])
    covered = f"{summary['covered']} of {summary['patients']}"
    rows.append(["mean", *[""] * 7, covered, *(number(summary[key]) for key in scores)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"\n{name}")
    for row in rows:
        print("  ".join(map(str.rjust, row, widths)), flush=True)


def heading(key: str) -> str:
    """A score's name in the table."""
    return key.removeprefix("relative_").replace("_", " ")


def number(value: float | None) -> str:
    """For the table."""
    return "-" if value is None else f"{value:.3f}"


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--work", type=Path, metavar="DIR", help="that of sts.py; default: work/sts beside OUT")
    p.add_argument("--trainers", nargs="+", default=list(TRAINERS), help="the samples shown are the first one's")
    p.add_argument("--epochs", type=int, default=12)
    p.add_argument("--iterations", type=int, default=100)
    p.add_argument("--fold", type=int, default=0)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--samples", type=int, default=100)
    p.add_argument("--temperatures", nargs="+", type=float, default=list(TEMPERATURES), metavar="T")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--note", default="", help="recorded with the figures, for what a reader should know of the run")
    args = p.parse_args()
    args.work = (args.work or args.out.resolve().parent / "work" / "sts").resolve()
    dataset = dataset_name(args)
    raw, split = args.work / "nnUNet_raw" / dataset, read_split(args)
    methods: dict[str, Any] = {}
    folders: dict[str, dict[float, Path]] = {}
    for trainer in args.trainers:
        fold = train(args, dataset, trainer)
        folders[trainer] = {t: predict(args, dataset, trainer, t, fold) for t in args.temperatures}
        summaries = {t: summarise(read_cases(folder, raw)) for t, folder in folders[trainer].items()}
        for temperature, summary in summaries.items():
            print_table(f"{trainer}, temperature {temperature:g}", summary)
        quantities = json.loads((folders[trainer][args.temperatures[0]] / f"{split['val'][0]}.json").read_text())
        methods[trainer] = {
            "drawn_from": quantities["drawn_from"],
            "samples": quantities["samples"],
            "training_s": round(training_seconds(fold)),
            "temperatures": {f"{temperature:g}": summary for temperature, summary in summaries.items()},
        }
    floors = {"training volumes": floor(raw, split)}
    for name, summary in floors.items():
        print_table(name, summary)
    shown = min(args.temperatures, key=lambda t: abs(t - 1))
    draw_samples(args, folders[args.trainers[0]][shown], raw, split["val"])
    draw_scores(args, methods, f"{shown:g}", folders[args.trainers[0]][shown], raw)
    figures = {
        "repeats": 1,
        "note": args.note,
        "caveat": CAVEAT,
        "plan": read_plan(args),
        "patients": {"training": len(split["train"]), "held_out": len(split["val"])},
        "interval": "2.5th to 97.5th percentile of the samples' volumes",
        "methods": methods,
        "floors": floors,
    }
    common.write(args, "sts_ssn", figures)


if __name__ == "__main__":
    main()
