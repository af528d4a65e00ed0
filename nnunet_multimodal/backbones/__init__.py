"""Backbones: image channels to decoder features. One file each; the registry is the only list of them."""

from torch import nn

from nnunet_multimodal.backbones.crnp import CRNPBackbone
from nnunet_multimodal.backbones.early import EarlyFusionBackbone

BACKBONES: dict[str, type[nn.Module]] = {
    "early": EarlyFusionBackbone,
    "crnp": CRNPBackbone,
}
