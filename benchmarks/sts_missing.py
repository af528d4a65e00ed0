"""What each missing modality costs on real PET/CT/MR data: all seven subsets on the held-out patients of ``sts.py``.

Goes on in the work folder of ``sts.py``: trains early fusion, ShaSpec and CRNP with modality dropout on the same plan,
split and length as its nnU-Net, and compares the four with ``nnunet-multimodal evaluate --all-subsets`` on the held-out
patients; the t-SNE is that of ShaSpec's bottleneck features (the paper's Figure 5). Whatever is done already is kept.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import _common as common
from _missing_sections import read_table
from lidc import run
from sts_ssn import CONFIGURATION, PLANS, dataset_name, model_name, train

TRAINERS = ("nnUNetTrainer", "ModalityDropoutTrainer", "ShaSpecModalityDropoutTrainer", "CRNPModalityDropoutTrainer")
BASELINE = "ModalityDropoutTrainer"


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--work", type=Path, metavar="DIR", help="of sts.py; default: work/sts beside OUT")
    p.add_argument("--epochs", type=int, default=12)
    p.add_argument("--iterations", type=int, default=100)
    p.add_argument("--fold", type=int, default=0)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--disable-tta", action="store_true", help="no mirroring in the evaluation: an eighth of its time")
    p.add_argument("--note", default="", help="recorded with the figures, for what a reader should know of the run")
    args = p.parse_args()
    args.work = (args.work or args.out.resolve().parent / "work" / "sts").resolve()
    dataset = dataset_name(args)
    for trainer in TRAINERS:
        train(args, dataset, trainer)
    held_out, out = args.work / "held_out", args.work / "subsets"
    table = out / "subsets.csv"
    table.unlink(missing_ok=True)
    run(
        args, "evaluate_subsets", table,
        "nnunet-multimodal", "evaluate", "--all-subsets", str(held_out / "labelsTs"), str(out),
        "-i", str(held_out / "imagesTs"), "-d", dataset[7:10], "-c", CONFIGURATION, "-p", PLANS, "-f", str(args.fold),
        "-tr", *(model_name(args, trainer) for trainer in TRAINERS), "--baseline", model_name(args, BASELINE),
        "-device", args.device, "-np", "1", *(["--disable_tta"] if args.disable_tta else []),
    )  # fmt: skip
    features = args.work / "features"
    run(
        args, "features", features / "features.png",
        "nnunet-multimodal", "features", "-i", str(held_out / "imagesTs"), "-o", str(features), "-d", dataset[7:10],
        "-c", CONFIGURATION, "-p", PLANS, "-f", str(args.fold), "-tr", model_name(args, TRAINERS[2]),
        "-device", args.device,
    )  # fmt: skip
    shutil.copyfile(out / "subsets.png", args.out / "sts_missing.png")
    shutil.copyfile(features / "features.png", args.out / "sts_missing_features.png")
    figures = {"note": args.note, "mirrored": not args.disable_tta, "baseline": BASELINE, "results": read_table(table)}
    for trainer, rows in figures["results"].items():
        print(f"{trainer:32}", *(f"{s} {row['tumour']['Dice']['mean']:.3f}" for s, row in rows.items()), sep="  ")
    common.write(args, "sts_missing", figures)


if __name__ == "__main__":
    main()
