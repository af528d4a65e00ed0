import torch

from tests.contracts import TrainerContract


class TestMoSETrainer(TrainerContract):
    trainer = "MoSETrainer"

    def test_loss_without_auxiliary_terms_is_nnunets(self, datasets):
        """nnU-Net's own loss at the coarser resolutions; the finest one has the transport instead."""
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

        nnunet = datasets("labels")
        trainer = self.prepared(nnunet, self.short)
        stock = nnUNetTrainer._build_loss(trainer)
        with nnunet.environment():
            batch = next(trainer.get_dataloaders()[0])
        trainer.network.eval()
        output = trainer.network(batch["data"])
        finest = trainer.loss.distribution_loss(output.distribution, batch["target"][0], trainer.loss.step)
        expected = stock.weight_factors[0] * finest + sum(
            weight * stock.loss(logits, target)
            for weight, logits, target in zip(
                stock.weight_factors[1:], output.coarse_logits, batch["target"][1:], strict=True
            )
        )
        torch.testing.assert_close(trainer.loss(output, batch["target"]), expected)
