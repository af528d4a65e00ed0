"""DICOM series to nnU-Net's images, and predictions back to DICOM. Research only: not a medical device.

  nnunet-multimodal dicom list DOWNLOAD
  nnunet-multimodal dicom import DOWNLOAD -o images --channels CT='Modality==CT' PET='Modality==PT' --suv --resample CT
  nnunet-multimodal predict -i images -o predictions …
  nnunet-multimodal dicom export predictions -i images --series DOWNLOAD -o objects -tr SSNTrainer

list shows the series of a tree of files. import writes CASE_0000.nii.gz, CASE_0001.nii.gz, … and CASE.json, which says
what they come from. export writes the label map as DICOM-SEG and the uncertainty maps as parametric maps, on the
slices of the series that was imported. Needs pydicom and highdicom: pip install 'nnunet-multimodal[dicom]'
"""

from __future__ import annotations

import argparse
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from nnunet_multimodal.errors import UserError
from nnunet_multimodal.inference.maps import MAPS

# action -> module with run(args) -> exit status
ACTIONS = {"list": "listing", "import": "to_nifti", "export": "to_dicom"}
CASE = "{PatientID}_{StudyDate}"
SYNTAX = """A condition is ATTRIBUTE==VALUE, ATTRIBUTE!=VALUE, ATTRIBUTE~REGEX or ATTRIBUTE!~REGEX, and several
are joined with &. ATTRIBUTE is a DICOM keyword. Values are compared as numbers where both are, and without
regard to case; a regular expression may match anywhere. Several values of an attribute are one text with \\
between them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The three actions and their flags."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="the series of a tree of files")
    listing.add_argument("folder", type=Path, metavar="FOLDER", help="files in any tree, with or without .dcm")
    _add_import(
        actions.add_parser("import", help="series to CASE_0000.nii.gz, …", epilog=SYNTAX),
    )
    _add_export(actions.add_parser("export", help="predictions to DICOM-SEG and parametric maps"))


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="files in any tree, with or without .dcm")
    parser.add_argument("-o", type=Path, required=True, metavar="FOLDER", help="where the images go")
    parser.add_argument(
        "--channels",
        nargs="+",
        required=True,
        metavar="NAME=CONDITION",
        help="which series is which modality, in nnU-Net's order (_0000 first): CT='Modality==CT & SliceThickness==2'",
    )
    parser.add_argument(
        "--case",
        default=CASE,
        metavar="TEMPLATE",
        help=f"series with the same of this are a case, and so it is called (default: {CASE})",
    )
    parser.add_argument("--resample", metavar="NAME", help="put all images of a case on the grid of this channel")
    parser.add_argument("--suv", action="store_true", help="PET as standardised uptake value by body weight, g/ml")
    parser.add_argument(
        "--incomplete",
        choices=("keep", "drop", "error"),
        default="error",
        help="cases without a modality: write what is there, leave out, or stop (default: error)",
    )
    parser.add_argument(
        "--any-frame-of-reference",
        action="store_true",
        help="take images of a case that the scanner did not place in one coordinate system, such as registered ones",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace cases that are there")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("predictions", type=Path, metavar="PREDICTIONS", help="folder of label maps")
    parser.add_argument(
        "-i", type=Path, required=True, metavar="FOLDER", help="the images that were predicted, as import wrote them"
    )
    parser.add_argument("--series", type=Path, required=True, metavar="FOLDER", help="the DICOM files, as for import")
    parser.add_argument("-o", type=Path, required=True, metavar="FOLDER", help="where the objects go")
    parser.add_argument("-tr", required=True, metavar="TRAINER", help="what predicted; objects name it")
    parser.add_argument("-c", metavar="CONFIGURATION", help="likewise")
    parser.add_argument("--channel", metavar="NAME", help="whose series objects refer to (default: first on the grid)")
    parser.add_argument(
        "--codes", type=Path, metavar="FILE", help="JSON: what each label is, in coded concepts (default: generic)"
    )
    parser.add_argument(
        "--maps", nargs="*", choices=MAPS, help="which uncertainty maps (default: those of PREDICTIONS/uncertainty)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace objects that are there")


def run(args: argparse.Namespace) -> int:
    """Run an action; returns the exit status.

    Raises:
        UserError: the extra is not installed, or what the action raises.
    """
    lacking = [name for name in ("pydicom", "highdicom") if find_spec(name) is None]
    if lacking:
        raise UserError(f"{' and '.join(lacking)} not there: pip install 'nnunet-multimodal[dicom]'")
    return import_module(f"nnunet_multimodal.dicom.{ACTIONS[args.action]}").run(args)
