"""Output heads: decoder features to a distribution over logit maps. The registry is the only list of them."""

from nnunet_multimodal.heads.base import Head
from nnunet_multimodal.heads.deterministic import DeterministicHead
from nnunet_multimodal.heads.mose import MoSEHead
from nnunet_multimodal.heads.ssn import SSNDiagonalHead, SSNHead

HEADS: dict[str, type[Head]] = {
    "deterministic": DeterministicHead,
    "mose": MoSEHead,
    "ssn": SSNHead,
    "ssn_diagonal": SSNDiagonalHead,
}
