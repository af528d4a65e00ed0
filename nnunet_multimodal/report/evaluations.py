"""Evaluations: the JSON of ``nnunet-multimodal evaluate`` and nnU-Net's summary.json, and the CSV of all subsets."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nnunet_multimodal.errors import UserError
from nnunet_multimodal.evaluate.report import FOREGROUND
from nnunet_multimodal.images import read_json

Measures = Mapping[str, float]
AVERAGE = "average"  # the subset of the row of means


@dataclass(frozen=True)
class Evaluation:
    """Measures of a folder's cases.

    Attributes:
        file: where they are from.
        labels: their names; ``FOREGROUND`` is the mean over them.
        cases: case -> label -> column -> number.
        mean: label -> column -> number.
        references: case -> its reference's file, as the evaluation names it.
        predicted: the folder of the predictions, as the evaluation names it.
        reliability: label -> confidence, frequency and count of each bin, and the expected calibration error.
        left_out: what is in no mean, in words.
        tolerance_mm: of the normalised surface distance, NaN for nnU-Net's own.
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
    cases, references, folders = {}, {}, set()
    for entry in content["metric_per_case"]:
        prediction = Path(entry["prediction_file"])
        case = entry.get("case", prediction.name.removesuffix(ending))
        rows = {names.get(key, key): _numbers(row) for key, row in entry["metrics"].items()}
        cases[case] = {**rows, **({FOREGROUND: _numbers(entry[FOREGROUND])} if FOREGROUND in entry else {})}
        references[case] = Path(entry["reference_file"])
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
    )


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
    """The table of ``evaluate --all-subsets``."""

    name: str
    cells: tuple[SubsetCell, ...]

    def values(self, field_name: str) -> list[str]:
        """The different models, subsets, labels or metrics, in their order."""
        return list(dict.fromkeys(getattr(cell, field_name) for cell in self.cells))

    @property
    def modalities(self) -> list[str]:
        """Those of which the subsets are made."""
        return list(dict.fromkeys(m for s in self.values("subset") if s != AVERAGE for m in s.split("+")))


def read_subsets(file: Path, name: str) -> Subsets:
    """subsets.csv.

    Raises:
        UserError: it has other columns.
    """
    cells = []
    for row in read_rows(file, SubsetCell._fields):
        cells.append(SubsetCell(row["model"], row["subset"], row["label"], row["metric"], *_cells(row)))
    return Subsets(name, tuple(cells))


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
