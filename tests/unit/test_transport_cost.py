"""MoSE's costs against the authors' and against each pair by itself, and its transport."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch.nn import functional as F

from nnunet_multimodal.heads import transport_cost
from nnunet_multimodal.heads.base import RaterLabels
from nnunet_multimodal.heads.transport_cost import pairwise_cost, transport_terms

REFERENCE = Path(
    os.environ.get("NNUNET_MULTIMODAL_REFERENCE", Path(__file__).resolve().parents[3] / "shared" / "reference_values")
)


def labels_of(classes=3, ignore=False, regions=False):
    labels = {"background": 0, **{f"l{c}": c for c in range(1, classes)}}
    if regions:
        labels = {"background": 0, "whole": [1, 2], "core": 2}
    return LabelManager(
        {**labels, **({"ignore": 3 if regions else classes} if ignore else {})}, [1, 2] if regions else None
    )


# --- the authors' code


@pytest.fixture(scope="module")
def reference():
    file = REFERENCE / "mose_ot_ref.npz"
    if not file.is_file():
        pytest.skip(f"no {file}; set NNUNET_MULTIMODAL_REFERENCE")
    with np.load(file) as data:
        return {name: torch.from_numpy(np.asarray(data[name])) for name in data.files}


def reference_cost(reference, kind):
    indicator, valid = F.one_hot(reference["y"].long(), 2).movedim(-1, 2), None
    if kind == "cross_entropy":  # theirs is the mean over all pixels but the first, by the figures themselves
        valid = torch.ones_like(reference["y"], dtype=torch.bool)
        valid[..., 0, 0] = False
    return pairwise_cost(reference["logits"], indicator, valid, kind, False)


@pytest.mark.parametrize(("name", "kind"), [("iou_1", "iou"), ("ce_0.5", "cross_entropy")])
def test_costs_are_the_authors(reference, name, kind):
    torch.testing.assert_close(reference_cost(reference, kind), reference[f"{name}_cost"].float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("limit", [0.25, 0.5, 1.0])
def test_the_transport_is_never_dearer_than_the_authors(reference, limit):
    theirs = reference[f"iou_{limit:g}"]
    cost = reference_cost(reference, "iou")
    transported, divergence = transport_terms(cost, reference["w"].float(), reference["pg"].float(), limit)
    assert transported.mean() <= theirs[1] + 1e-5
    if limit == 1:
        torch.testing.assert_close(transported.mean().double(), theirs[1].double(), atol=1e-6, rtol=1e-6)
        # their divergence is averaged over the samples too
        torch.testing.assert_close((divergence.mean() / 16).double(), theirs[2].double(), atol=1e-5, rtol=1e-4)


# --- cost and transport


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("kind", ["iou", "cross_entropy"])
def test_the_cost_of_each_pair_by_itself(kind, regions):
    torch.manual_seed(0)
    samples, labels = torch.randn(2, 3, 3, 5, 4), torch.randint(0, 4, (2, 2, 5, 4))
    if regions:
        samples = samples[:, :, :2]
    manager = labels_of(ignore=True, regions=regions)
    indicator, valid = RaterLabels(labels, torch.full((2, 2), 0.5)).encode(3, manager)
    found = pairwise_cost(samples, indicator, valid, kind, regions)
    for b in range(2):
        for n in range(3):
            for m in range(2):
                inside = labels[b, m] != 3
                logits, y = samples[b, n][:, inside], indicator[b, m][:, inside].float()
                if kind == "cross_entropy" and regions:
                    expected = F.binary_cross_entropy_with_logits(logits, y, reduction="none").sum(0).mean()
                elif kind == "cross_entropy":
                    expected = F.cross_entropy(logits[None], labels[b, m][inside][None])
                else:
                    p = logits.sigmoid() if regions else logits.softmax(0)[1:]
                    y = y if regions else y[1:]
                    common, total = (p * y).sum(1), (p + y).sum(1)
                    expected = (1 - (common + 1) / (total - common + 1)).mean()
                torch.testing.assert_close(found[b, n, m], expected)


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("regions", [False, True])
def test_chunks_change_neither_cost_nor_gradient(monkeypatch, regions, ignore):
    torch.manual_seed(0)
    samples = torch.randn(2, 3, 2 if regions else 3, 5, 4, requires_grad=True)
    labels = torch.randint(0, 4 if ignore else 3, (2, 2, 5, 4))
    manager = labels_of(ignore=ignore, regions=regions)
    indicator, valid = RaterLabels(labels, torch.full((2, 2), 0.5)).encode(3, manager)
    weights = torch.rand(2, 3, 2)
    whole = pairwise_cost(samples, indicator, valid, "iou+cross_entropy", regions)
    expected = torch.autograd.grad((whole * weights).sum(), samples)
    monkeypatch.setitem(transport_cost.CHUNK, "cpu", 3 * samples[..., 0, 0].numel() + 1)  # 20 voxels, 3 at once
    pieces = pairwise_cost(samples, indicator, valid, "iou+cross_entropy", regions)
    torch.testing.assert_close(pieces, whole)
    torch.testing.assert_close(torch.autograd.grad((pieces * weights).sum(), samples), expected)
    parts = [pairwise_cost(samples, indicator, valid, kind, regions) for kind in ("iou", "cross_entropy")]
    torch.testing.assert_close(sum(parts), whole)


def test_two_classes_are_the_general_case():
    torch.manual_seed(0)
    samples, labels = torch.randn(1, 2, 2, 6, 6), torch.randint(0, 2, (1, 2, 6, 6))
    indicator, _ = RaterLabels(labels, torch.full((1, 2), 0.5)).encode(2, labels_of(2))
    padded = torch.cat((samples, torch.full((1, 2, 1, 6, 6), -1e4)), 2)
    more = torch.cat((indicator, torch.zeros(1, 2, 1, 6, 6, dtype=torch.bool)), 2)
    own, general = (
        pairwise_cost(samples, indicator, None, "iou", False),
        pairwise_cost(padded, more, None, "iou", False),
    )
    torch.testing.assert_close(general, own / 2, atol=1e-5, rtol=0)  # the class that nobody has costs nothing


def test_each_annotation_goes_to_its_nearest_sample_and_the_plan_has_no_gradient():
    cost = torch.tensor([[[0.1, 0.9], [0.5, 0.2], [0.7, 0.3]]], requires_grad=True)
    weights = torch.tensor([[0.75, 0.25]])
    transported, divergence = transport_terms(cost, torch.tensor([[0.5, 0.25, 0.25]]), weights, 1.0)
    assert transported.item() == pytest.approx(0.75 * 0.1 + 0.25 * 0.2)
    assert divergence.item() == pytest.approx(0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.25))
    transported.sum().backward()
    assert cost.grad[0].tolist() == [[0.75, 0.0], [0.0, 0.25], [0.0, 0.0]]


def test_the_limit_makes_samples_share():
    cost = torch.tensor([[[0.1, 0.1], [0.5, 0.4], [0.7, 0.3]]])
    transported, _ = transport_terms(cost, torch.full((1, 3), 1 / 3), torch.tensor([[0.5, 0.5]]), 0.5)
    assert transported.item() == pytest.approx(0.5 * 0.1 + 0.5 * 0.3)


def test_a_gate_recovers_from_a_vanishing_weight():
    logits = torch.tensor([[0.0, 20.0]], requires_grad=True)
    _, divergence = transport_terms(torch.tensor([[[0.1], [0.9]]]), logits.softmax(1), torch.ones(1, 1), 1.0)
    divergence.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-1.0, 1.0]]), atol=1e-3, rtol=0)


def test_costs_that_overflow_do_not_stop_the_training():
    cost = torch.tensor([[[math.inf, math.nan], [0.5, math.inf]]])
    transported, _ = transport_terms(cost, torch.full((1, 2), 0.5), torch.tensor([[0.5, 0.5]]), 0.5)
    assert transported.shape == (1,)  # nnU-Net's GradScaler skips the step


def test_a_preference_lets_the_heavier_of_two_equal_samples_take_all():
    cost = torch.tensor([[[0.100, 0.5], [0.102, 0.5], [0.6, 0.1]]], dtype=torch.float64)
    weights = torch.tensor([[0.2, 0.6, 0.2]], dtype=torch.float64)
    raters = torch.full((1, 2), 0.5, dtype=torch.float64)
    transported, divergence = transport_terms(cost, weights, raters, 1.0)
    assert transported.item() == pytest.approx(0.1)
    preferring, other_divergence = transport_terms(cost, weights, raters, 1.0, 0.01)
    assert preferring.item() == pytest.approx(0.101)  # of the cost itself, without the preference
    assert divergence.item() == pytest.approx(0.5 * math.log(0.5 / 0.2) * 2)
    assert other_divergence.item() == pytest.approx(0.5 * math.log(0.5 / 0.6) + 0.5 * math.log(0.5 / 0.2))
    limited, _ = transport_terms(cost, weights, raters, 0.5, 0.01)
    assert limited.item() == pytest.approx(0.101)
