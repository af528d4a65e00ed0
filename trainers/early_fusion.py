"""Early fusion (nnU-Net's own way to use several channels) built from this project's parts."""

from nnunet_multimodal.lookup import length_suffixes
from nnunet_multimodal.trainer import MultimodalTrainer


class EarlyFusionTrainer(MultimodalTrainer):
    """Plain nnU-Net's network, one encoder for all channels: the control for every other backbone."""

    backbone = "early"
    head = "deterministic"


__getattr__ = length_suffixes(EarlyFusionTrainer)
