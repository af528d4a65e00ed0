"""What our predicting commands share: nnU-Net's flags, a model, a case from its files, the file of a map."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import SimpleITK
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.file_path_utilities import get_output_folder
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder
from torch import Tensor

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
            ValueError: no trained fold, or a model whose images nnU-Net reorients.
        """
        if folds is None:
            found = sorted(path.parent.name for path in Path(model_folder).glob(f"fold_*/{checkpoint}"))
            numbered = [name.removeprefix("fold_") for name in found if name != "fold_all"]
            folds = numbered or [name.removeprefix("fold_") for name in found]
        for fold in folds:
            if not (Path(model_folder) / f"fold_{fold}" / checkpoint).is_file():
                raise ValueError(
                    f"no fold_{fold}/{checkpoint} in {model_folder}; train that fold, or give others to -f"
                )
        if not folds:
            raise ValueError(f"no fold_*/{checkpoint} in {model_folder}; train the model, or see -d, -tr, -p, -c, -chk")
        on_device = on_device and device.type == "cuda"
        predictor = cls(step_size, True, use_mirroring, on_device, device, allow_tqdm=progress_bar)
        predictor.initialize_from_trained_model_folder(model_folder, folds, checkpoint)
        reader = predictor.plans_manager.plans["image_reader_writer"]
        if "Reorient" in reader:
            raise ValueError(
                f"{model_folder} reads images with {reader}, which reorients them; maps cannot follow that"
            )
        return predictor

    def cases(self, folder: str, previous_stage: str | None) -> list[Case]:
        """The cases in a folder.

        Raises:
            ValueError: none there, or a cascade without the predictions of its previous stage.
        """
        ending = self.dataset_json["file_ending"]
        files = create_lists_from_splitted_dataset_folder(folder, ending)
        if not files:
            raise ValueError(f"no image ending in _0000{ending} in {folder}; give nnU-Net's file names, or another -i")
        stage = self.configuration_manager.previous_stage_name
        if stage is not None and previous_stage is None:
            raise ValueError(
                f"{stage} comes before this configuration; give the folder of its predictions with "
                "-prev_stage_predictions"
            )
        names = [os.path.basename(images[0])[: -len(ending) - 5] for images in files]
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


def write_map(array: np.ndarray, like: str, path: Path) -> None:
    """Write a map (*spatial, in SimpleITK's order) with the geometry of an image file; beside, then rename."""
    reference = SimpleITK.ReadImage(like)
    image = SimpleITK.GetImageFromArray(array.reshape(reference.GetSize()[::-1]))
    image.CopyInformation(reference)
    beside = path.with_name(f".{path.name}")
    SimpleITK.WriteImage(image, str(beside), useCompression=True)
    beside.replace(path)
