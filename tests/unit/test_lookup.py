"""nnU-Net's own search finds our classes, in any training length, and its own as before."""

import multiprocessing
import os
import pickle
from pathlib import Path

import nnunetv2
import pytest
import torch
from nnunetv2.experiment_planning import plan_and_preprocess_api
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities import find_class_by_name, find_objects
from nnunetv2.utilities.plans_handling import plans_handler
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_multimodal import lookup

NNUNET = Path(nnunetv2.__path__[0])
OUR_TRAINERS = sorted(lookup.CLASSES[lookup.TRAINERS])
OUR_PLANNERS = sorted(name for name in lookup.CLASSES[lookup.PLANNING] if name.startswith("nnUNetPlanner"))


def find_planner(name):
    return find_class_by_name.recursive_find_python_class(
        str(NNUNET / "experiment_planning"), name, current_module=lookup.PLANNING
    )


def find_trainer(name):
    return find_objects.recursive_find_trainer_class_by_name(name)


def construct(trainer, monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    architecture = {"network_class_name": "", "arch_kwargs": {}, "_kw_requires_import": []}
    configuration = {
        "data_identifier": "data_2d",
        "normalization_schemes": ["ZScoreNormalization"] * 2,
        "architecture": architecture,
    }
    plans = {
        "dataset_name": "Dataset001_Test",
        "plans_name": "nnUNetPlans",
        "configurations": {"2d": configuration},
        "continue_training": False,
    }
    dataset = {"labels": {"background": 0, "organ": 1}, "channel_names": {"0": "CT", "1": "PET"}, "file_ending": ".nii"}
    return trainer(plans, "2d", 0, dataset, torch.device("cpu"))


@pytest.mark.parametrize("name", OUR_TRAINERS)
def test_stock_search_finds_our_trainers(name):
    found = find_trainer(name)
    assert found.__name__ == name
    assert found.__module__ == lookup.CLASSES[lookup.TRAINERS][name]
    assert issubclass(found, nnUNetTrainer)


@pytest.mark.parametrize("name", OUR_PLANNERS)
def test_stock_search_finds_our_planners(name):
    found = find_planner(name)
    assert found.__name__ == name
    assert found.__module__ == lookup.CLASSES[lookup.PLANNING][name]
    assert issubclass(found, ExperimentPlanner)


def test_every_caller_in_nnunet_holds_the_wrapped_search():
    for module in (find_class_by_name, find_objects, plan_and_preprocess_api, plans_handler):
        assert hasattr(module.recursive_find_python_class, "__wrapped__"), module.__name__


@pytest.mark.parametrize("name", OUR_PLANNERS)
def test_plan_experiment_uses_our_planner(name, monkeypatch):
    used = []
    monkeypatch.setattr(
        plan_and_preprocess_api, "plan_experiment_dataset", lambda dataset, planner, *rest: (used.append(planner), None)
    )
    plan_and_preprocess_api.plan_experiments([1], name)
    assert [planner.__name__ for planner in used] == [name]


def test_plans_file_finds_the_planner_that_wrote_it():
    plans = PlansManager({"experiment_planner_used": "nnUNetPlannerCPU", "configurations": {}})
    assert plans.experiment_planner_class is find_planner("nnUNetPlannerCPU")


def test_stock_classes_are_found_unchanged():
    assert find_trainer("nnUNetTrainer") is nnUNetTrainer
    assert find_planner("ExperimentPlanner") is ExperimentPlanner


def test_planner_is_not_found_as_a_trainer_nor_the_reverse():
    assert find_planner("CRNPTrainer") is None
    calls = []
    assert lookup.find_class("nnUNetPlannerCPU", lookup.TRAINERS, calls.append) is None
    assert calls == ["nnUNetPlannerCPU"]  # nnU-Net was asked, and only nnU-Net


@pytest.mark.parametrize("package", [None, "nnunetv2.preprocessing", "dynamic_network_architectures.architectures"])
def test_searches_elsewhere_are_left_to_nnunet(package):
    marker = type("Marker", (), {})
    for name in ("CRNPTrainer", "nnUNetPlannerCPU", "nnUNetTrainer_5epochs_7iterations"):
        assert lookup.find_class(name, package, {name: marker}.get) is marker


@pytest.mark.parametrize("name", ["NoSuchTrainer", "CRNPTrainerX", "CRNPTrainer_fiveepochs", "_5epochs"])
def test_unknown_trainer_gives_nnunets_own_error(name, monkeypatch):
    """Whatever stock nnU-Net says (its search fails differently where torchvision does not import), it says with us."""
    with pytest.raises((RuntimeError, ImportError)) as with_us:
        find_trainer(name)
    stock = find_objects.recursive_find_python_class.__wrapped__
    monkeypatch.setattr(find_objects, "recursive_find_python_class", stock)
    with pytest.raises(with_us.type) as without_us:
        find_trainer(name)
    assert str(with_us.value) == str(without_us.value)


def test_unknown_planner_is_none_as_in_nnunet():
    assert find_planner("NoSuchPlanner") is None


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("CRNPTrainer", ("CRNPTrainer", None, None)),
        ("CRNPTrainer_5epochs", ("CRNPTrainer", 5, None)),
        ("CRNPTrainer_1epoch", ("CRNPTrainer", 1, None)),
        ("CRNPTrainer_250epochs", ("CRNPTrainer", 250, None)),
        ("CRNPTrainer_12epochs_100iterations", ("CRNPTrainer", 12, 100)),
        ("CRNPTrainer_1iteration", ("CRNPTrainer", None, 1)),
        ("nnUNetTrainer_5epochs_NoMirroring", ("nnUNetTrainer_5epochs_NoMirroring", None, None)),
        ("nnUNetTrainerBenchmark_5epochs", ("nnUNetTrainerBenchmark", 5, None)),
    ],
)
def test_length_suffix_is_read(name, parts):
    assert lookup.split_length(name) == parts


@pytest.mark.parametrize(
    ("suffix", "epochs", "iterations", "validation"),
    [
        ("", 1000, 250, 50),
        ("_5epochs", 5, 250, 50),
        ("_1epoch", 1, 250, 50),
        ("_250epochs", 250, 250, 50),
        ("_12epochs_100iterations", 12, 100, 20),
        ("_3iterations", 1000, 3, 1),
    ],
)
@pytest.mark.parametrize("base", ["CRNPTrainer", "EarlyFusionTrainer"])
def test_trainer_has_the_length_of_its_suffix(base, suffix, epochs, iterations, validation, monkeypatch, tmp_path):
    trainer = construct(find_trainer(base + suffix), monkeypatch, tmp_path)
    assert trainer.num_epochs == epochs
    assert trainer.num_iterations_per_epoch == iterations
    assert trainer.num_val_iterations_per_epoch == validation
    assert type(trainer).__name__ == base + suffix
    assert Path(trainer.output_folder_base).name == f"{base}{suffix}__nnUNetPlans__2d"  # lengths keep their own folders
    assert set(trainer.my_init_kwargs) == {"plans", "configuration", "fold", "dataset_json", "device"}


def test_stock_trainer_takes_iterations_too(monkeypatch, tmp_path):
    found = find_trainer("nnUNetTrainer_12epochs_100iterations")
    assert found.__mro__[1] is nnUNetTrainer
    trainer = construct(found, monkeypatch, tmp_path)
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch) == (12, 100)
    assert trainer.num_val_iterations_per_epoch == 20


def test_stock_lengths_are_left_to_nnunet():
    asked = []
    lookup.find_class("nnUNetTrainer_5epochs", lookup.TRAINERS, asked.append)
    assert asked == ["nnUNetTrainer_5epochs"]


@pytest.mark.parametrize("name", ["CRNPTrainer_0epochs", "CRNPTrainer_5epochs_0iterations", "CRNPTrainer_00epochs"])
def test_length_of_zero_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}.*length 0.*CRNPTrainer_5epochs"):
        find_trainer(name)


@pytest.mark.parametrize("name", ["CRNPTrainer", "CRNPTrainer_5epochs", "EarlyFusionTrainer_12epochs_100iterations"])
def test_class_is_one_object_and_survives_pickling(name):
    found = find_trainer(name)
    assert find_trainer(name) is found
    assert pickle.loads(pickle.dumps(found)) is found


def in_worker():
    names = ("CRNPTrainer_5epochs", "nnUNetPlannerCPU")
    return os.getpid(), find_trainer(names[0]), find_planner(names[1])


def test_spawned_worker_finds_the_same_classes():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pid, trainer, planner = pool.apply(in_worker)
    assert pid != os.getpid()
    assert trainer is find_trainer("CRNPTrainer_5epochs")
    assert planner is find_planner("nnUNetPlannerCPU")


@pytest.mark.parametrize(
    ("package", "folder", "name"),
    [
        (lookup.PLANNING, "experiment_planning", "MultimodalFingerprintExtractor"),
        (lookup.PREPROCESSING, "preprocessing", "MultimodalPreprocessor"),
    ],
)
def test_stock_search_finds_the_preprocessing_of_absent_modalities(package, folder, name):
    found = find_class_by_name.recursive_find_python_class(str(NNUNET / folder), name, package)
    assert (found.__name__, found.__module__) == (name, "nnunet_multimodal.preprocessing")
