"""Planning goes by an estimate; it must be near what a network really keeps for its backward pass."""

import itertools

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import nn

from nnunet_multimodal.backbones import BACKBONES, ciml
from nnunet_multimodal.heads import HEADS
from nnunet_multimodal.losses import build_objective
from nnunet_multimodal.network import MultimodalUNet

MODALITIES, PATCH, SMALLER = 3, (24, 24, 24), (16, 16, 16)
TOPOLOGY = {
    "n_stages": 3,
    "features_per_stage": [16, 32, 64],
    "conv_op": nn.Conv3d,
    "kernel_sizes": [[3, 3, 3]] * 3,
    "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
    "n_conv_per_stage": [2, 2, 2],
    "n_conv_per_stage_decoder": [2, 2],
    "conv_bias": True,
    "norm_op": nn.InstanceNorm3d,
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "nonlin": nn.LeakyReLU,
    "nonlin_kwargs": {"inplace": True},
}
KINDS = {
    "2 classes": LabelManager({"background": 0, "a": 1}, None),
    "4 classes": LabelManager({"background": 0, "a": 1, "b": 2, "c": 3}, None),
    "3 regions": LabelManager({"background": 0, "a": [1, 2, 3], "b": [2, 3], "c": [3]}, [1, 2, 3]),
}


def nnunets_loss(labels):
    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": labels.has_regions, "ddp": False}
    if labels.has_regions:
        return DC_and_BCE_loss({}, dice, dice_class=MemoryEfficientSoftDiceLoss)
    return DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)


def kept(network, loss, labels):
    """Bytes that live from the forward to the backward pass, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in (*network.parameters(), *network.buffers())}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    x = torch.randn(2, MODALITIES, *PATCH)
    channels = labels.num_segmentation_heads if labels.has_regions else 1
    target = torch.randint(0, 2, (2, channels, *PATCH))
    target = target.bool() if labels.has_regions else target.float()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(network.train()(x), target)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.fixture(scope="module", params=KINDS)
def stock(request):
    labels = KINDS[request.param]
    network = PlainConvUNet(MODALITIES, num_classes=labels.num_segmentation_heads, deep_supervision=False, **TOPOLOGY)
    return labels, network.compute_conv_feature_map_size(PATCH), kept(network, nnunets_loss(labels), labels)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_estimate_is_near_what_is_kept(stock, backbone, head):
    labels, stock_estimate, stock_kept = stock
    network = MultimodalUNet(
        MODALITIES, labels.num_segmentation_heads, backbone=backbone, head=head,
        head_kwargs=HEADS[head].dataset_options(labels),
        backbone_kwargs={"has_regions": labels.has_regions} if backbone == "ciml" else {}, **TOPOLOGY,
    )  # fmt: skip
    loss = build_objective(network, nnunets_loss(labels), None, labels)
    estimate = network.compute_conv_feature_map_size(PATCH) / stock_estimate
    assert estimate == pytest.approx(kept(network, loss, labels) / stock_kept, rel=0.15)


def peak(network, loss, num_modalities):
    """Bytes that a training step allocates at most, beside parameters and momentum, which are counted too."""
    x, target = torch.randn(2, num_modalities, *SMALLER), torch.randint(0, 2, (2, 1, *SMALLER)).float()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss(network.train()(x), target).backward()
    records = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(records, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes)) + 2 * sum(p.nbytes for p in network.parameters())


@pytest.mark.parametrize("num_modalities", [2, 4, 8])
def test_the_estimate_of_many_messages_is_near_a_steps_peak(monkeypatch, num_modalities):
    """Gates are run again in the backward pass, which what is kept from the forward pass does not show."""
    monkeypatch.setitem(ciml.SLAB, "cpu", 2**12)  # beside maps as small as these
    labels = KINDS["2 classes"]
    stock = PlainConvUNet(num_modalities, num_classes=2, deep_supervision=False, **TOPOLOGY)
    network = MultimodalUNet(num_modalities, 2, backbone="ciml", **TOPOLOGY)
    estimate = network.compute_conv_feature_map_size(SMALLER) / stock.compute_conv_feature_map_size(SMALLER)
    loss = build_objective(network, nnunets_loss(labels), None, labels)
    times = peak(network, loss, num_modalities) / peak(stock, nnunets_loss(labels), num_modalities)
    assert estimate == pytest.approx(times, rel=0.15)
