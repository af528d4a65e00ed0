import math

import pytest
import torch
from sklearn.metrics import roc_auc_score

from nnunet_multimodal.backbones.crnp import (
    CRNPFusion,
    RandomNetworkPrediction,
    cross_modal_uncertainty,
    relative_error,
)
from tests.contracts import NetworkContract, with_absent


def all_present(x):
    return torch.ones(x.shape[:2], dtype=torch.bool)


class TestCRNP(NetworkContract):
    backbone = "crnp"
    options = (
        {},
        {"encoder": "separate", "attention": "cross", "fusion": "concat"},
        {"attention": "none", "fusion": "replace", "uncertainty": "norm", "rnp_features": 5},
    )

    def test_segmentation_loss_reaches_no_predictor_and_rnp_loss_nothing_else(self):
        for options in self.each():
            network = self.build(options)
            output = network(self.data())
            predictors = {id(p) for p in network.backbone.fusion.rnp.parameters()}
            assert len(predictors) == 2

            output.auxiliary_losses["rnp"].backward(retain_graph=True)
            for name, parameter in network.named_parameters():
                assert (parameter.grad is not None) == (id(parameter) in predictors), name
            network.zero_grad(set_to_none=True)

            (output[0].square().mean() + output[1].square().mean()).backward()
            for name, parameter in network.named_parameters():
                assert (parameter.grad is None) == (id(parameter) in predictors), name

    def test_target_never_changes_and_is_in_the_checkpoint(self):
        network = self.build()
        targets = {k: v.clone() for k, v in network.state_dict().items() if ".target_" in k}
        assert len(targets) == 3
        optimizer = torch.optim.SGD(network.parameters(), 0.1, weight_decay=0.1, momentum=0.9)
        predictor = network.backbone.fusion.rnp.predictor_in.detach().clone()
        for _ in range(3):
            optimizer.zero_grad()
            self.loss(network(self.data())).backward()
            optimizer.step()
        for key, value in targets.items():
            assert torch.equal(network.state_dict()[key], value)
        assert not torch.equal(network.backbone.fusion.rnp.predictor_in, predictor)

    def test_absent_modality_contributes_nothing_to_uncertainty_attention_and_skips(self):
        """The gradient of the output with respect to an absent modality's features is zero at every stage."""
        for options in self.each():
            network = self.build(options)
            backbone = network.backbone
            x, cascade, present = network.split(with_absent(self.data(), [(0, 1)]))
            stages = [s.detach().requires_grad_() for s in backbone.encode(x, cascade)]
            backbone.encode = lambda *_, stages=stages: list(stages)
            output = backbone(x, cascade, present)
            output.features[0].square().sum().backward()
            for stage in stages:
                assert stage.grad[0, 1].abs().max() == 0
                assert stage.grad[0, 0].abs().max() > 0
                assert stage.grad[1, 1].abs().max() > 0

    @pytest.mark.parametrize("option", ["encoder", "fusion", "attention", "uncertainty"])
    def test_unknown_values_are_refused_with_the_known_ones(self, option):
        with pytest.raises(ValueError, match=f"{option}='magic' is not one of"):
            self.build({option: "magic"})

    def test_random_features_must_fit_an_elementwise_product(self):
        with pytest.raises(ValueError, match="rnp_features=5 must equal the 8"):
            self.build({"rnp_features": 5})

    def test_separate_encoders_do_not_share_weights(self):
        assert len(self.build({"encoder": "separate"}).backbone.encoders) == 3
        assert len(self.build().backbone.encoders) == 1

    def test_uncertainty_map_has_the_resolution_of_the_input_and_is_zero_where_absent(self):
        for dim in (2, 3):
            network = self.build(dim=dim).eval()
            x = with_absent(self.data(dim), [(1, 0)])
            maps = network.modality_uncertainty(x)
            assert maps.shape == x.shape
            assert maps[1, 0].abs().max() == 0
            assert (maps[0] > 0).all()

    def test_predictors_are_an_optimiser_group_that_undoes_the_loss_factor(self):
        (group,) = self.build().backbone.parameter_groups()
        assert group["lr_scale"] * group["weight_decay_scale"] == pytest.approx(10)


class TestUncertainty:
    def test_hand_computed_two_modalities(self):
        """One channel, errors (3, 4) and (0, 5): u(0) = (0, 25)/25, u(1) = (9, 16)/sqrt(337)."""
        error = torch.tensor([[[[3.0, 4.0]], [[0.0, 5.0]]]])
        u = cross_modal_uncertainty(error, all_present(error))
        norm = math.sqrt(81 + 256)
        torch.testing.assert_close(u, torch.tensor([[[[0.0, 1.0]], [[9 / norm, 16 / norm]]]]))

    def test_sums_over_the_others_that_are_present(self):
        torch.manual_seed(0)
        error = torch.randn(2, 4, 3, 5)
        present = torch.tensor([[True, True, True, True], [True, False, True, True]])
        u = cross_modal_uncertainty(error, present)
        for sample in range(2):
            for p in range(4):
                others = [q for q in range(4) if q != p and present[sample, q]]
                expected = sum(error[sample, q] ** 2 for q in others)
                expected = expected / expected.norm(dim=1, keepdim=True)
                torch.testing.assert_close(u[sample, p], expected)

    def test_norm_is_one_channel(self):
        error = torch.tensor([[[[3.0, 0.0], [4.0, 1.0]], [[0.0, 0.0], [0.0, 2.0]]]])
        u = cross_modal_uncertainty(error, all_present(error), "norm")
        assert u.shape == (1, 2, 1, 2)
        torch.testing.assert_close(u[0, 1, 0], torch.tensor([25.0, 1.0]) / math.sqrt(626))

    def test_carries_no_gradient(self):
        error = torch.randn(1, 2, 3, 4, requires_grad=True)
        assert not cross_modal_uncertainty(error, all_present(error)).requires_grad

    @pytest.mark.parametrize("scale", [1e-4, 300.0])
    def test_is_computed_in_float32_under_autocast(self, scale):
        error = scale * torch.randn(2, 3, 6, 5)
        with torch.autocast("cpu", torch.float16):
            u = cross_modal_uncertainty(error, all_present(error))
        assert u.dtype == torch.float32
        torch.testing.assert_close(u, cross_modal_uncertainty(error, all_present(error)))

    def test_vectors_are_normalised_over_features(self):
        error = torch.randn(2, 3, 6, 1)
        u = cross_modal_uncertainty(error, all_present(error))
        torch.testing.assert_close(u.norm(dim=2), torch.ones(2, 3, 1))


class TestFusion:
    @pytest.mark.parametrize("modalities", [2, 3, 5])
    def test_functions_of_table_6(self, modalities):
        torch.manual_seed(0)
        x = torch.randn(2, modalities, 4, 3, 3)
        for fusion, expected in (("residual", lambda u, x: x + u * x), ("replace", lambda u, x: u * x)):
            module = CRNPFusion(modalities, 4, fusion=fusion, attention="none")
            u = cross_modal_uncertainty(module.rnp(x.flatten(3)), all_present(x)).view(x.shape)
            torch.testing.assert_close(module(x, all_present(x))[0], expected(u, x))
        module = CRNPFusion(modalities, 4, fusion="concat", attention="none")
        u = cross_modal_uncertainty(module.rnp(x.flatten(3)), all_present(x)).view(x.shape)
        both = torch.cat((x, u * x), 2).movedim(2, -1)
        torch.testing.assert_close(module(x, all_present(x))[0], module.projection(both).movedim(-1, 2))

    @pytest.mark.parametrize("attention", ["self", "cross", "none"])
    @pytest.mark.parametrize("fusion", ["residual", "replace", "concat"])
    def test_vectors_and_maps_of_any_size(self, attention, fusion):
        module = CRNPFusion(3, 4, attention=attention, fusion=fusion)
        for size in ((), (5,), (3, 2), (2, 3, 4)):
            x = torch.randn(2, 3, 4, *size)
            fused, error = module(x, all_present(x))
            assert fused.shape == x.shape
            assert error.shape == (2, 3)

    @pytest.mark.parametrize("attention", ["self", "cross"])
    def test_attention_equals_the_formula(self, attention):
        torch.manual_seed(0)
        module = CRNPFusion(2, 4, attention=attention).attention
        x = torch.randn(1, 2, 4, 3)
        scale = x.square().mean(2, keepdim=True).add(1e-5).rsqrt()
        t = (x * scale * module.scale)[0]  # (M, F, N)
        # queries, then keys and values
        tokens = [t.flatten(0, 1).T] * 2 if attention == "self" else [t[0].T, t[1].T]
        q = module.query_key_value(tokens[0])[:, :4]
        k, v = module.query_key_value(tokens[1])[:, 4:].chunk(2, -1)
        attended = module.out(torch.softmax(q @ k.T / 2, -1) @ v).T
        result = module(x, all_present(x))[0]
        if attention == "self":
            torch.testing.assert_close(result, x[0] + attended.view(2, 4, 3))
        else:
            torch.testing.assert_close(result[0], x[0, 0] + attended)

    def test_a_lonely_modality_passes_every_fusion_unchanged(self):
        x = torch.randn(1, 3, 4, 6)
        present = torch.tensor([[False, True, False]])
        for fusion in ("residual", "replace", "concat"):
            fused, _ = CRNPFusion(3, 4, fusion=fusion, attention="none")(x, present)
            torch.testing.assert_close(fused[0, 1], x[0, 1])
            assert fused[0, [0, 2]].abs().max() == 0

    def test_one_modality_is_refused(self):
        with pytest.raises(ValueError, match="at least 2"):
            CRNPFusion(1, 4)


class TestRandomNetworkPrediction:
    def test_equals_one_by_one_convolutions_per_modality(self):
        torch.manual_seed(0)
        rnp = RandomNetworkPrediction(2, 6, 5)
        x = torch.randn(3, 2, 6, 7)
        error = rnp(x)
        for m in range(2):
            act = torch.nn.LeakyReLU(0.25)
            h = act(rnp.target_in[m] @ x[:, m])
            target = rnp.target_out[m] @ act(rnp.target_hidden[m] @ h)
            predicted = rnp.predictor_out[m] @ act(rnp.predictor_in[m] @ x[:, m])
            torch.testing.assert_close(error[:, m], predicted - target)

    def test_error_ranks_unseen_noise_above_training_features(self):
        """Training features lie near a plane of the feature space, noise of equal variance does not."""
        torch.manual_seed(0)
        basis = torch.randn(2, 3, 16)

        def features(count):
            return torch.einsum("bmkn,mkf->bmfn", torch.randn(count, 2, 3, 8), basis).relu()

        rnp = RandomNetworkPrediction(2, 16, 16)
        optimizer = torch.optim.SGD(rnp.parameters(), 0.1, momentum=0.9)
        for _ in range(400):
            optimizer.zero_grad()
            x = features(8)
            relative_error(rnp(x), x).mean().backward()
            optimizer.step()
        seen = features(32)
        noise = (seen.std() * torch.randn_like(seen)).abs()
        scores = [rnp(x).detach().square().sum(2).flatten() for x in (seen, noise)]
        labels = torch.cat([torch.full_like(s, float(i)) for i, s in enumerate(scores)])
        assert roc_auc_score(labels, torch.cat(scores)) > 0.9

    def test_relative_error_does_not_depend_on_the_scale_of_features(self):
        x = torch.randn(2, 3, 8, 5)
        rnp = RandomNetworkPrediction(3, 8, 8)
        torch.testing.assert_close(relative_error(rnp(x), x), relative_error(rnp(9 * x), 9 * x), rtol=1e-4, atol=0)
