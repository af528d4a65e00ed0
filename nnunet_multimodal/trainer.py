"""Every hook of this project into nnU-Net's trainer; a method's trainer only names its backbone and head."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.paths import nnUNet_raw
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, distributed, nn

from nnunet_multimodal.backbones import BACKBONES
from nnunet_multimodal.checkpoints import check_trainer, other_network, refuse_code, refuse_layers
from nnunet_multimodal.doctor import hook_file
from nnunet_multimodal.errors import UserError
from nnunet_multimodal.files import written_beside
from nnunet_multimodal.heads import HEADS
from nnunet_multimodal.heads.base import RaterLabels
from nnunet_multimodal.losses import build_objective
from nnunet_multimodal.modalities import ModalityDropout
from nnunet_multimodal.network import MultimodalUNet, build, unwrap
from nnunet_multimodal.nonfinite import (
    LOWEST_USUAL_SCALE,
    MAX_SKIPPED_STEPS,
    SKIPPED_REMEDY,
    NonFiniteGradientError,
    RunningStatistics,
    name_nonfinite_input,
    name_nonfinite_terms,
    refuse_nonfinite_gradients,
    refuse_small_scale,
)
from nnunet_multimodal.planning import OPTIONS_KEY, check_same_options, network_kwargs, resolve_options
from nnunet_multimodal.preprocessing import (
    PREPROCESSOR,
    STOCK_PREPROCESSOR,
    cases_without,
    check_incomplete,
    check_preprocessed,
)
from nnunet_multimodal.provenance import log_start
from nnunet_multimodal.raters.preprocessing import raters_folder
from nnunet_multimodal.raters.training import CONSENSUS, MEAN, RANDOM, RaterDataset, RaterPolicy, split_targets
from nnunet_multimodal.transforms import keep_foreground, keep_raters


class GroupPolyLRScheduler(PolyLRScheduler):
    """nnU-Net's schedule, times each parameter group's ``lr_scale``; nnU-Net's writes one rate into every group."""

    def step(self, current_step: int | None = None) -> None:
        """Set the learning rates of an epoch."""
        super().step(current_step)
        for group in self.optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


class MultimodalTrainer(nnUNetTrainer):
    """Base of all trainers here; not for use by itself.

    Options of a method are read from the plans file (see :func:`nnunet_multimodal.planning.network_kwargs`), so that
    the model's own ``plans.json`` holds all that prediction needs.
    """

    backbone: str
    head: str
    modality_dropout: bool = False

    def initialize(self) -> None:
        """nnU-Net's, after a check that the method suits the dataset and the plans its incomplete cases.

        Raises:
            ValueError: the dataset has fewer modalities than the method needs, or an option does not exist.
            UserError: the plans take the placeholders of absent modalities for images.
        """
        check_modalities(self.backbone, self.configuration_manager, self.dataset_json, self.plans_manager.dataset_name)
        options = self.configuration_manager.configuration.get(OPTIONS_KEY, {})
        dropout = options.get("modality_dropout", {})
        self.dropout = build(ModalityDropout, "modality dropout", dropout) if self.modality_dropout else None
        usual = {"policy": RANDOM if HEADS[self.head].STOCHASTIC else CONSENSUS}
        outputs = self.label_manager, self.label_manager.num_segmentation_heads
        self.rater_policy = build(RaterPolicy, "raters", {**usual, **options.get("raters", {})}, *outputs)
        self.raters: RaterDataset | None = None
        resolved = resolve_options(self.configuration_manager, self.backbone, self.dataset_json, self.label_manager)
        of_head = HEADS[self.head].dataset_options(self.label_manager)
        if of_head:
            resolved[self.head] = {**options.get(self.head, {}), **of_head}
        if resolved:  # in the model's plans.json too, for the predictor
            model_plans = Path(self.output_folder_base) / "plans.json"
            for part, own in resolved.items():
                check_same_options(model_plans, self.configuration_name, part, own)
            own = self.plans_manager.plans["configurations"][self.configuration_name]
            self.configuration_manager.configuration[OPTIONS_KEY] = own[OPTIONS_KEY] = {**options, **resolved}
        check_incomplete(
            self.plans_manager.dataset_name,
            load_json(str(Path(self.preprocessed_dataset_folder_base) / "dataset_fingerprint.json")),
            self.configuration_manager.configuration["preprocessor_name"],
        )
        check_preprocessed(Path(self.preprocessed_dataset_folder), self.dataset_json)
        if hook_file() is not None:  # else nnU-Net's workers would not find our preprocessor
            know_placeholders(self.plans_manager.plans)
        super().initialize()
        self.skipped: list[str] = []
        self.num_skipped = 0  # of all epochs
        self.statistics = RunningStatistics(unwrap(self.network))
        if self.grad_scaler is None:  # which looks for itself; the hook would wait for the GPU once more in each step
            self.optimizer.register_step_pre_hook(refuse_nonfinite_gradients)

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The plan's topology with this trainer's backbone and head; a classmethod as nnU-Net's predictor calls it.

        Raises:
            UserError: the plans name something for import that is no class of layers.
        """
        refuse_layers(f"plans of {plans_manager.dataset_name}", configuration_manager.configuration["architecture"])
        return get_network_from_plans(
            f"{MultimodalUNet.__module__}.{MultimodalUNet.__name__}",
            network_kwargs(configuration_manager, cls.backbone, cls.head),
            configuration_manager.network_arch_init_kwargs_req_import,
            num_input_channels,
            num_output_channels,
            allow_init=True,
            deep_supervision=enable_deep_supervision,
        )

    def do_split(self) -> tuple[list[str], list[str]]:
        """nnU-Net's, without cases that have nothing of what the network looks at (``dedicated``, ``modalities``)."""
        network = unwrap(self.network)
        looked_at = [group for m, group in enumerate(network.groups) if m not in network.unused]
        empty = cases_without(self.plans_manager.dataset_name, looked_at)
        kept = []
        for keys in super().do_split():
            kept.append([key for key in keys if key not in empty])
            if keys and not kept[-1]:
                raise UserError(
                    f"no case of fold {self.fold} has a modality that the network looks at (image channels "
                    f"{looked_at}); correct 'dedicated' or 'modalities' in the plans file"
                )
        if empty:
            self.print_to_log_file(f"Left out, for want of image channels {looked_at}: {', '.join(sorted(empty))}")
        return kept[0], kept[1]

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, GroupPolyLRScheduler]:
        """nnU-Net's SGD and schedule, with the parameter groups that the backbone asks for."""
        optimizer, _ = super().configure_optimizers()
        for group in unwrap(self.network).backbone.parameter_groups():
            split_group(optimizer, dict(group))
        return optimizer, GroupPolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    @classmethod
    def get_training_transforms(cls, *args: Any, **kwargs: Any) -> BasicTransform:
        """nnU-Net's, with its non-zero mask kept for a head that wants it, and with raters."""
        transforms = keep_raters(super().get_training_transforms(*args, **kwargs), kwargs.get("is_cascaded", False))
        return keep_foreground(transforms) if HEADS[cls.head].NEEDS_FOREGROUND else transforms

    def get_tr_and_val_datasets(self) -> tuple[Any, Any]:
        """nnU-Net's, the training cases with their raters if there are any and somebody asks for them.

        Raises:
            UserError: raters are not preprocessed, or the raw ones have changed since.
        """
        training, validation = super().get_tr_and_val_datasets()
        if not HEADS[self.head].FITS_RATERS and self.rater_policy.policy == CONSENSUS:
            return training, validation
        folder = raters_folder(self.preprocessed_dataset_folder)
        raw = Path(nnUNet_raw or "") / self.plans_manager.dataset_name
        if folder.is_dir():
            training = self.raters = RaterDataset(training, folder)
            self.raters.refuse_changed(raw, self.dataset_json["file_ending"])
            self.print_to_log_file(f"Raters of {self.raters.count()}, policy {self.rater_policy.policy!r}: {folder}")
        else:
            stated = "raters" in self.configuration_manager.configuration.get(OPTIONS_KEY, {})
            RaterDataset.refuse_without(raw, folder, stated)
            self.print_to_log_file("No raters, training on one annotation of each case, that in labelsTr")
        return training, validation

    @classmethod
    def get_validation_transforms(cls, *args: Any, **kwargs: Any) -> BasicTransform:
        """nnU-Net's, with its non-zero mask kept for a head that wants it."""
        transforms = super().get_validation_transforms(*args, **kwargs)
        return keep_foreground(transforms) if HEADS[cls.head].NEEDS_FOREGROUND else transforms

    def on_train_start(self) -> None:
        """nnU-Net's; the log then says what it starts with."""
        super().on_train_start()
        log_start(self)

    def on_epoch_start(self) -> None:
        """nnU-Net's, and the loss is told how far the training is."""
        super().on_epoch_start()
        self.skipped = []
        self.loss.step.progress = (self.current_epoch + 1) / self.num_epochs
        self.loss.step.epoch_losses = tuple(self.logger.get_value("train_losses", step=None)[: self.current_epoch])

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """nnU-Net's, of this method alone.

        Raises:
            UserError: the checkpoint is torn, of another method, or of other plans.
        """
        file = str(filename_or_checkpoint)  # nnU-Net's cannot load a dict, whatever its signature says
        refuse_code(file)
        check_trainer(file, torch.load(file, map_location="cpu", weights_only=False, mmap=True), type(self).__name__)
        usual = None if self.grad_scaler is None else self.grad_scaler.state_dict()
        with other_network(file):
            super().load_checkpoint(file)
        if usual and self.grad_scaler.get_scale() < LOWEST_USUAL_SCALE:  # lowered by what has been mended since
            low = self.grad_scaler.get_scale()
            self.print_to_log_file(f"Loss scale {usual['scale']:g} in place of {low:.3g} in {file}, lower than usual")
            self.grad_scaler.load_state_dict(usual)

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's, beside and then renamed: who is killed meanwhile leaves the one before."""
        with written_beside(Path(filename)) as beside:
            super().save_checkpoint(str(beside))

    def train_step(self, batch: dict) -> dict:
        """nnU-Net's, on the modalities that :class:`ModalityDropout` leaves.

        A step whose loss or gradient is not finite leaves weights and running statistics as they are; its loss is NaN.

        Raises:
            UserError: more than ``MAX_SKIPPED_STEPS`` such steps in this epoch, or a loss scale below ``LOWEST_SCALE``.
        """
        images = batch["data"]
        if self.dropout is not None:
            network = unwrap(self.network)
            groups = [group for m, group in enumerate(network.groups) if m not in network.unused]
            progress = self.current_epoch / self.num_epochs
            data = batch["data"].to(self.device, non_blocking=True)
            batch = {**batch, "data": self.dropout(data, groups, progress)}
        if self.raters is not None:
            batch = self._with_raters(batch)
        try:
            result, skipped = self._take_step(batch)
            if skipped:
                self._count_skipped(batch, images)
            return result
        finally:
            self.loss.step.raters = None

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """nnU-Net's, of the steps that were not skipped; theirs count as the mean of the others.

        Raises:
            UserError: all steps of the epoch were skipped.
        """
        skipped = max(self._skipped_by_process(), key=len)
        if len(skipped) >= len(train_outputs):
            raise UserError(
                f"{skipped[-1]}; all {len(train_outputs)} steps of this epoch were skipped. {SKIPPED_REMEDY}"
            )
        losses = np.array([output["loss"] for output in train_outputs])
        finite = np.isfinite(losses)
        if finite.any() and not finite.all():  # as many on every process, and in nnU-Net's shape
            train_outputs = [{"loss": np.asarray(loss)} for loss in np.where(finite, losses, losses[finite].mean())]
        super().on_train_epoch_end(train_outputs)

    def _take_step(self, batch: dict) -> tuple[dict, bool]:
        """nnU-Net's step, and whether it counts as skipped."""
        scale = self._loss_scale()
        refuse_small_scale(scale, self.num_skipped, self.log_file)
        self.statistics.keep()
        refused = False
        try:
            result = super().train_step(batch)
        except NonFiniteGradientError:
            result, refused = {"loss": np.array(np.nan, dtype=np.float32)}, True
        except (RuntimeError, IndexError):
            self._refuse_labels(batch)
            raise
        now = self._loss_scale()
        failed = refused or not np.isfinite(result["loss"])
        # statistics may be of another process's batch too
        if failed or now < scale or not self.statistics.finite():
            self.statistics.put_back()
        return result, failed or now < min(scale, LOWEST_USUAL_SCALE)

    def _loss_scale(self) -> float:
        return 1.0 if self.grad_scaler is None else self.grad_scaler.get_scale()

    def _refuse_labels(self, batch: dict) -> None:
        """Raise a UserError if a step failed on labels that dataset.json does not declare."""
        target = batch["target"][0] if isinstance(batch["target"], list) else batch["target"]
        declared = [*self.label_manager.all_labels, self.label_manager.ignore_label or 0]
        for case, labels in zip(batch["keys"], target.cpu(), strict=True):
            if not self.label_manager.has_regions and labels.max() > max(declared):
                raise UserError(
                    f"{case} has label {int(labels.max())}, and dataset.json declares {', '.join(map(str, declared))}; "
                    "correct its label map in labelsTr or dataset.json, and preprocess again"
                )

    def _count_skipped(self, batch: dict, images: Tensor) -> None:
        """Say what was not finite, as far as a second pass shows it, if this is the only process."""
        cases = list(map(str, batch["keys"]))
        channels = self.dataset_json.get("channel_names", self.dataset_json.get("modality", {}))
        found = list(name_nonfinite_input(images, cases, list(map(str, channels.values()))))
        where, nothing = "", "images and, in a second pass, loss are finite"
        if self.is_ddp:  # the other processes would not take part in nnU-Net's Dice of the whole batch
            where = f"process {distributed.get_rank()} of {distributed.get_world_size()}, "
            nothing = "images are finite; see the other processes' (no second pass looks for terms of the loss)"
        else:
            with torch.no_grad(), torch.autocast("cuda") if self.device.type == "cuda" else nullcontext():
                found += name_nonfinite_terms(unwrap(self.network), self.loss, batch, self.device)
            self.statistics.put_back()
        message = (
            f"loss or gradient not finite in epoch {self.current_epoch}, {where}cases {', '.join(cases)}: "
            f"{'; '.join(found) or nothing}"
        )
        self.skipped.append(message)
        self.num_skipped += 1
        self.print_to_log_file(f"Step skipped ({len(self.skipped)} of at most {MAX_SKIPPED_STEPS} an epoch): {message}")
        if len(self.skipped) > MAX_SKIPPED_STEPS:
            raise UserError(
                f"{message}; more than {MAX_SKIPPED_STEPS} steps of this epoch were skipped. {SKIPPED_REMEDY}"
            )

    def _skipped_by_process(self) -> list[list[str]]:
        """What each process said of this epoch's skipped steps; the log, which the first one writes, gets the others'.

        All processes must call it.
        """
        if not self.is_ddp:
            return [self.skipped]
        gathered: list[list[str]] = [[] for _ in range(distributed.get_world_size())]
        distributed.all_gather_object(gathered, self.skipped)
        for message in itertools.chain(*gathered[1:]):
            self.print_to_log_file(f"Step skipped: {message}", also_print_to_console=False)
        return gathered

    def _with_raters(self, batch: dict) -> dict:
        """The batch with the target that the policy makes of its raters; the loss is told all of them."""
        assert self.raters is not None
        own, raters = split_targets(batch["target"], self.raters.num_raters, self.label_manager.has_regions)
        weights = torch.stack([self.raters.weights[key] for key in batch["keys"]])
        raters = [labels.to(self.device, non_blocking=True) for labels in raters]
        if HEADS[self.head].FITS_RATERS:
            self.loss.step.raters = RaterLabels(raters[0], weights.to(self.device, non_blocking=True))
        return {**batch, "target": self.rater_policy(own, raters, weights)}

    def _build_loss(self) -> nn.Module:
        loss = super()._build_loss()
        weights = None
        if self.enable_deep_supervision:
            loss, weights = loss.loss, loss.weight_factors
            if len(weights) == 1:  # two stages: nnU-Net takes the coarsest weight away, which leaves NaN
                weights = (1.0,)
        soft = self.rater_policy.policy == MEAN
        return build_objective(unwrap(self.network), loss, weights, self.label_manager, soft)


def split_group(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
    """Move the parameters of ``group`` out of the optimiser's first group into a group with settings of its own."""
    own = {id(parameter) for parameter in group["params"]}
    first = optimizer.param_groups[0]
    first["params"] = [parameter for parameter in first["params"] if id(parameter) not in own]
    group["weight_decay"] = first["weight_decay"] * group.pop("weight_decay_scale", 1.0)
    optimizer.add_param_group(group)


def know_placeholders(plans: dict[str, Any]) -> None:
    """Let a model's plans decode placeholders of absent modalities when it predicts; without any nothing changes."""
    for configuration in plans["configurations"].values():
        if configuration.get("preprocessor_name") == STOCK_PREPROCESSOR:
            configuration["preprocessor_name"] = PREPROCESSOR


def check_modalities(
    backbone: str, configuration_manager: ConfigurationManager, dataset_json: dict, dataset_name: str
) -> None:
    """Raise a ValueError if the dataset has fewer modalities than the backbone needs."""
    groups = configuration_manager.configuration.get("nnunet_multimodal", {}).get("modalities")
    num_modalities = len(groups or configuration_manager.normalization_schemes)
    needed = BACKBONES[backbone].MIN_MODALITIES
    if num_modalities < needed:
        channels = dataset_json.get("channel_names", dataset_json.get("modality", {}))
        raise ValueError(
            f"{dataset_name} has {num_modalities} modality ({', '.join(map(str, channels.values()))}) and {backbone} "
            f"needs at least {needed} to fuse; train it with -tr nnUNetTrainer or -tr EarlyFusionTrainer instead"
        )
