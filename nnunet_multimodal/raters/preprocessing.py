"""Raters through nnU-Net's preprocessing: the same transposition, crop and resampling as its own label maps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from acvl_utils.cropping_and_padding.bounding_boxes import bounding_box_to_slice
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_multimodal.errors import UserError
from nnunet_multimodal.raters.files import FOLDER, find_raters


def raters_folder(data_folder: str | Path) -> Path:
    """Beside the folder of preprocessed data."""
    return Path(f"{data_folder}_raters")


def forget_raters(data_folder: str | Path) -> None:
    """Remove what an earlier preprocessing left."""
    shutil.rmtree(raters_folder(data_folder), ignore_errors=True)


def save_raters(
    output_filename_truncated: str,
    label_file: str,
    plans: PlansManager,
    configuration: ConfigurationManager,
    dataset_json: dict[str, Any],
) -> None:
    """Save a preprocessed case's raters, if there are any.

    CASE.b2nd has the consensus, as nnU-Net saved it, and a channel for each rater; so many for every case as the one
    with most raters has, consensus again in the rest. CASE.json has their names and weights.

    Args:
        output_filename_truncated: the case in the folder of preprocessed data, saved already.
        label_file: its consensus in the raw dataset.
        plans: nnU-Net's.
        configuration: nnU-Net's.
        dataset_json: nnU-Net's.

    Raises:
        UserError: some cases have raters and this one has none, or a rater's label map has another shape.
    """
    raw, ending = Path(label_file).parent.parent / FOLDER, dataset_json["file_ending"]
    raters = find_raters(raw, ending)
    if not raters:
        return
    data_folder, case = Path(output_filename_truncated).parent, Path(output_filename_truncated).name
    if case not in raters:
        raise UserError(f"{raw} has raters of other cases and none of {case}; add one, or leave the case out")
    properties = load_pickle(f"{output_filename_truncated}.pkl")
    _, consensus, _, _ = nnUNetDatasetBlosc2(str(data_folder), [case]).load_case(case)
    reader = plans.image_reader_writer_class()
    axes = [0, *(axis + 1 for axis in plans.transpose_forward)]
    spacing = [properties["spacing"][axis] for axis in plans.transpose_forward]
    inside = bounding_box_to_slice([[0, 1], *properties["bbox_used_for_cropping"]])
    target = [spacing[0], *configuration.spacing][-len(spacing) :]
    channels = [np.asarray(consensus[:])]
    for rater in raters[case]:
        labels = reader.read_seg(str(rater.file))[0].transpose(axes)
        if labels.shape[1:] != tuple(properties["shape_before_cropping"]):
            raise UserError(f"{rater.file} is not on its image's grid; nnunet-multimodal consensus --check says why")
        resampled = configuration.resampling_fn_seg(
            labels[inside].astype(np.int16), consensus.shape[1:], spacing, target
        )
        channels.append(np.asarray(resampled, np.int16))
    most = max(map(len, raters.values()))
    channels += channels[:1] * (most - len(raters[case]))
    stack = np.concatenate(channels).astype(np.int16)
    folder = raters_folder(data_folder)
    folder.mkdir(exist_ok=True)
    blocks, chunks = comp_blosc2_params(stack.shape, tuple(configuration.patch_size), stack.itemsize)
    nnUNetDatasetBlosc2.save_seg(stack, str(folder / case), chunks, blocks)
    weights = {rater.name: rater.weight for rater in raters[case]}
    (folder / f"{case}.json").write_text(json.dumps({"weights": weights, "channels": most}))
