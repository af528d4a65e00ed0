"""Planning goes by an estimate; it must be near what a network really keeps for its backward pass."""

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import nn

from nnunet_multimodal.losses import build_objective
from nnunet_multimodal.network import MultimodalUNet

MODALITIES, CLASSES, PATCH = 3, 2, (24, 24, 24)
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
LABELS = LabelManager({"background": 0, "structure": 1}, None)


def nnunets_loss():
    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    return DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)


def kept(network, loss):
    """Bytes that live from the forward to the backward pass, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in (*network.parameters(), *network.buffers())}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    x, target = torch.randn(2, MODALITIES, *PATCH), torch.randint(0, CLASSES, (2, 1, *PATCH)).float()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(network.train()(x), target)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.fixture(scope="module")
def stock():
    network = PlainConvUNet(MODALITIES, num_classes=CLASSES, deep_supervision=False, **TOPOLOGY)
    return network.compute_conv_feature_map_size(PATCH), kept(network, nnunets_loss())


@pytest.mark.parametrize("head", ["deterministic", "ssn", "mose"])
@pytest.mark.parametrize("backbone", ["early", "crnp", "shaspec", "ciml"])
def test_the_estimate_is_near_what_is_kept(stock, backbone, head):
    network = MultimodalUNet(MODALITIES, CLASSES, backbone=backbone, head=head, **TOPOLOGY)
    loss = build_objective(network, nnunets_loss(), None, LABELS)
    estimate = network.compute_conv_feature_map_size(PATCH) / stock[0]
    assert estimate == pytest.approx(kept(network, loss) / stock[1], rel=0.15)
