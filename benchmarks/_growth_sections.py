"""Sections of the page on how cost grows, and on the versions that this package works with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Result = dict[str, Any]
Table = Callable[..., str]
CALLS = ("training step", "prediction", "sampling")


def _slope(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def cost_growth(result: Result, table: Table) -> str:
    """Exponents of every curve, what is above linear and why."""
    plans = result["plans"].items()
    networks = "; ".join(
        f"{kind.upper()} {' x '.join(map(str, p['patch']))}, features {', '.join(map(str, p['features']))}, "
        f"batch {p['batch']}"
        for kind, p in plans
    )
    text = [
        "Time and memory (peak) of a training step, of the prediction of the batch and of sampling (the distribution",
        "of the batch and samples of one patch, with an SSN head where the head is deterministic), as one number grows",
        "and the others stay small. Exponents: slopes of lines through the logarithms, fitted to the points whose x is",
        f"at least {1 / result['upper']:g} of the largest; 1 is linear, 0 does not grow. In brackets what it comes to",
        f"at the largest x. The least of {result['repeats']} times. Where a part that does not grow is large, as with",
        f"networks as small as these, exponents are below those of large ones. {networks}.",
        *(["", result["note"]] if result.get("note") else []),
    ]
    for name, sweep in result["results"].items():
        curves = sweep["curves"]
        ends = sorted({x for curve in curves.values() for what in CALLS for x in curve[what]["x"]})
        head = (
            "",
            *(f"{what}: {kind}" for what in CALLS for kind in ("time", "memory")),
            "step: multiply-adds, forward",
        )
        text += ["", f"**{sweep['axis']}**, {ends[0]:,} to {ends[-1]:,} ({name}; {sweep['fixed']}):", ""]
        text.append(table(head, [_row(label, curve) for label, curve in curves.items()]))
        if "terms" in sweep:
            text += ["", *_terms(sweep["terms"], table)]
    above = [line for sweep in result["results"].values() for line in _above(sweep, result["linear"])]
    text += [
        "",
        f"Above linear (time or memory, exponent over {result['linear']}). CIML: every segmentor hears all others; its",
        "terms stand above. CRNP in 2D: every position of the bottleneck attends to every other one, so that time",
        "grows with the square of its positions, of which three stages leave as many as 64 x 64, and so does memory",
        "where torch has no fused attention (2.13: exponents 1.7 and 1.8; 2.14: none). nnU-Net's plans leave 4 to 8 a",
        "side. Times were taken beside other work.",
        "",
    ]
    return "\n".join([*text, *(above or ["nothing."])])


def _row(label: str, curve: Result) -> tuple[str, ...]:
    cells = []
    for what in CALLS:
        own = curve[what]
        cells.append(f"{_slope(own['exponents']['seconds'])} ({1000 * own['seconds'][-1]:,.0f} ms)")
        cells.append(f"{_slope(own['exponents']['mib'])} ({own['mib'][-1]:,.0f} MiB)")
    return label, *cells, _slope(curve["training step"]["exponents"]["million_multiply_adds"])


def _terms(terms: Result, table: Table) -> Iterator[str]:
    yield "What CIML's messages add to a network without them, and their attention to one without it. Of M"
    yield "segmentors each hears M - 1 messages, so that there are M (M - 1); the attention's first convolution has M"
    yield "inputs and 4 M outputs in each segmentor. Exponents of what is added against M (and against M (M - 1)), and"
    yield f"its share of the whole at M = {terms['training step']['messages']['x'][-1]}:"
    yield ""
    kinds = {"seconds": "time", "mib": "memory", "million_multiply_adds": "multiply-adds"}
    rows = []
    for what, parts in terms.items():
        for part, own in parts.items():
            cells = [
                f"{_slope(own[key]['exponent'])} ({_slope(own[key]['exponent_of_messages'])}), "
                f"{100 * own[key]['share_at_largest']:.0f} %"
                for key in kinds
            ]
            rows.append((f"{what}: {part}", *cells))
    yield table(("", *kinds.values()), rows)


def _above(sweep: Result, linear: float) -> Iterator[str]:
    for label, curve in sweep["curves"].items():
        for what in CALLS:
            own = curve[what]
            found = {key: own["exponents"][key] or 0 for key in ("seconds", "mib")}
            if max(found.values()) <= linear:
                continue
            text = (
                f"- {sweep['axis']}, {label}, {what}: time {found['seconds']:.2f}, memory {found['mib']:.2f}, "
                f"multiply-adds {_slope(own['exponents']['million_multiply_adds'])}."
            )
            if "beyond_linear" in own:
                beyond = own["beyond_linear"]
                parts = ", ".join(f"`{name}` {ms:,.1f}" for name, ms in beyond["operators_ms"].items())
                text += (
                    f" From {beyond['from']:,} to {beyond['to']:,} operators took {beyond['excess_ms']:,.1f} ms more "
                    f"than linear growth; the most: {parts} ms."
                )
            yield text


def install_matrix_versions(result: Result, table: Table) -> str:
    """One row for each environment."""
    rows = []
    for row in result["rows"]:
        asked, versions, tests = row["asked"], row.get("versions", {}), row.get("tests", {})
        minutes = sum(row.get(step, {}).get("seconds", 0) for step in ("install", "doctor", "tests")) / 60
        pins = [f"{name}=={asked[name]}" for name in ("nnunetv2", "torch") if asked[name]] + asked["pins"]
        outside = " (outside our requirement)" if asked["outside"] else ""
        counted = f"{tests['tests'] - tests['failed']} of {tests['tests']}" if "tests" in tests else "-"
        found = (versions.get(name, "-") for name in ("nnunetv2", "torch", "torchvision", "numpy"))
        rows.append(
            (
                versions.get("python", asked["python"]), (", ".join(pins) or "none") + outside, *found,
                row.get("installer", "-"), row["outcome"], counted, f"{minutes:.0f}",
            )
        )  # fmt: skip
    head = ("Python", "pins", "nnunetv2", "torch", "torchvision", "numpy", "with", "result", "tests", "minutes")
    commits = sorted({row["commit"] for row in result["rows"] if "commit" in row})
    return "\n".join(
        [
            "A fresh environment for each row: what is committed with `pip install '.[test]'` and the pins,",
            "`nnunet-multimodal doctor`, then the tests of the start-up hook, of nnU-Net's search for classes, of",
            "every backbone with every head, and a training with nnU-Net's commands. The newest nnunetv2 that pip can",
            f"install is {result['newest_nnunetv2']}. Commits {', '.join(commits)}. Minutes are of a busy machine.",
            "",
            table(head, rows),
            *_failures(result["rows"]),
        ]
    )


def _failures(rows: list[Result]) -> Iterator[str]:
    for row in rows:
        failed = [step for step in ("install", "doctor", "tests") if not row.get(step, {"passed": True})["passed"]]
        for step in failed:
            asked, own = row["asked"], row[step]
            said = own.get("error") or "; ".join(own.get("problems", ())) or _first(own.get("failures", {}))
            pins = f"nnunetv2 {asked['nnunetv2'] or 'newest'}, torch {asked['torch'] or 'newest'}"
            yield f"\nPython {asked['python']}, {pins}: {step} failed, `{' '.join(said.split())[-300:]}`."


def _first(failures: dict[str, str]) -> str:
    return next((f"{name}: {message}" for name, message in failures.items()), "no message")


# benchmark -> its heading and what writes its section
SECTIONS: dict[str, tuple[str, Callable[[Result, Table], str]]] = {
    "cost_growth": ("How cost grows", cost_growth),
    "install_matrix_versions": ("Which versions work together", install_matrix_versions),
}
