"""A picture of the reliability curves: do probabilities mean what they say?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nnunet_multimodal.files import written_beside
from nnunet_multimodal.metrics.calibration import ReliabilityCurve

PANELS = 4  # side by side
COLOUR = "#0072B2"


@rc_context({"font.size": 9})
def draw_reliability(curves: Mapping[str, ReliabilityCurve], file: Path) -> None:
    """Draw frequency against predicted probability, and below it the voxels of each bin, a panel for each label.

    Args:
        curves: by the labels' names, none of them without a voxel.
        file: a PNG, written beside and then renamed.
    """
    columns = min(PANELS, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(3.2 * columns, 4.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[3, 1] * rows)
    panels = [pair for row in range(rows) for pair in zip(axes[2 * row], axes[2 * row + 1], strict=True)]
    for upper, lower in panels[len(curves) :]:
        upper.remove()
        lower.remove()
    for (upper, lower), (name, curve) in zip(panels, curves.items(), strict=False):
        known = curve.count > 0
        upper.plot([0, 1], [0, 1], color="#888888", linewidth=0.8, linestyle="--")
        upper.plot(curve.confidence[known], curve.frequency[known], color=COLOUR, marker="o", markersize=5)
        upper.set(ylabel="frequency in the reference", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        upper.set_title(
            f"{name}, ECE of all voxels {100 * curve.expected_calibration_error:.3f} %", fontsize=9, parse_math=False
        )
        upper.tick_params(labelbottom=False)
        lower.bar(curve.edges[:-1], curve.count, np.diff(curve.edges), align="edge", color=COLOUR, alpha=0.6)
        lower.set(xlabel="predicted probability", ylabel="voxels", xlim=(-0.02, 1.02), yscale="log")
        for axis in (upper, lower):
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.25, linewidth=0.6)
    with written_beside(file) as beside:
        figure.savefig(beside, dpi=150, format="png")
