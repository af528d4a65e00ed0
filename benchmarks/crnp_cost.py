"""What CRNP costs against plain nnU-Net on the same plan: step time, memory and inference time, for 2 to 4 modalities.

All contenders take turns in one process, with nnU-Net's loss, deep supervision, gradient clipping and optimiser step;
the ratios are those of neighbouring measurements. CRNP encodes every modality by itself, so where arithmetic counts
and not the launching of it, nothing can be faster than M passes of a one-channel encoder, one decoder with its loss,
and the optimiser. This bound is put together from the times of these parts measured alone in the same rounds, and so
is the excess over it.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter, process_time
from typing import Any

import _common as common
import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nnunet_multimodal.losses import build_objective
from nnunet_multimodal.modalities import split_present
from nnunet_multimodal.network import MultimodalUNet
from nnunet_multimodal.trainer import split_group

CLASSES = 2
LABELS = LabelManager({"background": 0, "structure": 1}, None)
LEARNING_RATE = 1e-2
PLAIN = "nnU-Net"
# None: nnU-Net's own network and loss; otherwise options of MultimodalUNet
CONTENDERS: dict[str, dict[str, Any] | None] = {
    PLAIN: None,
    "EarlyFusion": {"backbone": "early"},
    "CRNP": {"backbone": "crnp"},
    "CRNP, separate encoders": {"backbone": "crnp", "backbone_kwargs": {"encoder": "separate"}},
}


@dataclass(frozen=True)
class Plan:
    """A planned U-Net: 3x3(x3) kernels, two convolutions per stage, stride 2 between stages."""

    patch: tuple[int, ...]
    batch: int
    features: tuple[int, ...]

    def unet(self) -> dict[str, Any]:
        """Constructor arguments as nnU-Net's plans have them."""
        dim, stages = len(self.patch), len(self.features)
        return {
            "n_stages": stages,
            "features_per_stage": list(self.features),
            "conv_op": nn.Conv3d if dim == 3 else nn.Conv2d,
            "kernel_sizes": [[3] * dim] * stages,
            "strides": [[1] * dim] + [[2] * dim] * (stages - 1),
            "n_conv_per_stage": [2] * stages,
            "n_conv_per_stage_decoder": [2] * (stages - 1),
            "conv_bias": True,
            "norm_op": nn.InstanceNorm3d if dim == 3 else nn.InstanceNorm2d,
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "nonlin": nn.LeakyReLU,
            "nonlin_kwargs": {"inplace": True},
        }

    def targets(self, device: str) -> list[Tensor]:
        """Random labels for every resolution of deep supervision, finest first."""
        sizes = [[side // 2**level for side in self.patch] for level in range(len(self.features) - 1)]
        return [torch.randint(0, CLASSES, (self.batch, 1, *size), device=device).float() for size in sizes]

    def weights(self) -> list[float]:
        """nnU-Net's weights of deep supervision: halved from stage to stage, none for the coarsest."""
        weights = np.array([1 / 2**level for level in range(len(self.features) - 1)])
        weights[-1] = 0
        return (weights / weights.sum()).tolist()


PLANS = {
    "cpu": {
        "3d": Plan((48, 48, 48), 2, (16, 32, 64, 128)),
        "2d": Plan((128, 128), 8, (16, 32, 64, 128, 128)),
    },
    "cuda": {
        "3d": Plan((128, 128, 128), 2, (32, 64, 128, 256, 320, 320)),
        "2d": Plan((512, 512), 12, (32, 64, 128, 256, 512, 512, 512, 512)),
    },
}


def stock_loss() -> DC_and_CE_loss:
    """nnU-Net's loss for classes."""
    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    return DC_and_CE_loss(dice, {}, weight_ce=1, weight_dice=1, dice_class=MemoryEfficientSoftDiceLoss)


class Training:
    """A network with its loss and optimiser, stepping as nnU-Net's trainer does."""

    def __init__(
        self, plan: Plan, num_modalities: int, options: dict[str, Any] | None, args: argparse.Namespace
    ) -> None:
        self.device = args.device
        self.x = torch.randn(plan.batch, num_modalities, *plan.patch, device=args.device)
        self.targets = plan.targets(args.device)
        if options is None:
            network: nn.Module = PlainConvUNet(
                num_modalities, num_classes=CLASSES, deep_supervision=True, **plan.unet()
            )
            self.loss: nn.Module = DeepSupervisionWrapper(stock_loss(), plan.weights())
        else:
            network = MultimodalUNet(num_modalities, CLASSES, deep_supervision=True, **options, **plan.unet())
            self.loss = build_objective(network, stock_loss(), plan.weights(), LABELS)
        self.module = network.to(args.device)
        self.network = torch.compile(self.module) if args.compile else self.module
        self.optimiser = self._optimiser()
        self.scaler = torch.amp.GradScaler("cuda") if args.device == "cuda" else None

    def _optimiser(self) -> torch.optim.SGD:
        optimiser = torch.optim.SGD(self.module.parameters(), LEARNING_RATE, 0.99, weight_decay=3e-5, nesterov=True)
        if isinstance(self.module, MultimodalUNet):
            for group in self.module.backbone.parameter_groups():
                split_group(optimiser, {**group, "lr": LEARNING_RATE * group.get("lr_scale", 1.0)})
        return optimiser

    def forward(self) -> Tensor:
        """The loss of the batch."""
        self.network.train()
        self.module.decoder.deep_supervision = True
        with common.autocast(self.device):
            return self.loss(self.network(self.x), self.targets)

    def update(self) -> None:
        """Clip the gradient and step, as nnU-Net."""
        if self.scaler is None:
            nn.utils.clip_grad_norm_(self.module.parameters(), 12)
            self.optimiser.step()
        else:
            self.scaler.unscale_(self.optimiser)
            nn.utils.clip_grad_norm_(self.module.parameters(), 12)
            self.scaler.step(self.optimiser)
            self.scaler.update()

    def step(self) -> None:
        """One whole training step."""
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.forward()
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        self.update()

    @torch.no_grad()
    def infer(self) -> Tensor:
        """Logits, as nnU-Net's predictor gets them."""
        self.network.eval()
        self.module.decoder.deep_supervision = False
        with common.autocast(self.device):
            return self.network(self.x)

    def resident_bytes(self) -> int:
        """Parameters, buffers and momentum."""
        state = [t for s in self.optimiser.state.values() for t in s.values() if isinstance(t, Tensor)]
        return sum(t.nbytes for t in (*self.module.parameters(), *self.module.buffers(), *state))

    def memory(self) -> dict[str, float]:
        """MiB: kept from forward to backward; the peak of a step, with parameters and momentum; and of inference."""
        saved = common.saved_for_backward(self.forward, [self.module])
        self.optimiser.zero_grad(set_to_none=True)
        peak = common.peak_bytes(self.step, self.device)
        self.optimiser.zero_grad(set_to_none=True)
        inference = common.peak_bytes(self.infer, self.device)
        figures = {"saved": saved, "step_peak": self.resident_bytes() + peak, "inference_peak": inference}
        return {name: round(value / 2**20, 1) for name, value in figures.items()}

    def flops(self) -> float:
        """Operations of a forward and backward pass, in units of 1e9 multiply-adds."""
        with FlopCounterMode(display=False) as counter:
            self.forward().backward()
        self.optimiser.zero_grad(set_to_none=True)
        return round(counter.get_total_flops() / 2e9, 2)


class Parts:
    """The parts of a CRNP training step, each by itself: forward and backward from inputs of the right shapes."""

    def __init__(self, training: Training, plan: Plan, args: argparse.Namespace) -> None:
        self.network = training.module
        self.backbone = training.module.backbone
        self.plan, self.device, self.compile = plan, args.device, args.compile
        self.batch, self.modalities = training.x.shape[:2]
        self.training = training
        self.present = torch.ones(self.batch, self.modalities, dtype=torch.bool, device=args.device)
        self.sizes = [s[1:] for s in self._shapes()]
        self.dtype = torch.float16 if args.device == "cuda" else torch.float32

    def _shapes(self) -> list[tuple[int, ...]]:
        sizes = self.backbone.topology.stage_sizes(self.plan.patch)
        return [(self.batch, f, *s) for f, s in zip(self.plan.features, sizes, strict=True)]

    def contenders(self) -> dict[str, Callable[[], None]]:
        """Each part's forward and backward pass."""
        return {
            "encoder, one pass": self._encoder(1),
            "encoder, all modalities": self._encoder(self.modalities),
            "decoder and loss": self._decoder(),
            "RNP and fusion": self._fusion(),
            "skip reduction": self._reduction(),
            "input": lambda: split_present(self.training.x),
            "optimiser": self._optimiser(),
        }

    def _leaf(self, *shape: int, grad: bool = True) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype).requires_grad_(grad)

    def _pass(
        self, call: Callable[..., Any], outputs: list[tuple[int, ...]], leaves: list[Tensor]
    ) -> Callable[[], None]:
        """Forward, then backward from random gradients of the outputs' shapes."""
        gradients = [self._leaf(*shape, grad=False) for shape in outputs]
        if self.compile:
            call = torch.compile(call)

        def run() -> None:
            with common.autocast(self.device):
                out = call()
            torch.autograd.backward(out, [g.to(o.dtype) for g, o in zip(gradients, out, strict=True)])
            for tensor in (*leaves, *self.network.parameters()):
                tensor.grad = None

        return run

    def _encoder(self, passes: int) -> Callable[[], None]:
        x = torch.randn(passes * self.batch, 1, *self.plan.patch, device=self.device)
        encoder = self.backbone.encoders[0]
        return self._pass(lambda: encoder(x), [(passes * self.batch, *s) for s in self.sizes], [])

    def _fusion(self) -> Callable[[], None]:
        x = self._leaf(self.batch, self.modalities, *self.sizes[-1])

        def call() -> list[Tensor]:
            fused, error = self.backbone.fusion(x, self.present)
            return [fused, error.sum()]

        return self._pass(call, [tuple(x.shape), ()], [x])

    def _reduction(self) -> Callable[[], None]:
        stages = [self._leaf(self.batch, self.modalities, *s) for s in self.sizes]
        mixing = torch.diag_embed(self.present.to(self.dtype))

        def call() -> list[Tensor]:
            return [r(s, mixing) for r, s in zip(self.backbone.reductions, stages, strict=True)]

        return self._pass(call, self._shapes(), stages)

    def decode(self, skips: list[Tensor]) -> Tensor:
        """Decoder, heads and nnU-Net's loss."""
        features = self.backbone.decoder(skips)
        logits = [self.network.head(features, skips[-1]).mean, *self.network.head.coarse_logits(features)]
        loss = self.training.loss.segmentation_loss
        weighted = zip(self.plan.weights(), logits, self.training.targets, strict=True)
        return sum(weight * loss(logit, target) for weight, logit, target in weighted if weight)

    def skips(self) -> list[Tensor]:
        """What the decoder takes."""
        return [self._leaf(*shape) for shape in self._shapes()]

    def _decoder(self) -> Callable[[], None]:
        skips = self.skips()
        return self._pass(lambda: [self.decode(skips)], [()], skips)

    def _optimiser(self) -> Callable[[], None]:
        """Clipping and the step, which cost the same for any gradient."""
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        gradients = [torch.zeros_like(p) for p in parameters]

        def run() -> None:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            nn.utils.clip_grad_norm_(parameters, 12)
            self.training.optimiser.step()

        return run

    def saved_bytes(self) -> dict[str, int]:
        """Kept from forward to backward by one encoder pass and by the decoder with its loss."""
        x = torch.randn(self.batch, 1, *self.plan.patch, device=self.device)
        skips = self.skips()
        own = [self.network]

        def run(call: Callable[[], Any]) -> int:
            with common.autocast(self.device):
                return common.saved_for_backward(call, own)

        return {"encoder": run(lambda: self.backbone.encoders[0](x)), "decoder": run(lambda: self.decode(skips))}


def size(training: Training, plan: Plan, args: argparse.Namespace) -> dict[str, Any]:
    """What does not depend on the clock: memory, parameters, feature maps, operations."""
    elements = training.module.compute_conv_feature_map_size(plan.patch) * plan.batch
    return {
        "memory_mib": training.memory(),
        "parameters_million": round(sum(p.numel() for p in training.module.parameters()) / 1e6, 3),
        "feature_map_elements_million": round(elements / 1e6, 2),
        "giga_multiply_adds": None if args.compile else training.flops(),
    }


def measure(plan: Plan, num_modalities: int, args: argparse.Namespace, title: str) -> dict[str, Any]:
    """All figures of one plan for one number of modalities."""
    torch.manual_seed(0)
    trainings = {name: Training(plan, num_modalities, options, args) for name, options in CONTENDERS.items()}
    parts = Parts(trainings["CRNP"], plan, args)
    for training in trainings.values():  # momentum and compilation before the first measurement
        training.step()
    figures = {name: size(training, plan, args) for name, training in trainings.items()}
    calls = {name: training.step for name, training in trainings.items()} | parts.contenders()
    clock = process_time if args.processor_time else perf_counter
    steps = common.interleaved(calls, args.repeats, args.device, f"{title}: training", clock=clock)
    passes = {name: training.infer for name, training in trainings.items()}
    inference = common.interleaved(passes, args.repeats, args.device, f"{title}: inference", clock=clock)
    saved = parts.saved_bytes()
    bound = [
        num_modalities * encoder + decoder + optimiser
        for encoder, decoder, optimiser in zip(
            steps["encoder, one pass"], steps["decoder and loss"], steps["optimiser"], strict=True
        )
    ]
    bound_mib = (num_modalities * saved["encoder"] + saved["decoder"]) / 2**20
    for name, figure in figures.items():
        plain = figures[PLAIN]["memory_mib"]
        figure["step_seconds"] = common.spread(steps[name])
        figure["step_ratio"] = common.ratio(steps[name], steps[PLAIN])
        figure["inference_seconds"] = common.spread(inference[name])
        figure["inference_ratio"] = common.ratio(inference[name], inference[PLAIN])
        figure["memory_ratio"] = {k: round(v / plain[k], 3) for k, v in figure["memory_mib"].items()}
    return {
        "contenders": figures,
        "parts_seconds": {name: common.spread(steps[name]) for name in calls if name not in trainings},
        "fusion_share_of_step": common.ratio(steps["RNP and fusion"], steps["CRNP"]),
        "separate_over_shared": common.ratio(steps["CRNP, separate encoders"], steps["CRNP"]),
        "bound": {
            "step_ratio": common.ratio(bound, steps[PLAIN]),
            "saved_mib": round(bound_mib, 1),
            "saved_ratio": round(bound_mib / figures[PLAIN]["memory_mib"]["saved"], 3),
        },
        "excess_over_bound": {
            "step": common.ratio(steps["CRNP"], bound),
            "saved": round(figures["CRNP"]["memory_mib"]["saved"] / bound_mib, 3),
        },
    }


def report(result: Mapping[str, Any]) -> None:
    """Print the figures of one plan and one number of modalities."""
    for name, figure in result["contenders"].items():
        step, memory = figure["step_seconds"]["median"], figure["memory_ratio"]
        ratio, inference = figure["step_ratio"]["median"], figure["inference_ratio"]["median"]
        print(
            f"  {name:24} step {step:.3f} s, x {ratio:.2f}; memory x {memory['saved']:.2f} kept, "
            f"x {memory['step_peak']:.2f} peak; inference x {inference:.2f}; "
            f"{figure['giga_multiply_adds']} G multiply-adds"
        )
    bound, excess = result["bound"], result["excess_over_bound"]
    print(f"  {'bound':24} step x {bound['step_ratio']['median']:.2f}; memory x {bound['saved_ratio']:.2f} kept")
    print(f"  CRNP over the bound: step x {excess['step']['median']:.3f}, memory kept x {excess['saved']:.3f}")
    print("  parts: " + ", ".join(f"{name} {1000 * s['median']:.1f} ms" for name, s in result["parts_seconds"].items()))


def draw(args: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    """Step time and memory over plain nnU-Net's against the number of modalities, with the bound."""
    for plan, by_modalities in results.items():
        fig, axes = common.figure(9, 3.2, 3)
        counts = list(by_modalities)
        panels = (
            ("training step", lambda f: f["step_ratio"], lambda r: r["bound"]["step_ratio"]["median"]),
            (
                "memory kept for backward",
                lambda f: {"median": f["memory_ratio"]["saved"]},
                lambda r: r["bound"]["saved_ratio"],
            ),
            ("inference", lambda f: f["inference_ratio"], None),
        )
        for ax, (title, ratio, bound) in zip(axes[0], panels, strict=True):
            _panel(ax, by_modalities, ratio, bound)
            ax.set(title=title, xlabel="modalities", xticks=range(len(counts)), xticklabels=counts)
        axes[0, 0].set_ylabel("times plain nnU-Net")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        common.save(fig, args, f"crnp_cost_{plan}")


def _panel(
    ax: Any, by_modalities: dict[str, Any], ratio: Callable[..., Any], bound: Callable[..., float] | None
) -> None:
    shown = {"CRNP": "#2c6fbb", "CRNP, separate encoders": "#8fb8de"}
    for i, (name, colour) in enumerate(shown.items()):
        ratios = [ratio(result["contenders"][name]) for result in by_modalities.values()]
        x = np.arange(len(ratios)) + (i - 0.5) * 0.4
        medians = [r["median"] for r in ratios]
        errors = (
            [[r["median"] - r["low"] for r in ratios], [r["high"] - r["median"] for r in ratios]]
            if "low" in ratios[0]
            else None
        )
        ax.bar(x, medians, 0.38, yerr=errors, color=colour, label=name, error_kw={"elinewidth": 1, "capsize": 2})
        for place, value in zip(x, medians, strict=True):
            ax.text(place, 0.06, f"{value:.2f}", ha="center", color="white" if i == 0 else "black", fontsize=8)
    if bound is not None:
        for place, result in enumerate(by_modalities.values()):
            label = "bound: M encoder passes, one decoder" if place == 0 else None
            ax.hlines(bound(result), place - 0.42, place + 0.42, color="#c0392b", lw=1.6, label=label)
    ax.axhline(1, color="black", lw=0.8, ls=":")


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--repeats", type=int, default=7, help="measured rounds after one to warm up")
    p.add_argument("--threads", type=int, help="CPU threads; PyTorch's choice if not given")
    p.add_argument("--modalities", type=int, nargs="+", default=[2, 3, 4])
    p.add_argument("--plans", nargs="+", choices=("3d", "2d"), default=["3d", "2d"])
    p.add_argument("--compile", action="store_true", help="torch.compile, as nnU-Net does on a GPU")
    p.add_argument(
        "--processor-time",
        action="store_true",
        help="the process's own time instead of the clock's: with --threads 1 the better measure on a busy machine",
    )
    args = p.parse_args()
    if args.device == "cpu":
        common.restart_with_steady_malloc()
    else:
        torch.backends.cudnn.benchmark = True  # as nnU-Net
    if args.threads:
        torch.set_num_threads(args.threads)
    results: dict[str, dict[str, Any]] = {}
    for name in args.plans:
        plan = PLANS[args.device][name]
        results[name] = {}
        for count in args.modalities:
            print(f"{name}, patch {'x'.join(map(str, plan.patch))}, batch {plan.batch}, {count} modalities")
            results[name][str(count)] = measure(plan, count, args, f"{name}, M = {count}")
            report(results[name][str(count)])
            gc.collect()
    draw(args, results)
    plans = {name: vars(PLANS[args.device][name]) for name in args.plans}
    common.write(args, "crnp_cost", {"repeats": args.repeats, "plans": plans, "results": results})


if __name__ == "__main__":
    main()
