"""Scores, floors and pictures of ``lidc.py``."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _common as common
import numpy as np
from skimage import io

from nnunet_multimodal.metrics.distribution import score_distribution

NODULE = 1
SAMPLES_SHOWN = 4
MEASURES = ("ged2", "diversity", "dice", "dice_nod", "empty_samples")
COLOURS = {"deterministic": "#8a8a8a", "diagonal": "#8fb8de", "low-rank": "#2c6fbb"}


@dataclass(frozen=True)
class Case:
    """A held-out slice.

    Attributes:
        name: PATIENT_INDEX.
        image: (Y, X) uint8.
        raters: masks (4, Y, X) uint8.
    """

    name: str
    image: np.ndarray
    raters: np.ndarray


Panel = tuple[str, np.ndarray | None]  # title and label map


@dataclass(frozen=True)
class Prediction:
    """Mean prediction (Y, X) and samples (S, Y, X), label maps."""

    mean: np.ndarray
    samples: np.ndarray


def read_prediction(folder: Path, name: str) -> Prediction:
    """What ``nnunet-multimodal predict`` wrote for a slice."""
    samples = sorted((folder / "samples").glob(f"{name}__*.png"))
    return Prediction(io.imread(folder / f"{name}.png"), np.stack([io.imread(file) for file in samples]))


def score(prediction: Prediction, raters: np.ndarray) -> dict[str, float]:
    """The measures of one slice; ``dice_nod`` is NaN where no rater drew a nodule."""
    scores = score_distribution(prediction.mean, prediction.samples, raters, [NODULE]).average
    return {
        "ged2": scores.generalized_energy_distance,
        "diversity": scores.sample_diversity,
        "dice": scores.dice,
        "dice_nod": scores.dice_nod,
        "empty_samples": float((prediction.samples.reshape(len(prediction.samples), -1).max(1) == 0).mean()),
    }


def summarise(scores: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Mean and standard error over the slices of each measure, and the number of slices that it has a value for."""
    columns = {measure: np.array([score[measure] for score in scores]) for measure in MEASURES}
    finite = {measure: values[np.isfinite(values)] for measure, values in columns.items()}
    return {
        measure: {
            "mean": round(float(values.mean()), 4),
            "standard_error": round(float(values.std(ddof=1) / len(values) ** 0.5), 4),
            "slices": len(values),
        }
        for measure, values in finite.items()
    }


def floors(cases: list[Case]) -> dict[str, dict[str, Any]]:
    """What reaches how much without an image, but with the raters' masks for two of them."""
    makers: dict[str, Callable[[np.ndarray], list[np.ndarray]]] = {
        "majority mask": lambda raters: [(2 * raters.sum(0) >= len(raters)).astype(np.uint8)],
        "empty": lambda raters: [np.zeros_like(raters[0])],
        "one rater": list,
    }
    return {
        name: summarise(
            [
                mean_of([score(Prediction(mask, mask[None]), case.raters) for mask in make(case.raters)])
                for case in cases
            ]
        )
        for name, make in makers.items()
    }


def mean_of(scores: list[dict[str, float]]) -> dict[str, float]:
    """Mean of every measure; the expectation over a random choice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # no value in any of them
        return {measure: float(np.nanmean([score[measure] for score in scores])) for measure in MEASURES}


def rater_scores(cases: list[Case]) -> dict[str, dict[str, Any]]:
    """The raters' own diversity, and how many of their masks are empty."""
    scores = [score(Prediction(case.raters[0], case.raters), case.raters) for case in cases]
    summary = summarise(scores)
    return {measure: summary[measure] for measure in ("diversity", "empty_samples")}


def quantile_cases(cases: list[Case], count: int) -> list[Case]:
    """Slices at equally spaced quantiles of the raters' diversity, from 0 (all agree) to its highest."""
    diversity = [score(Prediction(case.raters[0], case.raters), case.raters)["diversity"] for case in cases]
    order = np.argsort(diversity, kind="stable")
    return [cases[order[i]] for i in np.linspace(0, len(cases) - 1, count).round().astype(int)]


def draw_samples(args: argparse.Namespace, cases: list[Case], folder: Path) -> None:
    """The paper's Figure 3: image, raters, mean prediction and the first samples of some slices."""

    def panels(case: Case) -> list[Panel]:
        prediction = read_prediction(folder, case.name)
        samples = enumerate(prediction.samples[:SAMPLES_SHOWN], 1)
        return [*annotations(case), ("mean", prediction.mean), *((f"sample {k}", mask) for k, mask in samples)]

    draw_masks(args, cases, panels, f"{args.name}_samples")


def annotations(case: Case) -> list[Panel]:
    """The image and what each rater drew."""
    return [("image", None), *((f"rater {k}", mask) for k, mask in enumerate(case.raters, 1))]


def draw_masks(args: argparse.Namespace, cases: list[Case], panels: Callable[[Case], list[Panel]], name: str) -> None:
    """A row of panels for each slice; a title that all rows share stands above the first alone."""
    rows = [panels(case) for case in cases]
    is_shared = [len({title for title, _ in column}) == 1 for column in zip(*rows, strict=True)]
    fig, _ = common.figure(1.05 * len(rows[0]), 1.12 * len(rows))
    fig.clear()
    axes = fig.subplots(len(rows), len(rows[0]), squeeze=False)
    for axes_row, row, case in zip(axes, rows, cases, strict=True):
        for ax, (title, mask), shared in zip(axes_row, row, is_shared, strict=True):
            ax.imshow(case.image, cmap="gray", vmin=0, vmax=255)
            if mask is not None and mask.any():
                ax.imshow(np.ma.masked_equal(mask, 0), cmap="Reds", vmin=0, vmax=1.4, alpha=0.4)
                ax.contour(mask, [0.5], colors="#ff4020", linewidths=0.9)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if row is rows[0] or not shared:
                ax.set_title(title, fontsize=8)
        diversity = score(Prediction(case.raters[0], case.raters), case.raters)["diversity"]
        axes_row[0].set_ylabel(f"{diversity:.2f}", fontsize=9)
    fig.supylabel("diversity of the raters", fontsize=9)
    common.save(fig, args, name)


def draw_scores(args: argparse.Namespace, methods: Mapping[str, Any], floor: Mapping[str, Any], raters: Any) -> None:
    """D_GED^2 and diversity of every model as bars with two standard errors, beside the floors."""
    fig, axes = common.figure(11, 3.5, 2)
    left, right = axes[0]
    for place, method in enumerate(methods.values()):
        for ax, measure in ((left, "ged2"), (right, "diversity")):
            value = method["scores"][measure]
            colour = COLOURS[method["model"]]
            ax.bar(place, value["mean"], 0.65, color=colour, yerr=2 * value["standard_error"], ecolor="#404040")
            ax.annotate(
                f"{value['mean']:.3f}", (place, value["mean"] + 2 * value["standard_error"]), (0, 3),
                textcoords="offset points", ha="center", fontweight="bold", zorder=3,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            )  # fmt: skip
    for ax in (left, right):
        ax.set_xticks(range(len(methods)), [name.replace(", ", "\n") for name in methods], fontsize=8)
    styles = {"majority mask": "-", "one rater": "--", "empty": ":"}
    for name, style in styles.items():
        left.axhline(floor[name]["ged2"]["mean"], color="#c0392b", lw=1, ls=style, label=name)
    right.axhline(raters["diversity"]["mean"], color="#c0392b", lw=1, label="the four raters")
    left.set(ylabel="$D^2_{GED}$", title="distance to the raters (lower is better)")
    right.set(ylabel="diversity of the samples", title="as diverse as the raters?")
    for ax in (left, right):
        ax.set_ylim(0, 1.2 * ax.get_ylim()[1])
        ax.legend(frameon=False, fontsize=8, ncols=3, loc="upper right")
    common.save(fig, args, args.name)
