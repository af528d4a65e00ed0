from tests.contracts import TrainerContract
from tests.nnunet import make_dataset


class TestEarlyFusionTrainer(TrainerContract):
    trainer = "EarlyFusionTrainer"

    def test_one_modality_is_enough(self, tmp_path):
        nnunet = make_dataset(tmp_path, "labels", channels=("T1",), cases=2)
        fold = nnunet.train(self.short, "3d_fullres", "all")
        assert (fold / "validation" / "summary.json").is_file()
