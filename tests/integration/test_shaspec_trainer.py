import math

import pytest

from tests.contracts import TrainerContract


class TestShaSpecModalityDropoutTrainer(TrainerContract):
    trainer = "ShaSpecModalityDropoutTrainer"


def plan(nnunet, planner):
    nnunet(
        "nnUNetv2_plan_experiment", "-d", 900, "-pl", planner, "-gpu_memory_target", 0.05,
        "-overwrite_plans_name", f"{planner}Size", nnUNet_n_proc_DA="1",
    )  # fmt: skip
    return nnunet.plans(f"{planner}Size")["configurations"]["3d_fullres"]


def test_plans_count_every_encoder(datasets):
    nnunet = datasets("labels")
    voxels = {}
    for planner in ("ExperimentPlanner", "nnUNetPlannerCRNP", "nnUNetPlannerShaSpec"):
        configuration = plan(nnunet, planner)
        voxels[planner] = configuration["batch_size"] * math.prod(configuration["patch_size"])
    assert voxels["nnUNetPlannerShaSpec"] < voxels["nnUNetPlannerCRNP"] < voxels["ExperimentPlanner"]


@pytest.mark.parametrize("encoder", ["", "ResEncM", "ResEncL", "ResEncXL"])
def test_planners_are_found_by_name_and_write_their_method_and_preprocessor(datasets, encoder):
    configuration = plan(datasets("labels"), f"nnUNetPlannerShaSpec{encoder}")
    assert configuration["architecture"]["arch_kwargs"]["backbone"] == "shaspec"
    assert ("n_blocks_per_stage" in configuration["architecture"]["arch_kwargs"]) == bool(encoder)
    assert configuration["preprocessor_name"] == "MultimodalPreprocessor"
