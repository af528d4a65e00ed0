"""One self-contained HTML page from what training, predict, evaluate and explain left on disk.

  nnunet-multimodal report $nnUNet_results/Dataset001_BraTS predictions explained -i imagesTs -o report.html

RESULTS are folders, searched a few folders deep, for

  TRAINER__PLANS__CONFIGURATION    trained models: training curves, nnU-Net's validation, plans
  predictions                      label maps, CASE.json, samples/, uncertainty/, evaluation.json or summary.json
  subsets.csv                      of evaluate --all-subsets
  contributions.csv, …             of explain, and the folders of uncertainty

or an evaluation's JSON that lies elsewhere. What is not there is left out, and the page says so. References and raters
are those that the evaluations name, or of -ref and --raters.

The page needs no network and no other file. It holds small copies of the cases' images (how small, it says): who may
not see the images may not see the page.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nnunet_multimodal.errors import UserError
from nnunet_multimodal.files import write_text
from nnunet_multimodal.report.gather import Study, gather_study
from nnunet_multimodal.report.page import render
from nnunet_multimodal.report.volumes import encode_case, read_case

SAMPLES, MEGABYTES = 8, 24.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the page is made of, and how large it may be."""
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="folders, or an evaluation's JSON")
    parser.add_argument("-o", required=True, type=Path, metavar="FILE.html", help="the page")
    parser.add_argument("-i", type=Path, metavar="FOLDER", help="images of the predicted cases")
    parser.add_argument("-ref", type=Path, metavar="FOLDER", help="references (default: those of the evaluations)")
    parser.add_argument(
        "--raters", type=Path, metavar="FOLDER", help="CASE__NAME files (default: those of the evaluations)"
    )
    parser.add_argument("--title", default="Segmentation report", help="of the page (default: Segmentation report)")
    parser.add_argument(
        "--samples", type=int, default=SAMPLES, metavar="S", help=f"of a case that are shown (default: {SAMPLES})"
    )
    parser.add_argument(
        "--megabytes", type=float, default=MEGABYTES, help=f"of all cases' pictures, at most (default: {MEGABYTES:g})"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the page that is there")


def run(args: argparse.Namespace) -> int:
    """Write the page; returns the exit status.

    Raises:
        UserError: the page is there already, a flag is out of its range, or what :func:`gather_study` and
            :func:`read_case` refuse. Nothing has been written then.
    """
    if args.o.suffix != ".html" or not args.o.parent.is_dir():
        raise UserError(f"-o {args.o}: give a name that ends in .html, in a folder that is there")
    if args.o.exists() and not args.overwrite:
        raise UserError(f"{args.o} is there already; name another file, or give --overwrite")
    if args.samples < 0 or not args.megabytes > 0:
        raise UserError(f"--samples {args.samples}, --megabytes {args.megabytes}: give at least 0, and more than 0")
    study = gather_study(args.results, args.i, args.ref, args.raters)
    views = read_views(study, args.samples, args.megabytes)
    write_text(args.o, render(study, views, args.title))
    print(f"{args.o}: {len(study.cases)} cases, {args.o.stat().st_size / 1e6:.1f} MB")
    return 0


def read_views(study: Study, samples: int, megabytes: float) -> list[dict[str, Any]]:
    """Every case's pictures, which share the megabytes evenly."""
    cases = [case for case in study.cases if any(case in run.files for run in study.predictions)]
    views = []
    for case in tqdm(cases, desc="report", unit="case"):
        volumes = read_case(study, case, samples)
        assert volumes is not None
        views.append(encode_case(volumes, megabytes * 1e6 / len(cases)))
    return views
