import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet

from tests.contracts import NetworkContract, unet_kwargs


class TestEarlyFusion(NetworkContract):
    backbone = "early"

    @pytest.mark.parametrize("dim", [2, 3])
    @pytest.mark.parametrize("residual", [False, True])
    def test_equals_nnunets_network_with_equal_weights(self, dim, residual):
        stock_class = ResidualEncoderUNet if residual else PlainConvUNet
        stock = stock_class(3, num_classes=2, deep_supervision=True, **unet_kwargs(dim, residual))
        ours = self.build({}, dim, residual)
        weights = {}
        for key in ours.state_dict():
            if key.startswith("head.seg_layers."):
                index, rest = key.removeprefix("head.seg_layers.").split(".", 1)
                stock_key = f"decoder.seg_layers.{len(stock.decoder.seg_layers) - 1 - int(index)}.{rest}"
            else:
                stock_key = key.removeprefix("backbone.")
            weights[key] = stock.state_dict()[stock_key]
        ours.load_state_dict(weights)
        x = self.data(dim)
        output = ours(x)
        for mine, theirs in zip((output[0], *output.coarse_logits), stock(x), strict=True):
            assert torch.equal(mine, theirs)
        size = (8, 8, 12)[-dim:]
        assert ours.compute_conv_feature_map_size(size) == stock.compute_conv_feature_map_size(size)
