"""Checkpoints of strangers: loading one unpickles it, which can run any code, so what it asks for is read first."""

from __future__ import annotations

import os
import pickle

import torch

from nnunet_multimodal.errors import UserError

# what nnU-Net's logging puts into its checkpoints beyond tensors; both names of NumPy's module
HARMLESS = frozenset(
    {"numpy.dtype", "numpy.ndarray", "_codecs.encode"}
    | {f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")}
)


def refuse_code(file: str | os.PathLike) -> None:
    """Refuse a checkpoint with more than tensors, numbers, text and arrays; the file is not unpickled for it.

    Before torch 2.6, which cannot tell, nothing is refused.

    Raises:
        UserError: it names something else, or is no checkpoint.
    """
    read = getattr(torch.serialization, "get_unsafe_globals_in_checkpoint", None)
    if read is None:
        return
    try:
        named = set(read(file))
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file} is not a whole checkpoint ({reason}); copy it again or train anew") from error
    unknown = sorted(name for name in named - HARMLESS if not name.startswith("numpy.dtypes."))
    if unknown:
        raise UserError(
            f"{file} would import {', '.join(unknown)} when loaded, which nnU-Net's checkpoints do not, and could run "
            "any code; if you trust where it comes from, use nnUNetv2_predict"
        )
