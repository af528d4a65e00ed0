"""Output heads: decoder features to a distribution over logit maps. The registry is the only list of them."""

from torch import nn

from nnunet_multimodal.heads.deterministic import DeterministicHead

HEADS: dict[str, type[nn.Module]] = {
    "deterministic": DeterministicHead,
}
