"""Evaluations: the JSON of ``nnunet-multimodal evaluate`` and nnU-Net's summary.json, and the CSV of all subsets."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nnunet_multimodal.errors import UserError
from nnunet_multimodal.evaluate import AGREEMENT
from nnunet_multimodal.evaluate.agreement import HEADINGS as AGREEMENT_HEADINGS
from nnunet_multimodal.evaluate.report import FOREGROUND
from nnunet_multimodal.images import read_json
from nnunet_multimodal.provenance import FILE
from nnunet_multimodal.raters.files import SEPARATOR

Measures = Mapping[str, float]
AVERAGE = "average"  # the subset of the row of means
IDENTITY = "model.json"  # in the folder of a model's subsets


@dataclass(frozen=True)
class Evaluation:
    """Measures of a folder's cases.

    Attributes:
        file: where they are from.
        labels: their names; ``FOREGROUND`` is the mean over them.
        cases: case -> label -> column -> number.
        mean: label -> column -> number.
        references: case -> its reference's file, as the evaluation names it.
        raters: case -> name -> file of each rater, as the evaluation names them.
        agreement: label -> rater -> column -> mean over the cases, and how many these are.
        case_agreement: case -> label, rater, and column -> number.
        predicted: the folder of the predictions, as the evaluation names it.
        reliability: label -> confidence, frequency and count of each bin, and the expected calibration error.
        left_out: what is in no mean, in words.
        tolerance_mm: of the normalised surface distance, NaN for nnU-Net's own.
        first_samples: numbers of samples that are measured as well, None where it does not tell.
        made: versions and command, as far as it tells them.
    """

    file: Path
    labels: tuple[str, ...]
    cases: Mapping[str, Mapping[str, Measures]]
    mean: Mapping[str, Measures]
    references: Mapping[str, Path]
    predicted: Path | None
    reliability: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    tolerance_mm: float = math.nan
    raters: Mapping[str, Mapping[str, Path]] = field(default_factory=dict)
    agreement: Mapping[str, Mapping[str, Measures]] = field(default_factory=dict)
    case_agreement: Mapping[str, Sequence[tuple[str, str, Measures]]] = field(default_factory=dict)
    first_samples: Sequence[int] | None = None
    made: Mapping[str, Any] = field(default_factory=dict)

    def has(self, column: str) -> bool:
        """Whether any case has a number in a column."""
        return any(not math.isnan(row.get(column, math.nan)) for rows in self.cases.values() for row in rows.values())


def is_evaluation(content: Any) -> bool:
    """Whether a JSON file's content is an evaluation."""
    return isinstance(content, dict) and {"metric_per_case", "mean", "foreground_mean"} <= content.keys()


def read_evaluation(file: Path, dataset_json: Mapping[str, Any]) -> Evaluation:
    """An evaluation; labels get the names of dataset.json where it has none itself.

    Raises:
        UserError: it cannot be read, or is no evaluation.
    """
    content = read_json(file, "metric_per_case", "mean", "foreground_mean")
    names = content.get("labels") or label_names(dataset_json)
    ending = str(dataset_json.get("file_ending", ""))
    cases, references, raters, folders = {}, {}, {}, set()
    for entry in content["metric_per_case"]:
        prediction = Path(entry["prediction_file"])
        case = entry.get("case", prediction.name.removesuffix(ending))
        rows = {names.get(key, key): _numbers(row) for key, row in entry["metrics"].items()}
        cases[case] = {**rows, **({FOREGROUND: _numbers(entry[FOREGROUND])} if FOREGROUND in entry else {})}
        references[case] = Path(entry["reference_file"])
        files = map(Path, entry.get("rater_files", ()))
        raters[case] = {file.name.removesuffix(ending).rpartition(SEPARATOR)[2]: file for file in files}
        folders.add(prediction.parent)
    means = {names.get(key, key): _numbers(row) for key, row in content["mean"].items()}
    tolerance = content.get("tolerance_mm")
    return Evaluation(
        file=file,
        labels=tuple(means),
        cases=cases,
        mean={**means, FOREGROUND: _numbers(content["foreground_mean"])},
        references=references,
        predicted=folders.pop() if len(folders) == 1 else None,
        reliability={names.get(key, key): curve for key, curve in content.get("reliability", {}).items()},
        left_out=tuple(_in_words(entry) for entry in content.get("left_out", ())),
        tolerance_mm=math.nan if tolerance is None else tolerance,
        raters=raters,
        agreement={
            names.get(key, key): {rater: _numbers(row) for rater, row in own.items()}
            for key, own in content.get("agreement", {}).items()
        },
        case_agreement=_read_agreement(file) if content.get("agreement") else {},
        first_samples=content.get("first_samples"),
        made=content.get("made", {}),
    )


def _read_agreement(file: Path) -> dict[str, list[tuple[str, str, Measures]]]:
    """The table beside an evaluation's JSON, empty where it is not there."""
    table = file.with_name(f"{file.stem}{AGREEMENT}")
    found: dict[str, list[tuple[str, str, Measures]]] = {}
    for row in read_rows(table, ("case", "label", "rater", *AGREEMENT_HEADINGS)) if table.is_file() else ():
        numbers = {column: float(row[column] or "nan") for column in AGREEMENT_HEADINGS}
        found.setdefault(row["case"], []).append((row["label"], row["rater"], numbers))
    return found


def label_names(dataset_json: Mapping[str, Any]) -> dict[str, str]:
    """What nnU-Net's summary.json calls a label or region -> its name in dataset.json."""
    names = {}
    for name, value in dataset_json.get("labels", {}).items():
        names[str(tuple(value)) if isinstance(value, list) else str(value)] = name
        if isinstance(value, list) and len(value) == 1:
            names[str(value[0])] = name
    return names


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """null stands for what is not finite."""
    return {column: math.nan if value is None else float(value) for column, value in row.items()}


def _in_words(entry: Mapping[str, str]) -> str:
    what = "" if entry["what"] == "case" else f" (of {entry['what']})"
    return f"{entry['case']}{what}: {entry['why']}" + (f", {entry['detail']}" if entry.get("detail") else "")


class SubsetCell(NamedTuple):
    """A line of subsets.csv: a mean with its bootstrap interval, and p against the baseline, corrected."""

    model: str
    subset: str
    label: str
    metric: str
    mean: float
    low: float
    high: float
    n: float
    without_value: float
    p: float
    p_holm: float


@dataclass(frozen=True)
class Subsets:
    """The table of ``evaluate --all-subsets``.

    Attributes:
        identities: model -> what its predictions depend on.
        made_with: baseline, versions and command.
    """

    name: str
    cells: tuple[SubsetCell, ...]
    identities: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    made_with: Mapping[str, Any] = field(default_factory=dict)

    def values(self, field_name: str) -> list[str]:
        """The different models, subsets, labels or metrics, in their order."""
        return list(dict.fromkeys(getattr(cell, field_name) for cell in self.cells))

    @property
    def modalities(self) -> list[str]:
        """Those of which the subsets are made."""
        return list(dict.fromkeys(m for s in self.values("subset") if s != AVERAGE for m in s.split("+")))


def read_subsets(file: Path, name: str) -> Subsets:
    """subsets.csv, and what lies beside it of how it was made.

    Raises:
        UserError: it has other columns, or a file beside it cannot be read.
    """
    cells = []
    for row in read_rows(file, SubsetCell._fields):
        cells.append(SubsetCell(row["model"], row["subset"], row["label"], row["metric"], *_cells(row)))
    identities = {model: file.parent / model / IDENTITY for model in dict.fromkeys(cell.model for cell in cells)}
    return Subsets(
        name,
        tuple(cells),
        {model: read_json(own) if own.is_file() else {} for model, own in identities.items()},
        read_provenance(file.parent, "evaluate"),
    )


def read_provenance(folder: Path, command: str) -> dict[str, Any]:
    """What a command noted of its results in a folder; empty where it noted nothing.

    Raises:
        UserError: it cannot be read.
    """
    file = folder / FILE.format(command=command)
    return read_json(file) if file.is_file() else {}


def _cells(row: Mapping[str, str]) -> Iterable[float]:
    return (math.nan if row[name] == "" else float(row[name]) for name in SubsetCell._fields[4:])


def read_rows(file: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """The rows of a CSV file.

    Raises:
        UserError: a column is not there.
    """
    with file.open(newline="") as lines:
        reader = csv.DictReader(lines)
        lacking = [column for column in columns if column not in (reader.fieldnames or ())]
        if lacking:
            raise UserError(f"{file} has no column {', '.join(lacking)}: it is not this package's; leave it out")
        return list(reader)
