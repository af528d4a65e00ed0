import itertools

import pytest
import torch

from nnunet_multimodal.backbones import BACKBONES
from nnunet_multimodal.heads import HEADS
from nnunet_multimodal.network import MultimodalUNet
from tests.contracts import unet_kwargs, with_absent


@pytest.mark.parametrize(("backbone", "head"), itertools.product(BACKBONES, HEADS))
def test_every_backbone_and_head_train_and_predict_with_any_subset(backbone, head):
    """For all subsets of three modalities: finite gradients of everything, and what is absent changes nothing."""
    torch.manual_seed(0)
    network = MultimodalUNet(3, 2, backbone=backbone, head=head, deep_supervision=True, **unet_kwargs())
    network.apply(network.initialize)
    x = torch.randn(1, 3, 8, 8, 12)
    for size in (1, 2, 3):
        for subset in itertools.combinations(range(3), size):
            absent = [(0, m) for m in range(3) if m not in subset]
            network.zero_grad()
            output = network.train()(with_absent(x, absent))
            loss = output.distribution.rsample((2,)).square().mean() + sum(output.auxiliary_losses.values())
            loss = loss + output[0].square().mean()
            coarse_logits = output.coarse_logits if output.subtasks is None else output.subtasks.logits
            loss = loss + sum(coarse.square().mean() for coarse in coarse_logits)
            loss.backward()
            missing = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
            assert not missing
            assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)
            other = x.clone()
            for sample, modality in absent:
                other[sample, modality] = 1e4
            with torch.no_grad():
                expected, found = (network.eval()(with_absent(images, absent))[0] for images in (x, other))
            assert torch.equal(expected, found)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="backbone 'magic' does not exist; there are: early, crnp, shaspec"):
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
