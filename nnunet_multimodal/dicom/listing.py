"""``nnunet-multimodal dicom list``: what series a tree of files has, to write rules for ``dicom import`` by."""

from __future__ import annotations

import argparse
from itertools import groupby

from nnunet_multimodal.dicom.files import Series, find_series
from nnunet_multimodal.dicom.rules import text
from nnunet_multimodal.dicom.stack import stack_slices
from nnunet_multimodal.errors import UserError


def run(args: argparse.Namespace) -> int:
    """Print the series by patient and study; returns the exit status.

    Raises:
        UserError: no such folder, no series, or a damaged file.
    """
    found = find_series(args.folder)
    for study, series in groupby(found.series, key=_study):
        print(study)
        for one in series:
            print(f"  {one}{_problem(one)}")
    print(f"{len(found.series)} series; {len(found.others)} files are not DICOM images")
    return 0


def _problem(series: Series) -> str:
    """Why a series cannot be imported, on a line of its own."""
    try:
        stack_slices(series)
    except UserError as error:
        return f"\n    not to be imported: {str(error).removeprefix(f'{series}: ')}"
    return ""


def _study(series: Series) -> str:
    keys = ("PatientID", "StudyDate", "StudyDescription", "StudyInstanceUID")
    patient, date, what, uid = (text(series.header, key) for key in keys)
    return f"patient {patient!r}, study of {date or 'no date'} {what!r}, {uid}"
