from unittest import mock

import pytest

from nnunet_multimodal.heads import mose
from tests.contracts import TrainerContract
from tests.nnunet import with_raters


@pytest.fixture(scope="module")
def datasets(datasets, tmp_path_factory):
    """Those of the other trainers' tests, with one to three raters of each case."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = with_raters(datasets(kind), tmp_path_factory.mktemp(f"{kind}_raters"), "ignore" in kind)
        return made[kind]

    return get


class TestMoSETrainer(TrainerContract):
    trainer = "MoSETrainer"

    def nnunets_loss(self, trainer, stock, output, target):
        """At the coarser resolutions; the finest one has the transport instead."""
        finest = trainer.loss.distribution_loss(output.distribution, target[0], trainer.loss.step)
        coarse = zip(stock.weight_factors[1:], output.coarse_logits, target[1:], strict=True)
        return stock.weight_factors[0] * finest + sum(weight * stock.loss(logits, t) for weight, logits, t in coarse)

    @pytest.mark.plots
    def test_learns(self, datasets):
        """With one limit throughout: the loss rises as it is lifted, by what samples of an expert cannot share out."""
        nnunet = datasets("labels")
        plans = nnunet.plans()
        options = plans["configurations"]["3d_fullres"]["nnunet_multimodal"]["mose"]
        try:
            options["limit"] = 1.0
            nnunet.write_plans(plans)
            super().test_learns(datasets)
        finally:
            del options["limit"]
            nnunet.write_plans(plans)

    def test_a_resumed_training_knows_the_plateau_that_lifts_gamma(self, datasets, tmp_path):
        """Its first step transports with the same limit as that of the training that was not interrupted."""
        nnunet = datasets("labels").with_results(tmp_path / "results")
        name = f"{self.trainer}_20epochs_2iterations"
        for losses, gamma in (((2.0, 1.5, 1.5, 1.5, 1.5), 1.0), ((2.0, 1.8, 1.6, 1.4, 1.2), 0.5)):
            trainer = self.prepared(nnunet, name)
            for epoch, loss in enumerate(losses):
                trainer.logger.log("train_losses", loss, epoch)
            trainer.current_epoch = len(losses) - 1
            resumed = self.prepared(nnunet, name)
            with nnunet.environment():
                trainer.save_checkpoint(str(tmp_path / "latest.pth"))  # nnU-Net does so as the epoch ends
                resumed.load_checkpoint(str(tmp_path / "latest.pth"))
                trainer.current_epoch += 1
                limits = [self.first_limit(each) for each in (trainer, resumed)]
            assert limits == [gamma, gamma]

    @staticmethod
    def first_limit(trainer):
        """gamma in the first step of the next epoch."""
        trainer.on_epoch_start()
        batch = next(trainer.get_dataloaders()[0])
        with mock.patch.object(mose, "transport_terms", wraps=mose.transport_terms) as transport:
            trainer.train_step(batch)
        assert trainer.raters.num_raters == 3
        return transport.call_args.args[3]
