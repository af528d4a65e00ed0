"""Time and memory of MoSE's loss, forward and backward pass: costs, exact transport and divergence.

Two settings of the paper's size: LIDC's (batch 16, 16 samples, 128 x 128, four raters) and one with many samples
(batch 4, 100 samples). The limit of the first phase (gamma 1/2) and of the second (gamma 1); all costs, the last
of them the default.
"""

from __future__ import annotations

import argparse
from statistics import median
from time import perf_counter
from typing import Any

import _common as common
import torch
from torch import Tensor
from tqdm import tqdm

from nnunet_multimodal.heads.transport_cost import COSTS, pairwise_cost, transport_terms

SETTINGS = {"LIDC": (16, 16), "many samples": (4, 100)}  # batch, samples
RATERS, SIZE, CLASSES = 4, 128, 2
NEEDED = {"LIDC": {"seconds": 0.1, "mib": 250.0}, "many samples": {"seconds": 0.1}}
REFERENCE = {"LIDC": {"seconds": 0.14, "mib": 472.0}, "many samples": {"seconds": 0.20}}  # the authors' code, 2 cores
KL_WEIGHT = 1.0


def data(batch: int, samples: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, annotations that overlap in part, weights of samples and raters."""
    torch.manual_seed(0)
    logits = torch.randn(batch, samples, CLASSES, SIZE, SIZE, device=device, requires_grad=True)
    place = torch.linspace(-1, 1, SIZE, device=device)
    radius = 0.2 + 0.3 * torch.rand(batch, RATERS, 1, 1, device=device)
    inside = place[:, None] ** 2 + place**2 < radius**2
    annotations = torch.stack((~inside, inside), 2)
    weights = torch.rand(batch, samples, device=device) + 0.1
    return logits, annotations, weights / weights.sum(1, keepdim=True), torch.full((batch, RATERS), 1 / RATERS)


def measure(batch: int, samples: int, kind: str, limit: float, args: argparse.Namespace) -> dict[str, Any]:
    """Median time of a forward and backward pass, and what it allocates beyond the logits."""
    logits, annotations, sample_weights, weights = data(batch, samples, args.device)
    weights = weights.to(args.device)

    def step() -> None:
        logits.grad = None
        cost = pairwise_cost(logits, annotations, None, kind, False)
        transported, divergence = transport_terms(cost, sample_weights, weights, limit)
        (transported.mean() + KL_WEIGHT * divergence.mean()).backward()
        common.synchronise(args.device)

    step()
    seconds = []
    for _ in range(args.repeats):
        start = perf_counter()
        step()
        seconds.append(perf_counter() - start)
    logits.grad = None
    return {
        "seconds": round(median(seconds), 4),
        "seconds_lowest": round(min(seconds), 4),
        "mib": round(common.peak_bytes(step, args.device) / 2**20, 1),
        "logits_mib": round(logits.nbytes / 2**20, 1),
    }


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--repeats", type=int, default=15)
    p.add_argument("--threads", type=int, default=2)
    args = p.parse_args()
    common.restart_with_steady_malloc()
    torch.set_num_threads(args.threads)
    results = {}
    cells = [(n, k, g) for n in SETTINGS for k in COSTS for g in (0.5, 1.0)]
    for name, kind, limit in tqdm(cells, desc="mose_loss"):
        key = f"{name}, {kind}, gamma {limit:g}"
        results[key] = measure(*SETTINGS[name], kind, limit, args)
        print(key, results[key])
    reached = {
        key: {what: figures[what] <= most for what, most in NEEDED[key.split(", ")[0]].items()}
        for key, figures in results.items()
    }
    figures = {"needed": NEEDED, "reference": REFERENCE, "reached": reached, "results": results}
    common.write(args, "mose_loss", figures)


if __name__ == "__main__":
    main()
