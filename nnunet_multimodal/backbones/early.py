"""Early fusion: all channels enter one encoder, as in nnU-Net itself (Isensee et al., Nature Methods 18, 2021).

With the deterministic head this is nnU-Net's U-Net layer by layer: equal weights give equal outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnunet_multimodal.backbones.base import Backbone, BackboneOutput, UNetTopology


class EarlyFusionBackbone(Backbone):
    """One encoder and one decoder; an absent modality is a channel of zeros."""

    def __init__(
        self, topology: UNetTopology, num_modalities: int, channels_per_modality: int, cascade_channels: int
    ) -> None:
        super().__init__()
        self.num_modalities = num_modalities
        self.encoder = topology.build_encoder(num_modalities * channels_per_modality + cascade_channels)
        self.decoder = topology.build_decoder()

    def forward(self, x: Tensor, cascade: Tensor, present: Tensor) -> BackboneOutput:
        """See ``nnunet_multimodal.backbones.base``."""
        skips = self.encoder(torch.cat((x.flatten(1, 2), cascade), 1))
        return BackboneOutput(self.decoder(skips), skips[-1])

    def compute_conv_feature_map_size(self, patch_size: Sequence[int]) -> int:
        """Feature map elements of one sample, nnU-Net's measure of memory."""
        return self.encoder.compute_conv_feature_map_size(patch_size) + self.decoder.compute_conv_feature_map_size(
            patch_size
        )

    def encoder_modalities(self) -> dict[str, list[list[int]]]:
        """One encoder, which sees all modalities together."""
        return {"encoder": [list(range(self.num_modalities))]}
