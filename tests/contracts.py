"""What every method promises. A method's test file subclasses these and says which method it is.

``NetworkContract`` checks backbone and head as a network; ``TrainerContract`` runs nnU-Net's own commands.
"""

import math
import os
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from nnunet_multimodal.network import MultimodalUNet, NetworkOutput, unwrap
from tests.nnunet import DATASET, PLANS, forkserver, segmentation

MODALITIES = 3


def unet_kwargs(dim: int = 3, residual: bool = False, **changes) -> dict:
    """A small topology as nnU-Net's plans hold it, anisotropic at the first step."""
    first = [1, 2, 2][-dim:]
    return {
        "n_stages": 3,
        "features_per_stage": [4, 6, 8],
        "conv_op": nn.Conv3d if dim == 3 else nn.Conv2d,
        "kernel_sizes": [[1, 3, 3][-dim:], [3] * dim, [3] * dim],
        "strides": [[1] * dim, first, [2] * dim],
        "n_blocks_per_stage" if residual else "n_conv_per_stage": [1, 2, 2] if residual else [2, 2, 2],
        "n_conv_per_stage_decoder": [1, 1] if residual else [2, 2],
        "conv_bias": True,
        "norm_op": nn.InstanceNorm3d if dim == 3 else nn.InstanceNorm2d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
        **changes,
    }


def with_absent(x: torch.Tensor, absent: list[tuple[int, int]]) -> torch.Tensor:
    x = x.clone()
    for sample, channel in absent:
        x[sample, channel] = math.nan
    return x


class NetworkContract:
    """Subclass with ``backbone`` and, where it has some, ``options`` to run everything with."""

    backbone: str
    head = "deterministic"
    options: tuple[dict, ...] = ({},)

    def build(self, options=None, dim=3, residual=False, cascade=0, classes=2, modalities=MODALITIES, **kwargs):
        torch.manual_seed(0)
        network = MultimodalUNet(
            modalities + cascade,
            classes,
            backbone=self.backbone,
            head=self.head,
            num_image_channels=modalities,
            backbone_kwargs=options or {},
            **{"deep_supervision": True, **kwargs},
            **unet_kwargs(dim, residual),
        )
        network.apply(network.initialize)
        return network

    def data(self, dim=3, cascade=0, batch=2, modalities=MODALITIES):
        torch.manual_seed(1)
        return torch.randn(batch, modalities + cascade, *(8, 8, 12)[-dim:])

    def loss(self, output: NetworkOutput) -> torch.Tensor:
        logits = (output[0], *output.coarse_logits)
        if output.subtasks is not None:  # what is trained; their average has no gradient
            logits = output.subtasks.logits if output.coarse_logits else output.subtasks.logits[:1]
        return sum(layer.square().mean() for layer in logits) + sum(output.auxiliary_losses.values())

    def each(self):
        return [dict(options) for options in self.options]

    @pytest.mark.parametrize("dim", [2, 3])
    @pytest.mark.parametrize("residual", [False, True])
    def test_shapes_follow_the_topology(self, dim, residual):
        for options in self.each():
            network = self.build(options, dim, residual)
            output = network(self.data(dim))
            size = (8, 8, 12)[-dim:]
            assert output[0].shape == (2, 2, *size)
            step = (1, 2, 2)[-dim:]
            assert [c.shape[2:] for c in output.coarse_logits] == [
                tuple(s // t for s, t in zip(size, step, strict=True))
            ]
            assert output[1] is output.coarse_logits[0]

    def test_evaluation_without_deep_supervision_returns_plain_logits(self):
        network = self.build().eval()
        rich = network(self.data())
        network.decoder.deep_supervision = False
        plain = network(self.data())
        assert isinstance(plain, torch.Tensor)
        torch.testing.assert_close(plain, rich[0])
        assert rich.auxiliary_losses == {}

    def test_weights_of_training_load_strictly_for_prediction(self):
        trained, fresh = self.build(), self.build(deep_supervision=False)
        for name, parameter in trained.named_parameters():
            if name.endswith("seg_layers.0.bias"):
                nn.init.constant_(parameter, 0.3)
        fresh.load_state_dict(trained.state_dict())
        trained.deep_supervision = False
        torch.testing.assert_close(fresh.eval()(self.data()), trained.eval()(self.data()))

    @pytest.mark.parametrize("absent", [[], [(0, 1)], [(0, 0), (0, 1), (1, 2)]])
    @pytest.mark.parametrize("deep_supervision", [True, False])
    def test_every_parameter_gets_a_finite_gradient(self, absent, deep_supervision):
        for options in self.each():
            network = self.build(options, deep_supervision=deep_supervision)
            self.loss(network(with_absent(self.data(), absent))).backward()
            for name, parameter in network.named_parameters():
                if parameter.requires_grad:
                    assert parameter.grad is not None, name
                    assert torch.isfinite(parameter.grad).all(), name

    @pytest.mark.parametrize("absent", [[(0, 1)], [(0, 0), (0, 2), (1, 1)]])
    def test_absent_modality_content_is_ignored(self, absent):
        for options in self.each():
            network = self.build(options).eval()
            x = self.data()
            nothing = with_absent(x, absent)
            partly = nothing.clone()  # augmentation leaves NaN in a part of the channel and anything in the rest
            zeros = nothing.clone()  # what stock preprocessing makes of a placeholder
            for sample, channel in absent:
                partly[sample, channel] = x[sample, channel] * 7
                partly[sample, channel, 0] = math.nan
                zeros[sample, channel] = 0
            expected = network(nothing)[0]
            assert torch.isfinite(expected).all()
            assert torch.equal(network(partly)[0], expected)
            assert torch.equal(network(zeros)[0], expected)
            assert not torch.allclose(network(x)[0], expected)

    def test_absent_modality_of_one_sample_leaves_the_others_alone(self):
        for options in self.each():
            network = self.build(options).eval()
            x = self.data()
            torch.testing.assert_close(network(with_absent(x, [(0, 1)]))[0][1], network(x)[0][1])

    def test_a_tile_of_air_counts_as_all_present(self):
        network = self.build().eval()
        assert torch.isfinite(network(torch.zeros_like(self.data()))[0]).all()
        _, _, present = network.split(torch.zeros_like(self.data()))
        assert present.all()

    def test_the_cascade_reaches_the_output(self):
        for options in self.each():
            network = self.build(options, cascade=2).eval()
            x = self.data(cascade=2)
            changed = x.clone()
            changed[:, -1] += 1
            assert not torch.allclose(network(x)[0], network(changed)[0])

    def test_channels_can_form_a_modality(self):
        torch.manual_seed(0)
        network = MultimodalUNet(
            4, 2, backbone=self.backbone, head=self.head, modalities=[[0, 2], [3, 1]], **unet_kwargs()
        ).eval()
        x = self.data(modalities=4)
        image, _, present = network.split(with_absent(x, [(0, 1)]))
        assert torch.equal(image[1], x[1, [0, 2, 3, 1]].unflatten(0, (2, 2)))
        assert image[0, 1].abs().max() == 0
        assert present.tolist() == [[True, False], [True, True]]
        other = x.clone()
        other[0, 3] += 1  # the rest of the absent modality
        expected = network(with_absent(x, [(0, 1)]))
        assert torch.equal(network(with_absent(other, [(0, 1)])), expected)
        none_complete = network.train()(with_absent(x, [(0, 1), (0, 0)]))
        assert torch.isfinite(none_complete[0]).all()
        assert all(torch.isfinite(term) for term in none_complete.auxiliary_losses.values())

    def test_the_whole_graph_compiles_once_for_all_subsets(self):
        for options in self.each():
            torch._dynamo.reset()
            network = self.build(options)
            counter = CompileCounterWithBackend("aot_eager")
            compiled = torch.compile(network, fullgraph=True, backend=counter)
            for absent in ([], [(0, 1)], [(0, 0), (0, 2), (1, 1)]):
                x = with_absent(self.data(), absent)
                torch.manual_seed(2)  # for networks that draw noise
                output = compiled(x)
                torch.manual_seed(2)
                torch.testing.assert_close(output[0], network(x)[0])
                self.loss(output).backward()
            assert counter.frame_count == 1
        torch._dynamo.reset()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("absent", [[], [(0, 0), (0, 1)]])
    def test_autocast_stays_finite(self, dtype, absent):
        for options in self.each():
            network = self.build(options)
            with torch.autocast("cpu", dtype):
                output = network(100 * with_absent(self.data(), absent))
            assert torch.isfinite(output[0].float()).all()
            assert all(torch.isfinite(term) for term in output.auxiliary_losses.values())

    def test_planning_counts_at_least_the_stock_network(self):
        early = MultimodalUNet(MODALITIES, 2, backbone="early", **unet_kwargs())
        size = self.build(deep_supervision=False).compute_conv_feature_map_size((8, 8, 12))
        assert size >= early.compute_conv_feature_map_size((8, 8, 12))

    def test_unknown_option_is_refused_with_its_name(self):
        with pytest.raises(ValueError, match="no_such_option"):
            self.build({"no_such_option": 1})


class TrainerContract:
    """Subclass with ``trainer`` (its base name). Everything runs through nnU-Net's commands, on real files."""

    trainer: str

    @property
    def short(self) -> str:
        return f"{self.trainer}_1epoch_2iterations"

    # --- labels and configurations

    @pytest.mark.parametrize("kind", ["labels", "regions", "ignore", "regions_ignore"])
    @pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
    def test_trains_validates_and_predicts(self, datasets, tmp_path, kind, configuration):
        nnunet = datasets(kind)
        fold = nnunet.train(self.short, configuration)
        assert (fold / "validation" / "summary.json").is_file()
        checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=False)
        assert all(torch.isfinite(w).all() for w in checkpoint["network_weights"].values())
        tta = () if kind == "labels" else ("--disable_tta",)  # the validation mirrors in any case
        output = nnunet.predict(self.short, configuration, tmp_path / "prediction", *tta)
        for case in range(5):
            predicted = segmentation(output / f"case_{case}.nii.gz")
            assert predicted.shape == (18, 20, 22)
            assert set(np.unique(predicted)) <= {0, 1, 2}

    def test_cascade_trains_and_predicts(self, datasets, tmp_path):
        nnunet = datasets("labels")
        for fold in range(5):  # the second stage needs the first one's predictions for all training cases
            nnunet.train(self.short, "3d_lowres", fold)
        nnunet.train(self.short, "3d_cascade_fullres")
        lowres = nnunet.predict(self.short, "3d_lowres", tmp_path / "lowres")
        output = nnunet.predict(
            self.short, "3d_cascade_fullres", tmp_path / "cascade", "-prev_stage_predictions", lowres
        )
        assert len(list(output.glob("case_*.nii.gz"))) == 5

    @pytest.mark.plots
    def test_learns(self, datasets):
        nnunet = datasets("labels")
        trainer = self.prepared(nnunet, f"{self.trainer}_2epochs_30iterations", fixed_batches=True)
        with nnunet.environment():
            trainer.run_training()
        first, last = (trainer.logger.get_value("train_losses", step=step) for step in (0, -1))
        assert last < first - 0.2, (first, last)
        assert Path(trainer.output_folder, "progress.png").read_bytes().startswith(b"\x89PNG")

    # --- deep supervision

    def test_trains_without_deep_supervision(self, datasets):
        nnunet = datasets("labels")
        trainer = nnunet.trainer(self.short)
        trainer.enable_deep_supervision = False
        with nnunet.environment():
            trainer.run_training()
            trainer.perform_actual_validation()
        assert np.isfinite(trainer.logger.get_value("val_losses", step=-1))

    def test_loss_without_auxiliary_terms_is_nnunets(self, datasets):
        """Same logits, same target: the objective's segmentation term equals stock nnU-Net's loss."""
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

        nnunet = datasets("labels")
        trainer = self.prepared(nnunet, self.short)
        trainer.loss.step.progress = 0.0  # the warm-up, where a head has one
        stock = nnUNetTrainer._build_loss(trainer)
        with nnunet.environment():
            batch = next(trainer.get_dataloaders()[0])
        trainer.network.eval()
        output = trainer.network(batch["data"])
        expected = self.nnunets_loss(trainer, stock, output, batch["target"])
        torch.testing.assert_close(trainer.loss(output, batch["target"]), expected)

    def nnunets_loss(self, trainer, stock, output, target):
        return stock([output[0], *output.coarse_logits], target)

    # --- resuming

    def test_an_interrupted_training_resumes_to_the_same_state(self, datasets, tmp_path):
        """Batches are fixed by epoch and step, so that both runs see the same."""
        nnunet = datasets("labels")
        name = f"{self.trainer}_3epochs_2iterations"
        states = []
        for interrupt in (False, True):
            own = nnunet.with_results(tmp_path / f"interrupted_{interrupt}")
            torch.manual_seed(0)
            trainer = self.prepared(own, name, fixed_batches=True, interrupt=interrupt)
            trainer.save_every = 1
            if interrupt:
                with own.environment(), pytest.raises(KeyboardInterrupt):
                    trainer.run_training()
                latest = Path(trainer.output_folder) / "checkpoint_latest.pth"
                trainer = self.prepared(own, name, fixed_batches=True)
                trainer.load_checkpoint(str(latest))
                assert trainer.current_epoch == 1
            with own.environment():
                trainer.run_training()
            states.append(trainer)
        once, resumed = (t.network.state_dict() for t in states)
        assert once.keys() == resumed.keys()
        for key, value in once.items():
            assert torch.equal(value, resumed[key]), key
        assert states[0].optimizer.param_groups[-1]["lr"] == states[1].optimizer.param_groups[-1]["lr"]

    def test_the_command_continues_a_training(self, datasets, tmp_path):
        nnunet = datasets("labels").with_results(tmp_path / "results")
        name = f"{self.trainer}_2epochs_2iterations"
        trainer = self.prepared(nnunet, name, interrupt=True)
        with nnunet.environment(), pytest.raises(KeyboardInterrupt):
            trainer.run_training()
        folder = Path(trainer.output_folder)
        assert not (folder / "checkpoint_final.pth").exists()
        assert nnunet.train(name, "3d_fullres", 0, "--c") == folder
        assert torch.load(folder / "checkpoint_final.pth", weights_only=False)["current_epoch"] == 2
        assert (folder / "validation" / "summary.json").is_file()

    def test_starts_from_a_stock_checkpoint(self, datasets, capsys):
        nnunet = datasets("labels")
        stock = nnunet.train("nnUNetTrainer_1epoch_1iterations") / "checkpoint_final.pth"
        nnunet.train(self.short, "3d_fullres", 0, "-pretrained_weights", stock)
        assert f"tensors of the stock checkpoint {stock}" in capsys.readouterr().out

    # --- absent modalities

    def test_absent_modalities_train_and_predict(self, datasets, tmp_path):
        """NaN in training; at prediction a placeholder, whose constant value must not matter."""
        nnunet = datasets("labels")
        trainer = self.prepared(nnunet, self.short)
        with nnunet.environment():
            batch = next(trainer.get_dataloaders()[0])
            batch["data"] = with_absent(batch["data"], [(0, 1)])
            assert np.isfinite(trainer.train_step(batch)["loss"])
        nnunet.train(self.short)
        predictions = []
        for value in (0, 7):
            images = tmp_path / f"images_{value}"
            images.mkdir()
            for channel in range(3):
                image = SimpleITK.ReadImage(str(nnunet.raw / DATASET / "imagesTr" / f"case_0_{channel:04d}.nii.gz"))
                image = image * 0 + value if channel == 1 else image
                SimpleITK.WriteImage(image, str(images / f"case_0_{channel:04d}.nii.gz"))
            arguments = (self.short, "3d_fullres", tmp_path / f"predicted_{value}", "--save_probabilities")
            output = nnunet.predict(*arguments, images=images)
            predictions.append(np.load(output / "case_0.npz")["probabilities"])
        assert np.isfinite(predictions[0]).all()
        np.testing.assert_array_equal(*predictions)

    # --- after training

    def test_best_configuration_ensemble_postprocessing_and_zip(self, datasets, tmp_path):
        nnunet = datasets("labels").with_results(tmp_path / "results")
        for configuration in ("2d", "3d_fullres"):
            nnunet.train(self.short, configuration, 0, "--npz")
        nnunet(
            "nnUNetv2_find_best_configuration", 900, "-p", PLANS, "-c", "2d", "3d_fullres", "-tr", self.short,
            "-f", 0, "-np", 1,
        )  # fmt: skip
        dataset = nnunet.results / DATASET
        assert (dataset / "inference_instructions.txt").is_file()
        postprocessing = next(dataset.rglob("postprocessing.pkl"))  # of the best: a model or their ensemble

        members = [
            nnunet.predict(self.short, c, tmp_path / f"p_{c}", "--save_probabilities") for c in ("2d", "3d_fullres")
        ]
        nnunet("nnUNetv2_ensemble", "-i", *members, "-o", tmp_path / "ensemble", "-np", 1)
        plans = members[0] / "plans.json"
        nnunet(
            "nnUNetv2_apply_postprocessing", "-i", tmp_path / "ensemble", "-o", tmp_path / "final",
            "-pp_pkl_file", postprocessing, "-plans_json", plans, "-dataset_json", members[0] / "dataset.json",
            "-np", 1,
        )  # fmt: skip
        assert len(list((tmp_path / "final").glob("case_*.nii.gz"))) == 5

        zipped = tmp_path / "model.zip"
        export = ("-d", 900, "-o", zipped, "-c", "3d_fullres", "-tr", self.short, "-p", PLANS, "-f", 0)
        nnunet("nnUNetv2_export_model_to_zip", *export)
        elsewhere = nnunet.with_results(tmp_path / "elsewhere")
        elsewhere("nnUNetv2_install_pretrained_model_from_zip", zipped)
        output = elsewhere.predict(self.short, "3d_fullres", tmp_path / "imported")
        for case in range(5):
            expected = segmentation(members[1] / f"case_{case}.nii.gz")
            assert np.array_equal(segmentation(output / f"case_{case}.nii.gz"), expected)

    # --- several processes

    def test_two_processes_stay_in_step(self, datasets):
        nnunet = datasets("labels")
        with nnunet.environment(), tempfile.TemporaryDirectory() as folder:
            arguments = (2, f"file://{folder}/rendezvous", self.short, folder)
            ranks = [forkserver().Process(target=_train_rank, args=(rank, *arguments)) for rank in (0, 1)]
            for process in ranks:
                process.start()
            for process in ranks:
                process.join()
            assert [process.exitcode for process in ranks] == [0, 0]
            first, second = (torch.load(f"{folder}/rank{rank}.pt", weights_only=True) for rank in (0, 1))
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert torch.isfinite(value).all(), key
            assert torch.equal(value, second[key]), key

    # --- helpers

    def prepared(self, nnunet, name, fixed_batches=False, interrupt=False):
        """A trainer that is initialised, optionally with fixed batches or an interruption in its second epoch."""
        torch.manual_seed(0)
        trainer = nnunet.trainer(name)
        with nnunet.environment():
            trainer.initialize()
        if fixed_batches:
            get_dataloaders = trainer.get_dataloaders
            trainer.get_dataloaders = lambda: _fixed_batches(trainer, get_dataloaders)
        if interrupt:
            on_epoch_start = trainer.on_epoch_start

            def interrupted():
                if trainer.current_epoch == 1:
                    raise KeyboardInterrupt
                on_epoch_start()

            trainer.on_epoch_start = interrupted
        return trainer


def _fixed_batches(trainer, get_dataloaders):
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (nnU-Net's loaders draw from it)
    torch.manual_seed(0)
    templates = [next(loader) for loader in get_dataloaders()]

    def batches(template):
        step = 0
        while True:
            seed = 1000 * trainer.current_epoch + step % 2
            step += 1
            noise = torch.randn(template["data"].shape, generator=torch.Generator().manual_seed(seed))
            torch.manual_seed(seed)  # for losses that draw samples
            yield {**template, "data": template["data"] + 0.1 * noise}

    return [batches(template) for template in templates]


def _train_rank(rank: int, world_size: int, init_method: str, name: str, folder: str) -> None:
    """One process of a distributed training on the CPU; nnU-Net's own launcher needs CUDA."""
    from unittest import mock

    from nnunetv2.run.run_training import get_trainer_from_args
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    os.environ["nnUNet_results"] = f"{folder}/results_{rank}"  # noqa: SIM112
    distributed.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    with mock.patch.object(distributed, "is_initialized", return_value=False):  # its constructor would ask for CUDA
        trainer = get_trainer_from_args("900", "3d_fullres", 0, name, PLANS, device=torch.device("cpu"))
    trainer.is_ddp, trainer.local_rank = True, rank

    def on_cpu(module, device_ids=None, **kwargs):
        return DistributedDataParallel(module, **kwargs)

    torch.manual_seed(rank)  # DDP must make the weights equal by itself
    np.random.seed(rank)  # noqa: NPY002
    with mock.patch("nnunetv2.training.nnUNetTrainer.nnUNetTrainer.DDP", on_cpu):
        trainer.run_training()
    torch.save(unwrap(trainer.network).state_dict(), f"{folder}/rank{rank}.pt")
    distributed.destroy_process_group()
