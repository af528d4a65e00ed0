"""Mean fusion: one encoder for every modality, and the mean of what it sees.

Havaei, Guizard, Chapados, Bengio: *HeMIS: Hetero-Modal Image Segmentation*, MICCAI 2016. Implements the first moment of
its abstraction layer, at every stage of nnU-Net's U-Net.

Deviations from the paper, each with its reason:

- One encoder instead of one for each modality: it keeps the example short.
- The variance, the paper's second moment, is left out: likewise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnunet_multimodal.backbones.base import FURTHER_PASS, Backbone, BackboneOutput, UNetTopology, append_cascade


class MeanFusionBackbone(Backbone):
    """Encodes the modalities one by one with the same weights and averages those that are present."""

    def __init__(
        self, topology: UNetTopology, num_modalities: int, channels_per_modality: int, cascade_channels: int
    ) -> None:
        super().__init__()
        self.num_modalities = num_modalities
        self.encoder = topology.build_encoder(channels_per_modality + cascade_channels)
        self.decoder = topology.build_decoder()

    def forward(self, x: Tensor, cascade: Tensor, present: Tensor) -> BackboneOutput:
        """See ``nnunet_multimodal.backbones.base``."""
        x = append_cascade(x, cascade)  # (B, M, G + K, *D)
        weights = present / present.sum(1, keepdim=True)  # (B, M), zero where absent
        stages = [stage.unflatten(0, x.shape[:2]) for stage in self.encoder(x.flatten(0, 1))]  # each (B, M, F, *D)
        skips = [torch.einsum("bm,bm...->b...", weights.to(stage.dtype), stage) for stage in stages]
        return BackboneOutput(self.decoder(skips), skips[-1])

    def compute_conv_feature_map_size(self, patch_size: Sequence[int]) -> int:
        """Feature map elements of one sample: what planning makes patch and batch from."""
        encoder = self.encoder.compute_conv_feature_map_size(patch_size)
        further = FURTHER_PASS * (self.num_modalities - 1) * encoder
        return int(encoder + further + self.decoder.compute_conv_feature_map_size(patch_size))

    def encoder_modalities(self) -> dict[str, list[list[int]]]:
        """One encoder, which sees the modalities one after the other."""
        return {"encoder": [[modality] for modality in range(self.num_modalities)]}
