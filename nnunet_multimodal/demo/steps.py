"""The demo's steps: nnU-Net's own commands, and by which files of theirs one sees that they are done."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nnunet_multimodal.demo import data
from nnunet_multimodal.demo.settings import PLANS, UNCERTAINTY_TRAINER, DemoError, Settings, read_json

_SEEDED_TRAINING = """
import random, sys, numpy, torch
from nnunetv2.run.run_training import run_training_entry
seed = int(sys.argv.pop(1))
random.seed(seed); numpy.random.seed(seed); torch.manual_seed(seed)
run_training_entry()
"""


@dataclass(frozen=True)
class Step:
    """One step of the demo.

    Attributes:
        name: what the progress bar shows.
        is_done: whether all that the step makes is there, whole.
        command: what a user would type, in the output folder; empty for a step of our own.
        action: what a step without a command does.
        prepare: called before a command; returns further arguments for it.
        program: what runs in place of the command's first word, where that is not the script of that name.
        makes_stale: files and folders that were made from what this step makes; removed before it starts.
        progress: how far the step is, from its log.
    """

    name: str
    is_done: Callable[[], bool]
    command: tuple[str, ...] = ()
    action: Callable[[], None] | None = None
    prepare: Callable[[], list[str]] | None = None
    program: tuple[str, ...] | None = None
    makes_stale: tuple[Path, ...] = ()
    progress: Callable[[str], str] | None = None


def demo_steps(settings: Settings) -> list[Step]:
    """All steps, in order."""
    s, fingerprint = settings, settings.preprocessed / "dataset_fingerprint.json"
    target = ["-overwrite_target_spacing", *(f"{size:g}" for size in s.spacing_mm)] if s.spacing_mm else []
    plan = ["nnUNetv2_plan_experiment", "-d", s.dataset_id, "-pl", s.planner, "-overwrite_plans_name", PLANS, *target]
    preprocess = ["nnUNetv2_preprocess", "-d", s.dataset_id, "-plans_name", PLANS, "-c", s.configuration]
    make_data = data.make_synthetic if s.data is None else data.link_dataset
    steps = [
        Step("data", partial(data.is_complete, s), action=partial(make_data, s)),
        Step(
            "fingerprint",
            partial(_has_json, fingerprint),
            ("nnUNetv2_extract_fingerprint", "-d", s.dataset_id, "--clean"),
        ),
        Step("plan", partial(_is_planned, s), tuple(plan)),
        Step("preprocess", partial(_is_preprocessed, s), (*preprocess, *_workers(s))),
    ]
    for trainer in s.trainers:
        steps.append(_training(s, trainer))
        if s.data is not None and trainer == s.trainers[0]:
            steps.append(Step("held-out cases", partial(data.is_linked, s), action=partial(data.link_held_out, s)))
        steps += _testing(s, trainer)
    return steps


def _training(s: Settings, trainer: str) -> Step:
    train = ["nnUNetv2_train", s.dataset_id, s.configuration, str(s.fold)]
    train += ["-tr", s.trainer_name(trainer), "-p", PLANS, "-device", s.device]
    stale = [s.predictions(trainer), s.evaluation(trainer)]
    if trainer == UNCERTAINTY_TRAINER:
        stale.append(s.uncertainty())
    return Step(
        f"train {trainer}",
        partial(_is_trained, s, trainer),
        tuple(train),
        prepare=lambda: ["--c"] if _usable_checkpoints(s.fold_folder(trainer)) else [],
        program=("-c", _SEEDED_TRAINING, str(s.seed)),
        makes_stale=tuple(stale),
        progress=partial(_training_progress, s.epochs),
    )


def _testing(s: Settings, trainer: str) -> list[Step]:
    def here(path: Path) -> str:
        return str(path.relative_to(s.out))

    model = ["-d", s.dataset_id, "-c", s.configuration, "-tr", s.trainer_name(trainer), "-p", PLANS, "-f", str(s.fold)]
    images, truth = here(s.held_out / "imagesTs"), here(s.held_out / "labelsTs")
    predictions, summary = s.predictions(trainer), s.evaluation(trainer)
    predict = ["nnUNetv2_predict", "-i", images, "-o", here(predictions), *model, "-device", s.device]
    evaluate = ["nnUNetv2_evaluate_folder", truth, here(predictions), "-o", here(summary)]
    evaluate += ["-djfile", here(s.model(trainer) / "dataset.json"), "-pfile", here(s.model(trainer) / "plans.json")]

    def make_folder() -> list[str]:
        summary.parent.mkdir(parents=True, exist_ok=True)  # nnU-Net does not
        return []

    steps = [
        Step(f"predict {trainer}", partial(_is_predicted, s, trainer), tuple(predict), makes_stale=(summary,)),
        Step(f"evaluate {trainer}", partial(_has_json, summary), tuple(evaluate), prepare=make_folder),
    ]
    if trainer == UNCERTAINTY_TRAINER:
        maps = s.uncertainty()
        uncertainty = ["nnunet-multimodal", "uncertainty", "-i", images, "-o", here(maps), *model, "-device", s.device]
        steps.append(Step(f"uncertainty {trainer}", partial(_has_json, maps / "uncertainty.json"), tuple(uncertainty)))
    return steps


def _workers(s: Settings) -> list[str]:
    """nnU-Net's default (four processes that each import torch) suits neither a small dataset nor a small machine."""
    return ["-np", "1"] if s.data is None else ["-np", "2"] if s.device == "cpu" else []


def _has_json(file: Path) -> bool:
    return read_json(file) is not None


def _is_planned(s: Settings) -> bool:
    plans = read_json(s.preprocessed / f"{PLANS}.json")
    if plans is None or not _has_json(s.preprocessed / "dataset.json"):
        return False
    if s.configuration not in plans["configurations"]:
        raise DemoError(
            f"configuration {s.configuration!r} is not in {s.preprocessed / PLANS}.json: {s.planner} did not plan it "
            f"for this dataset; it planned {', '.join(plans['configurations'])}; give one of them with --configuration"
        )
    return True


def _is_preprocessed(s: Settings) -> bool:
    """Every case has its files, and the labels' copies, which nnU-Net makes last, are whole."""
    plans, description = read_json(s.preprocessed / f"{PLANS}.json"), read_json(s.raw / "dataset.json")
    if plans is None or description is None:
        return False
    folder = s.preprocessed / plans["configurations"][s.configuration]["data_identifier"]
    for label in (s.raw / "labelsTr").glob(f"*{description['file_ending']}"):
        case = label.name[: -len(description["file_ending"])]
        copy = s.preprocessed / "gt_segmentations" / label.name
        arrays = any((folder / f"{case}{ending}").exists() for ending in (".b2nd", ".npz"))
        if not (arrays and copy.exists() and copy.stat().st_size == label.stat().st_size):
            return False
        try:
            pickle.loads((folder / f"{case}.pkl").read_bytes())
        except (FileNotFoundError, EOFError, pickle.UnpicklingError):
            return False
    return True


def _is_trained(s: Settings, trainer: str) -> bool:
    fold = s.fold_folder(trainer)
    return zipfile.is_zipfile(fold / "checkpoint_final.pth") and _has_json(fold / "validation" / "summary.json")


def _usable_checkpoints(fold: Path) -> list[Path]:
    """Checkpoints to go on from; one whose writing was interrupted is removed (a whole one is a zip file)."""
    checkpoints = list(fold.glob("checkpoint_*.pth"))
    for checkpoint in checkpoints:
        if not zipfile.is_zipfile(checkpoint):
            checkpoint.unlink()
    return [checkpoint for checkpoint in checkpoints if checkpoint.exists()]


def _is_predicted(s: Settings, trainer: str) -> bool:
    import SimpleITK

    cases = data.held_out_cases(s) if _has_json(s.raw / "dataset.json") else {}
    for _, label in cases.values():
        prediction = s.predictions(trainer) / label.name
        if not prediction.exists():
            return False
        try:
            SimpleITK.ReadImage(str(prediction))
        except RuntimeError:  # not written to its end
            return False
    return bool(cases)


def _training_progress(epochs: int, log: str) -> str:
    if "Training done." in log:
        return "validation"
    started = re.findall(r"Epoch (\d+)\s*$", log, re.MULTILINE)
    return f"epoch {int(started[-1]) + 1}/{epochs}" if started else "starting"
