"""Every subset of the modalities: predict, measure, compare. ``nnunet-multimodal evaluate --all-subsets``.

Each case is preprocessed once for each model, with all that it has; modalities are then taken away from the network's
input. The crop and nnU-Net's non-zero mask are therefore those of the whole case, where ``predict --drop`` leaves a
modality out of these too.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from torch import Tensor
from tqdm import tqdm

from nnunet_multimodal.errors import UserError
from nnunet_multimodal.evaluate.cases import CaseFiles, LeftOut, Settings, evaluate_all, read_settings
from nnunet_multimodal.evaluate.report import format_left_out, write_text
from nnunet_multimodal.evaluate.subset_report import Measured, Scores, as_csv, as_markdown, case_csv, draw, summarise
from nnunet_multimodal.inference.base import Case, ModelPredictor, Preprocessed, model_folder
from nnunet_multimodal.network import MultimodalUNet, unwrap

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
        files = sorted(Path(self.folder).glob(f"fold_*/{args.chk}"))
        return {
            "folder": self.folder,
            "folds": args.f,
            "checkpoints": [[str(file), file.stat().st_size, int(file.stat().st_mtime)] for file in files],
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
    """Predict, measure and compare; returns the exit status.

    Raises:
        UserError: a flag is missing, models do not go together, or the folder holds predictions of other models.
    """
    missing = [flag for flag in ("i", "d", "c", "tr") if getattr(args, flag) is None]
    if missing:
        raise UserError(f"--all-subsets needs {', '.join(f'-{flag}' for flag in missing)}")
    baseline = args.baseline or args.tr[0]
    if baseline not in args.tr or len(set(args.tr)) < len(args.tr):
        raise UserError(f"--baseline {baseline} must be one of -tr {' '.join(args.tr)}, each of which is named once")
    output, left_out, measured = Path(args.pred_folder), [], []
    for trainer in args.tr:
        model = open_model(args, trainer)
        channels = model.predictor.channel_names()
        cases = model.predictor.cases(args.i, None)
        left_out += predict_subsets(model, cases, output / model.name, args)
        settings = read_settings(
            Path(model.folder) / "dataset.json", Path(model.folder) / "plans.json", args.tolerance_mm
        )
        files = find_predictions(model.name, cases, channels, output, args.gt_folder, settings)
        results = evaluate_all([entry.files for entry in files], settings, args.np)
        for entry, result in zip(files, results, strict=True):
            left_out += result.left_out
            if result.measures is not None:
                measured.append(Measured(model.name, entry.subset, entry.files.case, result.measures))
    if not measured:
        raise UserError(f"{format_left_out(left_out)}nothing to evaluate in {args.gt_folder} and {args.i}")
    scores = summarise(measured, Scores(tuple(args.tr), baseline, tuple(channels), settings.labels, settings.names))
    table = as_markdown(scores)
    write_text(output / "subsets.csv", as_csv(scores))
    write_text(output / "subsets_cases.csv", case_csv(scores, measured))
    write_text(output / "subsets.md", table)
    draw(scores, output / "subsets.png")
    print(f"\n{table}\n{format_left_out(left_out)}written: {output}/subsets.csv, subsets_cases.csv, .md, .png")
    return 0


def all_subsets(num_modalities: int) -> list[Subset]:
    """Non-empty subsets of the modalities 0..M-1, the smallest first."""
    return [c for size in range(1, num_modalities + 1) for c in itertools.combinations(range(num_modalities), size)]


def subset_name(subset: Subset, channels: Sequence[str]) -> str:
    """Its folder: FLAIR+T2, with nothing in it that a folder cannot have."""
    return "+".join("".join(c if c.isalnum() or c in "-." else "_" for c in channels[m]) for m in subset)


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
    count = len(predictor.channel_names())
    if not 2 <= count <= MAX_MODALITIES:
        raise UserError(f"{folder} has {count} modalities; --all-subsets is for 2 to {MAX_MODALITIES} of them")
    return Model(trainer, folder, predictor)


def predict_subsets(model: Model, cases: Sequence[Case], output: Path, args: argparse.Namespace) -> list[LeftOut]:
    """Predict what is not there yet; returns the subsets that cases lack.

    Raises:
        UserError: the folder holds predictions of another model, or the dataset's modalities share a name.
    """
    channels = model.predictor.channel_names()
    subsets = all_subsets(len(channels))
    names = [subset_name(subset, channels) for subset in subsets]
    if len(set(names)) < len(names):
        raise UserError(f"modalities {', '.join(channels)} need different names in {model.folder}/dataset.json")
    check_identity(model, output, args)
    left_out = []
    with tqdm(total=len(cases) * len(subsets), desc=model.name, unit="prediction") as progress:
        for case in cases:
            files = {
                s: output / n / f"{case.name}{model.predictor.dataset_json['file_ending']}"
                for s, n in zip(subsets, names, strict=True)
            }
            todo = [subset for subset, file in files.items() if not file.is_file()]
            progress.update(len(subsets) - len(todo))
            if not todo:
                continue
            preprocessed = model.predictor.preprocess(case)
            for subset in todo:
                lacking = [channels[m] for m in subset if preprocessed.absent[m]]
                if lacking:
                    left_out.append(LeftOut(case.name, subset_name(subset, channels), f"no {', '.join(lacking)}"))
                else:
                    logits = model.predictor.predict_logits_from_preprocessed_data(
                        with_subset(model, preprocessed, subset)
                    )
                    export(model.predictor, logits, preprocessed.properties, files[subset])
                progress.update()
    return left_out


def check_identity(model: Model, output: Path, args: argparse.Namespace) -> None:
    """Note what a folder's predictions were made with, or compare with what is noted there."""
    file = output / "model.json"
    identity = model.identity(args)
    if file.is_file() and json.loads(file.read_text()) != identity:
        raise UserError(
            f"{output} has predictions of another model or with other flags ({file}); delete it, or name another folder"
        )
    output.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(identity, indent=1) + "\n")


def with_subset(model: Model, preprocessed: Preprocessed, subset: Subset) -> Tensor:
    """The network's input with nothing but some modalities: NaN for ours, zero for nnU-Net's own."""
    data = preprocessed.data.clone()
    ours = isinstance(unwrap(model.predictor.network), MultimodalUNet)
    for channel in range(len(preprocessed.absent)):
        if channel not in subset:
            data[channel] = torch.nan if ours else 0
    return data


def export(predictor: ModelPredictor, logits: Tensor, properties: dict, file: Path) -> None:
    """Write a label map as nnU-Net does; beside, then renamed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    ending = predictor.dataset_json["file_ending"]
    beside = file.with_name(f".{file.name.removesuffix(ending)}")
    export_prediction_from_logits(
        logits, properties, predictor.configuration_manager, predictor.plans_manager, predictor.dataset_json,
        str(beside), False, torch.get_num_threads(),
    )  # fmt: skip
    Path(f"{beside}.json").unlink(missing_ok=True)  # the spacing that nnU-Net writes beside 3D tiff
    Path(f"{beside}{ending}").replace(file)


@dataclass(frozen=True)
class SubsetFiles:
    """A prediction with its reference."""

    subset: Subset
    files: CaseFiles


def find_predictions(
    model: str, cases: Sequence[Case], channels: Sequence[str], output: Path, references: Path, settings: Settings
) -> list[SubsetFiles]:
    """The predictions of a model that have a reference.

    Raises:
        UserError: a case has none.
    """
    return list(_find_predictions(model, cases, channels, output, references, settings))


def _find_predictions(
    model: str, cases: Sequence[Case], channels: Sequence[str], output: Path, references: Path, settings: Settings
) -> Iterator[SubsetFiles]:
    for case in cases:
        reference = references / f"{case.name}{settings.ending}"
        if not reference.is_file():
            raise UserError(f"{reference} is not there; give a reference for every image of -i")
        for subset in all_subsets(len(channels)):
            file = output / model / subset_name(subset, channels) / reference.name
            if file.is_file():
                yield SubsetFiles(subset, CaseFiles(case.name, reference, file))
