"""A step that is not finite is named and skipped; too many are an error."""

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.collate_outputs import collate_outputs

from nnunet_multimodal.errors import UserError
from nnunet_multimodal.nonfinite import LOWEST_SCALE, MAX_SKIPPED_STEPS, name_nonfinite_input
from tests.nnunet import PLANS


def trainer_and_batch(nnunet, plans=PLANS):
    trainer = nnunet.trainer("EarlyFusionTrainer_1epoch_2iterations", plans=plans)
    with nnunet.environment():
        trainer.initialize()
        batch = next(trainer.get_dataloaders()[0])
    trainer.network.train()
    return trainer, batch


@pytest.fixture(scope="module")
def prepared(datasets):
    return trainer_and_batch(datasets("labels"))


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


@pytest.fixture
def with_batch_norm(datasets, tmp_path):
    """A trainer with BatchNorm after one step, and its batch."""
    nnunet = datasets("labels").with_results(tmp_path)
    plans = {**nnunet.plans(), "plans_name": "BatchNormPlans"}
    network = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    network["norm_op"] = "torch.nn.modules.batchnorm.BatchNorm3d"
    nnunet.write_plans(plans)
    trainer, batch = trainer_and_batch(nnunet, plans["plans_name"])
    trainer.on_epoch_start()
    trainer.train_step(batch)
    return trainer, batch


def buffers(trainer):
    return {name: buffer.clone() for name, buffer in trainer.network.named_buffers()}


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


@pytest.mark.parametrize("at_fault", ["image", "gradient"])
@pytest.mark.parametrize("scaled", [False, True])
def test_running_statistics_keep_nothing_of_a_skipped_step(with_batch_norm, monkeypatch, scaled, at_fault):
    trainer, batch = with_batch_norm
    before = buffers(trainer)
    assert {name.rpartition(".")[2] for name in before} == {"running_mean", "running_var", "num_batches_tracked"}
    assert all(value == 1 for name, value in before.items() if name.endswith("tracked"))
    monkeypatch.setattr(trainer, "grad_scaler", torch.amp.GradScaler("cpu") if scaled else None)
    bad, parameter = deepcopy(batch), next(trainer.network.parameters())
    if at_fault == "image":
        bad["data"][1, 0].flatten()[:3] = torch.inf
    handle = parameter.register_hook(lambda gradient: gradient * (torch.inf if at_fault == "gradient" else 1))
    trainer.train_step(bad)
    handle.remove()
    after = buffers(trainer)
    assert all(value.isfinite().all() and torch.equal(value, before[name]) for name, value in after.items())
    with torch.no_grad():
        assert trainer.network.eval()(batch["data"])[0].isfinite().all()
    trainer.network.train()
    assert np.isfinite(trainer.train_step(batch)["loss"])
    assert all(value == 2 for name, value in buffers(trainer).items() if name.endswith("tracked"))


def test_statistics_spoiled_by_another_process_are_put_back(with_batch_norm):
    """SyncBatchNorm shares them; this process's own loss and gradient are finite."""
    trainer, batch = with_batch_norm
    before, old = buffers(trainer), weights(trainer)

    def spoil(layer, *_):
        layer.running_var.data.fill_(torch.nan)

    handle = trainer.statistics.layers[0].register_forward_hook(spoil)
    assert np.isfinite(trainer.train_step(batch)["loss"])
    handle.remove()
    assert all(torch.equal(value, before[name]) for name, value in buffers(trainer).items())
    assert not trainer.skipped
    assert any(not torch.equal(a, b) for a, b in zip(old, weights(trainer), strict=True))


def test_without_running_statistics_nothing_is_kept(trainer):
    assert trainer.statistics.layers
    assert trainer.statistics.buffers() == []


def test_a_loss_scale_that_falls_from_epoch_to_epoch_is_an_error(trainer, batch, log, monkeypatch):
    scaler = torch.amp.GradScaler("cpu")
    monkeypatch.setattr(trainer, "grad_scaler", scaler)
    monkeypatch.setattr(trainer, "num_skipped", 0)
    usual, lowest = int(math.log2(scaler.get_scale())), -int(math.log2(LOWEST_SCALE))
    handle = next(trainer.network.parameters()).register_hook(lambda gradient: gradient * torch.inf)
    for _ in range(usual):  # 65536 to 1: may happen at the start
        trainer.train_step(batch)
    assert scaler.get_scale() == 1
    assert not log
    for _ in range(lowest + 1):
        trainer.on_epoch_start()
        trainer.train_step(batch)
    handle.remove()
    before = weights(trainer)
    with pytest.raises(UserError, match=rf"scale 0.000488 is below .* after {lowest + 1} skipped .*_log_.*txt .*--c"):
        trainer.train_step(batch)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))


@pytest.mark.parametrize(("saved", "loaded"), [(LOWEST_SCALE / 2, 65536), (4, 4)])
def test_training_goes_on_with_a_usual_loss_scale(trainer, log, monkeypatch, tmp_path, saved, loaded):
    checkpoint = str(tmp_path / "checkpoint_latest.pth")
    monkeypatch.setattr(trainer, "current_epoch", 0)
    monkeypatch.setattr(trainer, "grad_scaler", torch.amp.GradScaler("cpu", init_scale=saved))
    trainer.save_checkpoint(checkpoint)
    monkeypatch.setattr(trainer, "grad_scaler", torch.amp.GradScaler("cpu"))
    trainer.load_checkpoint(checkpoint)
    assert trainer.grad_scaler.get_scale() == loaded
    assert any("65536 in place of 0.000488" in line for line in log) == (saved != loaded)


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
