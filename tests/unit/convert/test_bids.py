import json

import numpy as np
import pytest

from nnunet_multimodal.datasets.bids import Kind, parse_kind
from nnunet_multimodal.errors import UserError
from tests.unit.convert.trees import convert, image, label_map, nifti

FLAGS = (
    "--dataset-id", 40, "--channels", "FLAIR=FLAIR", "T1=T1w", "T1CE=T1w:ce-gadolinium",
    "--labels", "edema=2", "core=1+4",
)  # fmt: skip


@pytest.fixture
def tree(tmp_path):
    """Two subjects, one with two sessions; contrast agent as an entity; label maps in derivatives."""
    pytest.importorskip("ancpbids")
    root = tmp_path / "study"
    for stem in ("sub-01/ses-a", "sub-01/ses-b", "sub-02/ses-a"):
        name = stem.replace("/", "_")
        nifti(root / stem / "anat" / f"{name}_FLAIR.nii", image(0))
        nifti(root / stem / "anat" / f"{name}_T1w.nii.gz", image(1))
        nifti(root / stem / "anat" / f"{name}_ce-gadolinium_T1w.nii.gz", image(2))
        labels = root / "derivatives" / "masks" / stem / "anat"
        nifti(labels / f"{name}_label-lesion_dseg.nii.gz", label_map(1, 2, 4))
        nifti(labels / f"{name}_label-brain_dseg.nii.gz", label_map(1))
    description = {"Name": "study", "BIDSVersion": "1.8.0"}
    (root / "dataset_description.json").write_text(json.dumps(description))
    (root / "derivatives" / "masks" / "dataset_description.json").write_text(
        json.dumps({**description, "GeneratedBy": [{"Name": "hand"}]})
    )
    return root


def test_a_tree_with_label_maps_in_derivatives(tree, documented, raw, result, monkeypatch):
    monkeypatch.chdir(tree.parent)
    documented.run(lambda command: convert(*command[2:]), values={"STUDY": tree.name})
    data = result()
    assert data.folder.name == "Dataset040_study"
    cases = ["sub-01_ses-a", "sub-01_ses-b", "sub-02_ses-a"]
    assert data.names("labelsTr") == [f"{case}.nii.gz" for case in cases]
    for case in cases:
        for channel in range(3):
            np.testing.assert_array_equal(data.array(f"imagesTr/{case}_{channel:04d}"), image(channel))
        np.testing.assert_array_equal(data.array(f"labelsTr/{case}"), label_map(2, 1, 2))
    assert data.description["labels"] == {"background": 0, "edema": 1, "core": 2}
    # sessions of a subject stay together
    assert sorted(sorted(fold["val"]) for fold in data.splits) == [["sub-01_ses-a", "sub-01_ses-b"], ["sub-02_ses-a"]]
    data.verify()


def test_label_maps_in_a_folder_of_their_own(tree, raw, result, tmp_path):
    (tree / "derivatives" / "masks").rename(tmp_path / "drawn")
    convert("bids", tree, *FLAGS, "--derivatives", tmp_path / "drawn", "--label-pattern", "dseg:label-lesion")
    np.testing.assert_array_equal(result().array("labelsTr/sub-02_ses-a"), label_map(2, 1, 2))


def test_a_missing_modality(tree, raw, result):
    (tree / "sub-02/ses-a/anat/sub-02_ses-a_ce-gadolinium_T1w.nii.gz").unlink()
    flags = (*FLAGS, "--derivatives", "masks", "--label-pattern", "dseg:label-lesion")
    with pytest.raises(UserError, match="sub-02_ses-a lacks T1CE"):
        convert("bids", tree, *flags)
    convert("bids", tree, *flags, "--incomplete", "keep")
    assert result().is_placeholder("imagesTr/sub-02_ses-a_0002")


def test_several_files_of_a_modality_ask_for_an_entity(tree, raw):
    with pytest.raises(UserError, match=r"its label map: .*label-brain.*label-lesion.*, or name an entity"):
        convert("bids", tree, *FLAGS, "--derivatives", "masks")


def test_numbers_with_zeros_before_them(tree, raw, result):
    """ancpbids gives whole numbers for run-01 and its like, where the user writes what the file is called."""
    for file in sorted(tree.glob("sub-*/ses-*/anat/*_T1w.nii.gz")):
        entity = "_run-01_T1w" if "ce-gadolinium" in file.name else "_run-2_T1w"
        file.rename(file.with_name(file.name.replace("_ce-gadolinium", "").replace("_T1w", entity)))
    channels = ("--channels", "FLAIR=FLAIR", "T1=T1w:run-02", "T1CE=T1w:run-01")
    convert("bids", tree, *FLAGS, *channels, "--derivatives", "masks", "--label-pattern", "dseg:label-lesion")
    for channel in range(3):
        np.testing.assert_array_equal(result().array(f"imagesTr/sub-01_ses-a_{channel:04d}"), image(channel))


def test_what_the_tree_was_made_from_is_left_alone(tree, raw, result):
    for file in sorted(tree.glob("sub-*/ses-*/anat/*")):
        nifti(tree / "sourcedata" / file.relative_to(tree), image(9))
    convert("bids", tree, *FLAGS, "--derivatives", "masks", "--label-pattern", "dseg:label-lesion")
    np.testing.assert_array_equal(result().array("imagesTr/sub-01_ses-a_0001"), image(1))
    assert result().description["numTraining"] == 3


def test_a_pickle_of_a_stranger_is_not_loaded(tree, raw, tmp_path):
    ran = tmp_path / "ran"
    (tree / ".ancpbids-dataset.pickle").write_bytes(f"cos\nsystem\n(S'touch {ran}'\ntR.".encode())
    convert("bids", tree, *FLAGS, "--derivatives", "masks", "--label-pattern", "dseg:label-lesion")
    assert not ran.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--derivatives", "none"), r"none is not a folder; --derivatives names one"),
        ((), r"--derivatives is needed here"),
        (("--derivatives", "masks", "--channels", "DWI=dwi"), r"no training case|lacks any image"),
        (
            ("--derivatives", "masks", "--channels", "A=T1w:ce-GD:run-1", "B=T1w:run-01:ce-gd"),
            r"--channels: A and B are the same files",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tree, raw, flags, message):
    with pytest.raises(UserError, match=message):
        convert("bids", tree, *FLAGS, "--label-pattern", "dseg:label-lesion", *flags)
    assert not list(raw.iterdir())


@pytest.mark.parametrize(
    ("file", "entity"),
    [
        ("sub-ALS-2/anat/sub-ALS-2_FLAIR.nii", "sub-ALS"),
        ("sub-03/ses-pre-op/anat/sub-03_ses-pre-op_FLAIR.nii", "ses-pre"),
    ],
)
def test_names_that_are_read_in_part_are_refused(tree, raw, file, entity):
    """ancpbids takes sub-ALS-2 for sub-ALS."""
    nifti(tree / file, image())
    with pytest.raises(UserError, match=rf"{file}: ancpbids reads {entity}: BIDS has letters and digits alone"):
        convert("bids", tree, *FLAGS, "--derivatives", "masks", "--label-pattern", "dseg:label-lesion")


def test_kinds():
    assert parse_kind("T1w") == Kind("T1w", ())
    assert parse_kind("T1w:ce-Gd:run-01") == Kind("T1w", (("ce", "gd"), ("run", "1")))
    assert parse_kind("T1w:acq-01") == Kind("T1w", (("acq", "01"),))  # a name, not a number
    assert parse_kind("T1w:ce-Gd").fits("T1w", {"sub": "01", "ce": "GD"})
    assert not parse_kind("T1w:ce-Gd").fits("T1w", {"sub": "01"})
    assert not parse_kind("T1w").fits("T2w", {})
    for text in ("", ":ce-gd", "T1w:ce", "T1w:-gd"):
        with pytest.raises(UserError, match="give a BIDS suffix and its entities"):
            parse_kind(text)
