"""What becomes of one file of a source: taken as it is, or its values, header or grid changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK

from nnunet_multimodal.errors import UserError
from nnunet_multimodal.images import check_file, check_finite, geometry_difference, unreadable

COMPRESSED = "compressed"
NIFTI = (".nii", ".nii.gz")
WITHOUT_GRID = (".npy", ".png", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Loaded:
    """An image in memory.

    Attributes:
        file: where it comes from.
        image: of 2 or 3 dimensions and one number a voxel.
        changes: what was done to it, in words; empty if it is what the file holds.
    """

    file: Path
    image: SimpleITK.Image
    changes: tuple[str, ...] = ()

    def changed(self, image: SimpleITK.Image, *changes: str) -> Loaded:
        """The same file with something done to it."""
        return Loaded(self.file, image, (*self.changes, *changes))


def load(file: Path) -> Loaded:
    """Read NIfTI, whatever else SimpleITK reads, or a NumPy array.

    Raises:
        UserError: it cannot be read, is cut off, has NaN or infinite voxels, more than 3 dimensions, or colours.
    """
    check_file(file)
    try:
        if file.suffix.lower() == ".npy":
            image = _image(np.load(file, allow_pickle=False))
        else:
            image = SimpleITK.ReadImage(str(file))
    except Exception as error:  # whatever a damaged file makes a reader raise
        if "orthonormal" in str(error) and file.name.lower().endswith(NIFTI):
            raise UserError(f"{file}: {_skewed(file)}") from error
        raise unreadable(file, error) from error
    loaded = Loaded(file, image)
    if image.GetDimension() == 4 and image.GetSize()[3] == 1:
        loaded = loaded.changed(image[:, :, :, 0], "fourth dimension of size 1 removed")
    if loaded.image.GetDimension() not in (2, 3):
        raise UserError(f"{file} has {image.GetDimension()} dimensions; split it, one file for each modality")
    if loaded.image.GetNumberOfComponentsPerPixel() > 1:
        loaded = _without_colours(loaded)
    array = SimpleITK.GetArrayViewFromImage(loaded.image)
    if array.dtype.kind == "f":
        check_finite(file, array)
    if file.suffix.lower() in WITHOUT_GRID:  # a PNG's resolution is that of a printer
        loaded.image.SetSpacing([1.0] * loaded.image.GetDimension())
        loaded.image.SetOrigin([0.0] * loaded.image.GetDimension())
    return loaded


def _skewed(file: Path) -> str:
    """What to say of a NIfTI whose axes are not perpendicular."""
    header: Any = nibabel.load(file)
    return (
        f"the axes of its affine {header.affine[:3, :3].round(4).tolist()} are not perpendicular, and SimpleITK does "
        "not read such files; save it with the nearest perpendicular axes, or resample it onto some, both with "
        "nibabel: docs/howto/convert.md, Limits"
    )


def _image(array: np.ndarray) -> SimpleITK.Image:
    if array.ndim == 3 and array.shape[-1] == 1:  # an axis of channels
        array = array[..., 0]
    if array.ndim not in (2, 3) or array.dtype.kind not in "biuf":
        raise ValueError(f"an array of shape {array.shape} and type {array.dtype} is no image")
    if array.dtype.kind == "f":
        return SimpleITK.GetImageFromArray(array.astype(np.float32))
    own = array.dtype.newbyteorder("=")  # SimpleITK takes no other
    narrow = np.uint8 if array.dtype.kind == "b" else np.int32 if array.dtype.itemsize > 4 else own
    if (array.astype(narrow) != array).any():
        raise ValueError(f"values up to {array.max()} do not fit into 32 bits")
    return SimpleITK.GetImageFromArray(array.astype(narrow))


def _without_colours(loaded: Loaded) -> Loaded:
    """Grey that is stored as RGB (or RGBA) becomes one channel; colours are refused."""
    array = SimpleITK.GetArrayFromImage(loaded.image)
    grey = array[..., 0]
    colours = array.shape[-1] - (array.shape[-1] in (2, 4))  # the last one is opacity
    if not all((array[..., colour] == grey).all() for colour in range(colours)):
        raise UserError(f"{loaded.file} has {colours} colours; split it, one file for each modality")
    image = SimpleITK.GetImageFromArray(grey)
    image.CopyInformation(loaded.image)
    return loaded.changed(image, "grey of RGB")


def remap_labels(labels: np.ndarray, values: Mapping[int, int]) -> np.ndarray:
    """Labels of the data set for those of the source, as uint8 (uint16 if they are larger).

    Args:
        labels: whole numbers (of any type; what stands for a whole number may be rounded to 0.001).
        values: label in the source -> label of the data set, all of them >= 0.

    Raises:
        UserError: fractions, or a label that is not in ``values``.
    """
    whole = np.rint(labels) if labels.dtype.kind == "f" else labels
    low, high = int(whole.min(initial=0)), int(whole.max(initial=0))
    if whole is not labels and np.abs(labels - whole).max(initial=0) > 1e-3:
        example = labels[np.abs(labels - whole) > 1e-3][0]
        raise UserError(f"{example:g} is no whole number; a label map must not be interpolated or a probability")
    if low >= 0 and high <= np.iinfo(np.uint16).max:
        index = whole.astype(np.uint16)
        places = there = np.flatnonzero(np.bincount(index.ravel()))
    else:
        there, index = np.unique(whole, return_inverse=True)
        places = np.arange(len(there))
    present = there.astype(int).tolist()
    if unknown := set(present) - set(values):
        found, known = (", ".join(map(str, sorted(some))) for some in (unknown, values))
        raise UserError(
            f"labels {found}, and {known} are expected; correct the label map, or name all values with the "
            "converter 'pattern'"
        )
    table = np.zeros(places.max(initial=0) + 1, np.uint8 if max(values.values()) < 256 else np.uint16)
    table[places] = [values[value] for value in present]
    return table[index].reshape(labels.shape)


def with_labels(loaded: Loaded, values: Mapping[int, int], irregular: Mapping[int, str]) -> tuple[Loaded, np.ndarray]:
    """A label map with the data set's labels, and those (sorted) that it has.

    Raises:
        UserError: see :func:`remap_labels`, with the file's name.
    """
    array = SimpleITK.GetArrayFromImage(loaded.image)
    try:
        labels = remap_labels(array, values)
    except UserError as error:
        raise UserError(f"{loaded.file}: {error}") from error
    present = np.flatnonzero(np.bincount(labels.ravel()))
    if array.dtype.kind in "iu" and np.array_equal(labels, array):
        return loaded, present
    image = SimpleITK.GetImageFromArray(labels)
    image.CopyInformation(loaded.image)
    known = [text for value, text in irregular.items() if (array == value).any()]
    how = "labels stored as whole numbers" if np.array_equal(labels, np.rint(array)) else "labels renumbered"
    return loaded.changed(image, how, *known), present


def on_grid(loaded: Loaded, reference: Loaded, resample: bool, is_label: bool) -> Loaded:
    """An image on the grid of another: as it is, with the other's header (rounding), or resampled.

    Images are interpolated linearly, and have their smallest value where they do not reach; label maps take the nearest
    voxel.

    Raises:
        UserError: it lies on another grid and is not to be resampled, or they do not overlap.
    """
    image, grid = loaded.image, reference.image
    if image.GetSize() == grid.GetSize() and _grid(image) == _grid(grid):
        return loaded
    difference = "different numbers of dimensions"
    if image.GetDimension() == grid.GetDimension():
        sizes = grid.GetSize(), image.GetSize()
        difference = geometry_difference("the grid", sizes[0], _grid(grid), "it", sizes[1], _grid(image))
        if not difference:
            image = SimpleITK.Image(image)
            image.CopyInformation(grid)
            return loaded.changed(image, "header differed by rounding")
    if not resample or image.GetDimension() != grid.GetDimension():
        raise UserError(
            f"{loaded.file} lies on another grid than {reference.file}: {difference}; --resample puts all images of a "
            "case on one"
        )
    there = SimpleITK.Image(image.GetSize(), SimpleITK.sitkUInt8) + 1
    there.CopyInformation(image)
    nearest = SimpleITK.Transform(), SimpleITK.sitkNearestNeighbor, 0.0
    if not SimpleITK.GetArrayFromImage(SimpleITK.Resample(there, grid, *nearest)).any():
        raise UserError(f"{loaded.file} has nothing in common with the grid of {reference.file}; check their origins")
    how = f"resampled from {_words(image)} to {_words(grid)}"
    if not is_label:
        outside = float(SimpleITK.GetArrayViewFromImage(image).min())
        result = SimpleITK.Resample(image, grid, SimpleITK.Transform(), SimpleITK.sitkLinear, outside)
        return loaded.changed(result, how)
    result = SimpleITK.Resample(image, grid, *nearest)
    before, after = (set(np.unique(SimpleITK.GetArrayViewFromImage(i)).tolist()) for i in (image, result))
    lost = [f"label {value:g} lost by resampling" for value in sorted(before - after)]
    return loaded.changed(result, how, *lost)


def _grid(image: SimpleITK.Image) -> dict[str, Any]:
    return {
        "spacing": image.GetSpacing(),
        "sitk_stuff": {"origin": image.GetOrigin(), "direction": image.GetDirection()},
    }


def _words(image: SimpleITK.Image) -> str:
    size, spacing = (" x ".join(f"{n:.4g}" for n in numbers) for numbers in (image.GetSize(), image.GetSpacing()))
    return f"{size} voxels of {spacing} mm"


def scaling(file: Path) -> str:
    """What a NIfTI header says of the scale of stored integers, in words; empty if it does nothing."""
    if not file.name.lower().endswith(NIFTI):
        return ""
    header: Any = nibabel.load(file)
    slope, intercept = header.dataobj.slope, header.dataobj.inter
    if (slope, intercept) == (1, 0):
        return ""
    return (
        f"{file.name}: {header.get_data_dtype()} with slope {slope:g} and intercept {intercept:g}, which readers apply"
    )
