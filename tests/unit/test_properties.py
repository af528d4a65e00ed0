"""What holds whatever the shapes, spacings, numbers of modalities and classes (hypothesis)."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from nnunet_multimodal.backbones import BACKBONES
from nnunet_multimodal.backbones.base import SubtaskLogits
from nnunet_multimodal.heads import HEADS
from nnunet_multimodal.heads.mose import mixture_logits
from nnunet_multimodal.heads.transport_cost import pairwise_cost, transport_terms
from nnunet_multimodal.inference.quantities import distribution_of, measure
from nnunet_multimodal.metrics.calibration import expected_calibration_error, reliability_curve
from nnunet_multimodal.metrics.distribution import (
    continuous_ranked_probability_score,
    count_overlaps,
    generalized_energy_distance,
    matched_iou,
    pairwise_iou_distance,
    sample_diversity,
    score_distribution,
    weighted_quantile,
)
from nnunet_multimodal.metrics.statistics import bootstrap_interval, holm, paired_p_value
from nnunet_multimodal.metrics.surface import (
    dice,
    hausdorff_distance,
    normalised_surface_distance,
    surface_distances,
)
from nnunet_multimodal.metrics.transport import transport_plan
from nnunet_multimodal.modalities import ModalityDropout, split_present
from nnunet_multimodal.network import MultimodalUNet, NetworkOutput
from nnunet_multimodal.preprocessing import PLACEHOLDER, find_placeholders
from tests.contracts import unet_kwargs, with_absent

PROFILE = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
networks_checked = settings(PROFILE, max_examples=6)
solved = settings(PROFILE, max_examples=10)  # linear programs, exact tests
checked = settings(PROFILE, max_examples=25)


# --- networks

HEAD_OPTIONS = {
    "mose": {"num_experts": 2, "samples_per_expert": 2},
    "ssn": {"rank": 2, "num_samples": 2},
    "ssn_diagonal": {"num_samples": 2},
}


@st.composite
def topologies(draw):
    """A tiny U-Net with strides and kernels of any anisotropy, and a patch that it takes."""
    dim, stages, residual = draw(st.integers(2, 3)), draw(st.integers(2, 3)), draw(st.booleans())
    sizes = st.lists(st.integers(1, 3 if stages == 2 else 2), min_size=dim, max_size=dim)
    strides = [[1] * dim, *(draw(sizes) for _ in range(stages - 1))]
    deepest = draw(st.lists(st.integers(1, 2), min_size=dim, max_size=dim).filter(lambda side: math.prod(side) > 1))
    patch = tuple(np.prod([*strides, deepest], 0).tolist())
    depth = {"n_blocks_per_stage" if residual else "n_conv_per_stage": [1] * stages}
    topology = {
        **unet_kwargs(dim, residual),
        **depth,
        "n_stages": stages,
        "features_per_stage": draw(st.lists(st.integers(2, 4), min_size=stages, max_size=stages)),
        "kernel_sizes": draw(st.lists(st.lists(st.sampled_from([1, 3]), min_size=dim, max_size=dim),
                                      min_size=stages, max_size=stages)),
        "strides": strides,
        "n_conv_per_stage_decoder": [1] * (stages - 1),
    }  # fmt: skip
    return topology, patch


def network_and_batch(draw, backbone):
    """A network of random shape, a batch for it, and its number of classes."""
    topology, patch = draw(topologies())
    modalities = draw(st.integers(BACKBONES[backbone].MIN_MODALITIES, 4))
    head, cascade = draw(st.sampled_from(sorted(HEADS))), draw(st.integers(0, 2))
    regions = draw(st.booleans())
    classes = draw(st.integers(1 if regions else 2, 4))
    batch = draw(st.integers(1, 3))
    torch.manual_seed(draw(st.integers(0, 9)))
    network = MultimodalUNet(
        modalities + cascade,
        classes,
        backbone=backbone,
        head=head,
        num_image_channels=modalities,
        backbone_kwargs={"has_regions": regions} if backbone == "ciml" else {},
        head_kwargs={**HEAD_OPTIONS.get(head, {}), **({"has_regions": regions} if head == "mose" else {})},
        deep_supervision=draw(st.booleans()),
        **topology,
    )
    network.apply(network.initialize)
    for parameter in network.parameters():  # some begin as zero
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network, torch.randn(batch, modalities + cascade, *patch), classes


def pairs_of(draw, network, x):
    """Some (sample, modality), none to all."""
    pairs = itertools.product(range(len(x)), range(network.num_modalities))
    return [pair for pair in pairs if draw(st.booleans())]


def some_absent(draw, network, x):
    """Some (sample, modality), never all of a sample."""
    absent = pairs_of(draw, network, x)
    for sample in range(len(x)):
        lost = [pair for pair in absent if pair[0] == sample]
        if len(lost) == network.num_modalities:
            absent.remove(draw(st.sampled_from(lost)))
    return absent


@pytest.mark.parametrize("backbone", BACKBONES)
@networks_checked
@given(data=st.data())
def test_outputs_have_the_shapes_of_the_topology_and_are_finite(backbone, data):
    network, x, classes = network_and_batch(data.draw, backbone)
    x = with_absent(x, pairs_of(data.draw, network, x))
    space = np.array(x.shape[2:])
    shape = (len(x), classes, *space)
    output = network.train()(x)
    assert isinstance(output, NetworkOutput)
    assert output[0].shape == shape
    assert output.distribution.rsample((3,)).shape == (3, *shape)
    strides = np.cumprod(network.head.topology.strides, 0)[1:-1] if network.deep_supervision else []
    assert [tuple(c.shape) for c in output.coarse_logits] == [(*shape[:2], *(space // s)) for s in strides]
    found = [output[0], *output.coarse_logits, output.distribution.rsample((3,)), *output.auxiliary_losses.values()]
    assert all(values.isfinite().all() for values in found)
    network.eval().deep_supervision = False
    plain = network(x)
    assert plain.shape == shape
    assert plain.isfinite().all()
    torch.testing.assert_close(network.distribution(x).mean, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backbone", BACKBONES)
@networks_checked
@given(data=st.data())
def test_a_sample_has_the_same_output_in_any_batch(backbone, data):
    network, x, _ = network_and_batch(data.draw, backbone)
    network.eval().deep_supervision = False
    x = with_absent(x, pairs_of(data.draw, network, x))
    order = data.draw(st.permutations(range(len(x))))
    with torch.no_grad():
        together, alone = network(x[order]), torch.cat([network(x[[sample]]) for sample in order])
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("backbone", BACKBONES)
@networks_checked
@given(data=st.data())
def test_every_sign_of_absence_gives_the_same_output(backbone, data):
    network, x, _ = network_and_batch(data.draw, backbone)
    network.eval()
    absent = some_absent(data.draw, network, x)
    nothing = with_absent(x, absent)
    other = nothing.clone()
    for sample, channel in absent:
        sign = data.draw(st.sampled_from(["zeros", "partly NaN"]))
        other[sample, channel] = 0 if sign == "zeros" else 7 * x[sample, channel]
        if sign == "partly NaN":
            other[sample, channel].view(-1)[data.draw(st.integers(0, x[0, 0].numel() - 1))] = math.nan
    with torch.no_grad():
        assert torch.equal(network(nothing)[0], network(other)[0])


@pytest.mark.parametrize("backbone", ["crnp", "shaspec", "ciml"])
@settings(PROFILE, max_examples=3)
@given(topology=topologies(), classes=st.integers(2, 4))
def test_a_backbone_for_several_modalities_refuses_a_single_one(backbone, topology, classes):
    with pytest.raises(ValueError, match=f"{backbone}.*2"):
        MultimodalUNet(1, classes, backbone=backbone, **topology[0])


# --- presence

STATES = ("image", "one voxel", "zeros", "NaN", "partly NaN", "NaN in zeros")


def channel(state, shape, at):
    """A channel in one of these states, which differs from others in the same state."""
    values = torch.zeros(shape)
    if state in ("image", "partly NaN"):
        values += torch.arange(1.0, 1 + values.numel()).view(shape) - 2.5 - at
    if state == "one voxel":
        values.view(-1)[at % values.numel()] = -1e-3
    if state == "NaN":
        values += math.nan
    if state in ("partly NaN", "NaN in zeros"):
        values.view(-1)[at % values.numel()] = math.nan
    return values


@st.composite
def batches(draw, num_channels, extra=0):
    """States (B, C) of the image channels, and the batch with further channels behind them."""
    batch, shape = draw(st.integers(1, 4)), draw(array_shapes(min_dims=2, max_dims=3, max_side=3))
    row = st.lists(st.sampled_from(STATES), min_size=num_channels, max_size=num_channels)
    states = [draw(row) for _ in range(batch)]
    at = draw(st.integers(0, 9))
    x = torch.stack([torch.stack([channel(s, shape, at + i) for i, s in enumerate(row)]) for row in states])
    behind = [channel("image", shape, 50 + i).expand(batch, 1, *shape) for i in range(extra)]
    return states, torch.cat((x, *behind), 1)


@st.composite
def groupings(draw):
    """Channels of each modality, all of equal number, in any order."""
    modalities, size = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    order = draw(st.permutations(range(modalities * size)))
    return [list(order[m * size : (m + 1) * size]) for m in range(modalities)]


def expected_presence(states, groups):
    """By the words of the module, one sample after the other."""
    rows = []
    for row in states:
        own = [[row[channel] for channel in group] for group in groups]
        unknown = [any("NaN" in state for state in modality) for modality in own]
        there = [not nan and "zeros" not in modality for nan, modality in zip(unknown, own, strict=True)]
        if not any(there):
            there = [True] * len(groups) if all(unknown) else [not nan for nan in unknown]
        rows.append((there, unknown))
    return rows


@checked
@given(data=st.data())
def test_presence_is_read_from_every_channel_of_a_modality(data):
    groups = data.draw(groupings())
    states, x = data.draw(batches(sum(map(len, groups))))
    images = x[:, torch.tensor(groups)]  # (B, M, G, *D)
    values, present = split_present(images)
    for sample, (there, unknown) in enumerate(expected_presence(states, groups)):
        assert present[sample].tolist() == there
        for modality, whole in enumerate(images[sample]):
            kept = there[modality] and not unknown[modality]
            assert torch.equal(values[sample, modality], whole if kept else torch.zeros_like(whole))


@checked
@given(data=st.data())
def test_a_network_finds_its_modalities_and_leaves_the_cascade_alone(data):
    groups, cascade = data.draw(groupings()), data.draw(st.integers(0, 2))
    states, x = data.draw(batches(sum(map(len, groups)), cascade))
    dedicated = data.draw(st.none() | st.sets(st.sampled_from(range(len(groups))), min_size=1).map(sorted))
    network = MultimodalUNet(
        x.shape[1],
        2,
        backbone="early",
        num_image_channels=x.shape[1] - cascade,
        modalities=groups,
        dedicated=dedicated,
        **unet_kwargs(x.ndim - 2, n_stages=2, features_per_stage=[2, 2], kernel_sizes=[1, 1], strides=[1, 1],
                      n_conv_per_stage=[1, 1], n_conv_per_stage_decoder=[1]),
    )  # fmt: skip
    for group in groups if dedicated is not None else ():
        if groups.index(group) not in dedicated:
            for row, number in itertools.product(states, group):
                row[number] = "NaN"
    before = x.clone()
    image, behind, present = network.split(x)
    np.testing.assert_array_equal(x, before)
    assert torch.equal(behind, x[:, x.shape[1] - cascade :])
    for sample, (there, unknown) in enumerate(expected_presence(states, groups)):
        assert present[sample].tolist() == there
        for modality, group in enumerate(groups):
            whole = torch.zeros_like(x[sample, group])
            if there[modality] and not unknown[modality]:
                whole = x[sample, group]
            assert torch.equal(image[sample, modality], whole)


@checked
@given(data=st.data(), progress=st.sampled_from([0.0, 0.05, 1.0]), seed=st.integers(0, 99))
def test_dropout_keeps_one_of_what_is_there_and_gives_nothing_back(data, progress, seed):
    groups = data.draw(groupings())
    _, x = data.draw(batches(sum(map(len, groups)), data.draw(st.integers(0, 2))))
    before = x.clone()
    out = ModalityDropout()(x, groups, progress, torch.Generator().manual_seed(seed))
    np.testing.assert_array_equal(x, before)
    had, has = (split_present(images[:, torch.tensor(groups)])[1] for images in (x, out))
    assert has.any(1).all()
    assert not (has & ~had).any()
    lost = had & ~has
    assert progress or not lost.any()
    for sample in range(len(x)):
        gone = [channel for m, group in enumerate(groups) if lost[sample, m] for channel in group]
        kept = [channel for channel in range(x.shape[1]) if channel not in gone]
        assert out[sample, gone].isnan().all()
        np.testing.assert_array_equal(out[sample, kept], x[sample, kept])


@checked
@given(data=st.data(), shape=array_shapes(min_dims=2, max_dims=3, max_side=4))
def test_a_placeholder_has_its_value_in_every_voxel(data, shape):
    wrong = data.draw(st.lists(st.none() | st.integers(0, math.prod(shape) - 1), min_size=1, max_size=4))
    images = np.full((len(wrong), *shape), PLACEHOLDER, data.draw(st.sampled_from([np.uint16, np.float32])))
    for image, at in zip(images, wrong, strict=True):
        if at is not None:
            image.flat[at] -= 1
    assert find_placeholders(images).tolist() == [at is None for at in wrong]


# --- logits of several segmentors and samples


@checked
@given(
    data=st.data(),
    regions=st.booleans(),
    classes=st.integers(2, 4),
    segmentors=st.integers(1, 4),
    batch=st.integers(1, 2),
)
def test_an_average_is_that_of_the_probabilities_of_who_answers(data, regions, classes, segmentors, batch):
    shape = (batch, segmentors, classes, *data.draw(array_shapes(min_dims=2, max_dims=3, max_side=2)))
    logits = data.draw(arrays(np.float32, shape, elements=st.integers(-4, 4)))
    active = data.draw(arrays(bool, shape[:3]))
    here = data.draw(arrays(bool, shape[:2]))
    here[:, 0] |= ~here.any(1)
    active &= here[:, :, None]
    active |= here[:, :, None] & ~active.any(1, keepdims=True)
    active[:, :, 0] |= here & (not regions)
    found = SubtaskLogits((torch.tensor(logits),), torch.tensor(active), regions).average().double()
    for b in range(batch):
        sums = np.zeros(shape[2:])
        for own, answers in zip(logits[b].astype(float), active[b], strict=True):
            odds = np.exp(own[answers])
            sums[answers] += odds / (1 + odds) if regions else odds / odds.sum(0)
        mean = sums / active[b].sum(0).reshape(-1, *(1,) * (len(shape) - 3))
        if not regions:
            mean[0] = np.maximum(1 - mean[1:].sum(0), 1e-6)
        np.testing.assert_allclose(found[b].sigmoid() if regions else found[b].exp(), mean, atol=1e-5)


@checked
@given(
    data=st.data(), regions=st.booleans(), classes=st.integers(2, 4), samples=st.integers(1, 4), batch=st.integers(1, 3)
)
def test_the_logits_of_a_mixture_are_those_of_its_mean_probability(data, regions, classes, samples, batch):
    shape = (samples, batch, classes, *data.draw(array_shapes(min_dims=2, max_dims=3, max_side=2)))
    logits = data.draw(arrays(np.float32, shape, elements=st.integers(-4, 4)))
    weights = data.draw(arrays(np.float32, (samples, batch), elements=st.integers(1, 3)))
    weights /= weights.sum(0)
    odds = np.exp(logits.astype(float))
    probability = odds / (1 + odds) if regions else odds / odds.sum(2, keepdims=True)
    expected = np.einsum("nb...,nb->b...", probability, weights)
    found = mixture_logits(torch.tensor(logits), torch.tensor(weights), regions)
    np.testing.assert_allclose(found.sigmoid() if regions else found.exp(), expected, atol=1e-5)


# --- surfaces


@st.composite
def masks(draw, count, empty=True):
    """Masks on one grid, and its spacing; distances of its voxels can be compared without rounding."""
    shape = draw(array_shapes(min_dims=2, max_dims=3, max_side=6))
    spacing = draw(st.lists(st.sampled_from([0.5, 1.0, 1.25, 3.0]), min_size=len(shape), max_size=len(shape)))
    found = draw(arrays(bool, (count, *shape)))
    for mask in () if empty else found:
        mask.flat[draw(st.integers(0, mask.size - 1))] = True
    return found, spacing


def surface_mm(mask, spacing):
    """Positions of the voxels of which a face neighbour is missing."""
    inside, margin = mask.copy(), np.pad(mask, 1)
    for axis, step in itertools.product(range(mask.ndim), (-1, 1)):
        inside &= np.roll(margin, step, axis)[(slice(1, -1),) * mask.ndim]
    return np.argwhere(mask & ~inside) * np.array(spacing)


@checked
@given(
    pair=masks(2, empty=False),
    percentile=st.sampled_from([50, 95, 100]),
    tolerance=st.sampled_from([0, 0.5, 1, 1.5, 3]),
)
def test_surface_measures_agree_with_all_pairs_of_boundary_voxels(pair, percentile, tolerance):
    (a, b), spacing = pair
    distances = cdist(surface_mm(a, spacing), surface_mm(b, spacing))
    sides = distances.min(1), distances.min(0)
    expected = max(np.percentile(side, percentile) for side in sides)
    assert hausdorff_distance(a, b, spacing, percentile) == pytest.approx(expected)
    within = np.mean(np.concatenate(sides) <= tolerance)
    assert normalised_surface_distance(a, b, spacing, tolerance) == pytest.approx(within)


@checked
@given(data=st.data(), pair=masks(2))
def test_surface_measures_do_not_depend_on_orientation_margin_or_order(data, pair):
    both, spacing = pair
    axes = data.draw(st.permutations(range(len(spacing))))
    turned = np.transpose(both, (0, *(axis + 1 for axis in axes)))
    turned = np.flip(turned, data.draw(st.sets(st.sampled_from(range(1, turned.ndim)))))
    margin = data.draw(
        st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=len(spacing), max_size=len(spacing))
    )
    turned = np.pad(turned, [(0, 0), *margin])[::-1]
    own, other = surface_distances(*both, spacing), surface_distances(*turned, [spacing[axis] for axis in axes])
    np.testing.assert_allclose(np.sort(own.from_prediction), np.sort(other.from_truth))
    np.testing.assert_allclose(np.sort(own.from_truth), np.sort(other.from_prediction))
    assert own.hausdorff() == pytest.approx(other.hausdorff())
    assert own.within(1) == pytest.approx(other.within(1))
    assert dice(*both) == dice(*turned)


@checked
@given(pair=masks(2), factor=st.floats(1e-3, 1e3), tolerance=st.sampled_from([0, 0.5, 1, 1.5, 3]))
def test_surface_measures_scale_with_the_spacing(pair, factor, tolerance):
    both, spacing = pair
    scaled = [factor * size for size in spacing]
    assert hausdorff_distance(*both, scaled) == pytest.approx(factor * hausdorff_distance(*both, spacing))
    expected = normalised_surface_distance(*both, spacing, tolerance)
    assert normalised_surface_distance(*both, scaled, factor * tolerance) == pytest.approx(expected)


@checked
@given(three=masks(3, empty=False))
def test_hausdorff_distance_is_a_metric(three):
    (a, b, c), spacing = three
    ab, bc, ac = (hausdorff_distance(*pair, spacing, 100) for pair in ((a, b), (b, c), (a, c)))
    assert ac <= ab + bc + 1e-9
    assert (ab == 0) == np.array_equal(surface_mm(a, spacing), surface_mm(b, spacing))


@checked
@given(pair=masks(1), tolerance=st.sampled_from([0, 1, 1000]))
def test_surface_measures_of_empty_masks(pair, tolerance):
    (mask,), spacing = pair
    empty = np.zeros_like(mask)
    for both in ((mask, empty), (empty, mask)):
        assert hausdorff_distance(*both, spacing) == (np.inf if mask.any() else 0)
        assert normalised_surface_distance(*both, spacing, tolerance) == (0 if mask.any() else 1)
        assert dice(*both) == (0 if mask.any() else 1)


# --- distributions of label maps

REGIONS = (1, 2, 3, (1, 2), (2, 3), (1, 2, 3))
label_lists = st.lists(st.sampled_from(REGIONS), min_size=1, max_size=3, unique=True)


@st.composite
def label_maps(draw, *numbers):
    """Stacks of label maps on one grid, whose voxels hardly ever fill whole words of bits."""
    shape = draw(array_shapes(min_dims=1, max_dims=3, max_side=5))
    return [draw(arrays(np.uint8, (draw(number), *shape), elements=st.integers(0, 3))) for number in numbers]


def weights_of(draw, stack):
    """Whole numbers, of which one is positive."""
    return draw(st.lists(st.integers(0, 3), min_size=len(stack), max_size=len(stack)).filter(any))


def iou_distances(a, b, labels):
    """Of all pairs, by scipy."""
    a, b = ([np.isin(stack, label).reshape(len(stack), -1) for label in labels] for stack in (a, b))
    return np.mean([cdist(own, other, "jaccard") for own, other in zip(a, b, strict=True)], 0)


@checked
@given(data=st.data(), stacks=label_maps(st.integers(1, 4), st.integers(1, 4)), labels=label_lists)
def test_distribution_measures_are_expectations_of_jaccard_distances(data, stacks, labels):
    samples, raters = stacks
    w, v = (np.array(weights_of(data.draw, stack), float) for stack in stacks)
    d, own, theirs = (iou_distances(*pair, labels) for pair in ((samples, raters), (samples,) * 2, (raters,) * 2))
    np.testing.assert_allclose(pairwise_iou_distance(samples, raters, labels), d, atol=1e-12)
    w_, v_ = w / w.sum(), v / v.sum()
    expected = 2 * w_ @ d @ v_ - w_ @ own @ w_ - v_ @ theirs @ v_
    found = generalized_energy_distance(samples, raters, labels, w, v)
    assert found == pytest.approx(expected, abs=1e-9)
    assert -1e-9 <= found <= 2
    assert sample_diversity(samples, labels, w) == pytest.approx(w_ @ own @ w_, abs=1e-9)
    overlaps = count_overlaps(samples, raters, labels)
    jaccard = 1 - overlaps.iou_distance()
    np.testing.assert_allclose(overlaps.dice(), 2 * jaccard / (1 + jaccard))


@solved
@given(data=st.data(), stacks=label_maps(st.integers(1, 3), st.integers(1, 3)), labels=label_lists)
def test_matched_iou_is_the_best_assignment_of_units_of_weight(data, stacks, labels):
    samples, raters = stacks
    w, v = (weights_of(data.draw, stack) for stack in stacks)
    units = [np.repeat(np.arange(len(own)), np.multiply(own, sum(other))) for own, other in ((w, v), (v, w))]
    cost = iou_distances(samples, raters, labels)[np.ix_(*units)]
    found = matched_iou(samples, raters, labels, w, v)
    assert found == pytest.approx(1 - cost[linear_sum_assignment(cost)].mean(), abs=1e-6)
    assert -1e-9 <= found <= 1 + 1e-9


@solved
@given(data=st.data(), stacks=label_maps(st.integers(1, 4)), labels=label_lists)
def test_the_same_maps_in_any_order_are_at_no_distance(data, stacks, labels):
    (maps,) = stacks
    w = weights_of(data.draw, maps)
    order = data.draw(st.permutations(np.repeat(np.arange(len(maps)), w).tolist()))
    assert generalized_energy_distance(maps[order], maps, labels, rater_weights=w) == pytest.approx(0, abs=1e-9)
    assert matched_iou(maps[order], maps, labels, rater_weights=w) == pytest.approx(1, abs=1e-6)


FIELDS = (
    "generalized_energy_distance", "sample_diversity", "rater_diversity", "matched_iou", "dice", "dice_nod",
    "volume_crps", "volume_coverage", "fraction_better",
)  # fmt: skip


@solved
@given(data=st.data(), stacks=label_maps(st.just(1), st.integers(1, 4), st.integers(1, 3)), labels=label_lists)
def test_weights_are_repetitions_and_order_and_place_mean_nothing(data, stacks, labels):
    w, v = (weights_of(data.draw, stack) for stack in stacks[1:])
    valid = data.draw(arrays(bool, stacks[0].shape[1:]))
    valid.flat[0] = True
    flat = [stack[:, valid] for stack in stacks]
    voxels = np.random.default_rng(data.draw(st.integers(0, 99))).permutation(int(valid.sum()))
    orders = [[0], *(data.draw(st.permutations(np.repeat(np.arange(len(x)), x).tolist())) for x in (w, v))]
    (mean,), *both = (stack[order][:, voxels] for stack, order in zip(flat, orders, strict=True))
    own = score_distribution(stacks[0][0], *stacks[1:], labels, w, v, valid).average
    other = score_distribution(mean, *both, labels).average
    for field in FIELDS:
        expected = pytest.approx(getattr(other, field), abs=1e-6, nan_ok=True)
        assert getattr(own, field) == expected, field
    for quantile in (0, 0.05, 0.5, 1):
        assert own.sample_dice_quantile(quantile) == pytest.approx(other.sample_dice_quantile(quantile))


@checked
@given(
    data=st.data(),
    values=st.lists(st.integers(-4, 4), min_size=1, max_size=6),
    percent=st.sampled_from([0, 20, 25, 50, 75, 100]) | st.integers(0, 100),
)
def test_a_weighted_quantile_is_the_first_value_that_reaches_it(data, values, percent):
    weights = weights_of(data.draw, values)
    least = max(1, percent * sum(weights))  # percent of the weight, and not nothing
    expected = min(v for v in values if 100 * np.dot(weights, np.array(values) <= v) >= least)
    assert weighted_quantile(np.array(values, float), np.array(weights, float), percent / 100) == expected


@checked
@given(data=st.data(), values=st.lists(st.integers(-9, 9), min_size=1, max_size=6), observed=st.integers(-12, 12))
def test_crps_is_the_area_between_the_distribution_and_the_step(data, values, observed):
    weights = np.array(weights_of(data.draw, values), float)
    weights /= weights.sum()
    steps = sorted({*values, observed})
    area = sum(
        (right - left) * (weights @ (np.array(values) <= left) - (observed <= left)) ** 2
        for left, right in itertools.pairwise(steps)
    )
    found = continuous_ranked_probability_score(np.array(values, float), weights, observed)
    assert found == pytest.approx(area, abs=1e-9)


# --- calibration


@st.composite
def predictions(draw):
    """Probabilities and soft references in parts of 64, so that no bin's edge is rounded."""
    shape = draw(array_shapes(min_dims=1, max_dims=3, max_side=5))
    return [draw(arrays(np.int64, shape, elements=st.integers(0, 64))) for _ in range(2)]


@checked
@given(pair=predictions(), bins=st.integers(1, 20))
def test_calibration_error_is_counted_bin_by_bin(pair, bins):
    p, r = pair
    index = np.minimum(p * bins // 64, bins - 1)
    expected = sum(Fraction(abs(int((p - r)[index == i].sum())), 64 * p.size) for i in range(bins))
    found = expected_calibration_error(p / 64, r / 64, bins)
    assert found == pytest.approx(float(expected), abs=1e-12)
    assert 0 <= found <= 1


@checked
@given(data=st.data(), pair=predictions(), bins=st.integers(1, 12))
def test_curves_of_parts_add_up_to_that_of_the_whole(data, pair, bins):
    p, r = (x / 64 for x in pair)
    first, ignored = (data.draw(arrays(bool, p.shape)) for _ in range(2))
    parts = [reliability_curve(p[part & ~ignored], r[part & ~ignored], bins) for part in (first, ~first)]
    added, whole = parts[0] + parts[1], reliability_curve(p, r, bins, ~ignored)
    for name in ("count", "confidence_sum", "frequency_sum", "confidence", "frequency"):
        np.testing.assert_allclose(getattr(added, name), getattr(whole, name), atol=1e-12)
    assert added.expected_calibration_error == pytest.approx(whole.expected_calibration_error, nan_ok=True)


@checked
@given(pair=predictions(), bins=st.sampled_from([1, 2, 3, 5]), parts=st.integers(2, 4))
def test_wider_bins_never_raise_the_error_and_the_complement_has_the_same(pair, bins, parts):
    p, r = (x / 64 for x in pair)
    assert expected_calibration_error(p, r, bins) <= expected_calibration_error(p, r, bins * parts) + 1e-12
    p = (64 * p + 0.3) / 65  # never on an edge, which belongs to the bin above
    assert expected_calibration_error(1 - p, 1 - r, bins) == pytest.approx(expected_calibration_error(p, r, bins))


# --- transport


@st.composite
def transports(draw, at_most):
    """Costs (B, N, M), and whole numbers of what sources have and sinks get."""
    batch, n, m = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    cost = draw(arrays(np.int64, (batch, n, m), elements=st.integers(-2, 5)))
    sources = draw(arrays(np.int64, (batch, n), elements=st.integers(0, 3)))
    sinks = draw(arrays(np.int64, (batch, m), elements=st.integers(0, 3)))
    for has, gets in zip(sources, sinks, strict=True):
        missing = gets.sum() - has.sum()
        has[draw(st.integers(0, n - 1))] += max(missing, 0)
        if not at_most:
            gets[draw(st.integers(0, m - 1))] += max(-missing, 0)
    return cost, sources, sinks


@pytest.mark.parametrize("at_most", [False, True])
@solved
@given(data=st.data())
def test_transport_is_the_cheapest_assignment_of_units(at_most, data):
    cost, sources, sinks = data.draw(transports(at_most))
    unit = data.draw(st.sampled_from([1, 0.1, 1 / 3]))
    plan = transport_plan(cost.astype(float), sources * unit, sinks * unit, at_most)
    assert plan.shape == cost.shape
    assert plan.min() >= 0
    np.testing.assert_allclose(plan.sum(1), sinks * unit, atol=1e-6)
    taken = plan.sum(2) - sources * unit
    assert taken.max() <= 1e-6
    assert at_most or taken.min() >= -1e-6
    for own, matrix, has, gets in zip(plan, cost, sources, sinks, strict=True):
        units = matrix[np.ix_(np.repeat(np.arange(len(has)), has), np.repeat(np.arange(len(gets)), gets))]
        best = units[linear_sum_assignment(units)].sum() * unit
        assert (own * matrix).sum() == pytest.approx(best, abs=1e-5)


@solved
@given(data=st.data(), n=st.integers(1, 4), m=st.integers(1, 3), batch=st.integers(1, 3))
def test_a_tighter_limit_never_makes_transport_cheaper(data, n, m, batch):
    def positive(count):
        values = torch.tensor(data.draw(arrays(np.float32, (batch, count), elements=st.integers(1, 4))))
        return values / values.sum(1, keepdim=True)

    cost = torch.tensor(data.draw(arrays(np.float32, (batch, n, m), elements=st.integers(0, 8)))) / 8
    weights, annotations = positive(n), positive(m)
    limits = [1.0, *(limit for limit in (0.9, 0.6, 0.3) if limit * n > 1)]
    found = [transport_terms(cost, weights, annotations, limit) for limit in limits]
    lowest = (cost.amin(1) * annotations).sum(1)
    torch.testing.assert_close(found[0][0], lowest)
    for (looser, _), (tighter, divergence) in itertools.pairwise([(lowest, None), *found]):
        assert (tighter >= looser - 1e-5).all()
        assert (divergence >= -1e-5).all()
    rows, columns = (data.draw(st.permutations(range(count))) for count in (n, m))
    own, permuted = (
        transport_terms(cost, weights, annotations, limits[-1])[0],
        transport_terms(cost[:, rows][:, :, columns], weights[:, rows], annotations[:, columns], limits[-1])[0],
    )
    torch.testing.assert_close(own, permuted, atol=1e-5, rtol=1e-5)


@st.composite
def annotated(draw):
    """Samples' and annotations' indicators (B, N, C, *D), (B, M, C, *D), and whether they are regions."""
    regions, batch = draw(st.booleans()), draw(st.integers(1, 2))
    classes = draw(st.integers(1 if regions else 2, 4))
    shape = draw(array_shapes(min_dims=2, max_dims=3, max_side=3))
    numbers = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    if regions:
        return [draw(arrays(bool, (batch, number, classes, *shape))) for number in numbers], True
    maps = [draw(arrays(np.int64, (batch, number, *shape), elements=st.integers(0, classes - 1))) for number in numbers]
    return [np.moveaxis(np.eye(classes, dtype=bool)[labels], -1, 2) for labels in maps], False


@checked
@given(data=st.data(), pair=annotated())
def test_the_cost_of_certain_samples_counts_voxels_that_count(data, pair):
    (samples, annotations), regions = pair
    valid = data.draw(st.none() | arrays(bool, (*annotations.shape[:2], *annotations.shape[3:])))
    logits = torch.tensor(samples) * 100.0 - 50
    voxels = None if valid is None else torch.tensor(valid)
    found = pairwise_cost(logits, torch.tensor(annotations), voxels, "iou", regions)
    counted = np.ones((*annotations.shape[:2], *annotations.shape[3:]), bool) if valid is None else valid
    for b, n, m in np.ndindex(*found.shape):
        a, y = (x[:, counted[b, m]] for x in (samples[b, n], annotations[b, m]))
        a, y = (a, y) if regions else (a[1:], y[1:])
        expected = 1 - np.mean(((a & y).sum(1) + 1) / ((a | y).sum(1) + 1))
        assert found[b, n, m].item() == pytest.approx(expected, abs=1e-5)


# --- statistics

p_values = st.lists(st.integers(0, 64).map(lambda k: k / 64) | st.just(math.nan), max_size=8)


@checked
@given(p=p_values, alpha=st.integers(0, 63).map(lambda k: (k + 0.5) / 64))
def test_holm_rejects_what_the_step_down_procedure_rejects(p, alpha):
    known = [value for value in p if not np.isnan(value)]
    rejected = 0
    for rank, value in enumerate(sorted(known)):
        if value * (len(known) - rank) > alpha:
            break
        rejected += 1
    corrected = holm(p)
    assert sum(value <= alpha for value in corrected) == rejected
    assert [np.isnan(value) for value in corrected] == [np.isnan(value) for value in p]
    pairs = sorted((raw, own) for raw, own in zip(p, corrected, strict=True) if not np.isnan(raw))
    assert all(raw <= own <= 1 for raw, own in pairs)
    assert all(first[1] <= second[1] for first, second in itertools.pairwise(pairs))


@checked
@given(data=st.data(), p=p_values)
def test_holm_does_not_depend_on_the_order(data, p):
    order = data.draw(st.permutations(range(len(p))))
    np.testing.assert_array_equal(np.array(holm(p))[order], holm([p[i] for i in order]))


@checked
@given(sizes=st.sets(st.integers(1, 200), min_size=1, max_size=8), data=st.data())
def test_the_signed_rank_test_counts_all_signs(sizes, data):
    differences = np.array([size * data.draw(st.sampled_from([-1, 1])) for size in sorted(sizes)])
    b = np.array([data.draw(st.integers(0, 100)) for _ in differences])
    ranks = np.arange(1, 1 + len(differences))
    sums = [np.dot(ranks, signs) for signs in itertools.product((0, 1), repeat=len(ranks))]
    observed = ranks @ (differences > 0)
    tail = min(np.mean(np.array(sums) <= observed), np.mean(np.array(sums) >= observed))
    order = data.draw(st.permutations(range(len(differences))))
    a, b = (b + differences)[order].tolist(), b[order].tolist()
    assert paired_p_value([*a, math.nan, 1], [*b, 2, math.nan]) == pytest.approx(min(1, 2 * tail))
    assert paired_p_value(b, a) == paired_p_value(a, b)


@solved
@given(data=st.data(), pairs=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=6))
def test_inf_counts_as_more_than_any_other_difference(data, pairs):
    lost = [(data.draw(st.booleans()), data.draw(st.booleans())) for _ in pairs]
    found = []
    for worst in (math.inf, 1e6):
        a, b = zip(*[[worst if gone else value for value, gone in zip(*both, strict=True)]
                     for both in zip(pairs, lost, strict=True)], strict=True)  # fmt: skip
        found.append(paired_p_value(a, b))
    assert found[0] == found[1]


@settings(PROFILE, max_examples=10)
@given(
    values=st.lists(st.integers(0, 64), min_size=2, max_size=6), factor=st.integers(1, 8), shift=st.integers(-20, 20)
)
def test_the_interval_moves_and_stretches_with_the_values(values, factor, shift):
    low, high = bootstrap_interval(values)
    assert min(values) <= low <= high <= max(values)
    moved = bootstrap_interval([factor * value + shift for value in values])
    assert moved == pytest.approx((factor * low + shift, factor * high + shift))


# --- quantities


def components(mask):
    """Groups of voxels that touch by a face, an edge or a corner."""
    left, found = set(map(tuple, np.argwhere(mask))), 0
    while left:
        found, grown = found + 1, [left.pop()]
        for voxel in grown:
            near = {other for other in left if max(abs(np.subtract(voxel, other))) <= 1}
            left -= near
            grown.extend(near)
    return found


@checked
@given(label_map=array_shapes(min_dims=2, max_dims=3, max_side=5).flatmap(
    lambda shape: arrays(np.int64, shape, elements=st.integers(0, 2))))  # fmt: skip
def test_lesions_are_what_a_flood_fill_finds(label_map):
    labels = {"first": 1, "second": 2, "both": (1, 2)}
    for name, (voxels, lesions) in measure(label_map, labels).items():
        mask = np.isin(label_map, labels[name])
        assert (voxels, lesions) == (mask.sum(), components(mask))


@checked
@given(data=st.data(), values=st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_quantities_of_samples_do_not_depend_on_their_order(data, values):
    weights = np.array(weights_of(data.draw, values), float)
    weights /= weights.sum()
    order = data.draw(st.permutations(range(len(values))))
    own = distribution_of(1, values, weights)
    assert distribution_of(1, [values[i] for i in order], weights[order]) == pytest.approx(own)
    assert own["mean"] == pytest.approx(np.average(values, weights=weights))
    used = [value for value, weight in zip(values, weights, strict=True) if weight]
    assert min(used) <= own["p2.5"] <= own["p50"] <= own["p97.5"] <= max(used)
    assert own["sd"] >= 0
    assert (own["sd"] < 1e-6) == (len(set(used)) == 1)
