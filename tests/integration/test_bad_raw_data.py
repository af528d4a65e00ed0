"""Raw data that is no dataset: nnU-Net's check and our own commands name the file and what is wrong with it."""

import re
import shutil

import numpy as np
import pytest
import SimpleITK

from nnunet_multimodal import cli
from nnunet_multimodal.errors import UserError
from tests.integration.test_bad_input import (
    BAD_IMAGES,
    GRIDS,
    change,
    corrupt,
    moved,
    of_another_shape,
    plan_and_preprocess,
    put,
    set_spacing,
)
from tests.nnunet import DATASET, NnUNet, segmentation, write_raw

# --- nnU-Net's check


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


# --- complete and our fingerprint


@pytest.fixture
def raw(tmp_path):
    nnunet = NnUNet(tmp_path)
    write_raw(nnunet, "labels", cases=1)
    return nnunet


@pytest.mark.parametrize(("spoil", "message"), BAD_IMAGES)
def test_bad_images_are_named_by_complete_and_by_our_fingerprint(raw, spoil, message):
    images = raw.raw / DATASET / "imagesTr"
    spoil(images / "case_0_0001.nii.gz")
    with pytest.raises(UserError, match=message):
        cli.main(["complete", str(images), "-np", "1"])
    with pytest.raises(UserError, match=message):
        plan_and_preprocess(raw, "--no_pp", verify=False)


@pytest.mark.parametrize(("spoil", "message"), GRIDS)
def test_our_fingerprint_names_images_on_other_grids(raw, spoil, message):
    spoil(raw.raw / DATASET / "imagesTr" / "case_0_0001.nii.gz")
    with pytest.raises(UserError, match=message):
        plan_and_preprocess(raw, "--no_pp", verify=False)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (moved, r"labelsTr/case_0.nii.gz has origin .* and .*case_0_0000.nii.gz .*resample the label map"),
        (of_another_shape, r"labelsTr/case_0.nii.gz has shape .* and .*case_0_0000.nii.gz .*resample the label map"),
        (corrupt, r"labelsTr/case_0.nii.gz cannot be read \(.*\); copy it again"),
    ],
)
def test_our_fingerprint_names_bad_label_maps(raw, spoil, message):
    spoil(raw.raw / DATASET / "labelsTr" / "case_0.nii.gz")
    with pytest.raises(UserError, match=message):
        plan_and_preprocess(raw, "--no_pp", verify=False)


def test_a_dataset_of_empty_labels_is_refused(raw):
    file = raw.raw / DATASET / "labelsTr" / "case_0.nii.gz"
    change(file, np.zeros_like(segmentation(file)))
    with pytest.raises(UserError, match=rf"{DATASET}: no case with T1 has a label but background in labelsTr"):
        plan_and_preprocess(raw, "--no_pp", verify=False)
