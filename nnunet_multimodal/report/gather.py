"""What is on disk: predictions, explanations, models and evaluations below the folders that were named."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nnunet_multimodal.errors import UserError
from nnunet_multimodal.evaluate.cases import CaseFiles, Settings, find_cases, read_settings
from nnunet_multimodal.images import list_channels, read_json
from nnunet_multimodal.preprocessing import channel_names
from nnunet_multimodal.raters.files import find_raters
from nnunet_multimodal.report.evaluations import (
    Evaluation,
    Subsets,
    is_evaluation,
    read_evaluation,
    read_provenance,
    read_rows,
    read_subsets,
)
from nnunet_multimodal.report.models import TrainedModel, is_model, read_model

DEPTH = 4  # of folders below those that were named
EVALUATIONS = ("evaluation.json", "summary.json")  # ours, else nnU-Net's
ARGUMENTS = "predict_from_raw_data_args.json"
TABLES = ("contributions", "complementary_weights", "uncertainty", "attribution")
MAP_FOLDERS = ("uncertainty", "complementary", "attribution")
MAP_ENDING = ".nii.gz"
DEFAULT_TOLERANCE_MM = 1.0  # of a measure that is not used here
VOLUME_KEYS = {"ml": "volume_ml", "voxels": "voxels"}  # of CASE.json


@dataclass(frozen=True)
class Predictions:
    """A folder of predictions, or an evaluation alone.

    Attributes:
        name: on the page.
        settings: labels, reader and file ending; None without the folder.
        dataset_json, plans_json: the folder's.
        files: case -> its label map, samples and JSON.
        maps: case -> name -> file of each uncertainty map.
        summaries: case -> what ``predict`` wrote to CASE.json.
        evaluation: of these predictions, if there is one.
        arguments: what nnU-Net wrote to predict_from_raw_data_args.json.
    """

    name: str
    settings: Settings | None = None
    dataset_json: Mapping[str, Any] = field(default_factory=dict)
    plans_json: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, CaseFiles] = field(default_factory=dict)
    maps: Mapping[str, Mapping[str, Path]] = field(default_factory=dict)
    summaries: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cases(self) -> list[str]:
        """All that are predicted or measured."""
        measured = self.evaluation.cases if self.evaluation else {}
        return sorted({*self.files, *measured})

    @property
    def labels(self) -> list[str]:
        """Those whose volumes are known."""
        return list(dict.fromkeys(label for own in self.summaries.values() for label in own.get("labels", {})))

    @property
    def trainers(self) -> list[str]:
        """Those that CASE.json names."""
        return sorted({str(summary["trainer"]) for summary in self.summaries.values() if "trainer" in summary})

    def volume(self, case: str, label: str, unit: str) -> Mapping[str, float]:
        """``prediction``, ``p2.5``, … of CASE.json; empty where it tells none in this unit, or what is no number."""
        told = self.summaries.get(case, {}).get("labels", {}).get(label, {}).get(VOLUME_KEYS[unit]) or {}
        return told if all(isinstance(v, int | float) and math.isfinite(v) for v in told.values()) else {}

    def voxel_size(self, case: str, unit: str) -> float | None:
        """A voxel in this unit; None where it is not known."""
        summary = self.summaries.get(case, {})
        if unit == "voxels":
            return 1.0
        physical = any(self.volume(case, label, unit) for label in summary.get("labels", {}))
        return math.prod(summary["spacing"]) / 1000 if physical and "spacing" in summary else None


@dataclass(frozen=True)
class Explanation:
    """A folder of ``explain`` or ``uncertainty``.

    Attributes:
        tables: rows by the tables' names.
        maps: case -> name -> file.
        made_with: command of ours -> model, settings, versions and command as it was typed.
    """

    name: str
    tables: Mapping[str, tuple[Mapping[str, str], ...]]
    maps: Mapping[str, Mapping[str, Path]]
    made_with: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """All that the page tells of.

    Attributes:
        images: case -> channel's name -> file.
        references: case -> file.
        raters: case -> rater's name -> file, of those that count.
    """

    models: tuple[TrainedModel, ...] = ()
    predictions: tuple[Predictions, ...] = ()
    subsets: tuple[Subsets, ...] = ()
    explanations: tuple[Explanation, ...] = ()
    images: Mapping[str, Mapping[str, Path]] = field(default_factory=dict)
    references: Mapping[str, Path] = field(default_factory=dict)
    raters: Mapping[str, Mapping[str, Path]] = field(default_factory=dict)

    @property
    def cases(self) -> list[str]:
        """Cases of all predictions."""
        return sorted({case for run in self.predictions for case in run.cases})

    @property
    def unit(self) -> str:
        """Of volumes: ml, or voxels where no prediction has a physical size."""
        volumes = [
            run.volume(c, label, "ml") for run in self.predictions for c in run.summaries for label in run.labels
        ]
        return "ml" if any(volumes) or not any(run.summaries for run in self.predictions) else "voxels"


def gather_study(
    results: Sequence[Path], images: Path | None, references: Path | None, raters: Path | None = None
) -> Study:
    """Everything below the folders (or evaluation files) that were named.

    Raises:
        UserError: one of them is not there or holds nothing that this page shows, or a file of it cannot be read.
    """
    for flag, folder in (("-i", images), ("-ref", references), ("--raters", raters)):
        if folder is not None and not folder.is_dir():
            raise UserError(f"{flag} {folder} is not a folder")
    found: dict[str, list[Path]] = {kind: [] for kind in KINDS}
    alone: list[Path] = []
    for path in results:
        if path.is_file() and is_evaluation(read_json(path)):
            alone += [] if path in alone else [path]
            continue
        if not path.is_dir():
            raise UserError(f"{path} is neither a folder nor an evaluation's JSON; name what a command wrote")
        below = list(_walk(path, DEPTH))
        if not below:
            raise UserError(
                f"{path} holds no model, prediction, evaluation or explanation (searched {DEPTH} folders deep); name "
                "what training, predict, evaluate or explain wrote"
            )
        for kind, folder in below:
            found[kind] += [] if folder in found[kind] else [folder]
    folders = [folder for kind in ("predictions", "subsets", "explanation") for folder in found[kind]]
    names = short_names([*folders, *alone])
    predictions = [read_predictions(folder, names[folder]) for folder in found["predictions"]]
    for file in alone:
        predictions = _with_evaluation(predictions, file, names[file])
    return Study(
        tuple(read_model(folder) for folder in found["model"]),
        tuple(predictions),
        tuple(read_subsets(folder / "subsets.csv", names[folder]) for folder in found["subsets"]),
        tuple(read_explanation(folder, names[folder]) for folder in found["explanation"]),
        _find_images(images, predictions),
        _find_references(references, predictions),
        _find_raters(raters, predictions),
    )


def _is_predictions(folder: Path) -> bool:
    return (folder / "dataset.json").is_file() and (folder / "plans.json").is_file() and not is_model(folder)


def _is_explanation(folder: Path) -> bool:
    return (folder / "contributions.csv").is_file() or (folder / "uncertainty.json").is_file()


KINDS = {
    "model": is_model,
    "predictions": _is_predictions,
    "subsets": lambda folder: (folder / "subsets.csv").is_file(),
    "explanation": _is_explanation,
}


def _walk(folder: Path, depth: int) -> Iterator[tuple[str, Path]]:
    """Kind and folder of all that is known; nothing is sought below a folder of predictions, a model or others."""
    kinds = [kind for kind, is_one in KINDS.items() if is_one(folder)]
    yield from ((kind, folder) for kind in kinds)
    if not kinds and depth:
        for below in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
            yield from _walk(below, depth - 1)


def short_names(folders: Iterable[Path]) -> dict[Path, str]:
    """Folder -> the shortest end of its path that no other one has."""
    parts = {folder: Path(os.path.abspath(folder)).parts for folder in folders}
    length = dict.fromkeys(parts, 1)
    while True:
        ends = {folder: "/".join(own[-length[folder] :]) for folder, own in parts.items()}
        same = [f for f in parts if list(ends.values()).count(ends[f]) > 1 and length[f] < len(parts[f])]
        if not same:
            return ends
        for folder in same:
            length[folder] += 1


def read_predictions(folder: Path, name: str) -> Predictions:
    """A folder of predictions, by nnU-Net's or our command.

    Raises:
        UserError: one of its JSON files cannot be read.
    """
    settings = read_settings(folder / "dataset.json", folder / "plans.json", DEFAULT_TOLERANCE_MM)
    files = {files.case: files for files in find_cases(folder, folder, None, settings.ending)[0]}
    dataset_json = read_json(folder / "dataset.json")
    evaluation = next((folder / name for name in EVALUATIONS if (folder / name).is_file()), None)
    return Predictions(
        name,
        settings,
        dataset_json,
        read_json(folder / "plans.json"),
        files,
        find_maps(folder / "uncertainty", files),
        {case: read_json(found.quantities) for case, found in files.items() if found.quantities},
        None if evaluation is None else read_evaluation(evaluation, dataset_json),
        read_json(folder / ARGUMENTS) if (folder / ARGUMENTS).is_file() else {},
    )


def _with_evaluation(predictions: Sequence[Predictions], file: Path, name: str) -> list[Predictions]:
    """An evaluation that lies elsewhere, given to the predictions that it measures; else it stands alone."""
    named = read_evaluation(file, {}).predicted
    for index, run in enumerate(predictions):
        folders = {files.prediction.parent.resolve() for files in run.files.values()}
        if named is not None and named.resolve() in folders:
            own = replace(run, evaluation=read_evaluation(file, run.dataset_json))
            return [*predictions[:index], own, *predictions[index + 1 :]]
    short = name.removesuffix(file.suffix)
    taken = short in {run.name for run in predictions}
    return [*predictions, Predictions(name if taken else short, evaluation=read_evaluation(file, {}))]


def find_maps(folder: Path, cases: Iterable[str]) -> dict[str, dict[str, Path]]:
    """Case -> name -> file of CASE_NAME.nii.gz; the longest case's name that fits."""
    maps: dict[str, dict[str, Path]] = {}
    longest_first = sorted(cases, key=len, reverse=True)
    for file in sorted(folder.glob(f"*{MAP_ENDING}")):
        stem = file.name.removesuffix(MAP_ENDING)
        case = next((case for case in longest_first if stem.startswith(f"{case}_")), None)
        if case is not None and not stem.startswith("."):
            maps.setdefault(case, {})[stem.removeprefix(f"{case}_")] = file
    return maps


def read_explanation(folder: Path, name: str) -> Explanation:
    """A folder of ``explain``, or of ``uncertainty``.

    Raises:
        UserError: one of its tables is not one.
    """
    files = {table: folder / f"{table}.csv" for table in TABLES}
    tables = {table: tuple(read_rows(file, ("case",))) for table, file in files.items() if file.is_file()}
    cases = {row["case"] for rows in tables.values() for row in rows}
    maps: dict[str, dict[str, Path]] = {}
    for kind in MAP_FOLDERS:
        for case, found in find_maps(folder / kind, cases).items():
            maps.setdefault(case, {}).update({f"{kind}: {own}": file for own, file in found.items()})
    if (folder / "uncertainty.json").is_file():
        scores = read_json(folder / "uncertainty.json")
        tables["uncertainty"] = tuple(
            {"case": case, "modality": modality, "uncertainty": f"{mean:.6g}"}
            for case, means in scores.items()
            for modality, mean in means.items()
        )
        for case, found in find_maps(folder, scores).items():
            modalities = dict(enumerate(scores[case]))
            maps.setdefault(case, {}).update(
                {f"uncertainty: {modalities.get(int(own), own)}": f for own, f in found.items() if own.isdigit()}
            )
    notes = {command: read_provenance(folder, command) for command in ("explain", "uncertainty")}
    return Explanation(name, tables, maps, {command: own for command, own in notes.items() if own})


def image_names(dataset_json: Mapping[str, Any]) -> list[str]:
    """The channels' names, with their numbers where several have the same."""
    names = channel_names(dict(dataset_json))
    return [f"{name} ({number})" if names.count(name) > 1 else name for number, name in enumerate(names)]


def _find_images(folder: Path | None, predictions: Sequence[Predictions]) -> dict[str, dict[str, Path]]:
    """Case -> channel -> file, of the cases that are predicted."""
    described = next((run for run in predictions if run.settings is not None), None)
    if folder is None or described is None or described.settings is None:
        return {}
    names, ending = image_names(described.dataset_json), described.settings.ending
    found = list_channels(folder, ending, len(names))
    wanted = {case for run in predictions for case in run.files}
    return {
        case: {names[channel]: folder / f"{case}_{channel:04d}{ending}" for channel in sorted(channels)}
        for case, channels in found.items()
        if case in wanted
    }


def _find_references(folder: Path | None, predictions: Sequence[Predictions]) -> dict[str, Path]:
    """Case -> reference: of the folder, or where an evaluation says that it lay."""
    references: dict[str, Path] = {}
    for run in predictions:
        for case, files in run.files.items():
            named = run.evaluation.references.get(case) if run.evaluation else None
            file = named if folder is None else folder / files.prediction.name
            if file is not None and file.is_file():
                references.setdefault(case, file)
    return references


def _find_raters(folder: Path | None, predictions: Sequence[Predictions]) -> dict[str, dict[str, Path]]:
    """Case -> name -> file of each rater that counts: of the folder, or where an evaluation says that they lay.

    Raises:
        UserError: what :func:`find_raters` refuses.
    """
    raters: dict[str, dict[str, Path]] = {}
    for run in predictions:
        named: Mapping[str, Mapping[str, Path]] = run.evaluation.raters if run.evaluation else {}
        if folder is not None and run.settings is not None:
            there = find_raters(folder, run.settings.ending)
            named = {case: {r.name: r.file for r in of_case if r.weight} for case, of_case in there.items()}
        for case in run.files:
            files = {name: file for name, file in named.get(case, {}).items() if file.is_file()}
            if files:
                raters.setdefault(case, files)
    return raters
