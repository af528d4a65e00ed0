"""Attribution of labels to image channels by captum, over nnU-Net's tiles: integrated gradients or Grad-CAM.

What is attributed is the sum of a label's logits over the voxels that are given to it. Integrated gradients
(Sundararajan et al., ICML 2017) are taken from an image of zeros, the mean of a normalised modality. Grad-CAM
(Selvaraju et al., ICCV 2017) has one map for all channels, from the finest stage of the decoder; multiplied by each
channel's input times gradient it tells them apart. Its weights are averaged over the label's voxels of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnunet_multimodal.decomposition import output_names
from nnunet_multimodal.errors import UserError
from nnunet_multimodal.inference.base import ModelPredictor, Preprocessed
from nnunet_multimodal.network import MultimodalUNet, unwrap

METHODS = ("integrated_gradients", "gradcam")


class AttributionPredictor(ModelPredictor):
    """nnU-Net's tiles, for attributions instead of logits."""

    _method: str
    _steps: int
    _channels: int

    def check(self, method: str, steps: int) -> None:
        """Prepare.

        Raises:
            UserError: captum is not there, several folds, or no steps.
        """
        if find_spec("captum") is None:
            raise UserError("--attribution needs captum: pip install 'nnunet-multimodal[explain]'")
        if len(self.list_of_parameters) > 1:
            raise UserError(f"{len(self.list_of_parameters)} folds have attributions of their own; name one with -f")
        if steps < 1:
            raise UserError(f"--steps {steps}: at least one is needed")
        self._method, self._steps = method, steps
        network = unwrap(self.network)
        if method == "gradcam" and _finest_stage(network) is None:
            raise UserError(
                f"{self.trainer_name} has a decoder for each segmentor and no common features for Grad-CAM; its maps "
                "in complementary/ are Grad-CAM, or use --attribution integrated_gradients"
            )

    def outputs(self) -> dict[str, int]:
        """Names of what is attributed, with their output channels."""
        return output_names(self.dataset_json, self.plans_manager.get_label_manager(self.dataset_json))

    def explain(self, preprocessed: Preprocessed) -> tuple[np.ndarray, np.ndarray]:
        """Maps on the image's grid (L, C, *spatial) of L outputs and C image channels, and shares (L, C).

        A share is a channel's part of the sum of absolute values over the voxels that are given to the output; NaN
        where there are none. Over a whole image noise would outweigh them, and signed sums cancel: instance
        normalisation makes a network blind to the scale of an image.
        """
        network = unwrap(self.network)
        network.load_state_dict(self.list_of_parameters[0])
        network.to(self.device).eval().requires_grad_(False)
        self._channels = len(preprocessed.absent)
        shape = len(self.outputs()), self._channels
        blended = self.blend(preprocessed.data, math.prod(shape) + shape[0], self._attribute)
        maps, given = blended[: -shape[0]], blended[-shape[0] :] > 0.5
        shares = np.full(shape, np.nan)
        for index, own in enumerate(maps.split(shape[1])):
            total = (own.abs() * given[index]).flatten(1).double().sum(1).numpy()
            if total.sum() > 0:
                shares[index] = total / total.sum()
        whole = [self.to_image_grid(own, preprocessed.properties) for own in maps.split(shape[1])]
        return np.stack(whole), shares

    @torch.enable_grad()
    def _attribute(self, x: Tensor) -> Tensor:
        """Attributions (1, L * C + L, *D) of a tile (1, K, *D), and behind them the voxels that are given to each."""
        network, outputs = unwrap(self.network), list(self.outputs().values())
        absent = x.isnan()
        x = x.masked_fill(absent, 0)

        def logits(images: Tensor) -> Tensor:
            images = images.masked_fill(absent, torch.nan) if isinstance(network, MultimodalUNet) else images
            with self.half_precision():
                return network(images).float()

        with torch.no_grad():
            found = logits(x)
            has_regions = self.plans_manager.get_label_manager(self.dataset_json).has_regions
            given = found > 0 if has_regions else one_hot(found)

        def scores(images: Tensor) -> Tensor:
            return (logits(images) * given).flatten(2).sum(2)

        maps = []
        for channel in outputs:
            fraction = given[:, channel].float().mean()
            # Grad-CAM averages the gradient over the tile; over the output's voxels, tiles are on one scale
            scale = 1 / fraction if self._method == "gradcam" else 1.0
            nothing = torch.zeros_like(x)
            maps.append(scale * self._captum(scores, network, x, channel) if fraction > 0 else nothing)
        attributed = torch.stack(maps, 1)[:, :, : self._channels].flatten(1, 2).detach()
        return torch.cat((attributed, given[:, outputs].to(attributed.dtype)), 1)

    def _captum(self, scores: Callable[[Tensor], Tensor], network: Any, x: Tensor, channel: int) -> Tensor:
        from captum.attr import InputXGradient, IntegratedGradients, LayerGradCam

        if self._method == "integrated_gradients":
            return IntegratedGradients(scores).attribute(x, target=channel, n_steps=self._steps, internal_batch_size=1)
        cam = LayerGradCam(scores, _finest_stage(network)).attribute(x, target=channel, relu_attributions=True)
        return cam * InputXGradient(scores).attribute(x.requires_grad_(), target=channel)


def one_hot(logits: Tensor) -> Tensor:
    """The most likely class (B, C, *D), bool."""
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, logits.argmax(1, keepdim=True), True)


def _finest_stage(network: Any) -> nn.Module | None:
    decoder = getattr(network.backbone if isinstance(network, MultimodalUNet) else network, "decoder", None)
    stages = getattr(decoder, "stages", None)
    return None if stages is None else stages[-1]
