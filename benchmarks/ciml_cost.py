"""What CIML costs against plain nnU-Net on the same plan, and whether planning knows it.

Memory: the estimate that planning compares (feature map elements) against what a training step really holds, both as
multiples of nnU-Net's network: kept for the backward pass, exact and the same in every run, and the step's peak.
Time: a training step and a prediction, contenders in turn.
"""

from __future__ import annotations

import argparse
from typing import Any

import _common as common
import torch
from crnp_cost import PLAIN, PLANS, Plan, Training

BOUND = 0.15
CONTENDERS: dict[str, dict[str, Any] | None] = {
    PLAIN: None,
    "CIML": {"backbone": "ciml"},
    "without attention": {"backbone": "ciml", "backbone_kwargs": {"attention": False}},
    "messages alone": {"backbone": "ciml", "backbone_kwargs": {"attention": False, "variational": False}},
    "without messages": {"backbone": "ciml", "backbone_kwargs": {"messages": False}},
}


def measure(plan: Plan, modalities: int, args: argparse.Namespace, title: str) -> dict[str, Any]:
    """All figures of a plan for one number of modalities."""
    torch.manual_seed(0)
    trainings = {name: Training(plan, modalities, options, args) for name, options in CONTENDERS.items()}
    for training in trainings.values():  # momentum and compilation before the first measurement
        training.step()
    memory = {name: training.memory() for name, training in trainings.items()}
    estimate = {n: t.module.compute_conv_feature_map_size(plan.patch) * plan.batch for n, t in trainings.items()}
    steps = common.interleaved({n: t.step for n, t in trainings.items()}, args.repeats, args.device, f"{title}: steps")
    passes = {n: t.infer for n, t in trainings.items()}
    passes = common.interleaved(passes, args.repeats, args.device, f"{title}: predictions")
    figures = {}
    for name in trainings:
        times = estimate[name] / estimate[PLAIN]
        saved, peak = (memory[name][key] / memory[PLAIN][key] for key in ("saved", "step_peak"))
        figures[name] = {
            "memory_mib": memory[name],
            "estimate_million": round(estimate[name] / 1e6, 2),
            "estimate_times": round(float(times), 3),
            "saved_times": round(saved, 3),
            "peak_times": round(peak, 3),
            "estimate_error_saved": round(float(times / saved - 1), 3),
            "estimate_error_peak": round(float(times / peak - 1), 3),
            "step_times": common.ratio(steps[name], steps[PLAIN]),
            "prediction_times": common.ratio(passes[name], passes[PLAIN]),
        }
        print(f"{title} {name:18}", {key: figures[name][key] for key in list(figures[name])[2:]})
    return figures


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--repeats", type=int, default=7)
    p.add_argument("--modalities", type=int, nargs="+", default=[2, 3, 4])
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--compile", action="store_true")
    args = p.parse_args()
    common.restart_with_steady_malloc()
    torch.set_num_threads(args.threads)
    results = {
        f"{kind}, {modalities} modalities": measure(plan, modalities, args, f"{kind} M={modalities}")
        for kind, plan in PLANS[args.device].items()
        for modalities in args.modalities
    }
    plans = {k: {"patch": p.patch, "batch": p.batch, "features": p.features} for k, p in PLANS[args.device].items()}
    common.write(args, "ciml_cost", {"bound": BOUND, "plans": plans, "results": results})


if __name__ == "__main__":
    main()
