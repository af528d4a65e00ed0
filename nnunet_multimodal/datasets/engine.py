"""From a source's cases to nnU-Net's raw format: verify everything, then write into a folder beside, then rename."""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import SimpleITK
from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from tqdm import tqdm

from nnunet_multimodal.complete import open_folder, write_manifest, write_placeholders
from nnunet_multimodal.datasets.base import TEST, Source, SourceCase, group_folds
from nnunet_multimodal.datasets.prepare import COMPRESSED, Loaded, load, on_grid, scaling, with_labels
from nnunet_multimodal.datasets.report import CaseReport, FileReport, shorten, summarise, write_table
from nnunet_multimodal.errors import UserError, refuse
from nnunet_multimodal.files import write_json
from nnunet_multimodal.images import read_json
from nnunet_multimodal.parallel import alone, exit_on_signals, in_parallel
from nnunet_multimodal.raters.consensus import MAJORITY, Work, write_consensus
from nnunet_multimodal.raters.files import FOLDER as RATERS
from nnunet_multimodal.raters.files import SEPARATOR, find_raters

KEEP, DROP, ERROR = "keep", "drop", "error"
LABELS_GRID = "labels"


@dataclass(frozen=True)
class Conversion:
    """What is to be done.

    Attributes:
        source: what there is.
        link: take files over as links where they need no change.
        grid: whose grid all images of a case are put on: ``LABELS_GRID`` or a channel; None resamples nothing.
        processes: how many may run.
    """

    source: Source
    link: bool = False
    grid: str | None = None
    processes: int = 1


@contextmanager
def half_written(folder: Path) -> Iterator[Path]:
    """A folder beside another one, removed however this ends; one that a kill has left is removed before it begins.

    Raises:
        UserError: another process has it.
    """
    beside = folder.with_name(f".{folder.name}.part")
    with exit_on_signals(), alone(folder.with_name(f".{folder.name}.lock"), f"another conversion to {folder.name}"):
        shutil.rmtree(beside, ignore_errors=True)
        try:
            yield beside
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def select_cases(source: Source, incomplete: str) -> tuple[list[SourceCase], dict[str, str]]:
    """The cases to convert, and why others are left out, by name.

    Args:
        source: what there is.
        incomplete: what becomes of cases without a modality: ``KEEP``, ``DROP`` or ``ERROR``.

    Raises:
        UserError: nothing to train on, a modality that no case has, or what lacks something.
    """
    kept, dropped, problems = [], {}, []
    for case in sorted(source.cases, key=lambda case: case.name):
        lacks = [channel for channel in source.channels if channel not in case.images]
        none = [] if case.images else ["any image"]
        unlabelled = ["a label map"] if case.split != TEST and not case.label_maps else []
        fatal, missing = none + unlabelled, none or lacks
        if not fatal and (not lacks or incomplete == KEEP):
            kept.append(case)
        elif incomplete == DROP:
            dropped[case.name] = "; ".join([f"lacks {', '.join([*missing, *unlabelled])}", *case.remarks])
        elif fatal:
            problems.append(f"{case.name} lacks {', '.join(fatal)}; --incomplete drop leaves such cases out")
        else:
            problems.append(f"{case.name} lacks {', '.join(lacks)}; --incomplete keep or drop says what becomes of it")
    refuse(problems)
    training = [case for case in kept if case.split != TEST]
    if not training:
        raise UserError(f"no training case is left of {len(source.cases)}: {shorten(dropped) or 'all are test cases'}")
    for channel in source.channels:
        if not any(channel in case.images for case in training):
            raise UserError(f"no training case has {channel}; convert it without this channel, or look for its files")
    return kept, dropped


def convert(conversion: Conversion, folder: Path, incomplete: str) -> str:
    """Write a data set into a folder that is not there yet; returns what was done, in words.

    Raises:
        UserError: something is wrong with the source; nothing is left of the folder's content that may be used.
    """
    source = conversion.source
    cases, dropped = select_cases(source, incomplete)
    # processes get it with every case
    conversion = replace(conversion, source=replace(source, cases=(), ignored=()))
    work = [(case,) for case in cases]
    reports = list(in_parallel(partial(inspect_case, conversion), work, conversion.processes, "check"))
    refuse([problem for report in reports for problem in report.problems])
    folds = group_folds(cases)
    for name in {str(Path(file.target).parent) for report in reports for file in report.files}:
        (folder / name).mkdir(parents=True, exist_ok=True)
    items = list(zip(cases, reports, strict=True))
    done = list(in_parallel(partial(write_case, conversion, folder), items, conversion.processes, "write"))
    write_description(source, folder, sum(case.split != TEST for case in cases))
    if folds:
        write_json(folder / "splits_final.json", folds)
    for suffix in sorted({case.suffix for case in cases}):
        of_suffix = [case for case in cases if case.suffix == suffix]
        write_majority(folder, suffix, [case.name for case in of_suffix if case.raters and not case.label])
        complete_folder(source, folder / f"images{suffix}", of_suffix)
        _count(source, folder, suffix, of_suffix)
    write_table(folder, source, cases, reports, done, dropped)
    return summarise(source, cases, reports, done, dropped, folds)


def inspect_case(conversion: Conversion, case: SourceCase) -> CaseReport:
    """Read all files of a case; say what has to be done to them, and what is wrong."""
    source, problems, files, remarks = conversion.source, [], [], list(case.remarks)
    labels: set[int] = set()
    try:
        reference = find_reference(conversion, case)
    except UserError as error:
        return CaseReport(problems=(f"{case.name}: {error}",))
    for target, file, is_label in targets(source, case):
        try:
            loaded, present = prepare(conversion, case, file, reference, is_label)
        except UserError as error:
            problems.append(f"{case.name}: {error}")
            continue
        labels.update(present)
        if not is_label:
            array = SimpleITK.GetArrayViewFromImage(loaded.image)
            remarks += [text] if (text := scaling(file)) else []
            remarks += [f"{file.name} is 0 everywhere, which counts as absent"] if not array.any() else []
        files.append(FileReport(target, file, _changes(source, file, loaded.changes)))
    return CaseReport(tuple(files), frozenset(labels), tuple(remarks), tuple(problems))


def targets(source: Source, case: SourceCase) -> Iterator[tuple[str, Path, bool]]:
    """Every file of a case: where it goes, where it lies, and whether it is a label map."""
    for channel, name in enumerate(source.channels):
        if name in case.images:
            yield f"images{case.suffix}/{case.name}_{channel:04d}{source.ending}", case.images[name], False
    for rater, file in case.label_maps.items():
        folder = RATERS.replace("Tr", case.suffix) if rater else f"labels{case.suffix}"
        yield f"{folder}/{case.name}{SEPARATOR + rater if rater else ''}{source.ending}", file, True


def find_reference(conversion: Conversion, case: SourceCase) -> Loaded:
    """The image or label map on whose grid the case's others must lie.

    Raises:
        UserError: it has none, or it cannot be read.
    """
    files = {channel: case.images[channel] for channel in conversion.source.channels if channel in case.images}
    label_maps = list(case.label_maps.values())
    if conversion.grid == LABELS_GRID and label_maps:
        return load(label_maps[0])
    if conversion.grid not in (None, LABELS_GRID):
        if conversion.grid not in files:
            raise UserError(
                f"has no {conversion.grid}, whose grid --resample asks for; plain --resample takes the label map's "
                "grid, and --incomplete drop leaves the case out"
            )
        return load(files[conversion.grid])
    return load(next(iter(files.values())))


def prepare(
    conversion: Conversion, case: SourceCase, file: Path, reference: Loaded, is_label: bool
) -> tuple[Loaded, Sequence[int]]:
    """A file as it is to be written, and the labels that it has.

    Raises:
        UserError: it is damaged, lies on another grid, or has labels that are not expected.
    """
    loaded = on_grid(load(file), reference, conversion.grid is not None, is_label)
    if not is_label:
        return loaded, ()
    values = case.values or {label: label for label in conversion.source.declared}
    try:
        loaded, present = with_labels(loaded, values, conversion.source.irregular)
    except UserError as error:
        raise UserError("; ".join(filter(None, (str(error), conversion.source.advice)))) from error
    return loaded, present.tolist()


def write_case(conversion: Conversion, folder: Path, case: SourceCase, report: CaseReport) -> list[str]:
    """Write a case's files; returns how each came there, in words."""
    reference, done = None, []
    for file, (_, _, is_label) in zip(report.files, targets(conversion.source, case), strict=True):
        output = folder / file.target
        if not file.changes:
            done.append(take(file.file, output, conversion))
        elif file.changes == (COMPRESSED,):
            with file.file.open("rb") as plain, gzip.open(output, "wb", compresslevel=6) as packed:
                shutil.copyfileobj(plain, packed)
            done.append(COMPRESSED)
        else:
            reference = reference or find_reference(conversion, case)
            image = prepare(conversion, case, file.file, reference, is_label)[0].image
            if image.GetPixelID() == SimpleITK.sitkFloat64:
                image = SimpleITK.Cast(image, SimpleITK.sitkFloat32)
            SimpleITK.WriteImage(image, str(output), useCompression=True)
            done.append("written")
    return done


def take(file: Path, output: Path, conversion: Conversion) -> str:
    """Copy or link a file; returns which of them was done."""
    if conversion.source.is_temporary:
        file.replace(output)
        return "moved"
    if not conversion.link:
        shutil.copyfile(file, output)
        return "copied"
    try:
        os.link(file.resolve(), output)
        return "hard link"
    except OSError:  # on another file system, or one without hard links
        try:
            output.symlink_to(file.resolve())
        except OSError as error:
            raise UserError(f"--link: {output} cannot be a link to {file} ({error}); leave out --link") from error
        return "symbolic link"


def write_description(source: Source, folder: Path, num_training: int) -> None:
    """dataset.json, by nnU-Net's own function."""
    generate_dataset_json(
        str(folder),
        channel_names={str(number): name for number, name in enumerate(source.channels)},
        labels={name: value if isinstance(value, int) else list(value) for name, value in source.labels.items()},
        num_training_cases=num_training,
        file_ending=source.ending,
        regions_class_order=source.regions_class_order,
        license="see the source",
        converted_by="nnunet-multimodal convert",
        **source.more,
    )


def write_majority(folder: Path, suffix: str, cases: Sequence[str]) -> None:
    """Label maps of cases that have raters alone, by majority vote, as ``nnunet-multimodal consensus`` makes them."""
    if not cases:
        return
    description = read_json(folder / "dataset.json")
    ending, labels = (
        description["file_ending"],
        LabelManager(description["labels"], description.get("regions_class_order")),
    )
    example = str(next((folder / f"images{suffix}").glob(f"*{ending}")))
    reader = determine_reader_writer_from_dataset_json(description, example, verbose=False)
    work = Work(reader, labels, MAJORITY, frozenset(labels.all_labels), ending)
    raters = find_raters(folder / RATERS.replace("Tr", suffix), ending)
    (folder / f"labels{suffix}").mkdir(exist_ok=True)
    for case in tqdm(cases, desc="majority", unit="case"):
        image = next((folder / f"images{suffix}").glob(f"{case}_[0-9][0-9][0-9][0-9]{ending}"))
        write_consensus(work, image, raters[case], folder / f"labels{suffix}" / f"{case}{ending}")


def complete_folder(source: Source, images: Path, cases: Sequence[SourceCase]) -> None:
    """Placeholders and the table of what is there, where cases lack modalities."""
    present: dict[str, Sequence[bool]] = {
        case.name: tuple(channel in case.images for channel in source.channels) for case in cases
    }
    missing = [(name, c) for name, there in present.items() for c, has in enumerate(there) if not has]
    if missing:
        folder, files = open_folder(images, None)
        write_placeholders(folder, missing, files)
        write_manifest(folder, present)


def _changes(source: Source, file: Path, changes: tuple[str, ...]) -> tuple[str, ...]:
    """What must be done to a file before it can be nnU-Net's."""
    if file.name.endswith(source.ending):
        return changes
    if file.name.lower().endswith(".nii") and source.ending == ".nii.gz":
        return changes or (COMPRESSED,)
    return changes if file.name.lower().endswith(source.ending) else (*changes, f"stored as {source.ending}")


def _count(source: Source, folder: Path, suffix: str, cases: Sequence[SourceCase]) -> None:
    """Raise if there are not as many files as there must be: never, unless somebody else writes there too."""
    expected = {f"images{suffix}": len(cases) * len(source.channels)}
    expected[f"labels{suffix}"] = sum(bool(case.label_maps) for case in cases)
    for name, number in expected.items():
        found = len(list((folder / name).glob(f"*{source.ending}")))
        if found != number:
            raise RuntimeError(f"{folder / name} has {found} files and must have {number}")
