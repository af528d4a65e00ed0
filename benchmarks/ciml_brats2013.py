"""CIML and its explanations on three patients with glioma (BraTS 2013, FLAIR and T1CE): two to train, one to look at.

FLAIR answers for the whole tumour, T1CE for the tumour core and the enhancing tumour. One patient says nothing about
how good the method is: what is written down is that everything runs on real images, and what the explanations say of
them. The pictures lie in the work folder; the data's licence keeps them out of the project.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import _common as common
import SimpleITK
from lidc import run

DATASET, CONFIGURATION, PLANS = "Dataset530_BraTS2013", "3d_fullres", "nnUNetCPUPlans"
CHANNELS = {"FLAIR": "flair", "T1CE": "t1ce"}
# 1 necrosis, 2 oedema, 3 non-enhancing, 4 enhancing
REGIONS = {"whole tumor": [1, 2, 3, 4], "tumor core": [1, 3, 4], "enhancing tumor": [4]}
DECOMPOSITION = {"FLAIR": ["whole tumor"], "T1CE": ["tumor core", "enhancing tumor"]}


def write_dataset(raw: Path, data: Path) -> None:
    """nnU-Net's format: all but the last patient to train."""
    patients = sorted(p.name for p in data.iterdir() if p.is_dir())
    for patient in patients:
        split = "Ts" if patient == patients[-1] else "Tr"
        for folder in (f"images{split}", f"labels{split}"):
            (raw / folder).mkdir(parents=True, exist_ok=True)
        for channel, suffix in enumerate(CHANNELS.values()):
            image = SimpleITK.ReadImage(str(data / patient / f"{patient}_{suffix}.nii.gz"))
            SimpleITK.WriteImage(image, str(raw / f"images{split}" / f"{patient}_{channel:04d}.nii.gz"))
        labels = SimpleITK.Cast(SimpleITK.ReadImage(str(data / patient / f"{patient}_seg.nii.gz")), SimpleITK.sitkUInt8)
        SimpleITK.WriteImage(labels, str(raw / f"labels{split}" / f"{patient}.nii.gz"))
    description = {
        "channel_names": dict(enumerate(CHANNELS)),
        "labels": {"background": 0, **REGIONS},
        "regions_class_order": [2, 1, 4],
        "numTraining": len(patients) - 1,
        "file_ending": ".nii.gz",
        "nnunet_multimodal": {"decomposition": DECOMPOSITION},
    }
    (raw / "dataset.json").write_text(json.dumps(description, indent=1) + "\n")


def rows(file: Path) -> list[dict[str, str]]:
    """Of a CSV file."""
    return list(csv.DictReader(file.read_text().splitlines()))


def number(text: str) -> float | None:
    """Three digits; None for an empty cell."""
    return round(float(text), 3) if text else None


def explain(args: argparse.Namespace, raw: Path, trainer: str) -> dict[str, Any]:
    """Shares and contributions of the patient who was left out."""
    out = args.work / "explained"
    model = ("-d", DATASET[7:10], "-c", CONFIGURATION, "-p", PLANS, "-tr", trainer, "-f", "all", "-device", args.device)
    run(
        args, "explain", out / "complementary_weights.png", "nnunet-multimodal", "explain", "-i", str(raw / "imagesTs"),
        "-o", str(out), "-ref", str(raw / "labelsTs"), "--disable_tta", *model,
    )  # fmt: skip
    weights = {
        f"{row['primary']}: {row['region']} from {row['auxiliary']}": number(row["weight"])
        for row in rows(out / "complementary_weights.csv")
        if row["case"] == "mean"
    }
    contributions = [
        {key: row[key] if key in ("modality", "label") else number(row[key]) for key in row if key != "case"}
        for row in rows(out / "contributions.csv")
    ]
    return {"weights": weights, "contributions": contributions}


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--work", type=Path, default=Path("ciml_brats2013_work"), help="work folder, kept")
    p.add_argument("--epochs", type=int, default=10)
    p.add_argument("--iterations", type=int, default=60)
    p.add_argument("--spacing", type=float, nargs=3, default=[3, 3, 3], help="mm")
    p.add_argument("--threads", type=int, default=1)
    args = p.parse_args()
    data = common.data_folder("brats2013_flair_t1c")
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    raw, preprocessed = args.work / "nnUNet_raw" / DATASET, args.work / "nnUNet_preprocessed" / DATASET
    if not (raw / "dataset.json").exists():
        write_dataset(raw, data)
    run(
        args, "plan", preprocessed / f"{PLANS}_{CONFIGURATION}", "nnUNetv2_plan_and_preprocess", "-d", DATASET[7:10],
        "-pl", "nnUNetPlannerCPU", "-c", CONFIGURATION, "-overwrite_target_spacing", *map(str, args.spacing),
        "-npfp", "1", "-np", "1",
    )  # fmt: skip
    trainer = f"CIMLTrainer_{args.epochs}epochs_{args.iterations}iterations"
    folder = args.work / "nnUNet_results" / DATASET / f"{trainer}__{PLANS}__{CONFIGURATION}" / "fold_all"
    run(
        args, "train", folder / "checkpoint_final.pth", "nnUNetv2_train", DATASET[7:10], CONFIGURATION, "all",
        "-tr", trainer, "-p", PLANS, "-device", args.device, training=True,
    )  # fmt: skip
    figures = {"steps": args.epochs * args.iterations, "patients": 1, **explain(args, raw, trainer)}
    print(json.dumps(figures, indent=1))
    common.write(args, "ciml_brats2013", figures)


if __name__ == "__main__":
    main()
