"""A step that is not finite is named and skipped; too many are an error."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.collate_outputs import collate_outputs

from nnunet_multimodal.errors import UserError
from nnunet_multimodal.nonfinite import MAX_SKIPPED_STEPS, name_nonfinite_input


@pytest.fixture(scope="module")
def prepared(datasets):
    nnunet = datasets("labels")
    trainer = nnunet.trainer("EarlyFusionTrainer_1epoch_2iterations")
    with nnunet.environment():
        trainer.initialize()
        batch = next(trainer.get_dataloaders()[0])
    trainer.network.train()
    return trainer, batch


@pytest.fixture
def trainer(prepared):
    trainer, _ = prepared
    state = deepcopy(trainer.network.state_dict())
    trainer.on_epoch_start()
    yield trainer
    trainer.network.load_state_dict(state)


@pytest.fixture
def batch(prepared):
    return deepcopy(prepared[1])


@pytest.fixture
def log(trainer, monkeypatch):
    lines = []
    monkeypatch.setattr(trainer, "print_to_log_file", lambda *text, **_: lines.append(" ".join(map(str, text))))
    return lines


def weights(trainer):
    return [p.detach().clone() for p in trainer.network.parameters()]


def test_the_image_at_fault_is_named_and_the_weights_stay(trainer, batch, log):
    batch["data"][1, 0].flatten()[:3] = torch.inf
    before = weights(trainer)
    assert np.isnan(trainer.train_step(batch)["loss"])
    assert all(torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))
    case = batch["keys"][1]
    assert len(log) == 1
    assert f"T1 of {case} has 3 infinite voxels; logits of {case}" in log[0]
    assert "1 of at most 10" in log[0]
    assert np.isfinite(trainer.train_step({**batch, "data": torch.zeros_like(batch["data"])})["loss"])
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))


def test_the_term_at_fault_is_named(trainer, batch, log, monkeypatch):
    terms = trainer.loss.terms
    monkeypatch.setattr(trainer.loss, "terms", lambda *args: {**terms(*args), "rnp": torch.tensor(torch.nan)})
    before = weights(trainer)
    assert np.isnan(trainer.train_step(batch)["loss"])
    assert all(torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))
    assert "loss term 'rnp'" in log[0]
    assert "logits" not in log[0]


def test_a_gradient_that_overflows_alone_is_skipped_too(trainer, batch, log):
    parameter = next(trainer.network.parameters())
    handle = parameter.register_hook(lambda gradient: gradient * torch.inf)
    before = weights(trainer)
    assert np.isnan(trainer.train_step(batch)["loss"])
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))
    assert "images and, in a second pass, loss are finite" in log[0]


def test_a_gradient_scaler_that_goes_on_lowering_its_scale_counts(trainer, batch, log, monkeypatch):
    monkeypatch.setattr(trainer, "grad_scaler", torch.amp.GradScaler("cpu", init_scale=2.0))
    handle = next(trainer.network.parameters()).register_hook(lambda gradient: gradient * torch.inf)
    before = weights(trainer)
    assert np.isfinite(trainer.train_step(batch)["loss"])  # 2 to 1: may happen
    assert not log
    assert np.isfinite(trainer.train_step(batch)["loss"])
    handle.remove()
    assert len(log) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))
    trainer.train_step(batch)
    assert len(log) == 1


def test_too_many_in_an_epoch_are_an_error(trainer, batch, log):
    batch["data"][0, 1] = torch.inf
    for _ in range(MAX_SKIPPED_STEPS):
        trainer.train_step(batch)
    trainer.on_epoch_start()  # counts from 0 again
    for _ in range(MAX_SKIPPED_STEPS):
        trainer.train_step(batch)
    with pytest.raises(UserError, match=rf"of {batch['keys'][0]} has .*more than 10 steps .*--c"):
        trainer.train_step(batch)


def test_an_epoch_without_any_step_is_an_error(trainer, batch, log):
    batch["data"][0, 1] = torch.inf
    outputs = [trainer.train_step(batch) for _ in range(3)]
    assert len(outputs) <= MAX_SKIPPED_STEPS
    with pytest.raises(UserError, match=rf"of {batch['keys'][0]} has .*all 3 steps of this epoch were skipped.*--c"):
        trainer.on_train_epoch_end(outputs)
    trainer.on_train_epoch_end([*outputs, {"loss": np.array(1.0, np.float32)}])
    assert trainer.logger.get_value("train_losses", step=-1) == 1


def test_skipped_steps_do_not_count_in_the_mean_loss_of_the_epoch(trainer):
    trainer.on_train_epoch_end([{"loss": np.array(v, np.float32)} for v in (1.0, np.nan, 2.0)])
    assert trainer.logger.get_value("train_losses", step=-1) == pytest.approx(1.5)


def test_an_epoch_with_a_skipped_step_has_the_shape_of_one_without(trainer, monkeypatch):
    """nnU-Net stacks those of all processes."""
    seen = []
    monkeypatch.setattr(
        nnUNetTrainer, "on_train_epoch_end", lambda self, outputs: seen.append(collate_outputs(outputs))
    )
    for losses in ((1.0, np.nan, 2.0), (1.0, 3.0, 2.0)):
        trainer.on_train_epoch_end([{"loss": np.array(loss, np.float32)} for loss in losses])
    np.testing.assert_array_equal(np.vstack([outputs["loss"] for outputs in seen]).ravel(), [1, 1.5, 2, 1, 3, 2])


def test_absent_modalities_are_not_at_fault():
    data = torch.zeros(2, 3, 4, 4)
    data[0, 0] = torch.nan
    data[1, 0, 1:] = torch.nan  # as rotation leaves it
    data[1, 1, 0, :2] = -torch.inf
    data[1, 2] = torch.inf  # not an image
    assert list(name_nonfinite_input(data, ["a", "b"], ["T1", "T2"])) == ["T2 of b has 2 infinite voxels"]
