"""HECKTOR: head and neck tumours in PET/CT; ``CASE__CT.nii.gz``, ``CASE__PT.nii.gz`` and ``CASE.nii.gz``.

Of 2022 in ``imagesTr`` and ``labelsTr``, of 2025 and later in a folder for each patient; label 1 is the primary tumour
(GTVp), 2 are lymph nodes (GTVn). CT and PET lie on grids of their own, so this needs --resample. Planning CTs and dose
maps are left alone.
"""

from __future__ import annotations

import re

from nnunet_multimodal.datasets.base import NIFTI, Collector, Request, Source, case_name, list_files
from nnunet_multimodal.errors import UserError

CHANNELS = {"CT": "CT", "PT": "PET"}

_IMAGE = re.compile(rf"(?P<case>.+?)__(?P<part>CT|PT){NIFTI}", re.IGNORECASE)
_LABEL = re.compile(rf"(?P<case>.+?)(?:__gtvt?)?{NIFTI}", re.IGNORECASE)


def read(request: Request) -> Source:
    """The cases of a HECKTOR download.

    Raises:
        UserError: none, or two files of one kind.
    """
    found, rest = Collector(request.path), []
    for file in list_files(request.path):
        if match := _IMAGE.fullmatch(file.name):
            found.add_image(_name(match["case"]), CHANNELS[match["part"].upper()], file)
        else:
            rest.append(file)
    images = {name.casefold() for name in found}
    for file in rest:
        match = _LABEL.fullmatch(file.name)
        if match and case_name(_name(match["case"])).casefold() in images:
            found.add_label(_name(match["case"]), file)
        else:
            found.ignored.append(file)
    cases = tuple(found.case(name) for name in found)
    if not cases:
        raise UserError(f"{request.path} has no file named CASE__CT.nii.gz or CASE__PT.nii.gz")
    return Source(
        name="HECKTOR",
        channels=tuple(CHANNELS.values()),
        labels={"background": 0, "GTVp": 1, "GTVn": 2},
        cases=cases,
        more={"reference": "https://hecktor.grand-challenge.org"},
        ignored=tuple(found.ignored),
    )


def _name(text: str) -> str:
    """CHUM_001 and CHUM-001 are one: the challenge writes both."""
    return text.replace("_", "-")
