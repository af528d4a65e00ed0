"""Output heads: decoder features to a distribution over logit maps. The registry is the only list of them."""

from nnunet_multimodal.heads.base import Head
from nnunet_multimodal.heads.deterministic import DeterministicHead

HEADS: dict[str, type[Head]] = {
    "deterministic": DeterministicHead,
}
