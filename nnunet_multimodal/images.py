"""Names and grids of nnU-Net's image files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
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


def read_json(file: str | os.PathLike, *keys: str) -> dict[str, Any]:
    """A file of nnU-Net's, such as plans.json.

    Raises:
        UserError: it is not there, not JSON, or lacks one of the keys.
    """
    try:
        content = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:  # not UTF-8 and not JSON are ValueErrors
        raise UserError(f"{file} cannot be read ({error}); plan again, or copy it again from where it comes") from error
    lacking = [key for key in keys if not isinstance(content, dict) or key not in content]
    if lacking:
        raise UserError(f"{file} has no {', '.join(lacking)}: it is not nnU-Net v2's; plan again, or name another file")
    return content


def check_file(file: str | os.PathLike) -> None:
    """Refuse what ITK's reader of NIfTI makes zeros of: the end of a file that is cut off, NaN and infinite voxels.

    Raises:
        UserError: see above.
    """
    if not str(file).lower().endswith((".nii", ".nii.gz")):
        return
    try:
        image: Any = nibabel.load(file)
        data = np.asanyarray(image.dataobj)
    except Exception as error:  # whatever a damaged file makes nibabel raise
        raise unreadable(file, error) from error
    if data.dtype.kind == "f":
        check_finite(file, data)


def check_finite(file: str | os.PathLike, data: np.ndarray) -> None:
    """Raise a UserError if there are NaN or infinite voxels."""
    counts = {"NaN": int(np.isnan(data).sum()), "infinity": int(np.isinf(data).sum())}
    found = " and ".join(f"{what} in {count} voxels" for what, count in counts.items() if count)
    if found:
        raise UserError(f"{file}: {found}; give them a value, or leave out the file")


def check_labels(labels: np.ndarray, declared: Iterable[int]) -> None:
    """Raise a UserError if a label map, rounded, has values that dataset.json does not declare."""
    declared = sorted({0, *declared})
    low, high = float(labels.min(initial=0)), float(labels.max(initial=0))
    if low >= -0.5 and high < np.iinfo(np.uint16).max:
        known = np.zeros(max(round(high), *declared) + 1, bool)  # sorting a large image takes far longer
        known[declared] = True
        if known[np.rint(labels).astype(np.uint16)].all():
            return
    unknown = sorted(set(np.unique(np.rint(labels)).tolist()) - set(declared))
    found, there = (", ".join(f"{value:g}" for value in values) for values in (unknown[:5], declared))
    raise UserError(f"labels {found}, and dataset.json declares {there}; correct the label map or dataset.json")


def unreadable(file: str | os.PathLike, error: Exception) -> UserError:
    """What to say of a file that a reader does not take."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return UserError(f"{file} cannot be read ({reason}); copy it again, or leave it out")


def read_images(reader: Any, files: Sequence[str]) -> tuple[np.ndarray, dict[str, Any]]:
    """nnU-Net's reader's ``read_images``, which says too little of what is wrong.

    Raises:
        UserError: a file cannot be read, is cut off, has NaN or infinite voxels, or lies on another grid.
    """
    arrays, first = [], None
    for file in files:
        check_file(file)
        try:
            data, properties = reader.read_images((file,))
        except Exception as error:  # whatever a damaged file makes a reader raise
            raise unreadable(file, error) from error
        if first is None:
            first = (file, data.shape[1:], properties)
        difference = geometry_difference(*first, file, data.shape[1:], properties)
        if difference:
            raise UserError(f"{difference}; resample it onto the other's grid, or leave it out")
        arrays.append(data)
    assert first is not None
    return np.concatenate(arrays), first[2]


def read_seg(reader: Any, file: str) -> tuple[np.ndarray, dict[str, Any]]:
    """nnU-Net's reader's ``read_seg``, with a :class:`UserError` of a file that cannot be read."""
    check_file(file)
    try:
        return reader.read_seg(file)
    except Exception as error:  # whatever a damaged file makes a reader raise
        raise unreadable(file, error) from error


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
    sitk = properties.get("sitk_stuff", {})
    grid = {"spacing": properties["spacing"], **{name: sitk[name] for name in ("origin", "direction") if name in sitk}}
    told = {name: tuple(map(float, values)) for name, values in grid.items()}  # plain numbers, for messages
    return told if affine is None else {**told, "affine": affine.tolist()}
