import gzip
import json

import numpy as np
import pytest
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_multimodal.decomposition import decompose
from nnunet_multimodal.errors import UserError
from tests.unit.convert.trees import convert, image, label_map, nifti

OLD = ("flair", "t1", "t1ce", "t2")
NEW = ("t2f", "t1n", "t1c", "t2w")


def write_case(folder, name, *values, parts=OLD, separator="_", ending=".nii.gz", seg="seg"):
    """Channel c of a case has the image of seed c."""
    for channel, part in enumerate(parts):
        nifti(folder / name / f"{name}{separator}{part}{ending}", image(channel))
    if values:
        nifti(folder / name / f"{name}{separator}{seg}{ending}", label_map(*values))


def test_2020_as_it_is_downloaded(tmp_path, raw, result, capsys):
    """Uncompressed, with the misnamed case, one in capitals, validation images and tables beside."""
    training, validation = (
        tmp_path / "download" / f"MICCAI_BraTS2020_{part}Data" for part in ("Training", "Validation")
    )
    write_case(training, "BraTS20_Training_001", 1, 2, 4, ending=".nii")
    write_case(training, "BraTS20_Training_002", 2, parts=[part.upper() for part in OLD], seg="SEG")
    capitals = training / "BraTS20_Training_002" / "BraTS20_Training_002_T1.nii.gz"
    capitals.rename(capitals.with_name("BraTS20_Training_002_T1.NII.GZ"))
    write_case(training, "BraTS20_Training_355", 4, ending=".nii")
    (training / "BraTS20_Training_355" / "BraTS20_Training_355_seg.nii").rename(
        training / "BraTS20_Training_355" / "W39_1998.09.19_Segm.nii"
    )
    (training / "name_mapping.csv").write_text("BraTS_2017_subject_ID\n")
    (training / "BraTS20_Training_001" / "._BraTS20_Training_001_t1.nii").write_bytes(b"macOS")
    write_case(validation, "BraTS20_Validation_001", ending=".nii")
    convert("brats", tmp_path / "download", "--dataset-id", 20)
    data = result()
    cases = [f"BraTS20_Training_{number}" for number in ("001", "002", "355")]
    assert data.folder.name == "Dataset020_BraTS"
    assert data.names() == [f"{case}_{channel:04d}.nii.gz" for case in cases for channel in range(4)]
    assert data.names("imagesTs") == [f"BraTS20_Validation_001_{channel:04d}.nii.gz" for channel in range(4)]
    for case in cases:
        for channel in range(4):
            np.testing.assert_array_equal(data.array(f"imagesTr/{case}_{channel:04d}"), image(channel))
    for case, values in zip(cases, ((1, 2, 3), (2,), (3,)), strict=True):
        np.testing.assert_array_equal(data.array(f"labelsTr/{case}"), label_map(*values))
    source = training / cases[0] / f"{cases[0]}_t1.nii"
    assert gzip.decompress((data.folder / "imagesTr" / f"{cases[0]}_0001.nii.gz").read_bytes()) == source.read_bytes()
    assert data.table["BraTS20_Training_355"]["remarks"].startswith("its label map is called W39_1998.09.19_Segm.nii")
    printed = capsys.readouterr().out
    assert "3 training cases, 1 test cases\n" in printed
    assert "BraTS20 has 369 training cases, and here are 3" in printed
    assert "enhancing tumor (3): in 2 of 3 training cases" in printed
    assert "1 files belong to no case and were not looked at: MICCAI_BraTS2020_TrainingData/name_mapping.csv" in printed
    data.verify()


def test_the_documented_command(documented, tmp_path, raw, result, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_case(tmp_path / "MICCAI_BraTS2020_TrainingData", "BraTS20_Training_001", 1, 2, 4)
    documented.run(lambda command: convert(*command[2:]))
    assert result().names("labelsTr") == ["BraTS20_Training_001.nii.gz"]


def test_regions_are_the_challenges_and_the_decomposition_is_the_papers(tmp_path, raw, result):
    write_case(tmp_path / "d", "BraTS20_Training_001", 1, 2, 4)
    convert("brats", tmp_path / "d", "--dataset-id", 20)
    description = result().description
    manager = LabelManager(description["labels"], description["regions_class_order"])
    # the challenge's definition, in its own labels: 1 necrosis, 2 oedema, 4 enhancing
    source, ours = label_map(1, 2, 4), result().array("labelsTr/BraTS20_Training_001")
    regions = dict(zip(list(description["labels"])[1:], manager.foreground_regions, strict=True))
    for name, of_challenge in (
        ("whole tumor", (1, 2, 4)),
        ("tumor core", (1, 4)),
        ("enhancing tumor", (4,)),
    ):
        np.testing.assert_array_equal(np.isin(ours, regions[name]), np.isin(source, of_challenge))
    # nnU-Net writes regions over each other in this order; that must give the labels back
    written = np.zeros_like(ours)
    for region, value in zip(manager.foreground_regions, description["regions_class_order"], strict=True):
        written[np.isin(ours, region)] = value
    np.testing.assert_array_equal(written, ours)
    assert description["channel_names"] == {"0": "FLAIR", "1": "T1", "2": "T1CE", "3": "T2"}
    segmentors = decompose(description, manager, [[channel] for channel in range(4)])["segmentors"]
    assert segmentors == [
        {"modalities": [0], "channels": [0]},
        {"modalities": [1], "channels": [1]},
        {"modalities": [2], "channels": [1, 2]},
        {"modalities": [3], "channels": [0, 1]},
    ]


def test_2018_has_folders_of_grades(tmp_path, raw, result):
    for grade, name in (("HGG", "Brats18_TCIA02_606_1"), ("LGG", "Brats18_2013_0_1"), ("LGG", "Brats18_TCIA09_177_1")):
        write_case(tmp_path / "d" / grade, name, 1, 4)
    convert("brats", tmp_path / "d", "--dataset-id", 18, "--name", "BraTS2018")
    assert result().folder.name == "Dataset018_BraTS2018"
    assert result().names("labelsTr") == [
        "Brats18_2013_0_1.nii.gz", "Brats18_TCIA02_606_1.nii.gz", "Brats18_TCIA09_177_1.nii.gz"
    ]  # fmt: skip
    assert result().description["numTraining"] == 3


def test_2023_keeps_its_labels_and_a_patients_time_points_together(tmp_path, raw, result):
    names = [f"BraTS-GLI-{patient:05d}-{time:03d}" for patient in range(6) for time in (0, 1)]
    for name in names:
        write_case(tmp_path / "d", name, 1, 2, 3, parts=NEW, separator="-")
    convert("brats", tmp_path / "d", "--dataset-id", 23, "--link")
    data = result()
    for channel in range(4):
        np.testing.assert_array_equal(data.array(f"imagesTr/{names[3]}_{channel:04d}"), image(channel))
    np.testing.assert_array_equal(data.array(f"labelsTr/{names[3]}"), label_map(1, 2, 3))
    assert (data.folder / "labelsTr" / f"{names[3]}.nii.gz").samefile(
        tmp_path / "d" / names[3] / f"{names[3]}-seg.nii.gz"
    )
    assert data.table[names[3]]["files"] == "5 hard link"
    assert len(data.splits) == 5
    for fold in data.splits:
        assert sorted(fold["train"] + fold["val"]) == names
        assert not {name[:-4] for name in fold["train"]} & {name[:-4] for name in fold["val"]}
    assert sorted(name for fold in data.splits for name in fold["val"]) == names


def test_links_what_needs_no_change_and_writes_the_rest(tmp_path, raw, result):
    write_case(tmp_path / "d", "BraTS20_Training_001", 1, 2, 4)
    write_case(tmp_path / "d", "BraTS20_Training_002", 1, 2)
    convert("brats", tmp_path / "d", "--dataset-id", 20, "--link")
    table = result().table
    assert table["BraTS20_Training_001"]["files"] == "4 hard link, 1 written"
    assert table["BraTS20_Training_001"]["remarks"] == "BraTS20_Training_001_seg.nii.gz: labels renumbered"
    assert table["BraTS20_Training_002"]["files"] == "5 hard link"


def test_a_label_of_other_years_is_refused(tmp_path, raw):
    """4 is the resection cavity of 2024, 3 the non-enhancing core before 2017: neither is enhancing tumour."""
    advice = r"keep it by --labels 'resection cavity=4'"
    write_case(tmp_path / "new", "BraTS-GLI-00001-100", 1, 2, 3, 4, parts=NEW, separator="-")
    with pytest.raises(
        UserError, match=rf"BraTS-GLI-00001-100-seg.nii.gz: labels 4, and 0, 1, 2, 3 are expected.*{advice}"
    ):
        convert("brats", tmp_path / "new", "--dataset-id", 23)
    write_case(tmp_path / "old", "brats_2013_pat0001_1", 1, 2, 3, 4)
    with pytest.raises(UserError, match=r"pat0001_1_seg.nii.gz: labels 3, and 0, 1, 2, 4 are expected"):
        convert("brats", tmp_path / "old", "--dataset-id", 13)
    assert not list(raw.iterdir())


def test_2024_with_the_resection_cavity(tmp_path, raw, result):
    for number in range(2):
        write_case(tmp_path / "d", f"BraTS-GLI-0000{number}-100", 1, 2, 3, 4, parts=NEW, separator="-")
    convert("brats", tmp_path / "d", "--dataset-id", 24, "--labels", "resection cavity=4")
    data = result()
    np.testing.assert_array_equal(data.array("labelsTr/BraTS-GLI-00000-100"), label_map(1, 2, 3, 4))
    assert "nnunet_multimodal" not in data.description  # the decomposition
    manager = LabelManager(data.description["labels"], data.description["regions_class_order"])
    assert manager.foreground_regions == [(1, 2, 3), (1, 3), 3, 4]
    # what is written for the regions of each label is that label
    probabilities = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]], np.float32).T[..., None, None]
    assert manager.convert_probabilities_to_segmentation(probabilities).ravel().tolist() == [1, 2, 3, 4]
    data.verify()


def test_label_4_can_be_ignored(tmp_path, raw, result):
    write_case(tmp_path / "d", "BraTS-GLI-00001-100", 1, 2, 3, 4, parts=NEW, separator="-")
    convert("brats", tmp_path / "d", "--dataset-id", 24, "--labels", "ignore=4")
    manager = LabelManager(result().description["labels"], result().description["regions_class_order"])
    assert (manager.foreground_regions, manager.ignore_label) == ([(1, 2, 3), (1, 3), 3], 4)
    result().verify()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("cavity=3",), "brats takes a new name for label 4"),
        (("a=4", "b=5"), "brats takes a new name for label 4"),
        (("tumor core=4",), "brats takes a new name for label 4"),
        (("cavity=4",), "--labels names label 4 of 2023 and later; .* has cases of before"),
    ],
)
def test_no_other_labels_are_named(tmp_path, raw, labels, message):
    write_case(tmp_path / "d", "BraTS20_Training_001", 1, 2, 4)
    with pytest.raises(UserError, match=message):
        convert("brats", tmp_path / "d", "--dataset-id", 20, "--labels", *labels)
    assert not list(raw.iterdir())


@pytest.fixture
def incomplete(tmp_path):
    folder = tmp_path / "d"
    write_case(folder, "BraTS20_Training_001", 1)
    write_case(folder, "BraTS20_Training_002", 1)
    write_case(folder, "BraTS20_Training_003", 1)
    (folder / "BraTS20_Training_002" / "BraTS20_Training_002_t1ce.nii.gz").unlink()
    return folder


def test_a_missing_modality_stops_unless_told(incomplete, raw):
    with pytest.raises(UserError, match=r"BraTS20_Training_002 lacks T1CE; --incomplete keep or drop"):
        convert("brats", incomplete, "--dataset-id", 20)
    assert not list(raw.iterdir())


def test_a_missing_modality_becomes_a_placeholder(incomplete, raw, result, capsys):
    convert("brats", incomplete, "--dataset-id", 20, "--incomplete", "keep")
    data = result()
    assert data.is_placeholder("imagesTr/BraTS20_Training_002_0002")
    assert data.geometry("imagesTr/BraTS20_Training_002_0002") == data.geometry("imagesTr/BraTS20_Training_002_0000")
    np.testing.assert_array_equal(data.array("imagesTr/BraTS20_Training_002_0003"), image(3))
    table = (data.folder / "imagesTr" / "modalities.csv").read_text().splitlines()
    assert table == [
        "case,FLAIR,T1,T1CE,T2",
        *(f"BraTS20_Training_00{n}" for n in ("1,1,1,1,1", "2,1,1,0,1", "3,1,1,1,1")),
    ]
    assert data.table["BraTS20_Training_002"]["modalities"] == "FLAIR T1 T2"
    assert "nnUNetv2_plan_and_preprocess -d 20 -fpe MultimodalFingerprintExtractor" in capsys.readouterr().out
    data.verify()


def test_incomplete_cases_are_left_out(incomplete, raw, result, capsys):
    (incomplete / "BraTS20_Training_003" / "BraTS20_Training_003_seg.nii.gz").unlink()
    convert("brats", incomplete, "--dataset-id", 20, "--incomplete", "drop")
    data = result()
    assert data.names("labelsTr") == ["BraTS20_Training_001.nii.gz"]
    assert data.table["BraTS20_Training_002"]["remarks"] == "lacks T1CE"
    assert data.table["BraTS20_Training_003"]["remarks"] == "lacks a label map"
    assert "BraTS20_Training_003: lacks a label map" in capsys.readouterr().out
    assert json.loads((data.folder / "dataset.json").read_text())["numTraining"] == 1


def test_a_case_without_a_label_map_cannot_be_kept(incomplete, raw):
    (incomplete / "BraTS20_Training_003" / "BraTS20_Training_003_seg.nii.gz").unlink()
    with pytest.raises(UserError, match=r"BraTS20_Training_003 lacks a label map; --incomplete drop"):
        convert("brats", incomplete, "--dataset-id", 20, "--incomplete", "keep")


def test_two_files_of_a_kind_are_refused(tmp_path, raw):
    write_case(tmp_path / "d", "BraTS20_Training_001", 1)
    nifti(tmp_path / "d" / "BraTS20_Training_001" / "BraTS20_Training_001_t1.nii", image())
    with pytest.raises(UserError, match=r"two files are its image T1: .*_t1.nii and .*_t1.nii.gz; move one away"):
        convert("brats", tmp_path / "d", "--dataset-id", 20)


def test_two_namings_in_a_case_are_refused(tmp_path, raw):
    write_case(tmp_path / "d", "case", 1)
    nifti(tmp_path / "d" / "case-t1n.nii.gz", image())
    (tmp_path / "d" / "case" / "case_t1.nii.gz").unlink()
    with pytest.raises(UserError, match=r"case has names of before and after 2023"):
        convert("brats", tmp_path / "d", "--dataset-id", 20)


def test_another_folder_is_refused(tmp_path, raw):
    nifti(tmp_path / "d" / "a.nii.gz", image())
    with pytest.raises(UserError, match=r"no file named CASE_flair.nii.gz or CASE-t2f.nii.gz"):
        convert("brats", tmp_path / "d", "--dataset-id", 20)
    with pytest.raises(UserError, match=r"nowhere is not a folder; unpack the download"):
        convert("brats", tmp_path / "nowhere", "--dataset-id", 20)
