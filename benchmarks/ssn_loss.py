"""Memory and speed of the SSN loss against its obvious formulation: forward and backward pass, same run, in turns.

The loss works on chunks of voxels, holds no samples and draws its noise again in the backward pass, there only for the
samples whose share of the likelihood is above rounding error. The obvious formulation is below: all samples in memory,
``F.cross_entropy`` and a logsumexp; once as the paper has it and once with antithetic samples, that is, half the noise.

How many samples have a share depends on the input, and on that the time of the backward pass. Three inputs:

- random: parameters and labels without any relation; a single sample has the whole share;
- realistic: a smooth mean that agrees with the labels and a small variance at their boundaries, such that the samples'
  log-likelihoods have a standard deviation of ``--spread`` nats. In trained networks it was 19 nats on 64 x 64 pixels
  of lung nodules, where 6 of 10 antithetic pairs had a share, and 3,000 nats on 48 x 48 x 48 voxels of sarcomas, where
  1.3 had one: in 3D this input is harder than reality, and the random one is closer to it;
- worst: next to no variance, so that all samples have the same share.

Every figure is measured in a process of its own, which is what it takes to change glibc's allocator: by default it
returns large tensors to the kernel after use and faults them in again. Memory is what a forward and backward pass needs
beyond the inputs and their gradients: the peak of PyTorch's own account, and that of the process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import _common as common
import torch
from torch import Tensor
from torch.nn import functional as F

from nnunet_multimodal.heads import streamed as streaming
from nnunet_multimodal.heads.ssn import EPSILON, LowRankGaussianLogits

CLASSES, RANK, SAMPLES, BATCH = 4, 10, 20, 2
INPUTS = ("random", "realistic", "worst")
ALLOCATORS = {"default": {"OMP_WAIT_POLICY": "PASSIVE"}, "tuned": common.STEADY_MALLOC}
SIZES = ["32x32", "64x64", "128x128", "256x256", "16x16x16", "32x32x32", "48x48x48", "64x64x64"]
COLOURS = {"streamed": "#2c6fbb", "obvious": "#8a8a8a", "obvious, antithetic": "#c8c8c8"}
MEMORY_NEEDED = 0.1  # at most, of the obvious formulation's
MIB = 2**20


def streamed(distribution: LowRankGaussianLogits, labels: Tensor, chunk: int | None = None) -> Tensor:
    """The SSN head's; labels (B, *D) -> log-likelihood (B,) in nats, as of all formulations."""
    classes = torch.arange(CLASSES, device=labels.device).view(-1, *(1,) * (labels.ndim - 1))
    return distribution.log_likelihood(labels[:, None] == classes, SAMPLES, chunk=chunk)


def obvious(distribution: LowRankGaussianLogits, labels: Tensor, antithetic: bool = False) -> Tensor:
    """All samples at once."""
    loc, factor = distribution.loc, distribution.cov_factor
    drawn = SAMPLES // 2 if antithetic else SAMPLES
    weights = torch.randn(drawn, BATCH, RANK, device=loc.device)
    noise = torch.randn(drawn, *loc.shape, device=loc.device)
    deviation = torch.einsum("mbr,brcv->mbcv", weights, factor.flatten(3)).view_as(noise)
    deviation = deviation + distribution.cov_diag.sqrt() * noise
    samples = loc + (torch.cat((deviation, -deviation)) if antithetic else deviation)
    repeated = labels.repeat(SAMPLES, *(1,) * (labels.ndim - 1))
    nats = -F.cross_entropy(samples.flatten(0, 1), repeated, reduction="none")
    return nats.view(SAMPLES, BATCH, -1).sum(2).logsumexp(0) - math.log(SAMPLES)


Calls = dict[str, tuple[str, int | None]]  # label -> contender, chunk
LogLikelihood = Callable[[LowRankGaussianLogits, Tensor], Tensor]
CONTENDERS: dict[str, LogLikelihood] = {
    "streamed": streamed,
    "obvious": obvious,
    "obvious, antithetic": partial(obvious, antithetic=True),
}


class Input:
    """Parameters of the distribution with their gradients, and labels (B, *D)."""

    def __init__(self, tensors: dict[str, Tensor], device: str) -> None:
        self.device = device
        self.labels = tensors["labels"].to(device)
        self.leaves = [tensors[k].to(device).requires_grad_() for k in ("loc", "cov_factor", "cov_diag")]
        self.distribution = LowRankGaussianLogits(*self.leaves)
        self.leaf_bytes = sum(leaf.nbytes for leaf in self.leaves)

    def step(self, log_likelihood: LogLikelihood) -> None:
        """Forward and backward pass; leaves nothing behind."""
        (-log_likelihood(self.distribution, self.labels).mean() / self.labels[0].numel()).backward()
        for leaf in self.leaves:
            leaf.grad = None

    def extra_mib(self, log_likelihood: LogLikelihood) -> float:
        """Peak of the tensors beyond the inputs and their gradients."""
        peak = common.peak_bytes(lambda: self.step(log_likelihood), self.device)
        return round((peak - self.leaf_bytes) / MIB, 1)

    def extra_resident_mib(self, log_likelihood: LogLikelihood) -> float:
        """Likewise of the process, Linux only; of a process that has done nothing else."""
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _resident_bytes("VmRSS")
        self.step(log_likelihood)
        return round((_resident_bytes("VmHWM") - before - self.leaf_bytes) / MIB, 1)


def _resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def prepare(kind: str, shape: list[int], spread: float, device: str) -> dict[str, Tensor]:
    """The tensors of an input, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    coarse = shape if kind == "random" else [max(2, side // 8) for side in shape]

    def field(channels: int) -> Tensor:
        values = torch.randn(BATCH, channels, *coarse, generator=generator)
        if kind == "random":
            return values
        return F.interpolate(values, shape, mode="bilinear" if len(shape) == 2 else "trilinear")

    loc, log_diagonal = field(CLASSES), field(CLASSES)
    factor = field(RANK * CLASSES).unflatten(1, (RANK, CLASSES)) / math.sqrt(RANK)
    if kind == "random":
        labels = torch.randint(CLASSES, (BATCH, *shape), generator=generator)
        return {"loc": loc, "cov_factor": factor, "cov_diag": log_diagonal.exp() + EPSILON, "labels": labels}
    first, second = loc.topk(2, 1).values.unbind(1)
    boundary = torch.exp(-5 * (first - second))[:, None]  # one at a boundary
    tensors = {"loc": 5 * loc, "labels": loc.argmax(1)}
    scale = 1e-6 if kind == "worst" else 0.1
    for _ in range(1 if kind == "worst" else 4):
        tensors["cov_factor"] = scale * boundary[:, None] * factor
        tensors["cov_diag"] = (scale * boundary) ** 2 * log_diagonal.exp() + (1e-12 if kind == "worst" else EPSILON)
        if kind != "worst":  # the standard deviation is roughly linear in the scale
            scale *= spread / standard_deviation(Input(tensors, device))
    return tensors


@torch.no_grad()
def standard_deviation(x: Input) -> float:
    """Of the samples' log-likelihoods, in nats; root mean square over the batch."""
    generator = torch.Generator(x.device).manual_seed(0)
    nats = []
    for _ in range(SAMPLES):
        logits = x.distribution.rsample((1,), generator)[0]
        nats.append(-F.cross_entropy(logits, x.labels, reduction="none").double().flatten(1).sum(1))
    return torch.stack(nats).var(0).mean().sqrt().item()


def pairs_that_count(x: Input, repeats: int = 5) -> dict[str, float]:
    """Of the antithetic pairs, how many the backward pass of the streamed loss cannot leave out."""
    counts: list[int] = []
    original = streaming._pairs_that_count

    def record(gradient: Tensor) -> list[list[int]]:
        pairs = original(gradient)
        counts.extend(map(len, pairs))
        return pairs

    with mock.patch.object(streaming, "_pairs_that_count", record):
        for _ in range(repeats):
            x.step(streamed)
    return {"mean": sum(counts) / len(counts), "min": min(counts), "max": max(counts), "of": SAMPLES // 2}


def run_job(task: str, paths: list[str], calls: Calls, threads: int | None, repeats: list[int], device: str) -> Any:
    """What a process of its own does, for each input: {label: seconds of every round} or {label: MiB}."""
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    functions = {
        label: partial(streamed, chunk=chunk) if chunk else CONTENDERS[name] for label, (name, chunk) in calls.items()
    }
    results: list[Any] = []
    for path, count in zip(paths, repeats, strict=True):
        x = Input(torch.load(path), device)
        if task == "time":
            steps = {label: partial(x.step, function) for label, function in functions.items()}
            results.append(common.interleaved(steps, count, device, Path(path).stem))
        elif task == "peak":
            results.append({label: x.extra_mib(function) for label, function in functions.items()})
        else:
            small = Input(prepare("random", [8, 8], 0, device), device)
            small.step(*functions.values())  # loads libraries
            results.append({label: x.extra_resident_mib(function) for label, function in functions.items()})
    return results


def in_process(
    allocator: str, task: str, paths: list[Path], calls: Calls, threads: int | None, repeats: list[int], device: str
) -> Any:
    """Run a job under the settings of an allocator."""
    ours = {*common.STEADY_MALLOC, "OMP_NUM_THREADS"}
    environment = {k: v for k, v in os.environ.items() if k not in ours} | ALLOCATORS[allocator]
    job = json.dumps([task, list(map(str, paths)), calls, threads, repeats, device])
    done = subprocess.run(
        [sys.executable, __file__, "--job", job], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


class Benchmark:
    """All measurements; the inputs lie in a folder."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.allocators = list(ALLOCATORS) if args.device == "cpu" and sys.platform == "linux" else ["default"]
        self.threads = args.threads if args.device == "cpu" else [None]
        self.plain: Calls = {name: (name, None) for name in CONTENDERS}

    def input(self, kind: str, shape: list[int]) -> Path:
        """Prepared at the first call."""
        path = self.folder / f"{kind} {'x'.join(map(str, shape))}"
        if not path.exists():
            torch.save(prepare(kind, shape, self.args.spread, self.args.device), path)
        return path

    def describe(self) -> dict[str, Any]:
        """How the samples' likelihoods differ, and how many count."""
        result = {}
        for kind in INPUTS:
            x = Input(torch.load(self.input(kind, self.args.shape)), self.args.device)
            result[kind] = {"sd_nats": common.spread([standard_deviation(x)])["median"], "pairs": pairs_that_count(x)}
            print(
                f"{kind}: standard deviation {result[kind]['sd_nats']} nats, pairs that count {result[kind]['pairs']}"
            )
        return result

    def seconds(
        self, calls: Calls, allocator: str, threads: int | None, paths: list[Path], repeats: list[int]
    ) -> list[dict[str, Any]]:
        """For each input, median and quartiles of each call, and the ratios to the streamed formulation."""
        results = []
        for rounds in in_process(allocator, "time", paths, calls, threads, repeats, self.args.device):
            result: dict[str, Any] = {"seconds": {label: common.spread(values) for label, values in rounds.items()}}
            if "streamed" in rounds:
                result["ratio_to_streamed"] = {
                    label: common.ratio(rounds[label], rounds["streamed"]) for label in rounds if label != "streamed"
                }
            results.append(result)
        return results

    def time(self) -> dict[str, Any]:
        """allocator -> threads -> input -> figures."""
        result: dict[str, Any] = {}
        paths = [self.input(kind, self.args.shape) for kind in INPUTS]
        for allocator, threads in itertools.product(self.allocators, self.threads):
            figures = self.seconds(self.plain, allocator, threads, paths, [self.args.repeats] * len(paths))
            result.setdefault(allocator, {})[str(threads or "all")] = dict(zip(INPUTS, figures, strict=True))
            for kind, of in zip(INPUTS, figures, strict=True):
                print(f"{allocator:8} {threads} threads, {kind:10}", _medians(of["seconds"], "s"), flush=True)
        return result

    def crossover(self) -> dict[str, Any]:
        """Seconds by size, realistic, tuned allocator, all threads."""
        shapes = [[int(side) for side in size.split("x")] for size in self.args.sizes]
        paths = [self.input("realistic", shape) for shape in shapes]
        voxels = list(map(math.prod, shapes))
        repeats = [max(self.args.repeats, min(50, 2**19 // count)) for count in voxels]
        figures = self.seconds(self.plain, self.allocators[-1], self.threads[-1], paths, repeats)
        for size, of in zip(self.args.sizes, figures, strict=True):
            print(f"size {size:12}", _medians(of["seconds"], "s"), flush=True)
        return {size: {"voxels": count, **of} for size, count, of in zip(self.args.sizes, voxels, figures, strict=True)}

    def chunks(self) -> dict[str, Any]:
        """Seconds by allocator, input and chunk, with all threads; memory by chunk in the worst case."""
        calls: Calls = {str(2**power): ("streamed", 2**power) for power in self.args.chunk_powers}
        kinds = ("realistic", "worst")
        paths = [self.input(kind, self.args.shape) for kind in kinds]
        result: dict[str, Any] = {"seconds": {}}
        for allocator in self.allocators:
            figures = self.seconds(calls, allocator, self.threads[-1], paths, [self.args.repeats] * len(paths))
            result["seconds"][allocator] = {k: of["seconds"] for k, of in zip(kinds, figures, strict=True)}
            for kind, seconds in result["seconds"][allocator].items():
                print(f"chunks, {allocator:8} {kind:10}", _medians(seconds, "s"), flush=True)
        (result["peak_mib"],) = in_process("default", "peak", paths[-1:], calls, None, [0], self.args.device)
        print("chunks, memory", result["peak_mib"], flush=True)
        return result

    def memory(self) -> dict[str, Any]:
        """MiB by input and contender; of the process by allocator and contender, in the realistic case."""
        paths = [self.input(kind, self.args.shape) for kind in INPUTS]
        peaks = in_process("default", "peak", paths, self.plain, None, [0] * len(paths), self.args.device)
        result: dict[str, Any] = {"peak_mib": dict(zip(INPUTS, peaks, strict=True))}
        print("memory of tensors", result["peak_mib"], flush=True)
        if self.args.device == "cuda" or sys.platform != "linux":
            return result
        path = self.input("realistic", self.args.shape)
        result["process_mib"] = {allocator: {} for allocator in self.allocators}
        for allocator, (name, call) in itertools.product(self.allocators, self.plain.items()):
            (mib,) = in_process(allocator, "resident", [path], {name: call}, None, [0], self.args.device)
            result["process_mib"][allocator] |= mib
        print("memory of the process", result["process_mib"], flush=True)
        return result


def _medians(figures: dict[str, dict[str, float]], unit: str) -> str:
    return ", ".join(f"{label} {values['median']:.4f} {unit}" for label, values in figures.items())


def draw(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Time and memory at the main size, and time against size."""
    fig, axes = common.figure(11, 3.4, 3)
    _draw_time(axes[0, 0], figures["time"])
    _draw_memory(axes[0, 1], figures["memory"])
    _draw_crossover(axes[0, 2], figures["crossover"])
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    common.save(fig, args, "ssn_loss")


def _draw_crossover(ax: Any, sizes: dict[str, Any]) -> None:
    for name in ("obvious", "obvious, antithetic"):
        for dimensions, style in ((2, "o--"), (3, "o-")):
            chosen = [v for size, v in sizes.items() if size.count("x") == dimensions - 1]
            ratios = [v["ratio_to_streamed"][name]["median"] for v in chosen]
            ax.plot([v["voxels"] for v in chosen], ratios, style, ms=3, color=COLOURS[name])
    ax.axhline(1, color=COLOURS["streamed"], lw=1)
    ax.set(xscale="log", ylim=(0, None), xlabel="voxels (2D dashed)", ylabel="times streamed")
    ax.set_title("realistic, tuned allocator: time by size")


def _draw_time(ax: Any, time: dict[str, Any]) -> None:
    places = [
        (allocator, kind, by_threads[list(by_threads)[-1]][kind]["seconds"])
        for (allocator, by_threads), kind in itertools.product(time.items(), INPUTS)
    ]
    for i, (name, colour) in enumerate(COLOURS.items()):
        x = [place + (i - 1) * 0.28 + 0.4 * (place >= len(INPUTS)) for place in range(len(places))]
        ax.bar(x, [seconds[name]["median"] for *_, seconds in places], 0.27, color=colour, label=name)
    ax.set_xticks(
        [place + 0.4 * (place >= len(INPUTS)) for place in range(len(places))],
        [f"{kind}\n{allocator}" if place % 3 == 1 else kind for place, (allocator, kind, _) in enumerate(places)],
        fontsize=7,
    )
    ax.set(title="forward and backward", ylabel="s")


def _draw_memory(ax: Any, memory: dict[str, Any]) -> None:
    groups = {"tensors": memory["peak_mib"]["worst"]}
    groups |= {f"process,\n{allocator}": values for allocator, values in memory.get("process_mib", {}).items()}
    for i, (name, colour) in enumerate(COLOURS.items()):
        for place, values in enumerate(groups.values()):
            ax.bar(place + (i - 1) * 0.28, values[name], 0.27, color=colour)
            ax.text(place + (i - 1) * 0.28, values[name], f"{values[name]:.0f}", ha="center", va="bottom", fontsize=7)
    ax.set_xticks(range(len(groups)), list(groups))
    ax.set(title="memory beyond inputs and gradients", ylabel="MiB")


def check(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Exits with a message if the loss does not keep its promises."""
    for kind, peak in figures["memory"]["peak_mib"].items():
        for name in ("obvious", "obvious, antithetic"):
            if peak["streamed"] > MEMORY_NEEDED * peak[name]:
                sys.exit(f"the loss needs more than {MEMORY_NEEDED} of the memory of '{name}', {kind} input: {peak}")
    if args.device == "cpu":
        by_threads = figures["time"]["default"]
        ratios = by_threads[list(by_threads)[-1]]["realistic"]["ratio_to_streamed"]
        if any(ratio["median"] < 1 for ratio in ratios.values()):
            sys.exit(f"the loss is slower than the obvious formulation: {ratios}")


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--shape", type=int, nargs="+", help="of the maps; default 64 64 64, on a GPU 128 128 128")
    p.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    p.add_argument("--repeats", type=int, default=5, help="measured rounds after one to warm up")
    p.add_argument("--spread", type=float, default=16, help="nats, standard deviation in the realistic case")
    p.add_argument("--chunk-powers", type=int, nargs="+", help="of two; default 10 to 15 and 18, on a GPU 14 to 21")
    p.add_argument("--sizes", nargs="+", help="such as 64x64 or 16x16x16, for time against size")
    p.add_argument("--job", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.job:
        print(json.dumps(run_job(*json.loads(args.job))))
        return
    torch.set_num_threads(1)  # of this process, which only prepares
    cuda = args.device == "cuda"
    args.shape = args.shape or [128 if cuda else 64] * 3
    args.chunk_powers = args.chunk_powers or (list(range(14, 22)) if cuda else [10, 11, 12, 13, 14, 15, 18])
    args.sizes = args.sizes or [*SIZES, *(["128x128x128"] if cuda else [])]
    with tempfile.TemporaryDirectory() as folder:
        benchmark = Benchmark(args, Path(folder))
        figures: dict[str, Any] = {"inputs": benchmark.describe()}
        for size in args.sizes:  # beforehand, so that the timed jobs follow one another
            benchmark.input("realistic", [int(side) for side in size.split("x")])
        print("inputs ready", flush=True)
        load = [round(os.getloadavg()[0], 1)]
        figures |= {"time": benchmark.time(), "crossover": benchmark.crossover(), "chunks": benchmark.chunks()}
        load.append(round(os.getloadavg()[0], 1))
        figures["memory"] = benchmark.memory()
    fixed = {"classes": CLASSES, "rank": RANK, "samples": SAMPLES, "batch": BATCH, "allocators": ALLOCATORS}
    draw(args, figures)
    common.write(args, "ssn_loss", {"fixed": fixed, "load_average_1_min": load, **figures})
    if args.shape == [128 if cuda else 64] * 3:
        check(args, figures)


if __name__ == "__main__":
    main()
