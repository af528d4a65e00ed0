"""Make labelsTr from several raters: a majority vote, STAPLE, or one of them by name.

Reads nnUNet_raw/DATASET/ratersTr/CASE__RATER (and raters.csv: case,rater,weight) and writes labelsTr/CASE, which stock
nnU-Net plans, preprocesses and trains on. Before anything is written all of it is checked: names, that no file is
damaged, that every rater's lies on its image's grid, and that it has no label that dataset.json does not declare.

  majority    the label with most weight, the lower one in a tie; regions are voted on one by one (more than half)
  staple      SimpleITK's STAPLE (Warfield et al., IEEE TMI 2004), label by label or region by region; without weights
  NAME        the rater of that name

Voxels that a rater ignores are left to the others. With --check nothing is written.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
from nnunetv2.configuration import default_num_processes
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.paths import nnUNet_raw
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_multimodal.errors import UserError, refuse
from nnunet_multimodal.images import check_file, read_images, read_seg, rename_files, unreadable
from nnunet_multimodal.parallel import in_parallel
from nnunet_multimodal.raters.files import FOLDER, WEIGHTS, Rater, find_raters, read_rater

MAJORITY, STAPLE = "majority", "staple"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The dataset, and how to agree."""
    parser.add_argument("-d", required=True, help="dataset name or id")
    parser.add_argument(
        "--method", default=MAJORITY, metavar="METHOD", help="majority, staple or a rater's name (default: majority)"
    )
    parser.add_argument("--check", action="store_true", help="check the raters' files and write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace label maps that are there")
    parser.add_argument(
        "-np", type=int, default=default_num_processes, help=f"number of processes (default: {default_num_processes})"
    )


@dataclass(frozen=True)
class Work:
    """What all cases have in common."""

    reader: type[BaseReaderWriter]
    labels: LabelManager
    method: str
    values: frozenset[int]
    ending: str


def run(args: argparse.Namespace) -> int:
    """Check, and make the consensus of every case; returns the exit status.

    Raises:
        UserError: something is wrong with the raters' files, or label maps are there already.
    """
    if nnUNet_raw is None:
        raise UserError("nnUNet_raw is not set; see nnU-Net's documentation on its environment variables")
    raw = Path(nnUNet_raw) / maybe_convert_to_dataset_name(int(args.d) if str(args.d).isdigit() else args.d)
    description = json.loads((raw / "dataset.json").read_text())
    ending = description["file_ending"]
    raters = find_raters(raw / FOLDER, ending)
    if not raters:
        raise UserError(f"{raw / FOLDER} has no file CASE__RATER{ending}; put the raters' label maps there")
    images = {case: raw / "imagesTr" / f"{case}_0000{ending}" for case in raters}
    lacking = sorted(
        {f.name.removesuffix(f"_0000{ending}") for f in raw.glob(f"imagesTr/*_0000{ending}")} - set(raters)
    )
    problems = [f"{file} is not there, and {case} has raters" for case, file in images.items() if not file.is_file()]
    problems += [f"{case} has an image and no rater in {raw / FOLDER}" for case in lacking]
    if args.method not in (MAJORITY, STAPLE):
        without = [case for case, of_case in raters.items() if args.method not in {rater.name for rater in of_case}]
        problems += [f"{case} has no rater {args.method!r}" for case in without]
    refuse(problems)
    work = Work(
        _find_reader(description, next(iter(images.values()))),
        LabelManager(description["labels"], description.get("regions_class_order")),
        args.method,
        frozenset(_values(description["labels"])),
        ending,
    )
    cases = [(images[case], raters[case]) for case in raters]
    refuse([p for found in in_parallel(partial(check_case, work), cases, args.np, "check") for p in found])
    counts = [len(of_case) for of_case in raters.values()]
    weights = ", with weights" if (raw / FOLDER / WEIGHTS).is_file() else ""
    print(f"{len(raters)} cases with {min(counts)} to {max(counts)} raters{weights}: names, grids and labels are right")
    if args.check:
        return 0
    output = raw / "labelsTr"
    there = [case for case in raters if (output / f"{case}{ending}").exists()]
    if there and not args.overwrite:
        raise UserError(f"{output} has label maps of {len(there)} of the cases; --overwrite replaces them")
    output.mkdir(exist_ok=True)
    files = [(image, of_case, output / f"{case}{ending}") for case, (image, of_case) in zip(raters, cases, strict=True)]
    for _ in in_parallel(partial(write_consensus, work), files, args.np, args.method):
        pass
    print(f"{args.method}: {len(files)} label maps in {output}")
    return 0


def _find_reader(description: dict[str, Any], image: Path) -> type[BaseReaderWriter]:
    """nnU-Net's reader for a dataset's images; a damaged one would have a traceback for each reader printed."""
    check_file(image)
    try:
        return determine_reader_writer_from_dataset_json(description, str(image))
    except RuntimeError as error:
        raise unreadable(image, error) from error


def _values(labels: dict[str, Any]) -> Iterable[int]:
    for value in labels.values():
        yield from value if isinstance(value, list | tuple) else [value]


def check_case(work: Work, image: Path, raters: Sequence[Rater]) -> list[str]:
    """What is wrong with a case's raters, in words."""
    reader = work.reader()
    try:
        data, properties = read_images(reader, [str(image)])
    except UserError as error:
        return [str(error)]
    problems = []
    for rater in raters:
        try:
            read_rater(reader, rater.file, str(image), data.shape[1:], properties, work.values)
        except UserError as error:
            problems.append(str(error))
    return problems


def write_consensus(work: Work, image: Path, raters: Sequence[Rater], output: Path) -> None:
    """A case's consensus; beside, then rename."""
    reader = work.reader()
    maps = [read_seg(reader, str(rater.file)) for rater in raters]
    label_maps = np.stack([np.rint(labels[0]).astype(np.uint16) for labels, _ in maps])
    if work.method in (MAJORITY, STAPLE):
        weights = np.array([rater.weight for rater in raters])
        agreed = (majority if work.method == MAJORITY else staple)(label_maps, weights, work.labels)
    else:
        agreed = label_maps[[rater.name for rater in raters].index(work.method)]
    ending = work.ending
    beside, name = output.with_name(f".part_{output.name.removesuffix(ending)}"), output.name.removesuffix(ending)
    labels = agreed.astype(np.uint8 if agreed.max() < 256 else np.uint16)
    reader.write_seg(labels, f"{beside}{ending}", maps[0][1])
    rename_files(beside, output.with_name(name), ".json", ending)  # TIFF has its spacing in a JSON


def majority(label_maps: np.ndarray, weights: np.ndarray, labels: LabelManager) -> np.ndarray:
    """The label with most weight in every voxel.

    Args:
        label_maps: (R, *D), ints.
        weights: (R,), >= 0.
        labels: nnU-Net's; regions are voted on one by one and written in their order.

    Returns:
        (*D); the ignore label where all raters ignore.
    """

    def votes(values: Any) -> np.ndarray:
        """Weight of the raters who say one of these (*D), a rater at a time."""
        total = np.zeros(label_maps.shape[1:], np.float32)
        for own, weight in zip(label_maps, weights, strict=True):
            total += np.float32(weight) * np.isin(own, values)
        return total

    if labels.has_regions:
        half = (np.float32(weights.sum()) - votes([labels.ignore_label] if labels.has_ignore_label else [])) / 2
        agreed = _in_order([votes(region) > half for region in labels.foreground_regions], labels)
    else:
        agreed, most = np.zeros(label_maps.shape[1:], np.int64), np.full(label_maps.shape[1:], -np.inf, np.float32)
        for value in sorted(set(labels.all_labels)):
            own = votes([value])
            agreed[own > most] = value
            most = np.maximum(most, own)
    if labels.has_ignore_label:
        silent = (label_maps == labels.ignore_label) | (weights == 0).reshape(-1, *(1,) * (label_maps.ndim - 1))
        agreed[silent.all(0)] = labels.ignore_label
    return agreed


def staple(label_maps: np.ndarray, weights: np.ndarray, labels: LabelManager) -> np.ndarray:
    """STAPLE's label of every voxel; arguments as in :func:`majority`, weights of 0 leave a rater out.

    STAPLE has no way to say nothing: voxels that some rater ignores are not its, and the majority decides there.
    """
    label_maps = label_maps[weights > 0]
    agreed = majority(label_maps, np.ones(len(label_maps)), labels)
    known = ~(label_maps == labels.ignore_label).any(0)
    votes = label_maps[:, known]  # (R, V)
    if labels.has_regions:
        agreed[known] = _in_order([_staple(np.isin(votes, r)) > 0.5 for r in labels.foreground_regions], labels)
    else:
        values = sorted(set(labels.all_labels))
        agreed[known] = np.array(values)[np.argmax([_staple(votes == value) for value in values], 0)]
    return agreed


def _staple(masks: np.ndarray) -> np.ndarray:
    """Probability of the true mask (V,), from raters' masks (R, V) bool; STAPLE knows no neighbours."""
    if masks.size == 0 or (masks == masks[0]).all():  # STAPLE divides by what nobody drew
        return masks[0].astype(float)
    images = [SimpleITK.GetImageFromArray(mask[None].astype(np.uint8)) for mask in masks]
    return SimpleITK.GetArrayFromImage(SimpleITK.STAPLE(images, 1.0))[0]


def _in_order(masks: Sequence[np.ndarray], labels: LabelManager) -> np.ndarray:
    agreed = np.zeros(masks[0].shape, np.int64)
    for value, mask in zip(labels.regions_class_order, masks, strict=True):  # as nnU-Net exports regions
        agreed[mask] = value
    return agreed
