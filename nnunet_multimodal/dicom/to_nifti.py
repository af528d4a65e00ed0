"""``nnunet-multimodal dicom import``: series to images in nnU-Net's names, and a record of what they come from."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import SimpleITK
from tqdm import tqdm

from nnunet_multimodal import __version__
from nnunet_multimodal.datasets.prepare import Loaded, on_grid
from nnunet_multimodal.dicom.files import Series, find_series, read_headers
from nnunet_multimodal.dicom.rules import Rule, choose, group_cases, listing, parse_rules, text
from nnunet_multimodal.dicom.stack import Stack, read_stack, stack_slices
from nnunet_multimodal.dicom.suv import Uptake, uptake
from nnunet_multimodal.errors import UserError, refuse
from nnunet_multimodal.files import write_json
from nnunet_multimodal.images import geometry_difference

ENDING = ".nii.gz"
PET = "PT"


@dataclass(frozen=True)
class Channel:
    """A modality of a case.

    Attributes:
        number: of nnU-Net's channel.
        name: of the modality.
        stack: its volume.
        uptake: how its values become SUV; None if they stay as they are.
    """

    number: int
    name: str
    stack: Stack
    uptake: Uptake | None


@dataclass(frozen=True)
class ImportedCase:
    """A case, and the modalities that it has."""

    name: str
    channels: tuple[Channel, ...]

    def file(self, channel: Channel) -> str:
        """nnU-Net's name of an image."""
        return f"{self.name}_{channel.number:04d}{ENDING}"


def run(args: argparse.Namespace) -> int:
    """Import; returns the exit status.

    Raises:
        UserError: something is wrong with the series or the flags. Headers are checked before anything is written; a
            file whose pixels cannot be read stops the import at its case, and the cases before it are whole.
    """
    rules = parse_rules(args.channels)
    names = [rule.channel for rule in rules]
    if args.resample is not None and args.resample not in names:
        raise UserError(f"--resample {args.resample}: give one of {', '.join(names)}")
    found = find_series(args.folder)
    cases, remarks, problems = [], [], []
    for name, series in tqdm(group_cases(found.series, args.case).items(), desc="check", unit="case"):
        try:
            case, remark = plan_case(name, series, rules, args)
        except UserError as error:
            problems.append(str(error))
            continue
        cases += [case] if case else []
        remarks += [remark] if remark else []
        if case and not args.overwrite and (there := existing(args.o, name)):
            problems.append(f"{there[0]} is there; --overwrite replaces it, or give another folder to -o")
    refuse(problems)
    if not cases:
        raise UserError("\n".join(["no case is left:", *remarks]))
    if args.suv and not any(channel.uptake for case in cases for channel in case.channels):
        raise UserError("--suv: no chosen series is PET (Modality PT); leave it out, or choose another one")
    args.o.mkdir(parents=True, exist_ok=True)
    for case in tqdm(cases, desc="write", unit="case"):
        write_case(case, args.resample, args.o)
    print("\n".join([*remarks, summarise(cases, names, len(found.others))]))
    return 0


def plan_case(
    name: str, series: list[Series], rules: tuple[Rule, ...], args: argparse.Namespace
) -> tuple[ImportedCase | None, str]:
    """What becomes of a case (None: it is left out), and what there is to say of it.

    Raises:
        UserError: its series are ambiguous, missing, no volumes, on different grids, or lack what SUV needs.
    """
    chosen, missing = choose(name, series, rules)
    remark = ""
    if missing:
        wanted = ", ".join(f"{rule.channel} ({rule.written})" for rule in rules if rule.channel in missing)
        remark = f"{name}: no series is {wanted}; there are\n{listing(series)}"
        if args.incomplete == "error":
            raise UserError(f"{remark}\ncorrect the condition, or give --incomplete keep or drop")
        if args.incomplete == "drop" or not chosen:
            return None, f"left out: {remark}"
    channels = []
    try:
        for number, rule in enumerate(rules):
            if rule.channel in chosen:
                stack = stack_slices(chosen[rule.channel])
                channels.append(Channel(number, rule.channel, stack, _uptake(stack) if args.suv else None))
        case = ImportedCase(name, tuple(channels))
        check_places(case, args.resample, args.any_frame_of_reference)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    return case, remark


def _uptake(stack: Stack) -> Uptake | None:
    if text(stack.series.header, "Modality") != PET:
        return None
    try:
        return uptake(read_headers(stack.slices))
    except UserError as error:
        raise UserError(f"{stack.series}: {error}") from error


def check_places(case: ImportedCase, resample: str | None, any_frame: bool) -> None:
    """Refuse images of a case that are not in one place.

    Raises:
        UserError: other frames of reference, other grids without ``resample``, or no image of the channel it names.
    """
    first = case.channels[0]
    for channel in case.channels:
        frames = [{part.frame_of_reference for part in c.stack.slices} for c in (first, channel)]
        if frames[0] != frames[1] and not any_frame:
            raise UserError(
                f"{first.name} and {channel.name} have different FrameOfReferenceUIDs: nobody knows how they lie to "
                "each other; register them, or give --any-frame-of-reference if they are"
            )
        difference = geometry_difference(
            first.name, first.stack.size, first.stack.geometry, channel.name, channel.stack.size, channel.stack.geometry
        )
        if difference and resample is None:
            raise UserError(f"{difference} (x, y, z); --resample NAME puts all on one channel's grid")
    if resample is not None and resample not in [channel.name for channel in case.channels]:
        raise UserError(f"it has no {resample}, whose grid --resample asks for")


def write_case(case: ImportedCase, resample: str | None, folder: Path) -> None:
    """Write a case's images, whole, and then its record.

    Raises:
        UserError: pixels cannot be read, or an image does not overlap the grid that it is to be on.
    """
    grid = next((channel for channel in case.channels if channel.name == resample), case.channels[0])
    reference = Loaded(_source(grid), read_stack(grid.stack))
    with tempfile.TemporaryDirectory(dir=folder, prefix=".import_") as beside:
        records = []
        for channel in case.channels:
            image = reference if channel is grid else Loaded(_source(channel), read_stack(channel.stack))
            image = on_grid(image, reference, resample is not None, is_label=False)
            values = image.image
            if channel.uptake is not None:
                values = SimpleITK.Cast(values, SimpleITK.sitkFloat32) * channel.uptake.factor
            SimpleITK.WriteImage(values, f"{beside}/{case.file(channel)}", useCompression=True)
            records.append(_record(case, channel, image.changes))
        for stale in existing(folder, case.name):
            stale.unlink()
        for file in sorted(Path(beside).iterdir()):
            file.replace(folder / file.name)
    write_json(
        folder / f"{case.name}.json",
        {"made_by": f"nnunet-multimodal dicom import {__version__}", "case": case.name, "channels": records},
    )


def _source(channel: Channel) -> Path:
    return channel.stack.slices[0].file.parent


def _record(case: ImportedCase, channel: Channel, changes: tuple[str, ...]) -> Mapping[str, Any]:
    """What an image comes from. ``on_source_grid``: its voxels are those of the series."""
    series = channel.stack.series
    keys = ("Modality", "SeriesDescription", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID")
    lossy = text(series.header, "LossyImageCompression") == "01"
    return {
        "file": case.file(channel),
        "name": channel.name,
        **{key: text(series.header, key) for key in keys},
        "on_source_grid": not any(change.startswith("resampled") for change in changes),
        "units": "SUVbw, g/ml" if channel.uptake else text(series.header, "Units") or "as stored",
        **({"suv": channel.uptake.record()} if channel.uptake else {}),
        "remarks": [*series.remarks, *changes, *(["lossy compression"] if lossy else [])],
        "SOPInstanceUIDs": [part.uid for part in channel.stack.slices],
    }


def existing(folder: Path, case: str) -> list[Path]:
    """Files of a case that are there."""
    images = sorted(folder.glob(f"{case}_[0-9][0-9][0-9][0-9]{ENDING}"))
    record = folder / f"{case}.json"
    return [*images, *([record] if record.exists() else [])]


def summarise(cases: list[ImportedCase], names: list[str], others: int) -> str:
    """What was done, in words."""
    channels = [channel for case in cases for channel in case.channels]
    each = ", ".join(f"{name} {sum(channel.name == name for channel in channels)}" for name in names)
    lines = [f"{len(cases)} cases with {each}; {others} files are not DICOM images"]
    lines += sorted(
        {f"{case.name}: {remark}" for case in cases for c in case.channels for remark in c.stack.series.remarks}
    )
    if any(text(c.stack.series.header, "Units") == "BQML" and c.uptake is None for c in channels):
        lines.append("PET is in Bq/ml, which depends on dose and weight; --suv writes standardised uptake values")
    return "\n".join(lines)
