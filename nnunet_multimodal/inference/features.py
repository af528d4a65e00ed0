"""Shared and specific features of every modality, and their t-SNE (Wang et al., CVPR 2023, Fig. 5).

For every tile of every case it writes the globally pooled bottleneck features to features.npz (features (N, F), and for
each of the N its case, modality and kind) and draws them to features.png: shared features should lie together, specific
ones apart by modality. For ShaSpecTrainer's models, with one fold.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

from nnunet_multimodal.errors import UserError
from nnunet_multimodal.inference.base import Case, ModelPredictor, add_model_arguments, model_folder
from nnunet_multimodal.network import MultimodalUNet, unwrap

MARKERS = {"shared": "o", "specific": "^"}


class Feature(NamedTuple):
    """Features (F,) of a modality in a tile."""

    case: str
    modality: str
    kind: str
    values: np.ndarray


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """nnUNetv2_predict's flags."""
    add_model_arguments(parser, "ShaSpecModalityDropoutTrainer")
    parser.add_argument("--seed", type=int, default=0, help="of the t-SNE (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Export and draw the features of a folder; returns the exit status.

    Raises:
        UserError: the model has no such features, or there are too few.
    """
    folder = model_folder(args)
    predictor = ModelPredictor.from_model(folder, args.f, torch.device(args.device), args.chk, args.step_size)
    if len(predictor.list_of_parameters) > 1:
        raise UserError(f"{folder} has several folds, each with features of its own; name one with -f")
    network = unwrap(predictor.network)
    if not isinstance(network, MultimodalUNet):
        raise UserError(f"{predictor.trainer_name} has no shared and specific features; ShaSpecTrainer's models have")
    network.load_state_dict(predictor.list_of_parameters[0])
    network.to(predictor.device).eval()
    cases = predictor.cases(args.i, args.prev_stage_predictions)
    features = [f for case in tqdm(cases, desc="features", unit="case") for f in case_features(predictor, case)]
    if len(features) < 4:
        raise UserError(f"{len(features)} features in {args.i} are too few to draw; give more images")
    output = Path(args.o)
    output.mkdir(parents=True, exist_ok=True)
    _write(features, output / "features.npz")
    draw(features, output / "features.png", args.seed)
    print(f"{len(features)} features of {len(cases)} cases: {output}/features.npz, features.png")
    return 0


@torch.inference_mode()
def case_features(predictor: ModelPredictor, case: Case) -> Iterator[Feature]:
    """Features of a case's tiles, without the modalities that it lacks and without empty tiles."""
    network = unwrap(predictor.network)
    names = predictor.modality_names(network.groups)
    for tile in predictor.tiles(predictor.preprocess(case).data):
        _, _, present = network.split(tile)
        for kind, values in network.modality_features(tile).items():
            for modality in present[0].nonzero().flatten().tolist():
                yield Feature(case.name, names[modality], kind, values[0, modality].float().cpu().numpy())


def draw(features: list[Feature], file: Path, seed: int) -> None:
    """The features' t-SNE as PNG: colours are modalities, circles shared and triangles specific features."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(features) - 1) / 3)
    values = np.stack([feature.values for feature in features])
    points = TSNE(perplexity=perplexity, random_state=seed, init="pca").fit_transform(values)
    figure = Figure(figsize=(6, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    modalities = list(dict.fromkeys(feature.modality for feature in features))
    for index, modality in enumerate(modalities):
        for kind, marker in MARKERS.items():
            chosen = [f.modality == modality and f.kind == kind for f in features]
            colour = colormaps["tab10"](index)
            edge = {"facecolors": "none", "edgecolors": colour} if kind == "shared" else {"color": colour}
            x, y = points[chosen].T
            axes.scatter(x, y, marker=marker, s=22, label=f"{modality}, {kind}", **edge)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title("t-SNE of bottleneck features")
    axes.legend(fontsize=8, loc="best")
    beside = file.with_name(f".{file.name}")
    figure.savefig(beside, dpi=150, format="png")
    beside.replace(file)


def _write(features: list[Feature], file: Path) -> None:
    beside = file.with_name(f".{file.name}")
    case, modality, kind, values = zip(*features, strict=True)
    np.savez_compressed(beside, features=np.stack(values), case=case, modality=modality, kind=kind)
    beside.replace(file)
