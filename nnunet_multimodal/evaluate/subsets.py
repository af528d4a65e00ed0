"""Every subset of the modalities: predict, measure, compare. ``nnunet-multimodal evaluate --all-subsets``.

Each case is preprocessed once for each model, with all that it has; modalities are then taken away from the network's
input. The crop and nnU-Net's non-zero mask are therefore those of the whole case, where ``predict --drop`` leaves a
modality out of these too.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from torch import Tensor
from tqdm import tqdm

from nnunet_multimodal.errors import UserError
from nnunet_multimodal.evaluate.cases import CaseFiles, LeftOut, evaluate_all, read_settings
from nnunet_multimodal.evaluate.report import format_left_out
from nnunet_multimodal.evaluate.subset_report import Measured, Scores, as_csv, as_markdown, case_csv, draw, summarise
from nnunet_multimodal.files import write_json, write_text
from nnunet_multimodal.inference.base import Case, ModelPredictor, check_part, model_folder
from nnunet_multimodal.provenance import note

Subset = tuple[int, ...]
MAX_MODALITIES = 8  # 255 predictions of each case


@dataclass(frozen=True)
class Model:
    """A trained model: its name in the table, its folder, and what is predicted with."""

    name: str
    folder: str
    predictor: ModelPredictor

    def identity(self, args: argparse.Namespace) -> dict[str, Any]:
        """What its predictions depend on; another one must not add to them."""
        checkpoints = self.predictor.checkpoints
        images = sorted(Path(args.i).glob(f"*{self.predictor.dataset_json['file_ending']}"))
        return {
            "folder": self.folder,
            "folds": args.f,
            "checkpoints": [[str(file), file.stat().st_size, int(file.stat().st_mtime)] for file in checkpoints],
            "images": [[str(file), file.stat().st_size, int(file.stat().st_mtime)] for file in images],
            "step_size": args.step_size,
            "mirroring": not args.disable_tta,
        }


def add_arguments(parser: Any) -> None:
    """Flags of ``--all-subsets``: nnUNetv2_predict's, with several trainers."""
    parser.add_argument("--all-subsets", action="store_true", help="predict and compare all subsets of the modalities")
    parser.add_argument("-i", metavar="FOLDER", help="images to predict")
    parser.add_argument("-d", help="dataset name or id of the models")
    parser.add_argument("-c", help="configuration")
    parser.add_argument("-p", default="nnUNetPlans", help="plans identifier (default: nnUNetPlans)")
    parser.add_argument("-tr", nargs="+", metavar="TRAINER", help="trainers, a model each")
    parser.add_argument("-f", nargs="+", help="folds to use together (default: all that are trained)")
    parser.add_argument("-chk", default="checkpoint_final.pth", help="checkpoint (default: checkpoint_final.pth)")
    parser.add_argument("-step_size", type=float, default=0.5, help="step of the sliding window (default: 0.5)")
    parser.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="device (default: cuda)")
    parser.add_argument("--disable_tta", action="store_true", help="no mirroring")
    parser.add_argument(
        "--baseline", metavar="TRAINER", help="which the others are tested against (default: the first)"
    )


def run(args: argparse.Namespace) -> int:
    """Predict, measure and compare, or only predict a part of the cases; returns the exit status.

    Raises:
        UserError: a flag is missing or has no meaning here, a model or a reference is not there, models do not go
            together, or the folder holds predictions of other models or images. Nothing has been predicted then.
    """
    baseline = check_flags(args)
    models = [open_model(args, trainer) for trainer in args.tr]
    modalities = models[0].predictor.modality_names()
    for model in models[1:]:
        if model.predictor.modality_names() != modalities:
            theirs = ", ".join(model.predictor.modality_names())
            raise UserError(f"{models[0].name} has modalities {', '.join(modalities)} and {model.name} {theirs}")
    cases, output = models[0].predictor.cases(args.i, None), Path(args.pred_folder)
    first = Path(models[0].folder)
    settings = read_settings(first / "dataset.json", first / "plans.json", args.tolerance_mm)
    references = {case.name: args.gt_folder / f"{case.name}{settings.ending}" for case in cases}
    for reference in references.values():
        if not reference.is_file():
            raise UserError(f"{reference} is not there; give a reference for every image of -i")
    for model in models:
        check_identity(model, output / model.name, args)
    if args.num_parts > 1:
        for model in models:
            predict_subsets(model, cases[args.part_id :: args.num_parts], output / model.name)
            del model.predictor.network
        print(f"part {args.part_id} of {args.num_parts} is predicted; after all parts, the same without them measures")
        return 0
    left_out, measured = [], []
    for model in models:
        predicted, lacking = predict_subsets(model, cases, output / model.name)
        left_out += lacking
        files = [CaseFiles(case, references[case], file) for (case, _), file in predicted.items()]
        for (case, subset), result in zip(predicted, evaluate_all(files, settings, args.np), strict=True):
            left_out += result.left_out
            if result.measures is not None:
                measured.append(Measured(model.name, subset, case, result.measures))
        del model.predictor.network  # the next one may need the memory
    if not measured:
        raise UserError(f"{format_left_out(left_out)}nothing to evaluate in {args.gt_folder} and {args.i}")
    scores = summarise(measured, Scores(tuple(args.tr), baseline, tuple(modalities), settings.labels, settings.names))
    table = as_markdown(scores)
    write_text(output / "subsets.csv", as_csv(scores))
    write_text(output / "subsets_cases.csv", case_csv(scores, measured))
    write_text(output / "subsets.md", table)
    draw(scores, output / "subsets.png")
    of_models = {model.name: model.predictor.identity() for model in models}
    note(output, "evaluate", models=of_models, baseline=baseline)
    print(f"\n{table}\n{format_left_out(left_out)}written: {output}/subsets.csv, subsets_cases.csv, .md, .png")
    return 0


def check_flags(args: argparse.Namespace) -> str:
    """The baseline.

    Raises:
        UserError: a flag is missing, or has no meaning with ``--all-subsets``.
    """
    missing = [f"-{flag}" for flag in ("i", "d", "c", "tr") if getattr(args, flag) is None]
    if missing:
        raise UserError(f"--all-subsets needs {', '.join(missing)}")
    unused = {
        "-o": args.o,
        "-djfile": args.djfile,
        "-pfile": args.pfile,
        "--raters": args.raters,
        "--samples": args.samples,
        "--chill": args.chill,
        "--merge": args.merge,
    }
    given = [flag for flag, value in unused.items() if value]
    if given:
        raise UserError(f"{', '.join(given)} has no meaning with --all-subsets; results go to {args.pred_folder}")
    baseline = args.baseline or args.tr[0]
    if baseline not in args.tr or len(set(args.tr)) < len(args.tr):
        raise UserError(f"--baseline {baseline} must be one of -tr {' '.join(args.tr)}, each of which is named once")
    check_part(args)
    return baseline


def all_subsets(num_modalities: int) -> list[Subset]:
    """Non-empty subsets of the modalities 0..M-1, the smallest first."""
    return [c for size in range(1, num_modalities + 1) for c in itertools.combinations(range(num_modalities), size)]


def subset_name(subset: Subset, modalities: Sequence[str]) -> str:
    """Its folder: FLAIR+T2, with nothing in it that a folder cannot have."""
    return "+".join("".join(c if c.isalnum() or c in "-." else "_" for c in modalities[m]) for m in subset)


def open_model(args: argparse.Namespace, trainer: str) -> Model:
    """A model that the flags name.

    Raises:
        UserError: it is not trained, a cascade's second stage, or of too many modalities.
    """
    folder = model_folder(argparse.Namespace(**{**vars(args), "tr": trainer}))
    predictor = ModelPredictor.from_model(
        folder, args.f, torch.device(args.device), args.chk, args.step_size, not args.disable_tta
    )
    if predictor.configuration_manager.previous_stage_name is not None:
        raise UserError(f"-c {args.c} comes after another stage; --all-subsets is for configurations of one stage")
    names = predictor.modality_names()
    if not 2 <= len(names) <= MAX_MODALITIES:
        raise UserError(f"{folder} has {len(names)} modalities; --all-subsets is for 2 to {MAX_MODALITIES} of them")
    if len({subset_name((m,), names) for m in range(len(names))}) < len(names):
        raise UserError(f"modalities {', '.join(names)} need different names in {folder}/dataset.json")
    return Model(trainer, folder, predictor)


def predict_subsets(
    model: Model, cases: Sequence[Case], output: Path
) -> tuple[dict[tuple[str, Subset], Path], list[LeftOut]]:
    """Predict what is not there yet; returns the files by case and subset, and the subsets that cases lack."""
    modalities, names = model.predictor.modalities, model.predictor.modality_names()
    subsets, ending = all_subsets(len(names)), model.predictor.dataset_json["file_ending"]
    predicted: dict[tuple[str, Subset], Path] = {}
    left_out = []
    with tqdm(total=len(cases) * len(subsets), desc=model.name, unit="prediction") as progress:
        for case in cases:
            files = {subset: output / subset_name(subset, names) / f"{case.name}{ending}" for subset in subsets}
            if not all(file.is_file() for file in files.values()):
                preprocessed = model.predictor.preprocess(case)
            for subset, file in files.items():
                if not file.is_file():
                    lacking = [names[m] for m in subset if any(preprocessed.absent[c] for c in modalities[m])]
                    if lacking:
                        left_out.append(LeftOut(case.name, subset_name(subset, names), f"no {', '.join(lacking)}"))
                        progress.update()
                        continue
                    kept = [channel for m in subset for channel in modalities[m]]
                    data = model.predictor.with_channels(preprocessed, kept)
                    logits = model.predictor.predict_logits_from_preprocessed_data(data)
                    export(model.predictor, logits, preprocessed.properties, file)
                predicted[case.name, subset] = file
                progress.update()
    return predicted, left_out


def check_identity(model: Model, output: Path, args: argparse.Namespace) -> None:
    """Note what a folder's predictions were made with, or compare with what is noted there."""
    file = output / "model.json"
    identity = model.identity(args)
    if file.is_file() and json.loads(file.read_text()) != identity:
        raise UserError(
            f"{output} has predictions of another model, of other images or with other flags ({file}); delete it, or "
            "name another folder"
        )
    output.mkdir(parents=True, exist_ok=True)
    write_json(file, identity)


def export(predictor: ModelPredictor, logits: Tensor, properties: dict, file: Path) -> None:
    """Write a label map as nnU-Net does; beside, then renamed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    ending = predictor.dataset_json["file_ending"]
    name = file.name.removesuffix(ending)
    beside = file.with_name(f".{name}")
    export_prediction_from_logits(
        logits, properties, predictor.configuration_manager, predictor.plans_manager, predictor.dataset_json,
        str(beside), False, torch.get_num_threads(),
    )  # fmt: skip
    for suffix in (".json", ending):  # of 3D tiff the spacing; the label map last
        if Path(f"{beside}{suffix}").is_file():
            Path(f"{beside}{suffix}").replace(file.with_name(f"{name}{suffix}"))
