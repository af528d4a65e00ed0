import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import distributions
from torch.nn import functional as F

from nnunet_multimodal.backbones import ciml
from nnunet_multimodal.backbones.base import SubtaskLogits
from nnunet_multimodal.backbones.ciml import divergence_from_standard, sample
from nnunet_multimodal.losses import SubtaskLoss
from nnunet_multimodal.network import MultimodalUNet
from tests.contracts import NetworkContract, unet_kwargs, with_absent

SPLIT = [{"modalities": [0], "channels": [0]}, {"modalities": [1, 2], "channels": [1]}]


class TestCIML(NetworkContract):
    backbone = "ciml"
    options = (
        {"has_regions": True},
        {},
        {"has_regions": True, "segmentors": SPLIT, "attention": False},
        {"variational": False},
        {"messages": False},
    )


BUILD, DATA = TestCIML().build, TestCIML().data


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the gate (Fig. 12, Table 1)


@pytest.mark.parametrize("attention", [True, False])
def test_the_gate_follows_the_paper_message_by_message(attention):
    gate = BUILD({"attention": attention}).eval().backbone.segmentors[0].gates[1]
    own, messages = draw(2, 6, 4, 5, 3), draw(2, 2, 6, 4, 5, 3, seed=1)
    present = torch.tensor([[True, True], [False, True]])
    kappa, variance = gate(messages, gate.attend(own, present, *messages.unbind(1)), present)
    assert variance is None
    for b in range(2):
        maps = [m.mean(0) * here for m, here in zip(messages[b], present[b], strict=True)]
        pooled = torch.stack([*maps, own[b].mean(0)])
        weights = gate.attention(pooled[None])[0] if attention else torch.ones(2, 4, 5, 3)
        for k in range(2):
            one = slice(6 * k, 6 * k + 6)
            weighted = (messages[b, k] * weights[k])[None]
            expected = F.conv3d(weighted, gate.mean.weight[one], gate.mean.bias[one])[0] * present[b, k]
            torch.testing.assert_close(kappa[b, k], expected)


def test_the_divergence_is_that_of_the_gaussian_from_the_standard_one():
    gate = BUILD().train().backbone.segmentors[0].gates[0]
    own, messages, present = draw(1, 4, 4, 5, 3), draw(1, 2, 4, 4, 5, 3, seed=1), torch.ones(1, 2, dtype=torch.bool)
    weights = gate.attend(own, present, *messages.unbind(1))
    mean, variance = gate(messages, weights, present)
    torch.testing.assert_close(mean, gate.eval()(messages, weights, present)[0])
    gaussian = distributions.Normal(mean, variance.sqrt())
    expected = distributions.kl_divergence(gaussian, distributions.Normal(0.0, 1.0)).flatten(2).mean(2)
    torch.testing.assert_close(divergence_from_standard(mean, variance), expected)


def test_a_skip_hears_the_sum_of_what_is_drawn_for_each_message():
    segmentor = BUILD().train().backbone.segmentors[0]
    own, messages = draw(1, 4, 4, 5, 3), draw(1, 2, 4, 4, 5, 3, seed=1)
    heard = []
    segmentor.reductions[0].register_forward_pre_hook(lambda _, args: heard.append(args[0][:, 4:]))
    for present in (torch.tensor([[True, True]]), torch.tensor([[False, True]])):
        heard.clear()
        torch.manual_seed(0)
        with torch.no_grad():
            weights = segmentor.gates[0].attend(own, present, *messages.unbind(1))
            for _ in range(4000):
                segmentor.hear(0, own, weights, present, *messages.unbind(1))
            mean, variance = segmentor.gates[0](messages, weights, present)
        drawn = torch.stack(heard)
        of_each = torch.stack([sample(mean, variance).sum(1) for _ in range(4000)])
        torch.testing.assert_close(drawn.mean(0), of_each.mean(0), atol=0.15, rtol=0)
        torch.testing.assert_close(drawn.std(0), of_each.std(0), atol=0, rtol=0.15)


def test_where_nothing_is_sent_nothing_is_heard_and_gradients_are_finite():
    segmentor = BUILD().train().backbone.segmentors[0]
    own = draw(1, 4, 4, 5, 3).requires_grad_()
    messages = draw(1, 2, 4, 4, 5, 3, seed=1).requires_grad_()
    heard = []
    segmentor.reductions[0].register_forward_pre_hook(lambda _, args: heard.append(args[0][:, 4:]))
    skip, divergence = segmentor.hear_in_slabs(0, own, torch.zeros(1, 2, dtype=torch.bool), messages.unbind(1))
    (skip.square().mean() + 0.0 * divergence.sum()).backward()
    assert heard[0].abs().max() < 1e-3
    assert own.grad.isfinite().all()
    assert not messages.grad.any()


def test_the_loss_counts_gates_between_present_segmentors_alone():
    network = BUILD({"kl_weight": 2.0})
    gates = [gate for segmentor in network.backbone.segmentors for gate in segmentor.gates]
    seen = []
    for gate in gates:
        gate.register_forward_hook(lambda _, __, output: seen.append(divergence_from_standard(*output)))
    found = network(with_absent(DATA(), [(0, 1)])).auxiliary_losses["kl"]
    stages, total = len(gates) // 3, 0
    for s in range(3):
        divergence = torch.stack(seen[s * stages : (s + 1) * stages]).mean(0)  # (B, K)
        others = [o for o in range(3) if o != s]
        pairs = [(b, k) for b in range(2) for k, o in enumerate(others) if b == 1 or 1 not in (s, o)]
        total += torch.stack([divergence[pair] for pair in pairs]).mean()
    torch.testing.assert_close(found, 2 * total)


def test_standard_deviations_are_not_computed_at_prediction():
    network = BUILD()
    calls = []
    for segmentor in network.backbone.segmentors:
        for gate in segmentor.gates:
            gate.deviation.register_forward_hook(lambda *_: calls.append(1))
    network.eval()(DATA())
    assert not calls
    network.train()(DATA())
    assert len(calls) == 3 * 3


def test_without_messages_a_segmentor_sees_its_own_modality_alone():
    x, other = DATA(), DATA()
    other[:, 1] += draw(*other[:, 1].shape, seed=5)
    for messages in (True, False):
        network = BUILD({"messages": messages}).eval()
        first, second = (network(image).subtasks.logits[0][:, 0] for image in (x, other))
        assert torch.equal(first, second) == (not messages)


def test_the_decoders_width_is_the_plans():
    plain = sum(p.numel() for p in BUILD({"messages": False}).backbone.segmentors[0].decoder.parameters())
    assert sum(p.numel() for p in BUILD().backbone.segmentors[0].decoder.parameters()) == plain


def test_features_are_merged_for_heads_that_read_them_alone():
    x = DATA()
    plain = BUILD().eval()
    assert plain.backbone(*plain.split(x)).features == ()
    torch.manual_seed(0)
    sampling = MultimodalUNet(3, 2, backbone="ciml", head="ssn", deep_supervision=True, **unet_kwargs()).eval()
    with_absence = with_absent(x, [(0, 1)])
    seen = []
    for segmentor in sampling.backbone.segmentors:
        segmentor.decoder.register_forward_hook(lambda _, __, features: seen.append(features[0]))
    merged = sampling.backbone(*sampling.split(with_absence)).features[0]
    torch.testing.assert_close(merged[0], (seen[0][0] + seen[2][0]) / 2)
    torch.testing.assert_close(merged[1], torch.stack(seen)[:, 1].mean(0))


def test_gates_are_run_again_in_the_backward_pass_with_the_same_noise():
    network = BUILD()
    x = DATA()
    gradients = []
    for training in (True, False):  # evaluation does not recompute, and has no noise to get wrong
        network.train(training)
        for gate in (g for s in network.backbone.segmentors for g in s.gates):
            gate.training = True
        torch.manual_seed(3)
        network.zero_grad()
        output = network.backbone(*network.split(x))
        sum(logits.square().mean() for logits in output.subtasks.logits).backward()
        gradients.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("options", [{}, {"attention": False}, {"variational": False}])
def test_slabs_give_what_the_whole_gives(monkeypatch, options):
    monkeypatch.setattr(ciml, "sample", lambda mean, variance: mean + variance)  # no noise
    found = []
    one = 2 * 2 * 4 * 5 * 3  # elements of a slab that is one voxel thick, of four
    for slab in (2**20, 3 * one, 2 * one, one):  # one slab, 3 + 1, two, four
        monkeypatch.setitem(ciml.SLAB, "cpu", slab)
        torch.manual_seed(0)
        segmentor = BUILD(options).train().backbone.segmentors[0]
        own, *messages = (draw(2, 4, 4, 5, 3, seed=k).requires_grad_() for k in range(3))
        present = torch.tensor([[True, True], [False, True]])
        skip, divergence = segmentor.hear_in_slabs(0, own, present, messages)
        (skip.square().sum() + (0 if divergence is None else divergence.sum())).backward()
        weights = segmentor.gates[0].attend(own, present, *messages)
        torch.testing.assert_close((skip, divergence), segmentor.hear(0, own, weights, present, *messages))
        gradients = [own.grad, *(m.grad for m in messages), segmentor.gates[0].mean.weight.grad]
        found.append([skip, *gradients, *([] if divergence is None else [divergence])])
    for others in found[1:]:
        for first, other in zip(found[0], others, strict=True):
            torch.testing.assert_close(first, other)


# --- the output


def test_regions_are_averaged_over_who_answers_for_them():
    logits = draw(2, 3, 2, 4, 4, 4)
    active = torch.tensor([[[1, 0], [1, 1], [0, 1]], [[0, 0], [1, 1], [0, 0]]], dtype=torch.bool)
    found = SubtaskLogits((logits,), active, True).average().sigmoid()
    for b in range(2):
        for c in range(2):
            torch.testing.assert_close(found[b, c], logits[b, active[b, :, c], c].sigmoid().mean(0))


def test_labels_are_averaged_and_the_rest_is_background():
    logits = draw(1, 2, 3, 4, 4, 4)
    everyone = torch.ones(1, 2, 3, dtype=torch.bool)
    found = SubtaskLogits((logits,), everyone, False).average().softmax(1)
    torch.testing.assert_close(found, logits.softmax(2).mean(1))
    split = torch.tensor([[[1, 1, 0], [1, 0, 1]]], dtype=torch.bool)
    logits = logits - 6 * torch.tensor([0.0, 1.0, 1.0]).view(3, 1, 1, 1)  # so that both together are less than one
    found = SubtaskLogits((logits,), split, False).average().softmax(1)
    first, second = logits[:, 0, [0, 1]].softmax(1)[:, 1], logits[:, 1, [0, 2]].softmax(1)[:, 1]
    assert (first + second < 1).all()
    torch.testing.assert_close(found, torch.stack((1 - first - second, first, second), 1))


def test_certain_probabilities_stay_finite():
    logits = torch.full((1, 2, 3, 1, 1), 80.0) * torch.tensor([-1.0, 1.0, 1.0]).view(3, 1, 1)
    for has_regions in (True, False):
        average = SubtaskLogits((logits,), torch.ones(1, 2, 3, dtype=torch.bool), has_regions).average()
        assert average.isfinite().all()


def test_a_region_without_its_segmentor_falls_to_those_that_are_there():
    network = BUILD({"has_regions": True, "segmentors": SPLIT}).eval()
    output = network(with_absent(DATA(), [(0, 0), (1, 1), (1, 2)]))
    assert output.subtasks.active.tolist() == [[[False, False], [True, True]], [[True, True], [False, False]]]
    torch.testing.assert_close(output[0][0], output.subtasks.logits[0][0, 1])
    torch.testing.assert_close(output[0][1], output.subtasks.logits[0][1, 0])
    one_of_two = network(with_absent(DATA(), [(0, 1)]))  # of a segmentor's primary modalities: it still answers
    assert one_of_two.subtasks.active[0].tolist() == [[True, False], [False, True]]


# --- the loss


DICE = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}


def test_each_segmentor_learns_its_own_labels_and_takes_others_for_background():
    labels = LabelManager({"background": 0, "a": 1, "b": 2, "ignore": 3}, None)
    nnunet = DC_and_CE_loss(DICE, {}, ignore_label=3, dice_class=MemoryEfficientSoftDiceLoss)
    logits = draw(2, 2, 3, 4, 4, 4).requires_grad_()
    active = torch.tensor([[[1, 1, 0], [1, 0, 1]], [[0, 0, 0], [1, 1, 1]]], dtype=torch.bool)
    target = torch.randint(0, 4, (2, 1, 4, 4, 4), generator=torch.Generator().manual_seed(0)).float()
    found = SubtaskLoss(nnunet, labels)(logits, active, target)
    only_a = torch.tensor([0.0, 1, 0, 3])[target[:1].long()]
    only_b = torch.tensor([0.0, 0, 1, 3])[target[:1].long()]
    expected = (
        nnunet(logits[:1, 0, [0, 1]], only_a)
        + nnunet(logits[:1, 1, [0, 2]], only_b)
        + nnunet(logits[1:, 1], target[1:])
    ) / 2
    torch.testing.assert_close(found, expected)
    found.backward()
    for index, answers in ((0, 0, 2), False), ((0, 1, 1), False), ((1, 0, 1), False), ((1, 1, 2), True):
        assert logits.grad[index].any() == answers


def test_each_segmentor_learns_its_own_regions():
    labels = LabelManager({"background": 0, "all": [1, 2], "core": 2, "ignore": 3}, [1, 2])
    nnunet = DC_and_BCE_loss({}, {**DICE, "do_bg": True}, use_ignore_label=True, dice_class=MemoryEfficientSoftDiceLoss)
    logits = draw(2, 2, 2, 4, 4, 4)
    active = torch.tensor([[1, 0], [1, 1]], dtype=torch.bool).expand(2, 2, 2)
    target = torch.randint(0, 2, (2, 3, 4, 4, 4), generator=torch.Generator().manual_seed(0)).float()
    expected = nnunet(logits[:, 0, :1], target[:, [0, 2]]) + nnunet(logits[:, 1], target)
    torch.testing.assert_close(SubtaskLoss(nnunet, labels)(logits, active, target), expected)


def test_dice_is_not_gathered_over_processes_whose_segmentors_differ():
    nnunet = DC_and_CE_loss({**DICE, "ddp": True}, {}, dice_class=MemoryEfficientSoftDiceLoss)
    assert not SubtaskLoss(nnunet, LabelManager({"background": 0, "a": 1}, None)).segmentation_loss.dc.ddp
    assert nnunet.dc.ddp


def test_nobody_there_for_a_batch_gives_no_loss_but_gradients():
    labels = LabelManager({"background": 0, "a": 1}, None)
    logits = draw(1, 2, 2, 4, 4).requires_grad_()
    nnunet = DC_and_CE_loss(DICE, {}, dice_class=MemoryEfficientSoftDiceLoss)
    active = torch.tensor([[[1, 1], [0, 0]]], dtype=torch.bool)
    SubtaskLoss(nnunet, labels)(logits, active, torch.ones(1, 1, 4, 4)).backward()
    assert logits.grad[0, 0].any()
    assert not logits.grad[0, 1].any()


# --- options


@pytest.mark.parametrize(
    ("segmentors", "message"),
    [
        ([{"modalities": [0], "channels": [0, 1]}], "at least two"),
        ([*SPLIT, {"modalities": [3], "channels": [0]}], r"modalities are \[0, 1, 2, 3\]"),
        ([SPLIT[0], {"modalities": [1, 2], "channels": [0]}], r"channels are \[0, 0\]"),
        ([SPLIT[0], {"modalities": [1, 2], "channels": [1, 1]}], "each once"),
        ([*SPLIT, {"modalities": [2], "channels": []}], "modalities to look at and channels to predict"),
        ([*SPLIT, {"modalities": [], "channels": [0]}], "modalities to look at and channels to predict"),
        ([SPLIT[0], {"modalities": [1, 2]}], "must have 'modalities' and 'channels'"),
    ],
)
def test_segmentors_that_do_not_fit_are_refused(segmentors, message):
    with pytest.raises(ValueError, match=message):
        BUILD({"segmentors": segmentors, "has_regions": True})


def test_a_weight_that_is_none_is_refused():
    with pytest.raises(ValueError, match="kl_weight=-1"):
        BUILD({"kl_weight": -1})
