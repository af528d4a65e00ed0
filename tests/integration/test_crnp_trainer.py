import json

import numpy as np
import pytest

from tests.contracts import TrainerContract
from tests.nnunet import DATASET, PLANS, make_dataset, segmentation


class TestCRNPTrainer(TrainerContract):
    trainer = "CRNPTrainer"

    def test_uncertainty_command_names_what_is_missing(self, datasets, tmp_path):
        from nnunet_multimodal import cli

        model = ["-d", "900", "-tr", "CRNPTrainer_99epochs", "-p", PLANS, "-c", "2d", "-device", "cpu"]
        with datasets("labels").environment(), pytest.raises(ValueError, match=r"no fold_.*CRNPTrainer_99epochs"):
            cli.main(["uncertainty", "-i", str(tmp_path), "-o", str(tmp_path), *model])

    def test_one_modality_is_refused_at_the_start(self, tmp_path):
        nnunet = make_dataset(tmp_path, "labels", channels=("T1",), cases=2)
        with pytest.raises(ValueError, match=rf"{DATASET} has 1 modality \(T1\).*-tr nnUNetTrainer"):
            nnunet.train(self.short)
        with pytest.raises(ValueError, match="plan it with nnU-Net's own planner"):
            nnunet("nnUNetv2_plan_experiment", "-d", 900, "-pl", "nnUNetPlannerCRNP", nnUNet_n_proc_DA="1")

    def test_options_come_from_the_plans_and_travel_with_the_model(self, datasets, tmp_path):
        nnunet = datasets("labels")
        plans = nnunet.plans()
        plans["configurations"]["concat"] = {
            "inherits_from": "3d_fullres",
            "nnunet_multimodal": {
                "modalities": [[2], [0], [1]],
                "crnp": {"fusion": "concat", "attention": "cross"},
            },
        }
        plans["plans_name"] = "optionsPlans"
        nnunet.write_plans(plans)
        trainer = nnunet.trainer(self.short, "concat", "optionsPlans")
        with nnunet.environment():
            trainer.run_training()
            assert trainer.network.backbone.fusion.fusion == "concat"
            assert trainer.network.groups == ((2,), (0,), (1,))
        model = nnunet.results / DATASET / f"{self.short}__optionsPlans__concat"
        saved = json.loads((model / "plans.json").read_text())
        assert saved["configurations"]["concat"]["nnunet_multimodal"]["crnp"]["fusion"] == "concat"

    def test_unknown_options_are_refused_with_the_known_ones(self, datasets):
        nnunet = datasets("labels")
        for options, message in (
            (
                {"crnpp": {}},
                "'crnpp'.*there are: modalities, dedicated, modality_dropout, raters, early, crnp, shaspec",
            ),
            ({"crnp": {"fussion": "concat"}}, "fussion"),
            ({"modalities": [[0], [1]]}, "must name each of the 3 image channels"),
            ({"modalities": [[0, 1], [2]]}, "equal size"),
        ):
            plans = nnunet.plans()
            plans["configurations"]["3d_fullres"]["nnunet_multimodal"] = options
            plans["plans_name"] = "wrongPlans"
            nnunet.write_plans(plans)
            trainer = nnunet.trainer(self.short, "3d_fullres", "wrongPlans")
            with pytest.raises(ValueError, match=message), nnunet.environment():
                trainer.initialize()

    @pytest.mark.parametrize(
        "planner",
        [
            "nnUNetPlannerCRNP",
            *(f"nnUNetPlanner{ours}ResEnc{size}" for ours in ("CRNP", "") for size in ("M", "L", "XL")),
        ],
    )
    def test_plans_of_our_and_stock_planners_train(self, datasets, planner):
        nnunet = datasets("labels")
        name = f"{planner}Plans"
        nnunet(
            "nnUNetv2_plan_experiment", "-d", 900, "-pl", planner, "-gpu_memory_target", 0.01,
            "-overwrite_plans_name", name, nnUNet_n_proc_DA="1",
        )  # fmt: skip
        plans = nnunet.plans(name)
        architecture = plans["configurations"]["3d_fullres"]["architecture"]
        ours = architecture["network_class_name"] == "nnunet_multimodal.network.MultimodalUNet"
        assert ours == ("CRNP" in planner)
        assert architecture["arch_kwargs"].get("backbone") == ("crnp" if ours else None)
        assert ("n_blocks_per_stage" in architecture["arch_kwargs"]) == ("ResEnc" in planner)
        for configuration in ("2d", "3d_fullres"):  # the preprocessed data of the tiny plans has the same grid
            changed = plans["configurations"][configuration]
            changed.update(data_identifier=f"{PLANS}_{configuration}", batch_size=2)
            kwargs = changed["architecture"]["arch_kwargs"]
            kwargs["features_per_stage"] = [4 for _ in kwargs["features_per_stage"]]
        nnunet.write_plans(plans)
        for configuration in ("2d", "3d_fullres"):
            trainer = nnunet.trainer(self.short, configuration, name)
            with nnunet.environment():
                trainer.run_training()
            assert trainer.network.num_modalities == 3
            assert np.isfinite(trainer.logger.get_value("train_losses", step=None)).all()

    def test_crnp_plans_are_smaller_than_stock_for_the_same_memory(self, datasets):
        nnunet = datasets("labels")
        sizes = {}
        for planner in ("ExperimentPlanner", "nnUNetPlannerCRNP"):
            nnunet(
                "nnUNetv2_plan_experiment", "-d", 900, "-pl", planner, "-gpu_memory_target", 0.05,
                "-overwrite_plans_name", f"{planner}Size", nnUNet_n_proc_DA="1",
            )  # fmt: skip
            configuration = nnunet.plans(f"{planner}Size")["configurations"]["3d_fullres"]
            patch = configuration["patch_size"]
            sizes[planner] = configuration["batch_size"] * patch[0] * patch[1] * patch[2]
        assert sizes["nnUNetPlannerCRNP"] < sizes["ExperimentPlanner"]

    @pytest.mark.parametrize(("configuration", "fold"), [("3d_fullres", 0), ("2d", "all")])
    def test_uncertainty_command_writes_maps_on_the_images_grid(self, datasets, tmp_path, configuration, fold):
        from nnunet_multimodal import cli

        nnunet = datasets("labels").with_results(tmp_path / "results")
        nnunet.train(self.short, configuration, fold)
        model = ["-d", "900", "-tr", self.short, "-p", PLANS, "-c", configuration, "-device", "cpu"]
        images = nnunet.raw / DATASET / "imagesTr"
        with nnunet.environment():
            assert cli.main(["uncertainty", "-i", str(images), "-o", str(tmp_path), *model]) == 0
        scores = json.loads((tmp_path / "uncertainty.json").read_text())
        assert list(scores["case_0"]) == ["T1", "T2", "PET"]
        for channel, score in enumerate(scores["case_0"].values()):
            uncertainty = segmentation(tmp_path / f"case_0_{channel:04d}.nii.gz")
            assert uncertainty.shape == (18, 20, 22)
            assert uncertainty.min() >= 0
            assert uncertainty.mean() == pytest.approx(score, rel=1e-4)
            assert score > 0
