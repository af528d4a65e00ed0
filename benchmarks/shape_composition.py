"""ShapeComposition (Shen et al., *Complementary Information Mutual Learning*, 2024, 4.3 and Figure 13).

A pair is a triangle (primary modality) and an ellipse (auxiliary) that overlap; the task is their union. Two encoders.
In the first path a decoder reads the primary features, without gradient, and the auxiliary ones, and puts out mean and
standard deviation of the complementary information, at the images' resolution. In the second a decoder of the primary
features and a sample of that information give the union. Nothing that the primary modality shows needs to be told
again, so the information's mean should rise above its background only where the ellipse lies outside the triangle.

Pairs are turned and mirrored at random in training: 800 of them are learnt by heart otherwise, and the longer the
training, the worse the held-out ones. The information reaches the output pixel by pixel (a 1x1 convolution).

Measured on held-out pairs, with the Kullback-Leibler term and without: Dice of the union, and the share of the mean
map's energy (squared deviation from its median outside both shapes) in the ellipse outside the triangle. Most of what
lies elsewhere is information too: where an ellipse could be and is not, the map says so, a little below the background
(the blue halo of the picture). So the share of what is above the background is told as well, the sign that of the
ellipse.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import perf_counter
from typing import Any

import _common as common
import numpy as np
import torch
from skimage.draw import ellipse, polygon
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from nnunet_multimodal.backbones.base import UNetTopology
from nnunet_multimodal.backbones.ciml import divergence_from_standard, sample, to_variance

SIZE = 64
NEEDED = {"dice": 0.98, "share": 0.8, "minutes": 20}
MIN_PART = 60  # pixels of the overlap and of either shape outside the other
SHOWN = 6


def make_pair(rng: np.random.Generator) -> np.ndarray:
    """Triangle and ellipse (2, 64, 64) bool, which overlap and both have a part of their own."""
    while True:
        pair = np.zeros((2, SIZE, SIZE), bool)
        centre = rng.uniform(0.3, 0.7, 2) * SIZE
        angles = rng.uniform(0, 2 * np.pi) + np.array([0, 2, 4]) * np.pi / 3 + rng.uniform(-0.5, 0.5, 3)
        corners = centre + rng.uniform(0.2, 0.35, (3, 1)) * SIZE * np.stack((np.sin(angles), np.cos(angles)), 1)
        pair[0][polygon(*corners.T, shape=(SIZE, SIZE))] = True
        other = centre + rng.uniform(-0.25, 0.25, 2) * SIZE
        pair[1][ellipse(*other, *rng.uniform(0.1, 0.25, 2) * SIZE, (SIZE, SIZE), rng.uniform(-np.pi, np.pi))] = True
        parts = pair[0] & pair[1], pair[0] & ~pair[1], pair[1] & ~pair[0]
        if min(part.sum() for part in parts) >= MIN_PART:
            return pair


class Model(nn.Module):
    """The simplified model of 4.3.

    Args:
        features: of the first stage.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        topology = UNetTopology(
            n_stages=4,
            features_per_stage=[features * 2**stage for stage in range(4)],
            conv_op=nn.Conv2d,
            kernel_sizes=[[3, 3]] * 4,
            strides=[[1, 1], *[[2, 2]] * 3],
            n_conv_per_stage=[2] * 4,
            n_conv_per_stage_decoder=[2] * 3,
            conv_bias=True,
            norm_op=nn.InstanceNorm2d,
            norm_op_kwargs={"affine": True},
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True},
        )
        self.primary, self.auxiliary = topology.build_encoder(1), topology.build_encoder(1)
        self.fusions = nn.ModuleList(nn.Conv2d(2 * f, f, 3, padding=1) for f in topology.features_per_stage)
        self.filter, self.predictor = topology.build_decoder(), topology.build_decoder()
        self.information = nn.Conv2d(features, 2, 1)  # mean and standard deviation before the sigmoid
        self.output = nn.Sequential(nn.Conv2d(features + 1, features, 1), nn.LeakyReLU(0.01))
        self.logits = nn.Conv2d(features, 1, 1)

    def forward(self, pair: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 2, *D) -> logits (B, 1, *D), mean of the information (B, 1, *D), its divergence (B, 1)."""
        primary, auxiliary = self.primary(pair[:, :1]), self.auxiliary(pair[:, 1:])
        fused = [
            fuse(torch.cat((p.detach(), a), 1)) for fuse, p, a in zip(self.fusions, primary, auxiliary, strict=True)
        ]
        mean, deviation = self.information(self.filter(fused)[0]).split(1, 1)
        variance = to_variance(deviation)
        kappa = sample(mean, variance) if self.training else mean
        divergence = divergence_from_standard(mean, variance)
        logits = self.logits(self.output(torch.cat((self.predictor(primary)[0], kappa), 1)))
        return logits, mean, divergence


def train(model: Model, pairs: Tensor, kl_weight: float, args: argparse.Namespace) -> float:
    """Adam with nnU-Net's schedule; Dice and cross-entropy. Returns the seconds that it took."""
    start = perf_counter()
    optimiser = torch.optim.Adam(model.parameters(), args.learning_rate, weight_decay=3e-5)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimiser, args.steps, 0.9)
    generator = torch.Generator().manual_seed(args.seed)
    model.train()
    for _ in tqdm(range(args.steps), desc=f"beta {kl_weight:g}"):
        batch = turned(pairs[torch.randint(len(pairs), (args.batch_size,), generator=generator)], generator)
        union = batch.amax(1, keepdim=True)
        logits, _, divergence = model(batch)
        p = logits.sigmoid()
        overlap = 2 * (p * union).sum((1, 2, 3)) / (p.sum((1, 2, 3)) + union.sum((1, 2, 3)))
        loss = F.binary_cross_entropy_with_logits(logits, union) + 1 - overlap.mean()
        (loss + kl_weight * divergence.mean()).backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    return perf_counter() - start


def turned(pairs: Tensor, generator: torch.Generator) -> Tensor:
    """Each pair (B, 2, *D) turned by a multiple of 90 degrees and mirrored or not."""
    turns = torch.randint(4, (len(pairs),), generator=generator).tolist()
    mirrored = torch.randint(2, (len(pairs),), generator=generator).tolist()
    found = [torch.rot90(pair, turn, (1, 2)) for pair, turn in zip(pairs, turns, strict=True)]
    return torch.stack([pair.flip(2) if flip else pair for pair, flip in zip(found, mirrored, strict=True)])


@torch.no_grad()
def measure(model: Model, pairs: Tensor) -> tuple[dict[str, float], Tensor, Tensor]:
    """Figures, predictions (N, *D) bool and deviations of the mean map from its background, > 0 in the ellipse."""
    model.eval()
    outputs = [model(batch) for batch in pairs.split(50)]
    predicted = torch.cat([logits[:, 0] for logits, _, _ in outputs]) > 0
    mean = torch.cat([mean[:, 0] for _, mean, _ in outputs])
    triangle, other = pairs.bool().unbind(1)
    union = triangle | other
    dice = 2 * (predicted & union).sum((1, 2)) / (predicted.sum((1, 2)) + union.sum((1, 2)))
    background = torch.stack([m[~u].median() for m, u in zip(mean, union, strict=True)])
    deviation = mean - background[:, None, None]
    energy = deviation.square()
    sign = deviation[other & ~triangle].mean().sign()
    above = (sign * deviation).clamp_min(0).square()
    areas = {"ellipse_alone": other & ~triangle, "overlap": other & triangle, "triangle_alone": triangle & ~other}
    shares = {name: ((energy * area).sum((1, 2)) / energy.sum((1, 2))) for name, area in areas.items()}
    area = areas["ellipse_alone"].float().mean((1, 2))
    figures = {
        "dice": dice.mean().item(),
        "dice_lowest": dice.min().item(),
        **{f"energy_{name}": share.mean().item() for name, share in shares.items()},
        "energy_above_background_ellipse_alone": ((above * areas["ellipse_alone"]).sum((1, 2)) / above.sum((1, 2)))
        .mean()
        .item(),
        "energy_ellipse_alone_lowest": shares["ellipse_alone"].min().item(),
        "area_ellipse_alone": area.mean().item(),
        "nats_per_pixel": torch.cat([divergence for _, _, divergence in outputs]).mean().item(),
    }
    return {name: round(value, 4) for name, value in figures.items()}, predicted, sign * deviation


def draw(file: Path, pairs: Tensor, shown: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Six pairs as in Figure 13, and the map of the model without the Kullback-Leibler term."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heads = ["triangle\n(primary)", "ellipse\n(auxiliary)", "prediction", "truth"]
    heads += [f"complementary\ninformation, {name}" for name in shown]
    figure = Figure(figsize=(1.5 * len(heads), 1.5 * SHOWN + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(SHOWN, len(heads))
    predicted = next(iter(shown.values()))[0]
    for row in range(SHOWN):
        triangle, other = pairs[row].bool()
        images = [triangle, other, predicted[row], triangle | other, *(d[row] for _, d in shown.values())]
        for column, (axis, image) in enumerate(zip(axes[row], images, strict=True)):
            if column < 4:
                axis.imshow(image.float(), cmap="gray", vmin=0)
            else:
                largest = image.abs().max().item()
                axis.imshow(image, cmap="RdBu_r", vmin=-largest, vmax=largest)
                axis.contour(triangle, [0.5], colors="black", linewidths=0.7)
                axis.contour(other, [0.5], colors="green", linewidths=0.7)
            axis.set_axis_off()
    for axis, head in zip(axes[0], heads, strict=True):
        axis.set_title(head, fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--pairs", type=int, default=1000)
    p.add_argument("--held-out", type=int, default=200, help="of them")
    p.add_argument("--steps", type=int, default=2500)
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--features", type=int, default=8)
    p.add_argument("--learning-rate", type=float, default=1e-3)
    p.add_argument("--kl-weight", type=float, default=0.5, help="beta")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    common.restart_with_steady_malloc()
    start = perf_counter()
    rng = np.random.default_rng(args.seed)
    pairs = torch.from_numpy(np.stack([make_pair(rng) for _ in range(args.pairs)])).float().to(args.device)
    training, test = pairs[: -args.held_out], pairs[-args.held_out :]
    results: dict[str, Any] = {}
    shown = {}
    for name, kl_weight in (("with KL", args.kl_weight), ("without", 0.0)):
        torch.manual_seed(args.seed)
        model = Model(args.features).to(args.device)
        seconds = train(model, training, kl_weight, args)
        figures, predicted, deviation = measure(model, test)
        results[name] = {"kl_weight": kl_weight, **figures, "training_seconds": round(seconds)}
        shown[name] = predicted.cpu(), deviation.cpu()
        print(name, results[name])
    draw(args.out / "shape_composition.png", test.cpu(), shown)
    minutes = (perf_counter() - start) / 60
    own = results["with KL"]
    reached = {
        "dice": own["dice"] >= NEEDED["dice"],
        "share": own["energy_ellipse_alone"] >= NEEDED["share"],
        "minutes": minutes <= NEEDED["minutes"],
    }
    figures = {"repeats": 1, "needed": NEEDED, "reached": reached, "minutes": round(minutes, 1), "results": results}
    common.write(args, "shape_composition", figures)


if __name__ == "__main__":
    main()
