import numpy as np
import pytest

from nnunet_multimodal.errors import UserError
from tests.unit.convert.trees import convert, image, label_map, nifti

VALUES = (500, 600, 420, 550, 205, 820, 850)


def values_map(*values):
    """All values, each in one voxel of a row or more."""
    array = np.zeros((10, 5, 4), np.int16)
    for number, value in enumerate(values):
        array[number, 1:3] = value
    return array


@pytest.fixture
def source(tmp_path):
    """One modality each; a stray 421; CT on one grid, MR on another; test images."""
    folder = tmp_path / "MM-WHS 2017 Dataset"
    mr = np.diag([0.9, 0.9, 1.6, 1.0])
    nifti(folder / "ct_train" / "ct_train_1001_image.nii.gz", image(1, (10, 5, 4)), slope=1, intercept=-1024)
    nifti(folder / "ct_train" / "ct_train_1001_label.nii.gz", values_map(*VALUES))
    nifti(folder / "mr_train" / "mr_train_1010_image.nii", image(2, (10, 5, 4)), mr)
    nifti(folder / "mr_train" / "mr_train_1010_label.nii", values_map(*VALUES, 421), mr)
    nifti(folder / "ct_test" / "ct_test_2001_image.nii.gz", image(3, (10, 5, 4)))
    return folder


def test_each_case_has_one_of_two_modalities(documented, source, raw, result, capsys, monkeypatch):
    monkeypatch.chdir(source.parent)
    documented.run(lambda command: convert(*command[2:]))
    data = result()
    assert data.names("labelsTr") == ["ct_train_1001.nii.gz", "mr_train_1010.nii.gz"]
    for channel in (0, 1):
        assert data.is_placeholder(f"imagesTr/ct_train_1001_{channel:04d}") == (channel == 1)
        assert data.is_placeholder(f"imagesTr/mr_train_1010_{channel:04d}") == (channel == 0)
    assert data.is_placeholder("imagesTs/ct_test_2001_0001")
    assert data.geometry("imagesTr/mr_train_1010_0000") == data.geometry("imagesTr/mr_train_1010_0001")
    np.testing.assert_array_equal(data.array("imagesTr/ct_train_1001_0000"), image(1, (10, 5, 4)) - 1024.0)
    table = (data.folder / "imagesTr" / "modalities.csv").read_text()
    assert table == "case,CT,MR\nct_train_1001,1,0\nmr_train_1010,0,1\n"
    printed = capsys.readouterr().out
    assert "MR: absent in 2 cases, placeholders" in printed
    assert "MM-WHS has 20 training cases of CT, not 1" in printed
    assert "-preprocessor_name MultimodalPreprocessor" in printed
    data.verify()


def test_labels_are_numbered_and_a_stray_value_mended(source, raw, result):
    convert("mmwhs", source, "--dataset-id", 17)
    data = result()
    np.testing.assert_array_equal(data.array("labelsTr/ct_train_1001"), values_map(1, 2, 3, 4, 5, 6, 7))
    np.testing.assert_array_equal(data.array("labelsTr/mr_train_1010"), values_map(1, 2, 3, 4, 5, 6, 7, 3))
    assert list(data.description["labels"].items())[1:4] == [
        ("left ventricle", 1), ("right ventricle", 2), ("left atrium", 3)
    ]  # fmt: skip
    assert "421 taken for 420" in data.table["mr_train_1010"]["remarks"]
    assert "421" not in data.table["ct_train_1001"]["remarks"]


def test_other_values_are_refused(source, raw):
    nifti(source / "ct_train" / "ct_train_1001_label.nii.gz", values_map(500, 422))
    with pytest.raises(UserError, match=r"ct_train_1001_label.nii.gz: labels 422, and 0, 205, 420, 421, 500"):
        convert("mmwhs", source, "--dataset-id", 17)


def test_one_modality_alone_is_no_data_set_of_two(tmp_path, raw):
    nifti(tmp_path / "d" / "ct_train_1001_image.nii.gz", image())
    nifti(tmp_path / "d" / "ct_train_1001_label.nii.gz", label_map(500))
    with pytest.raises(UserError, match="no training case has MR"):
        convert("mmwhs", tmp_path / "d", "--dataset-id", 17)


def test_complete_cases_alone_are_none(source, raw):
    with pytest.raises(UserError, match=r"no training case is left of 3: ct_test_2001: lacks MR"):
        convert("mmwhs", source, "--dataset-id", 17, "--incomplete", "drop")


def test_another_folder_is_refused(tmp_path, raw):
    nifti(tmp_path / "d" / "a.nii.gz", image())
    with pytest.raises(UserError, match=r"no file named ct_train_1001_image.nii.gz"):
        convert("mmwhs", tmp_path / "d", "--dataset-id", 17)
