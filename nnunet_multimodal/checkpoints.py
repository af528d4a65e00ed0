"""Models of strangers: loading one unpickles checkpoints and imports what plans name, so both are read first."""

from __future__ import annotations

import os
import pickle
import pydoc
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnunet_multimodal.errors import UserError
from nnunet_multimodal.lookup import split_length

# what nnU-Net's logging puts into its checkpoints beyond tensors; both names of NumPy's module
HARMLESS = frozenset(
    {"numpy.dtype", "numpy.ndarray", "_codecs.encode"}
    | {f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")}
)
HARMLESS_DTYPE = re.compile(r"numpy\.dtypes\.[A-Za-z0-9]+DType")  # no further dot: it would be an attribute's attribute
LAYERS = ("torch.nn.", "dynamic_network_architectures.", "nnunetv2.", "nnunet_multimodal.")
ARCHITECTURES = "dynamic_network_architectures.architectures"


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
    except (RuntimeError, OSError, ValueError, EOFError, IndexError, struct.error, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{file} is not a whole checkpoint as torch.save writes it ({reason}); copy it again or train anew"
        ) from error
    unknown = sorted(name for name in named - HARMLESS if not HARMLESS_DTYPE.fullmatch(name))
    if unknown:
        raise UserError(
            f"{file} would import {', '.join(unknown)} when loaded, which nnU-Net's checkpoints do not, and could run "
            "any code; if you trust where it comes from, use nnUNetv2_predict"
        )


def refuse_plans(file: str | os.PathLike, plans: Mapping[str, Any]) -> None:
    """Refuse plans of which a network would import anything but layers and networks of torch, nnU-Net and ours.

    Nothing of other packages is imported for it, and nothing called.

    Args:
        file: where the plans are from.
        plans: nnU-Net's; configurations of before nnU-Net 2.4 import nothing that they name.

    Raises:
        UserError: a configuration names something else.
    """
    for name, configuration in plans["configurations"].items():
        if "architecture" in configuration:
            network = configuration["architecture"]["network_class_name"]
            if not _is_module(network, LAYERS) and not _is_moved(network):
                raise _not_a_module(f"{file}: network_class_name of {name}", network, LAYERS)
            refuse_layers(f"{file}: {name}", configuration["architecture"], LAYERS)


def refuse_layers(where: str, architecture: Mapping[str, Any], packages: tuple[str, ...] = ("",)) -> None:
    """Refuse what a network's arguments name for import unless it is a class of layers; none of it is called.

    Args:
        where: file and configuration, for the message.
        architecture: of a configuration of nnU-Net's plans, with ``arch_kwargs`` and ``_kw_requires_import``.
        packages: beginnings of names that may be imported; any installed package if not given.

    Raises:
        UserError: something is no class of layers, or of another package.
    """
    for key in architecture["_kw_requires_import"]:
        named = architecture["arch_kwargs"].get(key)
        if named is not None and not _is_module(named, packages):
            raise _not_a_module(f"{where}: {key}", named, packages)


def _is_module(name: Any, packages: tuple[str, ...]) -> bool:
    """Whether a name is, and is defined, in one of the packages, and is a subclass of ``nn.Module``."""
    if not isinstance(name, str) or not name.startswith(packages):
        return False
    found = _locate(name)
    return isinstance(found, type) and issubclass(found, nn.Module) and f"{found.__module__}.".startswith(packages)


def _locate(name: str) -> Any:
    """What nnU-Net imports for a name; None if there is nothing, False if its module does not work."""
    try:
        return pydoc.locate(name)
    except pydoc.ErrorDuringImport:
        return False


def _is_moved(name: Any) -> bool:
    """Whether it is a U-Net's name of before it moved; nnU-Net then looks for its last part in all architectures."""
    package, _, last = str(name).rpartition(".")
    return (
        package.startswith(ARCHITECTURES)
        and _locate(name) is None
        and _is_module(f"{ARCHITECTURES}.unet.{last}", LAYERS)
    )


def _not_a_module(where: str, name: Any, packages: tuple[str, ...]) -> UserError:
    of = f" of {', '.join(package[:-1] for package in packages)}" if packages != ("",) else ""
    return UserError(
        f"{where} is {name!r}, which is no class of layers (torch.nn.Module){of} and could run any code; correct it"
        + (", or use nnUNetv2_predict if you trust where it comes from" if of else "")
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
