"""What all benchmarks share: options, the results file, interleaved timing, peak memory."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported; its profiler would talk to stderr

import torch
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# without these glibc returns every large activation to the kernel and faults it in again, which can double a step
STEADY_MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "OMP_WAIT_POLICY": "PASSIVE",
}


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="where NAME.json and PNGs go")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return p


def data_folder(name: str) -> Path:
    """A folder of development data, none of which is part of this project.

    Exits with a message if it is not there.
    """
    base = Path(os.environ.get("NNUNET_MULTIMODAL_DATA") or ROOT.parent / "shared" / "data")
    if not (base / name).exists():
        sys.exit(
            f"{name} is not there. This benchmark needs data that the project does not contain; put it into "
            "../shared/data beside the repository, or name the folder that holds it in $NNUNET_MULTIMODAL_DATA."
        )
    return base / name


def restart_with_steady_malloc() -> None:
    """Run this script again with glibc's allocator keeping its memory; does nothing the second time."""
    if sys.platform == "linux" and any(os.environ.get(k) != v for k, v in STEADY_MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **STEADY_MALLOC})


def write(args: argparse.Namespace, name: str, figures: Mapping[str, Any]) -> Path:
    """Write NAME.json, on a GPU NAME_cuda.json: the figures and what it takes to judge them, atomically.

    Names neither user, host nor folders.
    """
    options = {k: v for k, v in vars(args).items() if v is not None and not isinstance(v, Path)}
    flags = [
        f"--{k.replace('_', '-')}" + ("" if v is True else f" {_join(v)}") for k, v in options.items() if v is not False
    ]
    content = {
        "benchmark": name,
        "command": " ".join((f"python benchmarks/{Path(sys.argv[0]).name}", *flags)),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(args.device),
        "versions": versions(),
        **figures,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{_stem(args, name)}.json"
    with tempfile.NamedTemporaryFile("w", dir=args.out, prefix=f".{name}", suffix=".json", delete=False) as file:
        json.dump(content, file, indent=1)
        file.write("\n")
    os.chmod(file.name, 0o644)  # a temporary file is its owner's alone
    os.replace(file.name, path)
    print(f"wrote {path.name}")
    return path


def _stem(args: argparse.Namespace, name: str) -> str:
    """Results of a GPU lie beside those of the CPU."""
    return name if args.device == "cpu" else f"{name}_{args.device}"


def _join(value: Any) -> str:
    return shlex.join(map(str, value)) if isinstance(value, list | tuple) else shlex.quote(str(value))


def machine(device: str) -> dict[str, Any]:
    """Processor, cores, memory, GPU and operating system; the load tells whether it was quiet."""
    info: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "os": f"{platform.system()} {platform.machine()}",
    }
    if hasattr(os, "sysconf"):
        info["ram_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    if hasattr(os, "getloadavg"):
        info["load_average_15_min"] = round(os.getloadavg()[2], 1)
    info["threads"] = torch.get_num_threads()
    info["environment"] = {k: os.environ[k] for k in STEADY_MALLOC if k in os.environ}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        info["gpu"] = properties.name
        info["gpu_gib"] = round(properties.total_memory / 2**30)
    return info


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def versions() -> dict[str, str]:
    packages = ("torch", "nnunetv2", "nnunet-multimodal")
    found = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def synchronise(device: str) -> None:
    """Wait for the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(
    contenders: Mapping[str, Callable[[], Any]],
    repeats: int,
    device: str,
    title: str = "",
    warm_up: int = 1,
    clock: Callable[[], float] = perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every call, contenders in turn (A, B, A, B, ...), so that a disturbance meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in tqdm(range(-warm_up, repeats), desc=title, leave=False, disable=None):
        for name, call in contenders.items():
            synchronise(device)
            start = clock()
            call()
            synchronise(device)
            if repeat >= 0:
                seconds[name].append(clock() - start)
    return seconds


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median and quartiles."""
    values = list(values)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": _round(statistics.median(values)), "low": _round(low), "high": _round(high)}


def ratio(numerator: list[float], denominator: list[float]) -> dict[str, float]:
    """Median and quartiles of the ratios of neighbouring measurements."""
    return spread(a / b for a, b in zip(numerator, denominator, strict=True))


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def saved_for_backward(call: Callable[[], Any], networks: Iterable[nn.Module] = ()) -> int:
    """Bytes that a forward pass keeps for the backward pass, parameters and buffers not counted.

    Exact and the same in every run: a sum over the distinct storages that autograd saves.
    """
    own = {t.untyped_storage().data_ptr() for n in networks for t in (*n.parameters(), *n.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage  # a reference, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    total = sum(storage.nbytes() for storage in storages.values())
    del result
    return total


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """How far a call raises the memory in tensors above what is held before it.

    On a GPU the caching allocator's own count; on the CPU a running sum over PyTorch's allocations and releases, which
    unlike the process's size does not depend on the C library. Scratch memory inside oneDNN is in neither.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [
        (e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0
    ]
    held = peak = 0
    for _, change in sorted(changes, key=lambda event: event[0]):
        held += change
        peak = max(peak, held)
    return peak


def autocast(device: str) -> AbstractContextManager[Any]:
    """As nnU-Net: half precision on a GPU, single on the CPU."""
    return torch.autocast("cuda") if device == "cuda" else nullcontext()


def figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """A matplotlib figure and its axes, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True})
    return plt.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)


def save(fig: Any, args: argparse.Namespace, name: str) -> None:
    """Write NAME.png, on a GPU NAME_cuda.png."""
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{_stem(args, name)}.png"
    fig.savefig(path, dpi=130)
    print(f"wrote {path.name}")
