"""Attribution of labels to image channels by captum, over nnU-Net's tiles: integrated gradients or Grad-CAM.

What is attributed is the sum of a label's logits over the voxels that are given to it. Integrated gradients
(Sundararajan et al., ICML 2017) are taken from an image of zeros, the mean of a normalised modality. Grad-CAM
(Selvaraju et al., ICCV 2017) has one map for all channels, from the finest stage of the decoder; multiplied by each
channel's input times gradient it tells them apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
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
    """nnU-Net's sliding window over attributions instead of logits."""

    _method: str
    _steps: int
    _channels: int
    label_manager: Any

    def check(self, method: str, steps: int) -> None:
        """Prepare.

        Raises:
            UserError: captum is not there, several folds, or no steps.
        """
        try:
            import captum.attr  # noqa: F401
        except ImportError as error:
            raise UserError("--attribution needs captum: pip install 'nnunet-multimodal[explain]'") from error
        if len(self.list_of_parameters) > 1:
            raise UserError(f"{len(self.list_of_parameters)} folds have attributions of their own; name one with -f")
        if steps < 1:
            raise UserError(f"--steps {steps}: at least one is needed")
        self._method, self._steps = method, steps
        network = self._plain_network()
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
        network = self._plain_network()
        network.load_state_dict(self.list_of_parameters[0])
        network.to(self.device).eval().requires_grad_(False)
        self._channels = len(preprocessed.absent)
        shape = len(self.outputs()), self._channels
        number = math.prod(shape) + shape[0]
        labels, self.label_manager = self.label_manager, SimpleNamespace(num_segmentation_heads=number)
        try:
            blended = self.predict_logits_from_preprocessed_data(preprocessed.data).float()
        finally:
            self.label_manager = labels
        maps, given = blended[: -shape[0]], blended[-shape[0] :] > 0.5
        total = (maps.abs().unflatten(0, shape) * given[:, None]).double().flatten(2).sum(2)
        shares = (total / total.sum(1, keepdim=True)).cpu().numpy()
        whole = self.to_image_grid(maps, preprocessed.properties)
        return whole.reshape(*shape, *whole.shape[1:]), shares

    def _plain_network(self) -> Any:
        network = unwrap(self.network)
        if not isinstance(network, MultimodalUNet):
            network.decoder.deep_supervision = False
        return network

    def _internal_maybe_mirror_and_predict(self, x: Tensor) -> Tensor:
        # nnU-Net predicts in inference mode, in which nothing has a gradient
        with torch.inference_mode(False), torch.enable_grad():
            return self._attribute(x.clone())

    def _attribute(self, x: Tensor) -> Tensor:
        """Attributions (1, L * C + L, *D) of a tile (1, K, *D), and behind them the voxels that are given to each."""
        network, outputs = self._plain_network(), list(self.outputs().values())
        absent = x.isnan()
        x = x.masked_fill(absent, 0)

        def logits(images: Tensor) -> Tensor:
            return network(images.masked_fill(absent, torch.nan) if isinstance(network, MultimodalUNet) else images)

        with torch.no_grad():
            found = logits(x)
            has_regions = self.plans_manager.get_label_manager(self.dataset_json).has_regions
            given = found > 0 if has_regions else one_hot(found)

        def scores(images: Tensor) -> Tensor:
            return (logits(images) * given).flatten(2).sum(2)

        maps = [self._captum(scores, network, x, c) if given[:, c].any() else torch.zeros_like(x) for c in outputs]
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
    return None if decoder is None else decoder.stages[-1]
