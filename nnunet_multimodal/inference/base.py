"""What our predicting commands share: nnU-Net's flags, a model, a case from its files, the file of a map."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import nibabel
import numpy as np
import SimpleITK
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import insert_crop_into_image
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.file_path_utilities import get_output_folder
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
from torch import Tensor

from nnunet_multimodal.checkpoints import check_model, other_network, refuse_code, refuse_plans
from nnunet_multimodal.errors import UserError
from nnunet_multimodal.images import list_channels, read_images, read_json
from nnunet_multimodal.network import MultimodalUNet, unwrap
from nnunet_multimodal.preprocessing import PLACEHOLDER, channel_names, check_image, preprocess_present

RESERVED = {"dataset", "plans", "predict_from_raw_data_args"}  # files of nnU-Net beside the predictions
Predictor = TypeVar("Predictor", bound="ModelPredictor")


class Case(NamedTuple):
    """Where a case's images are, None where there is no file, what to drop, and a cascade's previous segmentation."""

    name: str
    images: list[str | None]
    previous: str | None
    dropped: tuple[int, ...] = ()

    @property
    def first_image(self) -> str:
        """Of a modality that is there, for the geometry."""
        return next(image for image in self.images if image is not None)


class Preprocessed(NamedTuple):
    """A case on the network's grid: input (K, *D), nnU-Net's non-zero mask (1, *D) bool, nnU-Net's properties.

    ``absent`` says for each image channel whether nothing is known of it.
    """

    data: Tensor
    foreground: Tensor
    properties: dict
    absent: tuple[bool, ...]


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


def add_part_arguments(parser: Any) -> None:
    """nnUNetv2_predict's flags for several calls that share a folder."""
    parser.add_argument("-num_parts", type=int, default=1, help="calls that share the folder (default: 1)")
    parser.add_argument("-part_id", type=int, default=0, help="which of them this is, from 0 (default: 0)")


def check_part(args: argparse.Namespace) -> None:
    """Raise a UserError if there is no such part."""
    if not 0 <= args.part_id < args.num_parts:
        raise UserError(f"-part_id {args.part_id} must be at least 0 and less than -num_parts {args.num_parts}")


def model_folder(args: argparse.Namespace) -> str:
    """The folder of the model that the flags name."""
    return get_output_folder(args.d, args.tr, args.p, args.c)


def voxel_volume_ml(properties: dict, reader: str) -> float | None:
    """Volume of a voxel in millilitres, from what nnU-Net's reader told; None if images have no physical size."""
    flat = len(properties.get("sitk_stuff", {}).get("spacing", "xyz")) == 2  # nnU-Net invents a third spacing
    return None if flat or "NaturalImage" in reader else math.prod(map(float, properties["spacing"])) / 1000


class ModelPredictor(nnUNetPredictor):
    """nnU-Net's predictor for results other than its own label maps.

    Attributes:
        checkpoints: files of the folds that it predicts with.
    """

    checkpoints: Sequence[Path]

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
            UserError: no trained fold, a model that would run code, or one whose images nnU-Net reorients.
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
        read_json(Path(model_folder) / "dataset.json", "labels", "file_ending")
        plans = Path(model_folder) / "plans.json"
        refuse_plans(plans, read_json(plans, "configurations", "image_reader_writer"))
        files = [Path(model_folder) / f"fold_{fold}" / checkpoint for fold in folds]
        for file in files:
            refuse_code(file)
        on_device = on_device and device.type == "cuda"
        predictor = cls(step_size, True, use_mirroring, on_device, device, allow_tqdm=progress_bar)
        predictor.checkpoints = files
        check_model(files)
        with other_network(files[0]):
            predictor.initialize_from_trained_model_folder(model_folder, folds, checkpoint)
        for file, weights in zip(files[1:], predictor.list_of_parameters[1:], strict=True):
            with other_network(file):
                unwrap(predictor.network).load_state_dict(weights)
        reader = predictor.plans_manager.plans["image_reader_writer"]
        if "Reorient" in reader:
            raise UserError(f"{model_folder} reads images with {reader}, which reorients them; maps cannot follow that")
        return predictor

    def identity(self) -> dict[str, Any]:
        """What tells its predictions from another model's, or from this one's with another window; fit for JSON."""
        states = [(file, file.stat()) for file in self.checkpoints]
        return {
            "model": "/".join(self.checkpoints[0].parts[-4:-2]),  # DATASET/TRAINER__PLANS__CONFIGURATION
            "checkpoints": [["/".join(file.parts[-2:]), s.st_size, int(s.st_mtime)] for file, s in states],
            "step_size": self.tile_step_size,
            "mirroring": self.use_mirroring,
        }

    def channel_names(self) -> list[str]:
        """Names of the image channels, in their order."""
        return channel_names(self.dataset_json)

    @property
    def modalities(self) -> tuple[tuple[int, ...], ...]:
        """Image channels of each modality that the model looks at; each its own for nnU-Net's models."""
        network = unwrap(self.network)
        if not isinstance(network, MultimodalUNet):
            return tuple((channel,) for channel in range(len(self.channel_names())))
        return tuple(group for m, group in enumerate(network.groups) if m not in network.unused)

    def modality_names(self, modalities: Sequence[Sequence[int]] | None = None) -> list[str]:
        """The channels' names, joined where a modality has several; of all that the model looks at if not given."""
        names = self.channel_names()
        groups = self.modalities if modalities is None else modalities
        return ["-".join(names[channel] for channel in group) for group in groups]

    def cases(self, folder: str, previous_stage: str | None, drop: Sequence[str] = ()) -> list[Case]:
        """The cases in a folder, whatever modalities they have.

        Args:
            folder: images; a modality's file may be missing.
            previous_stage: folder of the previous stage's predictions, for a cascade.
            drop: names of channels to leave out.

        Raises:
            UserError: none there, a name that nnU-Net does not expect, a case that keeps no modality, a channel that
                does not exist, or a cascade without its previous stage's predictions.
        """
        ending, names = self.dataset_json["file_ending"], self.channel_names()
        for name in drop:
            if names.count(name) != 1:
                raise UserError(f"--drop {name}: is {names.count(name)} of the model's modalities {', '.join(names)}")
        dropped = tuple(names.index(name) for name in drop)
        if not Path(folder).is_dir():
            raise UserError(f"-i {folder} is not a folder")
        found = list_channels(Path(folder), ending, len(names))
        stage = self.configuration_manager.previous_stage_name
        if stage is not None and previous_stage is None:
            raise UserError(
                f"{stage} comes before this configuration; give the folder of its predictions with "
                "-prev_stage_predictions"
            )
        single = all(channels == {0} for channels in found.values())  # files with all channels in them (RGB)
        cases = []
        for name, channels in sorted(found.items()):
            if name in RESERVED:
                raise UserError(
                    f"{folder} has a case named {name!r}, whose {name}.json nnU-Net writes itself; rename it"
                )
            if channels <= set(dropped) and not single:
                has = ", ".join(names[channel] for channel in sorted(channels))
                raise UserError(f"{folder}: {name} has {has}, and --drop {','.join(drop)} leaves nothing; drop less")
            images = [f"{folder}/{name}_{c:04d}{ending}" if c in channels else None for c in range(len(names))]
            cases.append(Case(name, images, None if stage is None else f"{previous_stage}/{name}{ending}", dropped))
        return cases

    def preprocess(self, case: Case) -> Preprocessed:
        """Read and preprocess a case as nnU-Net does, the previous stage of a cascade included.

        Absent modalities, placeholders too, become NaN; zero for networks of nnU-Net, which do not know NaN.

        Raises:
            UserError: all modalities of a case are placeholders, or NaN in an image.
        """
        plans, configuration = self.plans_manager, self.configuration_manager
        preprocessor = configuration.preprocessor_class(verbose=False)
        reader = plans.image_reader_writer_class()
        files = [file for file in case.images if file is not None]
        data, properties = read_images(reader, files)
        if len(data) != len(files) and len(data) != len(case.images):
            raise UserError(f"{files[0]} has {len(data)} channels in one file; split it, one file for each modality")
        if len(data) < len(case.images) and len(data) == len(files):  # else a file holds several channels
            there, data = data, np.full((len(case.images), *data.shape[1:]), PLACEHOLDER, data.dtype)
            data[[file is not None for file in case.images]] = there
        if len(case.dropped) == len(case.images):
            raise UserError(f"{case.name}: --drop leaves nothing; drop less")
        data[list(case.dropped)] = PLACEHOLDER
        absent = check_image(data, files if len(files) == len(data) else [f"{case.name}"], len(case.images))
        if not any(all(not absent[channel] for channel in group) for group in self.modalities):
            raise UserError(f"{case.name} has none of what the model looks at: {', '.join(self.modality_names())}")
        seg = None if case.previous is None else reader.read_seg(case.previous)[0]
        data, seg, properties = preprocess_present(
            preprocessor.run_case_npy, data, seg, properties, absent, plans, configuration, self.dataset_json
        )
        if not isinstance(unwrap(self.network), MultimodalUNet):
            data[: len(absent)][absent] = 0
        foreground = torch.from_numpy(seg[:1] >= 0)
        if case.previous is not None:
            labels = plans.get_label_manager(self.dataset_json).foreground_labels
            data = np.vstack((data, convert_labelmap_to_one_hot(seg[0], labels, data.dtype)))
        return Preprocessed(torch.from_numpy(data), foreground, properties, tuple(absent.tolist()))

    def with_channels(self, preprocessed: Preprocessed, channels: Sequence[int]) -> Tensor:
        """The network's input with nothing but some image channels: NaN elsewhere for ours, zero for nnU-Net's own."""
        data = preprocessed.data.clone()
        ours = isinstance(unwrap(self.network), MultimodalUNet)
        data[[c for c in range(len(preprocessed.absent)) if c not in channels]] = torch.nan if ours else 0.0
        return data

    def tiles(self, data: Tensor) -> Iterator[Tensor]:
        """nnU-Net's tiles of a case (1, K, *patch), on the device, without those of nothing."""
        data, _ = self._pad(data)
        for slicer in self._internal_get_sliding_window_slicers(data.shape[1:]):
            tile = data[slicer][None].to(self.device)
            if torch.nan_to_num(tile).any():
                yield tile

    def blend(self, data: Tensor, number: int, of_tile: Callable[[Tensor], Tensor]) -> Tensor:
        """Maps (number, *D) of a case, blended from those of nnU-Net's tiles (1, number, *patch) with its weights.

        In single precision: nnU-Net's own buffer is in half, which suits logits and loses maps of small numbers.
        """
        padded, revert = self._pad(data)
        blended, weights = torch.zeros(number, *padded.shape[1:]), torch.zeros(padded.shape[1:])
        gaussian = compute_gaussian(
            tuple(self.configuration_manager.patch_size), 1.0 / 8, 10, torch.float32, torch.device("cpu")
        )
        for slicer in self._internal_get_sliding_window_slicers(padded.shape[1:]):
            blended[slicer] += of_tile(padded[slicer][None].to(self.device))[0].detach().float().cpu() * gaussian
            weights[slicer[1:]] += gaussian
        inside = (slice(None), *revert[1:])
        return (blended / weights)[inside]

    def _pad(self, data: Tensor) -> tuple[Tensor, Any]:
        return pad_nd_image(data, self.configuration_manager.patch_size, "constant", {"value": 0}, True, None)

    def half_precision(self) -> AbstractContextManager:
        """As nnU-Net predicts: autocast on CUDA alone."""
        return torch.autocast("cuda") if self.device.type == "cuda" else nullcontext()

    def to_image_grid(self, maps: Tensor, properties: dict) -> np.ndarray:
        """Maps (M, *D) on the network's grid -> (M, *spatial) on the image's, zero outside nnU-Net's crop."""
        shape = properties["shape_after_cropping_and_before_resampling"]
        spacing = [properties["spacing"][axis] for axis in self.plans_manager.transpose_forward]
        current = [spacing[0], *self.configuration_manager.spacing][-len(shape) :]
        resample = self.configuration_manager.resampling_fn_probabilities
        resampled = np.asarray(resample(maps, shape, current, spacing), dtype=np.float32)
        whole = np.zeros((len(maps), *properties["shape_before_cropping"]), dtype=np.float32)
        whole = insert_crop_into_image(whole, resampled, properties["bbox_used_for_cropping"])
        return whole.transpose([0] + [axis + 1 for axis in self.plans_manager.transpose_backward])


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
