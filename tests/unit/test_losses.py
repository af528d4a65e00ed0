import pytest
import torch

from nnunet_multimodal.heads.deterministic import DeterministicLogits
from nnunet_multimodal.losses import Objective
from nnunet_multimodal.network import NetworkOutput


def squared(logits, target):
    return (logits - target).square().mean()


def objective(weights):
    return Objective(lambda distribution, target, progress: 2 * squared(distribution.mean, target), squared, weights)


def output(*values, **auxiliary):
    maps = [torch.full((1, 1, 2, 2), value) for value in values]
    terms = {name: torch.tensor(value) for name, value in auxiliary.items()}
    return NetworkOutput(DeterministicLogits(maps[0]), tuple(maps[1:]), terms)


TARGETS = [torch.zeros(1, 1, 2, 2)] * 3


def test_weights_resolutions_and_adds_auxiliary_terms():
    loss = objective((0.5, 0.25, 0.25))(output(1.0, 2.0, 4.0, rnp=0.125, other=1.0), TARGETS)
    assert loss.item() == pytest.approx(0.5 * 2 * 1 + 0.25 * 4 + 0.25 * 16 + 0.125 + 1)


def test_zero_weight_is_not_computed():
    assert objective((1.0, 0.0))(output(1.0, float("nan")), TARGETS[:2]).item() == 2


def test_without_deep_supervision_one_target_and_still_the_auxiliary_terms():
    assert objective(None)(output(3.0, rnp=0.5), TARGETS[0]).item() == pytest.approx(18.5)


def test_the_mean_of_a_distribution_is_not_made_for_the_loss():
    class Costly:
        @property
        def mean(self):
            raise AssertionError("a mixture's mean takes all its samples")

    coarse = (torch.full((1, 1, 2, 2), 2.0), torch.full((1, 1, 2, 2), 4.0))
    loss = Objective(lambda distribution, target, step: torch.tensor(1.0), squared, (0.5, 0.25, 0.25))
    assert loss(NetworkOutput(Costly(), coarse), TARGETS).item() == pytest.approx(0.5 + 1 + 4)


def test_plain_logits_have_nnunets_loss():
    assert objective(None)(torch.full((1, 1, 2, 2), 3.0), TARGETS[0]).item() == 9


def test_samples_of_the_deterministic_head_are_its_mean():
    mean = torch.randn(2, 3, 4, 4)
    samples = DeterministicLogits(mean).rsample((5, 2))
    assert samples.shape == (5, 2, 2, 3, 4, 4)
    assert torch.equal(samples[3, 1], mean)


def test_a_missing_resolution_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        objective((0.5, 0.5))(output(1.0), TARGETS[:2])
