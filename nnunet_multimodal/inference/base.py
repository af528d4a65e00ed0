"""What our predicting commands share: nnU-Net's flags, a model, a case from its files, the file of a map."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import nibabel
import numpy as np
import SimpleITK
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.file_path_utilities import get_output_folder
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder
from torch import Tensor

from nnunet_multimodal.errors import UserError

RESERVED = {"dataset", "plans", "predict_from_raw_data_args"}  # files of nnU-Net beside the predictions
Predictor = TypeVar("Predictor", bound="ModelPredictor")


class Case(NamedTuple):
    """Where a case's images are, and its segmentation by the previous stage of a cascade."""

    name: str
    images: list[str]
    previous: str | None


class Preprocessed(NamedTuple):
    """A case on the network's grid: input (K, *D), nnU-Net's non-zero mask (1, *D) bool, nnU-Net's properties."""

    data: Tensor
    foreground: Tensor
    properties: dict


def add_model_arguments(parser: argparse.ArgumentParser, trainer: str) -> None:
    """nnUNetv2_predict's flags that say which model predicts which images on what."""
    parser.add_argument("-i", required=True, metavar="FOLDER", help="images, with nnU-Net's channel suffixes")
    parser.add_argument("-o", required=True, metavar="FOLDER", help="where the results go")
    parser.add_argument("-d", required=True, help="dataset name or id of the model")
    parser.add_argument("-p", default="nnUNetPlans", help="plans identifier (default: nnUNetPlans)")
    parser.add_argument("-tr", default=trainer, help=f"trainer (default: {trainer})")
    parser.add_argument("-c", required=True, help="configuration")
    parser.add_argument("-f", nargs="+", default=None, help="folds to use together (default: all that are trained)")
    parser.add_argument("-chk", default="checkpoint_final.pth", help="checkpoint (default: checkpoint_final.pth)")
    parser.add_argument("-step_size", type=float, default=0.5, help="step of the sliding window (default: 0.5)")
    parser.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="device (default: cuda)")
    parser.add_argument(
        "-prev_stage_predictions", default=None, metavar="FOLDER", help="predictions of the previous stage (cascade)"
    )


def model_folder(args: argparse.Namespace) -> str:
    """The folder of the model that the flags name."""
    return get_output_folder(args.d, args.tr, args.p, args.c)


class ModelPredictor(nnUNetPredictor):
    """nnU-Net's predictor for results other than its own label maps."""

    @classmethod
    def from_model(
        cls: type[Predictor],
        model_folder: str,
        folds: Sequence[int | str] | None,
        device: torch.device,
        checkpoint: str,
        step_size: float = 0.5,
        use_mirroring: bool = True,
        on_device: bool = True,
        progress_bar: bool = False,
    ) -> Predictor:
        """The predictor of a trained model.

        Raises:
            UserError: no trained fold, or a model whose images nnU-Net reorients.
        """
        if folds is None:
            found = sorted(path.parent.name for path in Path(model_folder).glob(f"fold_*/{checkpoint}"))
            numbered = [name.removeprefix("fold_") for name in found if name != "fold_all"]
            folds = numbered or [name.removeprefix("fold_") for name in found]
        for fold in folds:
            if not (Path(model_folder) / f"fold_{fold}" / checkpoint).is_file():
                raise UserError(f"no fold_{fold}/{checkpoint} in {model_folder}; train that fold, or give others to -f")
        if not folds:
            raise UserError(f"no fold_*/{checkpoint} in {model_folder}; train the model, or see -d, -tr, -p, -c, -chk")
        on_device = on_device and device.type == "cuda"
        predictor = cls(step_size, True, use_mirroring, on_device, device, allow_tqdm=progress_bar)
        predictor.initialize_from_trained_model_folder(model_folder, folds, checkpoint)
        reader = predictor.plans_manager.plans["image_reader_writer"]
        if "Reorient" in reader:
            raise UserError(f"{model_folder} reads images with {reader}, which reorients them; maps cannot follow that")
        return predictor

    def cases(self, folder: str, previous_stage: str | None) -> list[Case]:
        """The cases in a folder.

        Raises:
            UserError: none there, a name of nnU-Net's own files, or a cascade without its previous stage's predictions.
        """
        ending = self.dataset_json["file_ending"]
        files = create_lists_from_splitted_dataset_folder(folder, ending)
        if not files:
            raise UserError(f"no image ending in _0000{ending} in {folder}; give nnU-Net's file names, or another -i")
        stage = self.configuration_manager.previous_stage_name
        if stage is not None and previous_stage is None:
            raise UserError(
                f"{stage} comes before this configuration; give the folder of its predictions with "
                "-prev_stage_predictions"
            )
        names = [os.path.basename(images[0])[: -len(ending) - 5] for images in files]
        for name in RESERVED & set(names):
            raise UserError(f"{folder} has a case named {name!r}, whose {name}.json nnU-Net writes itself; rename it")
        return [
            Case(name, images, None if stage is None else f"{previous_stage}/{name}{ending}")
            for name, images in zip(names, files, strict=True)
        ]

    def preprocess(self, case: Case) -> Preprocessed:
        """Read and preprocess a case as nnU-Net does, the previous stage of a cascade included."""
        plans, configuration = self.plans_manager, self.configuration_manager
        preprocessor = configuration.preprocessor_class(verbose=False)
        data, seg, properties = preprocessor.run_case(
            case.images, case.previous, plans, configuration, self.dataset_json
        )
        foreground = torch.from_numpy(seg[:1] >= 0)
        if case.previous is not None:
            labels = plans.get_label_manager(self.dataset_json).foreground_labels
            data = np.vstack((data, convert_labelmap_to_one_hot(seg[0], labels, data.dtype)))
        return Preprocessed(torch.from_numpy(data), foreground, properties)


def write_map(array: np.ndarray, like: str, properties: dict, path: Path) -> None:
    """Write a map with the geometry of an image; beside, then rename.

    Args:
        array: (*spatial), in the order of nnU-Net's readers.
        like: the image's file.
        properties: what nnU-Net's reader told about it.
        path: a NIfTI file.
    """
    beside = path.with_name(f".{path.name}")
    if "nibabel_stuff" in properties:  # nnU-Net takes nibabel for what SimpleITK refuses
        affine = properties["nibabel_stuff"]["original_affine"]
        nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0), affine), beside)
    else:
        reference = SimpleITK.ReadImage(like)
        image = SimpleITK.GetImageFromArray(array.reshape(reference.GetSize()[::-1]))
        image.CopyInformation(reference)
        SimpleITK.WriteImage(image, str(beside), useCompression=True)
    beside.replace(path)
