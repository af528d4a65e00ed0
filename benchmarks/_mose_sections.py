"""Sections of the page on MoSE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Result = dict[str, Any]
Table = Callable[..., str]


def modes(result: Result, table: Table) -> str:
    """Probabilities of the modes, distances, calibration."""
    needed = result["needed"]
    rows = [
        (
            name,
            " / ".join(f"{p:.2f}" for p in r["modes"][:-1]),
            f"{r['modes'][-1]:.2f}",
            f"{r['total_variation']:.3f}",
            f"{r['GED']:.3f}",
            f"{100 * r['ECE']:.2f} %",
            f"{r['training_seconds']}",
        )
        for name, r in result["results"].items()
    ]
    truth = " / ".join(f"{p:.2f}" for p in result["probabilities"])
    text = [
        "A disc and a square, either of which is labelled as its twin with a known probability, for the whole image:",
        f"four label maps of probability {truth} that nothing in the image tells apart. Found on held-out images;",
        "*none* is the weight of samples that are of no mode. Asked of MoSE: a total variation below",
        f"{needed['total_variation']}, an ECE below {100 * needed['ECE']:.0f} %; the run took {result['minutes']}",
        f"minutes of {needed['minutes']}. The number of images and `preference` were chosen on these figures:",
        "with 400 images and without it surplus experts kept 38 %.",
        "",
        table(("", "modes", "none", "total variation", "GED²", "ECE", "training (s)"), rows),
    ]
    experts = [
        (
            name,
            ", ".join(f"{w:.2f}" for w in sorted(r["expert_weights"], reverse=True)),
            f"{r['surplus_weight']:.2f}",
        )
        for name, r in result["results"].items()
        if "expert_weights" in r
    ]
    return "\n".join(
        [
            *text,
            "",
            "Weights of the experts, of which there are twice as many as modes, and what the surplus ones keep (those",
            "that are of no mode, or of one that another has more of):",
            "",
            table(("", "weights", "surplus"), experts),
        ]
    )


def mose_loss(result: Result, table: Table) -> str:
    """Time and memory beside what was asked for."""
    rows = []
    for name, r in result["results"].items():
        setting = name.split(", ")[0]
        needed, reference = result["needed"][setting], result["reference"][setting]
        rows.append(
            (
                name,
                f"{r['seconds']:.3f}",
                f"{needed['seconds']:.1f}",
                f"{reference['seconds']:.2f}",
                f"{r['mib']:.0f}",
                f"{needed['mib']:.0f}" if "mib" in needed else "-",
                f"{reference['mib']:.0f}" if "mib" in reference else "-",
            )
        )
    text = [
        "Forward and backward pass of costs, exact transport and divergence, 128 x 128 pixels, four raters: batch 16",
        "with 16 samples (LIDC) and batch 4 with 100. The reference is the authors' code on two cores. glibc was told",
        "to keep its memory; with its default allocator all took 1.1 to 1.4 times as long on a busy core.",
        "Another machine of two cores took 2.1 to 2.4 times as long with torch 2.13, 2.6 to 4.1 times with 2.14.1.",
        "",
        table(("", "seconds", "at most", "reference", "MiB", "at most", "reference"), rows),
    ]
    return "\n".join(text)


def mose_step(result: Result, table: Table) -> str:
    """Memory and time of a step in units of nnU-Net's."""
    text = [
        "Times nnU-Net's own network on the same plan: what is kept from the forward to the backward pass, the peak of",
        "a step with parameters and momentum, and its time. Samples are made one at a time, and again in the backward",
        "pass.",
    ]
    for kind, contenders in result["results"].items():
        rows = [
            (
                name, f"{r['saved_times']:.2f}", f"{r['peak_times']:.2f}",
                f"{r['step_times']['median']:.2f} ({r['step_times']['low']:.2f} to {r['step_times']['high']:.2f})",
            )
            for name, r in contenders.items()
        ]  # fmt: skip
        plan = result["plans"][kind]
        size = " x ".join(map(str, plan["patch"]))
        features = ", ".join(map(str, plan["features"]))
        text += ["", f"**{kind.upper()}**: patch {size}, batch {plan['batch']}, features {features}.", ""]
        text += [table(("", "kept", "peak", "step"), rows)]
    return "\n".join(text)


def lidc_mose(result: Result, table: Table) -> str:
    """Distances, M-IoU and calibration beside the floors."""
    columns = ("GED 16", "GED 100", "GED compact", "M-IoU 16", "M-IoU compact", "Dice")
    less = "GED 100 less the majority mask's"
    rows = [
        (
            name,
            *(f"{m[c]['mean']:.3f} ± {m[c]['standard_error']:.3f}" if c in m else "-" for c in columns),
            f"{100 * m['ECE']:.3f} %",
            f"{m[less]['mean']:+.3f} ({m[less]['low']:+.3f} to {m[less]['high']:+.3f})",
        )
        for name, m in result["methods"].items()
    ]
    rows += [
        (f"floor: {name}", f"{f['GED']:.3f}", "-", "-", f"{f['M-IoU']:.3f}", "-", "-", "-", "-")
        for name, f in result["floors"].items()
    ]
    rows += [
        (
            f"paper: {name}", f"{p['GED 16']:.3f}", f"{p['GED 100']:.3f}", f"{p['GED compact']:.3f}",
            f"{p['M-IoU 16']:.3f}", "-", "-", f"{100 * p['ECE']:.3f} %", "-",
        )
        for name, p in result["paper"].items()
    ]  # fmt: skip
    text = [
        f"{result['held_out_slices']} slices of held-out patients, mean ± standard error; *all*: a multi-rater data",
        "set (MoSE fits all four raters, SSN draws one, the deterministic network has the consensus). The paper's",
        "figures are of the whole data set and long trainings, the floors need no image but the raters' masks. The",
        "majority mask is what half of the raters or more drew; `nnunet-multimodal consensus`, which labelsTr is from,",
        "gives ties to the background (D_GED^2 0.257 on the first split's slices, where the majority mask has 0.252).",
        "MoSE's gate and its initialisation were chosen in short trials that looked at 150 of these slices too, so its",
        "figures are a little optimistic. In the last column the interval (95 %) is of patients drawn again and again.",
        "In the picture of slices an expert without a weight has that of the first row.",
        "",
        table(("", *columns, "ECE", less), rows),
    ]
    return "\n".join(text)


# benchmark -> its heading and what writes its section
SECTIONS: dict[str, tuple[str, Callable[[Result, Table], str]]] = {
    "modes": ("Does MoSE find the modes?", modes),
    "lidc_mose": ("MoSE on lung nodules with four raters", lidc_mose),
    "lidc_mose_second": ("MoSE on lung nodules with four raters, another split", lidc_mose),
    "lidc_mose_long": ("MoSE on lung nodules with four raters, trained longer", lidc_mose),
    "mose_loss": ("MoSE's loss", mose_loss),
    "mose_step": ("What MoSE costs in a training step", mose_step),
}
