import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

from nnunet_multimodal.network import MultimodalUNet
from tests.contracts import unet_kwargs

FIRST = {False: "stages.0.0.convs.0.conv.weight", True: "stem.convs.0.conv.weight"}


@pytest.fixture(params=[False, True], ids=["plain", "residual"])
def residual(request):
    return request.param


@pytest.fixture
def checkpoint(tmp_path, residual):
    """A stock network of three image channels and two of a cascade."""
    torch.manual_seed(0)
    stock_class = ResidualEncoderUNet if residual else PlainConvUNet
    stock = stock_class(5, num_classes=4, deep_supervision=True, **unet_kwargs(3, residual))
    torch.save({"network_weights": stock.state_dict()}, tmp_path / "checkpoint_final.pth")
    return str(tmp_path / "checkpoint_final.pth"), stock


def network(backbone, residual, **options):
    return MultimodalUNet(5, 2, backbone=backbone, num_image_channels=3, **options, **unet_kwargs(3, residual))


def test_early_fusion_takes_encoder_and_decoder(checkpoint, residual):
    file, stock = checkpoint
    ours = network("early", residual)
    head = ours.head.seg_layers[0].weight.detach().clone()
    load_pretrained_weights(ours, file)
    for mine, theirs in ((ours.backbone.encoder, stock.encoder), (ours.backbone.decoder.stages, stock.decoder.stages)):
        for key, value in mine.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[key]), key
    assert torch.equal(ours.head.seg_layers[0].weight, head)


def test_early_fusion_follows_the_order_of_modalities(checkpoint, residual):
    file, stock = checkpoint
    ours = network("early", residual, modalities=[[2], [0], [1]]).eval()
    load_pretrained_weights(ours, file)
    x = torch.randn(1, 5, 8, 8, 12)
    image, cascade, _ = ours.split(x)
    skips = ours.backbone.encoder(torch.cat((image.flatten(1, 2), cascade), 1))
    for mine, theirs in zip(skips, stock.encoder(x), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_another_number_of_channels_is_refused(checkpoint, residual):
    ours = MultimodalUNet(4, 2, backbone="crnp", **unet_kwargs(3, residual))
    with pytest.raises(ValueError, match="5 input channels, this dataset has 4"):
        load_pretrained_weights(ours, checkpoint[0])


def test_a_shared_encoder_starts_from_the_mean_over_image_channels(checkpoint, residual, capsys):
    file, stock = checkpoint
    ours = network("crnp", residual)
    reduction = ours.backbone.reductions[0].weight.detach().clone()
    load_pretrained_weights(ours, file)
    first = stock.encoder.state_dict()[FIRST[residual]]
    expected = torch.cat((first[:, :3].mean(1, keepdim=True), first[:, 3:]), 1)
    mine = ours.backbone.encoders[0].state_dict()
    torch.testing.assert_close(mine[FIRST[residual]], expected)
    for key, value in mine.items():
        if value.shape == stock.encoder.state_dict()[key].shape:
            assert torch.equal(value, stock.encoder.state_dict()[key]), key
    assert torch.equal(ours.backbone.reductions[0].weight, reduction)
    printed = capsys.readouterr().out
    assert "backbone.reductions" in printed
    assert file in printed


def test_separate_encoders_take_their_own_channels(checkpoint, residual):
    file, stock = checkpoint
    ours = network("crnp", residual, backbone_kwargs={"encoder": "separate"})
    load_pretrained_weights(ours, file)
    first = stock.encoder.state_dict()[FIRST[residual]]
    for channel, encoder in enumerate(ours.backbone.encoders):
        torch.testing.assert_close(encoder.state_dict()[FIRST[residual]], first[:, [channel, 3, 4]])


def test_another_topology_is_refused_with_file_and_remedy(checkpoint, residual):
    file, _ = checkpoint
    changes = {"features_per_stage": [4, 6, 10]}
    ours = MultimodalUNet(5, 2, backbone="crnp", num_image_channels=3, **unet_kwargs(3, residual, **changes))
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    with pytest.raises(ValueError, match=r"checkpoint_final\.pth.*another topology.*nnUNetv2_move_plans"):
        load_pretrained_weights(ours, file)
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


@pytest.mark.parametrize(("from_head", "to_head"), [("deterministic", "ssn"), ("ssn", "deterministic"), ("ssn", "ssn")])
def test_of_our_own_checkpoints_the_backbone_is_taken_over_whatever_the_head(residual, tmp_path, from_head, to_head):
    options = {"num_image_channels": 3, **unet_kwargs(3, residual)}
    trained = MultimodalUNet(5, 4, backbone="crnp", head=from_head, **options)  # other labels
    ours = MultimodalUNet(5, 2, backbone="crnp", head=to_head, **options)
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    torch.save({"network_weights": trained.state_dict()}, tmp_path / "ours.pth")
    load_pretrained_weights(ours, str(tmp_path / "ours.pth"))
    for key, value in ours.state_dict().items():
        source = trained.state_dict() if key.startswith("backbone.") else before
        assert torch.equal(value, source[key]), key


def test_a_checkpoint_of_another_backbone_is_refused(residual, tmp_path):
    torch.save({"network_weights": network("early", residual).state_dict()}, tmp_path / "early.pth")
    with pytest.raises(ValueError, match=r"is not in .*early\.pth.*backbone"):
        load_pretrained_weights(network("crnp", residual), str(tmp_path / "early.pth"))


def test_stock_networks_are_nnunets_business(checkpoint, residual):
    file, stock = checkpoint
    fresh = type(stock)(5, num_classes=4, deep_supervision=True, **unet_kwargs(3, residual))
    load_pretrained_weights(fresh, file)
    for key, value in fresh.encoder.state_dict().items():
        assert torch.equal(value, stock.encoder.state_dict()[key])
