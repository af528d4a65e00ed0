from tests.contracts import TrainerContract


class TestEarlyFusionTrainer(TrainerContract):
    trainer = "EarlyFusionTrainer"
