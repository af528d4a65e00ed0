"""DICOM files of any tree, sorted into series by their headers; no pixel is read here."""

from __future__ import annotations

import filecmp
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom
from pydicom.errors import InvalidDicomError
from tqdm import tqdm

from nnunet_multimodal.datasets.base import list_files
from nnunet_multimodal.errors import UserError
from nnunet_multimodal.images import unreadable

# what is kept of every file; attributes of the series are read from its first file
TAGS = [
    "SOPInstanceUID", "SeriesInstanceUID", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "Rows",
    "Columns", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient", "FrameOfReferenceUID",
]  # fmt: skip


@dataclass(frozen=True)
class Slice:
    """A file with one image.

    Attributes:
        file: where it is.
        uid: its SOPInstanceUID.
        transfer_syntax: how its pixels are stored.
        frames: images in it.
        grey: whether larger values are brighter and there are no colours.
        shape: rows and columns.
        spacing_mm: between rows and between columns; empty if the header lacks it.
        position_mm: of the first voxel's centre, in DICOM's LPS; empty likewise.
        orientation: directions of a row and of a column, LPS; empty likewise.
        frame_of_reference: of its coordinates; empty likewise.
    """

    file: Path
    uid: str
    transfer_syntax: str
    frames: int
    grey: bool
    shape: tuple[int, int]
    spacing_mm: tuple[float, ...]
    position_mm: tuple[float, ...]
    orientation: tuple[float, ...]
    frame_of_reference: str


@dataclass(frozen=True)
class Series:
    """The files of one SeriesInstanceUID.

    Attributes:
        uid: its SeriesInstanceUID.
        header: of its first file, without pixels.
        slices: its images, in the order of their files.
        remarks: what was irregular about its files, in words.
    """

    uid: str
    header: pydicom.Dataset
    slices: tuple[Slice, ...]
    remarks: tuple[str, ...] = ()

    def __str__(self) -> str:
        """A line that tells it from others."""
        header = self.header
        what = [str(header.get(key) or "") for key in ("Modality", "SeriesNumber", "SeriesDescription")]
        return f"{what[0]:3} series {what[1]:>4} {what[2]!r}, {len(self.slices)} files, {self.uid}"


@dataclass(frozen=True)
class Found:
    """What a tree holds.

    Attributes:
        series: with images, by patient, study and number.
        others: files that are not DICOM, DICOMDIR, or objects without an image.
    """

    series: tuple[Series, ...]
    others: tuple[Path, ...]


def find_series(folder: Path) -> Found:
    """All series below a folder.

    Raises:
        UserError: there is no such folder, no series, a damaged file, or two files of one instance that differ.
    """
    members: dict[str, list[Slice]] = {}
    others = []
    for relative in tqdm(list_files(folder), desc="read headers", unit="file"):
        file = folder / relative
        header = read_header(file, TAGS)
        if header is None or not all(header.get(key) for key in ("SeriesInstanceUID", "SOPInstanceUID", "Rows")):
            others.append(file)
            continue
        members.setdefault(str(header.SeriesInstanceUID), []).append(_slice(file, header))
    if not members:
        raise UserError(f"{folder}: no DICOM image among {len(others)} files; name the folder that holds the series")
    series = [_series(uid, slices) for uid, slices in members.items()]
    keys = ("PatientID", "StudyDate", "StudyInstanceUID", "Modality")
    series.sort(
        key=lambda s: ([str(s.header.get(key) or "") for key in keys], s.header.get("SeriesNumber") or 0, s.uid)
    )
    return Found(tuple(series), tuple(others))


def read_header(file: Path, tags: list[str] | None = None) -> pydicom.Dataset | None:
    """A file's header without its pixels; None if it is not DICOM.

    Args:
        file: of DICOM's file format, which has ``DICM`` after 128 bytes.
        tags: keywords of what to read; all if None.

    Raises:
        UserError: it is DICOM and damaged.
    """
    try:
        return pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags)
    except InvalidDicomError:
        return None
    except Exception as error:  # whatever a damaged file makes pydicom raise
        raise unreadable(file, error) from error


def read_headers(slices: Sequence[Slice]) -> list[pydicom.Dataset]:
    """The whole headers of slices, in their order.

    Raises:
        UserError: a file is no longer there, or damaged.
    """
    headers = [read_header(part.file) for part in slices]
    gone = [part.file for part, header in zip(slices, headers, strict=True) if header is None]
    if gone:
        raise UserError(f"{gone[0]} was DICOM and is not any more; copy it again")
    return [header for header in headers if header is not None]


def _slice(file: Path, header: pydicom.Dataset) -> Slice:
    def numbers(keyword: str) -> tuple[float, ...]:
        value: Any = header.get(keyword)
        return () if value is None else tuple(map(float, value))

    try:
        return Slice(
            file=file,
            uid=str(header.SOPInstanceUID),
            transfer_syntax=str(header.file_meta.get("TransferSyntaxUID", "")),
            frames=int(header.get("NumberOfFrames") or 1),
            grey=int(header.get("SamplesPerPixel") or 1) == 1
            and header.get("PhotometricInterpretation", "") == "MONOCHROME2",
            shape=(int(header.Rows), int(header.get("Columns") or 0)),
            spacing_mm=numbers("PixelSpacing"),
            position_mm=numbers("ImagePositionPatient"),
            orientation=numbers("ImageOrientationPatient"),
            frame_of_reference=str(header.get("FrameOfReferenceUID") or ""),
        )
    except (TypeError, ValueError) as error:  # text where numbers belong
        raise unreadable(file, error) from error


def _series(uid: str, slices: Sequence[Slice]) -> Series:
    """A series, in which a file that lies there twice counts once."""
    first: dict[str, Slice] = {}
    for part in slices:
        other = first.setdefault(part.uid, part)
        if other is not part and not filecmp.cmp(other.file, part.file, shallow=False):
            raise UserError(
                f"{other.file} and {part.file} have one SOPInstanceUID ({part.uid}) and differ; move one away"
            )
    twice = len(slices) - len(first)
    header = read_headers(slices[:1])[0]
    return Series(uid, header, tuple(first.values()), (f"{twice} files are there twice",) if twice else ())
