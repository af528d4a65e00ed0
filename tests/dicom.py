"""Synthetic DICOM series, written with pydicom from arrays."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK

from nnunet_multimodal import cli
from nnunet_multimodal.errors import UserError

STORAGE = {"CT": "1.2.840.10008.5.1.4.1.1.2", "MR": "1.2.840.10008.5.1.4.1.1.4", "PT": "1.2.840.10008.5.1.4.1.1.128"}
AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
# rows run along y and columns down -z: the coronal slices that a scanner stores, oblique by 0.1
_OBLIQUE = np.array([np.cos(0.1), np.sin(0.1), 0.0])
OBLIQUE_CORONAL = (tuple(_OBLIQUE.tolist()), (0.0, 0.0, -1.0))
FDG = {
    "Units": "BQML",
    "DecayCorrection": "START",
    "CorrectedImage": ["NORM", "ATTN", "DECY"],
    "PatientWeight": 70,
    "SeriesDate": "20200102",
    "SeriesTime": "110000",
    "AcquisitionDate": "20200102",
    "AcquisitionTime": "110000",
    "RadiopharmaceuticalStartTime": "100000",
    "RadionuclideTotalDose": 350e6,
    "RadionuclideHalfLife": 6586.2,
}
OF_ISOTOPE = (
    "RadiopharmaceuticalStartTime",
    "RadiopharmaceuticalStartDateTime",
    "RadionuclideTotalDose",
    "RadionuclideHalfLife",
)
CT, PET = "CT=Modality==CT", "PET=Modality==PT"
CASE = "P1_20200102"  # of what write_series writes if nothing else is said
ORIGIN = (-31.5, 12.25, 100.75)
SPACING = (3.0, 1.5, 0.75)  # between slices, rows, columns


def uid(*parts: Any) -> str:
    """The same for the same parts."""
    from pydicom.uid import generate_uid

    return str(generate_uid(entropy_srcs=list(map(str, parts))))


def write_series(
    folder: Path,
    stored: np.ndarray,
    modality: str = "CT",
    *,
    slopes: Sequence[float] | float = 1,
    intercept: float = 0,
    orientation: tuple[Sequence[float], Sequence[float]] = AXIAL,
    spacing: Sequence[float] = SPACING,
    origin: Sequence[float] = ORIGIN,
    patient: str = "P1",
    study: str = "20200102",
    number: int = 1,
    names: Callable[[int], str] = lambda index: f"{(index * 7919) % 1000:03d}.dcm",
    change: Callable[[int, Any], None] = lambda index, dataset: None,
    **attributes: Any,
) -> list[Path]:
    """Write a series, a file for each slice; returns the files in the order of the slices.

    Args:
        folder: where it goes.
        stored: (slices, rows, columns), int16 or uint16.
        modality: CT, MR or PT.
        slopes: RescaleSlope, of each slice or of all.
        intercept: RescaleIntercept.
        orientation: directions of rows and columns; slices are stacked along their cross product.
        spacing: between slices, rows and columns, in mm.
        origin: of the first voxel.
        patient: PatientID.
        study: StudyDate.
        number: SeriesNumber.
        names: file of a slice by its index; shuffled if not given.
        change: what is done to a slice's data set before it is written.
        attributes: further ones by keyword; those of the radiopharmaceutical go where they belong.
    """
    from pydicom import Dataset
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    folder.mkdir(parents=True, exist_ok=True)
    row, column = (np.array(direction) for direction in orientation)
    normal = np.cross(row, column)
    slopes = [slopes] * len(stored) if isinstance(slopes, int | float) else slopes
    files = []
    for index, pixels in enumerate(stored):
        dataset = Dataset()
        dataset.SOPClassUID = STORAGE[modality]
        dataset.SOPInstanceUID = uid(patient, study, number, index)
        dataset.SeriesInstanceUID = uid(patient, study, number)
        dataset.StudyInstanceUID = uid(patient, study)
        dataset.FrameOfReferenceUID = uid(patient, study, "frame")
        dataset.PatientID, dataset.PatientName, dataset.PatientSex = patient, "Doe^Synthetic", ""
        dataset.PatientBirthDate = dataset.AccessionNumber = dataset.ReferringPhysicianName = ""
        dataset.StudyID, dataset.StudyDate, dataset.StudyTime = "1", study, "090000"
        dataset.Modality, dataset.SeriesNumber, dataset.SeriesDescription = modality, number, f"{modality} {number}"
        dataset.InstanceNumber = len(stored) - index  # backwards: it says nothing about places
        dataset.ImagePositionPatient = (np.array(origin) + index * spacing[0] * normal).tolist()
        dataset.ImageOrientationPatient = [*row.tolist(), *column.tolist()]
        dataset.PixelSpacing, dataset.SliceThickness = list(spacing[1:]), spacing[0]
        dataset.Rows, dataset.Columns = pixels.shape
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated = dataset.BitsStored = 16
        dataset.HighBit, dataset.PixelRepresentation = 15, int(pixels.dtype == np.int16)
        if modality != "MR":
            dataset.RescaleSlope, dataset.RescaleIntercept = slopes[index], intercept
        dataset.PixelData = pixels.tobytes()
        set_attributes(dataset, attributes)
        change(index, dataset)
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        files.append(folder / names(index))
        dataset.save_as(files[-1], enforce_file_format=True)
    return files


def set_attributes(dataset: Any, attributes: dict[str, Any]) -> None:
    """Set attributes by keyword, those of the radiopharmaceutical in its sequence."""
    from pydicom import Dataset

    isotope = Dataset()
    for keyword, value in attributes.items():
        setattr(isotope if keyword in OF_ISOTOPE else dataset, keyword, value)
    if len(isotope):
        dataset.RadiopharmaceuticalInformationSequence = [isotope]


def volume(shape: Sequence[int] = (6, 5, 4), seed: int = 0, dtype: type = np.int16) -> np.ndarray:
    """Numbers of which no two slices, rows or columns are alike."""
    return np.random.default_rng(seed).integers(0, 2000, shape).astype(dtype)


def voxel_position(index: Sequence[int], orientation=AXIAL, spacing=SPACING, origin=ORIGIN) -> np.ndarray:
    """Where the voxel (slice, row, column) is, in LPS mm, by DICOM's equation (PS3.3 C.7.6.2.1.1)."""
    row, column = (np.array(direction) for direction in orientation)
    along = np.cross(row, column) * index[0] * spacing[0] + column * index[1] * spacing[1] + row * index[2] * spacing[2]
    return np.array(origin) + along


def import_series(root, *arguments):
    """Import root/src to root/out; returns the exit status."""
    return cli.main(["dicom", "import", str(root / "src"), "-o", str(root / "out"), *arguments])


def refused(root, *arguments):
    """What the import says when it refuses; it has written nothing."""
    with pytest.raises(UserError) as error:
        import_series(root, *arguments)
    assert not (root / "out").exists() or not list((root / "out").iterdir())
    return str(error.value)


def values(root, channel=0, case=CASE):
    """An image as (slices, rows, columns)."""
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(root / "out" / f"{case}_{channel:04d}.nii.gz")))
