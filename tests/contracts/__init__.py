"""What every method promises. A method's test file subclasses these and says which method it is.

``NetworkContract`` checks backbone and head as a network; ``TrainerContract`` runs nnU-Net's own commands.
"""

from tests.contracts.network import MODALITIES, NetworkContract, unet_kwargs, with_absent
from tests.contracts.trainer import TrainerContract, fixed_batches, interrupt_second_epoch

__all__ = [
    "MODALITIES",
    "NetworkContract",
    "TrainerContract",
    "fixed_batches",
    "interrupt_second_epoch",
    "unet_kwargs",
    "with_absent",
]
