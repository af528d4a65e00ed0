"""What a demo ends with: the table on the screen, ``results.json`` and ``results.png``.

Dice is nnU-Net's own evaluation of the held-out cases; HD95 is ours (``nnunet_multimodal.metrics.surface``), in mm. A
structure that is missing from both truth and prediction of a case has neither. HD95 is infinite where only one of them
has it: such cases are counted and left out of the mean.
"""

from __future__ import annotations

import platform
import re
import shlex
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from math import isfinite, nan
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_multimodal.demo import data
from nnunet_multimodal.demo.settings import Settings, read_json, write_json
from nnunet_multimodal.demo.steps import Step
from nnunet_multimodal.doctor import cpu_cores
from nnunet_multimodal.metrics.surface import hausdorff_distance

PACKAGES = ("nnunet-multimodal", "nnunetv2", "torch", "numpy")


@dataclass(frozen=True)
class Structure:
    """A label or a region of the dataset.

    Attributes:
        name: as in ``dataset.json``.
        labels: the values that belong to it.
        key: what nnU-Net's evaluation calls it.
    """

    name: str
    labels: tuple[int, ...]
    key: str

    def mask(self, segmentation: np.ndarray) -> np.ndarray:
        """Where the segmentation has the structure."""
        return np.isin(segmentation, self.labels)


@dataclass(frozen=True)
class Score:
    """Of one structure in one case; NaN where it is missing from both truth and prediction."""

    dice: float
    hd95_mm: float


Scores = dict[str, dict[str, Score]]  # case -> structure -> score


def report(settings: Settings, steps: list[Step]) -> None:
    """Write ``results.json`` and ``results.png`` and print the table."""
    from nnunet_multimodal.demo.picture import draw

    description = read_json(settings.raw / "dataset.json")
    structures = list_structures(description["labels"])
    scores = {trainer: score_cases(settings, trainer, structures, description) for trainer in settings.trainers}
    table = {
        trainer: {**summarise(scores[trainer], structures), "training_s": training_seconds(settings, trainer)}
        for trainer in settings.trainers
    }
    write_json(settings.out / "results.json", _results(settings, steps, table, scores))
    draw(settings, structures, description, typical_case(scores), settings.out / "results.png")
    print(f"\n{format_table(table, structures)}\n")
    print(f"{len(next(iter(scores.values())))} held-out cases; {settings.out / 'results.json'} has each of them")
    print(f"picture: {settings.out / 'results.png'}")


def list_structures(labels: dict[str, Any]) -> list[Structure]:
    """The foreground of ``dataset.json``: labels, or regions where one of them has several labels."""
    has_regions = any(isinstance(value, list) and len(value) > 1 for value in labels.values())
    structures = []
    for name, value in labels.items():
        values = tuple(value) if isinstance(value, list) else (int(value),)
        if name != "ignore" and set(values) != {0}:
            key = str(tuple(value)) if has_regions and isinstance(value, list) else str(values[0])
            structures.append(Structure(name, values, key))
    return structures


def score_cases(settings: Settings, trainer: str, structures: list[Structure], description: dict) -> Scores:
    """Scores of all held-out cases."""
    evaluation = read_json(settings.evaluation(trainer))
    metrics = {Path(case["prediction_file"]).name: case["metrics"] for case in evaluation["metric_per_case"]}
    ignore = description["labels"].get("ignore")
    scores: Scores = {}
    for case, (_, truth_file) in data.held_out_cases(settings).items():
        truth, spacing_mm = read_segmentation(truth_file, description)
        prediction, _ = read_segmentation(settings.predictions(trainer) / truth_file.name, description)
        annotated = True if ignore is None else truth != ignore
        scores[case] = {}
        for structure in structures:
            found, there = structure.mask(prediction) & annotated, structure.mask(truth) & annotated
            distance = hausdorff_distance(found, there, spacing_mm) if found.any() or there.any() else nan
            overlap = metrics[truth_file.name][structure.key]["Dice"]
            scores[case][structure.name] = Score(nan if overlap is None else overlap, distance)
    return scores


def read_segmentation(file: Path, description: dict) -> tuple[np.ndarray, list[float]]:
    """A segmentation by nnU-Net's reader, without axes of one voxel (2D images), and its spacing in mm."""
    segmentation, properties = _reader(file, description).read_seg(str(file))
    axes = [axis for axis, size in enumerate(segmentation.shape[1:]) if size > 1]
    return np.squeeze(segmentation), [float(properties["spacing"][axis]) for axis in axes]


def read_images(files: list[Path], description: dict) -> tuple[np.ndarray, list[float]]:
    """Channels of a case (M, Z, Y, X) by nnU-Net's reader, and the spacing in mm."""
    images, properties = _reader(files[0], description).read_images([str(file) for file in files])
    return images, [float(size) for size in properties["spacing"]]


def _reader(file: Path, description: dict) -> Any:
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    return determine_reader_writer_from_dataset_json(description, str(file), verbose=False)()


def summarise(scores: Scores, structures: list[Structure]) -> dict[str, Any]:
    """Means over the cases per structure, and the mean of those, as nnU-Net's foreground mean."""
    per_structure = {}
    for structure in structures:
        of_cases = [case[structure.name] for case in scores.values()]
        per_structure[structure.name] = {
            "dice": _mean([score.dice for score in of_cases]),
            "hd95_mm": _mean([score.hd95_mm for score in of_cases]),
            "hd95_infinite": sum(score.hd95_mm == np.inf for score in of_cases),
        }
    mean = {name: _mean([values[name] for values in per_structure.values()]) for name in ("dice", "hd95_mm")}
    return {"structures": per_structure, "mean": mean}


def _mean(values: list[float]) -> float:
    """Mean of the finite values; NaN where there are none."""
    finite = [value for value in values if isfinite(value)]
    return float(np.mean(finite)) if finite else nan


def training_seconds(settings: Settings, trainer: str) -> float:
    """Time of all epochs, as nnU-Net logged it; of an epoch that was repeated after an interruption, the last run."""
    epochs: dict[int, float] = {}
    for log in sorted(settings.fold_folder(trainer).glob("training_log_*.txt")):
        epoch = -1
        for line in log.read_text().splitlines():
            if started := re.search(r": Epoch (\d+)\s*$", line):
                epoch = int(started[1])
            elif ended := re.search(r"Epoch time: ([\d.]+) s", line):
                epochs[epoch] = float(ended[1])
    return sum(epochs.values())


def typical_case(scores: dict[str, Scores]) -> str:
    """The case of median Dice over all trainers: neither the best nor the worst."""
    cases = list(next(iter(scores.values())))
    mean = {case: _mean([s.dice for of in scores.values() for s in of[case].values()]) for case in cases}
    return sorted(cases, key=lambda case: (np.nan_to_num(mean[case], nan=-1.0), case))[len(cases) // 2]


def format_table(table: dict[str, dict], structures: list[Structure]) -> str:
    """The table as text: one line per trainer."""
    names = [structure.name for structure in structures]
    width = max(len("trainer"), *map(len, table))
    columns = [max(len(name), 14) for name in (*names, "mean")]
    heads = [f"{name:>{size}}" for name, size in zip((*names, "mean"), columns, strict=True)]
    under = [f"{'Dice  HD95 mm':>{size}}" for size in columns]
    lines = [
        "  ".join([f"{'trainer':<{width}}", *heads, "training"]),
        "  ".join([" " * width, *under, f"{'s':>8}"]),
    ]
    infinite = 0
    for trainer, row in table.items():
        cells = [row["structures"][name] for name in names] + [row["mean"]]
        infinite += sum(cell.get("hd95_infinite", 0) for cell in cells)
        shown = [f"{_number(c['dice'], 3)} {_number(c['hd95_mm'], 2):>8}" for c in cells]
        shown = [f"{text:>{size}}" for text, size in zip(shown, columns, strict=True)]
        lines.append("  ".join([f"{trainer:<{width}}", *shown, f"{row['training_s']:8.0f}"]))
    if infinite:
        lines.append(f"HD95 without {infinite} infinite value(s): a structure that was missed, or is not there")
    return "\n".join(lines)


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if isfinite(value) else "-"


def _results(settings: Settings, steps: list[Step], table: dict, scores: dict[str, Scores]) -> dict:
    options = {name: value for name, value in asdict(settings).items() if name != "out"}
    return _without_nan(
        {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "table": table,
            "cases": {
                trainer: {case: {name: asdict(score) for name, score in of.items()} for case, of in cases.items()}
                for trainer, cases in scores.items()
            },
            "settings": {**options, "data": settings.data.name if settings.data is not None else None},
            "commands": [shlex.join(step.command) for step in steps if step.command],
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "machine": {"system": platform.system(), "processor": _processor(), "cores": cpu_cores()},
            "device": _device_name(settings.device),
        }
    )


def _without_nan(value: Any) -> Any:
    """JSON has neither NaN nor infinity: null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # Linux; platform.processor() is empty there
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _device_name(device: str) -> str:
    if device != "cuda":
        return device
    import torch

    return f"cuda: {torch.cuda.get_device_name()}"
