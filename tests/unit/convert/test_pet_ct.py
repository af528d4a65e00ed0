"""autoPET and HECKTOR."""

import numpy as np
import pytest

from nnunet_multimodal.errors import UserError
from tests.unit.convert.trees import AFFINE, SHAPE, Result, convert, image, label_map, nifti

STUDY = "03-23-2003-NA-PET-CT Ganzkoerper  primaer mit KM-09147"
FINE = np.array([[0.5, 0, 0, 2.75], [0, 0.75, 0, -4.375], [0, 0, 1, 4.5], [0, 0, 0, 1]])


def write_study(folder, patient, study, names=("CTres", "CT", "SUV", "PET", "SEG"), lesion=True):
    for seed, name in enumerate(names):
        array = label_map(*([1] if lesion else [])) if name.upper() == "SEG" else image(seed)
        affine = AFFINE
        if name == "CT":
            array, affine = image(seed, (12, 10, 8)), FINE
        nifti(folder / patient / study / f"{name}.nii.gz", array, affine)


def test_documented_commands(documented, tmp_path, raw, monkeypatch):
    """The PET of HECKTOR and the CT of the study lie on grids of their own."""
    monkeypatch.chdir(tmp_path)
    write_study(tmp_path / "FDG-PET-CT-Lesions", "PETCT_0011f3deaf", STUDY)
    hecktor = tmp_path / "hecktor2022_training"
    nifti(hecktor / "imagesTr" / "CHUM-001__CT.nii.gz", image(0, (12, 10, 8)), FINE)
    nifti(hecktor / "imagesTr" / "CHUM-001__PT.nii.gz", image(1))
    nifti(hecktor / "labelsTr" / "CHUM-001.nii.gz", label_map(1, 2, shape=(12, 10, 8)), FINE)
    nifti(tmp_path / "STUDY" / "a" / "ct.nii.gz", image(0, (12, 10, 8)), FINE)
    nifti(tmp_path / "STUDY" / "a" / "suv.nii.gz", image(1))
    nifti(tmp_path / "STUDY" / "a" / "tumour.nii.gz", label_map(1))
    documented.run(lambda command: convert(*command[2:]))
    sizes = {folder.name: Result(folder).geometry(f"imagesTr/{case}_0001")[0] for folder, case in (
        (raw / "Dataset022_HECKTOR", "CHUM-001"), (raw / "Dataset023_STUDY", "a")
    )}  # fmt: skip
    assert sizes == {"Dataset022_HECKTOR": (12, 10, 8), "Dataset023_STUDY": SHAPE}
    assert len(Result(raw / "Dataset221_autoPET").names("labelsTr")) == 1


def test_autopet(tmp_path, raw, result, capsys):
    """Names of studies as TCIA gives them; two studies of a patient; one without a lesion."""
    folder = tmp_path / "FDG-PET-CT-Lesions"
    write_study(folder, "PETCT_0011f3deaf", STUDY)
    write_study(folder, "PETCT_01140d52d8", "08-13-2005-a", lesion=False)
    write_study(folder, "PETCT_01140d52d8", "09-01-2006-b", names=("ctres", "suv", "seg"))
    convert("autopet", folder, "--dataset-id", 221, "--link")
    data = result()
    first = "PETCT_0011f3deaf_03-23-2003-NA-PET-CT_Ganzkoerper_primaer_mit_KM-09147"
    cases = [first, "PETCT_01140d52d8_08-13-2005-a", "PETCT_01140d52d8_09-01-2006-b"]
    assert data.names("labelsTr") == [f"{case}.nii.gz" for case in cases]
    assert data.description["channel_names"] == {"0": "CT", "1": "PET"}
    np.testing.assert_array_equal(data.array(f"imagesTr/{first}_0000"), image(0))
    np.testing.assert_array_equal(data.array(f"imagesTr/{first}_0001"), image(2))  # SUV, not PET
    np.testing.assert_array_equal(data.array(f"imagesTr/{cases[2]}_0001"), image(1))
    assert not data.array(f"labelsTr/{cases[1]}").any()
    # the patient with two studies is not torn apart
    assert sorted(map(len, (fold["val"] for fold in data.splits))) == [1, 2]
    printed = capsys.readouterr().out
    assert "autoPET has 1014 studies, and here are 3" in printed
    assert "lesion (1): in 2 of 3 training cases" in printed
    assert "4 files belong to no case" in printed  # CT and PET on their own grid and in their own units


def test_autopet_takes_the_ct_of_another_grid_if_told(tmp_path, raw, result):
    write_study(tmp_path / "d", "PETCT_1", "a", names=("CT", "SUV", "SEG"))
    with pytest.raises(UserError, match=r"SUV.nii.gz lies on another grid than .*CT.nii.gz: .*--resample"):
        convert("autopet", tmp_path / "d", "--dataset-id", 221)
    assert not list(raw.iterdir())
    convert("autopet", tmp_path / "d", "--dataset-id", 221, "--resample")
    data = result()
    assert data.geometry("imagesTr/PETCT_1_a_0000") == data.geometry("imagesTr/PETCT_1_a_0001")
    # every coarse voxel is the mean of the 8 fine ones in it
    fine = image(0, (12, 10, 8)).astype(float)
    mean = fine.reshape(6, 2, 5, 2, 4, 2).mean((1, 3, 5))
    np.testing.assert_allclose(data.array("imagesTr/PETCT_1_a_0000"), mean, atol=1)  # stored as whole HU
    assert data.table["PETCT_1_a"]["remarks"].startswith("no CTres, so its CT; CT.nii.gz: resampled")
    data.verify()


def test_autopet_refuses_other_trees(tmp_path, raw):
    nifti(tmp_path / "flat" / "SUV.nii.gz", image())
    with pytest.raises(UserError, match=r"SUV.nii.gz is not in PATIENT/STUDY/"):
        convert("autopet", tmp_path / "flat", "--dataset-id", 221)
    nifti(tmp_path / "three" / "imagesTr" / "fdg_1_0000.nii.gz", image())
    with pytest.raises(UserError, match=r"no SUV.nii.gz in PATIENT/STUDY/; autoPET III and later come in nnU-Net's"):
        convert("autopet", tmp_path / "three", "--dataset-id", 221)


def test_hecktor_2022(tmp_path, raw, result):
    """CT and label map on one grid, PET on another; one label map is named with an underscore."""
    training, testing = tmp_path / "d" / "hecktor2022_training", tmp_path / "d" / "hecktor2022_testing"
    labels = np.zeros((12, 10, 8), np.float32)
    labels[2:4], labels[6:8] = 1, 2
    for folder, case in ((training / "imagesTr", "CHUM-001"), (training / "imagesTr", "MDA-002"),
                         (testing / "imagesTs", "USZ-001")):  # fmt: skip
        nifti(folder / f"{case}__CT.nii.gz", image(0, (12, 10, 8)), FINE)
        nifti(folder / f"{case}__PT.nii.gz", image(1))
    nifti(training / "labelsTr" / "CHUM_001.nii.gz", labels, FINE)
    nifti(training / "labelsTr" / "MDA-002.nii.gz", labels, FINE)
    (training / "hecktor2022_clinical_info_training.csv").write_text("PatientID\n")
    with pytest.raises(UserError, match=r"CHUM-001__PT.nii.gz lies on another grid"):
        convert("hecktor", tmp_path / "d", "--dataset-id", 22)
    convert("hecktor", tmp_path / "d", "--dataset-id", 22, "--resample", "PET")
    data = result()
    assert data.names("labelsTr") == ["CHUM-001.nii.gz", "MDA-002.nii.gz"]
    assert data.names("imagesTs") == ["USZ-001_0000.nii.gz", "USZ-001_0001.nii.gz"]
    for name in ("imagesTr/CHUM-001_0000", "imagesTr/CHUM-001_0001", "labelsTr/CHUM-001", "imagesTs/USZ-001_0000"):
        assert data.geometry(name)[0] == SHAPE
    # fine slices 2 and 3 are coarse slice 1, 6 and 7 are 3
    expected = np.zeros(SHAPE)
    expected[1], expected[3] = 1, 2
    np.testing.assert_array_equal(data.array("labelsTr/CHUM-001"), expected)
    np.testing.assert_array_equal(data.array("imagesTr/MDA-002_0001"), image(1))
    assert data.description["labels"] == {"background": 0, "GTVp": 1, "GTVn": 2}
    data.verify()


def test_hecktor_of_later_years_has_a_folder_for_each_patient_and_more_images(tmp_path, raw, result, capsys):
    folder = tmp_path / "d" / "Task 1" / "CHUM-001"
    for seed, name in enumerate(("CHUM-001__CT", "CHUM-001__PT", "CHUM-001__CTPlanning", "CHUM-001__RTDOSE")):
        nifti(folder / f"{name}.nii.gz", image(seed))
    nifti(folder / "CHUM-001__dosimetry_CT.nii.gz", image(9))
    nifti(folder / "CHUM-001.nii.gz", label_map(1, 2))
    convert("hecktor", tmp_path / "d", "--dataset-id", 25)
    np.testing.assert_array_equal(result().array("imagesTr/CHUM-001_0000"), image(0))
    np.testing.assert_array_equal(result().array("labelsTr/CHUM-001"), label_map(1, 2))
    assert "3 files belong to no case" in capsys.readouterr().out


def test_hecktor_refuses_the_same_patient_twice(tmp_path, raw):
    for task in ("Task 1", "Task 3"):
        nifti(tmp_path / "d" / task / "CHUM-001" / "CHUM-001__CT.nii.gz", image())
    with pytest.raises(UserError, match=r"CHUM-001: two files are its image CT: .*Task 1.*Task 3"):
        convert("hecktor", tmp_path / "d", "--dataset-id", 25)


def test_hecktor_refuses_another_folder(tmp_path, raw):
    nifti(tmp_path / "d" / "a.nii.gz", image())
    with pytest.raises(UserError, match=r"no file named CASE__CT.nii.gz"):
        convert("hecktor", tmp_path / "d", "--dataset-id", 25)
