"""Does planning know what every backbone with every head needs?

The estimate that nnU-Net's planning compares (feature map elements) against what a training step really holds, both as
multiples of nnU-Net's own network on the same plan: kept for the backward pass, and the peak of a step with parameters
and momentum. Three modalities, two patch sizes. An estimate that is too low by as much lets a plan exceed its memory
target by as much; one that is too high makes patches smaller than they need be.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import _common as common
import torch
from crnp_cost import PLAIN, PLANS, Training
from tqdm import tqdm

BOUND = 0.15
MODALITIES = 3
BACKBONES = ("early", "crnp", "shaspec", "ciml")
HEADS = ("deterministic", "ssn", "mose")
CONTENDERS: dict[str, dict[str, Any] | None] = {
    PLAIN: None,
    **{f"{backbone}, {head}": {"backbone": backbone, "head": head} for backbone in BACKBONES for head in HEADS},
}
SMALLER = {"cpu": (32, 32, 32), "cuda": (96, 96, 96)}


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--compile", action="store_true")
    args = p.parse_args()
    common.restart_with_steady_malloc()
    torch.set_num_threads(args.threads)
    plan = PLANS[args.device]["3d"]
    results: dict[str, dict[str, Any]] = {}
    for patch in (plan.patch, SMALLER[args.device]):
        title = " x ".join(map(str, patch))
        measured = {}
        for name, options in tqdm(CONTENDERS.items(), desc=title):
            torch.manual_seed(0)
            training = Training(replace(plan, patch=patch), MODALITIES, options, args)
            training.step()  # momentum and compilation
            estimate = training.module.compute_conv_feature_map_size(patch)
            measured[name] = {"estimate": int(estimate), **training.memory()}
            del training
            gc.collect()
        results[title] = {}
        for name, own in measured.items():
            estimate, saved, peak = (own[k] / measured[PLAIN][k] for k in ("estimate", "saved", "step_peak"))
            figures = {
                "memory_mib": {key: own[key] for key in ("saved", "step_peak")},
                "estimate_times": round(estimate, 3), "saved_times": round(saved, 3), "peak_times": round(peak, 3),
                "error_saved": round(estimate / saved - 1, 3), "error_peak": round(estimate / peak - 1, 3),
            }  # fmt: skip
            results[title][name] = figures
            print(f"{title:15} {name:22}", *(f"{k} {v}" for k, v in list(figures.items())[1:]))
    common.write(args, "planning_memory", {"bound": BOUND, "modalities": MODALITIES, "batch": plan.batch,
                                           "features": plan.features, "results": results})  # fmt: skip


if __name__ == "__main__":
    main()
