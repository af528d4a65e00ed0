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
        "a plan need more than its target.",
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


# benchmark -> its heading and what writes its section
SECTIONS: dict[str, tuple[str, Callable[[Result, Table], str]]] = {
    "planning_memory": ("Does planning know what is needed?", planning_memory),
}
