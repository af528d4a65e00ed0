"""Networks, presence, averages of logits: what holds for all topologies, modalities and classes."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from nnunet_multimodal.backbones import BACKBONES
from nnunet_multimodal.backbones.base import SubtaskLogits
from nnunet_multimodal.heads import HEADS
from nnunet_multimodal.heads.mixture import mixture_logits
from nnunet_multimodal.modalities import ModalityDropout, split_present
from nnunet_multimodal.network import MultimodalUNet, NetworkOutput
from nnunet_multimodal.preprocessing import PLACEHOLDER, find_placeholders
from tests.contracts import unet_kwargs, with_absent
from tests.unit.properties import PROFILE, checked, networks_checked

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
