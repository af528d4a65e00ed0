"""``python -m nnunet_multimodal``: what torchrun can start."""

from nnunet_multimodal.cli import entry_point

entry_point()
