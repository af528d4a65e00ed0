"""Cross-modal random network prediction (Wang et al., ECCV 2022) as an nnU-Net trainer."""

from nnunet_multimodal.lookup import length_suffixes
from nnunet_multimodal.trainer import MultimodalTrainer


class CRNPTrainer(MultimodalTrainer):
    """One encoder per modality, fused at the bottleneck by the uncertainty that CRNP sees in the other modalities."""

    backbone = "crnp"
    head = "deterministic"


__getattr__ = length_suffixes(CRNPTrainer)
