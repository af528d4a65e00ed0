"""Trained models: what nnU-Net's training leaves in its results folder."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nnunet_multimodal.errors import UserError
from nnunet_multimodal.images import read_json
from nnunet_multimodal.planning import OPTIONS_KEY
from nnunet_multimodal.provenance import logged_start
from nnunet_multimodal.report.evaluations import FOREGROUND, Evaluation, read_evaluation

NUMBER = r"(-?[\d.]+(?:e[-+]?\d+)?|-?nan|-?inf)"
LINES = {
    "epoch": re.compile(r": Epoch (\d+)\s*$", re.MULTILINE),
    "learning_rate": re.compile(rf"Current learning rate: {NUMBER}"),
    "train_loss": re.compile(rf"train_loss {NUMBER}"),
    "val_loss": re.compile(rf"val_loss {NUMBER}"),
    "pseudo_dice": re.compile(r"Pseudo dice (\[.*\])"),
    "seconds": re.compile(rf"Epoch time: {NUMBER} s"),
}
DEBUG = {  # of debug.json, and what it is called on the page; nothing that names a machine or its folders
    "torch_version": "torch",
    "device": "device",
    "gpu_name": "GPU",
    "num_epochs": "epochs planned",
    "num_iterations_per_epoch": "iterations of an epoch",
    "initial_lr": "initial learning rate",
    "weight_decay": "weight decay",
    "is_ddp": "several processes",
}


class Epoch(NamedTuple):
    """An epoch, as training_log.txt tells it; NaN where it does not. ``pseudo_dice`` is the mean over the labels."""

    number: int
    train_loss: float = np.nan
    val_loss: float = np.nan
    pseudo_dice: float = np.nan
    learning_rate: float = np.nan
    seconds: float = np.nan


@dataclass(frozen=True)
class Fold:
    """A trained fold.

    Attributes:
        name: 0, 1, … or all.
        epochs: that ended, in their order.
        skipped_steps: of which the log tells that their loss or gradient was not finite.
        finished: whether there is a final checkpoint.
        environment: what ``debug.json`` tells, by the names of the page.
        validation: nnU-Net's own of its held-out cases, if it ended.
        starts: what the log of each start tells of it (:func:`nnunet_multimodal.provenance.logged_start`).
    """

    name: str
    epochs: tuple[Epoch, ...]
    skipped_steps: int
    finished: bool
    environment: Mapping[str, str]
    validation: Evaluation | None
    starts: tuple[Mapping[str, Any], ...] = ()

    @property
    def validation_dice(self) -> float:
        """Mean over the labels of nnU-Net's validation, NaN without one."""
        return np.nan if self.validation is None else self.validation.mean[FOREGROUND].get("Dice", np.nan)


@dataclass(frozen=True)
class TrainedModel:
    """A trainer, its plans and configuration, and the folds that are trained.

    Attributes:
        settings: what the plans say, by the names of the page.
        options: of the method, in the plans.
    """

    folder: Path
    dataset: str
    trainer: str
    plans: str
    configuration: str
    settings: Mapping[str, str]
    options: str
    folds: tuple[Fold, ...]

    def train_command(self, fold: Fold) -> str:
        """nnU-Net's command that trains such a fold."""
        return f"nnUNetv2_train {self.dataset} {self.configuration} {fold.name} -tr {self.trainer} -p {self.plans}"


def is_model(folder: Path) -> bool:
    """Whether a folder is of a trained model."""
    return (folder / "plans.json").is_file() and any(folder.glob("fold_*"))


def read_model(folder: Path) -> TrainedModel:
    """A model's folder, TRAINER__PLANS__CONFIGURATION.

    Raises:
        UserError: the name is another one, or a file of it cannot be read.
    """
    plans = read_json(folder / "plans.json", "plans_name", "configurations")
    dataset_json = read_json(folder / "dataset.json", "labels", "file_ending")
    trainer, _, rest = folder.resolve().name.partition("__")
    plans_name, _, configuration = rest.partition("__")
    if configuration not in plans["configurations"]:
        raise UserError(
            f"{folder} is not named TRAINER__PLANS__CONFIGURATION with a configuration of its plans.json; give it "
            "nnU-Net's name back"
        )
    chosen = _configuration(plans["configurations"], configuration)
    folds = tuple(_read_fold(path, dataset_json) for path in sorted(folder.glob("fold_*")) if path.is_dir())
    return TrainedModel(
        folder,
        plans.get("dataset_name", folder.resolve().parent.name),
        trainer,
        plans_name,
        configuration,
        settings=_settings(plans, chosen),
        options="" if OPTIONS_KEY not in chosen else str(chosen[OPTIONS_KEY]),
        folds=folds,
    )


def _configuration(configurations: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    """A configuration with all that it inherits."""
    own = dict(configurations[name])
    parent = own.pop("inherits_from", None)
    return {**_configuration(configurations, parent), **own} if parent in configurations else own


def _settings(plans: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, str]:
    """What the plans say of a configuration."""
    architecture = chosen.get("architecture", {})
    settings = {
        "planner": plans.get("experiment_planner_used"),
        "preprocessor": chosen.get("preprocessor_name"),
        "patch": _times(chosen.get("patch_size", ())),
        "batch size": chosen.get("batch_size"),
        "spacing (mm)": _times(chosen.get("spacing", ())),
        "normalisation": ", ".join(chosen.get("normalization_schemes", ())),
        "network": architecture.get("network_class_name", "").rpartition(".")[2],
        "features": ", ".join(map(str, architecture.get("arch_kwargs", {}).get("features_per_stage", ()))),
    }
    return {name: str(value) for name, value in settings.items() if value}


def _times(sizes: Iterable[float]) -> str:
    return " × ".join(f"{size:g}" for size in sizes)


def _read_fold(folder: Path, dataset_json: dict[str, Any]) -> Fold:
    logs = [file.read_text(errors="replace") for file in sorted(folder.glob("training_log_*.txt"))]
    epochs = {epoch.number: epoch for log in logs for epoch in parse_log(log)}  # what went on later counts
    debug = read_json(folder / "debug.json") if (folder / "debug.json").is_file() else {}
    summary = folder / "validation" / "summary.json"
    return Fold(
        name=folder.name.removeprefix("fold_"),
        epochs=tuple(epochs[number] for number in sorted(epochs)),
        skipped_steps=sum(log.count("Step skipped (") for log in logs),
        finished=(folder / "checkpoint_final.pth").is_file(),
        environment={name: str(debug[key]) for key, name in DEBUG.items() if debug.get(key) not in (None, "None")},
        validation=read_evaluation(summary, dataset_json) if summary.is_file() else None,
        starts=tuple(logged_start(log) for log in logs if LINES["epoch"].search(log)),
    )


def parse_log(text: str) -> list[Epoch]:
    """The epochs of a training_log.txt that came to their end."""
    epochs: list[Epoch] = []
    current: dict[str, Any] = {}
    for line in text.splitlines():
        for name, pattern in LINES.items():
            match = pattern.search(line)
            if match is None:
                continue
            if name == "epoch":
                current = {"number": int(match[1])}
            elif name == "pseudo_dice":
                current[name] = _mean_of_list(match[1])
            else:
                current[name] = float(match[1])
            if name == "seconds" and "number" in current:
                epochs.append(Epoch(**current))
            break
    return epochs


def _mean_of_list(text: str) -> float:
    """The mean of ``[np.float32(0.5), np.float32(nan)]`` without NaN, or of plain numbers."""
    plain = re.sub(r"np\.float\d+\(([^)]*)\)", r"\1", text).replace("nan", "None")
    numbers = [value for value in ast.literal_eval(plain) if value is not None]
    return float(np.mean(numbers)) if numbers else np.nan
