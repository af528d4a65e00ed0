"""MM-WHS 2017: whole hearts in CT or MR, never both of one patient, so one of two channels is absent in every case.

``ct_train/ct_train_1001_image.nii.gz`` and ``…_label.nii.gz``, ``mr_train/…`` alike, test images in ``ct_test`` and
``mr_test``. A value of 421 in the label map of mr_train_1010 is 420.
"""

from __future__ import annotations

import re

from nnunet_multimodal.datasets.base import NIFTI, TEST, Collector, Request, Source, list_files
from nnunet_multimodal.errors import UserError

STRUCTURES = {
    "left ventricle": 500,
    "right ventricle": 600,
    "left atrium": 420,
    "right atrium": 550,
    "left ventricular myocardium": 205,
    "ascending aorta": 820,
    "pulmonary artery": 850,
}
VALUES = {0: 0, **{value: label for label, value in enumerate(STRUCTURES.values(), start=1)}}
STRAY = {421: 420}
SIZE = 20  # training cases of each modality

_FILE = re.compile(
    rf"(?P<case>(?P<channel>ct|mr)_(?P<part>train|test)_\d+)_(?P<kind>image|label){NIFTI}", re.IGNORECASE
)


def read(request: Request) -> Source:
    """The cases of an MM-WHS download.

    Raises:
        UserError: none, or two files of one kind.
    """
    found, channels, tests = Collector(request.path), {}, set()
    for file in list_files(request.path):
        match = _FILE.fullmatch(file.name)
        if match is None:
            found.ignored.append(file)
            continue
        if match["kind"].lower() == "label":
            case = found.add_label(match["case"].lower(), file)
        else:
            case = found.add_image(match["case"].lower(), match["channel"].upper(), file)
        channels[case] = match["channel"].upper()
        tests |= {case} if match["part"].lower() == "test" else set()
    values = {**VALUES, **{stray: VALUES[value] for stray, value in STRAY.items()}}
    cases = tuple(found.case(name, values=values, split=TEST if name in tests else "") for name in found)
    if not cases:
        raise UserError(f"{request.path} has no file named ct_train_1001_image.nii.gz or mr_train_1001_image.nii.gz")
    numbers = {c: sum(channels[case.name] == c and case.split != TEST for case in cases) for c in ("CT", "MR")}
    return Source(
        name="MMWHS",
        channels=("CT", "MR"),
        labels={"background": 0, **{name: label for label, name in enumerate(STRUCTURES, start=1)}},
        cases=cases,
        incomplete="keep",
        irregular={stray: f"{stray} taken for {value}" for stray, value in STRAY.items()},
        more={"reference": "Zhuang and Shen, Medical Image Analysis 31, 2016"},
        remarks=tuple(f"MM-WHS has {SIZE} training cases of {c}, not {n}" for c, n in numbers.items() if n != SIZE),
        ignored=tuple(found.ignored),
    )
