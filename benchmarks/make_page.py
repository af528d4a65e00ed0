"""Write docs/benchmarks.md from the committed results, so that no figure is ever typed by hand."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import _ciml_sections as ciml
import _common as common
import _growth_sections as growth
import _missing_sections as missing
import _mose_sections as mose
import _planning_sections as planning
import _ssn_sections as ssn

Result = dict[str, Any]


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table, all columns but the first to the right."""
    head = list(head)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *[list(map(str, row)) for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _times(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _range(value: dict[str, float]) -> str:
    same = value["min"] == value["max"]
    return f"{value['mean']:.4f}" + ("" if same else f" ({value['min']:.4f} to {value['max']:.4f})")


def handwritten(result: Result) -> str:
    """The classification table and the check of the RNP."""
    rows = [
        (name, v["seeds"], _range(v["accuracy"]), _range(v["auroc"]), f"{v['seconds']['mean']:.0f}")
        for name, v in result["variants"].items()
    ]
    paper = result["paper"]
    rows.append(("CRNP as published (Table 4)", "", f"{paper['accuracy']:.4f}", f"{paper['auroc']:.4f}", ""))
    text = [
        "Digits seen through six sets of features, 1,600 to train and 400 to test: one layer per view, CRNP on the",
        "vectors, one layer to the classes. One test image is 0.0025 of accuracy. Mean over seeds, range in brackets.",
        "Concatenation alone solves this task: a smoke test of the fusion on vectors, and no evidence for CRNP.",
        "",
        table(("variant", "seeds", "accuracy", "AUROC", "training (s)"), rows),
    ]
    levels = result["variants"].get("CRNP", {}).get("noise", ())
    if levels:
        noise = [(f"{x['sd']} SD", _range(x["ood_auroc"]), _range(x["accuracy"])) for x in levels]
        text += [
            "",
            "How well the RNP's error alone tells test inputs with added Gaussian noise from clean test inputs:",
            "",
            table(("noise", "AUROC of the RNP's error", "accuracy on the noisy inputs"), noise),
        ]
    return "\n".join(text)


def crnp_cost(result: Result) -> str:
    """Ratios to plain nnU-Net, the bound, and the parts of a step."""
    text = [
        "Times plain nnU-Net (its own network and loss) on the same plan; medians, quartiles in brackets. *Kept* is",
        "the memory that lives from the forward to the backward pass. The bound is M passes of a one-channel encoder,",
        "one decoder with its loss and the optimiser, from the times of these parts measured alone: what remains above",
        "it is what CRNP itself costs. EarlyFusion is nnU-Net's network built from this package's parts.",
    ]
    head = ("", "step (s)", "step, ratio", "kept, ratio", "peak, ratio", "inference, ratio", "G multiply-adds")
    for plan, by_modalities in result["results"].items():
        p = result["plans"][plan]
        patch, features = " x ".join(map(str, p["patch"])), ", ".join(map(str, p["features"]))
        rows = [row for count, r in by_modalities.items() for row in _cost_rows(count, r)]
        text += ["", f"**{plan.upper()}**: patch {patch}, batch {p['batch']}, features {features}.", ""]
        text += [
            table(head, rows),
            "",
            "The parts of CRNP's step, each measured alone:",
            "",
            _parts_table(by_modalities),
        ]
    return "\n".join(text)


def _cost_rows(count: str, result: Result) -> Iterable[tuple[str, ...]]:
    for name, c in result["contenders"].items():
        memory = c["memory_ratio"]
        yield (
            f"M = {count}, {name}",
            f"{c['step_seconds']['median']:.3f}",
            _times(c["step_ratio"]),
            f"{memory['saved']:.2f}",
            f"{memory['step_peak']:.2f}",
            _times(c["inference_ratio"]),
            _number(c["giga_multiply_adds"], 1),
        )
    bound = result["bound"]
    yield (f"M = {count}, bound", "", _times(bound["step_ratio"]), f"{bound['saved_ratio']:.2f}", "", "", "")


def _parts_table(by_modalities: dict[str, Result]) -> str:
    parts = list(next(iter(by_modalities.values()))["parts_seconds"])
    head = (
        "M",
        *(f"{part} (ms)" for part in parts),
        "RNP and fusion of the step",
        "step over the bound",
        "kept over it",
    )
    rows = []
    for count, r in by_modalities.items():
        times = [f"{1000 * r['parts_seconds'][part]['median']:.1f}" for part in parts]
        share, excess = f"{100 * r['fusion_share_of_step']['median']:.1f} %", r["excess_over_bound"]
        rows.append((count, *times, share, f"{excess['step']['median']:.3f}", f"{excess['saved']:.3f}"))
    return table(head, rows)


def sts(result: Result) -> str:
    """Dice and HD95 of floors and trainers."""
    rows = [
        (name, _number(m["dice"], 3), _number(m["hd95_mm"], 1), m.get("training_s", ""))
        for name, m in result["methods"].items()
    ]
    cases = list(next(iter(result["methods"].values()))["cases"])
    by_case = [
        (name, *(_number(m["cases"][case]["dice"], 3) for case in cases)) for name, m in result["methods"].items()
    ]
    plan, published = result["plan"], result["published_dice"]
    spacing, patch = (" x ".join(f"{x:g}" for x in plan[key]) for key in ("spacing_mm", "patch_size"))
    text = [
        f"{result['training_cases']} patients to train, {len(cases)} held out; {spacing} mm, patch {patch},",
        f"batch {plan['batch_size']}, features {', '.join(map(str, plan['features_per_stage']))}. One seed. The two",
        f"floors are computed without any learning on the same {len(cases)} cases, and so differ from those in the",
        f"data's own notes: {', '.join(f'{name} {value}' for name, value in published.items())}.",
        "So few cases and one seed cannot tell which trainer is better; all are far above the floors.",
        "",
        table(("", "mean Dice", "mean HD95 (mm)", "training (s)"), rows),
        "",
        *([result["note"], ""] if result.get("note") else []),
        "Dice by case:",
        "",
        table(("", *cases), by_case),
    ]
    return "\n".join(text)


def report_size(result: Result) -> str:
    """Bytes, what making the page costs, and what a browser says of it."""
    bytes_of, report, opened = result["bytes"], result["report"], result["browser"]
    megabytes = {name: f"{size / 1e6:.1f} MB" for name, size in bytes_of.items()}
    problems = len(opened["console_errors_and_warnings"])
    rows = [
        *((f"files of {kind}", megabytes[kind]) for kind in ("images", "labels", "predictions")),
        ("page", megabytes["page"]),
        ("of which pictures, at most (`--megabytes`)", megabytes["pictures_at_most"]),
        ("making it", f"{report['processor_seconds']:.0f} s of one processor, {report['seconds']:.0f} s in all"),
        ("peak memory", f"{report['peak_resident_bytes'] / 1e9:.2f} GB"),
        ("opened, to the first case's pictures", f"{opened['seconds_to_first_pictures']:.1f} s"),
        ("to another case's", f"{opened['seconds_to_another_case']:.1f} s"),
        ("errors and warnings in the console", problems),
        ("requests of a network", len(opened["requests_of_a_network"])),
    ]
    text = [
        "Synthetic cases of four modalities, with references, predictions, 20 samples and three maps each, evaluated;",
        "opened by headless Chromium without a GPU. Where the load (below) exceeds the cores, seconds are others' too.",
        f"The page shows {result['shown_samples']} samples of each, and says: {opened['smaller'].split('  ')[0]}",
        "",
        table(("", ""), rows),
    ]
    return "\n".join(text)


# benchmark -> its heading and what writes its section
SECTIONS: dict[str, tuple[str, Callable[[Result], str]]] = {
    "sts": ("Real PET/CT/MR data", sts),
    "crnp_cost": ("What CRNP costs", crnp_cost),
    "handwritten": ("CRNP on vectors: Handwritten", handwritten),
    "report_size": ("How large is a report?", report_size),
    **{
        name: (heading, partial(write, table=table))
        for name, (heading, write) in {
            **missing.SECTIONS,
            **ssn.SECTIONS,
            **ciml.SECTIONS,
            **mose.SECTIONS,
            **planning.SECTIONS,
            **growth.SECTIONS,
        }.items()
    },
}


def provenance(result: Result) -> str:
    """What was run on what, in one paragraph."""
    machine, versions = result["machine"], result["versions"]
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine.get('ram_gib', '?')} GiB"
    if "gpu" in machine:
        where = f"{machine['gpu']} ({machine['gpu_gib']} GiB); {where}"
    return (
        f"`{result['command']}`, {result['date'][:10]}; {where}, {machine['threads']} threads, load "
        f"{machine.get('load_average_15_min', '?')}; " + ", ".join(f"{name} {v}" for name, v in versions.items()) + "."
    )


def belongs(picture: str, name: str, suffix: str) -> bool:
    """Whether NAME.png or NAME_something.png is this benchmark's, and not another's whose name begins alike."""
    others = [other for other in SECTIONS if other.startswith(f"{name}_")]
    device = "_cuda" if picture.endswith("_cuda") else ""
    return device == suffix and (f"{picture}_").startswith(f"{name}_") and not picture.startswith(tuple(others))


def page(results: Path, docs: Path) -> str:
    """The whole page."""
    text = [
        "# Benchmarks",
        "",
        "Written by `python benchmarks/make_page.py` from the files in `benchmarks/results`; change nothing here by",
        "hand. How to run a benchmark and what it measures: [benchmarks/README.md](../benchmarks/README.md).",
    ]
    for name, (heading, section) in SECTIONS.items():
        for stem, device in ((name, ""), (f"{name}_cuda", ", on a GPU")):
            file = results / f"{stem}.json"
            if not file.exists():
                continue
            result = json.loads(file.read_text())
            text += ["", f"## {heading}{device}", "", section(result), ""]
            suffix = stem[len(name) :]
            for picture in sorted(p for p in results.glob(f"{name}*{suffix}.png") if belongs(p.stem, name, suffix)):
                text += [f"![{heading}]({Path(os.path.relpath(picture, docs)).as_posix()})", ""]
            text.append(provenance(result))
    return "\n".join(text) + "\n"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--results", type=Path, default=common.RESULTS, metavar="DIR")
    p.add_argument("--page", type=Path, default=common.ROOT / "docs" / "benchmarks.md", metavar="FILE")
    args = p.parse_args()
    args.page.parent.mkdir(parents=True, exist_ok=True)
    args.page.write_text(page(args.results, args.page.parent), encoding="utf-8")
    print(f"wrote {args.page.name}")


if __name__ == "__main__":
    main()
