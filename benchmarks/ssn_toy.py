"""The toy problem of Monteiro et al., *Stochastic Segmentation Networks*, NeurIPS 2020, section 5.1 and Figure 2.

A line of 21 pixels with two equally likely label maps: the first third is on, the last third off, and the middle third
either all on or all off. There is no image, so the mean, the covariance factor and the log diagonal are parameters,
mapped to the distribution as in the SSN head. No model's mean log-likelihood can exceed log(1/2); independent pixels
cannot exceed 7 log(1/2) = -4.85.

The paper trains for 10,000 iterations in float64 with a learning rate of 1e-3 and keeps the last model before the
covariance overflows. Here: float32, the likelihood as the head computes it, the last step's model.
"""

from __future__ import annotations

import argparse
import math
from time import perf_counter
from typing import Any

import _common as common
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from nnunet_multimodal.heads.ssn import EPSILON, INITIAL_LOG_DIAGONAL, MAX_LOG_DIAGONAL, LowRankGaussianLogits

PIXELS, SAMPLES = 21, 200
RANKS = {"diagonal": 0, "low-rank": 2}
PAPER = {"diagonal": -4.87, "low-rank": -0.93}
LIMIT = math.log(1 / 2)
NEEDED = {"diagonal": (-4.92, -4.82), "low-rank": (-0.90, 0.0)}  # nats, lowest and highest
COLOURS = {"diagonal": "#8a8a8a", "low-rank": "#2c6fbb"}
SHOWN_SAMPLES = 14  # paper, Fig. 2


def label_maps(device: str) -> Tensor:
    """Both label maps (2, 1, 21), pixels from the first to the last."""
    third = PIXELS // 3
    maps = torch.zeros(2, 1, PIXELS, device=device)
    maps[:, :, :third] = 1
    maps[1, :, third : 2 * third] = 1
    return maps


class Model:
    """A distribution over logit maps without an input."""

    def __init__(self, rank: int, seed: int, device: str) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.loc, self.log_diagonal = (self._normal(1, 1, PIXELS, device=device) for _ in range(2))
        self.factor = self._normal(1, rank, 1, PIXELS, device=device)

    def _normal(self, *shape: int, device: str) -> Tensor:
        return (0.1 * torch.randn(shape, generator=self.generator)).to(device).requires_grad_()

    def distribution(self) -> LowRankGaussianLogits:
        """As the head maps its layers' output."""
        rank = self.factor.shape[1]
        diagonal = (self.log_diagonal + INITIAL_LOG_DIAGONAL).clamp(max=MAX_LOG_DIAGONAL).exp() + EPSILON
        return LowRankGaussianLogits(self.loc, self.factor / math.sqrt(max(rank, 1)), diagonal)

    def log_likelihood(self, targets: Tensor, samples: int, generator: torch.Generator) -> Tensor:
        """Nats, mean over the label maps; each has its own samples."""
        one = self.distribution()
        parts = (t.expand(len(targets), *t.shape[1:]) for t in (one.loc, one.cov_factor, one.cov_diag))
        return LowRankGaussianLogits(*parts).log_likelihood(targets, samples, True, generator=generator).mean()

    @torch.no_grad()
    def evaluate(self, targets: Tensor, samples: int, covariance: bool = True) -> float:
        """Log-likelihood from many samples, the same noise every time."""
        if not covariance:
            return -self.mean_loss(targets).item()
        return self.log_likelihood(targets, samples, torch.Generator().manual_seed(0)).item()

    def mean_loss(self, targets: Tensor) -> Tensor:
        """Negative log-likelihood of the mean alone."""
        return F.binary_cross_entropy_with_logits(self.loc.expand_as(targets), targets, reduction="sum") / len(targets)


def train(model: Model, targets: Tensor, args: argparse.Namespace, title: str) -> list[tuple[int, float]]:
    """First the mean, then everything; returns steps and log-likelihoods."""
    parameters = [model.loc, model.log_diagonal, model.factor]
    curve = []
    optimiser = torch.optim.Adam(parameters, args.learning_rate)
    for step in tqdm(range(args.mean_steps + args.steps + 1), desc=title, leave=False, disable=None):
        warm_up = step < args.mean_steps
        if step % args.every == 0:
            curve.append((step, model.evaluate(targets, args.curve_samples, covariance=not warm_up)))
        if step == args.mean_steps + args.steps:
            return curve
        optimiser.zero_grad()
        (model.mean_loss(targets) if warm_up else -model.log_likelihood(targets, SAMPLES, model.generator)).backward()
        optimiser.step()


@torch.no_grad()
def picture(model: Model) -> dict[str, np.ndarray]:
    """What Figure 2 shows: mean logits (21,), their covariance (21, 21), probabilities of samples (14, 21)."""
    distribution = model.distribution()
    factor, diagonal = distribution.cov_factor[0, :, 0], distribution.cov_diag[0, 0]
    samples = distribution.rsample((SHOWN_SAMPLES,), torch.Generator(model.loc.device).manual_seed(0))
    shown = {
        "mean": distribution.loc[0, 0],
        "covariance": factor.T @ factor + diagonal.diag(),
        "samples": samples[_shuffled(SHOWN_SAMPLES), 0, 0].sigmoid(),
    }
    return {name: tensor.cpu().numpy() for name, tensor in shown.items()}


def _shuffled(count: int) -> Tensor:
    """Antithetic pairs would otherwise be drawn in two mirrored rows."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def draw_curves(args: argparse.Namespace, curves: dict[str, list[list[tuple[int, float]]]]) -> None:
    """Mean and range over the seeds."""
    fig, axes = common.figure(6.5, 3.6)
    ax = axes[0, 0]
    for name, runs in curves.items():
        steps, values = [step for step, _ in runs[0]], np.array([[value for _, value in run] for run in runs])
        ax.fill_between(steps, values.min(0), values.max(0), color=COLOURS[name], alpha=0.3, lw=0)
        ax.plot(
            steps, values.mean(0), color=COLOURS[name], lw=1.5, label=f"{name}, at the end {values[:, -1].mean():.2f}"
        )
        ax.axhline(PAPER[name], color=COLOURS[name], lw=1, ls="--", label=f"paper, {name}: {PAPER[name]}")
    ax.axhline(LIMIT, color="black", lw=1, ls=":", label=f"limit, log(1/2) = {LIMIT:.2f}")
    ax.axvspan(0, args.mean_steps, color="black", alpha=0.06, lw=0)
    ax.text(args.mean_steps / 2, -0.2, "mean alone", ha="center", va="center", fontsize=8)
    ax.set(xlabel="step", ylabel="log-likelihood (nats)", ylim=(-7, 0), xlim=(0, args.mean_steps + args.steps))
    ax.set_title(f"toy problem: mean and range of {len(next(iter(curves.values())))} seeds")
    ax.legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.55))
    common.save(fig, args, "ssn_toy")


def draw_models(args: argparse.Namespace, pictures: dict[str, dict[str, np.ndarray]]) -> None:
    """The paper's Figure 2, of the first seed."""
    fig, _ = common.figure(9, 5.2)
    fig.clear()
    rows = fig.subplots(2, 3, width_ratios=(1, 2.2, 2.6), squeeze=False)
    for row, (name, shown) in zip(rows, pictures.items(), strict=False):
        extreme = np.abs(shown["mean"]).max()
        images = [
            row[0].imshow(shown["mean"][:, None], "RdBu_r", aspect="auto", vmin=-extreme, vmax=extreme),
            row[1].imshow(shown["covariance"], "viridis"),
            row[2].imshow(shown["samples"].T, "gray", aspect="auto", vmin=0, vmax=1),
        ]
        titles = ("mean logits", "covariance of the logits", f"{SHOWN_SAMPLES} samples: probability of on")
        for ax, image, title in zip(row, images, titles, strict=True):
            fig.colorbar(image, ax=ax)
            ax.set(title=title, xticks=[], yticks=[0, 7, 14, 20])
            ax.spines[:].set(visible=True, color="#8a8a8a", lw=0.8)
        row[0].set_ylabel(f"{name} (rank {RANKS[name]})\npixel")
    common.save(fig, args, "ssn_toy_figure2")


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--mean-steps", type=int, default=2000)
    p.add_argument("--steps", type=int, default=8000, help="of everything, after those of the mean")
    p.add_argument("--learning-rate", type=float, default=1e-2)
    p.add_argument("--every", type=int, default=250, metavar="STEPS", help="between the points of the curve")
    p.add_argument("--curve-samples", type=int, default=10_000)
    p.add_argument("--final-samples", type=int, default=100_000)
    args = p.parse_args()
    torch.set_num_threads(1)
    targets = label_maps(args.device)
    results: dict[str, Any] = {}
    curves: dict[str, list[list[tuple[int, float]]]] = {}
    pictures = {}
    for name, rank in RANKS.items():
        curves[name], final, seconds = [], [], []
        for seed in range(args.seeds):
            start = perf_counter()
            model = Model(rank, seed, args.device)
            curves[name].append(train(model, targets, args, f"{name}, seed {seed}"))
            seconds.append(round(perf_counter() - start, 1))
            final.append(round(model.evaluate(targets, args.final_samples), 4))
            if seed == 0:
                pictures[name] = picture(model)
        results[name] = {
            "paper": PAPER[name],
            "log_likelihood_nats": {"mean": round(float(np.mean(final)), 4), "min": min(final), "max": max(final)},
            "final": final,
            "seconds_per_seed": common.spread(seconds),
            "curve_mean": [[step, round(float(np.mean(v)), 4)] for step, v in _by_step(curves[name])],
        }
        print(f"{name:9} log-likelihood {results[name]['log_likelihood_nats']}, paper {PAPER[name]}")
    draw_curves(args, curves)
    draw_models(args, pictures)
    common.write(
        args, "ssn_toy", {"repeats": args.seeds, "limit": round(LIMIT, 4), "needed": NEEDED, "models": results}
    )
    for name, (low, high) in NEEDED.items():
        if not all(low <= value <= high for value in results[name]["final"]):
            raise SystemExit(f"the {name} model's log-likelihood is not between {low} and {high}")


def _by_step(curves: list[list[tuple[int, float]]]) -> list[tuple[int, list[float]]]:
    return [(points[0][0], [value for _, value in points]) for points in zip(*curves, strict=True)]


if __name__ == "__main__":
    main()
