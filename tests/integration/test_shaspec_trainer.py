from tests.contracts import TrainerContract


class TestShaSpecModalityDropoutTrainer(TrainerContract):
    trainer = "ShaSpecModalityDropoutTrainer"
