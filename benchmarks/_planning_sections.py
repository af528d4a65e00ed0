"""Sections of the page on planning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Result = dict[str, Any]
Table = Callable[..., str]


def planning_memory(result: Result, table: Table) -> str:
    """The estimate beside what is kept and the peak, for every backbone and head."""
    text = [
        f"{result['modalities']} modalities, batch {result['batch']}, features",
        f"{', '.join(map(str, result['features']))}; all in units of nnU-Net's own network on the same plan: the",
        "estimate that planning goes by, the memory that is kept for the backward pass with the estimate's error, and",
        "the peak of a step, with parameters and momentum, with the error against that. Asked for: at most",
        f"{100 * result['bound']:.0f} %. Too high an estimate makes patches smaller than need be, too low a one lets",
        "a plan need more than its target. Planners add further encoders' parameters, which are not in this estimate.",
    ]
    for patch, contenders in result["results"].items():
        rows = [
            (
                name, f"{r['estimate_times']:.2f}", f"{r['saved_times']:.2f}", f"{100 * r['error_saved']:+.0f} %",
                f"{r['peak_times']:.2f}", f"{100 * r['error_peak']:+.0f} %",
            )
            for name, r in contenders.items()
        ]  # fmt: skip
        text += ["", f"**{patch}**", "", table(("", "estimate", "kept", "error", "peak", "error"), rows)]
    return "\n".join(text)


def planning_target(result: Result, table: Table) -> str:
    """Tensors of a step of each plan beside the memory that it is planned for."""
    text = [
        "Tensors that live at the peak of a training step in half precision, with parameters, gradients and momentum,",
        "of the plan that each planner makes for its own memory target. Counted on tensors without content; a GPU",
        "needs more, for nnU-Net's network too (kernels' workspaces, context): its authors [measured]"
        "(https://github.com/MIC-DKFZ/nnUNet/blob/master/documentation/resenc_presets.md) 7.7 GB with its plans for 8",
        "GB and 9.1 GB with ResEncM's. What needs no more than nnU-Net's own fits where that fits;",
        "plans with more than 8 GB of tensors alone do not fit 8 GB, as ResEncM's own did not.",
    ]
    for data, encoders in result["results"].items():
        own = result["data"][data]
        text += ["", f"**{data}**: {len(own['channels'])} channels, {own['labels']} labels, median image"
                 f" {' x '.join(map(str, own['shape']))}", ""]  # fmt: skip
        rows = []
        for encoder, plans in encoders.items():
            nnunets = next(iter(plans.values()))["peak_gb"]
            rows += [
                (
                    f"{encoder}: {name}", f"{p['target_gb']:g}", " x ".join(map(str, p["patch"])), p["batch"],
                    f"{p['peak_gb']:.2f}", f"{p['peak_gb'] / nnunets:.2f}",
                )
                for name, p in plans.items()
            ]  # fmt: skip
        text += [table(("", "target (GB)", "patch", "batch", "tensors (GB)", "of nnU-Net's"), rows)]
    return "\n".join(text)


def nnunet_suite(result: Result, table: Table) -> str:
    """Which trainer passes which scenario."""
    kinds = list(dict.fromkeys(kind for own in result["trainers"].values() for kind in own))
    rows = [
        (f"`{trainer}`", *(own.get(kind, {}).get("outcome", "not run") for kind in kinds))
        for trainer, own in result["trainers"].items()
    ]
    outcomes = [cell for _, *cells in rows for cell in cells]
    scenarios = [scenario for own in result["trainers"].values() for scenario in own.values()]
    seconds, commits = sum(s["seconds"] for s in scenarios), dict.fromkeys(s["commit"] for s in scenarios)
    text = [
        "The integration test in miniature: five folds of `2d`, `3d_lowres`, `3d_fullres` and the cascade on five",
        "synthetic cases, one step each; best configuration, ensemble, postprocessing, inference with five folds.",
        f"{outcomes.count('passed')} of {len(outcomes)} scenarios passed, of {len(rows)} trainers out of",
        f"{result['trainers_there_are']}; {seconds / 3600:.1f} hours of tests in all; commits {', '.join(commits)}.",
        "",
        table(("trainer", *(kind.replace("_", " + ") for kind in kinds)), rows),
    ]
    return "\n".join(text)


# benchmark -> its heading and what writes its section
SECTIONS: dict[str, tuple[str, Callable[[Result, Table], str]]] = {
    "nnunet_suite": ("Does every trainer do what nnU-Net does?", nnunet_suite),
    "planning_memory": ("Does planning know what is needed?", planning_memory),
    "planning_target": ("Does a plan for 8 GB need 8 GB?", planning_target),
}
