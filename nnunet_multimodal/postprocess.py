"""Turn a label that is hardly there into another one: small enhancing tumour into tumour core (ShaSpec*, BraTS).

  nnunet-multimodal postprocess -i predictions -o processed --small 'enhancing=necrosis' --below 500

In every label map whose label has fewer voxels than --below, all of them get the other label. Use it after
nnUNetv2_apply_postprocessing, which removes small components. Labels are names in dataset.json or, where these stand
for regions, numbers (--small 3=1).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tqdm import tqdm

from nnunet_multimodal.errors import UserError

BELOW = 500  # Wang et al., CVPR 2023, the authors' code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Two folders and the rule."""
    parser.add_argument(
        "-i", type=Path, required=True, metavar="FOLDER", help="predictions, with nnU-Net's dataset.json"
    )
    parser.add_argument("-o", type=Path, required=True, metavar="FOLDER", help="where the results go")
    parser.add_argument("--small", required=True, metavar="LABEL=OTHER", help="the label, and what it becomes")
    parser.add_argument("--below", type=int, default=BELOW, metavar="N", help=f"voxels of a case (default: {BELOW})")


def run(args: argparse.Namespace) -> int:
    """Process a folder; returns the exit status.

    Raises:
        UserError: no such label, the folders are one, or nothing to process.
    """
    if args.i.resolve() == args.o.resolve():
        raise UserError(f"-i and -o are both {args.i}; give another folder for the results")
    for name in ("dataset.json", "plans.json"):
        if not (args.i / name).is_file():
            raise UserError(f"{args.i / name} is not there; nnUNetv2_predict writes it beside its predictions")
    if args.below < 1:
        raise UserError(f"--below {args.below} must be at least 1")
    dataset = json.loads((args.i / "dataset.json").read_text())
    small, other = parse_rule(args.small, dataset["labels"])
    ending = dataset["file_ending"]
    files = sorted(f for f in args.i.iterdir() if f.name.endswith(ending) and f.name[0] != ".")
    if not files:
        raise UserError(f"no label map ending in {ending} in {args.i}")
    args.o.mkdir(parents=True, exist_ok=True)
    reader = PlansManager(str(args.i / "plans.json")).image_reader_writer_class()
    changed = []
    for file in tqdm(files, desc="postprocess", unit="case"):
        segmentation, properties = reader.read_seg(str(file))
        replaced = replace_small(segmentation[0], small, other, args.below)
        if replaced is not None:
            changed.append(file.name)
        beside = args.o / f".{file.name}"
        reader.write_seg(segmentation[0] if replaced is None else replaced, str(beside), properties)
        name = file.name.removesuffix(ending)
        for suffix in (".json", ending):  # of 3D tiff the spacing; the label map last
            if (args.o / f".{name}{suffix}").is_file():
                (args.o / f".{name}{suffix}").replace(args.o / f"{name}{suffix}")
    for name in ("dataset.json", "plans.json"):
        shutil.copyfile(args.i / name, args.o / name)
    print(f"{len(changed)} of {len(files)} cases changed" + (f": {', '.join(changed)}" if changed else ""))
    return 0


def replace_small(segmentation: np.ndarray, small: int, other: int, below: int) -> np.ndarray | None:
    """A label map (*D) with ``small`` turned into ``other`` if that has fewer voxels than ``below``; else None."""
    where = segmentation == small
    if not 0 < np.count_nonzero(where) < below:
        return None
    return np.where(where, other, segmentation).astype(np.uint16)


def parse_rule(rule: str, labels: dict) -> tuple[int, int]:
    """The two numbers of ``LABEL=OTHER``.

    Raises:
        UserError: not that form, or no such label.
    """
    single = {name: value for name, value in labels.items() if isinstance(value, int)}
    numbers = {int(v) for value in labels.values() for v in (value if isinstance(value, list) else [value])}
    sides = [side.strip() for side in rule.split("=")]
    found = [single.get(side, int(side) if side.isdigit() and int(side) in numbers else None) for side in sides]
    if len(found) == 2 and found[0] is not None and found[1] is not None and found[0] != found[1]:
        return found[0], found[1]
    known = ", ".join([*single, *map(str, sorted(numbers))])
    raise UserError(f"--small {rule!r} is not LABEL=OTHER with two of {known}")
