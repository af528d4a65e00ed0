"""Missing modalities on synthetic data: plain nnU-Net, modality dropout and ShaSpec over all 15 subsets of four.

Every structure shows in two modalities, one in a single one (``_missing_data.py``). All models have nnU-Net's plan and
the same number of steps. Trained on complete cases: nnU-Net itself (an absent modality is zero), early fusion with
modality dropout, ShaSpec with it. Trained on the same cases with 40 % of the modalities missing at random: the two
again, and early fusion without dropout. Test cases are complete and other ones; ``nnunet-multimodal evaluate
--all-subsets`` predicts and measures them. Everything runs through nnU-Net's own commands, two trainings at a time.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import _common as common
from _missing_data import MODALITIES, STRUCTURES, write_dataset
from _missing_sections import AVERAGE, read_table
from lidc import run
from sts import training_seconds

CONFIGURATION, PLANS = "3d_fullres", "nnUNetTinyPlans"
DATASETS = {"complete": "Dataset510_Complete", "incomplete": "Dataset511_Incomplete"}
TRAINERS = {
    "complete": ("nnUNetTrainer", "ModalityDropoutTrainer", "ShaSpecModalityDropoutTrainer"),
    "incomplete": ("EarlyFusionTrainer", "ModalityDropoutTrainer", "ShaSpecModalityDropoutTrainer"),
}
BASELINE = "ModalityDropoutTrainer"


def trainer_name(args: argparse.Namespace, trainer: str) -> str:
    """With its length."""
    return f"{trainer}_{args.epochs}epochs_{args.iterations}iterations"


def prepare(args: argparse.Namespace) -> None:
    """Both datasets, completed, planned and preprocessed."""
    for setting, dataset in DATASETS.items():
        raw, preprocessed = args.work / "nnUNet_raw" / dataset, args.work / "nnUNet_preprocessed" / dataset
        if not (raw / "dataset.json").exists():
            missing = args.missing if setting == "incomplete" else 0.0
            write_dataset(raw, args.training, args.test, args.seed, missing)
        manifest = raw / "imagesTr" / "modalities.csv"
        run(args, f"complete_{setting}", manifest, "nnunet-multimodal", "complete", str(raw / "imagesTr"), "-np", "1")
        run(
            args, f"plan_{setting}", preprocessed / f"{PLANS}_{CONFIGURATION}",
            "nnUNetv2_plan_and_preprocess", "-d", dataset[7:10], "-pl", "nnUNetPlannerTiny", "-c", CONFIGURATION,
            "-fpe", "MultimodalFingerprintExtractor", "-preprocessor_name", "MultimodalPreprocessor",
            "-npfp", "1", "-np", "1",
        )  # fmt: skip


def train(args: argparse.Namespace, setting: str, trainer: str) -> float:
    """Train unless it is done; returns the seconds that it took, from nnU-Net's log."""
    name = trainer_name(args, trainer)
    folder = args.work / "nnUNet_results" / DATASETS[setting] / f"{name}__{PLANS}__{CONFIGURATION}" / "fold_all"
    options = (DATASETS[setting][7:10], CONFIGURATION, name, PLANS, args.device, str(args.seed), str(args.threads))
    run(args, f"train_{setting}_{name}", folder / "checkpoint_final.pth", "-c", TRAINING, *options, training=True)
    return training_seconds(folder)


# without the validation at the end, on the training cases
TRAINING = """
import random, sys, numpy, torch
from nnunetv2.run.run_training import get_trainer_from_args
dataset, configuration, trainer, plans, device, seed, threads = sys.argv[1:]
random.seed(int(seed)); numpy.random.seed(int(seed)); torch.manual_seed(int(seed))
torch.set_num_threads(int(threads))
get_trainer_from_args(dataset, configuration, "all", trainer, plans, device=torch.device(device)).run_training()
"""


def evaluate(args: argparse.Namespace, setting: str) -> dict[str, Any]:
    """All subsets by all models of a setting."""
    raw, out = args.work / "nnUNet_raw" / DATASETS[setting], args.work / "subsets" / setting
    table = out / "subsets.csv"
    table.unlink(missing_ok=True)
    run(
        args, f"evaluate_{setting}", table,
        "nnunet-multimodal", "evaluate", "--all-subsets", str(raw / "labelsTs"), str(out), "-i", str(raw / "imagesTs"),
        "-d", DATASETS[setting][7:10], "-c", CONFIGURATION, "-p", PLANS, "-f", "all", "-device", args.device,
        "-tr", *(trainer_name(args, trainer) for trainer in TRAINERS[setting]),
        "--baseline", trainer_name(args, BASELINE), "-np", "1", *(["--disable_tta"] if args.disable_tta else []),
    )  # fmt: skip
    (args.out / f"missing_modalities_{setting}.png").write_bytes((out / "subsets.png").read_bytes())
    return read_table(table)


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--work", type=Path, default=Path("missing_modalities_work"), help="work folder, kept")
    p.add_argument("--epochs", type=int, default=10)
    p.add_argument("--iterations", type=int, default=120)
    p.add_argument("--training", type=int, default=40, help="training cases")
    p.add_argument("--test", type=int, default=12, help="test cases")
    p.add_argument("--missing", type=float, default=0.4, help="part of the modalities missing in training")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=1, help="of each of the two trainings at a time")
    p.add_argument("--note", default="", help="recorded with the figures, for what a reader should know of the run")
    p.add_argument("--disable-tta", action="store_true", help="no mirroring in the evaluation")
    args = p.parse_args()
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    prepare(args)
    jobs = [(setting, trainer) for setting, trainers in TRAINERS.items() for trainer in trainers]
    jobs.sort(key=lambda job: "ShaSpec" not in job[1])  # the longest first
    with ThreadPoolExecutor(2) as pool:
        seconds = dict(zip(jobs, pool.map(lambda job: train(args, *job), jobs), strict=True))
        results = dict(zip(DATASETS, pool.map(lambda setting: evaluate(args, setting), DATASETS), strict=True))
    figures = {
        "note": args.note,
        "repeats": 1,
        "modalities": MODALITIES,
        "test_cases": args.test,
        "missing": args.missing,
        "steps": args.epochs * args.iterations,
        "structures": STRUCTURES,
        "mirrored": not args.disable_tta,
        "training_seconds": {f"{setting}, {trainer}": round(s) for (setting, trainer), s in seconds.items()},
        "results": results,
    }
    for setting, models in results.items():
        for trainer, rows in models.items():
            dice = {subset: rows[subset]["mean"]["Dice"]["mean"] for subset in rows}
            everything = "+".join(MODALITIES)
            print(f"{setting:10} {trainer:30} average {dice[AVERAGE]:.3f}  all modalities {dice[everything]:.3f}")
    common.write(args, "missing_modalities", figures)


if __name__ == "__main__":
    main()
