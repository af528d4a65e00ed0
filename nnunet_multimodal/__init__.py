"""Multi-modal medical image segmentation inside nnU-Net.

Importing this package is cheap (no torch, no nnU-Net) because every start of Python in an environment that has it
does so: ``nnunet_multimodal._startup`` is what makes nnU-Net find our trainers and planners.
"""

import os.path

from nnunet_multimodal import _startup

__version__ = "0.1.0"

# The wheel holds trainers/ and plans/ as subpackages. In an editable install they lie beside this folder.
_repository = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if not os.path.isdir(os.path.join(os.path.dirname(os.path.abspath(__file__)), "trainers")):
    __path__.append(_repository)

_startup.install()
