"""Where everything on the page comes from: versions, settings, seeds and commands, as far as files tell them.

What no file tells is not recorded, and nothing is guessed. Of a path only the last part is shown: a page names no
machine, user or folder beyond the names that its maker chose.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from nnunet_multimodal.provenance import PACKAGES, made
from nnunet_multimodal.report.evaluations import Evaluation, Subsets
from nnunet_multimodal.report.gather import Explanation, Predictions, Study
from nnunet_multimodal.report.models import Fold, TrainedModel

UNKNOWN = "not recorded"
SHOWN = 6  # different values of a row
Told = Mapping[str, str]  # a row's name -> what it says


class Value(NamedTuple):
    """What a row says; ``of`` whom, if not of all."""

    text: str
    of: str = ""


class Row(NamedTuple):
    """A row of a record; different folds or cases may have different values."""

    name: str
    values: list[Value]
    is_command: bool


class Record(NamedTuple):
    """All that is known of how one thing was made."""

    heading: str
    rows: list[Row]


def records(study: Study, made_on: str) -> list[Record]:
    """Of the page, every model, folder of predictions, evaluation, table of subsets and explanation."""
    return [
        Record("This page", rows_of({"": {"made": made_on, **_of_made({"made": made()})}}, _count)),
        *(of_model(model) for model in study.models),
        *(of_predictions(run) for run in study.predictions if run.files),
        *(of_evaluation(run.name, run.evaluation) for run in study.predictions if run.evaluation),
        *(of_subsets(subsets) for subsets in study.subsets),
        *(of_explanation(explanation) for explanation in study.explanations),
    ]


def of_model(model: TrainedModel) -> Record:
    """A start of each fold's training, or several where it went on."""
    told = {}
    for fold in model.folds:
        starts = fold.starts or ({},)
        for number, start in enumerate(starts, start=1):
            who = f"fold {fold.name}" if len(starts) == 1 else f"fold {fold.name}, start {number}"
            told[who] = _of_start(model, fold, start, number == len(starts))
    return Record(f"Training: {model.trainer}, {model.configuration}", rows_of(told, "; ".join))


def _of_start(model: TrainedModel, fold: Fold, start: Mapping[str, Any], is_last: bool) -> Told:
    """What is known of a start: from its log, and of the last one from nnU-Net's debug.json, which each writes anew."""
    environment = dict(fold.environment) if is_last else {}
    torch = {"torch": environment.pop("torch")} if "torch" in environment else {}
    seed = start.get("seed", "none") if start else UNKNOWN  # nnU-Net's own command has none
    command = shown_command(start.get("command"))
    return {
        "data set": model.dataset,
        "plans": model.plans,
        "versions": shown_versions({**torch, **start.get("versions", {})}),
        "seed": "none" if seed is None else str(seed),
        **({"processes": str(start["processes"])} if "processes" in start else {}),
        **environment,
        **({"options of the method": model.options} if model.options else {}),
        "command": command,
        **({"a command like it": model.train_command(fold)} if command == UNKNOWN else {}),
    }


def of_predictions(run: Predictions) -> Record:
    """Of our command from every CASE.json, of nnU-Net's from its predict_from_raw_data_args.json."""
    told = {case: _of_case(run.summaries.get(case, {})) for case in run.files}
    shared = {"plans": str(run.plans_json.get("plans_name", UNKNOWN)), **_of_nnunets_arguments(run.arguments)}
    rows = rows_of({case: {**shared, **own} for case, own in told.items()}, _count)
    return Record(f"Predictions: {run.name}", rows)


def _of_case(summary: Mapping[str, Any]) -> Told:
    sampling = {
        "samples": summary.get("samples"),
        "drawn from": summary.get("drawn_from"),
        "seed": summary.get("seed"),
        "temperature": summary.get("temperature"),
        "class scale": summary.get("class_scale"),
        "compact (samples with weights)": summary.get("compact"),
        "modalities dropped": summary.get("drop"),
    }
    return {
        "trainer": str(summary.get("trainer", UNKNOWN)),
        **of_identity(summary),
        **({name: shown(value) for name, value in sampling.items()} if summary else {}),
        **_of_made(summary),
    }


def _of_nnunets_arguments(arguments: Mapping[str, Any]) -> Told:
    """What nnU-Net writes down of a prediction: neither model nor mirroring."""
    images = arguments.get("list_of_lists_or_source_folder")
    previous = arguments.get("folder_with_segs_from_prev_stage")
    named = {
        "images": last_part(images) if isinstance(images, str) else None,
        "previous stage": last_part(previous) if isinstance(previous, str) else None,
        "probabilities saved": arguments.get("save_probabilities"),
        "parts": arguments.get("num_parts"),
    }
    return {name: shown(value) for name, value in named.items() if value is not None}


def of_identity(told: Mapping[str, Any]) -> Told:
    """What our commands note of the model that they predict with."""
    files = told.get("checkpoints", ())
    folder = Path(told.get("folder", ""))  # of the predictions of subsets
    return {
        "model": told.get("model") or "/".join(folder.parts[-2:]) or UNKNOWN,
        "checkpoints": "; ".join(_checkpoint(*file) for file in files) or UNKNOWN,
        "step of the window": shown(told.get("step_size")),
        "mirrored": shown(told.get("mirroring")),
    }


def _checkpoint(file: str, size: int, seconds: int) -> str:
    written = datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return f"{'/'.join(Path(file).parts[-2:])} ({size / 1e6:.1f} MB, {written})"


def of_evaluation(name: str, evaluation: Evaluation) -> Record:
    """Of ``evaluate``, or nnU-Net's summary.json."""
    references = [_reference_folder(file) for file in evaluation.references.values()]
    raters = [file.parent.name for of_case in evaluation.raters.values() for file in of_case.values()]
    ours = evaluation.first_samples is not None
    told = {
        "file": evaluation.file.name,
        "references": _several(references),
        "raters": _several(raters) if raters else "none",
        "tolerance of the surface distance": shown_mm(evaluation.tolerance_mm),
        **({"first samples measured too": shown(evaluation.first_samples)} if ours else {}),
        **_of_made({"made": evaluation.made}),
    }
    return Record(f"Evaluation: {name}", rows_of({"": told}, _count))


def _reference_folder(file: Path) -> str:
    """``labelsTs``, or ``majority of raters`` of an evaluation without references."""
    text = str(file)
    return f"majority of {file.name}" if text.startswith("majority of ") else file.parent.name


def shown_mm(value: float) -> str:
    """NaN is nnU-Net's, which measures none."""
    return "not measured" if value != value else f"{value:g} mm"


def of_subsets(subsets: Subsets) -> Record:
    """Of ``evaluate --all-subsets``: each model's, and the command."""
    shared = {"baseline": str(subsets.made_with.get("baseline", UNKNOWN)), **_of_made(subsets.made_with)}
    told = {model: {**of_identity(own), **shared} for model, own in subsets.identities.items()}
    return Record(f"Subsets of the modalities: {subsets.name}", rows_of(told or {"": shared}, "; ".join))


def of_explanation(explanation: Explanation) -> Record:
    """Of ``explain`` or ``uncertainty``."""
    told = {}
    for command, own in (explanation.made_with or {"": {}}).items():
        method = own.get("attribution")
        attribution = {"attribution": shown(method), "steps of integrated gradients": str(own.get("steps"))}
        told[command] = {**of_identity(own), **(attribution if method else {}), **_of_made(own)}
    return Record(f"Explanation: {explanation.name}", rows_of(told, "; ".join))


def _of_made(told: Mapping[str, Any]) -> Told:
    own = told.get("made", {})
    return {"versions": shown_versions(own.get("versions", {})), "command": shown_command(own.get("command"))}


def rows_of(told: Mapping[str, Told], name_several: Callable[[list[str]], str]) -> list[Row]:
    """Rows of what several folds or cases tell, values that all share told once.

    Args:
        told: fold or case -> its rows.
        name_several: what a value is ``of``, from names of folds or cases.
    """
    rows = []
    for name in dict.fromkeys(name for own in told.values() for name in own):
        groups: dict[str, list[str]] = {}
        for who, own in told.items():
            groups.setdefault(own.get(name, UNKNOWN), []).append(who)
        values = [Value(text, name_several(who) if len(groups) > 1 else "") for text, who in groups.items()]
        more = [Value(f"and {len(values) - SHOWN} more")] if len(values) > SHOWN else []
        rows.append(Row(name, [*values[:SHOWN], *more], "command" in name))
    return rows


def _count(cases: list[str]) -> str:
    return f"{len(cases)} case{'' if len(cases) == 1 else 's'}"


def _several(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(name or UNKNOWN for name in names)) or UNKNOWN


def shown(value: Any) -> str:
    """A setting in words."""
    if value is None:
        return UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def shown_versions(versions: Mapping[str, str]) -> str:
    """Of our package, nnU-Net, torch and Python."""
    if not versions:
        return UNKNOWN
    return ", ".join(f"{name} {versions.get(name, UNKNOWN)}" for name in (*PACKAGES, "python"))


def shown_command(words: Sequence[str] | None) -> str:
    """As it was typed, with paths' last parts alone."""
    return shlex.join(map(_without_folders, words)) if words else UNKNOWN


def _without_folders(word: str) -> str:
    if re.match(r"-[^-=]*[/\\]", word):  # a flag of one letter and its value in one word
        return word[:2] + last_part(word[2:])
    flag, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    return f"{flag}{equals}{last_part(value)}"


def last_part(path: str) -> str:
    """The name of a file or folder, whichever system it is of; what is not UTF-8 in it is escaped."""
    last = next((part for part in reversed(re.split(r"[/\\]", path)) if part), path)
    return last.encode("utf-8", "backslashreplace").decode()
