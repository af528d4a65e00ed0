"""Maps of each modality's uncertainty for whole images, and a score per case.

With a trained CRNP model: where a modality's features are unlike those of the training data (Wang et al., ECCV 2022,
Fig. 3). Writes CASE_0000.nii.gz, CASE_0001.nii.gz, ... on the image's grid, one for each modality, and uncertainty.json
with each map's mean inside nnU-Net's crop: a score for cases unlike the training data.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nnunet_multimodal.errors import UserError
from nnunet_multimodal.files import write_json
from nnunet_multimodal.inference.base import (
    Case,
    ModelPredictor,
    Preprocessed,
    add_model_arguments,
    model_folder,
    write_map,
)
from nnunet_multimodal.network import MultimodalUNet, unwrap
from nnunet_multimodal.provenance import note


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """nnUNetv2_predict's flags, as far as they mean something here."""
    add_model_arguments(parser, "CRNPTrainer")


def run(args: argparse.Namespace) -> int:
    """Predict the maps of a folder; returns the exit status."""
    device = torch.device(args.device)
    predictor = UncertaintyPredictor.from_model(model_folder(args), args.f, device, args.chk, args.step_size)
    predictor.check()
    output = Path(args.o)
    output.mkdir(parents=True, exist_ok=True)
    scores: dict[str, dict[str, float]] = {}
    for case in tqdm(predictor.cases(args.i, args.prev_stage_predictions), desc="uncertainty", unit="case"):
        maps, means, properties = predictor.predict_case(case)
        scores[case.name] = dict(zip(predictor.modality_names(unwrap(predictor.network).groups), means, strict=True))
        for modality, uncertainty in enumerate(maps):
            write_map(uncertainty, case.first_image, properties, output / f"{case.name}_{modality:04d}.nii.gz")
    write_json(output / "uncertainty.json", scores)
    note(output, "uncertainty", **predictor.identity())
    return 0


class UncertaintyPredictor(ModelPredictor):
    """nnU-Net's sliding window over the modalities' uncertainty instead of logits."""

    def check(self) -> None:
        """Make room for modalities in nnU-Net's buffer, which it sizes by the number of classes.

        Raises:
            UserError: a model of another package.
        """
        network = unwrap(self.network)
        if not isinstance(network, MultimodalUNet):
            raise UserError(f"{self.trainer_name} has no modality uncertainty; CRNPTrainer's models have")
        self.label_manager = SimpleNamespace(num_segmentation_heads=network.num_modalities)

    def _internal_maybe_mirror_and_predict(self, x: Tensor) -> Tensor:
        return unwrap(self.network).modality_uncertainty(x)

    def predict_case(self, case: Case) -> tuple[np.ndarray, list[float], dict]:
        """Maps (M, *spatial) of a case on its own grid, zero outside nnU-Net's crop, means inside it, properties."""
        return self.predict_preprocessed(self.preprocess(case))

    def predict_preprocessed(self, preprocessed: Preprocessed) -> tuple[np.ndarray, list[float], dict]:
        """The same of a case that is preprocessed."""
        maps = self.predict_logits_from_preprocessed_data(preprocessed.data).float()
        whole = self.to_image_grid(maps, preprocessed.properties)
        crop = tuple(slice(*bounds) for bounds in preprocessed.properties["bbox_used_for_cropping"])
        inside = whole.transpose([0] + [axis + 1 for axis in self.plans_manager.transpose_forward])
        means = [float(uncertainty[crop].mean()) for uncertainty in inside]
        return whole, means, preprocessed.properties
