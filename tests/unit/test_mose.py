"""MoSE's head and loss; what its costs and transport are made of is tested beside."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nnunet_multimodal.heads import mose
from nnunet_multimodal.heads.base import RaterLabels, Step
from nnunet_multimodal.heads.mixture import mixture_logits
from nnunet_multimodal.heads.mose import annealed_limit, standard_points
from nnunet_multimodal.network import MultimodalUNet
from tests.contracts import MODALITIES, NetworkContract, unet_kwargs
from tests.unit.test_transport_cost import labels_of


class MoSEContract(NetworkContract):
    head = "mose"

    def build(self, *args, **kwargs):
        return super().build(*args, **{"head_kwargs": {"num_experts": 2, "samples_per_expert": 2}, **kwargs})

    def loss(self, output):
        """Every part of the distribution is trained."""
        distribution = output.distribution
        return super().loss(output) + distribution.samples.square().mean() + distribution.sample_weights.square().sum()


class TestMoSE(MoSEContract):
    backbone = "early"


class TestMoSEOnCRNP(MoSEContract):
    backbone = "crnp"


class TestMoSEOnShaSpec(MoSEContract):
    backbone = "shaspec"


class TestMoSEOnCIML(MoSEContract):
    backbone = "ciml"


def network(classes=2, dim=2, backbone="early", **head_kwargs):
    torch.manual_seed(0)
    return MultimodalUNet(
        MODALITIES, classes, backbone=backbone, head="mose", head_kwargs=head_kwargs, **unet_kwargs(dim)
    )


# --- the loss


@pytest.mark.parametrize("limit", [0.5, 1.0])
def test_who_ignores_the_whole_patch_has_nothing_to_say(limit):
    manager = labels_of(3, ignore=True)
    made = network(classes=3, limit=limit).train()
    loss = made.build_loss(lambda logits, target: 0.0, manager)
    torch.manual_seed(0)
    distribution = made(torch.randn(3, MODALITIES, 8, 8)).distribution
    labels = torch.randint(0, 3, (3, 2, 8, 8))
    labels[0, 1] = labels[1] = 3  # one rater of the first image, both of the second
    step = Step(0.1, raters=RaterLabels(labels, torch.full((3, 2), 0.5)))
    whole = loss(distribution, labels[:, :1].float(), step)
    part = replace(
        distribution, samples=distribution.samples[[0, 2]], sample_weights=distribution.sample_weights[[0, 2]]
    )
    own = RaterLabels(labels[[0, 2]], torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    expected = loss(part, labels[[0, 2], :1].float(), Step(0.1, raters=own))
    torch.testing.assert_close(whole * 3, expected * 2)


def test_the_limit_is_lifted_on_a_plateau_and_in_the_second_half():
    falling = [1 / (epoch + 1) for epoch in range(40)]
    assert annealed_limit(0.5, 0.05, Step(0.4, falling[:39])) == 0.5
    assert annealed_limit(0.5, 0.05, Step(0.4, [*falling[:30], *[falling[29]] * 9])) == 1
    assert annealed_limit(0.5, 0.05, Step(0.4, [*falling[:36], *[falling[35]] * 3])) == 0.5
    once = [*[1.0] * 10, *falling[1:30]]  # lifted once, lifted for good
    assert annealed_limit(0.5, 0.05, Step(0.4, once)) == 1
    assert annealed_limit(0.5, 0.05, Step(0.51, falling[:50])) == 1
    assert annealed_limit(0.5, 0.05, Step(0.0, [])) == 0.5


# --- the head


def test_a_sample_is_the_papers_modulation():
    head = network(num_experts=3, latent_dimension=2, samples_per_expert=1).head
    features, z = torch.randn(1, 4, 6, 6), torch.randn(1, 2)
    shift, scale = head.shift(z)[0, :, None, None], head.scale(z)[0, :, None, None] + 1e-5
    expected = (features + shift) * scale
    *hidden, last = head.convolutions
    assert len(hidden) == 3
    for convolution in hidden:
        expected = F.leaky_relu(convolution(expected), 0.01)
    torch.testing.assert_close(head.decode(features.flatten(2), z), last(expected).flatten(2))


def test_the_gate_is_fair_at_first_and_learns_to_tell_normalised_images_apart():
    net = network(num_experts=3)
    net.apply(net.initialize)
    bottleneck = torch.zeros(2, 8, 4, 4)
    bottleneck[0, :, 0, 0], bottleneck[1, :, 0] = 15, 3.0  # a few large, many small: their averages
    bottleneck[0, :, 0, 0] -= 3  # are the same
    assert torch.equal(*bottleneck.mean((2, 3)))
    torch.testing.assert_close(net.head.experts(bottleneck)[0], torch.full((2, 3), 1 / 3))
    optimiser = torch.optim.SGD(net.head.gating.parameters(), 0.01, momentum=0.99, nesterov=True)
    for _ in range(30):
        pi = net.head.experts(bottleneck)[0]
        optimiser.zero_grad()
        (-pi[0, 0].log() - pi[1, 1].log()).backward()
        optimiser.step()
    assert min(pi[0, 0], pi[1, 1]) > 0.9


def test_without_modulation_experts_begin_as_one_segmentation_layer():
    net = network(num_experts=3, samples_per_expert=1, latent_dimension=2)
    net.apply(net.initialize)
    features = torch.rand(1, 4, 6, 6)
    with torch.no_grad():
        for modulation in (net.head.shift, net.head.scale):
            modulation.weight.zero_()
        net.head.shift.bias.zero_()
        assert net.head.scale.bias.eq(1).all()
        expected = net.head.convolutions[-1](features)
        decoded = net.head.decode(features.flatten(2), torch.randn(1, 2))
        torch.testing.assert_close(decoded, expected.flatten(2), rtol=1e-4, atol=1e-4)


def test_samples_in_pieces_are_those_at_once_with_the_same_gradients(monkeypatch):
    net = network(num_experts=2, samples_per_expert=2).train()
    features, bottleneck = torch.randn(2, 4, 6, 7), torch.randn(2, 8, 3, 3)

    def run(chunk):
        monkeypatch.setitem(mose.CHUNK, "cpu", chunk)
        torch.manual_seed(0)
        finest = features.clone().requires_grad_()
        samples = net.head([finest], bottleneck).samples
        net.zero_grad()
        samples.square().mean().backward()
        return samples, finest.grad, *(p.grad.clone() for p in net.head.parameters() if p.grad is not None)

    for whole, pieces in zip(run(2**20), run(2 * 4 * 5), strict=True):  # 5 of 42 voxels at once
        torch.testing.assert_close(pieces, whole)


def test_experts_are_drawn_around_their_means_and_share_their_weight():
    head = network(num_experts=3, samples_per_expert=50, latent_dimension=2).head.train()
    pi, latents, weights = head.experts(torch.randn(4, 8, 3, 3))
    assert pi.shape == (4, 3)
    torch.testing.assert_close(weights.unflatten(1, (3, 50)).sum(2), pi)
    drawn = latents.unflatten(1, (3, 50))
    torch.testing.assert_close(drawn.mean((0, 2)), head.expert_mean, atol=0.05, rtol=0)
    torch.testing.assert_close(drawn.std((0, 2)), torch.full((3, 2), 1 / 8), atol=0.03, rtol=0)
    assert not torch.equal(latents[0], latents[1])


def test_points_are_those_of_a_standard_normal():
    for dimension in (1, 3):
        points = standard_points(64, dimension)
        torch.testing.assert_close(points.mean(0), torch.zeros(dimension), atol=0.05, rtol=0)
        torch.testing.assert_close(points.std(0), torch.ones(dimension), atol=0.1, rtol=0)
    assert standard_points(1, 4).tolist() == [[0.0] * 4]


@pytest.mark.parametrize("regions", [False, True])
def test_the_mean_is_the_logit_of_the_weighted_probability(regions):
    samples, weights = torch.randn(3, 2, 3, 4, 4).unbind(0), torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    found = mixture_logits(samples, weights.unbind(1), regions)
    activate = torch.sigmoid if regions else lambda x: x.softmax(1)
    expected = sum(w.view(-1, 1, 1, 1) * activate(s) for s, w in zip(samples, weights.unbind(1), strict=True))
    torch.testing.assert_close(activate(found), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backbone", ["early", "ciml"])
def test_an_image_is_sampled_from_what_is_blended(backbone):
    made = network(classes=3, backbone=backbone, num_experts=2, samples_per_expert=3).eval()
    x = torch.randn(1, MODALITIES, 8, 8)
    with torch.no_grad():
        distribution = made.distribution(x)
        parameters = distribution.blendable()[0]
        assert len(parameters) == made.head.num_blended
        image = made.head.blended(parameters, torch.ones(1, 8, 8, dtype=torch.bool))
        torch.testing.assert_close(image.mean, distribution.mean)
        torch.testing.assert_close(image.expert_weights, distribution.expert_weights[0])
        made.deep_supervision = False
        torch.testing.assert_close(image.mean, made(x))
        # an expert's sample with the noise of a fixed point is the sample of the forward pass
        for expert in range(2):
            for s in range(3):
                sample = made.head.decode_image(image.features, expert, made.head.points[s])
                torch.testing.assert_close(sample, distribution.samples[0, 3 * expert + s])


def test_samples_are_drawn_by_the_experts_weights():
    made = network(num_experts=2, samples_per_expert=1).eval()
    made.head.expert_log_deviation.data.fill_(-20.0)
    with torch.no_grad():
        parameters = made.distribution(torch.randn(1, MODALITIES, 8, 8)).blendable()[0]
    parameters[-2:] = torch.tensor([0.9, 0.1])[:, None, None]
    image = made.head.blended(parameters, torch.zeros(1, 8, 8, dtype=torch.bool))  # no mask: everything counts
    first, second = (made.head.decode_image(image.features, e, torch.zeros(1)) for e in range(2))
    with torch.no_grad():
        drawn = list(image.draw(200, torch.Generator().manual_seed(0)))
        same = list(image.draw(200, torch.Generator().manual_seed(0)))
        compact = list(image.draw_compact(5, torch.Generator().manual_seed(0)))
    of_first = [torch.allclose(sample, first, atol=1e-4) for sample in drawn]
    assert all(f or torch.allclose(s, second, atol=1e-4) for f, s in zip(of_first, drawn, strict=True))
    assert 0.84 < np.mean(of_first) < 0.96
    assert all(torch.equal(a, b) for a, b in zip(drawn, same, strict=True))
    assert [torch.allclose(s, first, atol=1e-4) for s in compact] == [True, False, True, False, True]
    torch.testing.assert_close(image.compact_weights(5), torch.tensor([0.3, 0.05, 0.3, 0.05, 0.3]))


def test_temperature_scales_deviations_from_the_mean():
    made = network(num_experts=2).eval()
    with torch.no_grad():
        image = made.head.blended(
            made.distribution(torch.randn(1, MODALITIES, 8, 8)).blendable()[0], torch.ones(1, 8, 8, dtype=torch.bool)
        )
        (plain,) = image.draw(1, torch.Generator().manual_seed(1))
        (half,) = image.scaled(0.5, torch.tensor([1.0, 2.0])).draw(1, torch.Generator().manual_seed(1))
    deviation = plain - image.mean[0]
    torch.testing.assert_close(half - image.mean[0], deviation * torch.tensor([0.5, 1.0])[:, None, None])


@pytest.mark.parametrize("regions", [False, True])
def test_raters_and_a_single_target_have_the_same_loss_where_they_agree(regions):
    manager = labels_of(3, ignore=True, regions=regions)
    classes = 2 if regions else 3
    made = network(classes=classes, has_regions=regions).train()
    loss = made.build_loss(lambda logits, target: 0.0, manager)
    distribution = made(torch.randn(2, MODALITIES, 8, 8)).distribution
    labels = torch.randint(0, 4, (2, 1, 8, 8))
    target = labels.float()
    if regions:
        target = torch.cat(((labels == 1) | (labels == 2), labels == 2, labels == 3), 1).float()
    alone = loss(distribution, target, Step())
    raters = RaterLabels(labels.expand(-1, 3, -1, -1), torch.tensor([[0.2, 0.8, 0.0], [1.0, 0.0, 0.0]]))
    torch.testing.assert_close(loss(distribution, target, Step(raters=raters)), alone)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts 0"),
        ({"limit": 0.01}, "limit 0.01.*1 / 16"),
        ({"cost": "dice"}, "cost='dice'"),
        ({"kl_weight": -1}, "kl_weight -1"),
        ({"patience": 2}, "patience 2"),
        ({"preference": -0.1}, "preference -0.1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        network(**options)


def saved_for_backward(call):
    saved = {}  # by storage: all samples are made of the same features
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.update({t.data_ptr(): t}) or t, lambda t: t):
        call()
    return sum(t.nbytes for t in saved.values())


def test_the_sample_axis_is_not_kept_for_the_backward_pass():
    """Three convolutions of every sample would be 12 F feature maps; what is kept does not grow by them."""
    sizes = []
    for samples in (1, 4):
        made = network(samples_per_expert=samples).train()
        sizes.append(saved_for_backward(lambda made=made: made(torch.randn(1, MODALITIES, 32, 32))))
    maps = (sizes[1] - sizes[0]) / (4 * 32 * 32) / 12
    assert maps < 2 * made.head.num_classes
