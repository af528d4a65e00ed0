"""Which raters there are of each case, and what they count."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from nnunet_multimodal.errors import UserError

FOLDER, WEIGHTS = "ratersTr", "raters.csv"
COLUMNS = ["case", "rater", "weight"]
SEPARATOR = "__"


class Rater(NamedTuple):
    """A rater's annotation of a case; ``weight`` need not be normalised."""

    name: str
    file: Path
    weight: float


def find_raters(folder: Path, ending: str) -> dict[str, list[Rater]]:
    """The raters of each case, sorted by name; empty where there is no such folder.

    Raises:
        UserError: a file is not named CASE__RATER, or the table of weights does not fit the files.
    """
    files: dict[str, dict[str, Path]] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not file.name.endswith(ending) or file.name.startswith("."):
            continue
        case, separator, name = file.name.removesuffix(ending).rpartition(SEPARATOR)
        if not (case and separator and name):
            raise UserError(f"{file}: its name is not CASE{SEPARATOR}RATER{ending}; rename it")
        files.setdefault(case, {})[name] = file
    weights = read_weights(folder / WEIGHTS, files) if (folder / WEIGHTS).is_file() else {}
    raters = {
        case: [Rater(name, file, weights.get((case, name), 1.0)) for name, file in of_case.items()]
        for case, of_case in files.items()
    }
    for case, of_case in raters.items():
        if not any(rater.weight for rater in of_case):
            raise UserError(f"{folder / WEIGHTS}: all raters of {case} have weight 0; give one of them another")
    return raters


def read_weights(file: Path, files: Mapping[str, Mapping[str, Path]]) -> dict[tuple[str, str], float]:
    """Weights by case and rater; raters that are not named count 1.

    Raises:
        UserError: other columns, a rater without a file, one named twice, or a weight that is not a number >= 0.
    """
    with file.open(newline="") as lines:
        rows = [row for row in csv.reader(lines) if row]
    if not rows or rows[0] != COLUMNS:
        raise UserError(f"{file} begins with {','.join(rows[0]) if rows else 'nothing'!r}, not {','.join(COLUMNS)}")
    weights: dict[tuple[str, str], float] = {}
    for row in rows[1:]:
        case, name, weight = (row + [""] * 3)[:3]
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf or len(row) != len(COLUMNS):
            raise UserError(f"{file}: {','.join(row)!r} is not a case, a rater and a number of at least 0")
        if name not in files.get(case, {}):
            raise UserError(f"{file} names {case}, {name}, and there is no {case}{SEPARATOR}{name} beside it")
        if (case, name) in weights:
            raise UserError(f"{file} names {case}, {name} twice; leave one")
        weights[case, name] = value
    return weights
