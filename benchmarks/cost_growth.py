"""How cost grows: time and memory of a training step, a prediction and sampling, as the work grows.

One number is swept at a time, the others stay small: modalities M for every backbone, samples S and rank R of SSN,
samples and experts K of MoSE, voxels of the patch in 3D and 2D. A step is nnU-Net's (loss, clipping, SGD), without
SSN's warm-up and with MoSE's limit on what a sample takes, so that all terms of the losses are there. A prediction is
the batch in evaluation. Sampling is the distribution of the batch and samples of its first patch, with an SSN head
where the head is deterministic. All points of a sweep take turns; what is kept is the least time of each, which a
disturbance hardly changes. Operations are counted, in multiply-adds of the forward pass. The exponent is the slope of
a line through the logarithms, fitted to the points whose x is at least a fifth of the largest.

Where time grows faster than linearly the same call is profiled at the largest x and at the one before: what an
operator took beyond its share of linear growth. For CIML the messages' parts are told apart by networks without them.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter, process_time
from typing import Any

import _common as common
import numpy as np
import torch
from crnp_cost import Plan, Training
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from nnunet_multimodal.backbones import BACKBONES
from nnunet_multimodal.heads.base import Step

# two patches: with one alone PyTorch takes another convolution on a single thread, whose scratch memory hides the rest
CUBE, SQUARE = Plan((24, 24, 24), 2, (8, 16, 32)), Plan((128, 128), 2, (8, 16, 32))
CALLS = ("training step", "prediction", "sampling")
UPPER = 5  # an exponent is fitted to x of at least the largest / UPPER
LINEAR = 1.1
STEP = Step(progress=0.3)  # after SSN's warm-up, before MoSE lets go of its limit
STOCHASTIC = ("ssn", "mose")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
MARKERS = "osD^vP"


@dataclass(frozen=True)
class Setup:
    """One point of a curve.

    Attributes:
        options: of the network.
        modalities: M.
        plan: patch, batch and features.
        samples: that are drawn.
        left_out: what cannot be measured here, of ``CALLS``.
    """

    options: dict[str, Any]
    modalities: int = 2
    plan: Plan = CUBE
    samples: int = 20
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sweep:
    """What grows, and the curves: from x to what is measured there, or None where there is no such network."""

    axis: str
    fixed: str
    values: tuple[int, ...]
    curves: dict[str, Callable[[int], Setup | None]] = field(default_factory=dict)


def by_modalities() -> Sweep:
    """Every backbone; CIML also without what makes its messages costly."""

    def curve(backbone: str, **kwargs: bool) -> Callable[[int], Setup | None]:
        options = {"backbone": backbone, "backbone_kwargs": kwargs}
        return lambda m: Setup(options, m) if m >= BACKBONES[backbone].MIN_MODALITIES else None

    curves = {backbone: curve(backbone) for backbone in BACKBONES}
    curves |= {"ciml, no attention": curve("ciml", attention=False), "ciml, no messages": curve("ciml", messages=False)}
    return Sweep("modalities M", "20 samples", (1, 2, 3, 4, 6, 8), curves)


def stochastic(head: str, **kwargs: int) -> dict[str, Any]:
    """Options of a network with a stochastic head."""
    return {"backbone": "early", "head": head, "head_kwargs": kwargs}


def by_samples() -> Sweep:
    """Of the training loss and drawn; MoSE's mean prediction is of as many, too."""

    def ssn(s: int) -> Setup:
        odd = ("training step",) if s % 2 else ()  # antithetic pairs
        return Setup(stochastic("ssn", num_samples=s + s % 2), samples=s, left_out=odd)

    def mose(s: int) -> Setup:
        return Setup(stochastic("mose", num_experts=2, samples_per_expert=s), samples=s)

    fixed = "rank 10; 2 experts, each with S samples in the loss; S drawn"
    return Sweep("samples S", fixed, (1, 2, 5, 10, 20, 50, 100), {"SSN": ssn, "MoSE": mose})


def by_rank() -> Sweep:
    """SSN's covariance factor."""
    curves = {"SSN": lambda rank: Setup(stochastic("ssn", rank=rank))}
    return Sweep("rank R", "20 samples", (1, 2, 5, 10, 20, 40), curves)


def by_experts() -> Sweep:
    """MoSE, with as many samples of each expert."""
    curves = {"MoSE": lambda k: Setup(stochastic("mose", num_experts=k, samples_per_expert=4))}
    return Sweep("experts K", "4 samples of each in the loss, 20 drawn", (1, 2, 4, 8, 16), curves)


def by_volume(plan: Plan, start: tuple[int, ...]) -> Sweep:
    """Every backbone with a deterministic head, and both stochastic heads; the sides are doubled in turn."""

    def curve(options: dict[str, Any]) -> Callable[[int], Setup]:
        return lambda voxels: Setup(options, plan=replace(plan, patch=patches[voxels]))

    patches, sides = {}, list(start)
    for doubling in range(5):
        patches[int(np.prod(sides))] = tuple(sides)
        sides[doubling % len(sides)] *= 2
    curves = {backbone: curve({"backbone": backbone}) for backbone in BACKBONES}
    curves |= {"SSN": curve(stochastic("ssn")), "MoSE": curve(stochastic("mose"))}
    shown = ", ".join(" x ".join(map(str, patch)) for patch in patches.values())
    return Sweep("voxels", f"2 modalities, 20 samples; patches {shown}", tuple(patches), curves)


SWEEPS: dict[str, Callable[[], Sweep]] = {
    "modalities": by_modalities,
    "samples": by_samples,
    "rank": by_rank,
    "experts": by_experts,
    "volume_3d": lambda: by_volume(CUBE, (16, 16, 16)),
    "volume_2d": lambda: by_volume(SQUARE, (64, 64)),
}


class Point:
    """A network, with what is measured of it."""

    def __init__(self, setup: Setup, args: argparse.Namespace) -> None:
        self.samples, self.device = setup.samples, args.device
        self.training = self._training(setup, setup.options, args)
        drawn = setup.options if setup.options.get("head") in STOCHASTIC else {**setup.options, "head": "ssn"}
        same = drawn is setup.options
        self.drawn = self.training if same else self._training(setup, drawn, args)
        self.generator = torch.Generator(args.device).manual_seed(0)
        every = {"training step": self.training.step, "prediction": self.training.infer, "sampling": self.sample}
        self.calls = {name: call for name, call in every.items() if name not in setup.left_out}

    def _training(self, setup: Setup, options: dict[str, Any], args: argparse.Namespace) -> Training:
        torch.manual_seed(0)
        training = Training(setup.plan, setup.modalities, options, args)
        training.loss.step = STEP
        return training

    @torch.inference_mode()
    def sample(self) -> None:
        """The distribution of the batch, and samples of the first patch, as if it were an image, one at a time."""
        network = self.drawn.module.eval()
        network.decoder.deep_supervision = False
        with common.autocast(self.device):
            parameters = network.distribution(self.drawn.x).blendable()[0]
        foreground = torch.ones(1, *parameters.shape[1:], dtype=torch.bool, device=self.device)
        for _ in network.head.blended(parameters, foreground).draw(self.samples, self.generator):
            pass

    def bytes(self) -> dict[str, int]:
        """The peak of every call: with parameters and momentum in a step, above what is held before it otherwise."""
        peaks = {name: common.peak_bytes(call, self.device) for name, call in self.calls.items()}
        if "training step" in peaks:
            peaks["training step"] += self.training.resident_bytes()
        self.training.optimiser.zero_grad(set_to_none=True)
        return peaks


def multiply_adds(call: Callable[[], Any]) -> float:
    """Operations of matrix products and convolutions, in units of 1e6 multiply-adds.

    Of forward passes: PyTorch counts those of grouped convolutions' gradients as if there were no groups.
    """
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 2e6


def exponent(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Slope of log y against log x over the upper part; None if nothing is there to fit."""
    points = [(a, b) for a, b in zip(x, y, strict=True) if a >= max(x) / UPPER and b > 0]
    if len(points) < 2:
        return None
    return round(float(np.polyfit(*np.log(points).T, 1)[0]), 3)


def measure(sweep: Sweep, args: argparse.Namespace, title: str) -> dict[str, Any]:
    """All curves of a sweep."""
    points: dict[tuple[str, int], Point] = {}
    for name, curve in sweep.curves.items():
        for x in sweep.values[: args.points]:
            setup = curve(x)
            if setup is not None:
                points[name, x] = Point(setup, args)
    contenders = {(*key, what): call for key, point in points.items() for what, call in point.calls.items()}
    for call in shown(contenders.values(), f"{title}: warming up"):
        call()
    peaks = {
        (*key, what): peak
        for key, point in shown(points.items(), f"{title}: memory")
        for what, peak in point.bytes().items()
    }
    operations = {
        key: multiply_adds(points[key[:2]].training.forward if key[2] == CALLS[0] else call)
        for key, call in shown(contenders.items(), f"{title}: operations")
    }
    clock = process_time if args.processor_time else perf_counter
    seconds = common.interleaved(contenders, args.repeats, args.device, f"{title}: time", 0, clock)
    result = {}
    for name in sweep.curves:
        result[name] = {}
        for what in CALLS:
            keys = [key for key in contenders if key[0] == name and key[2] == what]
            result[name][what] = figures(keys, seconds, peaks, operations)
            found = result[name][what]["exponents"]
            print(f"{title:10} {name:20} {what:14}", *(f"{k} {v}" for k, v in found.items()), flush=True)
            if (found["seconds"] or 0) > LINEAR:
                result[name][what]["beyond_linear"] = beyond_linear(keys, contenders)
    return result


def shown(items: Collection[Any], title: str) -> Any:
    """Progress."""
    return tqdm(items, desc=title, leave=False, disable=None)


def figures(keys: list[Any], seconds: dict[Any, list[float]], peaks: dict[Any, int], operations: Any) -> dict[str, Any]:
    """A curve and its exponents."""
    x = [key[1] for key in keys]
    curve = {
        "seconds": [float(f"{min(seconds[key]):.4g}") for key in keys],
        "mib": [round(peaks[key] / 2**20, 3) for key in keys],
        "million_multiply_adds": [round(operations[key], 3) for key in keys],
    }
    spreads = [common.spread(seconds[key]) for key in keys]
    fitted = [a for a in x if a >= max(x) / UPPER]
    exponents = {name: exponent(x, values) for name, values in curve.items()}
    return {"x": x, **curve, "seconds_spread": spreads, "fitted": fitted, "exponents": exponents}


def beyond_linear(keys: list[Any], contenders: dict[Any, Callable[[], Any]]) -> dict[str, Any]:
    """What operators took at the largest x beyond the linear growth from the one before, the most first, in ms."""
    before, last = keys[-2:]
    factor = last[1] / before[1]
    small, large = operator_seconds(contenders[before]), operator_seconds(contenders[last])
    excess = {name: 1000 * (t - factor * small.get(name, 0.0)) for name, t in large.items()}
    most = sorted(excess, key=lambda name: -excess[name])[:4]
    total = sum(excess.values())
    return {
        "from": before[1], "to": last[1], "excess_ms": round(total, 2),
        "operators_ms": {name: round(excess[name], 2) for name in most if excess[name] > 0},
    }  # fmt: skip


def operator_seconds(call: Callable[[], Any]) -> dict[str, float]:
    """The processor's time in every operator itself, and what the call takes outside of them; of three, the least."""
    runs: list[dict[str, float]] = []
    for _ in range(3):
        start = perf_counter()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            start = perf_counter()
            call()
            whole = perf_counter() - start
        own = {event.key: event.self_cpu_time_total / 1e6 for event in profile.key_averages()}
        runs.append(own | {"outside of operators": whole - sum(own.values())})
    return min(runs, key=lambda run: sum(run.values()))


def message_terms(curves: dict[str, Any]) -> dict[str, Any]:
    """CIML's messages (without attention) and their attention, each as a difference between two networks."""
    terms: dict[str, Any] = {}
    pairs = {"messages": ("ciml, no attention", "ciml, no messages"), "attention": ("ciml", "ciml, no attention")}
    for what in CALLS:
        terms[what] = {}
        for term, (more, less) in pairs.items():
            x = curves[more][what]["x"]
            terms[what][term] = {"x": x}
            for key in ("seconds", "mib", "million_multiply_adds"):
                added = [a - b for a, b in zip(curves[more][what][key], curves[less][what][key], strict=True)]
                share = round(added[-1] / curves["ciml"][what][key][-1], 3)
                terms[what][term][key] = {
                    "added": [float(f"{value:.4g}") for value in added],
                    "exponent": exponent(x, added),
                    "exponent_of_messages": exponent([m * (m - 1) for m in x], added),
                    "share_at_largest": share,
                }
    return terms


def draw(args: argparse.Namespace, name: str, sweep: Sweep, curves: dict[str, Any]) -> None:
    """Time and memory of the three calls against x, with the exponents."""
    fig = common.figure(11, 7)[0]
    from matplotlib.ticker import LogLocator

    fig.clear()
    axes = fig.subplots(2, len(CALLS))
    fig.suptitle(f"{sweep.axis} ({sweep.fixed})", fontsize=9)
    for row, (key, unit) in enumerate((("seconds", "s"), ("mib", "peak memory, MiB"))):
        for column, what in enumerate(CALLS):
            ax = axes[row, column]
            for (label, curve), colour, marker in zip(curves.items(), COLOURS, MARKERS, strict=False):
                own = curve[what]
                slope = own["exponents"][key]
                text = f"{label}: {'-' if slope is None else f'{slope:.2f}'}"
                ax.plot(own["x"], own[key], color=colour, marker=marker, ms=4, lw=1.3, label=text)
            ax.set(xscale="log", yscale="log", title=what if row == 0 else "", ylabel=unit if column == 0 else "")
            ax.set_xticks(sweep.values[: args.points], [f"{x:,}" for x in sweep.values[: args.points]], fontsize=7)
            ax.minorticks_off()
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
            low, high = ax.get_ylim()
            ax.set_ylim(low, high * (high / low) ** 0.6)  # room for the legend
            ax.grid(alpha=0.3)
            ax.legend(fontsize=7, frameon=False, title="exponent", title_fontsize=7, loc="upper left")
            if row == 1:
                ax.set_xlabel(sweep.axis)
    common.save(fig, args, f"cost_growth_{name}")


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--repeats", type=int, default=4, help="measured rounds")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--sweeps", nargs="+", choices=tuple(SWEEPS), default=list(SWEEPS))
    p.add_argument("--points", type=int, help="only so many of the smallest x, to try it out")
    p.add_argument("--processor-time", action="store_true", help="the process's own time instead of the clock's")
    p.add_argument("--compile", action="store_true", help="torch.compile, as nnU-Net does on a GPU")
    p.add_argument("--note", help="what is to be known about this run")
    args = p.parse_args()
    if args.device == "cpu":
        common.restart_with_steady_malloc()
    torch.set_num_threads(args.threads)
    started = perf_counter()
    results: dict[str, Any] = {}
    for name in args.sweeps:
        sweep = SWEEPS[name]()
        curves = measure(sweep, args, name)
        results[name] = {"axis": sweep.axis, "fixed": sweep.fixed, "curves": curves}
        if name == "modalities":
            results[name]["terms"] = message_terms(curves)
        draw(args, name, sweep, curves)
        gc.collect()
    plans = {"3d": vars(CUBE), "2d": vars(SQUARE)}
    note = {"note": args.note} if args.note else {}
    minutes = round((perf_counter() - started) / 60, 1)
    del args.note
    common.write(args, "cost_growth", {"repeats": args.repeats, "minutes": minutes, "plans": plans, "upper": UPPER,
                                       "linear": LINEAR, "results": results, **note})  # fmt: skip


if __name__ == "__main__":
    main()
