"""Compare a folder of predictions with a folder of references.

Dice, HD95, normalised surface distance and, where there are samples, raters or probabilities, how well the predicted
distribution agrees with the raters. Arguments are those of nnUNetv2_evaluate_folder; labels or regions and the ignore
label are the dataset's. For every CASE that both folders have it reads

  GT/CASE.nii.gz              the reference; or CASE__NAME alone: several raters, whose majority is the reference
  PRED/CASE.nii.gz            the (mean) prediction
  PRED/samples/CASE__000.…    samples, as nnunet-multimodal predict --save-samples writes them; --samples 16 100
                              measures the first 16 and the first 100 of them as well (GED2_16, GED2_100, …)
  PRED/CASE.json              their weights under "sample_weights", if not equal
  PRED/CASE.npz               probabilities, as nnUNetv2_predict --save_probabilities writes them
  RATERS/CASE__NAME.…         several raters (--raters); without it the reference is the only one, and
                              with it a prediction without samples counts as one sample
  RATERS/raters.csv           case,rater,weight, if they do not count the same

and writes a CSV (one row for each case and label; the label "foreground_mean" is the labels' mean, the case "mean" the
cases') and a JSON with the same numbers, the reliability curves, and what was left out and why. Distances are in mm,
for images without a spacing (PNG) in pixels. nnunet_multimodal/metrics/case.py says what each column is. With
probabilities evaluation_reliability.png draws the curves; with several raters evaluation_agreement.csv has every
rater's Dice with the prediction, with the samples and with the other raters.

Voxels that the reference ignores do not count; those that a rater ignores count for the others. A rater who ignores
every voxel of a case is left out of it, and a case of which nobody says anything is left out; both are named.

Many cases can be shared by several calls at once, on any machines that see the folders, each with -num_parts N and its
own -part_id 0 to N-1. Each writes a file in OUTPUT.parts when it is done; the one that then finds all of them writes
the results, which are those of one call. --merge instead of -part_id only does the latter, and names parts that lack.

With --all-subsets it first predicts the images of -i with every subset of their modalities, by one or several models:

  nnunet-multimodal evaluate --all-subsets GT PRED -i IMAGES -d 1 -c 3d_fullres -tr nnUNetTrainer ShaSpecTrainer -f 0

PRED then gets a folder for each model and subset, MODEL/FLAIR+T2/CASE.nii.gz, and subsets.csv, subsets.md, subsets.png:
what each missing modality costs. A run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nnunetv2.configuration import default_num_processes

from nnunet_multimodal.errors import UserError
from nnunet_multimodal.evaluate import agreement, subsets
from nnunet_multimodal.evaluate.cases import (
    CaseFiles,
    CaseResult,
    LeftOut,
    Settings,
    evaluate_all,
    find_cases,
    read_settings,
    refuse_too_few_samples,
)
from nnunet_multimodal.evaluate.parts import parts_of
from nnunet_multimodal.evaluate.reliability import draw_reliability
from nnunet_multimodal.evaluate.report import (
    as_csv,
    as_json,
    count_cases,
    format_left_out,
    format_table,
    pooled_curves,
)
from nnunet_multimodal.files import write_text
from nnunet_multimodal.inference.base import add_part_arguments, check_part
from nnunet_multimodal.metrics.case import CaseMeasures, mean_over_cases

TOLERANCE_MM = 1.0
AGREEMENT, RELIABILITY = "_agreement.csv", "_reliability.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """nnUNetv2_evaluate_folder's, and our own."""
    parser.add_argument("gt_folder", type=Path, help="folder with reference segmentations, or with raters")
    parser.add_argument("pred_folder", type=Path, help="folder with predicted segmentations")
    parser.add_argument("-djfile", type=Path, metavar="FILE", help="dataset.json (default: the one in pred_folder)")
    parser.add_argument("-pfile", type=Path, metavar="FILE", help="plans.json (default: the one in pred_folder)")
    parser.add_argument(
        "-o", type=Path, metavar="FILE.json", help="results; the CSV lies beside (default: pred_folder/evaluation.json)"
    )
    parser.add_argument(
        "-np", type=int, default=default_num_processes, help=f"number of processes (default: {default_num_processes})"
    )
    parser.add_argument("--chill", action="store_true", help="go on if predictions are missing")
    parser.add_argument(
        "--tolerance_mm",
        type=float,
        default=TOLERANCE_MM,
        metavar="MM",
        help=f"of the normalised surface distance (default: {TOLERANCE_MM:g})",
    )
    parser.add_argument("--raters", type=Path, metavar="FOLDER", help="CASE__NAME files, several for each case")
    parser.add_argument(
        "--samples", type=int, nargs="+", metavar="N", help="measure the first N samples too, each N in its own columns"
    )
    add_part_arguments(parser)
    parser.add_argument("--merge", action="store_true", help="measure nothing, put all -num_parts parts together")
    subsets.add_arguments(parser.add_argument_group("all subsets of the modalities"))


def run(args: argparse.Namespace) -> int:
    """Evaluate two folders, or a part of their cases; returns the exit status.

    Raises:
        UserError: ``--samples`` is below 1 or above what a case has, there is no such part, a part that ``--merge``
            asks for is not there or was measured with something else, or what ``--all-subsets`` refuses.
    """
    if args.all_subsets:
        return subsets.run(args)
    check_part(args)
    if args.merge and args.num_parts == 1:
        raise UserError("--merge puts parts together; say with -num_parts how many there are")
    args.o = args.o or args.pred_folder / "evaluation.json"
    if args.o.suffix != ".json":
        raise SystemExit(f"-o is {args.o}; its name must end in .json")
    if not 0 <= args.tolerance_mm < math.inf:
        raise SystemExit(f"--tolerance_mm is {args.tolerance_mm}; give a number >= 0")
    dataset_json, plans_json = (
        file or args.pred_folder / name for file, name in ((args.djfile, "dataset.json"), (args.pfile, "plans.json"))
    )
    if min(args.samples or [1]) < 1:
        raise UserError(f"--samples is {min(args.samples)}; give numbers of at least 1")
    settings = read_settings(dataset_json, plans_json, args.tolerance_mm, args.samples or ())
    cases, left_out = find_cases(args.gt_folder, args.pred_folder, args.raters, settings.ending)
    missing = [entry.case for entry in left_out if entry.why == "no prediction"]
    if missing and not args.chill:
        raise SystemExit(f"{format_left_out(left_out)}predict them, or give --chill to evaluate the others")
    refuse_too_few_samples(cases, settings, args.pred_folder)
    measured: Iterable[CaseResult] | None
    if args.num_parts == 1:
        measured = evaluate_all(cases, settings, args.np)
    else:
        measured = measure_part(args, cases, left_out, settings)
    if measured is not None:
        write_results(args, cases, measured, left_out, settings)
    return 0


def measure_part(
    args: argparse.Namespace, cases: Sequence[CaseFiles], left_out: Sequence[LeftOut], settings: Settings
) -> list[CaseResult] | None:
    """Measure one part of the cases, unless the flags say that all are; the results of all, None if parts are missing.

    Raises:
        UserError: with ``--merge``, a part is missing.
    """
    parts = parts_of(args.o, args.num_parts, cases, left_out, settings)
    if not args.merge:
        own = cases[args.part_id :: args.num_parts]
        parts.write(args.part_id, evaluate_all(own, settings, args.np))
        print(f"part {args.part_id} of {args.num_parts}: {count_cases(own)} measured")
    results, lacking = parts.read(len(cases))
    if not lacking:
        return results
    reasons = "\n".join(lacking)
    if args.merge:
        raise UserError(f"{reasons}\nmeasure what is lacking with -num_parts {args.num_parts} -part_id of each")
    print(f"{reasons}\nthe last part writes {args.o}")
    return None


def write_results(
    args: argparse.Namespace,
    cases: Sequence[CaseFiles],
    measured: Iterable[CaseResult],
    left_out: Sequence[LeftOut],
    settings: Settings,
) -> None:
    """Write tables and picture and print the means; results are those of the cases, in their order."""
    left_out = list(left_out)
    results: dict[str, CaseMeasures] = {}
    for files, result in zip(cases, measured, strict=True):
        left_out += result.left_out
        if result.measures is not None:
            results[files.case] = result.measures
    if not results:
        raise SystemExit(f"{format_left_out(left_out)}nothing to evaluate in {args.gt_folder} and {args.pred_folder}")
    means, counts = mean_over_cases(list(results.values()), settings.labels)
    paths = {c.case: paths_of(c) for c in cases}
    table, raters, picture = (args.o.with_name(f"{args.o.stem}{end}") for end in (".csv", AGREEMENT, RELIABILITY))
    table.parent.mkdir(parents=True, exist_ok=True)
    args.o.unlink(missing_ok=True)  # of an earlier evaluation; who has the JSON has the rest that belongs to it
    write_text(table, as_csv(results, means, settings))
    written = [table, args.o]
    agreed = agreement.format_table(results, settings)
    if agreed:
        write_text(raters, agreement.as_csv(results, settings))
        written.append(raters)
    named = dict(zip(settings.labels, settings.names, strict=True))
    curves = {named[label]: curve for label, curve in pooled_curves(results.values()).items()}
    if curves:
        draw_reliability(curves, picture)
        written.append(picture)
    for file in {raters, picture} - set(written):  # of an earlier evaluation
        file.unlink(missing_ok=True)
    per_rater = agreement.as_json(results, settings) if agreed else {}
    write_text(args.o, as_json(results, paths, means, counts, left_out, per_rater, settings))
    print(f"\n{format_table(means, settings)}\n" + (f"\n{agreed}\n" if agreed else ""))
    if any(files.reference is None for files in cases):
        print(f"reference of Dice, HD95 and NSD: the majority of the raters in {args.gt_folder}")
    print(f"{format_left_out(left_out)}{count_cases(results)} evaluated")
    print(f"each of them: {', '.join(map(str, written))}")


def paths_of(files: CaseFiles) -> dict[str, Any]:
    """What the JSON says of where a case lies."""
    reference = files.reference or f"majority of {files.raters[0].parent}"
    own = {"reference_file": str(reference), "prediction_file": str(files.prediction)}
    return own | ({"rater_files": list(map(str, files.raters))} if files.raters else {})
