"""autoPET (FDG-PET-CT-Lesions of TCIA, as NIfTI): ``PETCT_…/STUDY/CTres.nii.gz``, ``SUV.nii.gz`` and ``SEG.nii.gz``.

``CTres`` is the CT on the PET's grid; without it ``CT`` is taken, which needs --resample. A patient can have several
studies; they stay in one fold.
"""

from __future__ import annotations

from pathlib import Path

from nnunet_multimodal.datasets.base import Collector, Request, Source, case_name, list_files
from nnunet_multimodal.errors import UserError

SIZE = 1014
FILES = {"ctres": "CT", "suv": "PET", "seg": "label map"}
OWN_GRID = "ct"


def read(request: Request) -> Source:
    """The studies of an autoPET download.

    Raises:
        UserError: none, or folders that are not PATIENT/STUDY.
    """
    found, patients = Collector(request.path), {}
    own_grid: dict[str, tuple[str, Path]] = {}
    for file in list_files(request.path):
        name = file.name.lower().removesuffix(".gz").removesuffix(".nii")
        if name == file.name.lower() or name not in (*FILES, OWN_GRID):
            found.ignored.append(file)
            continue
        if len(file.parts) < 3:
            raise UserError(f"{request.path / file} is not in PATIENT/STUDY/; name the folder that holds the patients")
        case = "_".join(file.parts[-3:-1])
        patients[case_name(case).casefold()] = file.parts[-3]
        if name == OWN_GRID:
            own_grid[case_name(case).casefold()] = case, file
        elif FILES[name] == "label map":
            found.add_label(case, file)
        else:
            found.add_image(case, FILES[name], file)
    remarks = _take_unresampled(found, own_grid)
    cases = tuple(found.case(name, group=patients[name.casefold()], remarks=remarks.get(name, ())) for name in found)
    if not cases:
        raise UserError(
            f"{request.path} has no SUV.nii.gz in PATIENT/STUDY/; autoPET III and later come in nnU-Net's format, for "
            "which there is nothing to convert"
        )
    return Source(
        name="autoPET",
        channels=("CT", "PET"),
        labels={"background": 0, "lesion": 1},
        cases=cases,
        more={"reference": "https://doi.org/10.7937/gkr0-xv29"},
        remarks=(f"autoPET has {SIZE} studies, and here are {len(cases)}",) if len(cases) != SIZE else (),
        ignored=tuple(found.ignored),
    )


def _take_unresampled(found: Collector, own_grid: dict[str, tuple[str, Path]]) -> dict[str, tuple[str, ...]]:
    """Give studies without CTres the CT on its own grid."""
    remarks: dict[str, tuple[str, ...]] = {}
    for name in found:
        case, file = own_grid.pop(name.casefold(), ("", None))
        if file and "CT" not in found.case(name).images:
            found.add_image(case, "CT", file)
            remarks[name] = ("no CTres, so its CT",)
        elif file:
            found.ignored.append(file)
    found.ignored += [file for _, file in own_grid.values()]
    return remarks
