import json

import pytest

from nnunet_multimodal.errors import UserError
from tests.contracts import TrainerContract
from tests.nnunet import DATASET, PLANS, make_dataset

STATED = {"T1": ["whole"], "T2+PET": ["lesion"]}
SEGMENTORS = [{"modalities": [0], "channels": [0]}, {"modalities": [1, 2], "channels": [1]}]


class TestCIMLTrainer(TrainerContract):
    trainer = "CIMLTrainer"

    def nnunets_loss(self, trainer, stock, output, target):
        """Of each segmentor, summed; without a decomposition each predicts everything."""
        segmentors = range(output.subtasks.logits[0].shape[1])
        assert len(segmentors) == 3
        return sum(stock([logits[:, k] for logits in output.subtasks.logits], target) for k in segmentors)


def state(nnunet, decomposition):
    """Write a decomposition into both copies of dataset.json."""
    for folder in (nnunet.raw, nnunet.preprocessed):
        file = folder / DATASET / "dataset.json"
        if file.exists():
            description = json.loads(file.read_text())
            description["nnunet_multimodal"] = {"decomposition": decomposition}
            file.write_text(json.dumps(description))


def test_a_decomposition_goes_from_dataset_json_through_training_to_prediction(tmp_path):
    nnunet = make_dataset(tmp_path, "regions")
    state(nnunet, STATED)
    trainer = "CIMLSSNModalityDropoutTrainer_1epoch_2iterations"
    nnunet.train(trainer, "3d_lowres")
    model = json.loads((nnunet.model(trainer, "3d_lowres") / "plans.json").read_text())
    options = model["configurations"]["3d_lowres"]["nnunet_multimodal"]
    assert options["ciml"] == {"has_regions": True, "segmentors": SEGMENTORS}
    assert options["modality_dropout"] == {"warm_up": 0}
    assert len(list(nnunet.predict(trainer, "3d_lowres", tmp_path / "out").glob("case_*.nii.gz"))) == 5


def test_our_planner_checks_it_and_writes_it_down(tmp_path):
    nnunet = make_dataset(tmp_path, "regions")

    def plan(planner="nnUNetPlannerCIML"):
        nnunet(
            "nnUNetv2_plan_experiment", "-d", 900, "-pl", planner, "-gpu_memory_target", 0.5,
            "-overwrite_plans_name", "own", nnUNet_n_proc_DA="1",
        )  # fmt: skip
        return nnunet.plans("own")["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]

    assert plan()["backbone_kwargs"] == {"has_regions": True}
    state(nnunet, STATED)
    trainer = nnunet.trainer("CIMLTrainer", plans="own")
    with nnunet.environment(), pytest.raises(UserError, match=r"planned as None .*run nnUNetv2_plan_experiment again"):
        trainer.initialize()
    assert plan("nnUNetPlannerCIMLResEncL")["backbone_kwargs"] == {"has_regions": True, "segmentors": SEGMENTORS}
    state(nnunet, {"T1": ["whole"], "T2": ["lesion"]})
    with pytest.raises(UserError, match="no segmentor has the channel PET"):
        plan()


def test_the_plans_file_wins_over_dataset_json(tmp_path):
    nnunet = make_dataset(tmp_path, "regions")
    state(nnunet, STATED)
    plans = nnunet.plans()
    other = [{"modalities": [0, 1], "channels": [0, 1]}, {"modalities": [2], "channels": [1]}]
    plans["configurations"]["other"] = {
        "inherits_from": "3d_fullres",
        "nnunet_multimodal": {"ciml": {"segmentors": other, "attention": False}},
    }
    nnunet.write_plans(plans)
    trainer = nnunet.trainer("CIMLTrainer", "other", PLANS)
    with nnunet.environment():
        trainer.initialize()
    assert [list(t.modalities) for t in trainer.network.backbone.subtasks] == [[0, 1], [2]]
    assert trainer.network.backbone.has_regions
    assert trainer.network.backbone.segmentors[0].gates[0].attention is None


def test_training_with_a_name_that_does_not_exist_says_which_do(datasets, tmp_path):
    nnunet = make_dataset(tmp_path, "labels", cases=2)
    state(nnunet, {"T1": ["organ"], "T3+PET": ["lesion"]})
    with pytest.raises(UserError, match=r"'T3', of 'T3\+PET', is 0 of the channels; there are: T1, T2, PET"):
        nnunet.train("CIMLTrainer_1epoch_1iterations", "3d_fullres", "all")


def test_a_model_is_not_gone_on_with_under_another_decomposition(tmp_path):
    nnunet = make_dataset(tmp_path, "regions", cases=2)
    state(nnunet, STATED)
    nnunet.train("CIMLTrainer_1epoch_1iterations", "3d_fullres", "all")
    state(nnunet, {"T1": ["lesion"], "T2+PET": ["whole"]})
    with pytest.raises(UserError, match=r"plans.json: the model is trained with 'ciml' .*restore them"):
        nnunet.train("CIMLTrainer_1epoch_1iterations", "3d_fullres", 0)
    state(nnunet, dict(reversed(STATED.items())))  # the order of the keys means nothing
    nnunet.train("CIMLTrainer_1epoch_1iterations", "3d_fullres", "all", "--val")


def test_groups_of_channels_and_a_decomposition_go_together_with_our_plans(tmp_path):
    nnunet = make_dataset(tmp_path, "regions", channels=("T1", "T2", "PET", "CT"), cases=2)
    state(nnunet, {"T1+CT": ["whole"], "T2+PET": ["lesion"]})
    nnunet(
        "nnUNetv2_plan_experiment", "-d", 900, "-pl", "nnUNetPlannerCIML", "-gpu_memory_target", 0.5,
        "-overwrite_plans_name", "own", nnUNet_n_proc_DA="1",
    )  # fmt: skip
    plans = nnunet.plans("own")
    plans["configurations"]["grouped"] = {
        "inherits_from": "3d_fullres",
        "data_identifier": f"{PLANS}_3d_fullres",
        "nnunet_multimodal": {"modalities": [[0, 3], [1, 2]]},
    }
    nnunet.write_plans(plans)
    trainer = nnunet.trainer("CIMLTrainer", "grouped", "own")
    with nnunet.environment():
        trainer.initialize()
    assert [list(t.modalities) for t in trainer.network.backbone.subtasks] == [[0], [1]]
