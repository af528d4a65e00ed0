"""Pictures of what predict wrote, from folders made by hand as it makes them."""

import json

import numpy as np
import pytest
import SimpleITK
from matplotlib.axes import Axes
from matplotlib.image import AxesImage, imread

from nnunet_multimodal import cli, sheets
from nnunet_multimodal.errors import UserError
from nnunet_multimodal.pictures import widest_slice

SHAPE, SPACING = (4, 12, 10), (1.0, 2.0, 3.0)  # (Z, Y, X); SimpleITK's (x, y, z)
SIZES = (2, 6, 3, 5)  # edges of the samples


def square(edge, label=1):
    labels = np.zeros(SHAPE, np.uint8)
    labels[2, 1 : 1 + edge, 1 : 1 + edge] = label
    return labels


def write(file, array):
    file.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(SPACING)
    SimpleITK.WriteImage(image, str(file))


def write_predictions(folder, temperature=1.0, weights=None, seed=0, class_scale=()):
    folder.mkdir()
    labels = {"background": 0, "tumour": 1}
    description = {"channel_names": {"0": "CT", "1": "PET"}, "labels": labels, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(description))
    (folder / "plans.json").write_text(json.dumps({"image_reader_writer": "SimpleITKIO"}))
    write(folder / "a.nii.gz", square(4))
    for number, edge in enumerate(SIZES):
        write(folder / "samples" / f"a__{number:03d}.nii.gz", square(edge))
    for name in ("entropy", "mutual_information"):
        write(folder / "uncertainty" / f"a_{name}.nii.gz", np.random.default_rng(0).random(SHAPE).astype(np.float32))
    summary = {"samples": len(SIZES), "sample_weights": weights, "temperature": temperature, "seed": seed}
    (folder / "a.json").write_text(json.dumps({**summary, "class_scale": list(class_scale)}))
    return folder


@pytest.fixture
def images(tmp_path):
    for channel in range(2):
        rng = np.random.default_rng(channel)
        write(tmp_path / "images" / f"a_{channel:04d}.nii.gz", rng.random(SHAPE).astype(np.float32))
    return tmp_path / "images"


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn: titles of the panels, and the label maps that are outlined."""
    found = {"titles": [], "outlined": []}

    def show_image(axis, image, title="", aspect=1.0):
        found["titles"].append(title)
        assert aspect == pytest.approx(SPACING[1] / SPACING[0])

    def outline(axis, labels, values, colour=None):
        found["outlined"].append(int((labels > 0).sum()))
        assert values == (1,)

    monkeypatch.setattr(sheets, "show_image", show_image)
    monkeypatch.setattr(sheets, "outline", outline)
    return found


def draw(images, output, *folders, more=()):
    return cli.main(["sheets", *map(str, folders), "-i", str(images), "-o", str(output), *map(str, more)])


def test_all_that_can_be_is_drawn(images, tmp_path):
    folder = write_predictions(tmp_path / "predictions")
    write(tmp_path / "labels" / "a.nii.gz", square(5))
    assert draw(images, tmp_path / "out", folder, more=("-ref", tmp_path / "labels")) == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a_samples.png", "a_uncertainty.png"]
    for file in (tmp_path / "out").iterdir():
        assert imread(file).std() > 0.05


def test_samples_are_spread_over_their_volumes(images, tmp_path, drawn):
    folder = write_predictions(tmp_path / "predictions")
    write(tmp_path / "labels" / "a.nii.gz", square(5))
    draw(images, tmp_path / "out", folder, more=("--kind", "samples", "--samples", 3, "-ref", tmp_path / "labels"))
    ml = {edge: f"{edge**2 * 6 / 1000:.3g} ml" for edge in (2, 4, 5, 6)}
    samples = [f"sample 0\n{ml[2]}", f"sample 3\n{ml[5]}", f"sample 1\n{ml[6]}"]
    assert drawn["titles"] == ["CT", "PET", f"reference\n{ml[5]}", f"prediction\n{ml[4]}", *samples]
    assert drawn["outlined"] == [25, 16, 4, 25, 36]


def test_ignored_voxels_are_neither_foreground_nor_wrong(images, tmp_path, drawn, monkeypatch):
    """Slice 0 is ignored in whole, and a part of slice 2."""
    folder = write_predictions(tmp_path / "predictions")
    description = json.loads((folder / "dataset.json").read_text())
    description["labels"]["ignore"] = 2
    (folder / "dataset.json").write_text(json.dumps(description))
    reference = square(5)
    reference[0], reference[2, :, 3] = 2, 2
    write(tmp_path / "labels" / "a.nii.gz", reference)
    wrong = []
    monkeypatch.setattr(
        Axes, "imshow", lambda axis, array, **options: wrong.append((array, options)) or AxesImage(axis)
    )
    draw(images, tmp_path / "out", folder, more=("--kind", "samples", "uncertainty", "-ref", tmp_path / "labels"))
    assert f"reference\n{20 * 6 / 1000:.3g} ml" in drawn["titles"]
    (shown,) = [array for array, options in wrong if options["cmap"] == "autumn"]
    expected = np.zeros(SHAPE[1:], bool)
    expected[1:6, 5] = expected[5, 1:6] = True
    expected[:, 3] = False
    np.testing.assert_array_equal(shown.filled(False), expected)


def test_the_widest_slice_is_that_of_labels_and_regions():
    label_map = square(3)
    label_map[0], label_map[1, :2] = 9, 2
    assert widest_slice([1], label_map) == 2
    assert widest_slice([(1, 2), 2], label_map) == 1
    assert widest_slice([3], None, label_map, square(2, 3)) == 2
    assert widest_slice([4], label_map) == 2  # the middle


def test_experts_stand_by_their_weights(images, tmp_path, drawn):
    folder = write_predictions(tmp_path / "predictions", weights=[0.1, 0.2, 0.4, 0.3])
    for rater, edge in (("x", 2), ("y", 3)):
        write(tmp_path / "raters" / f"a__{rater}.nii.gz", square(edge))
    more = ("--kind", "experts", "--samples", 2, "--raters", tmp_path / "raters")
    draw(images, tmp_path / "out", folder, more=more)
    assert [title.split("\n")[0] for title in drawn["titles"]] == [
        "CT", "PET", "x", "y", "prediction", "weight 0.40", "weight 0.30",
    ]  # fmt: skip
    assert drawn["outlined"] == [4, 9, 16, 9, 25]


def test_manipulated_samples_are_those_of_the_same_number(images, tmp_path, drawn):
    first = write_predictions(tmp_path / "first")
    second = write_predictions(tmp_path / "second", temperature=0.5, class_scale=["tumour=-2"])
    draw(images, tmp_path / "out", first, second, more=("--kind", "manipulated", "--samples", 2))
    assert drawn["outlined"] == [16, 16, 4, 36, 4, 36]
    assert [title.split("\n")[0] for title in drawn["titles"]] == [
        "mean", "mean", "T = 1", "T = 1", "T = 0.5 tumour=-2", "T = 0.5 tumour=-2",
    ]  # fmt: skip


def test_label_maps_are_drawn_over_the_modality_that_is_asked_for(images, tmp_path, monkeypatch):
    folder = write_predictions(tmp_path / "predictions")
    shown = []
    monkeypatch.setattr(sheets, "show_image", lambda axis, image, *more: shown.append(image))
    draw(images, tmp_path / "out", folder, more=("--kind", "samples", "--over", "PET"))
    pet = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(images / "a_0001.nii.gz")))[2]
    assert all(np.array_equal(image, pet) for image in shown[1:])
    with pytest.raises(UserError, match=r"--over MR: the modalities are CT, PET"):
        draw(images, tmp_path / "out", folder, more=("--over", "MR"))


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        ({}, ("--kind", "experts"), "samples without weights; predict with --compact"),
        ({}, ("--kind", "manipulated"), "give several folders"),
        ({}, ("--cases", "b"), "has no prediction of b; it has a"),
        ({}, ("--samples", "0"), "--samples 0: show at least one"),
        ({"seed": 1}, (), r"the folders' seed are \[0, 1\]; predict all with the same --seed"),
    ],
)
def test_what_does_not_fit_is_refused(images, tmp_path, change, more, message):
    folders = [write_predictions(tmp_path / "predictions")]
    if change:
        folders.append(write_predictions(tmp_path / "other", **change))
    with pytest.raises(UserError, match=message):
        draw(images, tmp_path / "out", *folders, more=more)


def test_a_reference_on_another_grid_is_refused(images, tmp_path):
    folder = write_predictions(tmp_path / "predictions")
    image = SimpleITK.GetImageFromArray(square(4))
    (tmp_path / "labels").mkdir()
    SimpleITK.WriteImage(image, str(tmp_path / "labels" / "a.nii.gz"))
    with pytest.raises(UserError, match=r"a.nii.gz has spacing"):
        draw(images, tmp_path / "out", folder, more=("-ref", tmp_path / "labels"))


def test_a_folder_without_samples_and_maps_is_refused(images, tmp_path):
    folder = write_predictions(tmp_path / "predictions")
    for file in [*folder.glob("samples/*"), *folder.glob("uncertainty/*")]:
        file.unlink()
    with pytest.raises(UserError, match=r"no samples: .* predict with --save-samples; no uncertainty"):
        draw(images, tmp_path / "out", folder)
