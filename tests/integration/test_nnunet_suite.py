"""nnU-Net's own integration test in miniature: five folds of every configuration, the best one, ensemble, inference.

One trainer here; every trainer with every kind of labels by ``python benchmarks/nnunet_suite.py``.
"""

import json

import numpy as np
import pytest

from nnunet_multimodal.lookup import COMBINATIONS
from tests.nnunet import DATASET, LABELS, PLANS, segmentation

CONFIGURATIONS = ("2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres")
FOLDS = range(5)
ALWAYS = ("CRNPSSNModalityDropoutTrainer", "regions_ignore")
SCENARIOS = [
    pytest.param(trainer, kind, marks=[] if (trainer, kind) == ALWAYS else pytest.mark.suite)
    for trainer in ("nnUNetTrainer", *COMBINATIONS)
    for kind in LABELS
]


@pytest.mark.parametrize(("trainer", "kind"), SCENARIOS)
def test_from_five_folds_to_the_postprocessed_ensemble(datasets, tmp_path, trainer, kind):
    nnunet = datasets(kind).with_results(tmp_path / "results")
    name = f"{trainer}_1epochs_1iterations"
    for configuration in CONFIGURATIONS:
        for fold in FOLDS:
            nnunet.train(name, configuration, fold, "--npz")
    nnunet(
        "nnUNetv2_find_best_configuration", 900, "-p", PLANS, "-c", *CONFIGURATIONS, "-tr", name, "-f", *FOLDS,
        "-np", 1,
    )  # fmt: skip
    dataset = nnunet.results / DATASET
    best = json.loads((dataset / "inference_information.json").read_text())["best_model_or_ensemble"]
    predicted = {}

    def predict(configuration):
        if configuration not in predicted:
            more = ("-prev_stage_predictions", predict("3d_lowres")) if "cascade" in configuration else ()
            more += ("-f", *FOLDS, "--save_probabilities", "--disable_tta")
            predicted[configuration] = nnunet.predict(name, configuration, tmp_path / configuration, *more)
        return predicted[configuration]

    members = [predict(member["configuration"]) for member in best["selected_model_or_models"]]
    final = members[0]
    if len(members) > 1:
        final = tmp_path / "ensemble"
        nnunet("nnUNetv2_ensemble", "-i", *members, "-o", final, "-np", 1)
    nnunet(
        "nnUNetv2_apply_postprocessing", "-i", final, "-o", tmp_path / "final", "-pp_pkl_file",
        best["postprocessing_file"], "-plans_json", best["some_plans_file"], "-dataset_json",
        dataset / f"{name}__{PLANS}__2d" / "dataset.json", "-np", 1,
    )  # fmt: skip
    for configuration in CONFIGURATIONS:
        predict(configuration)
    for folder in (*predicted.values(), tmp_path / "final"):
        for case in FOLDS:
            labels = segmentation(folder / f"case_{case}.nii.gz")
            assert labels.shape == (18, 20, 22)
            assert set(np.unique(labels)) <= {0, 1, 2}


@pytest.mark.parametrize("trainer", COMBINATIONS)
def test_every_combination_predicts_the_same_from_a_zip(datasets, tmp_path, trainer):
    nnunet = datasets("labels").with_results(tmp_path / "results")
    images = tmp_path / "images"
    images.mkdir()
    for file in (nnunet.raw / DATASET / "imagesTr").glob("case_0_*"):
        (images / file.name).symlink_to(file)
    name = f"{trainer}_1epochs_1iterations"
    nnunet.train(name, "2d")
    here = nnunet.predict(name, "2d", tmp_path / "here", "--disable_tta", images=images)
    model = ("-d", 900, "-c", "2d", "-tr", name, "-p", PLANS, "-f", 0)
    nnunet("nnUNetv2_export_model_to_zip", *model, "-o", tmp_path / "model.zip")
    elsewhere = nnunet.with_results(tmp_path / "elsewhere")
    elsewhere("nnUNetv2_install_pretrained_model_from_zip", tmp_path / "model.zip")
    there = elsewhere.predict(name, "2d", tmp_path / "there", "--disable_tta", images=images)
    assert np.array_equal(*(segmentation(folder / "case_0.nii.gz") for folder in (here, there)))
