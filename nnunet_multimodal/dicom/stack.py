"""A series as a volume: what keeps its slices from being one, their order, their grid and their values.

The grid follows from ImagePositionPatient and ImageOrientationPatient alone, as DICOM says (PS3.3 C.7.6.2):
InstanceNumber, SliceLocation, SliceThickness and names of files do not count. Slices are sorted along the normal of the
image plane (the cross product of row and column), so that the axes are right-handed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import SimpleITK
from pydicom.uid import UID

from nnunet_multimodal.dicom.files import Series, Slice
from nnunet_multimodal.errors import UserError
from nnunet_multimodal.images import check_finite, unreadable

TOLERANCE_MM = 0.1  # positions rounded to one digit are off by up to 0.05 each
TILT = 1e-3  # sine of the angle between the stack and the normal of its slices
COSINES = 1e-3  # between the directions of slices, and of rows and columns
# what GDCM, which SimpleITK reads with, decodes; tried with SimpleITK 2.5.7 against other decoders. Newer versions read
# more, such as high-throughput JPEG 2000
READABLE = {
    "1.2.840.10008.1.2",  # implicit VR little endian
    "1.2.840.10008.1.2.1",  # explicit VR little endian
    "1.2.840.10008.1.2.2",  # explicit VR big endian
    "1.2.840.10008.1.2.1.99",  # deflated
    "1.2.840.10008.1.2.5",  # RLE
    "1.2.840.10008.1.2.4.50",  # JPEG baseline, 8 bits
    "1.2.840.10008.1.2.4.51",  # JPEG extended, 12 bits
    "1.2.840.10008.1.2.4.57",  # JPEG lossless
    "1.2.840.10008.1.2.4.70",  # JPEG lossless, first-order prediction
    "1.2.840.10008.1.2.4.80",  # JPEG-LS lossless
    "1.2.840.10008.1.2.4.81",  # JPEG-LS near-lossless
    "1.2.840.10008.1.2.4.90",  # JPEG 2000 lossless
    "1.2.840.10008.1.2.4.91",  # JPEG 2000
}


@dataclass(frozen=True)
class Stack:
    """A series whose slices make a volume.

    Attributes:
        series: where it comes from.
        slices: in the order of the volume's last axis.
        size: voxels along x (columns), y (rows) and z (slices).
        spacing_mm: in the same order.
        origin_mm: centre of the first voxel, LPS.
        direction: unit vectors of x, y and z as the columns of a matrix, row by row, as ITK has them.
    """

    series: Series
    slices: tuple[Slice, ...]
    size: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float]
    direction: tuple[float, ...]

    @property
    def geometry(self) -> Mapping[str, Any]:
        """As nnU-Net's reader tells it, for ``geometry_difference``."""
        return {
            "spacing": self.spacing_mm,
            "sitk_stuff": {"origin": self.origin_mm, "direction": self.direction},
        }


def stack_slices(series: Series) -> Stack:
    """Sort a series' slices and work out their grid.

    Raises:
        UserError: they are no volume on a regular grid, or GDCM cannot read them; the series is named.
    """
    try:
        _check_files(series)
        orientation = _directions(series)
        return _regular(series, orientation)
    except UserError as error:
        raise UserError(f"{series}: {error}") from error


def read_stack(stack: Stack) -> SimpleITK.Image:
    """The values of a volume after each slice's own rescaling, as integers or float32.

    Slices are read one by one: of a series, ITK takes the type of the first slice for all, which cuts off fractions
    where the scale differs between slices, as in PET.

    Raises:
        UserError: a file cannot be read, is cut off, or its pixels are not those of its header.
    """
    arrays = []
    for part in stack.slices:
        try:
            array = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(part.file), imageIO="GDCMImageIO"))
        except RuntimeError as error:
            raise unreadable(part.file, error) from error
        if array.shape != (1, *part.shape):
            raise UserError(f"{part.file} has pixels of shape {array.shape}, and {part.shape} in its header")
        arrays.append(array[0])
    volume = np.stack(arrays)  # (z, y, x)
    if volume.dtype.kind == "f":
        volume = volume.astype(np.float32)
        check_finite(stack.slices[0].file.parent, volume)
    elif _fits(volume, np.int16):  # GDCM takes 32 bits where an intercept might need them
        volume = volume.astype(np.int16)
    image = SimpleITK.GetImageFromArray(volume)
    image.SetSpacing(stack.spacing_mm)
    image.SetOrigin(stack.origin_mm)
    image.SetDirection(stack.direction)
    return image


def _fits(volume: np.ndarray, dtype: type) -> bool:
    limits = np.iinfo(dtype)
    return bool(limits.min <= volume.min() and volume.max() <= limits.max)


def _check_files(series: Series) -> None:
    """Refuse files that are not one slice of grey values each, of one size, that GDCM reads."""
    for part in series.slices:
        if part.frames > 1:
            raise UserError(
                f"{part.file.name} has {part.frames} images in one file (multi-frame, enhanced), which is not read "
                "here; convert it with dcm2niix, or export it from the archive as one file for each slice"
            )
        if not part.grey:
            raise UserError(f"{part.file.name} has colours or inverted grey values, not MONOCHROME2; it is no volume")
        if part.transfer_syntax not in READABLE:
            name = UID(part.transfer_syntax).name or "none"
            raise UserError(f"{part.file.name} is stored as {name}, which SimpleITK does not read; decompress it first")
        if len(part.spacing_mm) != 2 or len(part.position_mm) != 3 or len(part.orientation) != 6:
            raise UserError(
                f"{part.file.name} lacks PixelSpacing, ImagePositionPatient or ImageOrientationPatient; nobody can "
                "tell where it is"
            )
    for what in ("shape", "spacing_mm"):
        values = np.array([getattr(part, what) for part in series.slices])
        if (np.ptp(values, axis=0) > 1e-4 * values.max()).any():
            low, high = values.min(0).tolist(), values.max(0).tolist()
            raise UserError(f"its slices have different {what}: from {low} to {high}; move the others away")
    if len(series.slices) < 2:
        raise UserError("it has one slice, which is no volume")


def _directions(series: Series) -> np.ndarray:
    """Orthonormal directions (3, 3) of x, y and z, as columns."""
    orientations = np.array([part.orientation for part in series.slices])
    different = np.abs(orientations - orientations[0]).max(1) > COSINES
    if different.any():
        raise UserError(
            f"its slices have mixed orientations, {different.sum()} of {len(different)} unlike the first (a localiser, "
            f"or several stacks in one series): {series.slices[int(different.argmax())].file.name}; move them away"
        )
    row, column = orientations[0, :3], orientations[0, 3:]
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if not np.allclose(lengths, 1, atol=COSINES) or abs(row @ column) > COSINES:
        raise UserError(f"ImageOrientationPatient {orientations[0].tolist()} is not two unit vectors at right angles")
    row = row / lengths[0]
    column = column - (column @ row) * row  # rounded in the file, and ITK wants right angles
    column = column / np.linalg.norm(column)
    return np.stack([row, column, np.cross(row, column)], axis=1)


def _regular(series: Series, directions: np.ndarray) -> Stack:
    """The grid of slices that lie at equal steps along their normal."""
    normal = directions[:, 2]
    slices = sorted(series.slices, key=lambda part: float(np.array(part.position_mm) @ normal))
    positions = np.array([part.position_mm for part in slices])
    heights = positions @ normal
    gaps = np.diff(heights)
    spacing = float(np.median(gaps))
    tolerance = min(TOLERANCE_MM, max(spacing, 0.0) / 10)
    _check_duplicates(slices, gaps, max(tolerance, 1e-3))
    step = (positions[-1] - positions[0]) / len(gaps)
    aside = np.linalg.norm(step - (step @ normal) * normal) / np.linalg.norm(step)
    if aside > TILT:
        angle = np.degrees(np.arcsin(aside))
        raise UserError(
            f"its slices are shifted against each other, {angle:.2f} degrees (GantryDetectorTilt: "
            f"{series.header.get('GantryDetectorTilt', 'not given')}); dcm2niix straightens such series"
        )
    off = np.linalg.norm(positions - positions[0] - np.arange(len(slices))[:, None] * step, axis=1)
    if off.max() > tolerance:
        raise UserError(_irregular(slices, heights, gaps, spacing, tolerance))
    first = slices[0]
    return Stack(
        series=series,
        slices=tuple(slices),
        size=(first.shape[1], first.shape[0], len(slices)),
        spacing_mm=(first.spacing_mm[1], first.spacing_mm[0], float(step @ normal)),
        origin_mm=(first.position_mm[0], first.position_mm[1], first.position_mm[2]),
        direction=tuple(directions.ravel().tolist()),
    )


def _check_duplicates(slices: list[Slice], gaps: np.ndarray, tolerance: float) -> None:
    same = np.flatnonzero(gaps <= tolerance)
    if same.size:
        a, b = slices[same[0]], slices[same[0] + 1]
        raise UserError(
            f"{same.size} positions have several slices, such as {a.position_mm} in {a.file.name} and {b.file.name}: "
            "several time points, echoes or reconstructions in one series; keep the files of one of them"
        )


def _irregular(slices: list[Slice], heights: np.ndarray, gaps: np.ndarray, spacing: float, tolerance: float) -> str:
    """What is wrong with the steps between slices, in words."""
    steps = np.rint(gaps / spacing)
    holes = np.flatnonzero((steps > 1) & (np.abs(gaps - steps * spacing) <= steps * tolerance))
    if holes.size:
        missing = int((steps[holes] - 1).sum())
        where = f"{heights[holes[0]]:.2f} and {heights[holes[0] + 1]:.2f} mm"
        return (
            f"{missing} slices are missing, the first between {where} along the normal ({slices[holes[0]].file.name}, "
            f"{slices[holes[0] + 1].file.name}); copy the series again"
        )
    return (
        f"its slices lie {gaps.min():.3f} to {gaps.max():.3f} mm apart, which is no regular grid; resample the series "
        "with other software, or use one with equal spacing"
    )
