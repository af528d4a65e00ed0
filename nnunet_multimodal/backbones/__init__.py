"""Backbones: image channels to decoder features. One file each; the registry is the only list of them."""

from nnunet_multimodal.backbones.base import Backbone
from nnunet_multimodal.backbones.crnp import CRNPBackbone
from nnunet_multimodal.backbones.early import EarlyFusionBackbone

BACKBONES: dict[str, type[Backbone]] = {
    "early": EarlyFusionBackbone,
    "crnp": CRNPBackbone,
}
