"""Two processes compute what one does with the whole batch: every backbone with every head, through our trainers.

Two workers, started once, go through all pairs. What a method draws (SSN and MoSE samples, CIML what its gates let
through) is drawn for the whole batch here, and every process takes its cases' share (``drawn_for_the_whole_batch``); in
a training each draws its own, and losses would agree in the mean only. Drawn so, the mean of the processes' losses is
one process's wherever a loss is a mean over cases. Those that are none:

- CIML's Dice of the whole batch: who answers for which label may differ from process to process, so each takes the Dice
  of its own cases (``SubtaskLoss``).
- CRNP's, ShaSpec's and CIML's auxiliary losses where cases lack modalities: means over the modalities or pairs that are
  present, and processes count equally whatever they have.
- nnU-Net's own cross-entropy with an ignore label: the mean over the voxels that count. The data set here has none.

Gradients are equal on both in every case.
"""

import os
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import distributed, nn

from nnunet_multimodal.heads import HEADS
from nnunet_multimodal.heads.streamed import Noise
from nnunet_multimodal.lookup import COMBINATIONS
from nnunet_multimodal.network import MultimodalUNet, unwrap
from nnunet_multimodal.train import take_part, wrapped_for
from tests.contracts import MODALITIES, unet_kwargs, with_absent
from tests.nnunet import PLANS, forkserver

CPU = torch.device("cpu")
CLIP = torch.nn.utils.clip_grad_norm_
PAIRS = {f"{name}_1epoch": parts for name, parts in COMBINATIONS.items() if not parts[2]}  # -> backbone, head, dropout


class Step(NamedTuple):
    batch_dice: bool  # nnU-Net's Dice of the whole batch
    progress: float  # of the training: at 0.3 MoSE's transport has its limit, at 1.0 none
    absent: Sequence[tuple[int, int]] = ()  # cases of the batch, and a modality that each lacks


STEPS = (Step(False, 0.3), Step(True, 1.0), Step(False, 1.0, [(0, 0), (1, 2), (3, 1)]))


def make_trainer(name):
    from nnunetv2.run.run_training import get_trainer_from_args

    return get_trainer_from_args("900", "2d", 0, name, PLANS, device=CPU)


def initialize(trainer):
    """Weights have left nnU-Net's (the gate of MoSE begins without a gradient), and stay where they are."""
    with wrapped_for(CPU):
        trainer.initialize()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.network.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0  # steps begin with the same weights, whatever the rounding errors of those before


@contextmanager
def drawn_for_the_whole_batch(rank, size):
    """Noise, whose first axis is the batch, of one process's cases among all: every ``size``-th from ``rank``."""
    randn, voxels = torch.randn, Noise.voxels

    def draw(*shape, **more):
        batch, *others = shape[0] if isinstance(shape[0], tuple) else shape
        return randn(batch * size, *others, **more)[rank::size]

    def draw_like(tensor):
        return draw(*tensor.shape, dtype=tensor.dtype)

    def draw_voxels(self, position, *arguments):  # a case is one chunk here
        return voxels(self, position * size + rank, *arguments)

    with mock.patch.multiple(torch, randn=draw, randn_like=draw_like), mock.patch.object(Noise, "voxels", draw_voxels):
        yield


def unclipped(parameters, max_norm, **more):
    return CLIP(parameters, torch.inf, **more)


def train(trainer, batches, rank=0, size=1):
    """Steps on a process's part of the batches: losses, gradients, which nnU-Net does not clip here, and buffers."""
    network = unwrap(trainer.network)
    done = {"losses": [], "gradients": [], "buffers": [{k: b.clone() for k, b in network.named_buffers()}]}

    def keep(optimizer, *_):
        gradients = {k: p.grad for k, p in network.named_parameters() if p.grad is not None}
        done["gradients"].append({k: gradient.clone() for k, gradient in gradients.items()})

    trainer.optimizer.register_step_pre_hook(keep)
    for seed, (batch, step) in enumerate(zip(batches, STEPS, strict=True)):
        own = {
            "data": with_absent(batch["data"], step.absent)[rank::size],
            "target": [level[rank::size] for level in batch["target"]],
            "keys": batch["keys"][rank::size],
        }
        trainer.configuration_manager.configuration["batch_dice"] = step.batch_dice
        trainer.loss = trainer._build_loss()
        trainer.loss.step.progress = step.progress
        torch.manual_seed(seed)
        with drawn_for_the_whole_batch(rank, size), mock.patch("torch.nn.utils.clip_grad_norm_", unclipped):
            done["losses"].append(float(trainer.train_step(own)["loss"]))
    done["buffers"].append(dict(network.named_buffers()))
    return done


def train_all(rank, size, init_method, folder):
    """One of the processes: its results of every trainer go into the folder."""
    torch.set_num_threads(1)
    os.environ["nnUNet_results"] = f"{folder}/results_{rank}"  # noqa: SIM112
    trainers = {name: make_trainer(name) for name in PAIRS}
    distributed.init_process_group("gloo", init_method=init_method, rank=rank, world_size=size)
    batches = torch.load(f"{folder}/batches.pt", weights_only=False)
    done = {}
    for name, trainer in trainers.items():
        take_part(trainer, CPU)
        torch.manual_seed(rank)  # DDP must make the weights equal by itself
        initialize(trainer)
        done[name] = train(trainer, batches[HEADS[trainer.head].NEEDS_FOREGROUND], rank, size)
    torch.save(done, f"{folder}/rank{rank}.pt")
    distributed.destroy_process_group()


def draw_batches():
    """Four cases for each step, with nnU-Net's non-zero mask and without, by whether it is there."""
    batches = {}
    for name, head in (("EarlyFusionTrainer", "deterministic"), ("SSNTrainer", "ssn")):
        trainer = make_trainer(name)
        initialize(trainer)
        loader, _ = trainer.get_dataloaders()
        batches[HEADS[head].NEEDS_FOREGROUND] = [joined(next(loader), next(loader)) for _ in STEPS]
    return batches


def joined(first, second):
    return {
        "data": torch.cat((first["data"], second["data"])),
        "target": [torch.cat(levels) for levels in zip(first["target"], second["target"], strict=True)],
        "keys": [*first["keys"], *second["keys"]],
    }


def train_alone(name, batches):
    """What one process does with the whole batches; an operation without a deterministic kernel (on CPUs) fails."""
    trainer = make_trainer(name)
    torch.manual_seed(0)  # as the first of the two
    initialize(trainer)
    torch.use_deterministic_algorithms(True)
    try:
        return train(trainer, batches[HEADS[trainer.head].NEEDS_FOREGROUND])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def done(datasets):
    """By trainer: what one process did, what the first and what the second of two did."""
    nnunet = datasets("labels")
    with tempfile.TemporaryDirectory() as folder, nnunet.environment(nnUNet_results=folder):
        batches = draw_batches()
        torch.save(batches, f"{folder}/batches.pt")
        arguments = (2, f"file://{folder}/rendezvous", folder)
        ranks = [forkserver().Process(target=train_all, args=(rank, *arguments)) for rank in (0, 1)]
        for process in ranks:
            process.start()
        alone = {name: train_alone(name, batches) for name in PAIRS}
        for process in ranks:
            process.join()
        assert [process.exitcode for process in ranks] == [0, 0]
        first, second = (torch.load(f"{folder}/rank{rank}.pt", weights_only=True) for rank in (0, 1))
    return {name: (alone[name], first[name], second[name]) for name in PAIRS}


each_pair = pytest.mark.parametrize("name", PAIRS)


def is_a_mean_over_cases(name, step):
    """Whether a pair's loss is one; see the module."""
    backbone = PAIRS[name][0]
    return backbone == "early" or not (step.absent or (backbone == "ciml" and step.batch_dice))


def flat(gradients, like):
    """All of them as one vector; zero for what has none (nnU-Net gives the coarsest logits no weight, or 1e-6)."""
    return torch.cat([gradients.get(key, torch.zeros_like(other)).flatten() for key, other in like.items()])


@each_pair
def test_losses_and_gradients_are_those_of_one_process(done, name):
    alone, first, second = done[name]
    steps = [number for number, step in enumerate(STEPS) if is_a_mean_over_cases(name, step)]
    assert len(steps) == {"early": 3, "ciml": 1}.get(PAIRS[name][0], 2)
    for step in steps:
        mean = (first["losses"][step] + second["losses"][step]) / 2
        assert mean == pytest.approx(alone["losses"][step], rel=1e-5)
        found = first["gradients"][step]
        expected, found = (flat(gradients, found) for gradients in (alone["gradients"][step], found))
        assert (found - expected).norm() < 1e-4 * expected.norm()


@each_pair
def test_gradients_are_equal_on_both(done, name):
    _, first, second = done[name]
    assert len(first["gradients"]) == len(STEPS)
    assert first["losses"] != second["losses"]  # of other cases
    for of_first, of_second in zip(first["gradients"], second["gradients"], strict=True):
        assert of_first.keys() == of_second.keys()
        for key, gradient in of_first.items():
            assert torch.isfinite(gradient).all(), key
            assert torch.equal(gradient, of_second[key]), key


@each_pair
def test_no_layer_keeps_statistics_of_its_batches(done, name):
    """As batch normalisation would, for which processes would have to agree: what a network keeps never changes."""
    for of_process in done[name]:
        before, after = of_process["buffers"]
        assert before.keys() == after.keys()
        for key, buffer in before.items():
            assert torch.equal(buffer, after[key]), key


@each_pair
def test_batch_normalisation_that_plans_name_is_taken_over_all_processes(name):
    """nnU-Net's planners name none. Its conversion, which runs on GPUs alone, reaches every layer of ours."""
    backbone, head, _ = PAIRS[name]
    normalised = unet_kwargs(norm_op=nn.BatchNorm3d, norm_op_kwargs={})
    network = MultimodalUNet(MODALITIES, 2, backbone=backbone, head=head, **normalised)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    layers = [type(module) for module in converted.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    assert set(layers) == {nn.SyncBatchNorm}
