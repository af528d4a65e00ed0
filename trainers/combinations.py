"""The trainers: every backbone with every output head, named after both (see ``nnunet_multimodal.lookup``).

Nothing is written for a combination; its class is made when nnU-Net asks for its name, with or without a length.
"""

from nnunet_multimodal.lookup import COMBINATIONS, trainers_of_combinations
from nnunet_multimodal.trainer import MultimodalTrainer

__all__ = sorted(COMBINATIONS)
__getattr__ = trainers_of_combinations(__name__, MultimodalTrainer)
