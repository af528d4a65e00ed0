"""Make a data set in nnU-Net's raw format of what people have: a download, a BIDS tree, any folder of files.

  nnunet-multimodal convert brats MICCAI_BraTS2020_TrainingData --dataset-id 20
  nnunet-multimodal convert hecktor hecktor2022_training --dataset-id 22 --resample
  nnunet-multimodal convert pattern DATA --dataset-id 7 --pattern '{case}/{case}_{channel}.nii.gz' \\
      --label-pattern '{case}/{case}_seg.nii.gz' --channels FLAIR=flair T1=t1 --labels edema=2 core=1+4

Everything is read and verified before anything is written: grids, label values, NaN, missing files. The data set is
written beside its folder and then renamed, so it is complete or not there; one that is there is never touched.
conversion.csv in it says what was done with every case.
"""

from __future__ import annotations

import argparse
import re
from importlib import import_module
from pathlib import Path

from nnunetv2.configuration import default_num_processes
from nnunetv2.paths import nnUNet_raw
from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets

from nnunet_multimodal.datasets.base import Request
from nnunet_multimodal.datasets.engine import DROP, ERROR, KEEP, LABELS_GRID, Conversion, convert, half_written
from nnunet_multimodal.errors import UserError

# name -> flags that it takes beyond those of all; each is a module of nnunet_multimodal.datasets with read(request)
CONVERTERS = {
    "brats": ("labels",),
    "mmwhs": (),
    "autopet": (),
    "hecktor": (),
    "lidc": (),
    "msd": (),
    "bids": ("channels", "labels", "label_pattern", "derivatives"),
    "pattern": ("channels", "labels", "label_pattern", "pattern"),
}
OPTIONS = ("channels", "labels", "label_pattern", "derivatives", "pattern")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The source, the data set, and how to deal with what is irregular."""
    parser.add_argument("name", choices=CONVERTERS, metavar="NAME", help=f"{', '.join(CONVERTERS)}")
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder of the download")
    parser.add_argument("--dataset-id", type=int, required=True, metavar="N", help="of the new data set, 1 to 999")
    parser.add_argument("--name", dest="dataset_name", metavar="NAME", help="of the new data set: DatasetNNN_NAME")
    parser.add_argument("--link", action="store_true", help="link files that need no change: hard, else symbolic")
    parser.add_argument(
        "--incomplete",
        choices=(KEEP, DROP, ERROR),
        help="cases without a modality: keep with placeholders, drop, or stop (default: error; mmwhs: keep)",
    )
    parser.add_argument(
        "--resample",
        nargs="?",
        const=LABELS_GRID,
        metavar="GRID",
        help="put all images of a case on the grid of its label map, or of a channel by name",
    )
    parser.add_argument("--pattern", metavar="PATTERN", help="pattern: file names, '{case}/{case}_{channel}.nii.gz'")
    parser.add_argument(
        "--label-pattern",
        metavar="PATTERN",
        help="pattern: of label maps, with {rater} where there are several; bids: their suffix (default: dseg)",
    )
    parser.add_argument("--channels", nargs="+", default=[], metavar="NAME=TEXT", help="pattern, bids: the modalities")
    parser.add_argument(
        "--labels",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="pattern, bids: the labels; VALUE+VALUE are one; brats: NAME=4",
    )
    parser.add_argument("--derivatives", metavar="FOLDER", help="bids: where the label maps are")
    parser.add_argument(
        "-np", type=int, default=default_num_processes, help=f"number of processes (default: {default_num_processes})"
    )


def run(args: argparse.Namespace) -> int:
    """Convert; returns the exit status.

    Raises:
        UserError: something is wrong with the source or the flags, or the data set is there; nothing has been written.
    """
    for option in OPTIONS:
        if getattr(args, option) and option not in CONVERTERS[args.name]:
            takes = ", ".join(name for name, options in CONVERTERS.items() if option in options)
            raise UserError(f"--{option.replace('_', '-')} is not for {args.name}; it is for {takes}")
    raw = check_target(args.dataset_id, args.dataset_name)
    with half_written(raw / f"Dataset{args.dataset_id:03d}") as beside:
        check_free(args.dataset_id)
        source = import_module(f"nnunet_multimodal.datasets.{args.name}").read(
            Request(
                path=args.source,
                beside=beside / "source",
                dataset_id=args.dataset_id,
                processes=args.np,
                pattern=args.pattern,
                label_pattern=args.label_pattern,
                channels=tuple(args.channels),
                labels=tuple(args.labels),
                derivatives=args.derivatives,
                incomplete=args.incomplete,
            )
        )
        if args.resample not in (None, LABELS_GRID, *source.channels):
            raise UserError(f"--resample {args.resample}: give {LABELS_GRID} or one of {', '.join(source.channels)}")
        name = args.dataset_name or source.name
        if not name:
            raise UserError(f"{args.source}: its name has no letter or digit of ASCII; name the data set with --name")
        conversion = Conversion(source, args.link, args.resample, args.np)
        summary = convert(conversion, beside / "dataset", args.incomplete or source.incomplete)
        folder = raw / f"Dataset{args.dataset_id:03d}_{name}"
        (beside / "dataset").rename(folder)
    print(f"{summary}\n{folder}")
    if (folder / "imagesTr" / "modalities.csv").is_file():
        options = " -fpe MultimodalFingerprintExtractor -preprocessor_name MultimodalPreprocessor"
    else:
        options = " -preprocessor_name MultimodalPreprocessor" if (folder / "ratersTr").is_dir() else ""
    print(f"next: nnUNetv2_plan_and_preprocess -d {args.dataset_id}{options}")
    return 0


def check_target(dataset_id: int, name: str | None) -> Path:
    """nnU-Net's raw folder.

    Raises:
        UserError: it is not set, the number is not of nnU-Net's kind, or the name has other characters.
    """
    if not nnUNet_raw.is_set():
        raise UserError("nnUNet_raw is not set; it names the folder of data sets")
    if not 1 <= dataset_id <= 999:
        raise UserError(f"--dataset-id {dataset_id}: give a number from 1 to 999")
    if name is not None and not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise UserError(f"--name {name!r}: letters, digits, - and _ alone")
    raw = Path(nnUNet_raw)
    raw.mkdir(parents=True, exist_ok=True)
    return raw


def check_free(dataset_id: int) -> None:
    """Raise a UserError if a data set has the number."""
    taken = find_candidate_datasets(dataset_id)
    if len(taken):
        raise UserError(
            f"--dataset-id {dataset_id} is taken by {', '.join(taken)} in nnU-Net's folders; give another one"
        )
