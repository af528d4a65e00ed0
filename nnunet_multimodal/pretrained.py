"""``-pretrained_weights`` of a stock nnU-Net checkpoint for our networks: what is loaded, and how.

Taken over: every encoder, every decoder, and nothing else (nnU-Net never transfers segmentation layers). A network with
an encoder that sees the modalities one by one starts from the mean of the checkpoint's first convolution over
its image channels; an encoder of one modality takes its own channels. What a method adds (fusion, reductions) keeps its
initialisation and is listed. Of a checkpoint of ours the whole backbone is taken over, but for segmentation layers, and
nothing of the head.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nnunet_multimodal.checkpoints import refuse_code
from nnunet_multimodal.errors import UserError
from nnunet_multimodal.network import MultimodalUNet, unwrap


def load_pretrained_weights(stock: Callable[..., None], network: nn.Module, fname: str, verbose: bool = False) -> None:
    """nnU-Net's ``load_pretrained_weights``, with stock checkpoints for our networks.

    Args:
        stock: nnU-Net's function, for every other case.
        network: the network in training, wrapped or not.
        fname: checkpoint file.
        verbose: as nnU-Net's.

    Raises:
        ValueError: the checkpoint is of a network with another topology.
        UserError: it is no checkpoint of nnU-Net, or would run code.
    """
    ours = unwrap(network)
    if not isinstance(ours, MultimodalUNet):
        return stock(network, fname, verbose)
    refuse_code(fname)
    checkpoint = torch.load(fname, map_location="cpu", weights_only=False)
    if not isinstance(checkpoint, dict) or "network_weights" not in checkpoint:
        raise UserError(f"{fname} has no network_weights: it is not a checkpoint of nnU-Net v2")
    weights = checkpoint["network_weights"]
    own = any(key.startswith("backbone.") for key in weights)
    loaded = backbone_weights(ours, weights, fname) if own else stock_weights(ours, weights, fname)
    kept = [key for key in ours.state_dict() if key not in loaded]
    ours.load_state_dict({**ours.state_dict(), **loaded})
    parts = sorted({".".join(key.split(".")[:3]) for key in kept})
    what = "checkpoint" if own else "stock checkpoint"
    print(f"################### Loaded {len(loaded)} tensors of the {what} {fname} ###################")
    print(f"{'The backbone is' if own else 'Encoder and decoder are'} taken over. Initialised anew: {', '.join(parts)}")
    return None


def backbone_weights(
    network: MultimodalUNet, weights: dict[str, Tensor], fname: str | os.PathLike
) -> dict[str, Tensor]:
    """The backbone of a checkpoint of ours, whatever the head.

    Raises:
        ValueError: it is of another backbone or topology.
    """
    loaded = {}
    for key, own in network.state_dict().items():
        if key.startswith("backbone.") and ".seg_layers." not in key:
            if key not in weights:
                raise _other_topology(key, "is not in", fname)
            if weights[key].shape != own.shape:
                shape = tuple(weights[key].shape)
                raise _other_topology(key, f"needs shape {tuple(own.shape)}, not {shape} of", fname)
            loaded[key] = weights[key]
    return loaded


def stock_weights(network: MultimodalUNet, weights: dict[str, Tensor], fname: str | os.PathLike) -> dict[str, Tensor]:
    """The part of a stock network's weights that fits, under our names.

    Raises:
        ValueError: a layer of our encoder or decoder is not in the checkpoint, or has another shape.
    """
    loaded = {}
    for key, own in network.state_dict().items():
        for prefix, channels in _shared_parts(network).items():
            if key.startswith(f"backbone.{prefix}."):
                module = "decoder" if channels is None else "encoder"
                theirs = f"{module}{key.removeprefix(f'backbone.{prefix}')}"
                if theirs not in weights:
                    raise _other_topology(theirs, "is not in", fname)
                value = weights[theirs]
                if channels is not None and own.data_ptr() == _first_weight(network, prefix).data_ptr():
                    value = _first_convolution(value, network, channels, fname)
                if value.shape != own.shape:
                    raise _other_topology(theirs, f"needs shape {tuple(own.shape)}, not {tuple(value.shape)} of", fname)
                loaded[key] = value
    return loaded


def _shared_parts(network: MultimodalUNet) -> dict[str, list[tuple[int, ...]] | None]:
    """Our module -> groups of image channels that its encoder sees one at a time; None for the decoder."""
    parts: dict[str, list[tuple[int, ...]] | None] = dict.fromkeys(network.backbone.decoders())
    for encoder, inputs in network.backbone.encoder_modalities().items():
        parts[encoder] = [tuple(channel for m in modalities for channel in network.groups[m]) for modalities in inputs]
    return parts


def _first_weight(network: MultimodalUNet, encoder: str) -> Tensor:
    """The weight of an encoder's first convolution, the one that sees the image."""
    return next(m.weight for m in network.backbone.get_submodule(encoder).modules() if isinstance(m, _ConvNd))


def _first_convolution(
    weight: Tensor, network: MultimodalUNet, groups: list[tuple[int, ...]], fname: str | os.PathLike
) -> Tensor:
    """(out, C, *k) of all channels -> (out, G + K, *k) of one modality: mean over modalities, then the cascade's."""
    if weight.shape[1] != network.num_input_channels:
        raise ValueError(
            f"{fname} is of a network with {weight.shape[1]} input channels, this dataset has "
            f"{network.num_input_channels}; train without -pretrained_weights"
        )
    image = torch.stack([weight[:, list(group)] for group in groups]).mean(0)
    return torch.cat((image, weight[:, network.num_image_channels :]), 1)


def _other_topology(key: str, what: str, fname: str | os.PathLike) -> ValueError:
    return ValueError(
        f"{key} {what} {fname}: the checkpoint is of a network with another topology or backbone. Train with the plans "
        "that it was trained with (nnUNetv2_move_plans_between_datasets), or without -pretrained_weights"
    )
