"""Bad input on the roads that users take: a clear message, or, where it is odd but fine, finite weights and maps."""

import json
import re
import shutil
from multiprocessing.pool import ThreadPool
from unittest import mock

import numpy as np
import pytest
import SimpleITK
import torch

from nnunet_multimodal import cli
from nnunet_multimodal.errors import UserError
from tests.nnunet import DATASET, PLANS, NnUNet, segmentation, write_raw

TRAINER = "CRNPTrainer_1epoch_2iterations"
KINDS = ("ordinary", "constant images", "empty labels", "one voxel", "smaller than the patch")  # a case, a fold each


def change(file, array):
    """Another array in an image file."""
    old = SimpleITK.ReadImage(str(file))
    new = SimpleITK.GetImageFromArray(array)
    new.SetSpacing(old.GetSpacing())
    SimpleITK.WriteImage(new, str(file))


def put(file, value):
    """A value into three voxels."""
    array = segmentation(file)
    array[2, 2, :3] = value
    change(file, array)


def set_spacing(file):
    image = SimpleITK.ReadImage(str(file))
    image.SetSpacing((1.0, 1.1, 2.0))
    SimpleITK.WriteImage(image, str(file))


def plan_and_preprocess(nnunet, *more):
    command = ("nnUNetv2_plan_and_preprocess", "-d", 900, "-npfp", 1, "--verify_dataset_integrity", "--clean")
    ours = ("-fpe", "MultimodalFingerprintExtractor", "-preprocessor_name", "MultimodalPreprocessor")
    # in this process, where its messages can be read
    verify = "nnunetv2.experiment_planning.verify_dataset_integrity.multiprocessing"
    with mock.patch(verify, **{"get_context.return_value.Pool": ThreadPool}):
        nnunet(*command, *ours, "-pl", "nnUNetPlannerTiny", "-gpu_memory_target", 0.005, *more, nnUNet_n_proc_DA="1")


# --- odd and yet fine


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A case of each of KINDS, and a fold that trains and validates on nothing else."""
    nnunet = NnUNet(tmp_path_factory.mktemp("odd"))
    write_raw(nnunet, "labels", cases=len(KINDS))
    raw = nnunet.raw / DATASET
    for channel, value in ((1, 7), (2, 0)):
        image = raw / "imagesTr" / f"case_1_{channel:04d}.nii.gz"
        change(image, np.full_like(segmentation(image), value))
    nothing = np.zeros_like(segmentation(raw / "labelsTr" / "case_2.nii.gz"))
    change(raw / "labelsTr" / "case_2.nii.gz", nothing)
    voxel = nothing.copy()
    voxel[9, 10, 11] = 2
    change(raw / "labelsTr" / "case_3.nii.gz", voxel)
    for file in [*raw.glob("imagesTr/case_4_*"), raw / "labelsTr" / "case_4.nii.gz"]:
        change(file, segmentation(file)[5:11, 5:12, 5:13])
    plan_and_preprocess(nnunet, "-c", "2d", "3d_fullres", "-np", 1)
    plans = nnunet.plans()
    for configuration in ("2d", "3d_fullres"):
        plans["configurations"][configuration]["batch_size"] = 2
        assert min(plans["configurations"][configuration]["patch_size"]) > 8
    nnunet.write_plans(plans)
    cases = [[f"case_{fold}"] for fold in range(len(KINDS))]
    folds = [{"train": case, "val": case} for case in cases]
    (nnunet.preprocessed / DATASET / "splits_final.json").write_text(json.dumps(folds))
    return nnunet


def images_of(nnunet, case, folder):
    """A folder with one case's images."""
    folder.mkdir()
    for file in (nnunet.raw / DATASET / "imagesTr").glob(f"case_{case}_*"):
        shutil.copy(file, folder)
    return folder


def predict(nnunet, images, output, *more, trainer=TRAINER, configuration="2d", fold=0):
    model = ["-d", "900", "-tr", trainer, "-p", PLANS, "-c", configuration, "-f", str(fold), "-device", "cpu"]
    with nnunet.environment():
        assert cli.main(["predict", "-i", str(images), "-o", str(output), *model, "--maps", *map(str, more)]) == 0
    return output


@pytest.mark.parametrize(
    ("trainer", "configuration"),
    [(TRAINER, "2d"), ("ShaSpecSSNModalityDropoutTrainer_1epoch_2iterations", "3d_fullres")],
)
@pytest.mark.parametrize("fold", range(1, len(KINDS)), ids=KINDS[1:])
def test_odd_cases_train_validate_predict_and_are_evaluated(odd, tmp_path, fold, trainer, configuration):
    folder = odd.train(trainer, configuration, fold)
    weights = torch.load(folder / "checkpoint_final.pth", weights_only=False)["network_weights"]
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    (log,) = folder.glob("training_log_*.txt")
    assert "Step skipped" not in log.read_text()
    assert (folder / "validation" / "summary.json").is_file()
    images = images_of(odd, fold, tmp_path / "images")
    model = {"trainer": trainer, "configuration": configuration, "fold": fold}
    output = predict(odd, images, tmp_path / "out", "--samples", 2, "--save_probabilities", **model)
    assert np.isfinite(np.load(output / f"case_{fold}.npz")["probabilities"]).all()
    labels = odd.raw / DATASET / "labelsTr"
    assert segmentation(output / f"case_{fold}.nii.gz").shape == segmentation(labels / f"case_{fold}.nii.gz").shape
    assert cli.main(["evaluate", str(labels), str(output), "-np", "1", "--chill"]) == 0
    (case,) = json.loads((output / "evaluation.json").read_text())["metric_per_case"]
    assert case["metrics"]["2"]["n_ref"] == (segmentation(labels / f"case_{fold}.nii.gz") == 2).sum()


# --- raw data


def missing_channel(raw):
    (raw / "imagesTr" / "case_0_0001.nrrd").unlink()


def extra_channel(raw):
    shutil.copy(raw / "imagesTr" / "case_0_0002.nrrd", raw / "imagesTr" / "case_0_0003.nrrd")


def image_of_another_shape(raw):
    change(raw / "imagesTr" / "case_0_0001.nrrd", np.zeros((18, 20, 21), np.float32))


def image_of_another_spacing(raw):
    set_spacing(raw / "imagesTr" / "case_0_0001.nrrd")


def label_map_of_another_shape(raw):
    change(raw / "labelsTr" / "case_0.nrrd", np.zeros((18, 20, 21), np.uint8))


def label_map_of_another_spacing(raw):
    set_spacing(raw / "labelsTr" / "case_0.nrrd")


def nan_voxels(raw):
    put(raw / "imagesTr" / "case_0_0001.nrrd", np.nan)


def label_that_is_not_declared(raw):
    put(raw / "labelsTr" / "case_0.nrrd", 7)


def corrupt_image(raw):
    (raw / "imagesTr" / "case_0_0001.nrrd").write_bytes(b"nothing")


def truncated_image(raw):
    file = raw / "imagesTr" / "case_0_0001.nrrd"
    file.write_bytes(file.read_bytes()[:9000])


def corrupt_label_map(raw):
    (raw / "labelsTr" / "case_0.nrrd").write_bytes(b"nothing")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (missing_channel, r"number of modalities. \nExpected: 3. \nGot: 2. \nImages: .*case_0_0002.nrrd"),
        (extra_channel, r"number of modalities. \nExpected: 3. \nGot: 4. \nImages: .*case_0_0003.nrrd"),
        (image_of_another_shape, r"images have the same shape!\nShapes:\n.* 20, 21\).*\nImage files:\n.*_0001.nrrd"),
        (
            image_of_another_spacing,
            r"images have the same spacing!\nSpacings:\n.* 2\.0\).*\nImage files:\n.*_0001.nrrd",
        ),
        (label_map_of_another_shape, r"Shape seg: \(18, 20, 21\). \nImage files: .*\nSeg file: .*case_0.nrrd"),
        (label_map_of_another_spacing, r"Spacing seg: \[.*2\.0.*\]. \nImage files: .*\nSeg file: .*case_0.nrrd"),
        (nan_voxels, r"NaN .* fix that by replacing NaN values .*\nImages:\n.*case_0_0001.nrrd"),
        (label_that_is_not_declared, r"labels found in file .*case_0.nrrd.\nExpected: .*1.*2.*\nFound: .* 7"),
        (corrupt_image, r"Unable to determine ImageIO reader for .*case_0_0001.nrrd"),
        (truncated_image, r"Error reading .*case_0_0001.nrrd"),
        (corrupt_label_map, r"Unable to determine ImageIO reader for .*case_0.nrrd"),
    ],
)
def test_nnunet_refuses_wrong_raw_data_when_it_is_asked_to_verify(tmp_path, capsys, spoil, message):
    nnunet = NnUNet(tmp_path)
    write_raw(nnunet, "labels", cases=1)
    raw = nnunet.raw / DATASET
    description = raw / "dataset.json"
    description.write_text(description.read_text().replace(".nii.gz", ".nrrd"))
    for file in raw.rglob("*.nii.gz"):
        SimpleITK.WriteImage(SimpleITK.ReadImage(str(file)), str(file).replace(".nii.gz", ".nrrd"))
        file.unlink()
    spoil(raw)
    with pytest.raises(RuntimeError) as error:
        plan_and_preprocess(nnunet, "--no_pp")
    assert re.search(message, f"{capsys.readouterr().out}{error.value}")
    assert not list(nnunet.preprocessed.rglob("*.json"))


# --- prediction


@pytest.fixture(scope="module")
def trained(odd):
    odd.train(TRAINER, "2d", 0)
    return odd


def test_more_modalities_than_the_model_has_are_refused(trained, tmp_path):
    images = images_of(trained, 0, tmp_path / "images")
    shutil.copy(images / "case_0_0002.nii.gz", images / "case_0_0003.nii.gz")
    with pytest.raises(UserError, match=r"images/case_0_0003.nii.gz: channel 3, and the dataset has 0 to 2; rename it"):
        predict(trained, images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nnunets_prediction_of_fewer_modalities_says_how_to_complete_them(trained, tmp_path):
    images = images_of(trained, 0, tmp_path / "images")
    (images / "case_0_0001.nii.gz").unlink()
    message = r"case_0_0002.nii.gz: .*2 of 3 modalities; complete the folder with nnunet-multimodal complete"
    with pytest.raises(UserError, match=message):
        trained.predict(TRAINER, "2d", tmp_path / "out", "-npp", 0, "-nps", 0, images=images)
    assert not list((tmp_path / "out").glob("case_*"))


def test_nan_in_an_image_to_predict_is_refused(trained, tmp_path):
    nnunet = trained.with_results(tmp_path / "results")
    shutil.copytree(trained.model(TRAINER, "2d"), nnunet.model(TRAINER, "2d"))
    description = nnunet.model(TRAINER, "2d") / "dataset.json"
    description.write_text(description.read_text().replace(".nii.gz", ".nrrd"))
    images = tmp_path / "images"
    images.mkdir()
    for file in (trained.raw / DATASET / "imagesTr").glob("case_0_*"):
        SimpleITK.WriteImage(SimpleITK.ReadImage(str(file)), str(images / file.name.replace(".nii.gz", ".nrrd")))
    put(images / "case_0_0001.nrrd", np.nan)
    with pytest.raises(UserError, match=r"case_0_0001.nrrd: NaN in 3 voxels; give them a value, or leave out the file"):
        predict(nnunet, images, tmp_path / "out")
    assert not list((tmp_path / "out").glob("case_*"))


def test_an_image_of_a_single_voxel_is_predicted(trained, tmp_path):
    images = images_of(trained, 0, tmp_path / "images")
    for file in images.iterdir():
        change(file, np.ones((1, 1, 1), np.float32))
    output = predict(trained, images, tmp_path / "out", "--save_probabilities")
    assert np.isfinite(np.load(output / "case_0.npz")["probabilities"]).all()
    assert segmentation(output / "case_0.nii.gz").shape == (1, 1, 1)
