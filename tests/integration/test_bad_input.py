"""Bad input on the roads that users take: a clear message, or, where it is odd but fine, finite weights and maps."""

import json
import shutil
from multiprocessing.pool import ThreadPool
from pathlib import Path
from unittest import mock

import nibabel
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


def plan_and_preprocess(nnunet, *more, verify=True):
    command = ("nnUNetv2_plan_and_preprocess", "-d", 900, "-npfp", 1, "--clean")
    command += ("--verify_dataset_integrity",) if verify else ()
    ours = ("-fpe", "MultimodalFingerprintExtractor", "-preprocessor_name", "MultimodalPreprocessor")
    # in this process, where its messages can be read
    workers = "nnunetv2.experiment_planning.verify_dataset_integrity.multiprocessing"
    with mock.patch(workers, **{"get_context.return_value.Pool": ThreadPool}):
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


def copy_model(trained, nnunet):
    """Of its first fold alone."""
    source, target = (some.model(TRAINER, "2d") for some in (trained, nnunet))
    return Path(shutil.copytree(source, target, ignore=shutil.ignore_patterns("fold_1")))


def test_nan_in_an_image_to_predict_is_refused(trained, tmp_path):
    nnunet = trained.with_results(tmp_path / "results")
    copy_model(trained, nnunet)
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


# --- to add with the checks


def truncated(file):
    """SimpleITK reads zeros for the rest."""
    file.write_bytes(file.read_bytes()[:9000])


def corrupt(file):
    file.write_bytes(b"nothing")


def nonfinite(value):
    def spoil(file):
        """SimpleITK reads zeros here."""
        image = nibabel.load(file)
        array = image.get_fdata(dtype=np.float32)
        array[2, 2, :3] = value
        nibabel.save(nibabel.Nifti1Image(array, image.affine), file)

    return spoil


def moved(file):
    image = SimpleITK.ReadImage(str(file))
    image.SetOrigin((5.0, 5.0, 5.0))
    SimpleITK.WriteImage(image, str(file))


def of_another_shape(file):
    change(file, np.zeros((18, 20, 21), np.float32))


def several_channels(file):
    SimpleITK.WriteImage(SimpleITK.JoinSeries([SimpleITK.ReadImage(str(file))] * 5), str(file))


BAD_IMAGES = [
    (corrupt, r"case_0_0001.nii.gz cannot be read \(.*\); copy it again, or leave it out"),
    (truncated, r"case_0_0001.nii.gz cannot be read \(.*\); copy it again, or leave it out"),
    (nonfinite(np.nan), r"case_0_0001.nii.gz: NaN in 3 voxels; give them a value"),
    (nonfinite(np.inf), r"case_0_0001.nii.gz: infinity in 3 voxels; give them a value"),
]
GRIDS = [
    (set_spacing, r"case_0_0001.nii.gz has spacing .*2\.0.* and .*case_0_0000.nii.gz .*1\.5.*resample it"),
    (moved, r"case_0_0001.nii.gz has origin \(5\.0, .* and .*case_0_0000.nii.gz .*resample it"),
    (of_another_shape, r"case_0_0001.nii.gz has shape .*21\) and .*case_0_0000.nii.gz .*22\).*resample it"),
]


@pytest.mark.parametrize(("spoil", "message"), [*BAD_IMAGES, *GRIDS])
def test_bad_images_to_predict_are_named(trained, tmp_path, spoil, message):
    images = images_of(trained, 0, tmp_path / "images")
    spoil(images / "case_0_0001.nii.gz")
    with pytest.raises(UserError, match=message):
        predict(trained, images, tmp_path / "out")
    assert not list((tmp_path / "out").glob("case_*"))


def test_several_channels_in_a_file_to_predict_are_refused(trained, tmp_path):
    images = images_of(trained, 0, tmp_path / "images")
    for channel in (1, 2):
        (images / f"case_0_{channel:04d}.nii.gz").unlink()
    several_channels(images / "case_0_0000.nii.gz")
    with pytest.raises(UserError, match=r"case_0_0000.nii.gz has 5 channels in one file; split it"):
        predict(trained, images, tmp_path / "out")


def test_our_preprocessor_refuses_infinite_voxels_extra_channels_and_labels_that_are_not_declared(trained, tmp_path):
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = PlansManager(trained.plans())
    configuration = plans.get_configuration("2d")
    folder = images_of(trained, 0, tmp_path / "images")
    files = sorted(map(str, folder.iterdir()))
    label_map = shutil.copy(trained.raw / DATASET / "labelsTr" / "case_0.nii.gz", tmp_path / "case_0.nii.gz")
    dataset_json = json.loads((trained.raw / DATASET / "dataset.json").read_text())
    preprocessor = configuration.preprocessor_class(verbose=False)
    with pytest.raises(UserError, match=r"case_0_0002.nii.gz, .*4 images, and the dataset has 3 modalities"):
        preprocessor.run_case([*files, files[0]], str(label_map), plans, configuration, dataset_json)
    put(label_map, 7)
    with pytest.raises(UserError, match=r"case_0.nii.gz: labels 7, and dataset.json declares 0, 1, 2; correct"):
        preprocessor.run_case(files, str(label_map), plans, configuration, dataset_json)
    data, properties = plans.image_reader_writer_class().read_images(files)
    data[1, 2, 2, :3] = np.inf
    with pytest.raises(UserError, match=r"channel 1: infinity in 3 voxels; give them a value"):
        preprocessor.run_case_npy(data, None, properties, plans, configuration, dataset_json)


def test_a_label_that_is_not_declared_is_named_in_training(trained):
    trainer = trained.trainer(TRAINER, "2d")
    with trained.environment():
        trainer.initialize()
        batch = next(trainer.get_dataloaders()[0])
        trainer.on_epoch_start()
        batch["target"][0][1, 0, 3, 3] = 7
        with pytest.raises(UserError, match=r"case_0 has label 7, and dataset.json declares 0, 1, 2"):
            trainer.train_step(batch)


def test_evaluation_names_what_it_cannot_read_and_labels_that_are_not_declared(trained, tmp_path):
    labels = trained.raw / DATASET / "labelsTr"
    output = shutil.copytree(labels, tmp_path / "out")
    for name in ("dataset.json", "plans.json"):
        shutil.copy(trained.model(TRAINER, "2d") / name, output)
    evaluate = ["evaluate", str(labels), str(output), "-np", "1"]
    put(output / "case_0.nii.gz", 7)
    with pytest.raises(UserError, match=r"out/case_0.nii.gz: labels 7, and dataset.json declares 0, 1, 2"):
        cli.main(evaluate)
    corrupt(output / "case_0.nii.gz")
    with pytest.raises(UserError, match=r"out/case_0.nii.gz cannot be read"):
        cli.main(evaluate)
    (output / "plans.json").write_text("{")
    with pytest.raises(UserError, match=r"out/plans.json cannot be read \(.*line 1.*\); plan again"):
        cli.main(evaluate)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"Plans?\.json cannot be read \(.*line 1.*\); plan again"),
        ("[]", r"Plans?\.json has no configurations.* plan again"),
        (None, r"Plans?\.json cannot be read \(.*No such file.*\); plan again"),
    ],
)
def test_unreadable_plans_are_named_in_training(trained, text, message):
    file = trained.preprocessed / DATASET / "badPlans.json"
    if text is not None:
        file.write_text(text)
    command = ["train", "900", "2d", "0", "-tr", TRAINER, "-p", "badPlans", "-device", "cpu"]
    with trained.environment(), pytest.raises(UserError, match=message):
        cli.main(command)
    file.unlink(missing_ok=True)


# --- models


EARLY = "EarlyFusionTrainer_1epoch_2iterations"


@pytest.fixture
def model(trained, tmp_path):
    """A copy of the model to spoil, and its folder."""
    nnunet = trained.with_results(tmp_path / "results")
    return nnunet, copy_model(trained, nnunet)


def edit_checkpoint(file, change_it):
    checkpoint = torch.load(file, weights_only=False)
    change_it(checkpoint)
    torch.save(checkpoint, file)


def other_method(folder):
    edit_checkpoint(folder / "fold_0" / "checkpoint_final.pth", lambda c: c.update(trainer_name=EARLY))


def other_version(folder):
    edit_checkpoint(folder / "fold_0" / "checkpoint_final.pth", lambda c: c["network_weights"].popitem())


def other_fold_of_another_version(folder):
    shutil.copytree(folder / "fold_0", folder / "fold_1")
    edit_checkpoint(folder / "fold_1" / "checkpoint_final.pth", lambda c: c["network_weights"].popitem())


def no_checkpoint(folder):
    torch.save({"state_dict": {}}, folder / "fold_0" / "checkpoint_final.pth")


def torn(folder):
    file = folder / "fold_0" / "checkpoint_final.pth"
    file.write_bytes(file.read_bytes()[:5000])


BAD_CHECKPOINTS = [
    (other_method, rf"fold_0/checkpoint_final.pth is of {EARLY}, not of {TRAINER}; give -tr {EARLY}"),
    (other_version, r"fold_0/checkpoint_final.pth has other weights .*Missing key.*version of nnunet_multimodal"),
    (no_checkpoint, r"fold_0/checkpoint_final.pth has no trainer_name.*: it is not a checkpoint of nnU-Net v2"),
    (torn, r"fold_0/checkpoint_final.pth is not a whole checkpoint"),
]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        *BAD_CHECKPOINTS,
        (other_fold_of_another_version, r"fold_1/checkpoint_final.pth has other weights .*Missing key"),
        (lambda folder: (folder / "plans.json").write_text("{"), r"/plans.json cannot be read \(.*line 1"),
        (lambda folder: (folder / "plans.json").write_text("{}"), r"/plans.json has no configurations"),
        (lambda folder: (folder / "dataset.json").unlink(), r"/dataset.json cannot be read \(.*No such file"),
    ],
)
def test_models_that_cannot_predict_are_named(model, tmp_path, spoil, message):
    nnunet, folder = model
    images = images_of(nnunet, 0, tmp_path / "images")
    spoil(folder)
    folds = ("-f", "0", "1") if (folder / "fold_1").is_dir() else ()
    with pytest.raises(UserError, match=message):
        predict(nnunet, images, tmp_path / "out", *folds)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("spoil", "message"), BAD_CHECKPOINTS)
def test_training_does_not_go_on_from_them(model, spoil, message):
    nnunet, folder = model
    spoil(folder)
    with pytest.raises(UserError, match=message):
        nnunet.train(TRAINER, "2d", 0, "--c")
