from tests.contracts import TrainerContract


class TestMoSETrainer(TrainerContract):
    trainer = "MoSETrainer"

    def nnunets_loss(self, trainer, stock, output, target):
        """At the coarser resolutions; the finest one has the transport instead."""
        finest = trainer.loss.distribution_loss(output.distribution, target[0], trainer.loss.step)
        coarse = zip(stock.weight_factors[1:], output.coarse_logits, target[1:], strict=True)
        return stock.weight_factors[0] * finest + sum(weight * stock.loss(logits, t) for weight, logits, t in coarse)
