"""Raters through nnU-Net's preprocessing: the same transposition, crop and resampling as its own label maps."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from acvl_utils.cropping_and_padding.bounding_boxes import bounding_box_to_slice
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_multimodal.errors import UserError
from nnunet_multimodal.files import write_json
from nnunet_multimodal.raters.files import FOLDER, WEIGHTS, Rater, describe, find_raters, read_rater


def raters_folder(data_folder: str | Path) -> Path:
    """In the folder of preprocessed data, which nnU-Net removes before it preprocesses again."""
    return Path(data_folder) / "raters"


def list_raters(folder: Path, ending: str) -> tuple[dict[str, list[Rater]], int]:
    """:func:`find_raters` and the largest number of a case, once in a process as long as the folder stays the same."""
    states = [path.stat() for path in (folder, folder / WEIGHTS) if path.exists()]
    return _list_raters(folder, ending, tuple((state.st_mtime_ns, state.st_size) for state in states))


@lru_cache(maxsize=1)
def _list_raters(folder: Path, ending: str, state: tuple) -> tuple[dict[str, list[Rater]], int]:
    raters = find_raters(folder, ending)
    return raters, max(map(len, raters.values()), default=0)


def save_raters(
    output_filename_truncated: str,
    image_file: str,
    label_file: str,
    plans: PlansManager,
    configuration: ConfigurationManager,
    dataset_json: dict[str, Any],
) -> None:
    """Save a preprocessed case's raters, if there are any.

    CASE.b2nd has the consensus, as nnU-Net saved it, and a channel for each rater; so many for every case as the one
    with most raters has, consensus again in the rest. CASE.json tells that number and describes each rater.

    Args:
        output_filename_truncated: the case in the folder of preprocessed data, saved already.
        image_file: its first image in the raw dataset.
        label_file: its consensus in the raw dataset.
        plans: nnU-Net's.
        configuration: nnU-Net's.
        dataset_json: nnU-Net's.

    Raises:
        UserError: some cases have raters and this one has none, or a rater's file is damaged, lies on another grid than
            the image or has labels that dataset.json does not declare.
    """
    raw, ending = Path(label_file).parent.parent / FOLDER, dataset_json["file_ending"]
    raters, most = list_raters(raw, ending)
    if not raters:
        return
    data_folder, case = Path(output_filename_truncated).parent, Path(output_filename_truncated).name
    if case not in raters:
        raise UserError(f"{raw} has raters of other cases and none of {case}; add one, or leave the case out")
    properties = load_pickle(f"{output_filename_truncated}.pkl")
    _, consensus, _, _ = nnUNetDatasetBlosc2(str(data_folder), [case]).load_case(case)
    reader, labels = plans.image_reader_writer_class(), plans.get_label_manager(dataset_json)
    declared = [*labels.all_labels, labels.ignore_label or 0]
    shape = [properties["shape_before_cropping"][axis] for axis in plans.transpose_backward]
    axes = [0, *(axis + 1 for axis in plans.transpose_forward)]
    spacing = [properties["spacing"][axis] for axis in plans.transpose_forward]
    inside = bounding_box_to_slice([[0, 1], *properties["bbox_used_for_cropping"]])
    target = [spacing[0], *configuration.spacing][-len(spacing) :]
    channels, described = [np.asarray(consensus[:])], {}
    for rater in raters[case]:
        described[rater.name] = describe(rater)
        label_map = read_rater(reader, rater.file, image_file, shape, properties, declared).transpose(axes)
        resampled = configuration.resampling_fn_seg(
            label_map[inside].astype(np.int16), consensus.shape[1:], spacing, target
        )
        channels.append(np.asarray(resampled, np.int16))
    channels += channels[:1] * (most - len(raters[case]))
    stack = np.concatenate(channels).astype(np.int16)
    folder = raters_folder(data_folder)
    folder.mkdir(exist_ok=True)
    blocks, chunks = comp_blosc2_params(stack.shape, tuple(configuration.patch_size), stack.itemsize)
    nnUNetDatasetBlosc2.save_seg(stack, str(folder / case), chunks, blocks)
    write_json(folder / f"{case}.json", {"raters": described, "channels": most})
