"""What was cut off is not taken for whole: preprocessed data, a model's plans.json."""

import json
import pickle

import pytest

from nnunet_multimodal import planning
from nnunet_multimodal.errors import UserError
from nnunet_multimodal.planning import check_same_options
from nnunet_multimodal.preprocessing import check_preprocessed

DATASET = "Dataset900_Tiny"


@pytest.fixture
def grown(tmp_path, monkeypatch):
    """Five cases were preprocessed, three came, and preprocessing anew was killed at the sixth."""
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    images, truth, data = (
        tmp_path / name for name in (f"raw/{DATASET}/imagesTr", f"{DATASET}/gt_segmentations", f"{DATASET}/Plans_2d")
    )
    for folder in (images, truth, data):
        folder.mkdir(parents=True)
    for case in range(8):
        for channel in range(2):
            (images / f"case_{case}_{channel:04d}.nii.gz").touch()
    for case in range(5):
        (truth / f"case_{case}.nii.gz").touch()
        preprocess(data, case)
    return data


def preprocess(folder, case):
    for ending in (".b2nd", "_seg.b2nd"):
        (folder / f"case_{case}{ending}").touch()
    (folder / f"case_{case}.pkl").write_bytes(pickle.dumps({}))


def description(count, **more):
    return {"numTraining": count, "file_ending": ".nii.gz", **more}


@pytest.mark.parametrize("stated", [8, 5, 20])
def test_cases_of_the_raw_dataset_must_be_there_whatever_dataset_json_counts(grown, stated):
    with pytest.raises(
        UserError,
        match=r"has 5 whole cases of 8 in .*raw; not whole: case_5, case_6, case_7; run nnUNetv2_preprocess again$",
    ):
        check_preprocessed(grown, description(stated))
    for case in range(5, 8):
        preprocess(grown, case)
    check_preprocessed(grown, description(stated))


def test_without_the_raw_dataset_numtraining_counts(grown, monkeypatch):
    for raw in (str(grown), None):
        monkeypatch.setenv("nnUNet_raw", raw) if raw else monkeypatch.delenv("nnUNet_raw")
        with pytest.raises(
            UserError, match=r"5 whole cases of 8 in dataset.json; .*, or correct numTraining in .*json$"
        ):
            check_preprocessed(grown, description(8))
        check_preprocessed(grown, description(5))


def test_cases_that_dataset_json_lists_must_be_there(grown):
    with pytest.raises(UserError, match="not whole: elsewhere; run"):
        check_preprocessed(grown, description(1, dataset={f"case_{c}": {} for c in range(5)} | {"elsewhere": {}}))
    check_preprocessed(grown, description(9, dataset={f"case_{c}": {} for c in range(5)}))


def test_a_torn_case_is_named(grown, monkeypatch):
    monkeypatch.delenv("nnUNet_raw")
    (grown / "case_5.b2nd").touch()
    (grown / "case_1.pkl").write_bytes(pickle.dumps({"shape": 3})[:-1])
    with pytest.raises(UserError, match=r"4 whole cases of 5 in dataset.json; not whole: case_1, case_5"):
        check_preprocessed(grown, description(5))


@pytest.fixture
def model_plans(tmp_path, monkeypatch):
    """A model's plans.json that is cut off."""
    monkeypatch.setattr(planning, "SECONDS_BETWEEN", 0)
    file = tmp_path / "plans.json"
    file.write_text(plans(rank=3)[:-20])
    return file


def plans(**options):
    return json.dumps({"configurations": {"2d": {"nnunet_multimodal": {"ssn": options}}}})


def test_a_model_plans_file_that_another_fold_writes_is_waited_for(model_plans, monkeypatch):
    monkeypatch.setattr(planning.time, "sleep", lambda _: model_plans.write_text(plans(rank=3)))
    with pytest.raises(UserError, match=r"trained with 'ssn' \{'rank': 3\}"):
        check_same_options(model_plans, "2d", "ssn", {"rank": 4})
    check_same_options(model_plans, "2d", "ssn", {"rank": 3})


def test_a_model_plans_file_that_was_cut_off_is_refused_where_something_is_trained(model_plans):
    check_same_options(model_plans, "2d", "ssn", {"rank": 4})
    (model_plans.parent / "fold_1").mkdir()
    (model_plans.parent / "fold_1" / "checkpoint_best.pth").touch()
    with pytest.raises(UserError, match=r"plans\.json was cut off .*; delete it if"):
        check_same_options(model_plans, "2d", "ssn", {"rank": 4})
    model_plans.unlink()
    check_same_options(model_plans, "2d", "ssn", {"rank": 4})
