"""MoSE, SSN and a deterministic network on lung nodules that four raters outlined (LIDC), split by patient.

The same plan and length for all. Setting "all" is a multi-rater data set: labelsTr by majority vote
(``nnunet-multimodal consensus``), the four raters in ratersTr; MoSE fits all of them, SSN draws one in every step, the
deterministic network has the consensus. Setting "one" has one rater for each slice, drawn at random once. All runs
through nnU-Net's own commands and ``nnunet-multimodal consensus`` and ``predict``; the work folder keeps what is done.

Measured on held-out patients as in Gao et al., ICLR 2023, Table 1: D_GED^2 of 16 and of 100 samples and of 16 with
weights ("compact"), M-IoU of 16 and compact, ECE of the nodule's probability, Dice of the mean prediction; beside
floors without any learning.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import _common as common
import numpy as np
from _lidc_report import NODULE, Case, Panel, annotations, draw_masks, quantile_cases, read_prediction
from lidc import DATA, PLANS, SEEDED_TRAINING, Slices, run, write_png
from scipy.stats import bootstrap
from skimage import io
from sts import training_seconds
from tqdm import tqdm

from nnunet_multimodal.metrics.calibration import ReliabilityCurve, reliability_curve
from nnunet_multimodal.metrics.distribution import generalized_energy_distance, matched_iou, score_distribution

DATASETS = {"all": "Dataset503_LIDCRaters", "one": "Dataset504_LIDCRaterDrawn"}
TRAINERS = {"MoSE": "MoSETrainer", "SSN": "SSNTrainer", "deterministic": "EarlyFusionTrainer"}
FEW, MANY = 16, 100
EXPERTS, SHOWN, ROWS = 4, 4, 6  # MoSE's own, and what the picture shows
COLOURS = {"deterministic": "#8a8a8a", "SSN": "#2c6fbb", "MoSE": "#d98032"}
PREPROCESSOR = "MultimodalPreprocessor"
PAPER = {"MoSE, all": {"GED 16": 0.218, "GED 100": 0.189, "GED compact": 0.195, "M-IoU 16": 0.624, "ECE": 0.00064}}


def convert(args: argparse.Namespace, slices: Slices) -> None:
    """The raw datasets; the consensus of setting "all" is made by the command."""
    for setting, dataset in DATASETS.items():
        raw = args.work / "nnUNet_raw" / dataset
        if (raw / "dataset.json").exists():
            continue
        for folder in ("imagesTr", "labelsTr", "ratersTr", "imagesTs"):
            (raw / folder).mkdir(parents=True, exist_ok=True)
        names = list(slices.names(held_out=False))
        for index, name in names:
            write_png(raw / "imagesTr" / f"{name}_0000.png", slices.images[index])
            for rater in range(4) if setting == "all" else [slices.rater[index]]:
                write_png(raw / "ratersTr" / f"{name}__{rater}.png", slices.masks[index, rater])
        for index, name in slices.names(held_out=True):
            write_png(raw / "imagesTs" / f"{name}_0000.png", slices.images[index])
        description = {
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, "nodule": NODULE},
            "numTraining": len(names),
            "file_ending": ".png",
        }
        (raw / "dataset.json").write_text(json.dumps(description, indent=1))


def prepare(args: argparse.Namespace) -> None:
    """Consensus, plan (made on setting "all", for both) and preprocessing."""
    for setting, dataset in DATASETS.items():
        number, preprocessed = dataset[7:10], args.work / "nnUNet_preprocessed" / dataset
        raw = args.work / "nnUNet_raw" / dataset
        last = sorted(raw.glob("imagesTr/*.png"))[-1].name.replace("_0000.png", ".png")
        run(args, f"consensus_{setting}", raw / "labelsTr" / last,
            "nnunet-multimodal", "consensus", "-d", number, "-np", "1", "--overwrite")  # fmt: skip
        run(args, f"fingerprint_{setting}", preprocessed / "dataset_fingerprint.json",
            "nnUNetv2_extract_fingerprint", "-d", number, "-np", "1")  # fmt: skip
        plan = preprocessed / f"{PLANS}.json"
        if setting == "all":
            run(args, "plan", plan,
                "nnUNetv2_plan_experiment", "-d", number, "-pl", args.planner, "-overwrite_plans_name", PLANS,
                "-gpu_memory_target", str(args.gpu_memory_target), "-preprocessor_name", PREPROCESSOR)  # fmt: skip
        else:
            run(args, "plan_one", plan,
                "nnUNetv2_move_plans_between_datasets", "-s", DATASETS["all"][7:10], "-t", number, "-sp", PLANS,
                )  # fmt: skip
            description = preprocessed / "dataset.json"
            description.write_text((raw / "dataset.json").read_text())
        run(args, f"preprocess_{setting}", preprocessed / "gt_segmentations",
            "nnUNetv2_preprocess", "-d", number, "-plans_name", PLANS, "-c", "2d", "-np", "1")  # fmt: skip


def train_and_predict(args: argparse.Namespace, model: str, setting: str, last: str) -> tuple[Path, dict[str, Path]]:
    """Folder of the model, and of its predictions: samples drawn, and with weights."""
    trainer = f"{TRAINERS[model]}_{args.epochs}epochs_{args.iterations}iterations"
    dataset = DATASETS[setting]
    folder = args.work / "nnUNet_results" / dataset / f"{trainer}__{PLANS}__2d"
    options = (dataset[7:10], trainer, PLANS, args.device, str(args.seed), str(args.threads))
    run(args, f"train_{model}_{setting}", folder / "fold_all" / "checkpoint_final.pth", "-c", SEEDED_TRAINING, *options,
        training=True)  # fmt: skip
    kinds = {"drawn": (MANY, ())} | ({"compact": (FEW, ("--compact",))} if model == "MoSE" else {})
    folders = {}
    for kind, (samples, flags) in kinds.items():
        out = folders[kind] = args.work / "predictions" / f"{trainer}_{setting}_{kind}"
        run(args, f"predict_{out.name}", out / f"{last}.json",
            "nnunet-multimodal", "predict", "-i", str(args.work / "nnUNet_raw" / dataset / "imagesTs"), "-o", str(out),
            "-d", dataset[7:10], "-c", "2d", "-f", "all", "-tr", trainer, "-p", PLANS, "-device", args.device,
            "--disable_tta", "--samples", str(samples), "--seed", str(args.seed), "--save-samples", "--maps",
            "--save_probabilities", "--continue_prediction", "--disable_progress_bar", *flags, training=True,
            )  # fmt: skip
    return folder, folders


def distances(samples: np.ndarray, raters: np.ndarray, weights: Sequence[float] | None = None) -> tuple[float, float]:
    """D_GED^2 and M-IoU."""
    return tuple(f(samples, raters, [NODULE], weights) for f in (generalized_energy_distance, matched_iou))


@dataclass
class Measured:
    """Of held-out slices: a list for every column, the patients, what the majority mask reaches, and the curve."""

    columns: dict[str, list[float]] = field(default_factory=dict)
    patients: list[str] = field(default_factory=list)
    majority: list[float] = field(default_factory=list)
    curve: ReliabilityCurve | None = None

    def add(self, folders: dict[str, Path], slices: Slices) -> None:
        """The slices that a fold holds out."""
        for index, name in tqdm(list(slices.names(held_out=True)), desc="measure", leave=False):
            raters, found = slices.masks[index], {}
            for kind, folder in folders.items():
                files = sorted((folder / "samples").glob(f"{name}__*.png"), key=lambda f: (len(f.name), f.name))
                samples = np.stack([io.imread(file) for file in files])
                if kind == "compact":
                    weights = json.loads((folder / f"{name}.json").read_text())["sample_weights"]
                    found["GED compact"], found["M-IoU compact"] = distances(samples, raters, weights)
                    continue
                found["GED 16"], found["M-IoU 16"] = distances(samples[:FEW], raters)
                found["GED 100"] = distances(samples, raters)[0]
                mean = io.imread(folder / f"{name}.png")
                found["Dice"] = score_distribution(mean, samples[:1], raters, [NODULE]).average.dice
                with np.load(folder / f"{name}.npz") as npz:
                    probability = np.clip(npz["probabilities"][NODULE].squeeze(), 0, 1)
                part = reliability_curve(probability, raters.mean(0, dtype=np.float32))
                self.curve = part if self.curve is None else self.curve + part
            for column, value in found.items():
                self.columns.setdefault(column, []).append(value)
            self.patients.append(slices.patients[index])
            self.majority.append(distances(majority_mask(raters), raters)[0])

    def figures(self) -> dict[str, Any]:
        """Means and standard errors over the slices."""
        result = {
            column: {"mean": round(float(np.mean(v)), 4), "standard_error": round(float(np.std(v) / len(v) ** 0.5), 4)}
            for column, v in self.columns.items()
        }
        difference, patients = np.array(self.columns["GED 100"]) - self.majority, np.array(self.patients)
        nearer = [difference[patients == patient].mean() < 0 for patient in np.unique(patients)]
        assert self.curve is not None
        reliability = {"probability": self.curve.confidence, "raters": self.curve.frequency}
        return {
            **result,
            "GED 100 less the majority mask's": over_patients(difference, patients),
            "patients nearer than the majority mask": [int(np.sum(nearer)), len(nearer)],
            "ECE": round(self.curve.expected_calibration_error, 6),
            "reliability": {name: [round(float(v), 4) for v in values] for name, values in reliability.items()},
            "pixels": self.curve.count.tolist(),
        }


def majority_mask(raters: np.ndarray) -> np.ndarray:
    """What half of the raters or more drew (1, Y, X)."""
    return (2 * raters.sum(0) >= len(raters)).astype(np.uint8)[None]


def over_patients(values: np.ndarray, patients: np.ndarray) -> dict[str, float]:
    """Mean over slices, and its 95 % interval when patients, with all their slices, are drawn again and again."""
    own = [values[patients == patient] for patient in np.unique(patients)]
    sums, counts = np.array([v.sum() for v in own]), np.array([len(v) for v in own])
    interval = bootstrap(
        (sums, counts), lambda s, c, axis=-1: s.sum(axis) / c.sum(axis), paired=True, method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    figures = {"mean": values.mean(), "low": interval.low, "high": interval.high}
    return {name: round(float(value), 4) for name, value in figures.items()}


def floors(folds: Sequence[Slices]) -> dict[str, dict[str, float]]:
    """What reaches how much without an image, but with the raters' masks for two of them."""
    found: dict[str, list[tuple[float, float]]] = {
        name: [] for name in ("majority mask", "consensus command", "empty", "one rater")
    }
    for raters in (slices.masks[index] for slices in folds for index, _ in slices.names(held_out=True)):
        found["majority mask"].append(distances(majority_mask(raters), raters))
        found["consensus command"].append(distances((2 * raters.sum(0) > len(raters)).astype(np.uint8)[None], raters))
        found["empty"].append(distances(np.zeros_like(raters[:1]), raters))
        found["one rater"].append(tuple(np.mean([distances(r[None], raters) for r in raters], 0)))
    return {
        name: dict(zip(("GED", "M-IoU"), np.mean(v, 0).round(4).tolist(), strict=True)) for name, v in found.items()
    }


def draw_experts(args: argparse.Namespace, cases: list[Case], folders: dict[str, Path]) -> None:
    """Slices, what the raters drew, a sample of each expert with its weight, and samples that were drawn."""

    def panels(case: Case) -> list[Panel]:
        experts = read_prediction(folders["compact"], case.name).samples[:EXPERTS]
        weights = json.loads((folders["compact"] / f"{case.name}.json").read_text())["sample_weights"]
        shares = [sum(weights[k::EXPERTS]) for k in range(EXPERTS)]
        drawn = enumerate(read_prediction(folders["drawn"], case.name).samples[:SHOWN], 1)
        return [
            *annotations(case),
            *(
                (f"expert {k + 1}: {share:.2f}", mask)
                for k, (share, mask) in enumerate(zip(shares, experts, strict=True))
            ),
            *((f"sample {k}", mask) for k, mask in drawn),
        ]

    draw_masks(args, cases, panels, f"{args.name}_samples")


def draw(args: argparse.Namespace, methods: dict[str, Any], floor: dict[str, dict[str, float]]) -> None:
    """D_GED^2 with two standard errors beside the floors, and the reliability curves."""
    fig, axes = common.figure(11, 3.8, 2)
    left, right = axes[0]
    for place, (name, method) in enumerate(methods.items()):
        value, model = method["GED 16"], name.split(", ")[0]
        left.bar(place, value["mean"], 0.65, color=COLOURS[model], yerr=2 * value["standard_error"], ecolor="#404040")
        left.annotate(f"{value['mean']:.3f}", (place, value["mean"] + 2 * value["standard_error"]), (0, 3),
                      textcoords="offset points", ha="center")  # fmt: skip
        style = "-" if name.endswith("all") else "--"
        right.plot(*method["reliability"].values(), style, marker=".", color=COLOURS[model], label=name)
    left.set_xticks(range(len(methods)), [name.replace(", ", "\n") for name in methods], fontsize=8)
    left.axhline(floor["majority mask"]["GED"], color="#c0392b", lw=1, label="majority mask")
    left.set(ylabel="$D^2_{GED}$, 16 samples", title="distance to the raters (lower is better)")
    right.plot((0, 1), (0, 1), color="#c0392b", lw=1)
    right.set(xlabel="probability of nodule", ylabel="raters who drew it", title="do probabilities mean what they say?")
    for ax in (left, right):
        ax.legend(frameon=False, fontsize=8)
    common.save(fig, args, args.name)


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--work", type=Path, metavar="DIR", help="keeps all steps; default: work/lidc_mose beside OUT")
    p.add_argument("--planner", default="nnUNetPlannerCPU")
    p.add_argument("--gpu-memory-target", type=float, default=0.06, help="sets the batch, on nnU-Net's scale")
    p.add_argument("--crop", type=int, default=64, metavar="PIXELS", help="edge of the middle that is used, of 128")
    p.add_argument("--held-out", type=int, default=20, metavar="PATIENTS")
    p.add_argument(
        "--folds", nargs="+", type=int, default=[0], help="no patient is held out in two; all are measured as one"
    )
    p.add_argument("--models", nargs="+", default=list(TRAINERS), choices=list(TRAINERS))
    p.add_argument("--settings", nargs="+", default=list(DATASETS), choices=list(DATASETS))
    p.add_argument("--epochs", type=int, default=10)
    p.add_argument("--iterations", type=int, default=150)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--name", default="lidc_mose", help="of the results' files, such as lidc_mose_long")
    p.add_argument("--note", default="", help="recorded with the figures, for what a reader should know of the run")
    args = p.parse_args()
    args.work = (args.work or args.out.resolve().parent / "work" / "lidc_mose").resolve()
    base = args.work
    base.mkdir(parents=True, exist_ok=True)
    (base / ".gitignore").write_text("*\n")
    folds = [Slices(common.data_folder(DATA), args.crop, args.held_out, args.seed, fold) for fold in args.folds]
    measured: dict[str, Measured] = {}
    seconds: dict[str, int] = {}
    for fold, slices in zip(args.folds, folds, strict=True):
        args.work = base / f"fold_{fold}"
        args.work.mkdir(exist_ok=True)
        convert(args, slices)
        prepare(args)
        last = max(name for _, name in slices.names(held_out=True))
        for model, setting in product(args.models, args.settings):
            name = f"{model}, {setting}"
            folder, predictions = train_and_predict(args, model, setting, last)
            seconds[name] = seconds.get(name, 0) + round(training_seconds(folder / "fold_all"))
            measured.setdefault(name, Measured()).add(predictions, slices)
            print(f"fold {fold}, so far:", name, measured[name].figures(), flush=True)
            if (name, fold) == ("MoSE, all", args.folds[0]):
                cases = [Case(name, slices.images[i], slices.masks[i]) for i, name in slices.names(held_out=True)]
                draw_experts(args, quantile_cases(cases, ROWS), predictions)
    methods = {name: {**own.figures(), "training_s": seconds[name]} for name, own in measured.items()}
    floor = floors(folds)
    draw(args, methods, floor)
    figures = {
        "repeats": 1, "note": args.note, "paper": PAPER, "methods": methods, "floors": floor,
        "held_out_slices": sum(len(list(slices.names(held_out=True))) for slices in folds),
    }  # fmt: skip
    common.write(args, args.name, figures)


if __name__ == "__main__":
    main()
