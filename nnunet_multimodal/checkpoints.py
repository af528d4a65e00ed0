"""Models of strangers: loading one unpickles checkpoints and imports what plans name, so both are read first."""

from __future__ import annotations

import io
import os
import pickle
import pydoc
import re
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
NUMBERS = re.compile(r"[biufc]\d+")  # what NumPy pickles of the type of an array of numbers
LAYERS = ("torch.nn.", "dynamic_network_architectures.", "nnunetv2.", "nnunet_multimodal.")
ARCHITECTURES = "dynamic_network_architectures.architectures"


class _Inert:
    """What stands for everything that a checkpoint names, and takes whatever is done with it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...


class _NotNumbersError(Exception):
    """An array or its type, in words."""


class _InertType(_Inert):
    """``numpy.dtype``: that of numbers alone, in NumPy's own words."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if not args or not isinstance(args[0], str) or not NUMBERS.fullmatch(args[0]):
            raise _NotNumbersError(f"type {', '.join(map(str, args))}")
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or state[2:] != (None, None, None, -1, -1, 0):  # the last says: no objects
            raise _NotNumbersError(f"type with state {state}")


class _InertArray(_Inert):
    """``numpy.ndarray``: NumPy pickles its name, and never a call, which would lay any bytes out as objects."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        raise _NotNumbersError("call of numpy.ndarray")


class _InertUnpickler(pickle.Unpickler):
    """Reads a checkpoint's pickle; nothing that it names is imported or called."""

    def find_class(self, module: str, name: str) -> Any:
        """Something inert."""
        return {"numpy.dtype": _InertType, "numpy.ndarray": _InertArray}.get(f"{module}.{name}", _Inert)

    def persistent_load(self, pid: Any) -> Any:
        """A tensor's storage."""
        return None


def refuse_code(file: str | os.PathLike) -> None:
    """Refuse a checkpoint with more than tensors, numbers, text and arrays of numbers; none of it is made for that.

    An array of objects made of bytes would take these for addresses. Before torch 2.6, which cannot tell what a
    checkpoint names, nothing is refused.

    Raises:
        UserError: it names or holds something else, or is no checkpoint.
    """
    read = getattr(torch.serialization, "get_unsafe_globals_in_checkpoint", None)
    if read is None:
        return
    with _whole(file):
        unknown = sorted(set(read(file)) - HARMLESS)
    if unknown:
        raise UserError(
            f"{file} would import {', '.join(unknown)} when loaded, which nnU-Net's checkpoints do not, and could run "
            "any code; if you trust where it comes from, use nnUNetv2_predict"
        )
    try:
        with _whole(file), open(file, "rb") as opened:  # torch's own opening of a path wants it to be UTF-8
            pickled = torch._C.PyTorchFileReader(opened).get_record("data.pkl")
            _InertUnpickler(io.BytesIO(pickled), encoding="utf-8").load()
    except _NotNumbersError as error:
        raise UserError(
            f"{file} has an array that is not of numbers ({error}), which nnU-Net's checkpoints have not, and which "
            "could crash Python or run any code; if you trust where it comes from, use nnUNetv2_predict"
        ) from error


@contextmanager
def _whole(file: str | os.PathLike) -> Iterator[None]:
    """Say that a checkpoint is damaged, whatever that makes torch or pickle raise."""
    try:
        yield
    except _NotNumbersError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{file} is not a whole checkpoint as torch.save writes it ({reason}); copy it again or train anew"
        ) from error


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
