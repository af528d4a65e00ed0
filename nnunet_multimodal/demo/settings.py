"""What a demo was asked to do, where it keeps its files, and the record that a later run is checked against."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PLANS = "nnUNetDemoPlans"
UNCERTAINTY_TRAINER = "CRNPTrainer"  # the one whose backbone measures the uncertainty of modalities
RECORD = "demo.json"


class DemoError(Exception):
    """Something that the user can put right; the message names the value, the file and the remedy."""


@dataclass(frozen=True)
class Settings:
    """The demo's options, resolved.

    Attributes:
        out: everything is written here.
        data: a raw dataset of the user's; None for the synthetic one.
        channel_names: of a dataset without ``dataset.json``.
        labels: likewise, foreground labels 1, 2, ...
        dataset: such as ``Dataset900_Demo``.
        trainers: base names.
        spacing_mm: target spacing (z, y, x); None leaves it to the planner.
    """

    out: Path
    data: Path | None
    channel_names: tuple[str, ...] | None
    labels: tuple[str, ...] | None
    dataset: str
    trainers: tuple[str, ...]
    epochs: int
    iterations: int
    device: str
    fold: int
    planner: str
    configuration: str
    spacing_mm: tuple[float, ...] | None
    seed: int

    @property
    def dataset_id(self) -> str:
        """The dataset's number as nnU-Net's commands take it."""
        return str(int(self.dataset[len("Dataset") :][:3]))

    @property
    def raw(self) -> Path:
        """The raw dataset."""
        return self.out / "nnUNet_raw" / self.dataset

    @property
    def preprocessed(self) -> Path:
        """The preprocessed dataset."""
        return self.out / "nnUNet_preprocessed" / self.dataset

    @property
    def held_out(self) -> Path:
        """Folder with ``imagesTs`` and ``labelsTs`` of the cases that no training sees."""
        return self.raw if self.data is None else self.out / "held_out"

    def trainer_name(self, trainer: str) -> str:
        """The trainer with its length, as nnU-Net's commands take it."""
        return f"{trainer}_{self.epochs}epochs_{self.iterations}iterations"

    def model(self, trainer: str) -> Path:
        """The trainer's folder of results."""
        name = f"{self.trainer_name(trainer)}__{PLANS}__{self.configuration}"
        return self.out / "nnUNet_results" / self.dataset / name

    def fold_folder(self, trainer: str) -> Path:
        """The trained fold."""
        return self.model(trainer) / f"fold_{self.fold}"

    def predictions(self, trainer: str) -> Path:
        """Predictions of the held-out cases."""
        return self.out / "predictions" / trainer

    def evaluation(self, trainer: str) -> Path:
        """What nnU-Net's evaluation wrote about them."""
        return self.out / "evaluation" / trainer / "summary.json"

    def uncertainty(self) -> Path:
        """Maps of each modality's uncertainty of the held-out cases."""
        return self.out / "uncertainty"

    def record(self) -> None:
        """Write the settings into the output folder, or compare them with those that it was made with.

        Trainers are no part of it: they may be added later.

        Raises:
            DemoError: a setting differs, or the folder holds results that are not a demo's.
        """
        file = self.out / RECORD
        ours = {name: _plain(value) for name, value in asdict(self).items() if name not in ("out", "trainers")}
        recorded = read_json(file)
        if recorded is None:
            for folder in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
                if (self.out / folder).exists():
                    raise DemoError(
                        f"{self.out / folder} exists but {file} does not: nobody knows what it was made with; "
                        "give another --out, or delete the folder"
                    )
            write_json(file, ours)
            return
        for name, value in ours.items():
            if recorded.get(name) != value:
                raise DemoError(
                    f"{name} is {value!r}, but {self.out} was made with {recorded.get(name)!r} (recorded in {file}); "
                    f"use that value, give another --out, or delete {self.out}"
                )


def read_json(file: Path) -> Any:
    """The content of a JSON file; None where it is missing or was not written to its end."""
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def write_json(file: Path, content: Any) -> None:
    """Write beside, then rename: the file is complete or not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.part")
    beside.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    os.replace(beside, file)


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value
