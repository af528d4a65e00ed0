"""What a modality contributes to a prediction: the same case without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from torch import Tensor

from nnunet_multimodal.inference.base import ModelPredictor, Preprocessed
from nnunet_multimodal.metrics.surface import dice


class Contribution(NamedTuple):
    """Of a modality to a label of a case.

    Attributes:
        voxels: of the prediction with all modalities.
        voxels_without: of the one without this modality.
        changed: one minus the Dice of these two; 0 if neither has the label.
        dice: of the prediction with all modalities against the reference, 1 if both lack the label; NaN without one.
        dice_without: of the one without this modality.
    """

    modality: str
    label: str
    voxels: int
    voxels_without: int
    changed: float
    dice: float
    dice_without: float


def predict_case(predictor: ModelPredictor, preprocessed: Preprocessed, data: Tensor) -> np.ndarray:
    """Label map (*spatial) on the image's grid, as nnU-Net makes it."""
    logits = predictor.predict_logits_from_preprocessed_data(data)
    return np.asarray(
        convert_predicted_logits_to_segmentation_with_correct_shape(
            logits,
            predictor.plans_manager,
            predictor.configuration_manager,
            predictor.plans_manager.get_label_manager(predictor.dataset_json),
            preprocessed.properties,
            num_threads_torch=torch.get_num_threads(),
        )
    )


def leave_each_out(
    predictor: ModelPredictor,
    preprocessed: Preprocessed,
    prediction: np.ndarray,
    labels: Mapping[str, int | Sequence[int]],
    reference: np.ndarray | None = None,
    ignore_label: int | None = None,
) -> list[Contribution]:
    """Contributions of every modality that is there, if there are two.

    Args:
        predictor: of any model.
        preprocessed: the case.
        prediction: label map with all its modalities.
        labels: names and values; a region has several.
        reference: label map, if there is one.
        ignore_label: voxels of the reference that count for nothing.
    """
    modalities, names = predictor.modalities, predictor.modality_names()
    there = [m for m, group in enumerate(modalities) if not any(preprocessed.absent[c] for c in group)]
    if len(there) < 2:
        return []
    contributions = []
    valid = np.ones(prediction.shape, bool) if reference is None else reference != ignore_label
    for left_out in there:
        kept = [channel for m in there if m != left_out for channel in modalities[m]]
        without = predict_case(predictor, preprocessed, predictor.with_channels(preprocessed, kept))
        for label, values in labels.items():
            own, other = (np.isin(m, values) for m in (prediction, without))
            truth = None if reference is None else np.isin(reference, values)
            contributions.append(
                Contribution(
                    names[left_out],
                    label,
                    int(own.sum()),
                    int(other.sum()),
                    1 - dice(own, other),
                    np.nan if truth is None else dice(own & valid, truth & valid),
                    np.nan if truth is None else dice(other & valid, truth & valid),
                )
            )
    return contributions
