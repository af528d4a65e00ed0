"""Sections of the page on missing modalities, and the table of ``nnunet-multimodal evaluate --all-subsets``."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

Result = dict[str, Any]
Table = Callable[..., str]
AVERAGE = "average"


def read_table(file: Path) -> dict[str, Any]:
    """subsets.csv as trainer (without its length) -> subset -> label -> metric -> numbers."""
    results: dict[str, Any] = {}
    for row in csv.DictReader(file.read_text().splitlines()):
        cell = {key: float(row[key]) for key in ("mean", "low", "high", "p", "p_holm") if row[key]}
        cell |= {key: int(row[key]) for key in ("n", "without_value")}
        subsets = results.setdefault(row["model"].split("_")[0], {})
        subsets.setdefault(row["subset"], {}).setdefault(row["label"], {})[row["metric"]] = cell
    return results


def subset_rows(results: dict[str, Any], label: str, metric: str, digits: int) -> list[tuple[str, ...]]:
    """A row for each subset, with the mean of every trainer."""
    subsets = next(iter(results.values()))
    return [(subset, *(cell(rows[subset][label][metric], digits) for rows in results.values())) for subset in subsets]


def cell(numbers: dict[str, Any], digits: int) -> str:
    """Mean [95 % interval], an asterisk where significant, and how many have no distance."""
    if "mean" not in numbers:
        return f"- ({numbers['without_value']} ∞)"
    text = f"{numbers['mean']:.{digits}f}" + ("*" if numbers.get("p_holm", 1) < 0.05 else "")
    if "low" in numbers:
        text += f" [{numbers['low']:.{digits}f}, {numbers['high']:.{digits}f}]"
    return text + (f" ({numbers['without_value']} ∞)" if numbers["without_value"] else "")


def missing_modalities(result: Result, table: Table) -> str:
    """Synthetic: what the issue asks for, and the averages by structure."""
    text = [
        "Four synthetic modalities; every structure shows in two, one in a single one. Mean Dice of",
        f"{result['test_cases']} test cases, averaged over the 15 subsets, by structure, and with all modalities.",
        f"Trained on complete cases or with {100 * result['missing']:.0f} % of the modalities missing at random; same",
        f"plan, {result['steps']} steps, one seed, predicted {'with' if result['mirrored'] else 'without'} mirroring.",
        "[95 % bootstrap interval]; * differs from ModalityDropoutTrainer (Wilcoxon, Holm).",
        *(["", result["note"]] if result.get("note") else []),
    ]
    everything = "+".join(result["modalities"])
    seconds = result["training_seconds"]
    for setting, models in result["results"].items():
        rows = [
            (
                trainer,
                *(cell(subsets[AVERAGE][s]["Dice"], 3) for s in (*result["structures"], "mean")),
                cell(subsets[everything]["mean"]["Dice"], 3),
                str(seconds[f"{setting}, {trainer}"]),
            )
            for trainer, subsets in models.items()
        ]
        head = ("", *result["structures"], "mean", "all modalities", "training (s)")
        text += ["", f"Trained on {setting} cases:", "", table(head, rows)]
    return "\n".join(text)


def missing_skips(result: Result, table: Table) -> str:
    """By the number of modalities."""
    results = result["results"]
    rows = [(skips, *(f"{value:.3f}" for value in means.values())) for skips, means in results.items()]
    text = [
        "ShaSpec on the set above, trained on complete cases with modality dropout: mean Dice by the number of",
        "modalities at prediction, with the absent ones' skips left out (the default) or substituted.",
        f"{result['steps']} steps, one seed, predicted without mirroring.",
        "",
        table(("skips", *next(iter(results.values()))), rows),
    ]
    return "\n".join(text)


def sts_missing(result: Result, table: Table) -> str:
    """The seven rows."""
    results = result["results"]
    text = [
        "Held-out patients of the split above, all subsets of the modalities at prediction, mean [95 % bootstrap",
        f"interval]; * differs from {result['baseline']} (Wilcoxon, Holm). Five patients: the smallest possible p is",
        "0.06, so no asterisk can appear, and intervals over five patients are rough. nnU-Net's own model, which never",
        f"saw a modality missing, gets zeros. Predicted {'with' if result['mirrored'] else 'without'} mirroring.",
        *(["", result["note"]] if result.get("note") else []),
        "",
        "Dice of the tumour:",
        "",
        table(("", *results), subset_rows(results, "tumour", "Dice", 3)),
        "",
        "HD95 (mm):",
        "",
        table(("", *results), subset_rows(results, "tumour", "HD95_mm", 1)),
    ]
    return "\n".join(text)


def sts_walk(result: Result, table: Table) -> str:
    """Time of every step, and what came out."""
    steps = [(name, str(seconds)) for name, seconds in result["seconds"].items() if seconds]
    cases = [
        (name, case["absent"] or "nothing", "-" if case["Dice"] is None else f"{case['Dice']:.3f}")
        for name, case in result["cases"].items()
    ]
    text = [
        "The commands of [the whole walk](howto/walk.md), on 20 patients with a very short training; five are held",
        f"out, two of which lack a modality. {sum(result['seconds'].values()) / 60:.0f} minutes in all; a report of",
        f"{result['report_mb']} MB.",
        "",
        table(("step", "seconds"), steps),
        "",
        table(("held-out patient", "absent", "Dice"), cases),
        "",
        table(("modalities at prediction", "Dice"), subset_rows(result["subsets"], "tumour", "Dice", 3)),
    ]
    return "\n".join(text)


def shaspec_inference(result: Result, table: Table) -> str:
    """Seconds and ratios."""
    rows = [
        (name, f"{seconds:.2f}", f"{result['ratio_to_all'][name]['median']:.2f}")
        for name, seconds in result["seconds"].items()
    ]
    text = [
        "One forward pass, median of the repeats; the encoders of a modality that is absent are not run. The bound",
        f"for one of four is {result['bound']}.",
        "",
        table(("", "seconds", "of all four"), rows),
    ]
    return "\n".join(text)


# benchmark -> its heading and what writes its section
SECTIONS: dict[str, tuple[str, Callable[[Result, Table], str]]] = {
    "missing_modalities": ("Missing modalities, synthetic", missing_modalities),
    "missing_skips": ("ShaSpec's skips", missing_skips),
    "sts_missing": ("Missing modalities, real PET/CT/MR data", sts_missing),
    "sts_walk": ("The whole walk, real PET/CT/MR data", sts_walk),
    "shaspec_inference": ("What ShaSpec's prediction costs", shaspec_inference),
}
