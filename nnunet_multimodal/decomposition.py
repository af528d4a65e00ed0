"""Which modality predicts what: the decomposition of a segmentation task into sub-tasks (CIML, Shen et al., 2024).

It is knowledge about a data set, so it stands in its ``dataset.json``, in the names used there:

    "nnunet_multimodal": {"decomposition": {"FLAIR": ["whole tumor"], "T1+T1CE": ["tumor core"], ...}}

A name, or several joined by ``+``, of ``channel_names``, and the regions or labels that these are primary for. Planning
and training check it and write it into the plans, as numbers. Without it every modality predicts everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_multimodal.errors import UserError
from nnunet_multimodal.modalities import check_groups
from nnunet_multimodal.preprocessing import channel_names

KEY = "decomposition"
WHERE = "under 'nnunet_multimodal' in dataset.json"


@dataclass(frozen=True)
class Subtask:
    """Primary modalities, and the output channels that they are primary for."""

    modalities: tuple[int, ...]
    channels: tuple[int, ...]


def check_subtasks(
    segmentors: Sequence[dict[str, Sequence[int]]] | None, num_modalities: int, num_classes: int, has_regions: bool
) -> list[Subtask]:
    """The sub-tasks that the plans state in numbers; one for each modality, for everything, if they state none.

    Raises:
        ValueError: fewer than two, a modality or an output channel that does not exist or belongs to nobody.
    """
    predicted = range(num_classes) if has_regions else range(1, num_classes)
    if segmentors is None:
        return [Subtask((m,), tuple(predicted)) for m in range(num_modalities)]
    subtasks = []
    for entry in segmentors:
        if set(entry) != {"modalities", "channels"}:
            raise ValueError(f"{_plans(segmentors)}: each must have 'modalities' and 'channels', got {entry}")
        if not entry["modalities"] or not entry["channels"]:
            raise ValueError(f"{_plans(segmentors)}: {entry} needs modalities to look at and channels to predict")
        subtasks.append(Subtask(tuple(map(int, entry["modalities"])), tuple(map(int, entry["channels"]))))
    if len(subtasks) < 2:
        raise ValueError(f"{_plans(segmentors)}: messages need at least two segmentors")
    for what, wanted in (("modalities", range(num_modalities)), ("channels", predicted)):
        named = [number for subtask in subtasks for number in getattr(subtask, what)]
        twice = any(len(set(getattr(t, what))) < len(getattr(t, what)) for t in subtasks)
        if set(named) != set(wanted) or twice:
            raise ValueError(
                f"{_plans(segmentors)}: their {what} are {named} and must be all of {list(wanted)}, each once in a "
                "segmentor"
            )
    return subtasks


def _plans(segmentors: Any) -> str:
    return f"ciml: segmentors={segmentors!r} in the plans file"


def decompose(dataset_json: dict[str, Any], label_manager: LabelManager, groups: Sequence[Sequence[int]]) -> dict:
    """What the ``ciml`` backbone must know of a data set: ``segmentors``, if it states any, and ``has_regions``.

    Args:
        dataset_json: nnU-Net's, with the decomposition.
        label_manager: nnU-Net's.
        groups: image channels of each modality.

    Raises:
        UserError: a name that does not exist or appears twice, a modality or a region that no segmentor has, channels
            that are only a part of a modality, or fewer than two segmentors.
    """
    options: dict[str, Any] = {"has_regions": bool(label_manager.has_regions)}
    stated = dataset_json.get("nnunet_multimodal", {}).get(KEY)
    if stated is None:
        return options
    if not isinstance(stated, dict) or not all(isinstance(names, list) for names in stated.values()):
        raise UserError(f"{KEY!r} {WHERE} must map channel names to lists of labels, such as {{'PET': ['tumour']}}")
    modalities, outputs = channel_names(dataset_json), output_names(dataset_json, label_manager)
    groups = check_groups(groups, len(modalities))
    segmentors = []
    for key, names in stated.items():
        chosen = [key] if key in modalities else [name.strip() for name in key.split("+")]
        channels = {_number(name, modalities, "channel", key) for name in chosen}
        primary = [m for m, group in enumerate(groups) if set(group) <= channels]
        if {channel for m in primary for channel in groups[m]} != channels:
            raise UserError(
                f"{KEY!r} {WHERE}: {key} is a part of a modality; 'modalities' in the plans file are "
                f"{[list(group) for group in groups]}"
            )
        if not names:
            raise UserError(f"{KEY!r} {WHERE}: {key} predicts nothing; give it some of {', '.join(outputs)}")
        numbers = [_number(name, list(outputs), "label or region", key) for name in names]
        if len(set(numbers)) < len(numbers):
            raise UserError(f"{KEY!r} {WHERE}: {key} has a label twice: {', '.join(names)}")
        segmentors.append({"modalities": primary, "channels": [list(outputs.values())[n] for n in numbers]})
    for what, missing in (
        ("channel", _missing(range(len(groups)), segmentors, "modalities", _group_names(modalities, groups))),
        ("label or region", _missing(outputs.values(), segmentors, "channels", {v: k for k, v in outputs.items()})),
    ):
        if missing:
            raise UserError(f"{KEY!r} {WHERE}: no segmentor has the {what} {', '.join(missing)}; give it one")
    if len(segmentors) < 2:
        raise UserError(f"{KEY!r} {WHERE} has one segmentor, and there is nobody to exchange messages with; split it")
    # the order of the keys means nothing, and weights must not depend on it
    return {**options, "segmentors": sorted(segmentors, key=lambda segmentor: segmentor["modalities"])}


def output_names(dataset_json: dict[str, Any], label_manager: LabelManager) -> dict[str, int]:
    """Labels or regions by name, with their output channel; without background and the ignore label."""
    names = {name: value for name, value in dataset_json["labels"].items() if name != "ignore"}
    if not label_manager.has_regions:
        return {n: int(np.ravel(v)[0]) for n, v in names.items() if int(np.ravel(v)[0]) != 0}
    # nnU-Net keeps the order of dataset.json and leaves out what is background alone
    regions = [n for n, v in names.items() if (v if isinstance(v, int) else tuple(v)) not in (0, (0,))]
    return {name: channel for channel, name in enumerate(regions)}


def _number(name: str, known: Sequence[str], what: str, key: str) -> int:
    if known.count(name) != 1:
        raise UserError(
            f"{KEY!r} {WHERE}: {name!r}, of {key!r}, is {known.count(name)} of the {what}s; there are: "
            f"{', '.join(known)}"
        )
    return known.index(name)


def _missing(
    wanted: Iterable[int], segmentors: Sequence[dict[str, list[int]]], what: str, names: dict[int, str]
) -> list[str]:
    named = {number for segmentor in segmentors for number in segmentor[what]}
    return [names[number] for number in wanted if number not in named]


def _group_names(modalities: Sequence[str], groups: Sequence[Sequence[int]]) -> dict[int, str]:
    return {m: "+".join(modalities[channel] for channel in group) for m, group in enumerate(groups)}
