import json

import numpy as np
import pytest
import SimpleITK
from skimage import io

from nnunet_multimodal.errors import UserError
from tests.unit.convert.trees import convert

SIDE = 8


def crop(seed, kind=np.uint8):
    return (np.random.default_rng(seed).random((SIDE, SIDE)) * 200 + 1).astype(kind)


def mask(number, value=255, kind=np.uint8):
    """Rater 0 draws nothing, the others more and more."""
    array = np.zeros((SIDE, SIDE), kind)
    array[2 : 2 + number, 2:5] = value
    return array


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        io.imsave(path, array, check_contrast=False)


def read(folder, name):
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folder / name)))


def check(data, case, seed, ending=".png", suffix="Tr"):
    """Image, the four raters' masks, and more than half of four: what raters 2 and 3 agree on is no majority."""
    np.testing.assert_array_equal(read(data.folder, f"images{suffix}/{case}_0000{ending}"), crop(seed))
    for rater in range(4):
        drawn = read(data.folder, f"raters{suffix}/{case}__{rater}{ending}")
        np.testing.assert_array_equal(drawn, mask(rater, 1))
    votes = sum(mask(rater, 1).astype(int) for rater in range(4))
    np.testing.assert_array_equal(read(data.folder, f"labels{suffix}/{case}{ending}"), votes > 2)


def test_crops_of_the_hierarchical_u_net(documented, tmp_path, raw, result, capsys, monkeypatch):
    """Its split is kept: train and val are a fold, test is imagesTs."""
    cases = {}
    for seed, (split, patient) in enumerate((("train", "0001"), ("train", "0002"), ("val", "0003"), ("test", "0004"))):
        folder, patient = tmp_path / "lidc_crops" / split, f"LIDC-IDRI-{patient}"
        save(folder / "images" / patient / "z-105.0_c0.png", crop(seed))
        for rater in range(4):
            save(folder / "gt" / patient / f"z-105.0_c0_l{rater}.png", mask(rater))
        cases[f"{patient}_z-105_0_c0"] = split, seed
    monkeypatch.chdir(tmp_path)
    documented.run(lambda command: convert(*command[2:]))
    data = result()
    for case, (split, seed) in cases.items():
        check(data, case, seed, suffix="Ts" if split == "test" else "Tr")
    first, second, third, _ = cases
    assert data.splits == [{"train": [first, second], "val": [third]}]
    assert data.description["numTraining"] == 3
    assert data.table[third]["part"] == "val"
    assert (
        "next: nnUNetv2_plan_and_preprocess -d 30 -preprocessor_name MultimodalPreprocessor" in capsys.readouterr().out
    )
    data.verify()


def test_flat_crops(tmp_path, raw, result):
    """Without a split, patients stay together."""
    for patient in range(6):
        for number in range(2):
            name = f"LIDC-IDRI-{patient:04d}_z-120.{number}_c0"
            save(tmp_path / "d" / "images" / f"{name}.png", crop(patient))
            for rater in range(4):
                save(tmp_path / "d" / "lesions" / f"{name}_l{rater}.png", mask(rater))
    convert("lidc", tmp_path / "d", "--dataset-id", 30)
    check(result(), "LIDC-IDRI-0003_z-120_1_c0", 3)
    for fold in result().splits:
        assert not {name[:14] for name in fold["train"]} & {name[:14] for name in fold["val"]}


def test_a_folder_for_each_nodule(tmp_path, raw, result):
    """PNG of grey in RGB, masks of 0 and 1, and a nodule with three raters."""
    folder = tmp_path / "d" / "LIDC-IDRI-0001"
    for nodule, raters in ((0, 4), (1, 3)):
        save(folder / f"nodule-{nodule}" / "images" / "slice-0.png", np.stack([crop(nodule)] * 3, -1))
        for rater in range(raters):
            save(folder / f"nodule-{nodule}" / f"mask-{rater}" / "slice-0.png", mask(rater, 1))
    convert("lidc", tmp_path / "d", "--dataset-id", 30, "--link")
    data = result()
    check(data, "LIDC-IDRI-0001_nodule-0_slice-0", 0)
    table = data.table
    assert table["LIDC-IDRI-0001_nodule-0_slice-0"]["files"] == "4 hard link, 1 written"
    assert table["LIDC-IDRI-0001_nodule-1_slice-0"]["remarks"] == "3 raters; slice-0.png: grey of RGB"
    assert len(data.names("ratersTr")) == 7


@pytest.mark.parametrize(
    ("image", "masks", "case"),
    [
        ("Train/Image/0001/slice_7.npy", "Train/Mask/0001/slice_7_{}.npy", "0001_slice_7"),
        ("preprocessed/images/0001_5.npy", "preprocessed/labels/0001_5_{:02d}_mask.npy", "0001_5"),
    ],
)
@pytest.mark.parametrize("kind", [np.float64, np.uint8, bool])
def test_arrays(tmp_path, raw, result, capsys, image, masks, case, kind):
    """Floats stay floats, in NIfTI of two dimensions."""
    save(tmp_path / "d" / image, crop(3, np.float64) / 7)
    for rater in range(4):
        save(tmp_path / "d" / masks.format(rater), mask(rater, 1, kind))
    save(tmp_path / "d" / "Train/Mask/0001/slice_7_e.npy", mask(2, 1, kind))  # a consensus of theirs
    convert("lidc", tmp_path / "d", "--dataset-id", 30)
    data = result()
    found = SimpleITK.ReadImage(str(data.folder / "imagesTr" / f"{case}_0000.nii.gz"))
    assert found.GetDimension() == 2
    assert found.GetSpacing() == (1, 1)
    np.testing.assert_allclose(SimpleITK.GetArrayFromImage(found), crop(3, np.float64) / 7, rtol=1e-6)
    for rater in range(4):
        np.testing.assert_array_equal(read(data.folder, f"ratersTr/{case}__{rater}.nii.gz"), mask(rater, 1))
    np.testing.assert_array_equal(read(data.folder, f"labelsTr/{case}.nii.gz"), mask(1, 1))
    assert ("1 crops name no patient" in capsys.readouterr().out) == ("Train" not in image)
    data.verify()


@pytest.mark.parametrize(("kind", "kind_of_masks"), [(">i2", ">i4"), (">f4", "u1"), ("<i8", ">f8"), ("f2", "<u2")])
def test_arrays_of_other_byte_orders_and_with_an_axis_of_channels(tmp_path, raw, result, kind, kind_of_masks):
    save(tmp_path / "d" / "images" / "a.npy", crop(3, np.dtype(kind))[..., None])
    for rater in range(4):
        save(tmp_path / "d" / "labels" / f"a_{rater:02d}_mask.npy", mask(rater, 1, np.dtype(kind_of_masks)))
    convert("lidc", tmp_path / "d", "--dataset-id", 30)
    np.testing.assert_array_equal(read(result().folder, "imagesTr/a_0000.nii.gz"), crop(3, np.dtype(kind)))
    for rater in range(4):
        np.testing.assert_array_equal(read(result().folder, f"ratersTr/a__{rater}.nii.gz"), mask(rater, 1))
    result().verify()


def test_a_colour_image_and_a_grey_mask_of_probabilities_are_refused(tmp_path, raw):
    folder = tmp_path / "d" / "LIDC-IDRI-0001" / "nodule-0"
    save(folder / "images" / "slice-0.png", np.stack([crop(0), crop(1), crop(2)], -1))
    save(folder / "mask-0" / "slice-0.png", mask(2, 128))
    with pytest.raises(UserError, match=r"slice-0.png has 3 colours; split it"):
        convert("lidc", tmp_path / "d", "--dataset-id", 30)
    save(folder / "images" / "slice-0.png", crop(0))
    with pytest.raises(UserError, match=r"mask-0/slice-0.png: labels 128, and 0, 1, 255 are expected"):
        convert("lidc", tmp_path / "d", "--dataset-id", 30)


def test_pickled_arrays_are_not_loaded(tmp_path, raw):
    """They would run code."""
    save(tmp_path / "d" / "images" / "a.npy", np.array([{"a": 1}], dtype=object))
    save(tmp_path / "d" / "labels" / "a_00_mask.npy", mask(1, 1))
    with pytest.raises(UserError, match=r"a.npy cannot be read \(Object arrays cannot be loaded"):
        convert("lidc", tmp_path / "d", "--dataset-id", 30)


def test_another_tree_is_refused_with_the_layouts(tmp_path, raw):
    save(tmp_path / "d" / "a.png", crop(0))
    with pytest.raises(UserError, match=r"no images with masks beside them[\s\S]*mask-\{rater\}/\{slice\}.png"):
        convert("lidc", tmp_path / "d", "--dataset-id", 30)


def test_dataset_json_declares_a_nodule(tmp_path, raw, result):
    save(tmp_path / "d" / "LIDC-IDRI-0001" / "nodule-0" / "images" / "slice-0.png", crop(0))
    save(tmp_path / "d" / "LIDC-IDRI-0001" / "nodule-0" / "mask-0" / "slice-0.png", mask(2))
    convert("lidc", tmp_path / "d", "--dataset-id", 30)
    description = json.loads((result().folder / "dataset.json").read_text())
    assert description["labels"] == {"background": 0, "nodule": 1}
    assert description["file_ending"] == ".png"
