"""Backbones: image channels to decoder features. One file each; the registry is the only list of them."""

from nnunet_multimodal.backbones.base import Backbone
from nnunet_multimodal.backbones.ciml import CIMLBackbone
from nnunet_multimodal.backbones.crnp import CRNPBackbone
from nnunet_multimodal.backbones.early import EarlyFusionBackbone
from nnunet_multimodal.backbones.shaspec import ShaSpecBackbone

BACKBONES: dict[str, type[Backbone]] = {
    "early": EarlyFusionBackbone,
    "crnp": CRNPBackbone,
    "shaspec": ShaSpecBackbone,
    "ciml": CIMLBackbone,
}
