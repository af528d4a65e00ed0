"""Small copies of a case's volumes: turned to patient axes, shrunk, and encoded for the page.

Images and maps become 8-bit mosaics of their slices (WebP, with loss), label maps bytes (gzip, without loss).
Label maps keep in every block the label that most of its voxels have.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from PIL import Image

from nnunet_multimodal.errors import UserError
from nnunet_multimodal.evaluate.cases import Settings, read_label_map
from nnunet_multimodal.images import check_finite, geometry_difference, read_images
from nnunet_multimodal.preprocessing import find_placeholders
from nnunet_multimodal.report.gather import Predictions, Study, image_names

MAX_VOXELS = 3 * 2**19  # of a volume on the page
MIN_VOXELS = 2**12
Like = tuple[str, tuple[int, ...], Mapping[str, Any]]  # name, shape and properties of the file that others must match
WEBP_QUALITY = 60
PERCENTILES = (0.5, 99.5)  # of an image: black and white
LPS = nibabel.orientations.axcodes2ornt(("L", "P", "S"))
RAS_OF_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the voxels of a volume (Z, Y, X) lie.

    Attributes:
        shape: (Z, Y, X).
        affine: of the indices (x, y, z) to mm, RAS; (4, 4).
        oriented: whether the file tells where left and right are.
    """

    shape: tuple[int, ...]
    affine: np.ndarray
    oriented: bool

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        """Of the axes (Z, Y, X)."""
        return tuple(float(size) for size in np.linalg.norm(self.affine[:3, :3], axis=0)[::-1])


@dataclass(frozen=True, eq=False)
class Drawn:
    """Volumes of a prediction on the case's grid: label maps (Z, Y, X), and name -> map (Z, Y, X)."""

    prediction: np.ndarray
    samples: tuple[np.ndarray, ...]
    maps: Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class CaseVolumes:
    """All volumes of a case on one grid.

    Attributes:
        windows: channel -> the values that are black and white.
        raters: name -> label map (Z, Y, X).
        rater_voxels: label -> voxels of each rater, None of one who says nothing.
    """

    case: str
    grid: Grid
    labels: Mapping[str, Sequence[int]]
    images: Mapping[str, np.ndarray]
    windows: Mapping[str, tuple[float, float]]
    reference: np.ndarray | None
    runs: Mapping[str, Drawn]
    maps: Mapping[str, np.ndarray]
    raters: Mapping[str, np.ndarray] = field(default_factory=dict)
    rater_voxels: Mapping[str, Sequence[int | None]] = field(default_factory=dict)


def grid_of(shape: Sequence[int], properties: Mapping[str, Any]) -> Grid:
    """The grid that nnU-Net's reader tells of."""
    stuff = properties.get("nibabel_stuff")
    if stuff is not None:
        return Grid(tuple(shape), np.asarray(stuff.get("reoriented_affine", stuff["original_affine"]), float), True)
    itk = properties.get("sitk_stuff", {})
    affine = np.eye(4)
    if len(itk.get("spacing", ())) == 3:
        affine[:3, :3] = np.reshape(itk["direction"], (3, 3)) * itk["spacing"]
        affine[:3, 3] = itk["origin"]
        return Grid(tuple(shape), RAS_OF_LPS @ affine, True)
    affine[:3, :3] = np.diag([float(size) for size in properties["spacing"]][::-1])
    return Grid(tuple(shape), affine, False)


def to_patient_axes(array: np.ndarray, grid: Grid) -> tuple[np.ndarray, Grid]:
    """A volume with x to the left, y to the back and z upwards, as near as turning by right angles comes to it."""
    if not grid.oriented:
        return array, grid
    own = nibabel.orientations.io_orientation(grid.affine)
    turn = nibabel.orientations.ornt_transform(own, LPS)
    turned = nibabel.orientations.apply_orientation(array.transpose(2, 1, 0), turn).transpose(2, 1, 0)
    affine = grid.affine @ nibabel.orientations.inv_ornt_aff(turn, grid.shape[::-1])
    return np.ascontiguousarray(turned), Grid(turned.shape, affine, True)


def shrink_factors(shape: Sequence[int], spacing_mm: Sequence[float], max_voxels: int) -> tuple[int, ...]:
    """By what the axes (Z, Y, X) are divided, the finest first, until no more than ``max_voxels`` are left."""
    factors = [1] * len(shape)
    while math.prod(-(-size // factor) for size, factor in zip(shape, factors, strict=True)) > max_voxels:
        free = [axis for axis in range(len(shape)) if shape[axis] > factors[axis]]
        factors[min(free, key=lambda axis: spacing_mm[axis] * factors[axis])] += 1
    return tuple(factors)


def _blocks(array: np.ndarray, factors: Sequence[int]) -> np.ndarray:
    """(Z, Y, X) -> (Z/f, f, Y/f, f, X/f, f); what lacks at the end repeats the last voxel."""
    padded = np.pad(array, [(0, -size % factor) for size, factor in zip(array.shape, factors, strict=True)], "edge")
    split = [part for size, factor in zip(padded.shape, factors, strict=True) for part in (size // factor, factor)]
    return padded.reshape(split)


def shrink_image(array: np.ndarray, factors: Sequence[int]) -> np.ndarray:
    """The mean of every block."""
    return _blocks(array, factors).mean((1, 3, 5), dtype=np.float32)


def shrink_labels(array: np.ndarray, factors: Sequence[int]) -> np.ndarray:
    """The label that most voxels of a block have; the smaller one of two."""
    values = np.unique(array)
    if max(factors) == 1 or len(values) == 1:
        return array.copy()
    blocks = _blocks(array, factors)
    return values[np.argmax([(blocks == value).sum((1, 3, 5)) for value in values], axis=0)]


def read_case(study: Study, case: str, max_samples: int) -> CaseVolumes | None:
    """A case's volumes, None where no label map is.

    Raises:
        UserError: a file cannot be read, or files lie on different grids.
    """
    runs = [run for run in study.predictions if case in run.files]
    if not runs:
        return None
    settings = runs[0].settings
    assert settings is not None
    first = read_label_map(runs[0].files[case].prediction, settings)
    like = first.file.name, first.array.shape, first.properties
    grid = grid_of(first.array.shape, first.properties)
    turned = to_patient_axes(first.array, grid)[1]

    def read(file: Path, own: Settings) -> np.ndarray:
        label_map = read_label_map(file, own)
        _refuse_other_grid(like, str(file), label_map.array.shape, label_map.properties)
        return to_patient_axes(label_map.array, grid)[0]

    def read_maps(files: Mapping[str, Path]) -> dict[str, np.ndarray]:
        return {name: to_patient_axes(_read_map(file, first.array.shape), grid)[0] for name, file in files.items()}

    drawn = {}
    for run in runs:
        assert run.settings is not None
        files = run.files[case]
        samples = tuple(read(file, run.settings) for file in files.samples[:max_samples])
        maps = read_maps(run.maps.get(case, {}))
        drawn[run.name] = Drawn(read(files.prediction, run.settings), samples, maps)
    reference = study.references.get(case)
    images = _read_images(study.images.get(case, {}), settings, like)
    windows = {name: _window(runs[0], name, image) for name, image in images.items()}
    labels = {name: value if isinstance(value, tuple) else (value,) for name, value in _labels(settings).items()}
    raters = {name: read(file, settings) for name, file in study.raters.get(case, {}).items()}
    return CaseVolumes(
        case,
        turned,
        labels,
        {name: to_patient_axes(image, grid)[0] for name, image in images.items()},
        windows,
        None if reference is None else read(reference, settings),
        drawn,
        read_maps(_explained(study, case)),
        raters,
        _count(raters, labels, settings.ignore_label),
    )


def _explained(study: Study, case: str) -> dict[str, Path]:
    """Name -> map of all explanations; those of the same name are told apart by their folders."""
    maps = [(name, own.name, file) for own in study.explanations for name, file in own.maps.get(case, {}).items()]
    times = Counter(name for name, _, _ in maps)
    return {f"{name} ({folder})" if times[name] > 1 else name: file for name, folder, file in maps}


def _count(
    raters: Mapping[str, np.ndarray], labels: Mapping[str, Sequence[int]], ignore_label: int | None
) -> dict[str, list[int | None]]:
    """Label -> voxels of each rater; None of one who ignores all of them."""
    says = [ignore_label is None or bool((own != ignore_label).any()) for own in raters.values()]
    return {
        label: [
            int(np.isin(own, values).sum()) if said else None for own, said in zip(raters.values(), says, strict=True)
        ]
        for label, values in labels.items()
        if raters
    }


def _labels(settings: Settings) -> dict[str, Any]:
    return dict(zip(settings.names, settings.labels, strict=True))


def _read_images(files: Mapping[str, Path], settings: Settings, like: Like) -> dict[str, np.ndarray]:
    """Channel -> image (Z, Y, X), placeholders left out."""
    if not files:
        return {}
    data, properties = read_images(settings.reader(), [str(file) for file in files.values()])
    _refuse_other_grid(like, str(next(iter(files.values()))), data.shape[1:], properties)
    names = list(files) if len(data) == len(files) else [f"channel {index}" for index in range(len(data))]
    absent = find_placeholders(data)
    return {name: image for name, image, gone in zip(names, data, absent, strict=True) if not gone}


def _refuse_other_grid(like: Like, name: str, shape: Sequence[int], properties: Mapping[str, Any]) -> None:
    difference = geometry_difference(*like, name, shape, properties)
    if difference:
        raise UserError(f"{difference}; files of a case must be on one grid, so resample it or leave it out")


def _read_map(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A map that our commands wrote beside a label map, (Z, Y, X)."""
    image: Any = nibabel.load(file)
    array = np.asarray(image.dataobj, np.float32).T
    check_finite(file, array)
    if array.size != math.prod(shape):
        raise UserError(f"{file} has shape {array.shape} and its label map {shape}; predict it again, or take it away")
    return np.abs(array.reshape(shape))


def _window(run: Predictions, channel: str, image: np.ndarray) -> tuple[float, float]:
    """Black and white: of CT what nnU-Net's normalisation keeps, of others two percentiles."""
    names = image_names(run.dataset_json)
    index = names.index(channel) if channel in names else -1
    schemes = [c.get("normalization_schemes", ()) for c in run.plans_json.get("configurations", {}).values()]
    known = run.plans_json.get("foreground_intensity_properties_per_channel", {}).get(str(index))
    if known and any(own[index : index + 1] == ["CTNormalization"] for own in schemes):
        return float(known["percentile_00_5"]), float(known["percentile_99_5"])
    low, high = np.percentile(image, PERCENTILES)
    return float(low), float(max(high, low + 1e-6))


def encode_case(volumes: CaseVolumes, max_bytes: float, max_voxels: int = MAX_VOXELS) -> dict[str, Any]:
    """What the page holds of a case, shrunk until its JSON is no longer than ``max_bytes`` (or tiny)."""
    while True:
        view = _encode(volumes, shrink_factors(volumes.grid.shape, volumes.grid.spacing_mm, max_voxels))
        size = len(json.dumps(view))
        if size <= max_bytes or max_voxels <= MIN_VOXELS:
            return view
        max_voxels = max(MIN_VOXELS, int(max_voxels * max(0.2, 0.9 * max_bytes / size)))


def _encode(volumes: CaseVolumes, factors: tuple[int, ...]) -> dict[str, Any]:
    grid = volumes.grid
    shape = [-(-size // factor) for size, factor in zip(grid.shape, factors, strict=True)]
    scale = np.diag([*map(float, factors[::-1]), 1.0])
    scale[:3, 3] = [(factor - 1) / 2 for factor in factors[::-1]]
    columns = math.ceil(math.sqrt(shape[0] * shape[1] / shape[2]))  # a mosaic that is about square

    def image(array: np.ndarray, low: float, high: float) -> dict[str, Any]:
        small = shrink_image(array, factors)
        data = mosaic(np.clip((small - low) / (high - low) * 255, 0, 255).round().astype(np.uint8), columns)
        return {"low": low, "high": high, "data": _webp(data)}

    def maps(arrays: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
        return [{"name": name, **image(array, 0, float(array.max()) or 1.0)} for name, array in arrays.items()]

    def labels(arrays: Sequence[np.ndarray]) -> str:
        small = np.stack([shrink_labels(array, factors) for array in arrays])
        return _base64(gzip.compress(np.searchsorted(values, small).astype(np.uint8).tobytes(), mtime=0))

    every = [own for run in volumes.runs.values() for own in (run.prediction, *run.samples)]
    every += [*volumes.raters.values(), *([] if volumes.reference is None else [volumes.reference])]
    values = np.unique(np.concatenate([np.unique(array) for array in every]))
    return {
        "case": volumes.case,
        "shape": shape,
        "original_shape": list(grid.shape),
        "spacing": [size * factor for size, factor in zip(grid.spacing_mm, factors, strict=True)],
        "affine": (grid.affine @ scale).tolist(),
        "oriented": grid.oriented,
        "columns": columns,
        "labels": [  # not an object: a script's objects have names that are numbers first
            [name, [int(np.searchsorted(values, value)) for value in own if value in values]]
            for name, own in volumes.labels.items()
        ],
        "images": [{"name": name, **image(array, *volumes.windows[name])} for name, array in volumes.images.items()],
        "reference": None if volumes.reference is None else labels([volumes.reference]),
        "raters": list(volumes.raters),
        "rater_labels": labels(list(volumes.raters.values())) if volumes.raters else None,
        "rater_voxels": volumes.rater_voxels,
        "maps": maps(volumes.maps),
        "runs": {
            name: {
                "prediction": labels([run.prediction]),
                "samples": labels(run.samples) if run.samples else None,
                "num_samples": len(run.samples),
                "maps": maps(run.maps),
            }
            for name, run in volumes.runs.items()
        },
    }


def mosaic(array: np.ndarray, columns: int) -> np.ndarray:
    """Slices (Z, Y, X) side by side in rows: (rows * Y, columns * X), black where none is left."""
    depth, height, width = array.shape
    rows = -(-depth // columns)
    full = np.zeros((rows * columns, height, width), array.dtype)
    full[:depth] = array
    return full.reshape(rows, columns, height, width).transpose(0, 2, 1, 3).reshape(rows * height, columns * width)


def _webp(array: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "WEBP", quality=WEBP_QUALITY)
    return _base64(file.getvalue())


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
