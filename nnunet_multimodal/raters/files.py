"""Which raters there are of each case, what they count, and what is wrong with their files."""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nnunet_multimodal.errors import UserError
from nnunet_multimodal.images import check_labels, geometry_difference, read_seg

FOLDER, WEIGHTS = "ratersTr", "raters.csv"
COLUMNS = ["case", "rater", "weight"]
SEPARATOR = "__"
BESIDE = (".json", ".npz", ".pkl", ".csv", ".txt", ".md")  # what nnU-Net writes beside label maps, tables and notes


class Rater(NamedTuple):
    """A rater's annotation of a case; ``weight`` in relation to the others', the largest from 1/2 to 1."""

    name: str
    file: Path
    weight: float


def find_raters(folder: Path, ending: str) -> dict[str, list[Rater]]:
    """The raters of each case, sorted by name; empty where there is no such folder.

    Raises:
        UserError: a file is not named CASE__RATER, has another ending, or the table of weights does not fit the files.
    """
    files: dict[str, dict[str, Path]] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if file.name.startswith(".") or not file.is_file():
            continue
        if not file.name.endswith(ending):
            if SEPARATOR in file.name and file.suffix not in BESIDE:
                raise UserError(
                    f"{file} does not end in {ending}, as the dataset's files do, and so would be no rater; convert "
                    "it, or move it out of the folder"
                )
            continue
        case, separator, name = file.name.removesuffix(ending).rpartition(SEPARATOR)
        if not (case and separator and name):
            raise UserError(f"{file}: its name is not CASE{SEPARATOR}RATER{ending}; rename it")
        files.setdefault(case, {})[name] = file
    weights = read_weights(folder / WEIGHTS, files) if (folder / WEIGHTS).is_file() else {}
    raters = {}
    for case, of_case in files.items():
        given = [weights.get((case, name), 1.0) for name in of_case]
        if not any(given):
            raise UserError(f"{folder / WEIGHTS}: all raters of {case} have weight 0; give one of them another")
        # by a power of two: float32 holds them, and what was equal, or as much as others together, still is
        exponent = math.frexp(max(given))[1]
        scaled = [math.ldexp(weight, -exponent) for weight in given]
        raters[case] = [Rater(*rater, weight) for rater, weight in zip(of_case.items(), scaled, strict=True)]
    return raters


def read_weights(file: Path, files: Mapping[str, Mapping[str, Path]]) -> dict[tuple[str, str], float]:
    """Weights by case and rater; raters that are not named count 1.

    Raises:
        UserError: not a table in UTF-8, other columns, a rater without a file, one named twice, or a weight that is not
            a number >= 0.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:  # spreadsheets begin it with a mark
            rows = [row for row in csv.reader(lines) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} cannot be read ({error}); save it as CSV in UTF-8") from error
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


def read_rater(
    reader: Any,
    file: Path,
    image: str,
    shape: Sequence[int],
    properties: Mapping[str, Any],
    declared: Iterable[int],
) -> np.ndarray:
    """A rater's label map (1, *D), checked and rounded.

    Args:
        reader: nnU-Net's.
        file: the rater's.
        image: whose grid it must have, for the messages.
        shape: of the image, without channels.
        properties: of the image, as the reader gives them.
        declared: the labels that dataset.json declares.

    Raises:
        UserError: it cannot be read, is cut off, has several channels, lies on another grid or has other labels.
    """
    labels, theirs = read_seg(reader, str(file))
    problems = []
    if len(labels) != 1:
        problems.append(f"{file} has {len(labels)} channels; a label map has one (save PNGs in grey, not in colour)")
    difference = geometry_difference(image, shape, properties, str(file), labels.shape[1:], theirs)
    if difference:
        problems.append(f"{difference}; resample the label map onto its image's grid")
    try:
        check_labels(labels, declared)
    except UserError as error:
        problems.append(f"{file}: {error}")
    if problems:
        raise UserError("\n".join(problems))
    return np.rint(labels)


def describe(rater: Rater) -> dict[str, Any]:
    """Weight and file, by which :func:`has_changed` knows them again."""
    state = rater.file.stat()
    return {
        "weight": rater.weight, "bytes": state.st_size, "mtime_ns": state.st_mtime_ns, "sha256": _sha256(rater.file),
    }  # fmt: skip


def has_changed(rater: Rater, known: Mapping[str, Any]) -> bool:
    """Whether weight or content are others than those described; a copy of the file is the same."""
    state = rater.file.stat()
    if (rater.weight, state.st_size) != (known["weight"], known["bytes"]):
        return True
    return state.st_mtime_ns != known["mtime_ns"] and _sha256(rater.file) != known["sha256"]


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
