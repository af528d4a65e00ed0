"""Plans of equal patch and batch size from those of several methods."""

import copy
import json
import math

import pytest

from nnunet_multimodal.cli import main
from nnunet_multimodal.errors import UserError
from tests.nnunet import DATASET, PLANS


@pytest.fixture(scope="module")
def nnunet(datasets):
    """Plans of nnU-Net and of two of our planners, the latter for less memory."""
    nnunet = datasets("labels")
    for planner, memory in (
        ("nnUNetPlannerCRNP", 0.02),
        ("nnUNetPlannerSSN", 0.008),
        ("nnUNetPlannerCRNPResEncM", 0.02),
    ):
        nnunet(
            "nnUNetv2_plan_experiment", "-d", 900, "-pl", planner, "-gpu_memory_target", memory,
            nnUNet_n_proc_DA="1",
        )  # fmt: skip
    return nnunet


def derive(nnunet, *plans, out="nnUNetEqualPlans", more=()):
    with nnunet.environment():
        return main(["derive", "-d", "900", "-p", *plans, "-o", out, *more])


def test_our_planners_share_preprocessed_data(nnunet):
    for configuration in ("2d", "3d_fullres"):
        plans = [nnunet.plans(f"nnUNet{name}Plans") for name in ("CRNP", "SSN", "CRNPResEncM")]
        found = {own["configurations"][configuration]["data_identifier"] for own in plans}
        assert found == {f"nnUNetMultimodalPlans_{configuration}"}
    nnunet(
        "nnUNetv2_plan_experiment", "-d", 900, "-pl", "nnUNetPlannerCRNP", "-overwrite_target_spacing", 3, 3, 3,
        "-overwrite_plans_name", "coarse", nnUNet_n_proc_DA="1",
    )  # fmt: skip
    assert nnunet.plans("coarse")["configurations"]["3d_fullres"]["data_identifier"] == "coarse_3d_fullres"


def test_the_smallest_patch_and_batch_train_with_every_trainer(nnunet, capsys):
    given = ("nnUNetCRNPPlans", "nnUNetSSNPlans")
    assert derive(nnunet, *given, more=("--overwrite",)) == 0
    said = capsys.readouterr().out
    assert "not preprocessed yet: nnUNetMultimodalPlans_2d, nnUNetMultimodalPlans_3d_fullres" in said
    plans = nnunet.plans("nnUNetEqualPlans")
    for name, configuration in plans["configurations"].items():
        own = [nnunet.plans(identifier)["configurations"][name] for identifier in given]
        volumes = [math.prod(c["patch_size"]) for c in own]
        assert math.prod(configuration["patch_size"]) == min(volumes)
        assert configuration["batch_size"] == min(c["batch_size"] for c in own)
        assert configuration["architecture"]["network_class_name"].endswith(".PlainConvUNet")
        fitting = own[volumes.index(min(volumes))]["architecture"]["arch_kwargs"]
        assert configuration["architecture"]["arch_kwargs"]["strides"] == fitting["strides"]
    nnunet("nnUNetv2_preprocess", "-d", 900, "-plans_name", "nnUNetEqualPlans", "-c", "2d", "-np", 1)
    assert derive(nnunet, *given, more=("--overwrite",)) == 0
    assert "not preprocessed yet: nnUNetMultimodalPlans_3d_fullres;" in capsys.readouterr().out
    for trainer in ("nnUNetTrainer", "CRNPTrainer", "MoSETrainer"):
        name = f"{trainer}_1epochs_1iterations"
        nnunet("nnUNetv2_train", 900, "2d", 0, "-tr", name, "-p", "nnUNetEqualPlans", "-device", "cpu")
        model = nnunet.results / DATASET / f"{name}__nnUNetEqualPlans__2d"
        assert (model / "fold_0" / "validation" / "summary.json").is_file()


def test_cascades_stay_whole_and_other_spacings_are_left_out(nnunet, capsys):
    plans = copy.deepcopy(nnunet.plans())
    plans["plans_name"] = "other"
    plans["configurations"]["3d_fullres"]["batch_size"] = 1
    nnunet.write_plans(plans)
    assert derive(nnunet, PLANS, "other", out="whole") == 0
    whole = nnunet.plans("whole")["configurations"]
    assert {"2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres"} <= set(whole)
    assert whole["3d_cascade_fullres"]["batch_size"] == whole["3d_fullres"]["batch_size"] == 1
    plans["configurations"]["3d_lowres"]["spacing"] = [9, 9, 9]
    nnunet.write_plans(plans)
    capsys.readouterr()
    assert derive(nnunet, PLANS, "other", out="part") == 0
    assert "left out, as not in all of the plans or at different spacings: 3d_cascade_fullres, 3d_lowres" in (
        capsys.readouterr().out
    )
    part = nnunet.plans("part")["configurations"]
    assert "3d_lowres" not in part
    assert not part["3d_fullres"].get("next_stage")


def test_options_of_methods_come_along(nnunet):
    plans = copy.deepcopy(nnunet.plans())
    for name, options in (("first", {"ssn": {"rank": 3}}), ("second", {"crnp": {}}), ("third", {"ssn": {"rank": 4}})):
        plans["plans_name"] = name
        plans["configurations"]["2d"]["nnunet_multimodal"] = options
        nnunet.write_plans(plans)
    assert derive(nnunet, "first", "second", out="options") == 0
    own = nnunet.plans("options")["configurations"]["2d"]["nnunet_multimodal"]
    assert own == {"ssn": {"rank": 3}, "crnp": {}}
    with pytest.raises(UserError, match="third has other options of 'ssn'"):
        derive(nnunet, "first", "third", out="options", more=("--overwrite",))


@pytest.mark.parametrize(
    "changed",
    [
        {"foreground_intensity_properties_per_channel": {"0": {"mean": 1.0}}},
        {"transpose_forward": [1, 0, 2], "transpose_backward": [1, 0, 2]},
    ],
)
def test_plans_of_a_dataset_that_changed_in_between_are_refused(nnunet, changed):
    nnunet.write_plans({**nnunet.plans(), "plans_name": "later", **changed})
    with pytest.raises(UserError, match=f"{PLANS} and later differ in {', '.join(changed)}, .*plan all of them anew"):
        derive(nnunet, PLANS, "later", out="changed")
    assert not (nnunet.preprocessed / DATASET / "changed.json").exists()


def test_what_cannot_be_compared_is_refused(nnunet):
    folder = nnunet.preprocessed / DATASET
    with pytest.raises(UserError, match="is one plan"):
        derive(nnunet, PLANS, PLANS)
    with pytest.raises(UserError, match=r"missing\.json is not there; .* There are: .*nnUNetTinyPlans"):
        derive(nnunet, PLANS, "missing")
    with pytest.raises(UserError, match="give another name"):
        derive(nnunet, PLANS, "nnUNetSSNPlans", out=PLANS)
    before = (folder / "nnUNetSSNPlans.json").read_text()
    with pytest.raises(UserError, match="--overwrite"):
        derive(nnunet, PLANS, "nnUNetCRNPPlans", out="nnUNetSSNPlans")
    assert (folder / "nnUNetSSNPlans.json").read_text() == before
    with pytest.raises(UserError, match="plain and residual"):
        derive(nnunet, "nnUNetCRNPPlans", "nnUNetCRNPResEncMPlans", out="mixed")
    (folder / "torn.json").write_text(json.dumps(nnunet.plans())[:100])
    with pytest.raises(UserError, match=r"torn\.json is not JSON"):
        derive(nnunet, PLANS, "torn", out="mixed")
    assert not (folder / "mixed.json").exists()
