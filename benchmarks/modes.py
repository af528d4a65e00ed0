"""Does MoSE find the modes? Images whose label maps have a known distribution, as the paper's multimodal Cityscapes.

Each image shows a disc and a square. A disc is labelled "disc" or, with probability 0.25, as its twin; a square as its
twin with probability 0.4; both for the whole image. So every image has four label maps, of probability 0.45, 0.30, 0.15
and 0.10, which nothing in it tells apart. MoSE (more experts than there are modes), SSN and a deterministic network
are trained for as many steps, with four annotations of each image, drawn from that distribution, or with one.

Measured on held-out images against the true distribution: total variation of the modes' probabilities (a sample is of
the mode that it has the highest mean IoU with, and of none below 0.8), D_GED^2, and the expected calibration error of
the classes' probabilities.
"""

from __future__ import annotations

import argparse
import itertools
from time import perf_counter
from typing import Any

import _common as common
import numpy as np
import torch
from crnp_cost import Plan, stock_loss
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor, nn
from tqdm import tqdm

from nnunet_multimodal.heads.base import RaterLabels
from nnunet_multimodal.losses import build_objective
from nnunet_multimodal.metrics.calibration import ReliabilityCurve, reliability_curve
from nnunet_multimodal.metrics.distribution import generalized_energy_distance
from nnunet_multimodal.network import MultimodalUNet
from nnunet_multimodal.raters.training import RaterPolicy

SIZE, CLASSES, RATERS = 32, 5, 4
FLIPS = (0.25, 0.4)  # of disc (label 1, twin 2) and square (3, twin 4)
MODES = list(itertools.product((False, True), repeat=2))
PROBABILITIES = np.array([np.prod([p if f else 1 - p for f, p in zip(mode, FLIPS, strict=True)]) for mode in MODES])
LABELS = LabelManager({"background": 0, "disc": 1, "disc_twin": 2, "square": 3, "square_twin": 4}, None)
NEEDED = {"total_variation": 0.1, "ECE": 0.02, "surplus_weight": 0.05, "minutes": 20}
LEAST_IOU = 0.8
SHOWN = 4
MODELS: dict[str, dict[str, Any]] = {
    "MoSE": {
        "head": "mose",
        "head_kwargs": {
            "num_experts": 8,
            "samples_per_expert": 1,
            "latent_dimension": 5,
            "cost": "cross_entropy",
            "preference": 0.01,
        },
    },
    "SSN": {"head": "ssn", "head_kwargs": {"warm_up": 0.1}},
    "deterministic": {"head": "deterministic"},
}


def make_image(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Image (1, 32, 32) float32 and the label maps of its modes (4, 32, 32)."""
    y, x = np.mgrid[:SIZE, :SIZE]
    left = rng.random() < 0.5
    centres = [(rng.uniform(8, 24), rng.uniform(6, 10) + 16 * side) for side in (left, not left)]
    disc = (y - centres[0][0]) ** 2 + (x - centres[0][1]) ** 2 < rng.uniform(3.5, 6) ** 2
    square = np.maximum(abs(y - centres[1][0]), abs(x - centres[1][1])) < rng.uniform(3, 5.5)
    image = rng.normal(0, 0.2, (SIZE, SIZE)) + disc - square
    maps = [np.where(disc, 2 if flipped else 1, 0) + np.where(square, 4 if other else 3, 0) for flipped, other in MODES]
    return image[None].astype(np.float32), np.stack(maps).astype(np.uint8)


def annotate(maps: Tensor, drawn: Tensor) -> Tensor:
    """The label maps (B, R, *D) of drawn modes (B, R)."""
    return maps[torch.arange(len(maps))[:, None], drawn]


class Trained:
    """A network, trained on images and annotations as nnU-Net does.

    Args:
        name: in ``MODELS``.
        images: (N, 1, *D).
        maps: (N, 4, *D), of all modes.
        drawn: (N, R), the modes that the raters of each image have.
        args: of the command.
    """

    def __init__(self, name: str, images: Tensor, maps: Tensor, drawn: Tensor, args: argparse.Namespace) -> None:
        plan = Plan((SIZE, SIZE), args.batch_size, (16, 32, 64))
        torch.manual_seed(args.seed)
        self.network = MultimodalUNet(
            1, CLASSES, backbone="early", deep_supervision=True, **MODELS[name], **plan.unet()
        ).to(args.device)
        self.network.apply(self.network.initialize)
        objective = build_objective(self.network, stock_loss(), plan.weights(), LABELS)
        policy = RaterPolicy(LABELS, CLASSES, "random")
        optimiser = torch.optim.SGD(
            self.network.parameters(), args.learning_rate, 0.99, weight_decay=3e-5, nesterov=True
        )
        schedule = torch.optim.lr_scheduler.PolynomialLR(optimiser, args.steps, 0.9)
        start = perf_counter()
        losses: list[float] = []
        epoch: list[float] = []
        for step in tqdm(range(args.steps), desc=f"{name}, {drawn.shape[1]} raters"):
            chosen = torch.randint(len(images), (args.batch_size,))
            annotations = annotate(maps[chosen], drawn[chosen]).to(args.device)
            weights = torch.full(drawn[chosen].shape, 1 / drawn.shape[1], device=args.device)
            levels = [annotations[..., ::stride, ::stride].float() for stride in (1, 2)]
            objective.step.progress = (step + 1) / args.steps
            objective.step.raters = RaterLabels(annotations, weights)
            objective.step.epoch_losses = losses
            loss = objective(self.network(images[chosen].to(args.device)), policy(levels, levels, weights))
            loss.backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), 12)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            epoch.append(loss.item())
            if len(epoch) == args.epoch:
                losses.append(float(np.mean(epoch)))
                epoch = []
        self.seconds = perf_counter() - start
        self.network.eval()

    @torch.no_grad()
    def sample(
        self, image: Tensor, count: int, generator: torch.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Label maps (S, *D), weights (S,) and mean probabilities (C, *D) of an image (1, *D)."""
        network = self.network
        distribution = network.distribution(image[None])
        probability = distribution.mean.softmax(1)[0].cpu().numpy()
        if not network.head.STOCHASTIC:
            return distribution.mean.argmax(1).cpu().numpy(), np.ones(1), probability
        whole = torch.ones(1, *image.shape[1:], dtype=torch.bool)
        blended = network.head.blended(distribution.blendable()[0], whole)
        if hasattr(blended, "draw_compact"):
            samples, weights = blended.draw_compact(count, generator), blended.compact_weights(count).numpy()
        else:
            samples, weights = blended.draw(count, generator), np.full(count, 1 / count)
        return np.stack([s.argmax(0).cpu().numpy() for s in samples]), weights, probability


def which_mode(samples: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Number of the mode that each sample (S, *D) is of, or 4: of none of the maps (4, *D)."""
    overlap = [[np.mean([iou(s == c, m == c) for c in np.unique(m)[1:]]) for m in maps] for s in samples]
    return np.where(np.max(overlap, 1) >= LEAST_IOU, np.argmax(overlap, 1), len(maps))


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max((a | b).sum(), 1))


def measure(model: Trained, images: Tensor, maps: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Figures on held-out images."""
    generator = torch.Generator().manual_seed(args.seed)
    found, distances, curve = [], [], None
    for image, own in zip(images.to(args.device), maps.numpy(), strict=True):
        samples, weights, probability = model.sample(image, args.samples, generator)
        modes = which_mode(samples, own)
        found.append(np.bincount(modes, weights, len(MODES) + 1))
        distances.append(generalized_energy_distance(samples, own, range(1, CLASSES), weights, PROBABILITIES))
        truth = np.stack([np.tensordot(PROBABILITIES, own == c, 1) for c in range(1, CLASSES)])
        for c in range(1, CLASSES):
            part: ReliabilityCurve = reliability_curve(np.clip(probability[c], 0, 1), truth[c - 1])
            curve = part if curve is None else curve + part
    probabilities = np.mean(found, 0)
    variation = 0.5 * np.abs(np.array(found) - np.append(PROBABILITIES, 0)).sum(1)
    figures = {
        "modes": probabilities.round(3).tolist(),
        "total_variation": round(float(0.5 * np.abs(probabilities - np.append(PROBABILITIES, 0)).sum()), 4),
        "total_variation_per_image": round(float(variation.mean()), 4),
        "GED": round(float(np.mean(distances)), 4),
        "ECE": round(float(curve.expected_calibration_error), 4),
        "training_seconds": round(model.seconds),
    }
    if hasattr(model.network.head, "experts"):
        figures |= experts(model, images, maps, args)
    return figures


@torch.no_grad()
def experts(model: Trained, images: Tensor, maps: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Mean weight of every expert, the mode that its mean latent is of, and the weight that is left without a mode."""
    head = model.network.head
    weights, modes = [], []
    for image, own in zip(images.to(args.device), maps.numpy(), strict=True):
        distribution = model.network.distribution(image[None])
        weights.append(distribution.expert_weights[0].cpu().numpy())
        base = distribution.features[0]
        samples = [head.decode_image(base, e, torch.zeros(head.latent_dimension)) for e in range(head.num_experts)]
        modes.append(which_mode(np.stack([s.argmax(0).cpu().numpy() for s in samples]), own))
    mean = np.mean(weights, 0)
    usual = [int(np.bincount(column, minlength=len(MODES) + 1).argmax()) for column in np.array(modes).T]
    heaviest: dict[int, float] = {}  # mode -> weight of the expert that most of it comes from
    for weight, mode in zip(mean, usual, strict=True):
        if mode < len(MODES):
            heaviest[mode] = max(heaviest.get(mode, 0.0), weight)
    return {
        "expert_weights": mean.round(4).tolist(),
        "expert_modes": usual,
        "surplus_weight": round(float(1 - sum(heaviest.values())), 4),
    }


@torch.no_grad()
def draw(model: Trained, images: Tensor, maps: Tensor, args: argparse.Namespace) -> None:
    """Images with their modes and MoSE's experts, each with its probability or weight, the heaviest expert first."""
    count = model.network.head.num_experts
    fig, axes = common.figure(1.1 * (1 + len(MODES) + count), 1.35 * SHOWN, 1)
    fig.clear()
    axes = fig.subplots(SHOWN, 1 + len(MODES) + count)
    for row, image, own in zip(axes, images[:SHOWN].to(args.device), maps[:SHOWN].numpy(), strict=True):
        distribution = model.network.distribution(image[None])
        weights = distribution.expert_weights[0].cpu().numpy()
        base, zero = distribution.features[0], torch.zeros(model.network.head.latent_dimension)
        order = np.argsort(-weights)
        experts_maps = [model.network.head.decode_image(base, int(e), zero).argmax(0).cpu().numpy() for e in order]
        row[0].imshow(image[0].cpu(), cmap="gray")
        row[0].set_title("image", fontsize=7)
        shown = [*zip(own, PROBABILITIES, strict=True), *zip(experts_maps, weights[order], strict=True)]
        for index, (axis, (labels, share)) in enumerate(zip(row[1:], shown, strict=True)):
            axis.imshow(labels, cmap="tab10", vmin=0, vmax=9, interpolation="nearest")
            axis.set_title(f"{'mode' if index < len(MODES) else 'expert'} {share:.2f}", fontsize=7)
        for axis in row:
            axis.set_axis_off()
    common.save(fig, args, "modes")


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--images", type=int, default=2000)
    p.add_argument("--held-out", type=int, default=60)
    p.add_argument("--steps", type=int, default=1500)
    p.add_argument("--epoch", type=int, default=50, help="steps")
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--learning-rate", type=float, default=1e-2)
    p.add_argument("--samples", type=int, default=64)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    p.add_argument("--raters", nargs="+", type=int, default=[RATERS, 1])
    args = p.parse_args()
    common.restart_with_steady_malloc()
    torch.set_num_threads(args.threads)
    start = perf_counter()
    rng = np.random.default_rng(args.seed)
    made = [make_image(rng) for _ in range(args.images + args.held_out)]
    images = torch.from_numpy(np.stack([image for image, _ in made]))
    maps = torch.from_numpy(np.stack([own for _, own in made]))
    drawn = torch.from_numpy(rng.choice(len(MODES), (args.images, RATERS), p=PROBABILITIES))
    results: dict[str, Any] = {}
    for raters in args.raters:
        for name in args.models:
            model = Trained(name, images[: args.images], maps[: args.images], drawn[:, :raters], args)
            key = f"{name}, {raters} raters" if raters > 1 else f"{name}, 1 rater"
            results[key] = measure(model, images[args.images :], maps[args.images :], args)
            print(key, results[key])
            if name == "MoSE" and raters == max(args.raters):
                draw(model, images[args.images :], maps[args.images :], args)
    minutes = (perf_counter() - start) / 60
    figures = {"needed": NEEDED, "minutes": round(minutes, 1), "probabilities": PROBABILITIES.tolist()}
    common.write(args, "modes", {**figures, "results": results})


if __name__ == "__main__":
    main()
