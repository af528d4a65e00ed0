import json
import multiprocessing
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace

import numpy as np
import pytest

from nnunet_multimodal.errors import UserError
from tests.unit.convert.trees import convert, image, label_map, nifti


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """nnU-Net's converter spawns processes, which import torch anew."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: SimpleNamespace(Pool=ThreadPool))


@pytest.fixture
def task(tmp_path):
    folder = tmp_path / "Task01_BrainTumour"
    description = {
        "name": "BRATS",
        "description": "Gliomas segmentation",
        "reference": "https://www.med.upenn.edu/sbia/brats2017.html",
        "modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"},
        "labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"},
        "numTraining": 2,
        "training": [],
        "test": [],
    }
    for number in (1, 2):
        nifti(folder / "imagesTr" / f"BRATS_00{number}.nii.gz", np.stack([image(number + c) for c in range(4)], -1))
        nifti(folder / "labelsTr" / f"BRATS_00{number}.nii.gz", label_map(1, 2, 3).astype(np.uint8))
    nifti(folder / "imagesTs" / "BRATS_485.nii.gz", np.stack([image(9 + c) for c in range(4)], -1))
    (folder / "imagesTr" / "._BRATS_001.nii.gz").write_bytes(b"macOS")
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def test_brain_tumour(documented, task, raw, result, monkeypatch):
    monkeypatch.chdir(task.parent)
    documented.run(lambda command: convert(*command[2:]), values={task.name: f"{task.name}/"})
    data = result()
    assert data.folder.name == "Dataset101_BrainTumour"
    assert data.names() == [f"BRATS_00{number}_{c:04d}.nii.gz" for number in (1, 2) for c in range(4)]
    for channel in range(4):
        np.testing.assert_array_equal(data.array(f"imagesTr/BRATS_002_{channel:04d}"), image(2 + channel))
        np.testing.assert_array_equal(data.array(f"imagesTs/BRATS_485_{channel:04d}"), image(9 + channel))
    np.testing.assert_array_equal(data.array("labelsTr/BRATS_001"), label_map(1, 2, 3))
    assert data.geometry("imagesTr/BRATS_001_0003") == data.geometry("labelsTr/BRATS_001")
    assert data.description["channel_names"] == {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}
    assert data.description["labels"]["enhancing tumour"] == 3
    assert data.description["numTraining"] == 2
    data.verify()


def test_the_source_is_left_as_it_is(task, raw):
    before = {file: file.read_bytes() for file in task.rglob("*") if file.is_file()}
    convert("msd", task, "--dataset-id", 101)
    assert {file: file.read_bytes() for file in task.rglob("*") if file.is_file()} == before


def test_an_image_that_does_not_arrive_is_said(task, raw, capsys):
    (task / "imagesTr" / "BRATS_002.nii.gz").unlink()
    (task / "labelsTr" / "BRATS_002.nii.gz").unlink()
    convert("msd", task, "--dataset-id", 101)
    assert "says 2 training cases, and here are 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: (t / "imagesTr" / "BRATS_001.nii.gz").write_bytes(b"no"), r"nnU-Net's converter says: "),
        (lambda t: (t / "dataset.json").write_text("{}"), r"dataset.json has no modality, labels"),
        (lambda t: (t / "imagesTs").rename(t / "other"), r"imagesTs is not there; unpack the whole download"),
        (lambda t: nifti(t / "labelsTr" / "BRATS_001.nii.gz", label_map(4)), r"labels 4, and 0, 1, 2, 3 are expected"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_written(task, raw, spoil, message):
    spoil(task)
    with pytest.raises(UserError, match=message):
        convert("msd", task, "--dataset-id", 101)
    assert not list(raw.iterdir())


def test_another_folder_is_refused(tmp_path, raw):
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=r"other: it is called 'other'; .* as in the download, such as Task01_Brain"):
        convert("msd", tmp_path / "other", "--dataset-id", 101)


def test_the_name_is_that_which_is_given(task, raw, result, monkeypatch):
    """A link's own, not that of the folder that it leads to."""
    task.rename(task.with_name("data"))
    (task.parent / "Task01_Link").symlink_to(task.with_name("data"))
    monkeypatch.chdir(task.parent / "data")
    with pytest.raises(UserError, match=r"\.: it is called 'data'"):
        convert("msd", ".", "--dataset-id", 101)
    convert("msd", "../Task01_Link/", "--dataset-id", 101)
    assert result().folder.name == "Dataset101_Link"
    result().verify()
