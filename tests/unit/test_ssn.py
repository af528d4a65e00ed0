"""The low-rank Gaussian and its loss, against dense and brute-force computations in double precision."""

import itertools
import math

import pytest
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch.nn import functional as F

from nnunet_multimodal.heads import ssn, streamed
from nnunet_multimodal.heads.base import Step, encode_target
from nnunet_multimodal.heads.ssn import LowRankGaussianLogits
from nnunet_multimodal.network import MultimodalUNet
from tests.contracts import MODALITIES, NetworkContract, unet_kwargs

SHAPE = (2, 3, 4, 3)  # B, C, *D
RANK = 2


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(dtype=torch.float64, rank=RANK, shape=SHAPE, requires_grad=False):
    g = generator()
    tensors = (
        torch.randn(shape, generator=g, dtype=dtype),
        torch.randn(shape[0], rank, *shape[1:], generator=g, dtype=dtype),
        torch.rand(shape, generator=g, dtype=dtype) + 0.1,
    )
    return LowRankGaussianLogits(*(t.requires_grad_(requires_grad) for t in tensors))


def network(head="ssn", dim=2, classes=2, **kwargs):
    torch.manual_seed(0)
    made = MultimodalUNet(MODALITIES, classes, backbone="early", head=head, **kwargs, **unet_kwargs(dim))
    made.apply(made.initialize)
    return made


def indicator(shape=SHAPE):
    labels = torch.randint(0, shape[1], (shape[0], 1, *shape[2:]), generator=generator(1))
    return labels == torch.arange(shape[1]).view(1, -1, *(1,) * (len(shape) - 2))


def covariance(distribution, sample=0):
    """P P^T + D, dense."""
    factor = distribution.cov_factor[sample].flatten(1)
    return factor.T @ factor + distribution.cov_diag[sample].flatten().diag()


def drawn(distribution, count, how):
    if how == "rsample":
        return distribution.rsample((count,), generator())[:, 0]
    return torch.stack(list(distribution.draw(count, generator())))


@pytest.mark.parametrize("how", ["rsample", "draw"])
@pytest.mark.parametrize("rank", [0, RANK])
def test_samples_have_the_mean_and_the_covariance_of_the_distribution(how, rank):
    distribution = gaussian(torch.float32, rank)
    samples = drawn(distribution, 100_000, how).flatten(1)
    torch.testing.assert_close(samples.mean(0), distribution.loc[0].flatten(), atol=0.03, rtol=0)
    torch.testing.assert_close(samples.T.cov(), covariance(distribution), atol=0.1, rtol=0)


def test_samples_come_in_antithetic_pairs():
    distribution = gaussian()
    samples = distribution.rsample((6,), generator())
    torch.testing.assert_close(samples[:3] + samples[3:], 2 * distribution.loc.expand(3, *SHAPE))
    assert distribution.rsample((5,), generator()).shape == (5, *SHAPE)
    assert distribution.rsample((2, 3), generator()).shape == (2, 3, *SHAPE)
    assert distribution.rsample((), generator()).shape == SHAPE


def test_drawing_does_not_depend_on_the_sizes_of_groups_and_is_reproducible(monkeypatch):
    distribution = gaussian(torch.float32, shape=(1, 3, 40))
    first = drawn(distribution, 7, "draw")
    assert torch.equal(drawn(distribution, 7, "draw"), first)
    assert not torch.equal(first[0], first[1])
    monkeypatch.setattr(ssn, "DRAW_CHUNK", 16)
    pieces = torch.stack(list(distribution.draw(20_000, generator()))).flatten(1)
    torch.testing.assert_close(pieces.T.cov(), covariance(distribution), atol=0.25, rtol=0)


def noise_of(draw, batch, rank, shape, chunk):
    """All of the loss's noise, put together from its pieces."""
    voxels = math.prod(shape[1:])
    noise = torch.zeros(draw.pairs, batch, shape[0], voxels, dtype=torch.float64)
    for position, (sample, start) in enumerate(itertools.product(range(batch), range(0, voxels, chunk))):
        width = min(chunk, voxels - start)
        piece = draw.voxels(position, range(draw.pairs), (shape[0], width), torch.float64)
        noise[:, sample, :, start : start + width] = piece
    return draw.weights(batch, rank, torch.float64), noise.view(draw.pairs, batch, *shape)


def brute_force(distribution, target, pairs, seed, regions, valid, chunk):
    """Every sample materialised; log-probabilities by torch's own losses."""
    draw = streamed.Noise(pairs, seed, torch.device("cpu"))
    weights, noise = noise_of(draw, SHAPE[0], RANK, SHAPE[1:], chunk)
    deviation = torch.einsum("bpr,brcxy->pbcxy", weights, distribution.cov_factor)
    deviation = deviation + noise * distribution.cov_diag.sqrt()
    result = []
    for logits in (distribution.loc + sign * d for sign in (1, -1) for d in deviation):
        if regions:
            nats = -F.binary_cross_entropy_with_logits(logits, target.double(), reduction="none").sum(1)
        else:
            nats = -F.cross_entropy(logits, target.double().argmax(1), reduction="none")
        result.append((nats * (1 if valid is None else valid[:, 0])).flatten(1).sum(1))
    return torch.stack(result).logsumexp(0) - math.log(2 * pairs)


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk", [5, 1000])
def test_the_likelihood_and_its_gradients_equal_brute_force_with_the_same_noise(regions, masked, chunk):
    target = torch.rand(SHAPE, generator=generator(1)) > 0.5 if regions else indicator()
    valid = torch.rand(2, 1, *SHAPE[2:], generator=generator(2)) > 0.4 if masked else None
    seed = int(torch.randint(2**62, (), generator=generator(5)))
    results = []
    for ours in (True, False):
        distribution = gaussian(requires_grad=True)
        if ours:
            value = distribution.log_likelihood(target, 8, regions, valid, generator(5), chunk)
        else:
            value = brute_force(distribution, target, 4, seed, regions, valid, chunk)
        (value * torch.tensor([1.0, -2.5])).sum().backward()
        results.append(
            (value.detach(), *(t.grad for t in (distribution.loc, distribution.cov_factor, distribution.cov_diag)))
        )
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("rank", [0, RANK])
def test_gradcheck(regions, rank):
    target, distribution = indicator(), gaussian(rank=rank, requires_grad=True)

    def likelihood(*parameters):
        return LowRankGaussianLogits(*parameters).log_likelihood(target, 6, regions, None, generator(3), 7)

    assert torch.autograd.gradcheck(likelihood, (distribution.loc, distribution.cov_factor, distribution.cov_diag))


def test_samples_without_weight_are_left_out_without_changing_the_gradient(monkeypatch):
    """Whole maps make all shares but the largest vanish; the gradient is the same as with all pairs."""
    shape = (1, 3, 2000)
    target, gradients, used = indicator(shape), [], []
    counting = streamed._pairs_that_count
    for everything in (False, True):

        def pairs(gradient, everything=everything):
            used.append(counting(gradient))
            return [list(range(10))] if everything else used[-1]

        monkeypatch.setattr(streamed, "_pairs_that_count", pairs)
        distribution = gaussian(torch.float32, shape=shape, requires_grad=True)
        distribution.log_likelihood(target, 20, generator=generator(4)).sum().backward()
        gradients.append((distribution.loc.grad, distribution.cov_factor.grad, distribution.cov_diag.grad))
    assert len(used[0][0]) < 3
    for few, every in zip(*gradients, strict=True):
        torch.testing.assert_close(few, every)


def test_what_is_not_finite_stays_visible_in_the_gradient():
    for value in (math.nan, math.inf):
        distribution = gaussian(torch.float32, requires_grad=True)
        with torch.no_grad():
            distribution.cov_factor[0, 0, 0, 0, 0] = value
        distribution.log_likelihood(indicator(), 4, generator=generator()).sum().backward()
        assert not torch.isfinite(distribution.cov_factor.grad).all()


def test_large_maps_are_summed_exactly():
    """A hundred thousand voxels in one chunk, logits of 20: float32 sums would be wrong by tenths of a nat."""
    shape = (1, 2, 2**17)
    single = gaussian(torch.float32, shape=shape)
    single = LowRankGaussianLogits(20 * single.loc, single.cov_factor, single.cov_diag)
    target = single.loc == single.loc.amax(1, keepdim=True)
    double = LowRankGaussianLogits(single.loc.double(), single.cov_factor.double(), single.cov_diag.double())
    noise = streamed.Noise(1, 0, torch.device("cpu"))
    weights, pixels = noise.weights(1, RANK, torch.float32), noise.voxels(0, [0], shape[1:], torch.float32)
    deviation = torch.einsum("r,rcn->cn", weights[0, 0].double(), double.cov_factor[0])
    deviation = deviation + pixels[0].double() * double.cov_diag[0].sqrt()
    expected = [
        -F.cross_entropy(double.loc + sign * deviation, target.double().argmax(1), reduction="sum") for sign in (1, -1)
    ]
    arguments = (single.loc, single.cov_factor, single.cov_diag.sqrt(), target, None, noise, False, 2**17)
    actual = streamed.SampleLogLikelihood.apply(*arguments).flatten()
    torch.testing.assert_close(actual, torch.stack(expected), atol=0.05, rtol=0)


def test_soft_targets_are_allowed():
    """The likelihood of a soft target is that of its two labels, weighted, sample by sample."""
    distribution, one, other = gaussian(), indicator(), indicator().roll(1, 1)
    soft = distribution.log_likelihood(0.25 * one + 0.75 * other, 2, generator=generator())
    draw = streamed.Noise(1, int(torch.randint(2**62, (), generator=generator())), torch.device("cpu"))
    arguments = [t.flatten(2) for t in (distribution.loc, distribution.cov_diag.sqrt())]
    each = [
        streamed.SampleLogLikelihood.apply(
            arguments[0], distribution.cov_factor.flatten(3), arguments[1], y.flatten(2), None, draw, False, 100
        )
        for y in (one, other)
    ]
    torch.testing.assert_close(soft, (0.25 * each[0] + 0.75 * each[1]).logsumexp(0) - math.log(2))


@pytest.mark.parametrize("num_samples", [0, 1, 7])
def test_odd_numbers_of_samples_are_refused(num_samples):
    with pytest.raises(ValueError, match=f"num_samples is {num_samples}.*even"):
        gaussian().log_likelihood(indicator(), num_samples)


def test_a_target_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"target has shape \(2, 3, 4\)"):
        gaussian().log_likelihood(indicator((2, 3, 4)))


def test_temperature_and_class_scale_multiply_deviations():
    distribution = gaussian()
    scale = torch.tensor([1.0, -2.0, 0.0])
    changed = distribution.scaled(0.5, scale)
    factors = 0.5 * scale.view(-1, 1, 1)
    ours, original = (d.rsample((4,), generator()) - distribution.loc for d in (changed, distribution))
    # P's part keeps its sign; noise of single voxels is symmetric, so its sign has no meaning
    low_rank = LowRankGaussianLogits(distribution.loc, distribution.cov_factor, torch.zeros(SHAPE, dtype=torch.float64))
    expected = (low_rank.rsample((4,), generator()) - distribution.loc) * factors
    actual = low_rank.scaled(0.5, scale).rsample((4,), generator()) - distribution.loc
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(ours[:, :, 0], 0.5 * original[:, :, 0])
    assert ours[:, :, 2].abs().max() == 0


def test_blended_parameters_give_the_same_distribution_back():
    distribution = gaussian(torch.float32, shape=(1, *SHAPE[1:]))
    head = network(head_kwargs={"rank": RANK}, classes=3).head
    parameters = distribution.blendable()
    assert parameters.shape == (1, head.num_blended, *SHAPE[2:])
    foreground = torch.ones(1, *SHAPE[2:], dtype=torch.bool)
    foreground[0, 0] = False
    back = head.blended(parameters[0].clone(), foreground)
    torch.testing.assert_close(back.loc, distribution.loc)
    torch.testing.assert_close(back.cov_factor[..., 1:, :], distribution.cov_factor[..., 1:, :])
    torch.testing.assert_close(back.cov_diag[..., 1:, :], distribution.cov_diag[..., 1:, :])
    samples = torch.stack(list(back.draw(5, generator())))
    assert torch.equal(samples[:, :, 0], distribution.loc[0, :, 0].expand(5, -1, -1))


def labels_of(regions=False, ignore=False):
    """nnU-Net's label manager of three labels or two regions."""
    labels = {"background": 0, "whole": [1, 2], "lesion": 2} if regions else {"background": 0, "organ": 1, "lesion": 2}
    return LabelManager({**labels, **({"ignore": 3} if ignore else {})}, [1, 2] if regions else None)


def test_targets_are_encoded_as_nnunet_gives_them():
    labels = torch.tensor([0, 1, 2, 3]).view(1, 1, 2, 2)
    y, valid = encode_target(labels, 3, labels_of(ignore=True))
    assert y[0, :, 0, 0].tolist() == [True, False, False]
    assert y[0, :, 1, 0].tolist() == [False, False, True]
    assert not y[0, :, 1, 1].any()
    assert valid.flatten().tolist() == [True, True, True, False]
    assert encode_target(labels, 3, labels_of())[1] is None
    regions = torch.rand(1, 3, 2, 2) > 0.5
    y, valid = encode_target(regions, 2, labels_of(regions=True, ignore=True))
    assert torch.equal(y, regions[:, :2])
    assert torch.equal(valid, ~regions[:, 2:])


def test_loss_is_nats_per_counted_voxel():
    """With no covariance to speak of, it is the cross-entropy of the mean."""
    head = network(classes=3).head
    loc = torch.randn(2, 3, 4, 5)
    distribution = LowRankGaussianLogits(loc, torch.zeros(2, 2, 3, 4, 5), torch.full_like(loc, 1e-12))
    target = torch.randint(0, 4, (2, 1, 4, 5))
    expected = [F.cross_entropy(a[None], t, ignore_index=3) for a, t in zip(loc, target, strict=True)]
    actual = head.negative_log_likelihood(distribution, target, labels_of(ignore=True))
    torch.testing.assert_close(actual, sum(expected) / 2)
    ignored = head.negative_log_likelihood(distribution, torch.full_like(target, 3), labels_of(ignore=True))
    assert ignored == 0


def test_warm_up_trains_the_mean_alone_and_leaves_no_parameter_without_gradient():
    made = network(classes=3, head_kwargs={"warm_up": 0.25}).train()
    output = made(torch.randn(2, MODALITIES, 8, 8))
    target = torch.randint(0, 3, (2, 1, 8, 8))
    loss = made.build_loss(lambda logits, target: logits.square().mean(), labels_of())
    assert loss(output.distribution, target, Step(0.25)) == output[0].square().mean()
    loss(output.distribution, target, Step(0.25)).backward(retain_graph=True)
    assert made.head.factor_layer.weight.grad.abs().max() == 0
    assert made.head.seg_layers[0].weight.grad.abs().max() > 0
    torch.manual_seed(3)
    nats = made.head.negative_log_likelihood(output.distribution, target, labels_of())
    torch.manual_seed(3)
    both = loss(output.distribution, target, Step(0.26))
    torch.testing.assert_close(both, 20 * nats + output[0].square().mean())
    both.backward()
    assert made.head.factor_layer.weight.grad.abs().max() > 0


def test_nothing_varies_outside_the_foreground():
    made = network(classes=3)
    mask = torch.rand(2, 1, 8, 8) > 0.5
    image = torch.randn(2, MODALITIES, 8, 8)
    plain, masked = made(image).distribution, made(torch.cat((image, mask.float()), 1)).distribution
    torch.testing.assert_close(masked.loc, plain.loc)
    torch.testing.assert_close(masked.cov_factor, plain.cov_factor * mask[:, None])
    torch.testing.assert_close(masked.cov_diag, torch.where(mask, plain.cov_diag, ssn.EPSILON))
    masked.rsample((2,)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in made.parameters() if p.grad is not None)


def test_the_foreground_stands_between_image_and_cascade_channels():
    made = MultimodalUNet(4, 2, backbone="early", head="ssn", num_image_channels=3, **unet_kwargs(2))
    x, mask = torch.randn(2, 4, 8, 8), torch.rand(2, 1, 8, 8) > 0.5
    image, foreground = made.split_foreground(torch.cat((x[:, :3], mask.float(), x[:, 3:]), 1))
    assert torch.equal(image, x)
    assert torch.equal(foreground, mask)
    assert made.split_foreground(x)[1] is None


def test_the_diagonal_model_has_no_factor():
    made = network("ssn_diagonal", classes=3)
    assert made(torch.randn(1, MODALITIES, 8, 8)).distribution.cov_factor.shape == (1, 0, 3, 8, 8)
    assert made.head.factor_layer is None


@pytest.mark.parametrize("options", [{"rank": -1}, {"num_samples": 7}, {"warm_up": 1.5}, {"loss_weight": -1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        network(head_kwargs=options)


def test_half_precision_training_survives_degenerate_data():
    """Constant patches, no foreground, a single voxel; benchmarks/ssn_stress.py does a thousand steps of it."""
    made = network(classes=3).train()
    optimizer = torch.optim.SGD(made.parameters(), 0.01, momentum=0.99, nesterov=True)
    loss = made.build_loss(lambda logits, target: F.cross_entropy(logits.float(), target[:, 0]), labels_of())
    for dtype in (torch.bfloat16, torch.float16):
        for step in range(6):
            image = torch.randn(2, MODALITIES, 8, 8) * (step % 3 > 0)
            target = torch.zeros(2, 1, 8, 8, dtype=torch.long)
            target[:, 0, 4, 4] = step % 2
            with torch.autocast("cpu", dtype):
                value = loss(made(image).distribution, target, Step())
            assert value.dtype == torch.float32
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            assert torch.isfinite(value)
            assert all(torch.isfinite(p).all() for p in made.parameters())


class SSNContract(NetworkContract):
    head = "ssn"

    def loss(self, output):
        return super().loss(output) + output.distribution.rsample((2,)).square().mean()


class TestSSNWithEarlyFusion(SSNContract):
    backbone = "early"


class TestSSNWithCRNP(SSNContract):
    backbone = "crnp"


class TestDiagonalSSNWithEarlyFusion(SSNContract):
    backbone = "early"
    head = "ssn_diagonal"
