"""What every trainer promises under nnU-Net's own commands."""

import os
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch

from nnunet_multimodal.network import unwrap
from tests.contracts.network import with_absent
from tests.nnunet import DATASET, PLANS, forkserver, segmentation


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
        trainer = self.prepared(nnunet, f"{self.trainer}_2epochs_30iterations", fixed=True)
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
        if trainer.raters is not None:
            batch = trainer._with_raters(batch)
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
            trainer = self.prepared(own, name, fixed=True, interrupt=interrupt)
            trainer.save_every = 1
            if interrupt:
                with own.environment(), pytest.raises(KeyboardInterrupt):
                    trainer.run_training()
                latest = Path(trainer.output_folder) / "checkpoint_latest.pth"
                trainer = self.prepared(own, name, fixed=True)
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

    def prepared(self, nnunet, name, fixed=False, interrupt=False):
        """A trainer that is initialised, optionally with fixed batches or an interruption in its second epoch."""
        torch.manual_seed(0)
        trainer = nnunet.trainer(name)
        with nnunet.environment():
            trainer.initialize()
        if fixed:
            get_dataloaders = trainer.get_dataloaders
            trainer.get_dataloaders = lambda: fixed_batches(trainer, get_dataloaders)
        if interrupt:
            interrupt_second_epoch(trainer)
        return trainer


def interrupt_second_epoch(trainer):
    """Ctrl-C as its second epoch begins."""
    on_epoch_start = trainer.on_epoch_start

    def interrupted():
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt
        on_epoch_start()

    trainer.on_epoch_start = interrupted


def fixed_batches(trainer, get_dataloaders):
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
