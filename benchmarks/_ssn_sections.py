"""The sections of docs/benchmarks.md on SSN and sampling; ``make_page`` puts them on the page."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

Result = dict[str, Any]
Table = Callable[..., str]
MIB = 2**20


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def seconds(value: dict[str, float]) -> str:
    return f"{value['median']:.3f} ({value['low']:.3f} to {value['high']:.3f})"


def with_error(value: dict[str, float]) -> str:
    if not value["slices"]:
        return "-"
    return f"{value['mean']:.3f} ± {value['standard_error']:.3f}"


def ssn_toy(result: Result, table: Table) -> str:
    """Log-likelihoods beside the paper's."""
    rows = []
    for name, model in result["models"].items():
        value = model["log_likelihood_nats"]
        span = f"{value['min']:.3f} to {value['max']:.3f}"
        rows.append(
            (name, number(value["mean"], 3), span, model["paper"], f"{model['seconds_per_seed']['median']:.0f}")
        )
    text = [
        "The paper's toy problem (5.1): a line of 21 pixels, two equally likely label maps that differ in the",
        "middle third, 200 samples, Adam, float32, one core, no early stopping. The best possible is log(1/2) =",
        f"{result['limit']:.3f} nats. {result['repeats']} seeds.",
        "",
        table(("", "log-likelihood (nats)", "seeds", "paper", "s for a seed"), rows),
    ]
    return "\n".join(text)


def ssn_loss(result: Result, table: Table) -> str:
    """Time and memory against the obvious formulation."""
    rows = []
    for allocator, by_threads in result["time"].items():
        for threads, kinds in by_threads.items():
            for kind, of in kinds.items():
                name = f"{allocator} allocator, threads: {threads}, {kind}"
                rows.append((name, *(seconds(s) for s in of["seconds"].values())))
    contenders = list(next(iter(next(iter(next(iter(result["time"].values())).values())).values()))["seconds"])
    memory = [(kind, *(f"{mib:.0f}" for mib in peak.values())) for kind, peak in result["memory"]["peak_mib"].items()]
    text = [
        "Forward and backward pass of the likelihood at 4 classes, rank 10, 20 samples, batch 2, 64 x 64 x 64,",
        "against the obvious formulation: all samples in memory, `F.cross_entropy`, logsumexp. *Random* is random",
        "parameters, of which a single sample has all the weight; *realistic* has a smooth mean that agrees with",
        "the labels, and several samples count; in the *worst* case all do. Seconds, median and quartiles,",
        "contenders in turns.",
        "",
        table(("", *contenders), rows),
        "",
        "Peak memory beyond inputs and gradients (MiB):",
        "",
        table(("", *contenders), memory),
    ]
    return "\n".join(text)


def ssn_stress(result: Result, table: Table) -> str:
    """What was not finite."""
    rows = []
    for name, of in result["results"].items():
        found, ends = of["not_finite"], of["mean_loss_of_50_steps"]
        counts = (found["losses"], found["gradients"], found["weights"], found["skipped_steps"])
        rows.append((name, *counts, f"{ends['first']:.2f}", f"{ends['last']:.2f}", f"{of['largest_deviation']:.0f}"))
    head = ("", "losses", "gradients", "weights", "steps skipped", "loss, first 50", "last 50", "largest deviation")
    text = [
        "Training steps in emulated half precision on constant patches, air, empty foreground, single voxels,",
        "filled patches and ordinary ones in turn: how many values were not finite. *Skipped* are steps whose",
        "scaled gradients overflowed in fp16, which the gradient scaler leaves out, as in nnU-Net.",
        "",
        table(head, rows),
    ]
    return "\n".join(text)


def ssn_predict(result: Result, table: Table) -> str:
    """Seconds and memory of plain and sampled prediction."""
    parts = list(dict.fromkeys(part for of in result["results"].values() for part in of["seconds"]))
    rows = [(part, *(number(of["seconds"].get(part), 1) for of in result["results"].values())) for part in parts]
    peak = [f"{of['peak_resident_bytes'] / 2**30:.2f}" for of in result["results"].values()]
    text = [
        "4 channels, 4 classes, rank 10, 20 samples, random weights, no mirroring; the image's size and the features",
        "of the first stage (nnU-Net's own: 32) are in the command. Seconds; network, blending and drawing together",
        f"take {100 * result['sampling_adds_to_plain']:.0f} % more than the plain prediction's network and blending.",
        "What it adds is the blending of 48 parameters in place of 4 logits, and so the less the larger the network.",
        "",
        table(("", *result["results"]), [*rows, ("peak resident memory (GiB)", *peak)]),
    ]
    return "\n".join(text)


def pairwise_iou(result: Result, table: Table) -> str:
    """Bits against a matrix product."""
    rows = []
    for size, kinds in result["results"].items():
        for kind, of in kinds.items():
            cells = [seconds(of["seconds"][how]) for how in ("bits", "matrix product")]
            rows.append((f"{size}, {kind}", *cells, f"{of['peak_bytes']['bits'] / MIB:.0f}"))
    text = [
        "All pairwise IoUs of samples with 4 classes, the costly part of the energy distance: packed bits (used)",
        "against a matrix product. Processor seconds of one thread.",
        "",
        table(("", "bits (s)", "matrix product (s)", "memory of bits (MiB)"), rows),
    ]
    return "\n".join(text)


def lidc(result: Result, table: Table) -> str:
    """Models and floors on held-out slices."""
    columns = {"ged2": "D_GED^2", "diversity": "diversity", "dice": "Dice", "dice_nod": "DSC_nod"}
    rows = []
    for name, of in (*((n, m["scores"]) for n, m in result["methods"].items()), *result["floors"].items()):
        rows.append((name, *(with_error(of[key]) if key in of else "-" for key in columns)))
    raters = result["raters"]
    rows.append(("raters", *(with_error(raters[key]) if key in raters else "-" for key in columns)))
    plan, slices = result["plan"], result["slices"]
    times = sorted(m["training_s"] for m in result["methods"].values())
    text = [
        f"Lung nodules with four raters, split by patient: {slices['training']} slices to train,",
        f"{slices['held_out']} held out, the middle {plan['patch_size'][0]} x {plan['patch_size'][1]} pixels.",
        f"Every model has the same plan and length (median {statistics.median(times):.0f} s of training) and is",
        "trained on one rater per slice, drawn once, or on all raters as labels of their own. 100 samples; mean ±",
        "standard error over slices; one seed. Deterministic models have their one prediction. Not comparable",
        "with the paper's figures one to one: these are not its 15,096 crops. The floors need no learning. The",
        "default weight of SSN's likelihood was chosen on a quarter of these held-out slices (109), on which weights",
        "1, 20 and 100 gave 0.46, 0.29 and 0.30: SSN's figures are a little optimistic for it.",
        "",
        table(("", *columns.values()), rows),
        *(["", result["note"]] if result.get("note") else []),
    ]
    return "\n".join(text)


def sts_ssn(result: Result, table: Table) -> str:
    """Coverage of volume intervals."""
    rows = []
    methods = [(n, t, s) for n, m in result["methods"].items() for t, s in m["temperatures"].items()]
    for name, temperature, s in [*methods, *((n, "-", s) for n, s in result["floors"].items())]:
        scores = (
            "relative_width",
            "relative_interval_score",
            "dice",
            "sample_dice",
            "sample_dice_q95",
            "fraction_better",
            "ged2",
            "diversity",
        )
        covered = f"{s['covered']} of {s['patients']}"
        rows.append((f"{name}, T = {temperature}", covered, *(number(s.get(key), 3) for key in scores)))
    head = (
        "", "truth within", "width / volume", "interval score / volume", "Dice", "Dice of a sample", "95 % quantile",
        "samples better", "D_GED^2", "diversity",
    )  # fmt: skip
    text = [
        "Volume of the tumour with its 95 % interval over 100 samples, for the held-out patients of the split",
        "above, at several temperatures T. nnU-Net's own model has its mirrors as samples. The last row is the",
        "interval of the training patients' volumes, without any model. The interval score (lower is better) is the",
        f"width plus a penalty for a truth outside. {result['caveat']}",
        "",
        table(head, rows),
        *(["", result["note"]] if result.get("note") else []),
    ]
    return "\n".join(text)


# benchmark -> its heading and what writes its section
SECTIONS: dict[str, tuple[str, Callable[[Result, Table], str]]] = {
    "lidc": ("SSN on lung nodules with four raters", lidc),
    "lidc_long": ("SSN on lung nodules with four raters, trained longer", lidc),
    "sts_ssn": ("Intervals of a tumour's volume", sts_ssn),
    "ssn_toy": ("SSN's toy problem", ssn_toy),
    "ssn_loss": ("What SSN's loss costs", ssn_loss),
    "ssn_predict": ("What samples of a whole image cost", ssn_predict),
    "ssn_stress": ("SSN in half precision", ssn_stress),
    "pairwise_iou": ("Pairwise IoUs of samples", pairwise_iou),
}
