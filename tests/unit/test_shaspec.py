import pytest
import torch
from torch.nn import functional as F

from nnunet_multimodal.backbones.shaspec import mean_over_pairs, substitution_weights
from tests.contracts import MODALITIES, NetworkContract, with_absent


class TestShaSpec(NetworkContract):
    backbone = "shaspec"
    options = (
        {},
        {"alignment": "mse", "substitution": "first", "skips": "substituted"},
        {"alignment": "kl", "projection": "zero"},
        {"alignment": "ce"},
    )


BUILD, DATA = TestShaSpec().build, TestShaSpec().data


def features(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- absent modalities (Eq. 4)


def test_an_absent_modality_is_the_mean_of_the_present_ones_or_the_first():
    present = torch.tensor([[True, False, True, False], [False, False, True, True]])
    r = features(2, 4, 3)
    mean, first = (torch.einsum("bnm,bmf->bnf", substitution_weights(present, kind), r) for kind in ("mean", "first"))
    for b in range(2):
        for n in range(4):
            there = [m for m in range(4) if present[b, m]]
            expected = torch.zeros(3) if present[b, n] else torch.stack([r[b, m] for m in there]).mean(0)
            torch.testing.assert_close(mean[b, n], expected)
            torch.testing.assert_close(first[b, n], torch.zeros(3) if present[b, n] else r[b, there[0]])


@pytest.mark.parametrize("skips", ["present", "substituted"])
@pytest.mark.parametrize("substitution", ["mean", "first"])
def test_skips_and_bottleneck_follow_the_equations(substitution, skips):
    """Everything computed modality by modality, concatenated and reduced by an ordinary 1x1 convolution."""
    network = BUILD({"substitution": substitution, "skips": skips}).eval()
    backbone = network.backbone
    x = DATA()
    absent = [(0, 1), (1, 0), (1, 2)]
    image, cascade, present = network.split(with_absent(x, absent))
    seen = {}
    backbone.decoder.register_forward_pre_hook(lambda _, args: seen.update(skips=args[0]))
    backbone(image, cascade, present)
    for b in range(2):
        there = [m for m in range(MODALITIES) if present[b, m]]
        shared = {m: backbone.shared(image[b : b + 1, m]) for m in there}
        specific = {m: backbone.specific[m](image[b : b + 1, m])[-1] for m in there}
        for stage, skip in enumerate(seen["skips"]):
            r = {m: shared[m][stage] for m in there}
            chosen = there if substitution == "mean" else there[:1]
            stand_in = torch.stack([r[m] for m in chosen]).mean(0)
            if stage == len(seen["skips"]) - 1:
                projection = backbone.projection
                r = {
                    m: r[m] + projection.norm(projection.convolution(torch.cat((r[m], specific[m]), 1))) for m in there
                }
            elif skips == "present":
                stand_in = torch.zeros_like(stand_in)
            stacked = torch.cat([r[m] if m in there else stand_in for m in range(MODALITIES)], 1)
            reduction = backbone.reductions[stage]
            weight = reduction.weight.flatten(1)[..., None, None, None]
            torch.testing.assert_close(skip[b : b + 1], F.conv3d(stacked, weight, reduction.bias), rtol=1e-4, atol=1e-5)


def test_encoders_of_what_the_whole_batch_lacks_are_not_run_at_prediction():
    network = BUILD(deep_supervision=False)
    calls = []
    for m, encoder in enumerate(network.backbone.specific):
        encoder.register_forward_hook(lambda *_, m=m: calls.append(m))
    network.backbone.shared.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    x = DATA()
    with torch.no_grad():
        network.eval()(with_absent(x, [(0, 0), (1, 0), (1, 1)]))
        assert calls == [2 * 2, 1, 2]
        calls.clear()
        network(with_absent(x, [(0, 0), (1, 1)]))
        assert calls == [2 * 3, 0, 1, 2]
        calls.clear()
    network.train()(with_absent(x, [(0, 0), (1, 0)]))
    assert calls == [2 * 3, 0, 1, 2]


# --- fusion (Eq. 2)


def test_the_residual_starts_small_or_at_zero():
    shared, specific = features(2, 3, 8, 4, 4, 4), features(2, 3, 8, 4, 4, 4, seed=1)
    zero = BUILD({"projection": "zero"}).backbone.projection
    assert torch.equal(zero(shared, specific), shared)
    normalised = BUILD().backbone.projection
    residual = normalised(100 * shared, 100 * specific) - 100 * shared
    assert residual.square().mean().sqrt().item() == pytest.approx(1, abs=0.05)


# --- losses (Eq. 5 to 9)


def test_the_mean_over_pairs_leaves_out_absent_ones():
    distance = features(2, 4, 4).abs()
    distance = distance + distance.transpose(1, 2)
    present = torch.tensor([[True, True, False, True], [True, False, False, False]])
    expected = torch.stack([distance[0, i, j] for i, j in ((0, 1), (0, 3), (1, 3))]).mean()
    torch.testing.assert_close(mean_over_pairs(distance, present), expected)
    assert mean_over_pairs(distance[1:], present[1:]) == 0
    present[1, 2] = True  # every sample counts the same, however many it has
    torch.testing.assert_close(mean_over_pairs(distance, present), (expected + distance[1, 0, 2]) / 2)


@pytest.mark.parametrize("alignment", ["l1", "mse", "kl", "ce"])
def test_the_alignment_is_that_of_every_pair_of_present_modalities(alignment):
    backbone = BUILD({"alignment": alignment}).backbone
    shared = features(2, 3, 8, 2, 3, 2)
    present = torch.tensor([[True, True, True], [True, False, True]])
    found = backbone.alignment_loss(shared, present)
    project = backbone.alignment_layer
    log_q = (
        [[F.log_softmax(project(m.flatten(1).mean(1)), -1) for m in r] for r in shared]
        if alignment in ("kl", "ce")
        else None
    )

    def distance(b, i, j):
        if alignment == "kl":
            return F.kl_div(log_q[b][j], log_q[b][i], reduction="sum", log_target=True)
        return {"l1": F.l1_loss, "mse": F.mse_loss}[alignment](shared[b, i], shared[b, j])

    samples, single = [], []
    for b in range(2):
        there = [m for m in range(3) if present[b, m]]
        if alignment == "ce":  # a term for each modality, not for each pair
            single += [-log_q[b][m].mean() for m in there]
        else:
            samples.append(torch.stack([distance(b, i, j) for i in there for j in there if i != j]).mean())
    torch.testing.assert_close(found, torch.stack(single or samples).mean())


def test_the_domain_classification_is_the_cross_entropy_of_present_modalities():
    backbone = BUILD().backbone
    specific = features(2, 3, 8, 2, 3, 2)
    present = torch.tensor([[True, True, True], [False, True, True]])
    logits = backbone.domain_classifier(specific.flatten(3).mean(3))
    expected = F.cross_entropy(logits[present], torch.arange(3).expand(2, 3)[present])
    torch.testing.assert_close(backbone.classification_loss(specific, present), expected)


def test_the_terms_are_weighted_and_content_of_absent_modalities_is_in_none():
    x = DATA()
    networks = [BUILD(options) for options in ({}, {"alignment_weight": 0.2, "classification_weight": 0})]
    terms = [network(with_absent(x, [(0, 1)])).auxiliary_losses for network in networks]
    torch.testing.assert_close(terms[1]["alignment"], 2 * terms[0]["alignment"])
    assert terms[1]["classification"] == 0
    other = x.clone()
    other[0, 1] = 100
    again = networks[0](with_absent(other, [(0, 1)])).auxiliary_losses
    assert terms[0].keys() == again.keys()
    for name, term in terms[0].items():
        assert torch.equal(term, again[name])


def test_one_modality_alone_aligns_with_nothing():
    network = BUILD()
    output = network(with_absent(DATA(), [(0, 0), (0, 1), (1, 1), (1, 2)]))
    assert output.auxiliary_losses["alignment"] == 0
    assert output.auxiliary_losses["classification"] > 0


def test_training_makes_shared_features_alike_and_specific_ones_tell_modalities_apart():
    network = BUILD({"alignment_weight": 1.0, "classification_weight": 1.0})
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    x = DATA()
    losses = []
    for _ in range(40):
        terms = network(x).auxiliary_losses
        losses.append({name: term.item() for name, term in terms.items()})
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
    assert losses[-1]["alignment"] < 0.5 * losses[0]["alignment"]
    assert losses[-1]["classification"] < 0.5 * losses[0]["classification"]


def test_features_are_pooled_by_kind_and_zero_where_absent():
    network = BUILD().eval()
    found = network.modality_features(with_absent(DATA(), [(0, 1)]))
    assert {kind: tuple(f.shape) for kind, f in found.items()} == dict.fromkeys(("shared", "specific"), (2, 3, 8))
    assert all((f[0, 1] == 0).all() and (f[0, 0] != 0).any() for f in found.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alignment": "cosine"}, "shaspec: alignment='cosine' is not one of l1, mse, kl, ce"),
        ({"substitution": "zero"}, "substitution='zero' is not one of mean, first"),
        ({"projection": "plain"}, "projection='plain' is not one of normalised, zero"),
        ({"alignment_weight": -1}, "alignment_weight=-1 is not a number of at least 0"),
    ],
)
def test_options_that_do_not_exist_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BUILD(options)


def test_a_single_modality_is_refused():
    with pytest.raises(ValueError, match="shared features need at least 2 modalities, got 1"):
        BUILD(modalities=1)
