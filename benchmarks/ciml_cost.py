"""What CIML costs against plain nnU-Net on the same plan, and whether planning knows it.

Memory: the estimate that planning compares (feature map elements) against what a training step really holds, both as
multiples of nnU-Net's network: kept for the backward pass, exact and the same in every run, and the step's peak.
Time: a training step and a prediction, contenders in turn.

Segmentors one after the other against all at once: their weights differ, so both a folded batch and stacked channels
are convolutions with a group for each segmentor. Compared without messages, forward and backward pass: S U-Nets of the
plan against one that is S times as wide, all its convolutions grouped, which is as many operations.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import _common as common
import torch
from crnp_cost import CLASSES, PLAIN, PLANS, Plan, Training
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import Tensor, nn

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


def build_unet(plan: Plan, segmentors: int, device: str) -> PlainConvUNet:
    """The U-Nets of so many segmentors, each with an image channel, as one with grouped convolutions."""
    wide = replace(plan, features=tuple(segmentors * f for f in plan.features))
    network = PlainConvUNet(segmentors, num_classes=segmentors * CLASSES, deep_supervision=True, **wide.unet())
    for module in network.modules() if segmentors > 1 else ():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            transposed = isinstance(module, nn.ConvTranspose2d | nn.ConvTranspose3d)
            width = (module.out_channels if transposed else module.in_channels) // segmentors
            module.groups = segmentors
            module.weight = nn.Parameter(module.weight.detach()[:, :width].clone())
    return network.to(device)


def measure_grouping(plan: Plan, segmentors: int, args: argparse.Namespace, title: str) -> dict[str, Any]:
    """Time of segmentors at once, in units of one after the other."""
    alone = [build_unet(plan, 1, args.device) for _ in range(segmentors)]
    together = build_unet(plan, segmentors, args.device)
    x = torch.randn(plan.batch, segmentors, *plan.patch, device=args.device)

    def call(networks: list[PlainConvUNet], inputs: list[Tensor], backward: bool) -> Callable[[], None]:
        def run() -> None:
            with torch.set_grad_enabled(backward), common.autocast(args.device):
                outputs = [level for n, own in zip(networks, inputs, strict=True) for level in n(own)]
            if backward:
                torch.autograd.backward(outputs, [torch.ones_like(level) for level in outputs])
                for network in networks:
                    network.zero_grad(set_to_none=True)

        return run

    figures = {}
    for name, backward in (("forward_and_backward", True), ("forward", False)):
        contenders = {
            "loop": call(alone, list(x.split(1, 1)), backward),
            "grouped": call([together], [x], backward),
        }
        for contender in contenders.values():
            contender()
        times = common.interleaved(contenders, args.repeats, args.device, f"{title}: {name}")
        figures[f"grouped_{name}_times"] = common.ratio(times["grouped"], times["loop"])
    print(f"{title} S={segmentors}", figures)
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
    grouping = {
        f"{kind}, {segmentors} segmentors": measure_grouping(plan, segmentors, args, f"{kind} grouped")
        for kind, plan in PLANS[args.device].items()
        for segmentors in args.modalities
    }
    plans = {k: {"patch": p.patch, "batch": p.batch, "features": p.features} for k, p in PLANS[args.device].items()}
    common.write(args, "ciml_cost", {"bound": BOUND, "plans": plans, "results": results, "grouping": grouping})


if __name__ == "__main__":
    main()
