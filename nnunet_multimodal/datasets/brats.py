"""BraTS: gliomas in FLAIR, T1, T1CE and T2; of 2017 to 2021, and of 2023 and later.

Names of 2017 to 2021 are ``CASE/CASE_flair.nii.gz`` (``t1``, ``t1ce``, ``t2``, ``seg``), in 2017 to 2019 below
``HGG`` and ``LGG``; label 4 is enhancing tumour and becomes 3. From 2023 on they are ``CASE/CASE-t2f.nii.gz`` (``t1n``,
``t1c``, ``t2w``, ``seg``), and enhancing tumour is 3 already. Labels 1 (necrosis, not enhancing) and 2 (oedema) stay
what they are. Label 4 of 2023 and later has several meanings; ``--labels`` names it and keeps it.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from nnunet_multimodal.datasets.base import (
    IGNORE,
    NIFTI,
    TEST,
    Collector,
    Request,
    Source,
    case_name,
    list_files,
    parse_named,
)
from nnunet_multimodal.decomposition import KEY
from nnunet_multimodal.errors import UserError

CHANNELS = ("FLAIR", "T1", "T1CE", "T2")
LABELS: dict[str, int | tuple[int, ...]] = {
    "background": 0,
    "whole tumor": (1, 2, 3),
    "tumor core": (1, 3),
    "enhancing tumor": 3,
}
CLASS_ORDER = (2, 1, 3)  # what of the whole is not core is oedema, what of the core does not enhance is necrosis
# the paper's best, its Table 6
DECOMPOSITION = {
    "FLAIR": ["whole tumor"],
    "T1": ["tumor core"],
    "T2": ["whole tumor", "tumor core"],
    "T1CE": ["tumor core", "enhancing tumor"],
}
OLD = {"flair": "FLAIR", "t1": "T1", "t1ce": "T1CE", "t2": "T2", "seg": "seg"}
NEW = {"t2f": "FLAIR", "t1n": "T1", "t1c": "T1CE", "t2w": "T2", "seg": "seg"}
OLD_VALUES, NEW_VALUES = {0: 0, 1: 1, 2: 2, 4: 3}, {0: 0, 1: 1, 2: 2, 3: 3}
FOURTH = 4
ADVICE = "label 4 of adult gliomas of 2024 is the resection cavity: keep it by --labels 'resection cavity=4'"
SIZES = {"Brats17": 285, "Brats18": 285, "BraTS19": 335, "BraTS20": 369, "BraTS2021": 1251}  # training cases

_OLD = re.compile(rf"(?P<case>.+)_(?P<part>{'|'.join(OLD)}){NIFTI}", re.IGNORECASE)
_NEW = re.compile(rf"(?P<case>.+)-(?P<part>{'|'.join(NEW)}){NIFTI}", re.IGNORECASE)
# case 355 of 2020 has its label map as W39_1998.09.19_Segm.nii
_MISNAMED = re.compile(rf".+_segm{NIFTI}", re.IGNORECASE)


def read(request: Request) -> Source:
    """The cases of a BraTS download.

    Raises:
        UserError: none, two files of one kind, both namings in one case, or --labels that name anything but label 4 of
            2023 and later.
    """
    fourth = _name_fourth(request.labels)
    found = Collector(request.path)
    is_new: dict[str, bool] = {}
    misnamed: dict[str, list[Path]] = {}
    for file in list_files(request.path):
        new = _NEW.fullmatch(file.name)
        if match := new or _OLD.fullmatch(file.name):
            name, kind = match["case"], (NEW if new else OLD)[match["part"].lower()]
            case = found.add_label(name, file) if kind == "seg" else found.add_image(name, kind, file)
            if is_new.setdefault(case.casefold(), bool(new)) != bool(new):
                raise UserError(f"{request.path / file}: {case} has names of before and after 2023; move one away")
        elif _MISNAMED.fullmatch(file.name):
            misnamed.setdefault(case_name(file.parent.name).casefold(), []).append(file)
        else:
            found.ignored.append(file)
    remarks = _take_misnamed(found, misnamed)
    cases = []
    for name in found:
        after_2022 = is_new[name.casefold()]
        cases.append(
            found.case(
                name,
                group=re.sub(r"-\d{3}$", "", name) if after_2022 else "",  # a patient's time points
                values=NEW_VALUES | dict.fromkeys(fourth.values(), FOURTH) if after_2022 else OLD_VALUES,
                remarks=remarks.get(name.casefold(), ()),
            )
        )
    if not cases:
        raise UserError(
            f"{request.path} has no file named CASE_flair.nii.gz or CASE-t2f.nii.gz; for other names there is the "
            "converter 'pattern'"
        )
    if fourth and not all(is_new.values()):
        raise UserError(f"--labels names label 4 of 2023 and later; {request.path} has cases of before")
    return Source(
        name="BraTS",
        channels=CHANNELS,
        labels={**LABELS, **fourth},
        regions_class_order=(*CLASS_ORDER, *(label for name, label in fourth.items() if name != IGNORE)),
        cases=tuple(cases),
        # it must name every region, and the paper knows three
        more={} if fourth else {"nnunet_multimodal": {KEY: DECOMPOSITION}},
        advice=ADVICE if any(is_new.values()) and not fourth else "",
        remarks=_check_sizes(Counter(case.name.split("_")[0].casefold() for case in cases if case.split != TEST)),
        ignored=tuple(found.ignored),
    )


def _name_fourth(texts: tuple[str, ...]) -> dict[str, int]:
    """``NAME=4`` as a label; nothing if there is none.

    Raises:
        UserError: anything else, or the name of a region.
    """
    if not texts:
        return {}
    named = parse_named(texts, "--labels")
    if list(named.values()) != [str(FOURTH)] or set(named) & set(LABELS):
        raise UserError(f"--labels {' '.join(texts)}: brats takes a new name for label 4, 'resection cavity=4'")
    return dict.fromkeys(named, FOURTH)


def _take_misnamed(found: Collector, misnamed: dict[str, list[Path]]) -> dict[str, tuple[str, ...]]:
    """Give cases without a label map the one that lies in their folder under a name of its own."""
    remarks: dict[str, tuple[str, ...]] = {}
    for name in found:
        candidates = misnamed.pop(name.casefold(), [])
        if len(candidates) == 1 and not found.case(name).label:
            found.add_label(candidates[0].parent.name, candidates[0])
            remarks[name.casefold()] = (f"its label map is called {candidates[0].name}",)
        else:
            found.ignored += candidates
    found.ignored += [file for files in misnamed.values() for file in files]
    return remarks


def _check_sizes(counts: Counter[str]) -> tuple[str, ...]:
    """What a download has more or less than it should."""
    return tuple(
        f"{prefix} has {size} training cases, and here are {counts[prefix.casefold()]}"
        for prefix, size in SIZES.items()
        if counts[prefix.casefold()] not in (0, size)
    )
