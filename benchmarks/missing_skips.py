"""ShaSpec's skips where a modality is absent: left out, or substituted as at the bottleneck (Eq. 4 in the skips too).

Goes on in the work folder of ``missing_modalities.py``: the same complete training cases, plan, seed and length, in a
configuration of the plans file that substitutes, against its model that leaves out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean

import _common as common
from _missing_data import MODALITIES
from _missing_sections import AVERAGE, read_table
from lidc import run
from missing_modalities import CONFIGURATION, DATASETS, PLANS, TRAINING, trainer_name

TRAINER, DATASET = "ShaSpecModalityDropoutTrainer", DATASETS["complete"]
SUBSTITUTED = f"{CONFIGURATION}_substituted"


def add_configuration(args: argparse.Namespace) -> None:
    """The plan, with substituted skips, in the plans file."""
    file = args.work / "nnUNet_preprocessed" / DATASET / f"{PLANS}.json"
    plans = json.loads(file.read_text())
    options = {"shaspec": {"skips": "substituted"}}
    plans["configurations"][SUBSTITUTED] = {"inherits_from": CONFIGURATION, "nnunet_multimodal": options}
    file.write_text(json.dumps(plans, indent=1) + "\n")


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--work", type=Path, default=Path("missing_modalities_work"), help="of missing_modalities.py")
    p.add_argument("--epochs", type=int, default=10)
    p.add_argument("--iterations", type=int, default=120)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=1)
    args = p.parse_args()
    args.work = args.work.resolve()
    add_configuration(args)
    name, raw = trainer_name(args, TRAINER), args.work / "nnUNet_raw" / DATASET
    folder = args.work / "nnUNet_results" / DATASET / f"{name}__{PLANS}__{SUBSTITUTED}" / "fold_all"
    options = (DATASET[7:10], SUBSTITUTED, name, PLANS, args.device, str(args.seed), str(args.threads))
    run(args, "train_substituted", folder / "checkpoint_final.pth", "-c", TRAINING, *options, training=True)
    out = args.work / "subsets" / "substituted"
    run(
        args, "evaluate_substituted", out / "subsets.csv",
        "nnunet-multimodal", "evaluate", "--all-subsets", str(raw / "labelsTs"), str(out), "-i", str(raw / "imagesTs"),
        "-d", DATASET[7:10], "-c", SUBSTITUTED, "-p", PLANS, "-f", "all", "-device", args.device, "-tr", name,
        "-np", "1", "--disable_tta",
    )  # fmt: skip
    tables = {
        "left out": read_table(args.work / "subsets" / "complete" / "subsets.csv")[TRAINER],
        "substituted": read_table(out / "subsets.csv")[TRAINER],
    }
    results = {}
    for skips, rows in tables.items():
        dice = {subset: row["mean"]["Dice"]["mean"] for subset, row in rows.items()}
        results[skips] = {"average": round(dice.pop(AVERAGE), 4)} | {
            f"{size} of {len(MODALITIES)}": round(fmean(v for s, v in dice.items() if s.count("+") == size - 1), 4)
            for size in range(1, len(MODALITIES) + 1)
        }
        print(skips, results[skips])
    common.write(args, "missing_skips", {"repeats": 1, "steps": args.epochs * args.iterations, "results": results})


if __name__ == "__main__":
    main()
