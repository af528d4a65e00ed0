"""What every backbone and head promises as a network."""

import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from nnunet_multimodal.network import MultimodalUNet, NetworkOutput

MODALITIES = 3


def unet_kwargs(dim: int = 3, residual: bool = False, **changes) -> dict:
    """A small topology as nnU-Net's plans hold it, anisotropic at the first step."""
    first = [1, 2, 2][-dim:]
    return {
        "n_stages": 3,
        "features_per_stage": [4, 6, 8],
        "conv_op": nn.Conv3d if dim == 3 else nn.Conv2d,
        "kernel_sizes": [[1, 3, 3][-dim:], [3] * dim, [3] * dim],
        "strides": [[1] * dim, first, [2] * dim],
        "n_blocks_per_stage" if residual else "n_conv_per_stage": [1, 2, 2] if residual else [2, 2, 2],
        "n_conv_per_stage_decoder": [1, 1] if residual else [2, 2],
        "conv_bias": True,
        "norm_op": nn.InstanceNorm3d if dim == 3 else nn.InstanceNorm2d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
        **changes,
    }


def with_absent(x: torch.Tensor, absent: list[tuple[int, int]]) -> torch.Tensor:
    x = x.clone()
    for sample, channel in absent:
        x[sample, channel] = math.nan
    return x


class NetworkContract:
    """Subclass with ``backbone`` and, where it has some, ``options`` to run everything with."""

    backbone: str
    head = "deterministic"
    options: tuple[dict, ...] = ({},)

    def build(self, options=None, dim=3, residual=False, cascade=0, classes=2, modalities=MODALITIES, **kwargs):
        torch.manual_seed(0)
        network = MultimodalUNet(
            modalities + cascade,
            classes,
            backbone=self.backbone,
            head=self.head,
            num_image_channels=modalities,
            backbone_kwargs=options or {},
            **{"deep_supervision": True, **kwargs},
            **unet_kwargs(dim, residual),
        )
        network.apply(network.initialize)
        return network

    def data(self, dim=3, cascade=0, batch=2, modalities=MODALITIES):
        torch.manual_seed(1)
        return torch.randn(batch, modalities + cascade, *(8, 8, 12)[-dim:])

    def loss(self, output: NetworkOutput) -> torch.Tensor:
        logits = (output[0], *output.coarse_logits)
        if output.subtasks is not None:  # what is trained; their average has no gradient
            logits = output.subtasks.logits if output.coarse_logits else output.subtasks.logits[:1]
        return sum(layer.square().mean() for layer in logits) + sum(output.auxiliary_losses.values())

    def each(self):
        return [dict(options) for options in self.options]

    @pytest.mark.parametrize("dim", [2, 3])
    @pytest.mark.parametrize("residual", [False, True])
    def test_shapes_follow_the_topology(self, dim, residual):
        for options in self.each():
            network = self.build(options, dim, residual)
            output = network(self.data(dim))
            size = (8, 8, 12)[-dim:]
            assert output[0].shape == (2, 2, *size)
            step = (1, 2, 2)[-dim:]
            assert [c.shape[2:] for c in output.coarse_logits] == [
                tuple(s // t for s, t in zip(size, step, strict=True))
            ]
            assert output[1] is output.coarse_logits[0]

    def test_evaluation_without_deep_supervision_returns_plain_logits(self):
        network = self.build().eval()
        rich = network(self.data())
        network.decoder.deep_supervision = False
        plain = network(self.data())
        assert isinstance(plain, torch.Tensor)
        torch.testing.assert_close(plain, rich[0])
        assert rich.auxiliary_losses == {}

    def test_weights_of_training_load_strictly_for_prediction(self):
        trained, fresh = self.build(), self.build(deep_supervision=False)
        for name, parameter in trained.named_parameters():
            if name.endswith("seg_layers.0.bias"):
                nn.init.constant_(parameter, 0.3)
        fresh.load_state_dict(trained.state_dict())
        trained.deep_supervision = False
        torch.testing.assert_close(fresh.eval()(self.data()), trained.eval()(self.data()))

    @pytest.mark.parametrize("absent", [[], [(0, 1)], [(0, 0), (0, 1), (1, 2)]])
    @pytest.mark.parametrize("deep_supervision", [True, False])
    def test_every_parameter_gets_a_finite_gradient(self, absent, deep_supervision):
        for options in self.each():
            network = self.build(options, deep_supervision=deep_supervision)
            self.loss(network(with_absent(self.data(), absent))).backward()
            for name, parameter in network.named_parameters():
                if parameter.requires_grad:
                    assert parameter.grad is not None, name
                    assert torch.isfinite(parameter.grad).all(), name

    @pytest.mark.parametrize("absent", [[(0, 1)], [(0, 0), (0, 2), (1, 1)]])
    def test_absent_modality_content_is_ignored(self, absent):
        for options in self.each():
            network = self.build(options).eval()
            x = self.data()
            nothing = with_absent(x, absent)
            partly = nothing.clone()  # augmentation leaves NaN in a part of the channel and anything in the rest
            zeros = nothing.clone()  # what stock preprocessing makes of a placeholder
            for sample, channel in absent:
                partly[sample, channel] = x[sample, channel] * 7
                partly[sample, channel, 0] = math.nan
                zeros[sample, channel] = 0
            expected = network(nothing)[0]
            assert torch.isfinite(expected).all()
            assert torch.equal(network(partly)[0], expected)
            assert torch.equal(network(zeros)[0], expected)
            assert not torch.allclose(network(x)[0], expected)

    def test_absent_modality_of_one_sample_leaves_the_others_alone(self):
        for options in self.each():
            network = self.build(options).eval()
            x = self.data()
            torch.testing.assert_close(network(with_absent(x, [(0, 1)]))[0][1], network(x)[0][1])

    def test_a_tile_of_air_counts_as_all_present(self):
        network = self.build().eval()
        assert torch.isfinite(network(torch.zeros_like(self.data()))[0]).all()
        _, _, present = network.split(torch.zeros_like(self.data()))
        assert present.all()

    def test_the_cascade_reaches_the_output(self):
        for options in self.each():
            network = self.build(options, cascade=2).eval()
            x = self.data(cascade=2)
            changed = x.clone()
            changed[:, -1] += 1
            assert not torch.allclose(network(x)[0], network(changed)[0])

    def test_channels_can_form_a_modality(self):
        torch.manual_seed(0)
        network = MultimodalUNet(
            4, 2, backbone=self.backbone, head=self.head, modalities=[[0, 2], [3, 1]], **unet_kwargs()
        ).eval()
        x = self.data(modalities=4)
        image, _, present = network.split(with_absent(x, [(0, 1)]))
        assert torch.equal(image[1], x[1, [0, 2, 3, 1]].unflatten(0, (2, 2)))
        assert image[0, 1].abs().max() == 0
        assert present.tolist() == [[True, False], [True, True]]
        other = x.clone()
        other[0, 3] += 1  # the rest of the absent modality
        expected = network(with_absent(x, [(0, 1)]))
        assert torch.equal(network(with_absent(other, [(0, 1)])), expected)
        none_complete = network.train()(with_absent(x, [(0, 1), (0, 0)]))
        assert torch.isfinite(none_complete[0]).all()
        assert all(torch.isfinite(term) for term in none_complete.auxiliary_losses.values())

    def test_the_whole_graph_compiles_once_for_all_subsets(self):
        for options in self.each():
            torch._dynamo.reset()
            network = self.build(options)
            counter = CompileCounterWithBackend("aot_eager")
            compiled = torch.compile(network, fullgraph=True, backend=counter)
            for absent in ([], [(0, 1)], [(0, 0), (0, 2), (1, 1)]):
                x = with_absent(self.data(), absent)
                torch.manual_seed(2)  # for networks that draw noise
                output = compiled(x)
                torch.manual_seed(2)
                torch.testing.assert_close(output[0], network(x)[0])
                self.loss(output).backward()
            assert counter.frame_count == 1
        torch._dynamo.reset()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("absent", [[], [(0, 0), (0, 1)]])
    def test_autocast_stays_finite(self, dtype, absent):
        for options in self.each():
            network = self.build(options)
            with torch.autocast("cpu", dtype):
                output = network(100 * with_absent(self.data(), absent))
            assert torch.isfinite(output[0].float()).all()
            assert all(torch.isfinite(term) for term in output.auxiliary_losses.values())

    def test_planning_counts_at_least_the_stock_network(self):
        early = MultimodalUNet(MODALITIES, 2, backbone="early", **unet_kwargs())
        size = self.build(deep_supervision=False).compute_conv_feature_map_size((8, 8, 12))
        assert size >= early.compute_conv_feature_map_size((8, 8, 12))

    def test_unknown_option_is_refused_with_its_name(self):
        with pytest.raises(ValueError, match="no_such_option"):
            self.build({"no_such_option": 1})
