"""Checkpoints of strangers: loading one unpickles it, which can run any code, so what it asks for is read first."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nnunet_multimodal.errors import UserError
from nnunet_multimodal.lookup import split_length

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
    except (RuntimeError, OSError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file} is not a whole checkpoint ({reason}); copy it again or train anew") from error
    unknown = sorted(name for name in named - HARMLESS if not name.startswith("numpy.dtypes."))
    if unknown:
        raise UserError(
            f"{file} would import {', '.join(unknown)} when loaded, which nnU-Net's checkpoints do not, and could run "
            "any code; if you trust where it comes from, use nnUNetv2_predict"
        )


def check_trainer(file: str | os.PathLike, checkpoint: Mapping[str, Any], trainer: str) -> None:
    """Refuse a checkpoint of another method, whatever the length of its training.

    Raises:
        UserError: it is one, or no checkpoint of nnU-Net v2.
    """
    theirs = checkpoint.get("trainer_name") if isinstance(checkpoint, Mapping) else None
    if theirs is None or "network_weights" not in checkpoint:
        raise UserError(f"{file} has no trainer_name or no network_weights: it is not a checkpoint of nnU-Net v2")
    if split_length(theirs)[0] != split_length(trainer)[0]:
        raise UserError(f"{file} is of {theirs}, not of {trainer}; give -tr {theirs}, or put the right one there")


def check_model(files: Sequence[Path]) -> None:
    """Refuse checkpoints of other methods than the one that their model's folder names.

    Raises:
        UserError: see :func:`check_trainer`.
    """
    for file in files:
        trainer = file.parents[1].name.split("__")[0]
        check_trainer(file, torch.load(file, map_location="cpu", weights_only=False, mmap=True), trainer)


@contextmanager
def other_network(file: str | os.PathLike) -> Iterator[None]:
    """Say whose weights do not fit.

    Raises:
        UserError: a network refuses them.
    """
    try:
        yield
    except RuntimeError as error:
        if "state_dict" not in str(error):
            raise
        first = str(error).splitlines()[1].strip()
        raise UserError(
            f"{file} has other weights than the network of its plans.json and dataset.json ({first[:200]}); use those "
            "that it was trained with, and that version of nnunet_multimodal"
        ) from error
