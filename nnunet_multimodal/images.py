"""Names and grids of nnU-Net's image files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_multimodal.errors import UserError


def list_channels(path: Path, ending: str, num_channels: int) -> dict[str, set[int]]:
    """The channels of each case, from the names of a folder's files.

    Raises:
        UserError: none, or a name without a channel or with one that the dataset does not have.
    """
    files: dict[str, set[int]] = {}
    for file in sorted(path.iterdir()):
        if file.name.endswith(ending) and not file.name.startswith("."):
            match = re.fullmatch(rf"(.+)_(\d{{4}}){re.escape(ending)}", file.name)
            if match is None:
                raise UserError(f"{file}: no channel in its name; rename it to CASE_0000{ending} or move it away")
            if int(match[2]) >= num_channels:
                raise UserError(
                    f"{file}: channel {int(match[2])}, and the dataset has 0 to {num_channels - 1}; rename it"
                )
            files.setdefault(match[1], set()).add(int(match[2]))
    if not files:
        raise UserError(f"no image ending in _0000{ending} in {path}; give nnU-Net's file names, or another folder")
    return files


def rename_files(beside: Path, path: Path, *endings: str) -> None:
    """Give files that were written beside their names, without their endings here, as far as they are there."""
    for ending in endings:
        if Path(f"{beside}{ending}").is_file():
            Path(f"{beside}{ending}").replace(f"{path}{ending}")


def geometry_difference(
    name_a: str,
    shape_a: Sequence[int],
    properties_a: Mapping[str, Any],
    name_b: str,
    shape_b: Sequence[int],
    properties_b: Mapping[str, Any],
) -> str:
    """What keeps images a and b from being on one grid, in words; empty if nothing does."""
    if tuple(shape_a) != tuple(shape_b):
        return f"{name_b} has shape {tuple(shape_b)} and {name_a} {tuple(shape_a)}"
    theirs = _geometry(properties_b)
    for name, value in _geometry(properties_a).items():
        if not np.allclose(value, theirs[name], rtol=1e-4, atol=1e-3):  # files keep float32 or a few digits
            return f"{name_b} has {name} {theirs[name]} and {name_a} {value}"
    return ""


def _geometry(properties: Mapping[str, Any]) -> dict[str, Any]:
    """What the readers of nnU-Net tell about the grid; PNG has nothing but a spacing of 1."""
    affine = properties.get("nibabel_stuff", {})
    affine = affine.get("reoriented_affine", affine.get("original_affine"))
    itk = {name: value for name, value in properties.get("sitk_stuff", {}).items() if name in ("origin", "direction")}
    return {"spacing": tuple(properties["spacing"]), **itk, **({} if affine is None else {"affine": affine.tolist()})}
