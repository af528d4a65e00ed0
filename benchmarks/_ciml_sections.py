"""Sections of the page on CIML."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Result = dict[str, Any]
Table = Callable[..., str]


def shape_composition(result: Result, table: Table) -> str:
    """What the issue asks for, with and without the Kullback-Leibler term."""
    needed = result["needed"]
    rows = [
        (
            name,
            f"{r['dice']:.4f}",
            f"{100 * r['energy_ellipse_alone']:.0f} %",
            f"{100 * r['energy_overlap']:.0f} %",
            f"{100 * r['energy_triangle_alone']:.0f} %",
            f"{100 * r['energy_above_background_ellipse_alone']:.0f} %",
            f"{r['nats_per_pixel']:.3f}",
        )
        for name, r in result["results"].items()
    ]
    area = 100 * next(iter(result["results"].values()))["area_ellipse_alone"]
    text = [
        "A triangle (primary) and an ellipse (auxiliary); the task is their union. Where the energy of the",
        "complementary information is (squared deviation from its background level, mean over held-out pairs): in the",
        f"ellipse outside the triangle ({area:.0f} % of the image), in both, in the triangle alone; the rest lies",
        "outside, most of it where an ellipse could be and is not, which the map says a little below its background",
        "(the picture's halo); the fifth column is therefore the share of what lies above the background.",
        f"Asked for: Dice {needed['dice']}, {100 * needed['share']:.0f} % in the ellipse alone,",
        f"{needed['minutes']} minutes; the run took {result['minutes']}.",
        "",
        table(
            ("", "Dice", "ellipse alone", "overlap", "triangle alone", "above: ellipse alone", "nats per pixel"), rows
        ),
    ]
    return "\n".join(text)


def ciml_cost(result: Result, table: Table) -> str:
    """Multiples of nnU-Net, and the estimate's error."""
    rows = []
    for plan, figures in result["results"].items():
        rows += [
            (
                f"{plan}: {name}",
                f"{f['estimate_times']:.2f}",
                f"{f['saved_times']:.2f}",
                f"{f['peak_times']:.2f}",
                f"{100 * f['estimate_error_saved']:+.0f} %",
                f"{f['step_times']['median']:.2f}",
                f"{f['prediction_times']['median']:.2f}",
            )
            for name, f in figures.items()
            if f["estimate_times"] != 1
        ]
    text = [
        "As multiples of nnU-Net's network on the same plan: the estimate that planning goes by, the memory that is",
        "kept for the backward pass, the peak of a step, the estimate's error against what is kept, and the time of a",
        f"step and of a prediction. Asked for: an error of at most {100 * result['bound']:.0f} %.",
        "",
        table(("", "estimate", "kept", "peak", "error", "step", "prediction"), rows),
    ]
    if "grouping" in result:
        grouping = [
            (
                plan,
                *(f"{f[key]['median']:.2f}" for key in ("grouped_forward_and_backward_times", "grouped_forward_times")),
            )
            for plan, f in result["grouping"].items()
        ]
        text += [
            "",
            "All segmentors at once, as one network with grouped convolutions, in units of one after the other",
            "(without messages; above one, the loop is faster):",
            "",
            table(("", "forward and backward", "forward"), grouping),
        ]
    return "\n".join(text)


def ciml_brats2013(result: Result, table: Table) -> str:
    """What is said of the patient who was left out."""
    weights = [(pair, _cell(weight)) for pair, weight in result["weights"].items()]
    contributions = [
        (f"{c['modality']}: {c['label']}", *(_cell(c[key]) for key in ("volume_ml", "volume_without_ml")),
         *(_cell(c[key]) for key in ("Dice", "Dice_without", "changed")))
        for c in result["contributions"]
    ]  # fmt: skip
    text = [
        "Two patients to train, one to look at: nothing is claimed from it. FLAIR answers for the whole tumour, T1CE",
        f"for the core and the enhancing tumour; {result['steps']} steps. With two segmentors each hears one other,",
        "whose share is therefore one where there is any. What changes when a modality is left out:",
        "",
        table(("left out", "volume (ml)", "without (ml)", "Dice", "Dice without", "changed"), contributions),
        "",
        "Complementary information weights:",
        "",
        table(("", "weight"), weights),
    ]
    return "\n".join(text)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


# benchmark -> its heading and what writes its section
SECTIONS: dict[str, tuple[str, Callable[[Result, Table], str]]] = {
    "shape_composition": ("ShapeComposition: what is complementary", shape_composition),
    "ciml_brats2013": ("CIML on three patients with glioma", ciml_brats2013),
    "ciml_cost": ("What CIML costs", ciml_cost),
}
