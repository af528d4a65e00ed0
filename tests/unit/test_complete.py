import json

import nibabel
import numpy as np
import pytest
import SimpleITK
import tifffile
from skimage import io

from nnunet_multimodal import cli, preprocessing
from nnunet_multimodal.errors import UserError
from nnunet_multimodal.images import geometry_difference
from nnunet_multimodal.preprocessing import PLACEHOLDER

CHANNELS = ("FLAIR", "T1", "T2")
SHAPE = (4, 5, 6)


def write_image(path, array=None, spacing=(1.0, 1.5, 2.0), origin=(3.0, -4.0, 5.0)):
    array = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32) if array is None else array
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    SimpleITK.WriteImage(image, str(path))


@pytest.fixture
def dataset(tmp_path):
    """Three cases: complete, without T1, with T2 alone."""
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
    description = {"channel_names": dict(enumerate(CHANNELS)), "labels": {"background": 0}, "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    for case, channels in (("a", (0, 1, 2)), ("b", (0, 2)), ("c", (2,))):
        for channel in channels:
            write_image(tmp_path / "imagesTr" / f"{case}_{channel:04d}.nii.gz")
        write_image(tmp_path / "labelsTr" / f"{case}.nii.gz", np.zeros(SHAPE, np.uint8))
    return tmp_path


def complete(folder, *more):
    return cli.main(["complete", str(folder), "-np", "1", *map(str, more)])


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_writes_placeholders_on_the_grid_of_the_others_and_a_table(dataset, capsys):
    images = dataset / "imagesTr"
    before = content(images)
    assert complete(images) == 0
    placeholder, image = (SimpleITK.ReadImage(str(images / f"b_{channel:04d}.nii.gz")) for channel in (1, 0))
    assert np.unique(SimpleITK.GetArrayFromImage(placeholder)).tolist() == [PLACEHOLDER]
    for geometry in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(placeholder, geometry)() == getattr(image, geometry)()
    assert (images / "modalities.csv").read_text() == "case,FLAIR,T1,T2\na,1,1,1\nb,1,0,1\nc,0,0,1\n"
    after = content(images)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"b_0001.nii.gz", "c_0000.nii.gz", "c_0001.nii.gz", "modalities.csv"}
    printed = capsys.readouterr().out
    assert "3 cases, 1 complete; cases with FLAIR 2, T1 1, T2 3" in printed
    assert "3 placeholders written" in printed


def test_undo_leaves_what_was_there_before(dataset):
    images = dataset / "imagesTr"
    before = content(images)
    complete(images)
    complete(images, "--undo")
    assert content(images) == before


def test_a_second_run_changes_nothing_and_takes_new_cases(dataset):
    images = dataset / "imagesTr"
    complete(images)
    before = content(images)
    complete(images)
    assert content(images) == before
    write_image(images / "d_0001.nii.gz")
    complete(images)
    assert (images / "modalities.csv").read_text().endswith("c,0,0,1\nd,0,1,0\n")


def test_an_interrupted_run_is_finished_by_the_next(dataset):
    images = dataset / "imagesTr"
    complete(images)
    expected = content(images)
    (images / "modalities.csv").unlink()  # written last
    (images / "c_0001.nii.gz").unlink()
    complete(images)
    assert content(images) == expected


def test_works_for_a_folder_to_predict_and_in_several_processes(dataset, tmp_path):
    images = tmp_path / "test"
    images.mkdir()
    write_image(images / "x_0001.nii.gz")
    write_image(images / "y_0000.nii.gz")
    (dataset / "dataset.json").rename(dataset / "other.json")
    with pytest.raises(UserError, match=r"test/dataset.json and .*dataset.json: not there; name .*--dataset-json"):
        complete(images)
    complete(images, "--dataset-json", dataset / "other.json", "-np", 2)
    assert sorted(path.name for path in images.glob("*.nii.gz")) == [
        f"{c}_{i:04d}.nii.gz" for c in "xy" for i in range(3)
    ]


def bad_nan(images):
    """SimpleITK reads zeros here."""
    image = nibabel.load(images / "a_0001.nii.gz")
    array = image.get_fdata(dtype=np.float32)
    array[0, 0, :2] = np.nan
    nibabel.save(nibabel.Nifti1Image(array, image.affine), images / "a_0001.nii.gz")


def bad_grid(images):
    write_image(images / "b_0002.nii.gz", spacing=(1.0, 1.5, 2.5))


def bad_placeholder(images):
    write_image(images / "b_0001.nii.gz", np.full((3, 5, 6), PLACEHOLDER, np.uint16))


def bad_case(images):
    (images / "c_0002.nii.gz").unlink()
    write_image(images / "c_0000.nii.gz", np.full(SHAPE, PLACEHOLDER, np.uint16))


def label_only(images):
    write_image(images.parent / "labelsTr" / "z.nii.gz", np.zeros(SHAPE, np.uint8))


def bad_manifest(images):
    (images / "modalities.csv").write_text("case,FLAIR,T1,T2\na,1,1,1\nb,1,1,0\n")


def manifest_of_other_cases(images):
    (images / "modalities.csv").write_text("case,FLAIR,T1,T2\nq,1,1,1\n")


def manifest_of_other_channels(images):
    (images / "modalities.csv").write_text("case,CT,PET\n")


def manifest_with_words(images):
    (images / "modalities.csv").write_text("case,FLAIR,T1,T2\na,yes,1,1\n")


def manifest_in_another_encoding(images):
    (images / "modalities.csv").write_text("case,FLAIR,T1,T2\na\xe4,1,1,1\n", encoding="latin-1")


def no_channel(images):
    write_image(images / "a.nii.gz")


def too_many_channels(images):
    write_image(images / "a_0003.nii.gz")


def several_channels_in_a_file(images):
    SimpleITK.WriteImage(
        SimpleITK.JoinSeries([SimpleITK.ReadImage(str(images / "c_0002.nii.gz"))] * 2), str(images / "c_0002.nii.gz")
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (bad_nan, r"a_0001.nii.gz: NaN in 2 voxels; give them a value"),
        (bad_grid, r"b_0002.nii.gz: image on another grid: b_0002.nii.gz has spacing .*resample it"),
        (bad_placeholder, r"b_0001.nii.gz: placeholder on another grid: b_0001.nii.gz has shape .*delete it"),
        (bad_case, r"imagesTr/c: no modality, all files \(c_0000.nii.gz\) are placeholders"),
        (label_only, r"labelsTr/z.nii.gz: its case has no modality in .*imagesTr"),
        (
            bad_manifest,
            r"b_0001.nii.gz is not there, and .*modalities.csv says it is there[\s\S]*b_0002.nii.gz is an image",
        ),
        (manifest_of_other_cases, r"modalities.csv has q, and there is no file of it"),
        (manifest_of_other_channels, r"begins with 'case,CT,PET', not 'case,FLAIR,T1,T2'"),
        (manifest_with_words, r"'a,yes,1,1' is not a case with 0 or 1"),
        (manifest_in_another_encoding, r"modalities.csv cannot be read \(.*can't decode.*\); save it as CSV in UTF-8"),
        (no_channel, r"a.nii.gz: no channel in its name; rename it to CASE_0000.nii.gz"),
        (too_many_channels, r"a_0003.nii.gz: channel 3, and the dataset has 0 to 2"),
        (several_channels_in_a_file, r"c_0002.nii.gz has 2 channels in one file; split it"),
    ],
)
def test_refuses_what_is_wrong_before_it_writes(dataset, spoil, message):
    images = dataset / "imagesTr"
    spoil(images)
    before = content(images)
    with pytest.raises(UserError, match=message):
        complete(images)
    assert content(images) == before


@pytest.mark.parametrize("spoil", [bad_grid, bad_nan, several_channels_in_a_file])
def test_undo_removes_placeholders_alone(dataset, spoil):
    images = dataset / "imagesTr"
    complete(images)
    (images / "modalities.csv").unlink()
    spoil(images)
    before = content(images)
    complete(images, "--undo")
    gone = {"b_0001.nii.gz", "c_0000.nii.gz", "c_0001.nii.gz"}
    assert content(images) == {name: value for name, value in before.items() if name not in gone}


def test_undo_keeps_an_image_that_took_a_placeholders_place(dataset):
    images = dataset / "imagesTr"
    complete(images)
    write_image(images / "b_0001.nii.gz")
    before = content(images)
    with pytest.raises(UserError, match=r"b_0001.nii.gz is an image, and .* says there is none; remove it or write 1"):
        complete(images, "--undo")
    assert content(images) == before


@pytest.mark.parametrize("ending", [".png", ".tif", ".nrrd", ".mha"])
def test_formats_of_nnunet(tmp_path, ending):
    """Through nnU-Net's own writers; 3D tiff has its spacing in a file beside."""
    names = {"channel_names": {"0": "A", "1": "B"}, "labels": {"background": 0}, "file_ending": ending}
    (tmp_path / "dataset.json").write_text(json.dumps(names))
    path = tmp_path / f"a_0001{ending}"
    if ending == ".png":
        io.imsave(path, np.arange(30, dtype=np.uint8).reshape(5, 6), check_contrast=False)
    elif ending == ".tif":
        tifffile.imwrite(path, np.random.default_rng(0).normal(size=(7, 8, 9)).astype(np.float32))
        (tmp_path / "a.json").write_text(json.dumps({"spacing": [3, 1, 1]}))
    else:
        write_image(path)
    before = content(tmp_path)
    complete(tmp_path)
    assert set(content(tmp_path)) - set(before) == {f"a_0000{ending}", "modalities.csv"}
    assert (tmp_path / "modalities.csv").read_text() == "case,A,B\na,0,1\n"
    complete(tmp_path)  # recognises its own
    complete(tmp_path, "--undo")
    assert content(tmp_path) == before


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_table_of_a_spreadsheet_is_read(dataset, encoding, monkeypatch):
    images = dataset / "imagesTr"
    description = json.loads((dataset / "dataset.json").read_text())
    channels = {"0": "FLAIR", "1": "T1 präop", "2": "T2"}
    (dataset / "dataset.json").write_text(json.dumps({**description, "channel_names": channels}))
    assert complete(images) == 0
    text = "case,FLAIR,T1 präop,T2\na,1,1,1\nb,1,0,1\nc,0,0,1\n"
    assert (images / "modalities.csv").read_bytes() == text.encode()
    (images / "modalities.csv").write_bytes(text.replace("\n", "\r\n").encode(encoding))
    assert complete(images) == 0
    monkeypatch.setattr(preprocessing, "nnUNet_raw", str(dataset.parent))
    assert preprocessing.cases_without(dataset.name, [[0], [1]]) == {"c"}


def test_grids_are_told_in_plain_numbers():
    of_numpy = {"spacing": np.array([3.0, 1.5]), "sitk_stuff": {"origin": np.array([0.0, 1.0]), "spacing": None}}
    other = {"spacing": (np.float64(3), 1.5), "sitk_stuff": {"origin": (np.float32(0.5), 1)}}
    said = geometry_difference("a", (4, 4), of_numpy, "b", (4, 4), other)
    assert said == "b has origin (0.5, 1.0) and a (0.0, 1.0)"
    assert geometry_difference("a", (4, 4), of_numpy, "b", (4, 4), of_numpy) == ""
