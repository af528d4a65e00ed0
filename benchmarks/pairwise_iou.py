"""All pairwise IoUs of a case's samples, which D_GED^2 and the sample diversity need: seconds and peak memory.

On label maps that are hard (random labels everywhere, so that no voxel can be skipped) and on ones like lesions (nested
blobs whose outlines move from sample to sample). In turn with it runs the obvious fast way, the matrix product of
one-hot maps in float32 over pieces of the image. Counting bits takes one thread; --threads is for the product alone.
"""

from __future__ import annotations

import argparse
import tracemalloc
from collections.abc import Callable
from functools import partial
from time import perf_counter, process_time
from typing import Any

import _common as common
import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from nnunet_multimodal.metrics.distribution import pairwise_iou_distance

CLASSES = 4
LABELS = tuple(range(1, CLASSES))
SIZES = {"20 samples of 64^3": (20, 64), "100 samples of 128^3": (100, 128)}
NEEDED_SECONDS = {"100 samples of 128^3": 10}  # on two cores
REFERENCE_SECONDS = {"20 samples of 64^3": 5}  # stated for the reference code of SSN, on such a machine; not run here
OURS, PRODUCT = "bits", "matrix product"


def random_maps(samples: int, side: int) -> np.ndarray:
    """Random labels (N, Z, Y, X)."""
    return np.random.default_rng(0).integers(0, CLASSES, (samples, side, side, side), dtype=np.uint8)


def lesion_maps(samples: int, side: int) -> np.ndarray:
    """Labels (N, Z, Y, X) of a smooth field that every sample cuts at other heights."""
    rng = np.random.default_rng(0)
    field = gaussian_filter(rng.standard_normal((side, side, side)), side / 12)
    field /= field.std()
    shifts = 0.2 * rng.standard_normal(samples)
    return np.stack([np.digitize(field + shift, (1.5, 2.0, 2.4)).astype(np.uint8) for shift in shifts])


def matrix_product(maps: np.ndarray, chunk: int = 8192) -> np.ndarray:
    """1 - IoU of all pairs (N, N), averaged over the labels."""
    flat = torch.from_numpy(maps).flatten(1)
    counts = torch.zeros(len(LABELS), len(maps), len(maps), dtype=torch.float64)
    for piece in flat.split(chunk, dim=1):
        for i, label in enumerate(LABELS):
            one_hot = (piece == label).float()
            counts[i] += one_hot @ one_hot.T
    sizes = counts.diagonal(dim1=1, dim2=2)
    union = sizes[:, :, None] + sizes[:, None] - counts
    return torch.where(union > 0, 1 - counts / union.clamp(min=1), 0).mean(0).numpy()


def peak_bytes(call: Callable[[], Any]) -> int:
    """The highest sum of NumPy's arrays during a call, beyond what is held before it."""
    tracemalloc.start()
    call()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def measure(maps: np.ndarray, args: argparse.Namespace, title: str) -> dict[str, Any]:
    """Seconds of both ways, what the first needs in memory, and how far they disagree."""
    contenders = {OURS: partial(pairwise_iou_distance, maps, maps, LABELS), PRODUCT: partial(matrix_product, maps)}
    clock = process_time if args.processor_time else perf_counter
    seconds = common.interleaved(contenders, args.repeats, "cpu", title, clock=clock)
    return {
        "seconds": {name: common.spread(values) for name, values in seconds.items()},
        "speed_up": common.ratio(seconds[PRODUCT], seconds[OURS]),
        "label_maps_bytes": maps.nbytes,
        "peak_bytes": {
            OURS: peak_bytes(contenders[OURS]),
            PRODUCT: common.peak_bytes(contenders[PRODUCT], "cpu"),
        },
        "largest_difference": float(np.abs(contenders[OURS]() - contenders[PRODUCT]()).max()),
        "voxels_with_a_label": round(float((maps > 0).mean()), 4),
    }


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--repeats", type=int, default=5, help="measured rounds after one to warm up")
    p.add_argument("--threads", type=int, default=1, help="of the matrix product")
    p.add_argument(
        "--processor-time",
        action="store_true",
        help="the process's own time instead of the clock's: the better measure on a busy machine",
    )
    args = p.parse_args()
    if args.device != "cpu":
        p.error("this benchmark has no GPU part")
    torch.set_num_threads(args.threads)
    results: dict[str, dict[str, Any]] = {}
    for size, (samples, side) in SIZES.items():
        results[size] = {}
        for kind, make in (("random", random_maps), ("lesions", lesion_maps)):
            found = results[size][kind] = measure(make(samples, side), args, f"{size}, {kind}")
            seconds = ", ".join(f"{name} {found['seconds'][name]['median']:.3f} s" for name in (OURS, PRODUCT))
            extra, held = found["peak_bytes"][OURS] / 2**20, found["label_maps_bytes"] / 2**20
            print(f"{size:22} {kind:8} {seconds}, {extra:.1f} MiB beside {held:.0f} MiB of label maps")
    figures = {
        "repeats": args.repeats,
        "classes": CLASSES,
        "needed_seconds": NEEDED_SECONDS,
        "reference_seconds": REFERENCE_SECONDS,
        "results": results,
    }
    common.write(args, "pairwise_iou", figures)
    for size, needed in NEEDED_SECONDS.items():
        slowest = max(found["seconds"][OURS]["median"] for found in results[size].values())
        if slowest > needed:
            raise SystemExit(f"{size} took {slowest:.1f} s; {needed} s are allowed")


if __name__ == "__main__":
    main()
