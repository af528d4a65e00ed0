"""From files to measures: which cases there are, reading them with nnU-Net's reader, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_multimodal.errors import UserError, refuse
from nnunet_multimodal.images import check_labels, geometry_difference, read_json, read_seg
from nnunet_multimodal.metrics.case import CaseArrays, CaseMeasures, measure_case
from nnunet_multimodal.metrics.distribution import Label
from nnunet_multimodal.parallel import in_parallel
from nnunet_multimodal.raters.consensus import majority
from nnunet_multimodal.raters.files import SEPARATOR, find_raters

CASE, SAMPLES, ECE, RATERS = "case", "samples", "ECE", "raters"  # what may be left out


@dataclass(frozen=True)
class Settings:
    """What every case is measured with.

    Attributes:
        labels: foreground labels or regions, as nnU-Net evaluates them.
        names: theirs, in ``dataset.json``.
        channels: theirs, in files of probabilities, which have `num_channels`.
        ignore_label: voxels that have it in the reference do not count.
        ending: of the files.
        reader: nnU-Net's, as the plans name it.
        tolerance_mm: of the normalised surface distance.
        declared: the labels of ``dataset.json``.
        regions_class_order: of ``dataset.json``.
        first: numbers of samples that are scored as well, from the first one on.
    """

    labels: tuple[Label, ...]
    names: tuple[str, ...]
    channels: tuple[int, ...]
    num_channels: int
    ignore_label: int | None
    ending: str
    reader: type[BaseReaderWriter]
    tolerance_mm: float
    declared: Mapping[str, Any]
    regions_class_order: tuple[int, ...] | None
    first: tuple[int, ...]


@dataclass(frozen=True)
class CaseFiles:
    """Where a case lies. Without raters the reference is the only one; `quantities` may hold the samples' weights.

    Without a reference it is the raters' majority.
    """

    case: str
    reference: Path | None
    prediction: Path
    samples: tuple[Path, ...] = ()
    raters: tuple[Path, ...] = ()
    rater_weights: tuple[float, ...] = ()
    quantities: Path | None = None
    probabilities: Path | None = None


@dataclass(frozen=True)
class LeftOut:
    """A case that is in no mean (`what` is "case") or not in those that `what` names."""

    case: str
    what: str
    why: str
    detail: str = ""


@dataclass(frozen=True, eq=False)
class CaseResult:
    """The measures of a case, None where it cannot be measured, and what they lack."""

    measures: CaseMeasures | None
    left_out: list[LeftOut]


class GeometryError(ValueError):
    """Two images are not on one grid."""


@dataclass(frozen=True, eq=False)
class LabelMap:
    """A file's content: array (Z, Y, X) with Z 1 for 2D images, and what nnU-Net's reader says of its geometry."""

    file: Path
    array: np.ndarray
    properties: Mapping[str, Any]


def read_settings(dataset_json: Path, plans_json: Path, tolerance_mm: float, first: Sequence[int] = ()) -> Settings:
    """What the dataset and its plans say about labels and files."""
    for file, flag in ((dataset_json, "-djfile"), (plans_json, "-pfile")):
        if not file.is_file():
            raise SystemExit(f"{file} is not there; nnUNetv2_predict writes it, or name another one with {flag}")
    dataset = read_json(dataset_json, "labels", "file_ending")
    plans = PlansManager(read_json(plans_json, "image_reader_writer"))
    manager = plans.get_label_manager(dataset)
    found = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    names = {_values(value): name for name, value in dataset["labels"].items()}
    return Settings(
        labels=tuple(_values(label) if isinstance(label, tuple) else int(label) for label in found),
        names=tuple(names[_values(label)] for label in found),
        channels=tuple(range(len(found)) if manager.has_regions else map(manager.all_labels.index, found)),
        num_channels=manager.num_segmentation_heads,
        ignore_label=manager.ignore_label,
        ending=dataset["file_ending"],
        reader=plans.image_reader_writer_class,
        tolerance_mm=tolerance_mm,
        declared=dataset["labels"],
        regions_class_order=tuple(dataset["regions_class_order"]) if manager.has_regions else None,
        first=tuple(sorted(set(first))),
    )


def find_cases(
    references: Path, predictions: Path, raters: Path | None, ending: str
) -> tuple[list[CaseFiles], list[LeftOut]]:
    """Cases that both folders have, and what is not there; `references` may hold raters alone."""
    for folder in (references, predictions, raters):
        if folder is not None and not folder.is_dir():
            raise SystemExit(f"{folder} is not a folder")
    there: dict[str, Path | None] = {**files_by_case(references, ending)}
    predicted = files_by_case(predictions, ending)
    samples = group_by_case(files_by_case(predictions / "samples", ending))
    alone = _are_raters(there, predicted)
    if alone:
        if raters is not None and raters.resolve() != references.resolve():
            raise UserError(f"{references} has no reference but raters, and --raters names others: {raters}; leave one")
        raters = references
    drawn = {} if raters is None else find_raters(raters, ending)
    there = dict.fromkeys(drawn) if alone else there
    left_out = [LeftOut(case, CASE, "no prediction") for case in there if case not in predicted]
    left_out += [LeftOut(case, CASE, "no reference") for case in predicted if case not in there]
    cases = []
    for case in sorted(there.keys() & predicted.keys()):
        quantities, npz = (_if_there(predictions / f"{case}.{suffix}") for suffix in ("json", "npz"))
        counted = [rater for rater in drawn.get(case, ()) if rater.weight > 0]
        files = CaseFiles(case, there[case], predicted[case], samples.get(case, ()), tuple(r.file for r in counted))
        weights = tuple(rater.weight for rater in counted)
        cases.append(replace(files, rater_weights=weights, quantities=quantities, probabilities=npz))
    without_samples = [files.case for files in cases if not files.samples]
    without_npz = [files.case for files in cases if not files.probabilities]
    for what, why, lacking in ((SAMPLES, "no samples", without_samples), (ECE, "no probabilities", without_npz)):
        if len(lacking) < len(cases):  # else nobody expects any
            left_out += [LeftOut(case, what, why) for case in lacking]
    if raters is not None:
        if len(without_samples) == len(cases):  # a deterministic model: one sample
            cases = [replace(files, samples=(files.prediction,), quantities=None) for files in cases]
        left_out += [LeftOut(files.case, f"{SAMPLES}, {ECE}", "no raters") for files in cases if not files.raters]
        cases = [files if files.raters else replace(files, samples=(), probabilities=None) for files in cases]
    return cases, left_out


def refuse_too_few_samples(cases: Sequence[CaseFiles], settings: Settings, predictions: Path) -> None:
    """Cases that have samples must have as many as the settings ask for, and one of them must have any.

    Raises:
        UserError: see above.
    """
    if not settings.first:
        return
    counts = {c.case: len(c.samples) for c in cases if c.samples and c.samples != (c.prediction,)}
    most, folder = settings.first[-1], predictions / "samples"
    if not counts:
        raise UserError(f"--samples {most}: {folder} has no samples; predict with --samples {most} --save-samples")
    refuse([
        f"--samples {most}: {case} has {count} in {folder}; predict with --samples {most}, or ask for fewer"
        for case, count in counts.items()
        if count < most
    ])  # fmt: skip


def evaluate_case(files: CaseFiles, settings: Settings) -> CaseResult:
    """Read and measure one case.

    Raises:
        ValueError: a file has channels, or weights or probabilities do not fit.
    """
    left_out = []
    try:
        reference, raters = _read_reference(files, settings)
        (prediction,) = _read_like(reference, [files.prediction], settings)
    except GeometryError as error:
        return CaseResult(None, [LeftOut(files.case, CASE, "geometry differs", str(error))])
    case = CaseArrays(prediction, reference.array, [float(size) for size in reference.properties["spacing"]])
    try:
        case = replace(case, **_read_distribution(files, reference, raters, settings))
    except GeometryError as error:
        left_out.append(LeftOut(files.case, f"{SAMPLES}, {ECE}", "geometry differs", str(error)))
    left_out += _ignored(files.case, case, settings.ignore_label)
    if left_out and left_out[-1].what == CASE:
        return CaseResult(None, left_out)
    if len(reference.array) == 1:  # nnU-Net's first axis of 2D images
        case = _as_2d(case)
    measures = measure_case(case, settings.labels, settings.tolerance_mm, settings.ignore_label, settings.first)
    return CaseResult(measures, [*left_out, *_undefined(files.case, measures, settings)])


def evaluate_all(cases: Sequence[CaseFiles], settings: Settings, processes: int) -> Iterator[CaseResult]:
    """Read and measure cases, in their order, with progress; in this process if one is enough."""
    work = [(files,) for files in cases]
    yield from in_parallel(partial(evaluate_case, settings=settings), work, processes, "evaluate")


def read_label_map(file: Path, settings: Settings) -> LabelMap:
    """A file by nnU-Net's reader, as small integers.

    Raises:
        ValueError: it has several channels.
        UserError: it cannot be read, or has labels that are not declared.
    """
    array, properties = read_seg(settings.reader(), str(file))
    if len(array) != 1:
        raise ValueError(f"{file} has {len(array)} channels; a label map has one (save PNGs in grey, not in colour)")
    values = [value for label in settings.labels for value in _values(label)]
    try:
        check_labels(array, [*values, *([] if settings.ignore_label is None else [settings.ignore_label])])
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    type_ = np.uint8 if max([*values, settings.ignore_label or 0]) < 255 else np.uint16  # the reader gives float32
    return LabelMap(file, np.clip(np.rint(array[0]), 0, np.iinfo(type_).max).astype(type_), properties)


def _read_reference(files: CaseFiles, settings: Settings) -> tuple[LabelMap, np.ndarray | None]:
    """The reference's file; or the raters' majority, and their label maps (R, Z, Y, X)."""
    if files.reference is not None:
        return read_label_map(files.reference, settings), None
    first = read_label_map(files.raters[0], settings)
    raters = _read_like(first, files.raters, settings)
    labels = LabelManager(dict(settings.declared), settings.regions_class_order)
    agreed = majority(raters, np.array(files.rater_weights), labels)
    return replace(first, array=agreed.astype(raters.dtype)), raters


def _read_like(reference: LabelMap, files: Sequence[Path], settings: Settings) -> np.ndarray:
    """Label maps (N, Z, Y, X) on the reference's grid."""
    stack = []
    for file in files:
        label_map = read_label_map(file, settings)
        difference = geometry_difference(
            reference.file.name, reference.array.shape, reference.properties,
            file.name, label_map.array.shape, label_map.properties,
        )  # fmt: skip
        if difference:
            raise GeometryError(difference)
        stack.append(label_map.array)
    return np.stack(stack)


def _read_distribution(
    files: CaseFiles, reference: LabelMap, raters: np.ndarray | None, settings: Settings
) -> dict[str, Any]:
    """Fields of CaseArrays: samples with their weights, raters (which may have been read), probabilities."""
    found: dict[str, Any] = {}
    if files.raters:
        found["raters"] = _read_like(reference, files.raters, settings) if raters is None else raters
        found["rater_weights"] = files.rater_weights
        found["rater_names"] = [
            file.name.removesuffix(settings.ending).rpartition(SEPARATOR)[2] for file in files.raters
        ]
    if files.samples:
        found["samples"] = _read_like(reference, files.samples, settings)
        if files.quantities is not None:
            found |= _read_weights(files.quantities, len(files.samples), settings.first)
    if files.probabilities is not None:
        with np.load(files.probabilities) as content:
            probabilities = content["probabilities"]
        expected = (settings.num_channels, *reference.array.shape)
        if probabilities.shape != expected:
            raise ValueError(f"{files.probabilities} has shape {probabilities.shape}, not {expected}; predict it again")
        found["probabilities"] = probabilities[list(settings.channels)]
    return found


def _read_weights(file: Path, samples: int, first: Sequence[int]) -> dict[str, list | None]:
    """The samples' weights and groups from a case's JSON; None, equal ones and each alone, if it has none."""
    summary = json.loads(file.read_text())
    if summary.get("samples", samples) != samples:
        raise ValueError(f"{file} tells of {summary['samples']} samples and there are {samples}; predict them again")
    found = {key: summary.get(key) for key in ("sample_weights", "sample_groups")}
    for key, values in found.items():
        if values is not None and len(values) != samples:
            raise ValueError(f"{file} has {len(values)} {key} and there are {samples} samples; predict them again")
    weights, groups = found.values()
    for number in first if weights is not None else ():
        if groups is not None and len(set(groups[:number])) < len(set(groups)):
            raise UserError(
                f"--samples {number}: {file} has samples of {len(set(groups))} experts; ask for at least as many"
            )
        if not sum(weights[:number]) > 0:
            raise UserError(f"--samples {number}: the first {number} of {file} have no weight; ask for more")
    return found


def _ignored(case: str, arrays: CaseArrays, ignore_label: int | None) -> Iterator[LeftOut]:
    """What is left out since the reference or a rater ignores every voxel; the case itself if nobody says anything."""
    if ignore_label is None:
        return
    silent = (arrays.reference == ignore_label).all()
    named = zip(arrays.rater_names, arrays.raters if arrays.raters is not None else (), strict=True)
    mute = [name for name, rater in named if (rater == ignore_label).all()]
    if silent and len(mute) == len(arrays.rater_names):
        yield LeftOut(case, CASE, "every voxel is ignored")
        return
    if silent:
        yield LeftOut(case, "Dice, HD95 and NSD", "the reference ignores every voxel")
    if mute:
        what = RATERS if len(mute) < len(arrays.rater_names) else f"{SAMPLES}, {ECE}"
        yield LeftOut(case, what, "a rater ignores every voxel", ", ".join(mute))


def _as_2d(case: CaseArrays) -> CaseArrays:
    """Without the first axis, which has one voxel: a plane's inside is not surface."""
    stacks = {name: getattr(case, name) for name in ("samples", "raters", "probabilities")}
    return replace(
        case,
        prediction=case.prediction[0],
        reference=case.reference[0],
        spacing_mm=case.spacing_mm[1:],
        **{name: stack[:, 0] for name, stack in stacks.items() if stack is not None},
    )


def _undefined(case: str, measures: CaseMeasures, settings: Settings) -> Iterator[LeftOut]:
    """Labels whose measures the case cannot have."""
    for label, name in zip(settings.labels, settings.names, strict=True):
        found = measures.by_label[label]
        if np.isnan(found["n_ref"]):
            pass  # the reference says nothing
        elif not found["n_ref"] and not found["n_pred"]:
            yield LeftOut(case, f"Dice, HD95 and NSD of {name}", "neither in prediction nor in reference")
        elif not found["n_ref"] or not found["n_pred"]:
            yield LeftOut(case, f"HD95 of {name}", f"not in {'reference' if found['n_pred'] else 'prediction'}")
        if np.isnan(found.get("rater_Dice_nod", 0)) and not np.isnan(found["rater_Dice"]):
            yield LeftOut(case, f"rater_Dice_nod of {name}", "no rater drew it")


def files_by_case(folder: Path, ending: str) -> dict[str, Path]:
    """Case -> file, hidden files left out; empty where there is no folder."""
    if not folder.is_dir():
        return {}
    found = sorted(path for path in folder.iterdir() if path.name.endswith(ending) and path.name[0] != ".")
    return {path.name.removesuffix(ending): path for path in found}


def group_by_case(files: Mapping[str, Path]) -> dict[str, tuple[Path, ...]]:
    """Case -> its files of the names CASE__SUFFIX, in the order of the suffixes, 1000 after 999."""
    groups: dict[str, list[tuple[str, Path]]] = {}
    for stem, path in files.items():
        case, separator, suffix = stem.rpartition("__")
        if separator:
            groups.setdefault(case, []).append((suffix, path))
    return {c: tuple(path for _, path in sorted(g, key=lambda x: (len(x[0]), x[0]))) for c, g in groups.items()}


def _are_raters(there: Mapping[str, Any], predicted: Mapping[str, Any]) -> bool:
    """Whether a folder's files are CASE__RATER of predicted cases, and none is a case's own."""
    names = [stem.rpartition(SEPARATOR) for stem in there]
    own = all(case and name for case, _, name in names) and not there.keys() & predicted.keys()
    return own and any(case in predicted for case, _, _ in names)


def _if_there(file: Path) -> Path | None:
    return file if file.is_file() else None


def _values(label: Any) -> tuple[int, ...]:
    """The values of a label or region, as dataset.json or nnU-Net's label manager has it."""
    return tuple(map(int, label)) if isinstance(label, tuple | list) else (int(label),)
