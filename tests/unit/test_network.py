import pytest
import torch

from nnunet_multimodal.network import MultimodalUNet
from tests.contracts import unet_kwargs


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="backbone 'magic' does not exist; there are: early, crnp"):
        MultimodalUNet(2, 2, backbone="magic", **unet_kwargs())
    with pytest.raises(ValueError, match="head 'magic' does not exist; there are: deterministic"):
        MultimodalUNet(2, 2, backbone="early", head="magic", **unet_kwargs())


def test_a_topology_that_is_no_unet_is_refused():
    with pytest.raises(ValueError, match=r"embed_dim.*correct the plans file"):
        MultimodalUNet(2, 2, backbone="early", **unet_kwargs(), embed_dim=3)
    with pytest.raises(ValueError, match=r"either n_conv_per_stage.*or n_blocks_per_stage"):
        MultimodalUNet(2, 2, backbone="early", **unet_kwargs(n_blocks_per_stage=[1, 1, 1]))


def test_early_fusion_does_not_measure_uncertainty_and_says_whose_trainer_does():
    network = MultimodalUNet(2, 2, backbone="early", **unet_kwargs())
    with pytest.raises(ValueError, match="CRNPTrainer"):
        network.modality_uncertainty(torch.randn(1, 2, 8, 8, 8))


def test_coarse_segmentation_layers_are_frozen_only_without_deep_supervision():
    for deep_supervision in (True, False):
        network = MultimodalUNet(2, 2, backbone="early", deep_supervision=deep_supervision, **unet_kwargs())
        assert all(p.requires_grad == deep_supervision for p in network.head.seg_layers[1:].parameters())
        assert all(p.requires_grad for p in network.head.seg_layers[0].parameters())
