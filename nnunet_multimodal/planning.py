"""From nnU-Net's plans to a network here, and planning that knows what these networks cost.

With stock plans a trainer lifts the planned topology to its own network. A method's options stand in the plans file,
in a configuration (inherited like everything there), under one key:

    "3d_fullres": {..., "nnunet_multimodal": {"modalities": [[0], [1]], "crnp": {"fusion": "concat"}}}

Besides methods there are ``modalities`` (image channels of each), ``dedicated`` (the only modalities that the network
may see), ``modality_dropout`` (options of :class:`~nnunet_multimodal.modalities.ModalityDropout`) and ``raters`` (of
:class:`~nnunet_multimodal.raters.training.RaterPolicy`).
"""

from __future__ import annotations

import json
import shutil
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_multimodal.backbones import BACKBONES
from nnunet_multimodal.errors import UserError
from nnunet_multimodal.files import written_beside
from nnunet_multimodal.heads import HEADS
from nnunet_multimodal.network import MultimodalUNet
from nnunet_multimodal.preprocessing import PREPROCESSOR, STOCK_PREPROCESSOR, check_incomplete

OPTIONS_KEY = "nnunet_multimodal"
NETWORK_CLASS = f"{MultimodalUNet.__module__}.{MultimodalUNet.__name__}"
SHARED_DATA = "nnUNetMultimodalPlans"
NETWORK_OPTIONS = ("modalities", "dedicated")  # arguments of the network itself
STOCK_NETWORKS = ("PlainConvUNet", "ResidualEncoderUNet")
# What training holds in half precision of a parameter (itself, gradient, momentum, and itself once more in half) and,
# at its peak, of an element of nnU-Net's feature maps, whose reference has the parameters of nnU-Net's network in it
# (benchmarks/planning_target.py).
PARAMETER_BYTES, ELEMENT_BYTES = 14, 5.1
READS, SECONDS_BETWEEN = 5, 0.5  # of a file that another fold may be writing


def network_kwargs(configuration_manager: ConfigurationManager, backbone: str, head: str) -> dict[str, Any]:
    """Constructor arguments of :class:`MultimodalUNet` for a configuration of nnU-Net's plans, ours or stock.

    Args:
        configuration_manager: the configuration.
        backbone: the trainer's backbone.
        head: the trainer's head.

    Raises:
        ValueError: the plan's network is not a U-Net whose topology can be taken over, or an option does not exist.
    """
    class_name = configuration_manager.network_arch_class_name
    kwargs = dict(configuration_manager.network_arch_init_kwargs)
    if class_name == NETWORK_CLASS:
        if kwargs.pop("backbone") != backbone:
            kwargs.pop("backbone_kwargs", None)
        if kwargs.pop("head", None) != head:
            kwargs.pop("head_kwargs", None)
    elif class_name.rsplit(".", 1)[-1] not in STOCK_NETWORKS:
        raise ValueError(
            f"the plan's network {class_name} is not a U-Net whose topology a multi-modal network can take over; "
            "use plans of nnUNetPlanner, nnUNetPlannerResEncM/L/XL or one of ours (-pl nnUNetPlannerCRNP)"
        )
    options = dict(configuration_manager.configuration.get(OPTIONS_KEY, {}))
    known = (*NETWORK_OPTIONS, "modality_dropout", "raters", *BACKBONES, *HEADS)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"{unknown} under {OPTIONS_KEY!r} in the plans file is not known; there are: {', '.join(known)}"
        )
    return {
        "num_image_channels": len(configuration_manager.normalization_schemes),
        **kwargs,
        **{name: options[name] for name in NETWORK_OPTIONS if name in options},
        "backbone": backbone,
        "head": head,
        "backbone_kwargs": {**kwargs.get("backbone_kwargs", {}), **options.get(backbone, {})},
        "head_kwargs": {**kwargs.get("head_kwargs", {}), **options.get(head, {})},
    }


def resolve_options(
    configuration_manager: ConfigurationManager, backbone: str, dataset_json: dict, label_manager: LabelManager
) -> dict[str, dict]:
    """Options of a backbone that follow from the data set, by its name, for ``nnunet_multimodal`` in the plans.

    What stands there already wins over dataset.json.

    Raises:
        UserError: dataset.json contradicts itself, or what one of our planners took from it.
    """
    options = configuration_manager.configuration.get(OPTIONS_KEY, {})
    single = [[channel] for channel in range(len(configuration_manager.normalization_schemes))]
    groups = options.get("modalities") or single
    stated = options.get(backbone, {})
    resolved = BACKBONES[backbone].dataset_options(dataset_json, label_manager, groups, stated)
    if not resolved:
        return {}
    architecture = configuration_manager.network_arch_init_kwargs
    planned = architecture.get("backbone_kwargs", {}) if architecture.get("backbone") == backbone else {}
    # with other groups of channels the planner's numbers, which are of single ones, mean something else
    for name in sorted({*planned, *resolved} - set(stated)) if planned and groups == single else ():
        if planned.get(name) != resolved.get(name):
            raise UserError(
                f"{name} of {backbone!r} was planned as {planned.get(name)} and follows from dataset.json as "
                f"{resolved.get(name)}; run nnUNetv2_plan_experiment again"
            )
    return {backbone: {**dict.fromkeys(planned), **resolved, **stated}}


def check_same_options(model_plans: Path, configuration: str, part: str, resolved: dict[str, Any]) -> None:
    """Refuse to go on with a model whose weights were trained with other options from the data set.

    Args:
        model_plans: plans.json of the model, which need not be there.
        configuration: name of the configuration.
        part: name of the backbone or head.
        resolved: its options now.

    Raises:
        UserError: they differ, or plans.json was cut off and there are checkpoints.
    """
    plans = read_model_plans(model_plans)
    if plans is None:
        return
    trained = plans["configurations"].get(configuration, {}).get(OPTIONS_KEY, {}).get(part)
    if trained is not None and trained != resolved:
        raise UserError(
            f"{model_plans}: the model is trained with {part!r} {trained}, and dataset.json and plans now say "
            f"{resolved}; restore them, or train under another plans name (-overwrite_plans_name)"
        )


def read_model_plans(file: Path) -> dict[str, Any] | None:
    """A model's plans.json, which nnU-Net writes in place when a fold begins; None where nothing is trained by it.

    Raises:
        UserError: it stays unreadable, and there are checkpoints.
    """
    error: ValueError | None = None
    for attempt in range(READS):
        if attempt:
            time.sleep(SECONDS_BETWEEN)
        try:
            return json.loads(file.read_text())
        except FileNotFoundError:
            return None
        except ValueError as unreadable:  # not UTF-8 and not JSON are ValueErrors
            error = unreadable
    if any(file.parent.glob("fold_*/checkpoint_*.pth")):
        raise UserError(
            f"{file} was cut off ({error}); delete it if dataset.json and the plans are those that the checkpoints "
            "beside it were trained with, and train again: nnU-Net writes it anew"
        ) from error
    return None


class MultimodalPlannerMixin(ExperimentPlanner):
    """Plans patch and batch size for our network instead of nnU-Net's, in front of any of nnU-Net's U-Net planners.

    nnU-Net lowers the patch size until the feature maps of its network fit a reference; the same reference is compared
    with the feature maps of ours, all encoders included.
    """

    backbone: str
    head: str = "deterministic"
    memory_target_in_gb: float
    name_of_plans: str
    plans_identifier: str

    # nnU-Net's planners have a constructor of their own each, with these arguments
    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float | None = None,
        preprocessor_name: str = STOCK_PREPROCESSOR,
        plans_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        if preprocessor_name == STOCK_PREPROCESSOR:
            preprocessor_name = PREPROCESSOR
        super().__init__(
            dataset_name_or_id,
            self.memory_target_in_gb if gpu_memory_target_in_gb is None else gpu_memory_target_in_gb,
            preprocessor_name,
            plans_name or self.name_of_plans,
            **kwargs,
        )
        check_incomplete(self.dataset_name, self.dataset_fingerprint, preprocessor_name)
        channels = self.dataset_json.get("channel_names", self.dataset_json.get("modality", {}))
        needed = BACKBONES[self.backbone].MIN_MODALITIES
        if len(channels) < needed:
            raise ValueError(
                f"{self.dataset_name} has {len(channels)} modality ({', '.join(map(str, channels.values()))}) and "
                f"{self.backbone} needs at least {needed} to fuse; plan it with nnU-Net's own planner instead"
            )
        self.UNet_class = MultimodalUNet
        self.label_manager = LabelManager(self.dataset_json["labels"], self.dataset_json.get("regions_class_order"))
        single = [[channel] for channel in range(len(channels))]
        self.backbone_kwargs = BACKBONES[self.backbone].dataset_options(
            self.dataset_json, self.label_manager, single, {}
        )
        self.head_kwargs = HEADS[self.head].dataset_options(self.label_manager)

    # nnU-Net's is a static method that it calls on the instance
    def static_estimate_VRAM_usage(  # noqa: N802
        self, patch_size, input_channels, output_channels, arch_class_name, arch_kwargs, arch_kwargs_req_import
    ):
        """Feature map elements of our network for a patch, with what stands for its further encoders' parameters.

        These are shared out over nnU-Net's reference batch (2 in 3D, 12 in 2D), for which alone they are exact. nnU-Net
        builds the network for every patch that it considers; here without memory and initial weights.
        """
        # nnU-Net counts labels, which are more than the regions
        if BACKBONES[self.backbone].PREDICTS or HEADS[self.head].STOCHASTIC:
            output_channels = self.label_manager.num_segmentation_heads
        with torch.device("meta"):
            network = get_network_from_plans(
                arch_class_name, {**arch_kwargs, **self._method()}, arch_kwargs_req_import, input_channels,
                output_channels, allow_init=False,
            )  # fmt: skip
        is_2d = len(patch_size) == 2
        batch = self.UNet_reference_val_corresp_bs_2d if is_2d else self.UNet_reference_val_corresp_bs_3d
        parameters = network.further_parameters() * PARAMETER_BYTES / ELEMENT_BYTES / batch
        return network.compute_conv_feature_map_size(patch_size) + round(parameters)

    def save_plans(self, plans: dict[str, Any]) -> None:
        """nnU-Net's, which keeps configurations that a user added; the file is whole or not there."""
        name = self.plans_identifier
        file = Path(nnUNet_preprocessed) / self.dataset_name / f"{name}.json"
        with written_beside(file) as beside, redirect_stdout(None):  # it would say the other file's name
            if file.is_file():
                shutil.copyfile(file, beside)
            self.plans_identifier = beside.stem
            try:
                super().save_plans(plans)
            finally:
                self.plans_identifier = name
        print(f"Plans were saved to {file}")

    def generate_data_identifier(self, configuration_name: str) -> str:
        """Folder of the preprocessed data: one for all of our planners where these do not depend on the patch."""
        shared = configuration_name in ("2d", "3d_fullres") and self.overwrite_target_spacing is None
        shared = shared and self.preprocessor_name == PREPROCESSOR
        return f"{SHARED_DATA if shared else self.plans_identifier}_{configuration_name}"

    def get_plans_for_configuration(self, *args: Any, **kwargs: Any) -> dict:
        """nnU-Net's, with the method written into the plan's architecture."""
        plan = super().get_plans_for_configuration(*args, **kwargs)
        channels = len(plan["normalization_schemes"])
        plan["architecture"]["arch_kwargs"].update(self._method(), num_image_channels=channels)
        return plan

    def _method(self) -> dict[str, Any]:
        method = {"backbone": self.backbone, "head": self.head}
        options = {"backbone_kwargs": self.backbone_kwargs, "head_kwargs": self.head_kwargs}
        return {**method, **{name: own for name, own in options.items() if own}}
