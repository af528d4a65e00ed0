import math

import pytest

from nnunet_multimodal.lookup import COMBINATIONS
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


@pytest.mark.parametrize(
    ("method", "encoder"),
    [("ShaSpec", ""), ("ShaSpec", "ResEncM"), ("ShaSpecMoSE", "ResEncL"), ("SSN", ""), ("CRNPSSN", "ResEncXL")],
)
def test_planners_are_found_by_name_and_write_their_method_and_preprocessor(datasets, method, encoder):
    configuration = plan(datasets("labels"), f"nnUNetPlanner{method}{encoder}")
    arch_kwargs = configuration["architecture"]["arch_kwargs"]
    assert COMBINATIONS[f"{method}Trainer"] == (arch_kwargs["backbone"], arch_kwargs["head"], False)
    assert ("n_blocks_per_stage" in arch_kwargs) == bool(encoder)
    assert configuration["preprocessor_name"] == "MultimodalPreprocessor"
