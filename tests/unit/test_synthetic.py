import json

import numpy as np
import pytest
import SimpleITK
from scipy.ndimage import binary_dilation, binary_erosion

from nnunet_multimodal.datasets import synthetic_brats
from nnunet_multimodal.datasets.synthetic import (
    INTENSITY,
    MODALITIES,
    SCALE,
    SHAPE,
    SPACING_MM,
    STRUCTURES,
    make_case,
    write_dataset,
)

CASES = 8


@pytest.fixture(scope="module")
def cases():
    return [make_case(0, index) for index in range(CASES)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw") / "Dataset900_Demo"
    write_dataset(folder, num_training=2, num_test=1, seed=3)
    return folder


def contrast(case, modality, label):
    """Mean intensity in a structure minus that of the structure around it, away from edges and from the corruption."""
    usable = case.corruption == 0 if modality == case.corrupted_modality else True
    whole = case.labels >= label
    inside = binary_erosion(case.labels == label) & usable
    around = binary_erosion(case.labels >= label - 1, border_value=1) & ~binary_dilation(whole)
    outside = around & binary_dilation(whole, iterations=4) & usable
    return (case.images[modality][inside].mean() - case.images[modality][outside].mean()) / SCALE


@pytest.mark.parametrize("label", range(1, len(STRUCTURES) + 1))
@pytest.mark.parametrize("modality", range(len(MODALITIES)))
def test_structure_has_its_contrast_and_none_where_it_is_invisible(cases, modality, label):
    measured = np.mean([contrast(case, modality, label) for case in cases])
    assert measured == pytest.approx(INTENSITY[modality, label] - INTENSITY[modality, label - 1], abs=0.06)


def test_every_structure_is_visible_in_two_modalities_and_every_modality_blind_to_one():
    visible = np.diff(INTENSITY, axis=1) != 0
    assert (visible.sum(axis=0) == 2).all()
    assert (visible.sum(axis=1) == 2).all()


def test_every_case_has_every_structure_in_a_size_that_can_be_found(cases):
    for case in cases:
        assert np.bincount(case.labels.ravel(), minlength=4).min() > 100


def test_only_the_corrupted_modality_is_noisy_in_the_ball(cases):
    for case in cases:
        ball = case.corruption == 1
        assert ball.sum() > 50
        noise = [np.diff(image / SCALE, axis=0)[ball[1:] & ball[:-1]].std() for image in case.images]
        assert np.argmax(noise) == case.corrupted_modality
        assert noise[case.corrupted_modality] > 0.3


def test_partial_volume_blurs_the_edges(cases):
    edge, middle = [], []
    for case in cases:
        organ = (case.labels == 1) & (case.corruption == 0)
        edge.append(case.images[0][organ & ~binary_erosion(case.labels >= 1)].mean() / SCALE)
        middle.append(case.images[0][organ & binary_erosion(case.labels >= 1, iterations=2)].mean() / SCALE)
    tissue, organ = INTENSITY[0, :2]
    assert np.mean(middle) == pytest.approx(organ, abs=0.03)
    # the organ fills half or more of its edge voxels, three quarters on average
    assert np.mean(edge) == pytest.approx(tissue + 0.75 * (organ - tissue), abs=0.05)


def test_same_seed_same_case_other_seed_other_case():
    case = make_case(0, 0)
    np.testing.assert_array_equal(case.images, make_case(0, 0).images)
    np.testing.assert_array_equal(case.labels, make_case(0, 0).labels)
    assert not np.array_equal(case.images, make_case(1, 0).images)
    assert not np.array_equal(case.labels, make_case(0, 1).labels)


def test_files_are_the_cases_on_one_grid(folder):
    case = make_case(3, 2)
    labels = SimpleITK.ReadImage(str(folder / "labelsTs" / "demo_002.nii.gz"))
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(labels), case.labels)
    assert labels.GetSize() == SHAPE[::-1]
    np.testing.assert_allclose(labels.GetSpacing(), SPACING_MM[::-1], rtol=1e-6)
    for channel in range(len(MODALITIES)):
        image = SimpleITK.ReadImage(str(folder / "imagesTs" / f"demo_002_{channel:04d}.nii.gz"))
        np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(image), case.images[channel])
        for geometry in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(image, geometry)() == getattr(labels, geometry)()


def test_dataset_json_names_what_is_there(folder):
    description = json.loads((folder / "dataset.json").read_text())
    assert list(description["channel_names"].values()) == list(MODALITIES)
    assert description["labels"] == {"background": 0, "organ": 1, "lesion": 2, "core": 3}
    assert description["numTraining"] == len(list((folder / "labelsTr").iterdir())) == 2
    assert not any(name.casefold() == "ct" for name in MODALITIES)


def test_an_existing_folder_is_refused_and_nothing_is_left_beside(folder):
    with pytest.raises(FileExistsError, match="Dataset900_Demo exists"):
        write_dataset(folder)
    assert [file.name for file in folder.parent.iterdir()] == [folder.name]


def test_negative_seed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="seed is -1"):
        write_dataset(tmp_path / "Dataset900_Demo", seed=-1)


def test_the_synthetic_download_is_that_of_brats_with_incomplete_test_cases(tmp_path):
    synthetic_brats.write_download(tmp_path / "download", num_training=1, num_test=4, seed=3)
    kinds = ["flair", "seg", "t1", "t1ce", "t2"]
    expected = [set(kinds), set(kinds), set(kinds) - {"flair"}, set(kinds), set(kinds) - {"t1"}]
    for index, parts in enumerate(expected):
        name = f"BraTS2021_{index:05d}"
        folder = tmp_path / "download" / ("ValidationData" if index else "TrainingData") / name
        assert {file.name for file in folder.iterdir()} == {f"{name}_{part}.nii.gz" for part in parts}
    images, labels = synthetic_brats.make_case(3, 4)  # as many as there are, whatever else is made
    stored = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folder / f"{name}_t2.nii.gz")))
    assert np.array_equal(stored, images[3])
    assert set(np.unique(labels)) == {0, 1, 2, 4}
    assert (images[:, labels > 0] > 0).all()
    assert (images == 0).all(0).mean() > 0.05
    assert np.array_equal((images == 0).any(0), (images == 0).all(0))
    with pytest.raises(FileExistsError):
        synthetic_brats.write_download(tmp_path / "download")


def test_every_pair_of_structures_differs_in_some_modality():
    images, labels = synthetic_brats.make_case(0, 0)
    for a, b in ((2, 1), (1, 4), (2, 4)):
        inside = [images[:, binary_erosion(labels == label)] for label in (a, b)]
        distance = np.abs(inside[0].mean(1) - inside[1].mean(1)) / inside[0].std(1)
        assert distance.max() > 2
