"""Pictures of ``sts_ssn.py``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import _common as common
import numpy as np
import SimpleITK
from sts import PET_CHANNEL, read_label

from nnunet_multimodal.metrics.surface import dice

MR_CHANNEL = 2
QUANTILES = (0.025, 1 / 3, 2 / 3, 0.975)  # of the samples' volumes: which samples are shown
MARGIN_MM, SCALE_BAR_MM = 15, 50
# Okabe and Ito's colours, told apart with any colour vision
TRUTH, MASK = "#E69F00", "#56B4E9"
SERIES = ("#0072B2", "#D55E00", "#009E73", "#56B4E9", "#CC79A7")


def read_mask(file: Path) -> np.ndarray:
    """Tumour mask (Z, Y, X)."""
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file))) > 0


def read_image(file: Path) -> np.ndarray:
    """Intensities (Z, Y, X)."""
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file)))


def sample_files(folder: Path, case: str) -> list[Path]:
    """The samples' label maps in their order."""
    return sorted((folder / "samples").glob(f"{case}__*.nii.gz"))


def draw_samples(args: argparse.Namespace, folder: Path, raw: Path, cases: list[str]) -> None:
    """The paper's Figure 4: images, truth, prediction, entropy and samples that show the diversity."""
    titles = ["PET", "T1", "truth", "prediction", "entropy", *(f"sample at\n{100 * q:.3g} %" for q in QUANTILES)]
    fig, _ = common.figure(1.22 * len(titles) + 0.5, 1.23 * len(cases) + 0.85)
    fig.clear()
    axes = fig.subplots(len(cases), len(titles), squeeze=False)
    for row, case in zip(axes, cases, strict=True):
        entropy = _draw_case(row, case, folder, raw)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=9)
    fig.colorbar(entropy, ax=axes[:, -1], shrink=0.3, aspect=14, pad=0.03, label="entropy (nats)")
    fig.supxlabel(
        "Slice with the largest true area; bar: 5 cm. Orange outline: truth; blue: prediction or sample. The samples "
        "are those whose volume\nis nearest to these quantiles of all samples' volumes. "
        "Volumes in ml are the whole tumour's.",
        fontsize=8, x=0.01, ha="left",
    )  # fmt: skip
    common.save(fig, args, "sts_ssn_samples")


def _draw_case(row: np.ndarray, case: str, folder: Path, raw: Path) -> Any:
    truth, spacing_mm = read_label(raw, case)
    samples = np.stack([read_mask(file) for file in sample_files(folder, case)])  # (S, Z, Y, X)
    voxels = samples.sum((1, 2, 3))
    shown = [int(np.abs(voxels - v).argmin()) for v in np.quantile(voxels, QUANTILES)]
    prediction = read_mask(folder / f"{case}.nii.gz")
    masks = [truth, prediction, *samples[shown]]
    z = int(truth.sum((1, 2)).argmax())
    window = _window(np.logical_or.reduce(masks)[z], spacing_mm[1:])
    pet, mr = (read_image(raw / "imagesTr" / f"{case}_{c:04d}.nii.gz")[z] for c in (PET_CHANNEL, MR_CHANNEL))
    entropy = read_image(folder / "uncertainty" / f"{case}_entropy.nii.gz")[z]
    extent = (0, mr.shape[1] * spacing_mm[2], mr.shape[0] * spacing_mm[1], 0)
    row[0].imshow(pet, cmap="gray_r", vmin=0, vmax=np.percentile(pet, 99.8), extent=extent)
    mapped = row[4].imshow(entropy, cmap="viridis", vmin=0, vmax=np.log(2), extent=extent)
    for ax in (*row[1:4], *row[5:]):
        ax.imshow(mr, cmap="gray", vmin=np.percentile(mr, 0.5), vmax=np.percentile(mr, 99.5), extent=extent)
    volume = np.prod(spacing_mm) / 1000
    for ax, mask in zip((*row[2:4], *row[5:]), masks, strict=True):
        _outline(ax, mask[z], extent, MASK if mask is not truth else TRUTH, fill=True)
        text = f"{mask.sum() * volume:.0f} ml"
        ax.text(0.04, 0.05, text, color="white", fontsize=8, transform=ax.transAxes, path_effects=[_halo()])
    for ax in row[3:]:
        _outline(ax, truth[z], extent, TRUTH, fill=False)
    for ax in row:
        ax.set(xlim=window[0], ylim=window[1], xticks=[], yticks=[], facecolor="#404040", aspect="equal")
        ax.spines[:].set_visible(False)
    _scale_bar(row[0])
    row[0].set_ylabel(case, fontsize=9)
    return mapped


def _window(mask: np.ndarray, spacing_mm: tuple[float, ...]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Limits of x and (downwards) y in mm: a square around all that is shown."""
    y, x = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    centre = [(line[0] + line[-1] + 1) / 2 * size for line, size in zip((y, x), spacing_mm, strict=True)]
    half = max(np.ptp(line) * size for line, size in zip((y, x), spacing_mm, strict=True)) / 2 + MARGIN_MM
    return (centre[1] - half, centre[1] + half), (centre[0] + half, centre[0] - half)


def _outline(ax: Any, mask: np.ndarray, extent: tuple[float, ...], colour: str, fill: bool) -> None:
    if not mask.any():
        return
    if fill:
        ax.contourf(mask, levels=[0.5, 1.5], colors=[colour], alpha=0.4, extent=extent, origin="upper")
    ax.contour(mask, levels=[0.5], colors=[colour], linewidths=1.1, extent=extent, origin="upper")


def _halo() -> Any:
    """A dark rim, so that text can be read on any image."""
    from matplotlib.patheffects import withStroke

    return withStroke(linewidth=2, foreground="black")


def _scale_bar(ax: Any) -> None:
    left, right = ax.get_xlim()
    bottom, top = ax.get_ylim()
    x, y = left + 0.06 * (right - left), bottom + 0.07 * (top - bottom)
    ax.plot([x, x + SCALE_BAR_MM], [y, y], color="black", lw=2.5, solid_capstyle="butt")


def draw_scores(args: argparse.Namespace, methods: Mapping[str, Any], key: str, folder: Path, raw: Path) -> None:
    """Volume intervals beside the truth, and the Dice of samples and prediction (the paper's Figure 5).

    Args:
        args: the benchmark's.
        methods: the benchmark's results; all temperatures of the first are shown, and ``key`` alone of the others.
        key: temperature of the samples in ``folder``.
        folder: samples and predictions of the first method.
        raw: the data set.
    """
    fig, axes = common.figure(11, 4.4, 2)
    left, right = axes[0]
    first = next(iter(methods))
    shown = [(name, t) for name, method in methods.items() for t in method["temperatures"] if t == key or name == first]
    cases = methods[first]["temperatures"][key]["cases"]
    names = sorted(cases, key=lambda case: -cases[case]["true_volume_ml"])
    for number, (name, temperature) in enumerate(shown):
        offset = (number - (len(shown) - 1) / 2) * 0.8 / max(len(shown), 4)
        _intervals(left, name, methods[name], temperature, names, offset, SERIES[number % len(SERIES)])
    left.axhline(1, color=TRUTH, lw=1.5, zorder=0, label="truth")
    left.set_xticks(range(len(names)), [f"{case}\n{cases[case]['true_volume_ml']:.0f} ml" for case in names])
    left.set(ylabel="volume / true volume", title="95 % intervals of the volume (dot: median, cross: prediction)")
    left.set_ylim(bottom=0)
    left.legend(frameon=False, fontsize=8)
    _sample_dice(right, folder, raw, names)
    right.set_title(f"Dice of the samples and of the prediction, T = {key}")
    common.save(fig, args, "sts_ssn")


def _intervals(
    ax: Any, name: str, method: Mapping[str, Any], temperature: str, cases: list[str], offset: float, colour: str
) -> None:
    """The intervals of one method at one temperature, in units of the true volume."""
    summary = method["temperatures"][temperature]
    drawn = f"T = {temperature}" if method["drawn_from"] == "distribution" else "mirrors"
    label = f"{name}, {drawn}: {summary['covered']} of {summary['patients']}"
    for place, case in enumerate(cases):
        row = summary["cases"][case]
        volume = {key: value / row["true_volume_ml"] for key, value in row["volume_ml"].items()}
        x = place + offset
        ends = [[volume["p50"] - volume["p2.5"]], [volume["p97.5"] - volume["p50"]]]
        ax.errorbar(
            x, volume["p50"], ends, fmt="o", color=colour, ms=4, lw=2, capsize=4, label=None if place else label
        )
        ax.plot(x, volume["prediction"], "x", color="black", ms=4, zorder=3)


def _sample_dice(ax: Any, folder: Path, raw: Path, names: list[str]) -> None:
    """Every sample's Dice, and the fraction of samples better than the prediction."""
    jitter = np.random.default_rng(0)
    fractions = []
    for place, case in enumerate(names):
        truth, _ = read_label(raw, case)
        values = np.array([dice(read_mask(file), truth) for file in sample_files(folder, case)])
        own = dice(read_mask(folder / f"{case}.nii.gz"), truth)
        fractions.append(float((values > own).mean()))
        ax.bar(place, fractions[-1], 0.7, color="#F0E442", alpha=0.6, label=None if place else "fraction better")
        x = place + jitter.uniform(-0.25, 0.25, len(values))
        ax.plot(x, values, "o", color=SERIES[0], ms=2.5, alpha=0.5, label=None if place else "samples")
        ax.plot(place, own, "x", color="black", ms=9, mew=2, label=None if place else "prediction")
    ax.axhline(float(np.mean(fractions)), color="#404040", lw=1, ls="--", label="fraction better, mean")
    ax.set_xticks(range(len(names)), names)
    ax.set(ylim=(0, 1.02), ylabel="Dice; fraction of samples")
    ax.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4)
