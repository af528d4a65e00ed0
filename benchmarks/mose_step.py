"""What a training step with MoSE costs, in memory and time, beside nnU-Net's own network and SSN on the same plan.

Samples are made one at a time and again in the backward pass, so that what grows with their number are their logits
alone. One annotation for each image; more of them cost next to nothing beside the network (``mose_loss``).
"""

from __future__ import annotations

from typing import Any

import _common as common
import torch
from crnp_cost import PLAIN, PLANS, Training

CONTENDERS: dict[str, dict[str, Any] | None] = {
    PLAIN: None,
    "SSN": {"backbone": "early", "head": "ssn"},
    **{
        f"MoSE, K 4, S {s}": {"backbone": "early", "head": "mose", "head_kwargs": {"samples_per_expert": s}}
        for s in (1, 2, 4)
    },
}
MODALITIES = 2


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--compile", action="store_true")
    args = p.parse_args()
    common.restart_with_steady_malloc()
    torch.set_num_threads(args.threads)
    results = {}
    for kind, plan in PLANS[args.device].items():
        torch.manual_seed(0)
        trainings = {name: Training(plan, MODALITIES, options, args) for name, options in CONTENDERS.items()}
        for training in trainings.values():  # momentum and compilation before the first measurement
            training.step()
        memory = {name: training.memory() for name, training in trainings.items()}
        steps = {name: training.step for name, training in trainings.items()}
        times = common.interleaved(steps, args.repeats, args.device, f"{kind}: steps")
        results[kind] = {
            name: {
                "memory_mib": memory[name],
                "saved_times": round(memory[name]["saved"] / memory[PLAIN]["saved"], 3),
                "peak_times": round(memory[name]["step_peak"] / memory[PLAIN]["step_peak"], 3),
                "step_times": common.ratio(times[name], times[PLAIN]),
            }
            for name in trainings
        }
        for name, figures in results[kind].items():
            print(kind, name, figures)
    plans = {k: {"patch": p.patch, "batch": p.batch, "features": p.features} for k, p in PLANS[args.device].items()}
    common.write(args, "mose_step", {"plans": plans, "results": results})


if __name__ == "__main__":
    main()
