"""``nnunet-multimodal``: what nnU-Net has no command for. Each subcommand is a module with two functions."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from nnunet_multimodal import __version__
from nnunet_multimodal.errors import UserError

# subcommand -> module with add_arguments(parser) and run(args) -> exit status, and the line that --help shows
COMMANDS = {
    "doctor": ("nnunet_multimodal.doctor", "check the installation and say what is wrong with it"),
    "demo": ("nnunet_multimodal.demo", "plain nnU-Net and CRNP side by side, on synthetic data or on yours"),
    "convert": ("nnunet_multimodal.convert", "BraTS, PET/CT, LIDC, BIDS and other data to nnU-Net's raw format"),
    "dicom": ("nnunet_multimodal.dicom", "DICOM series to images, predictions to DICOM-SEG and parametric maps"),
    "complete": ("nnunet_multimodal.complete", "placeholders for the modalities that cases lack, and back"),
    "consensus": (
        "nnunet_multimodal.raters.consensus",
        "labelsTr from several raters: majority, STAPLE, or one",
    ),
    "derive": ("nnunet_multimodal.derive", "one plan for several methods, of equal patch and batch size"),
    "train": ("nnunet_multimodal.train", "nnUNetv2_train under torchrun: several machines; with a seed"),
    "predict": ("nnunet_multimodal.inference.predict", "nnUNetv2_predict with samples, uncertainty maps and intervals"),
    "evaluate": ("nnunet_multimodal.evaluate", "Dice, HD95, surface distance, D_GED^2 and calibration of a folder"),
    "postprocess": ("nnunet_multimodal.postprocess", "turn a label that is hardly there into another one"),
    "features": ("nnunet_multimodal.inference.features", "shared and specific features of modalities, and their t-SNE"),
    "explain": (
        "nnunet_multimodal.explain",
        "which modality contributed what, where: maps, weights, pictures",
    ),
    "report": ("nnunet_multimodal.report", "one HTML page of models, cases, samples, calibration and explanations"),
    "sheets": ("nnunet_multimodal.sheets", "pictures of samples, uncertainty, experts and manipulated samples"),
    "uncertainty": ("nnunet_multimodal.inference.uncertainty", "maps of each modality's uncertainty for whole images"),
    "submit": ("nnunet_multimodal.submit", "any of these commands, or nnU-Net's, as jobs of a SLURM cluster"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="nnunet-multimodal", description="Multi-modal segmentation inside nnU-Net.")
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((argument for argument in argv if not argument.startswith("-")), None)
    for name, (module, help_) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=help_, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == chosen:  # importing a command may import torch, which takes seconds
            command = import_module(module)
            subparser.description = command.__doc__
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
    args = parser.parse_args(argv)
    return args.run(args)


def entry_point() -> None:
    """The console script: what a user can mend is said without a traceback."""
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"nnunet-multimodal: {error}")


if __name__ == "__main__":
    entry_point()
