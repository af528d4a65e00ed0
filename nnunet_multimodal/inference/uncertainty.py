"""Maps of each modality's uncertainty for whole images, and a score per case.

With a trained CRNP model: where a modality's features are unlike those of the training data (Wang et al., ECCV 2022,
Fig. 3). Writes CASE_0000.nii.gz, CASE_0001.nii.gz, ... on the image's grid, one for each modality, and uncertainty.json
with each map's mean inside nnU-Net's crop: a score for cases unlike the training data.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import SimpleITK
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import insert_crop_into_image
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.file_path_utilities import get_output_folder
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder
from torch import Tensor
from tqdm import tqdm

from nnunet_multimodal.network import MultimodalUNet, unwrap


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """nnUNetv2_predict's flags, as far as they mean something here."""
    parser.add_argument("-i", required=True, metavar="FOLDER", help="images, with nnU-Net's channel suffixes")
    parser.add_argument("-o", required=True, metavar="FOLDER", help="where the maps go")
    parser.add_argument("-d", required=True, help="dataset name or id of the model")
    parser.add_argument("-c", required=True, help="configuration")
    parser.add_argument("-tr", default="CRNPTrainer", help="trainer (default: CRNPTrainer)")
    parser.add_argument("-p", default="nnUNetPlans", help="plans identifier (default: nnUNetPlans)")
    parser.add_argument("-f", nargs="+", default=None, help="folds to average (default: all that are trained)")
    parser.add_argument("-chk", default="checkpoint_final.pth", help="checkpoint (default: checkpoint_final.pth)")
    parser.add_argument("-step_size", type=float, default=0.5, help="step of the sliding window (default: 0.5)")
    parser.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="device (default: cuda)")
    parser.add_argument(
        "-prev_stage_predictions", default=None, metavar="FOLDER", help="predictions of the previous stage (cascade)"
    )


def run(args: argparse.Namespace) -> int:
    """Predict the maps of a folder; returns the exit status."""
    model = get_output_folder(args.d, args.tr, args.p, args.c)
    predictor = UncertaintyPredictor.from_model(model, args.f, torch.device(args.device), args.chk, args.step_size)
    ending = predictor.dataset_json["file_ending"]
    cases = create_lists_from_splitted_dataset_folder(args.i, ending)
    if not cases:
        raise SystemExit(f"no image ending in _0000{ending} in {args.i}; give nnU-Net's file names, or another -i")
    output = Path(args.o)
    output.mkdir(parents=True, exist_ok=True)
    scores: dict[str, dict[str, float]] = {}
    for files in tqdm(cases, desc="uncertainty", unit="case"):
        case = os.path.basename(files[0])[: -len(ending) - 5]
        previous = None if args.prev_stage_predictions is None else f"{args.prev_stage_predictions}/{case}{ending}"
        maps, means = predictor.predict_case(files, previous)
        scores[case] = dict(zip(predictor.modality_names(), means, strict=True))
        for modality, uncertainty in enumerate(maps):
            _write(uncertainty, files[0], output / f"{case}_{modality:04d}.nii.gz")
    beside = output / "uncertainty.json.part"
    beside.write_text(json.dumps(scores, indent=2) + "\n")
    beside.replace(output / "uncertainty.json")
    return 0


class UncertaintyPredictor(nnUNetPredictor):
    """nnU-Net's sliding window over the modalities' uncertainty instead of logits."""

    @classmethod
    def from_model(
        cls,
        model_folder: str,
        folds: Sequence[int | str] | None,
        device: torch.device,
        checkpoint: str,
        step_size: float = 0.5,
    ) -> UncertaintyPredictor:
        """The predictor of a trained model.

        Raises:
            ValueError: no trained fold, a model of another package, or one whose images nnU-Net reorients.
        """
        if folds is None:
            found = sorted(path.parent.name for path in Path(model_folder).glob(f"fold_*/{checkpoint}"))
            numbered = [name.removeprefix("fold_") for name in found if name != "fold_all"]
            folds = numbered or [name.removeprefix("fold_") for name in found]
        if not folds:
            raise ValueError(f"no fold_*/{checkpoint} in {model_folder}; train the model, or see -d, -tr, -p, -c, -chk")
        on_device = device.type == "cuda"
        predictor = cls(step_size, perform_everything_on_device=on_device, device=device, allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(model_folder, folds, checkpoint)
        network = unwrap(predictor.network)
        if not isinstance(network, MultimodalUNet):
            raise ValueError(
                f"{model_folder} is a model of {predictor.trainer_name}, which has no modality uncertainty"
            )
        reader = predictor.plans_manager.plans["image_reader_writer"]
        if "Reorient" in reader:
            raise ValueError(
                f"{model_folder} reads images with {reader}, which reorients them; maps cannot follow that"
            )
        # nnU-Net sizes its buffer by the number of classes; ours holds modalities
        predictor.label_manager = SimpleNamespace(num_segmentation_heads=network.num_modalities)
        return predictor

    def _internal_maybe_mirror_and_predict(self, x: Tensor) -> Tensor:
        return unwrap(self.network).modality_uncertainty(x)

    def modality_names(self) -> list[str]:
        """Names for the maps: the channels', joined where a modality has several."""
        names = self.dataset_json.get("channel_names", self.dataset_json.get("modality", {}))
        names = [str(names[key]) for key in sorted(names, key=int)]
        return ["+".join(names[channel] for channel in group) for group in unwrap(self.network).groups]

    def predict_case(self, images: Sequence[str], previous: str | None = None) -> tuple[np.ndarray, list[float]]:
        """Maps (M, *spatial) of one case on its own grid, zero outside nnU-Net's crop, and their means inside it.

        Raises:
            ValueError: a cascade without the prediction of its previous stage.
        """
        plans, configuration = self.plans_manager, self.configuration_manager
        if configuration.previous_stage_name is not None and previous is None:
            raise ValueError(
                f"{configuration.previous_stage_name} comes before this configuration; give the folder of its "
                "predictions with -prev_stage_predictions"
            )
        preprocessor = configuration.preprocessor_class(verbose=False)
        data, seg, properties = preprocessor.run_case(images, previous, plans, configuration, self.dataset_json)
        if configuration.previous_stage_name is not None:
            labels = plans.get_label_manager(self.dataset_json).foreground_labels
            data = np.vstack((data, convert_labelmap_to_one_hot(seg[0], labels, data.dtype)))
        maps = self.predict_logits_from_preprocessed_data(torch.from_numpy(data)).float()

        shape = properties["shape_after_cropping_and_before_resampling"]
        spacing = [properties["spacing"][axis] for axis in plans.transpose_forward]
        current = [spacing[0], *configuration.spacing][-len(shape) :]
        maps = np.asarray(configuration.resampling_fn_probabilities(maps, shape, current, spacing), dtype=np.float32)
        whole = np.zeros((len(maps), *properties["shape_before_cropping"]), dtype=np.float32)
        whole = insert_crop_into_image(whole, maps, properties["bbox_used_for_cropping"])
        means = [float(uncertainty.mean()) for uncertainty in maps]
        return whole.transpose([0] + [axis + 1 for axis in plans.transpose_backward]), means


def _write(array: np.ndarray, like: str, path: Path) -> None:
    """Write beside, then rename, with the geometry of an image file."""
    reference = SimpleITK.ReadImage(like)
    image = SimpleITK.GetImageFromArray(array.reshape(reference.GetSize()[::-1]))
    image.CopyInformation(reference)
    beside = path.with_name(f".{path.name}")
    SimpleITK.WriteImage(image, str(beside), useCompression=True)
    beside.replace(path)
