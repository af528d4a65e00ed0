"""Samples of whole images: no seams, the right moments, members of deterministic models."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nnunet_multimodal.inference.maps import MAPS, RunningMaps, expected_entropy, mutual_information, predictive_entropy
from nnunet_multimodal.inference.predict import CaseWriter
from nnunet_multimodal.inference.sampling import ImageDistribution, SamplePredictor
from nnunet_multimodal.network import MultimodalUNet
from tests.contracts import unet_kwargs

IMAGE = (1, 20, 44)
CLASSES = 3
TOLERANCE = 0.05  # nnU-Net blends in half precision


class IndependentTiles(SamplePredictor):
    """What must not be done: every tile has a sample of its own."""

    def _internal_maybe_mirror_and_predict(self, x):
        return self.network.distribution(x).rsample((1,))[0]


def pointwise_network(head="ssn"):
    """Every voxel by itself, so that a tile's parameters do not depend on the tile."""
    torch.manual_seed(0)
    changes = {"n_stages": 2, "features_per_stage": [4, 6], "kernel_sizes": [[1, 1]] * 2, "strides": [[1, 1]] * 2}
    changes |= {"n_conv_per_stage": [1, 1], "n_conv_per_stage_decoder": [1], "norm_op": None}
    network = MultimodalUNet(2, CLASSES, backbone="early", head=head, **unet_kwargs(2, **changes)).eval()
    if head == "ssn":
        for parameter in network.head.factor_layer.parameters():
            parameter.data *= 5  # samples that differ by far more than half precision's error
    if head == "mose":
        for parameter in network.head.convolutions.parameters():
            parameter.data *= 3
    return network


def predictor_of(network, patch, cls=SamplePredictor, folds=1, mirrors=None):
    predictor = cls(0.5, True, True, False, torch.device("cpu"), allow_tqdm=False)
    plans = SimpleNamespace(get_label_manager=lambda _: SimpleNamespace(num_segmentation_heads=CLASSES))
    weights = [{k: v + 0.1 * fold for k, v in network.state_dict().items()} for fold in range(folds)]
    predictor.manual_initialization(network, plans, SimpleNamespace(patch_size=patch), weights, {}, "", mirrors)
    return predictor


def image():
    return torch.randn(2, *IMAGE, generator=torch.Generator().manual_seed(1))


def samples_of(predictor, count=6):
    return torch.stack(list(predictor.predict_samples(image(), count, torch.Generator().manual_seed(2))))


def assert_without_seams(tiled, untiled):
    """The same noise, so the same samples: a difference is the tiles' doing.

    At the image's corners nnU-Net's Gaussian weights are subnormal in half precision, and its logits as inexact.
    """
    inner = (..., slice(2, -2), slice(2, -2))
    torch.testing.assert_close(tiled[inner], untiled[inner], atol=TOLERANCE, rtol=0.01)


def test_samples_of_a_tiled_image_are_those_of_the_whole():
    network = pointwise_network()
    untiled = samples_of(predictor_of(network, IMAGE[1:]))
    assert untiled.std(0).mean() > 10 * TOLERANCE
    assert_without_seams(samples_of(predictor_of(network, (12, 16))), untiled)


def test_independent_sampling_of_tiles_fails_that_test():
    network = pointwise_network()
    untiled = samples_of(predictor_of(network, IMAGE[1:]))
    predictor = predictor_of(network, (12, 16), IndependentTiles)
    predictor.label_manager = SimpleNamespace(num_segmentation_heads=CLASSES)
    torch.manual_seed(2)
    tiled = torch.stack([predictor.predict_logits_from_preprocessed_data(image()) for _ in range(6)]).float()
    with pytest.raises(AssertionError):
        assert_without_seams(tiled, untiled)


def test_the_samples_have_the_networks_mean_and_deviation():
    network = pointwise_network()
    samples = samples_of(predictor_of(network, IMAGE[1:]), 4000)
    distribution = network.distribution(image()[:, 0][None])
    variance = distribution.cov_factor[0].square().sum(0) + distribution.cov_diag[0]
    torch.testing.assert_close(samples.mean(0)[:, 0], distribution.loc[0].detach(), atol=0.1, rtol=0.05)
    torch.testing.assert_close(samples.std(0)[:, 0], variance.sqrt().detach(), atol=0.05, rtol=0.1)


def test_mirroring_averages_the_mean_alone():
    network = pointwise_network()  # whose mirrored outputs are its outputs
    with_mirrors, without = (predictor_of(network, (12, 16), mirrors=m) for m in ((0, 1), None))
    foreground = torch.ones(IMAGE, dtype=torch.bool)
    mirrored, plain = (p.predict_distribution(image(), foreground) for p in (with_mirrors, without))
    torch.testing.assert_close(mirrored.mean, plain.mean, atol=TOLERANCE, rtol=0.01)
    assert torch.equal(mirrored.folds[0].cov_factor, plain.folds[0].cov_factor)


@pytest.mark.parametrize("head", ["deterministic", "ssn", "mose"])
def test_samples_depend_on_their_generator_alone(head):
    """Not on torch's other random numbers, nor on whether kernels must be deterministic, which on CPUs all are."""
    predictor = predictor_of(pointwise_network(head), (12, 16), folds=2, mirrors=(0, 1))
    first = samples_of(predictor)
    torch.manual_seed(7)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(samples_of(predictor), first)
    finally:
        torch.use_deterministic_algorithms(False)


def test_samples_of_a_mixture_have_no_seams():
    network, foreground = pointwise_network("mose"), torch.ones((1, *IMAGE), dtype=torch.bool)
    tiled, untiled = (
        torch.stack(
            list(
                predictor_of(network, patch)
                .predict_distribution(image(), foreground)
                .draw(8, torch.Generator().manual_seed(2), compact=True)
            )
        )
        for patch in ((12, 16), IMAGE[1:])
    )
    assert_without_seams(tiled, untiled)
    assert (untiled[0] - untiled[1]).abs().max() > 4 * TOLERANCE


def test_folds_of_a_mixture_have_their_own_weights_and_may_have_no_sample():
    predictor = predictor_of(pointwise_network("mose"), (12, 16), folds=3)
    distribution = predictor.predict_distribution(image(), torch.ones((1, *IMAGE), dtype=torch.bool))
    shifts = [fold.head.expert_mean[0, 0].item() for fold in distribution.folds]
    assert [round(later - shifts[0], 4) for later in shifts] == [0, 0.1, 0.2]
    generator = torch.Generator().manual_seed(0)
    assert len(list(distribution.draw(2, generator))) == 2
    assert len(list(distribution.draw(12, generator, compact=True))) == len(distribution.weights(12)) == 12
    assert sum(distribution.weights(12)) == pytest.approx(1)
    with pytest.raises(ValueError, match="1 samples of 4 experts"):
        list(distribution.draw(3, generator, compact=True))


def test_folds_take_equal_shares_and_the_mean_is_theirs():
    network = pointwise_network()
    predictor = predictor_of(network, (12, 16), folds=3)
    distribution = predictor.predict_distribution(image(), torch.ones(IMAGE, dtype=torch.bool))
    expected = predictor.predict_logits_from_preprocessed_data(image())[:CLASSES]
    torch.testing.assert_close(distribution.mean, expected, atol=TOLERANCE, rtol=0.01)
    assert len(distribution.folds) == 3
    assert len(list(distribution.draw(7, torch.Generator()))) == distribution.count(7) == 7
    assert len(predictor.list_of_parameters) == 3


@pytest.mark.parametrize(("mirrors", "folds", "members"), [(None, 1, 1), ((0, 1), 1, 4), ((0,), 2, 4), (None, 3, 3)])
def test_deterministic_models_have_folds_and_mirrors_as_members(mirrors, folds, members):
    predictor = predictor_of(pointwise_network("deterministic"), (12, 16), folds=folds, mirrors=mirrors)
    distribution = predictor.predict_distribution(image(), torch.ones(IMAGE, dtype=torch.bool))
    assert len(distribution.members) == members
    assert distribution.count(20) == members
    assert distribution.count(2) == min(2, members)
    samples = torch.stack(list(distribution.draw(20, torch.Generator())))
    torch.testing.assert_close(samples.mean(0), distribution.mean.float(), atol=TOLERANCE, rtol=0.01)
    assert len(samples) == members


def test_networks_of_nnunet_have_members_too():
    torch.manual_seed(0)
    predictor = predictor_of(nn.Conv2d(2, CLASSES, 3, padding=1), (12, 16), mirrors=(0, 1))
    distribution = predictor.predict_distribution(image(), torch.ones(IMAGE, dtype=torch.bool))
    assert len(distribution.members) == 4
    assert torch.stack(distribution.members).float().std(0).max() > 0.1


def test_outside_the_foreground_all_samples_are_the_mean():
    predictor = predictor_of(pointwise_network(), (12, 16))
    foreground = torch.ones(IMAGE, dtype=torch.bool)
    foreground[:, :5] = False
    distribution = predictor.predict_distribution(image(), foreground)
    samples = torch.stack(list(distribution.draw(5, torch.Generator())))
    assert samples[:, :, :, :5].std(0).max() == 0
    assert samples[:, :, :, 5:].std(0).min() > 0


def test_temperature_and_class_scale_act_on_members_as_on_samples():
    members = (torch.tensor([[[1.0]], [[0.0]]]), torch.tensor([[[3.0]], [[4.0]]]))
    distribution = ImageDistribution(sum(members) / 2, members=members)
    drawn = list(distribution.draw(2, torch.Generator(), temperature=2.0, class_scale=torch.tensor([1.0, -1.0])))
    values = sorted(tuple(x.flatten().tolist()) for x in drawn)
    assert values == [(0.0, 6.0), (4.0, -2.0)]


@pytest.mark.parametrize("regions", [False, True])
def test_running_maps_are_those_of_all_samples(regions):
    samples = torch.rand(5, 3, 4, 4)
    samples = samples if regions else samples / samples.sum(1, keepdim=True)
    running = RunningMaps(regions)
    for sample in samples:
        running.add(sample)
    expected = [f(samples, regions) for f in (predictive_entropy, expected_entropy, mutual_information)]
    for name, value in zip(MAPS, expected, strict=True):
        torch.testing.assert_close(running.maps()[name], value)
    assert running.maps()["mutual_information"].min() >= 0


def test_entropies_of_known_probabilities():
    half = torch.full((2, 2, 1), 0.5)
    certain = torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]]])  # two samples that contradict each other
    assert predictive_entropy(certain).item() == pytest.approx(0.6931, abs=1e-4)
    assert expected_entropy(certain).item() == 0
    assert mutual_information(certain).item() == pytest.approx(0.6931, abs=1e-4)
    assert mutual_information(half).item() == 0
    assert expected_entropy(half, regions=True).item() == pytest.approx(2 * 0.6931, abs=1e-4)


def test_the_first_samples_are_of_all_folds_and_experts_in_turn():
    predictor = predictor_of(pointwise_network("mose"), (12, 16), folds=3)
    distribution = predictor.predict_distribution(image(), torch.ones((1, *IMAGE), dtype=torch.bool))
    numbers = distribution.numbers(29)
    assert sorted(numbers) == list(range(29))
    assert numbers[:10] == list(range(0, 29, 3))  # the first fold's, which draw yields first
    groups, weights = distribution.groups(29), distribution.weights(29)
    assert sorted(groups[:12]) == list(range(12))
    assert groups[:12] == groups[12:24]
    assert [group // 4 for group in groups[:6]] == [0, 1, 2, 0, 1, 2]
    assert sum(weights) == pytest.approx(1)
    own = distribution.folds[1].expert_weights
    shares = [sum(w for w, group in zip(weights, groups, strict=True) if group == 4 + k) for k in range(4)]
    assert shares == pytest.approx((own / own.sum() * 10 / 29).tolist())


def test_members_keep_their_numbers():
    predictor = predictor_of(pointwise_network("deterministic"), (12, 16), folds=2)
    assert predictor.predict_distribution(image(), torch.ones(IMAGE, dtype=torch.bool)).numbers(2) == [0, 1]


def test_samples_of_a_case_whose_name_goes_on_are_left_alone(tmp_path):
    (tmp_path / "samples").mkdir()
    for stem in ("P1__000", "P1__001", "P1__1000", "P1__0__000", "P1__x"):
        (tmp_path / "samples" / f"{stem}.nii.gz").touch()
    writer = SimpleNamespace(output=tmp_path, ending=".nii.gz")
    found = {name: CaseWriter.files(writer, SimpleNamespace(name=name))["samples"] for name in ("P1", "P1__0", "P[1]")}
    assert [path.name[:-7] for path in found["P1"]] == ["P1__000", "P1__001", "P1__1000"]
    assert [path.name[:-7] for path in found["P1__0"]] == ["P1__0__000"]
    assert not found["P[1]"]
