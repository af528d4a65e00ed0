"""Training steps whose loss or gradient is not finite: named, skipped, counted, and too many of them an error.

nnU-Net's GradScaler skips them on a GPU, without a word; without it, on a CPU, one of them would turn all weights into
NaN. That the scaler lowers its scale now and then is as it should be; below ``LOWEST_USUAL_SCALE`` it counts, and below
``LOWEST_SCALE`` training stops. Running statistics (BatchNorm) are written by the forward pass, so both would let NaN
into them: they are put back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from nnunet_multimodal.errors import UserError
from nnunet_multimodal.losses import Objective

MAX_SKIPPED_STEPS = 10  # in an epoch
SKIPPED_REMEDY = "Mend what is named here or lower the learning rate, and go on from the last checkpoint with --c"
LOWEST_USUAL_SCALE = 1.0  # of the loss in half precision
# 2^-10 of the loss, as far below 1 as the skipped steps of an epoch may lead. Half precision has 0 for what is below
# 2^-24, so for gradients below 2^-14; a voxel's share of cross-entropy, a mean over 2^22 voxels, is 0 long since.
LOWEST_SCALE = 2.0**-MAX_SKIPPED_STEPS


class NonFiniteGradientError(RuntimeError):
    """The optimiser was about to step with it."""


def refuse_nonfinite_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """For ``torch.optim.Optimizer.register_step_pre_hook``.

    Raises:
        NonFiniteGradientError: a gradient is not finite.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        torch.nn.utils.clip_grad_norm_(parameters, math.inf, error_if_nonfinite=True)
    except RuntimeError as error:
        raise NonFiniteGradientError(str(error)) from error


def refuse_small_scale(scale: float, skipped: int, log_file: str) -> None:
    """Before a step: gradients would become 0 and the training stand still, without a word.

    Args:
        scale: GradScaler's.
        skipped: steps so far, of all epochs.
        log_file: where they are named.

    Raises:
        UserError: the scale is below ``LOWEST_SCALE``.
    """
    if scale < LOWEST_SCALE:
        raise UserError(
            f"loss scale {scale:.3g} is below {LOWEST_SCALE:.3g}, where gradients become 0 in half precision, after "
            f"{skipped} skipped steps in all epochs since the start or --c; {log_file} names them. {SKIPPED_REMEDY}, "
            "which begins with the usual scale"
        )


class RunningStatistics:
    """What layers such as BatchNorm keep of the batches that they have seen.

    Args:
        network: of any layers; most have none such, and nothing is then kept.
    """

    def __init__(self, network: nn.Module) -> None:
        self.layers = [layer for layer in network.modules() if isinstance(layer, _NormBase)]
        self._kept: list[Tensor] = []

    def buffers(self) -> list[Tensor]:
        """Means, variances and numbers of batches."""
        return [buffer for layer in self.layers for buffer in layer.buffers(recurse=False)]

    def keep(self) -> None:
        """Copy them, before a step."""
        self._kept = [buffer.clone() for buffer in self.buffers()]

    def put_back(self) -> None:
        """Make them what they were when they were kept."""
        for buffer, kept in zip(self.buffers(), self._kept, strict=True):
            buffer.copy_(kept)

    def finite(self) -> bool:
        """Whether all are; waits for the GPU if there are any."""
        found = [buffer.isfinite().all() for buffer in self.buffers()]
        return not found or bool(torch.stack(found).all())


def name_nonfinite_input(data: Tensor, cases: Sequence[str], channels: Sequence[str]) -> Iterator[str]:
    """Which modality of which case has infinite voxels; NaN stands for absent modalities and does no harm.

    Args:
        data: (B, channels, *D), images first.
        cases: B names.
        channels: names of the image channels.
    """
    for case, image in zip(cases, data, strict=True):
        for channel, values in zip(channels, image[: len(channels)], strict=True):
            infinite = int(values.isinf().sum())
            if infinite:
                yield f"{channel} of {case} has {infinite} infinite voxels"


def name_nonfinite_terms(network: Any, loss: Objective, batch: Mapping[str, Any], device: torch.device) -> list[str]:
    """Cases whose logits are not finite, and terms of the loss that are not, in another pass.

    Args:
        network: in training mode.
        loss: its objective.
        batch: nnU-Net's, with ``data``, ``target`` and ``keys``.
        device: the network's.
    """
    output = network(batch["data"].to(device))
    finite = output[0].isfinite().flatten(1).all(1).tolist()
    found = [f"logits of {case}" for case, fine in zip(batch["keys"], finite, strict=True) if not fine]
    target = batch["target"]
    target = [level.to(device) for level in target] if isinstance(target, list) else target.to(device)
    terms = loss.terms(output, target)
    return found + [f"loss term {name!r}" for name, value in terms.items() if not value.isfinite().all()]
