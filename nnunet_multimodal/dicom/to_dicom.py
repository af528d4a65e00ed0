"""``nnunet-multimodal dicom export``: predictions on the slices of the series that was imported.

CASE_seg.dcm is the label map, CASE_entropy.dcm, … the uncertainty maps. Voxels go back to the slices that they came
from: CASE.json of the import names them in their order, all of them must be in the folder of series, and the prediction
must lie on exactly their grid.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
from pydicom import Dataset
from tqdm import tqdm

from nnunet_multimodal.dicom.files import Series, find_series, read_headers
from nnunet_multimodal.dicom.objects import (
    Algorithm,
    Segment,
    complete_headers,
    parametric_map,
    read_segments,
    segmentation,
)
from nnunet_multimodal.dicom.stack import Stack, stack_slices
from nnunet_multimodal.errors import UserError, refuse
from nnunet_multimodal.files import written_beside
from nnunet_multimodal.images import check_file, check_labels, geometry_difference, read_json, unreadable
from nnunet_multimodal.inference.maps import MAPS

SEG = "seg"


@dataclass(frozen=True)
class ExportedCase:
    """A case, the volume that its prediction lies on, and what is written: kind of object -> file of the prediction."""

    name: str
    stack: Stack
    files: Mapping[str, Path]


def run(args: argparse.Namespace) -> int:
    """Export; returns the exit status.

    Raises:
        UserError: a case was not imported, its series is not whole, or its prediction lies on another grid.
    """
    dataset = read_json(args.predictions / "dataset.json", "labels", "file_ending")
    segments = read_segments(dataset, args.codes)
    algorithm = Algorithm(args.tr, _parameters(args))
    files = find_predictions(args.predictions, dataset["file_ending"], args.maps)
    there = [out for case, kinds in files.items() for kind in kinds if (out := _output(args.o, case, kind)).exists()]
    if there and not args.overwrite:
        raise UserError(f"{there[0]} is there; --overwrite replaces it, or give another folder to -o")
    series = {one.uid: one for one in find_series(args.series).series}
    cases, problems = [], []
    for name, kinds in files.items():
        try:
            case = ExportedCase(name, find_stack(args.i / f"{name}.json", series, args.channel), kinds)
            for kind, file in kinds.items():
                read_prediction(file, case.stack, segments if kind == SEG else None)
            cases.append(case)
        except UserError as error:
            problems.append(str(error))
    refuse(problems)
    args.o.mkdir(parents=True, exist_ok=True)
    for case in tqdm(cases, desc="export", unit="case"):
        write_objects(case, segments, algorithm, args.o)
    generic = [segment.name for segment in segments if segment.is_generic]
    if generic:
        print(f"{', '.join(generic)}: coded as tissue, which says nothing; --codes says what labels are")
    print(f"{len(cases)} cases in {args.o}. Research only: not for diagnosis.")
    return 0


def find_predictions(folder: Path, ending: str, maps: Sequence[str] | None) -> dict[str, dict[str, Path]]:
    """The files of each case: its label map, and its uncertainty maps (``maps``; all that there are if None).

    Raises:
        UserError: no label map, or a map that is asked for is not there.
    """
    cases = sorted(f.name.removesuffix(ending) for f in folder.glob(f"*{ending}") if not f.name.startswith("."))
    if not cases:
        raise UserError(f"{folder} has no label maps ending in {ending}; name the folder of the predictions")
    found: dict[str, dict[str, Path]] = {}
    for case in cases:
        found[case] = {SEG: folder / f"{case}{ending}"}
        for name in MAPS if maps is None else maps:
            file = folder / "uncertainty" / f"{case}_{name}.nii.gz"  # whatever the label maps are
            if file.is_file():
                found[case][name] = file
            elif maps is not None:
                raise UserError(f"{file} is not there; predict with --maps {name}, or leave it out")
    return found


def find_stack(record: Path, series: Mapping[str, Series], channel: str | None) -> Stack:
    """The volume that a case's prediction lies on.

    Args:
        record: of the import.
        series: by their UIDs.
        channel: whose series is meant; the first whose voxels were taken as they are if None.

    Raises:
        UserError: there is no record, no such channel, its series is not there, or not the slices that were imported.
    """
    if not record.is_file():
        raise UserError(f"{record} is not there; -i is the folder that nnunet-multimodal dicom import wrote")
    channels: list[Mapping[str, Any]] = read_json(record, "channels")["channels"]
    fitting = [c for c in channels if c["on_source_grid"] and channel in (None, c["name"])]
    if not fitting:
        possible = ", ".join(c["name"] for c in channels if c["on_source_grid"])
        raise UserError(f"{record}: --channel {channel} is not there or was resampled; its grid is that of {possible}")
    uid = fitting[0]["SeriesInstanceUID"]
    if uid not in series:
        raise UserError(f"{record}: {fitting[0]['name']} is series {uid}, which is not in the folder of --series")
    stack = stack_slices(series[uid])
    if [part.uid for part in stack.slices] != fitting[0]["SOPInstanceUIDs"]:
        raise UserError(f"{record}: the files of series {uid} are not those that were imported; restore them")
    if not all(part.frame_of_reference for part in stack.slices):
        raise UserError(f"{stack.series} has no FrameOfReferenceUID, without which DICOM has no segmentation of it")
    return stack


def read_prediction(file: Path, stack: Stack, segments: Sequence[Segment] | None) -> np.ndarray:
    """A label map (or, without ``segments``, an uncertainty map) as an array (slices, rows, columns).

    Raises:
        UserError: it cannot be read, lies on another grid than the series, or has labels that are not declared.
    """
    check_file(file)
    try:
        image = SimpleITK.ReadImage(str(file))
    except RuntimeError as error:
        raise unreadable(file, error) from error
    geometry = {
        "spacing": image.GetSpacing(),
        "sitk_stuff": {"origin": image.GetOrigin(), "direction": image.GetDirection()},
    }
    difference = geometry_difference("its series", stack.size, stack.geometry, file.name, image.GetSize(), geometry)
    if difference:
        raise UserError(
            f"{file}: not on the grid of {stack.series}: {difference} (x, y, z); predict the imported images"
        )
    array = SimpleITK.GetArrayFromImage(image)
    if segments is None:
        return array
    try:
        check_labels(array, [value for segment in segments for value in segment.values])
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    return np.rint(array).astype(np.uint16)


def write_objects(case: ExportedCase, segments: Sequence[Segment], algorithm: Algorithm, folder: Path) -> None:
    """Write a case's objects."""
    source: list[Dataset] = read_headers(case.stack.slices)
    complete_headers(source, case.stack.spacing_mm[2])
    for kind, file in case.files.items():
        array = read_prediction(file, case.stack, segments if kind == SEG else None)
        if kind == SEG:
            written: Dataset = segmentation(source, array, segments, algorithm)
        else:
            written = parametric_map(source, array, kind, algorithm)
        with written_beside(_output(folder, case.name, kind)) as beside:
            written.save_as(beside)


def _output(folder: Path, case: str, kind: str) -> Path:
    return folder / f"{case}_{kind}.dcm"


def _parameters(args: argparse.Namespace) -> dict[str, str]:
    """What nnU-Net's files beside the predictions tell of the model."""
    file = args.predictions / "plans.json"
    plans = read_json(file) if file.is_file() else {}
    told = {"dataset": plans.get("dataset_name"), "plans": plans.get("plans_name"), "configuration": args.c}
    return {key: str(value) for key, value in told.items() if value}
