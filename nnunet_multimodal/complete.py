"""Make a folder of incomplete cases one that nnU-Net reads: placeholders for the modalities that are not there.

For every case of FOLDER (imagesTr, or images to predict) whose files CASE_0000 ... CASE_000M are not all there it
writes the missing ones, an image of a single value on the grid of the others, and a table of what is there:

  FOLDER/CASE_0002.nii.gz     placeholder: recognised by its value, never taken for an image by our preprocessor
  FOLDER/modalities.csv       case, and 1 or 0 for each modality

Everything is checked before anything is written: NaN, grids, cases without any modality, names, and the table of an
earlier run, which must agree with the files. --undo removes placeholders and table again. Then plan with

  nnUNetv2_plan_and_preprocess -d ID -fpe MultimodalFingerprintExtractor -preprocessor_name MultimodalPreprocessor
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from nnunetv2.configuration import default_num_processes
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from tqdm import tqdm

from nnunet_multimodal.errors import UserError
from nnunet_multimodal.images import check_file, check_finite, geometry_difference, list_channels, read_json, unreadable
from nnunet_multimodal.parallel import in_parallel
from nnunet_multimodal.preprocessing import MANIFEST, PLACEHOLDER, channel_names, find_placeholders, read_manifest


@dataclass(frozen=True)
class Folder:
    """A folder of images, and what its dataset says of them.

    Attributes:
        path: the folder.
        channels: names of the modalities, by their channel.
        ending: of the images' files.
        reader: nnU-Net's for them.
    """

    path: Path
    channels: tuple[str, ...]
    ending: str
    reader: type[BaseReaderWriter]

    def file(self, case: str, channel: int) -> Path:
        """Where nnU-Net looks for a case's modality."""
        return self.path / f"{case}_{channel:04d}{self.ending}"

    @property
    def manifest(self) -> Path:
        """The table of what is there."""
        return self.path / MANIFEST


@dataclass(frozen=True)
class CaseReport:
    """What was found in a case's files.

    Attributes:
        present: which modalities it has.
        placeholders: channels whose file is one.
        problems: what is wrong with it, in words.
    """

    present: tuple[bool, ...]
    placeholders: tuple[int, ...]
    problems: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder, and what belongs to it."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="imagesTr, or a folder of images to predict")
    parser.add_argument(
        "--dataset-json",
        type=Path,
        metavar="FILE",
        help="says which modalities there are (default: dataset.json in FOLDER or beside it)",
    )
    parser.add_argument("--undo", action="store_true", help="remove the placeholders and the table")
    parser.add_argument(
        "-np", type=int, default=default_num_processes, help=f"number of processes (default: {default_num_processes})"
    )


def run(args: argparse.Namespace) -> int:
    """Complete a folder, or undo it; returns the exit status.

    Raises:
        UserError: something is wrong with the files; nothing has been written.
    """
    folder, files = open_folder(args.folder, args.dataset_json)
    manifest = read_manifest(folder.manifest, folder.channels) if folder.manifest.is_file() else {}
    cases = [((case, tuple(sorted(channels))),) for case, channels in sorted(files.items())]
    reports = dict(
        zip(sorted(files), in_parallel(partial(inspect_case, folder), cases, args.np, "read images"), strict=True)
    )
    problems = list(_contradictions(folder, manifest, files, reports))
    if not args.undo:
        problems += [problem for report in reports.values() for problem in report.problems]
        problems += _cases_without_images(folder, files)
    if problems:
        raise UserError("\n".join([*problems, f"nothing was {'removed' if args.undo else 'written'}"]))
    if args.undo:
        placeholders = [folder.file(case, c) for case, report in reports.items() for c in report.placeholders]
        for file in tqdm(placeholders, desc="remove placeholders", unit="file"):
            file.unlink()
        folder.manifest.unlink(missing_ok=True)
        print(f"{len(placeholders)} placeholders removed from {folder.path}")
        return 0
    missing = [
        (case, channel)
        for case in sorted(files)
        for channel in range(len(folder.channels))
        if channel not in files[case]
    ]
    write_placeholders(folder, missing, files)
    write_manifest(folder, {case: report.present for case, report in reports.items()})
    print(summary(folder, reports, len(missing)))
    return 0


def open_folder(path: Path, dataset_json: Path | None) -> tuple[Folder, dict[str, set[int]]]:
    """A folder, and the channels of each of its cases.

    Raises:
        UserError: no such folder or dataset.json, no images, or a name that nnU-Net does not expect.
    """
    if not path.is_dir():
        raise UserError(f"{path} is not a folder")
    candidates = [dataset_json] if dataset_json else [path / "dataset.json", path.parent / "dataset.json"]
    found = next((file for file in candidates if file.is_file()), None)
    if found is None:
        raise UserError(f"{' and '.join(map(str, candidates))}: not there; name the dataset's with --dataset-json")
    dataset = read_json(found)
    names = tuple(channel_names(dataset))
    if not names or "file_ending" not in dataset:
        raise UserError(f"{found} has no channel_names or no file_ending; it is not a dataset.json of nnU-Net v2")
    if dataset["file_ending"].lower() == ".bmp":
        raise UserError(f"{found} has images as .bmp, which cannot hold a placeholder (16 bits); convert them to .png")
    files = list_channels(path, dataset["file_ending"], len(names))
    example = next(path / f"{case}_{min(found):04d}{dataset['file_ending']}" for case, found in sorted(files.items()))
    try:
        reader = determine_reader_writer_from_dataset_json(dataset, str(example), verbose=False)
    except RuntimeError as error:
        raise unreadable(example, error) from error
    return Folder(path, names, dataset["file_ending"], reader), files


def inspect_case(folder: Folder, case_and_channels: tuple[str, tuple[int, ...]]) -> CaseReport:
    """Read a case's files: which are images, which placeholders, and what is wrong with them."""
    case, channels = case_and_channels
    present = [False] * len(folder.channels)
    placeholders, problems, first = [], [], None
    for channel in channels:
        file = folder.file(case, channel)
        try:
            check_file(file)
            data, properties = folder.reader().read_images((str(file),))
            check_finite(file, data)
        except UserError as error:
            problems.append(str(error))
            continue
        except Exception as error:  # whatever a damaged file makes a reader raise
            problems.append(str(unreadable(file, error)))
            continue
        if len(data) != 1:
            problems.append(f"{file} has {len(data)} channels in one file; split it, one file for each modality")
            continue
        present[channel] = not find_placeholders(data)[0]
        if not present[channel]:
            placeholders.append(channel)
        if first is None:
            first = (file.name, data.shape, properties)
        else:
            difference = geometry_difference(*first, file.name, data.shape, properties)
            if difference:
                kind = "image" if present[channel] else "placeholder"
                problems.append(
                    f"{file}: {kind} on another grid: {difference}; "
                    + ("resample it" if present[channel] else "delete it and run this again")
                )
    if not any(present) and not problems:
        names = ", ".join(folder.file(case, channel).name for channel in channels)
        problems.append(f"{folder.path / case}: no modality, all files ({names}) are placeholders; remove the case")
    return CaseReport(tuple(present), tuple(placeholders), tuple(problems))


def write_placeholders(folder: Folder, missing: Sequence[tuple[str, int]], files: dict[str, set[int]]) -> None:
    """Write placeholders on the grid of a case's first file, with nnU-Net's own writer; beside, then renamed."""
    with tempfile.TemporaryDirectory(dir=folder.path, prefix=".complete_") as beside:
        for case, channel in tqdm(missing, desc="write placeholders", unit="file"):
            reader = folder.reader()
            data, properties = reader.read_images((str(folder.file(case, min(files[case]))),))
            file = folder.file(case, channel)
            reader.write_seg(np.full(data.shape[1:], PLACEHOLDER, np.uint16), f"{beside}/{file.name}", properties)
            (Path(beside) / file.name).replace(file)


def write_manifest(folder: Folder, present: dict[str, Sequence[bool]]) -> None:
    """Write the table; beside, then renamed."""
    beside = folder.manifest.with_name(f".{MANIFEST}.part")
    with beside.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(["case", *folder.channels])
        writer.writerows([case, *map(int, there)] for case, there in sorted(present.items()))
    beside.replace(folder.manifest)


def summary(folder: Folder, reports: dict[str, CaseReport], written: int) -> str:
    """How many cases have what, in words."""
    counts = np.sum([report.present for report in reports.values()], 0)
    complete = sum(all(report.present) for report in reports.values())
    each = ", ".join(f"{name} {count}" for name, count in zip(folder.channels, counts, strict=True))
    return (
        f"{len(reports)} cases, {complete} complete; cases with {each}\n"
        f"{written} placeholders written, all in {folder.manifest}\n"
        "Train on incomplete cases with this package's trainers; nnU-Net's own take NaN for numbers."
    )


def _contradictions(
    folder: Folder, manifest: dict[str, list[bool]], files: dict[str, set[int]], reports: dict[str, CaseReport]
) -> Iterator[str]:
    """Where the table of an earlier run and the files disagree."""
    for case, expected in manifest.items():
        if case not in files:
            yield f"{folder.manifest} has {case}, and there is no file of it; restore it or take the line out"
            continue
        for channel, (said, found) in enumerate(zip(expected, reports[case].present, strict=True)):
            file = folder.file(case, channel)
            if said and not found:
                what = "is a placeholder" if channel in files[case] else "is not there"
                yield f"{file} {what}, and {folder.manifest} says it is there; restore it or write 0"
            elif found and not said:
                yield f"{file} is an image, and {folder.manifest} says there is none; remove it or write 1"


def _cases_without_images(folder: Folder, files: dict[str, set[int]]) -> Iterator[str]:
    """Training cases that have a label map and nothing else."""
    labels = folder.path.parent / "labelsTr"
    if folder.path.name == "imagesTr" and labels.is_dir():
        for file in sorted(labels.iterdir()):
            if file.name.endswith(folder.ending) and file.name.removesuffix(folder.ending) not in files:
                yield f"{file}: its case has no modality in {folder.path}; add one or remove the label map"
