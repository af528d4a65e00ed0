import os
import re
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from PIL import Image

from nnunet_multimodal.datasets.base import (
    SourceCase,
    case_name,
    group_folds,
    is_test,
    list_files,
    named_part,
    parse_labels,
)
from nnunet_multimodal.datasets.pattern import compile_pattern
from nnunet_multimodal.datasets.prepare import remap_labels
from nnunet_multimodal.errors import UserError
from tests.unit.convert.trees import convert, image, label_map, nifti

checked = settings(deadline=None, derandomize=True, database=None, max_examples=60)


def write(folder, *names, array=None):
    for seed, name in enumerate(names):
        nifti(folder / name, image(seed) if array is None else array)


def test_names_with_separators_in_them(tmp_path, raw, result):
    """The channels are known, so a case may have _ in its name, and a channel too; case does not matter."""
    write(tmp_path / "d", "site_01/site_01_T1.nii.gz", "Site_01/site_01_ce_t1.nii.gz", "site_01/notes_t2.nii.gz")
    write(tmp_path / "d", "site_01/site_01_mask.nii.gz", array=label_map(3, 7))
    flags = ("--pattern", "{case}/{case}_{channel}.nii.gz", "--label-pattern", "{case}/{case}_mask.nii.gz")
    convert("pattern", tmp_path / "d", "--dataset-id", 7, *flags, "--channels", "T1=t1", "T1CE=ce_t1", "--labels",
            "b=7", "a=3")  # fmt: skip
    data = result()
    assert [name.lower() for name in data.names()] == ["site_01_0000.nii.gz", "site_01_0001.nii.gz"]
    case = data.names()[0].removesuffix("_0000.nii.gz")
    np.testing.assert_array_equal(data.array(f"imagesTr/{case}_0000"), image(0))
    np.testing.assert_array_equal(data.array(f"imagesTr/{case}_0001"), image(1))
    np.testing.assert_array_equal(data.array(f"labelsTr/{case}"), label_map(2, 1))
    assert data.description["labels"] == {"background": 0, "b": 1, "a": 2}


def test_the_documented_command(documented, tmp_path, raw, result, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "DATA", "a/a_flair.nii.gz", "a/a_t1.nii.gz")
    write(tmp_path / "DATA", "a/a_seg.nii.gz", array=label_map(1, 2, 4))
    documented.run(lambda command: convert(*command[2:]))
    np.testing.assert_array_equal(result().array("labelsTr/a"), label_map(2, 1, 2))


def test_raters_and_patients(tmp_path, raw, result):
    for patient in ("p1", "p2"):
        for scan in ("s1", "s2"):
            write(tmp_path / "d", f"images/{patient}/{scan}_mr.nii.gz")
            for rater in ("anna", "ben", "eva"):
                drawn = label_map(1) if rater != "eva" else label_map()
                write(tmp_path / "d", f"masks/{patient}/{scan}_{rater}_v2.nii.gz", array=drawn)
    flags = (
        "--pattern", "images/{patient}/{case}_mr.nii.gz", "--label-pattern", "masks/{patient}/{case}_{rater}_v*.nii.gz",
        "--channels", "MR", "--labels", "lesion=1",
    )  # fmt: skip
    convert("pattern", tmp_path / "d", "--dataset-id", 7, *flags)
    data = result()
    assert data.names("ratersTr")[:3] == [f"p1_s1__{rater}.nii.gz" for rater in ("anna", "ben", "eva")]
    np.testing.assert_array_equal(data.array("labelsTr/p1_s1"), label_map(1))  # two of three
    np.testing.assert_array_equal(data.array("ratersTr/p2_s2__eva"), label_map())
    assert sorted(sorted(fold["val"]) for fold in data.splits) == [["p1_s1", "p1_s2"], ["p2_s1", "p2_s2"]]
    data.verify()


def test_test_folders_become_test_images(tmp_path, raw, result):
    for folder, case in (("train", "a"), ("test", "b")):
        write(tmp_path / "d", f"{folder}/{case}_mr.nii.gz")
        write(tmp_path / "d", f"{folder}/{case}_seg.nii.gz", array=label_map(1))
    flags = ("--pattern", "*/{case}_mr.nii.gz", "--label-pattern", "*/{case}_seg.nii.gz", "--channels", "MR")
    convert("pattern", tmp_path / "d", "--dataset-id", 7, *flags, "--labels", "lesion=1")
    assert result().names("labelsTr") == ["a.nii.gz"]
    assert result().names("labelsTs") == ["b.nii.gz"]


PARTS = ("--pattern", "*/{case}_mr.nii.gz", "--label-pattern", "*/{case}_seg.nii.gz", "--channels", "MR")


def convert_parts(folder, **parts):
    """Cases by folder; those in capitals have no label map."""
    for part, cases in parts.items():
        for case in cases:
            write(folder / part, f"{case.lower()}_mr.nii.gz")
            if case.islower():
                write(folder / part, f"{case}_seg.nii.gz", array=label_map(1))
    convert("pattern", folder, "--dataset-id", 7, *PARTS, "--labels", "lesion=1")


@pytest.mark.parametrize(
    ("train", "validation"), [("train", "val"), ("Training", "validation"), ("imagesTr", "imagesVa")]
)
def test_a_train_and_a_validation_folder_are_the_split(tmp_path, raw, result, train, validation):
    convert_parts(tmp_path / "d", **{train: "ab", validation: "cd", "test": "eF", "more": "g"})
    data = result()
    assert data.names("labelsTr") == [f"{case}.nii.gz" for case in "abcdg"]
    assert data.names("imagesTs") == ["e_0000.nii.gz", "f_0000.nii.gz"]
    assert data.names("labelsTs") == ["e.nii.gz"]
    assert data.splits == [{"train": ["a", "b", "g"], "val": ["c", "d"]}]
    assert [data.table[case]["part"] for case in "abcdefg"] == ["train"] * 2 + ["val"] * 2 + ["test"] * 2 + ["train"]


@pytest.mark.parametrize("validation", ["val", "validation"])
def test_a_validation_folder_without_label_maps_is_one_of_test_images(tmp_path, raw, result, validation):
    convert_parts(tmp_path / "d", **{"train": "ab", validation: "CD"})
    assert result().names("imagesTs") == ["c_0000.nii.gz", "d_0000.nii.gz"]
    assert not (result().folder / "splits_final.json").exists()


def test_a_validation_folder_that_lacks_a_label_map_is_refused(tmp_path, raw):
    with pytest.raises(UserError, match="d lacks a label map"):
        convert_parts(tmp_path / "d", train="ab", val="cD")


def test_a_validation_folder_without_a_training_folder(tmp_path, raw, result):
    """Test images, or if it is only called val, which may be a place, what all others are."""
    convert_parts(tmp_path / "d", **{"Lyon": "ab", "Val-de-Grace": "c", "validation": "d"})
    assert result().names("labelsTr") == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]
    assert result().names("labelsTs") == ["d.nii.gz"]
    assert not (result().folder / "splits_final.json").exists()


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("train/a.png", "train"),
        ("imagesTr/a.png", "train"),
        ("MICCAI_BraTS2020_TrainingData/a.png", "train"),
        ("val/images/a.png", "val"),
        ("images/val/a.png", "val"),
        ("labelsVa/a.png", "val"),
        ("valid_1/a.png", "val"),
        ("validation_study/train/a.png", "train"),
        ("train/ct_test/a.png", "test"),
        ("test/train_001/a.png", "test"),
        ("labelsTs/a.png", "test"),
        ("trainee/valuable/contest/train.png", ""),
    ],
)
def test_folders_name_parts(path, part):
    assert named_part([PurePosixPath(path)]) == part


def test_links_to_folders_are_followed(tmp_path):
    """Patients that lie elsewhere, and links that lead round in a circle."""
    for name in ("elsewhere/p2/a.nii", "elsewhere/p2/b/c.nii", "d/p1/a.nii", "d/.hidden/a.nii"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "d" / "p2").symlink_to(tmp_path / "elsewhere" / "p2")
    (tmp_path / "d" / "p1" / "up").symlink_to("..")
    (tmp_path / "elsewhere" / "p2" / "b" / "back").symlink_to(tmp_path / "elsewhere" / "p2")
    (tmp_path / "linked").symlink_to(tmp_path / "d")
    for root in ("d", "linked"):
        found = [file.as_posix() for file in list_files(tmp_path / root)]
        assert found == ["p1/a.nii", "p2/a.nii", "p2/b/c.nii"]


@pytest.mark.parametrize("ending", ["mha", "nrrd"])
def test_other_formats_become_nifti(tmp_path, raw, result, ending):
    (tmp_path / "d").mkdir()
    for name, array in (("a_mr", image()), ("a_seg", label_map(1))):
        file = SimpleITK.ReadImage(str(nifti(tmp_path / "nifti" / f"{name}.nii.gz", array)))
        SimpleITK.WriteImage(file, str(tmp_path / "d" / f"{name}.{ending}"))
    flags = ("--pattern", f"{{case}}_mr.{ending}", "--label-pattern", f"{{case}}_seg.{ending}", "--channels", "MR")
    convert("pattern", tmp_path / "d", "--dataset-id", 7, *flags, "--labels", "lesion=1", "--link")
    data = result()
    np.testing.assert_array_equal(data.array("imagesTr/a_0000"), image())
    np.testing.assert_array_equal(data.array("labelsTr/a"), label_map(1))
    file = SimpleITK.ReadImage(str(tmp_path / "nifti" / "a_mr.nii.gz"))
    assert data.geometry("imagesTr/a_0000") == (
        file.GetSize(),
        file.GetSpacing(),
        file.GetOrigin(),
        file.GetDirection(),
    )
    assert data.table["a"]["files"] == "2 written"


def test_a_png_has_no_grid(tmp_path, raw, result):
    """Its resolution is that of a printer: images of 72 and 300 dpi fit together."""
    rgb = np.random.default_rng(0).integers(0, 255, (6, 5), np.uint8)
    (tmp_path / "d").mkdir()
    Image.fromarray(rgb).save(tmp_path / "d" / "a_x.png", dpi=(72, 72))
    Image.fromarray(rgb // 2).save(tmp_path / "d" / "a_y.png", dpi=(300, 300))
    Image.fromarray((rgb > 99).astype(np.uint8)).save(tmp_path / "d" / "a_seg.png")
    flags = ("--pattern", "{case}_{channel}.png", "--label-pattern", "{case}_seg.png", "--channels", "X=x", "Y=y")
    convert("pattern", tmp_path / "d", "--dataset-id", 7, *flags, "--labels", "lesion=1", "--link")
    data = result()
    assert data.table["a"]["files"] == "3 hard link"
    np.testing.assert_array_equal(data.array("imagesTr/a_0001").T, rgb // 2)
    data.verify()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--pattern", "{case}_x.nii.gz"), r"fits nothing in .*, where there are a_b.nii.gz, a_mr.nii.gz"),
        (("--pattern", "{name}.nii.gz"), r"there is no \{name\}; there are \{case\}, \{channel\}"),
        (("--pattern", "{case"), r"a brace is not closed"),
        (("--pattern", "a_{channel}.nii.gz"), r"needs \{case\}"),
        (("--pattern", "{case}_mr.nii.gz", "--channels", "A=a", "B=b"), r"needs \{case\}, and \{channel\} where"),
        (("--pattern", "{case}_mr.nii.gz", "--label-pattern", "seg.nii.gz"), r"--label-pattern .* needs \{case\}"),
        ((), r"--pattern is needed here"),
        (("--pattern", "{case}.nii.gz", "--labels", "a=0"), r"0 is given twice, or is 0, which is background"),
        (("--pattern", "{case}.nii.gz", "--labels", "a=1", "b=1+2"), r"1 is given twice"),
        (("--pattern", "{case}.nii.gz", "--labels", "a=one"), r"'one' is not a whole number"),
        (("--pattern", "{case}.nii.gz", "--channels", "A=", "B"), r"--channels 'A=': give NAME=TEXT"),
        (("--pattern", "*{case}*", "--channels", "A"), r"two files are its image A"),
        (("--pattern", "{case}_{channel}", "--channels", "A=mr", "B=MR"), r"--channels B=MR: A has this text"),
        (("--pattern", "{case}.nii.gz", "--labels", "ignore=5"), r"--labels ignore=5: nothing to learn"),
    ],
)
def test_flags_that_do_not_fit_are_refused(tmp_path, raw, flags, message):
    write(tmp_path / "d", "a_mr.nii.gz", "a_b.nii.gz")
    with pytest.raises(UserError, match=message):
        convert("pattern", tmp_path / "d", "--dataset-id", 7, "--channels", "MR", "--labels", "lesion=1", *flags)
    assert not list(raw.iterdir())


# --- names

FOLDERS = ("--pattern", "{case}/mr.nii.gz", "--label-pattern", "{case}/by_{rater}.nii.gz", "--channels", "MR")


def convert_folders(folder, *files, more=()):
    write(folder, *(file for file in files if file.endswith("mr.nii.gz")))
    write(folder, *(file for file in files if not file.endswith("mr.nii.gz")), array=label_map(1))
    return convert("pattern", folder, "--dataset-id", 7, *FOLDERS, "--labels", "lesion=1", *more)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("Москва/mr.nii.gz",), r"d/Москва/mr.nii.gz: case 'Москва' has no letter or digit of ASCII; rename"),
        (("-/mr.nii.gz",), r"case '-' has no letter"),
        (("a/mr.nii.gz", "a/by_Анна.nii.gz"), r"d/a/by_Анна.nii.gz: rater 'Анна' has no letter or digit"),
        (
            ("Müller/mr.nii.gz", "Mäller/mr.nii.gz"),
            r"cases 'Mäller' \(.*d/Mäller/mr.nii.gz\) and 'Müller' \(.*\) would both be called M_ller; rename one",
        ),
        (("Киев 1/mr.nii.gz", "Москва 1/by_a.nii.gz"), r"'Киев 1' .* and 'Москва 1' .* would both be called 1;"),
        (
            ("a/mr.nii.gz", "a/by_Jörg.nii.gz", "b/mr.nii.gz", "b/by_J rg.nii.gz"),
            r"raters 'Jörg' .* and 'J rg' .* J_rg;",
        ),
    ],
)
def test_names_that_nnunet_cannot_have_or_that_become_one_are_refused(tmp_path, raw, files, message):
    with pytest.raises(UserError, match=message):
        convert_folders(tmp_path / "d", *files)
    assert not list(raw.iterdir())


def test_names_become_nnunets(tmp_path, raw, result):
    """Capitals make no difference, and a foreign name that is the only one of its letters is kept."""
    convert_folders(
        tmp_path / "d", "Müller 1/mr.nii.gz", "Müller 1/by_Eva B.nii.gz", "b/mr.nii.gz", "B/by_eva b.nii.gz"
    )
    (rater,) = {name.split("__")[1] for name in result().names("ratersTr")}
    assert rater.lower() == "eva_b.nii.gz"
    assert [name.lower() for name in result().names("labelsTr")] == ["b.nii.gz", "m_ller_1.nii.gz"]


def test_both_of_two_files_are_shown_from_the_same_place(tmp_path, raw, monkeypatch):
    write(tmp_path / "d", "x/a_mr.nii.gz", "y/a_mr.nii.gz")
    monkeypatch.chdir(tmp_path)
    flags = ("--pattern", "*/{case}_mr.nii.gz", "--channels", "MR", "--labels", "lesion=1")
    with pytest.raises(UserError, match=r"^a: two files are its image MR: d/x/a_mr.nii.gz and d/y/a_mr.nii.gz; move"):
        convert("pattern", "d", "--dataset-id", 7, *flags)


@pytest.mark.parametrize("name", [b"M\xfcller.nii.gz", b"M\xfcller/by_a.nii.gz"])
def test_names_that_are_not_utf_8_are_refused(tmp_path, name):
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/d/" + name))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError:
        pytest.skip("this file system has no such names")
    with pytest.raises(UserError, match=r"M\\udcfcller.*a name that is not UTF-8; rename it, or .*convmv"):
        list_files(tmp_path / "d")


def test_a_data_set_is_called_as_the_folder_is_given(tmp_path, raw):
    files = ("a/mr.nii.gz", "a/by_eva.nii.gz")
    (tmp_path / "mine").symlink_to(tmp_path / "Данные")
    with pytest.raises(UserError, match=r"Данные: its name has no letter or digit of ASCII; name the data set with"):
        convert_folders(tmp_path / "Данные", *files)
    convert_folders(tmp_path / "mine", *files)
    assert [folder.name for folder in raw.iterdir()] == ["Dataset007_mine"]


def test_ignored_voxels_have_the_highest_label(tmp_path, raw, result):
    """As nnU-Net demands; with raters, whose majority may be to ignore."""
    for rater in ("anna", "ben", "eva"):
        write(tmp_path / "d", f"a/by_{rater}.nii.gz", array=label_map(5, 1, 2))
    convert_folders(tmp_path / "d", "a/mr.nii.gz", more=("--labels", "ignore=5", "t=1", "u=2"))
    labels = result().description["labels"]
    assert labels == {"background": 0, "t": 1, "u": 2, "ignore": 3}
    assert LabelManager(labels, None).ignore_label == 3
    np.testing.assert_array_equal(result().array("labelsTr/a"), label_map(3, 1, 2))


# --- what holds whatever the names and values

words = st.text("abcXYZ019-_.", min_size=1, max_size=8)


@checked
@given(case=words, channel=words, others=st.lists(words, max_size=3), folder=words)
def test_a_pattern_finds_what_was_written_by_it(case, channel, others, folder):
    """Where a name can be read in one way alone: case and channel as in 'CASE/CHANNEL'."""
    pattern = compile_pattern("{case}/*/{case}@{channel}.nii.gz", {"channel": [*others, channel]})
    match = pattern.fullmatch(f"{case}/{folder}/{case}@{channel}.nii.gz")
    assert match is not None
    assert (match["case"], match["channel"]) == (case, channel)
    assert pattern.fullmatch(f"{case}/{folder}/{case}.@{channel}.nii.gz") is None  # not the same case twice
    assert pattern.fullmatch(f"{case}/{folder}/{folder}/{case}@{channel}.nii.gz") is None  # * is no slash


@checked
@given(literal=st.text(st.characters(exclude_characters="{}*/", exclude_categories=["Cs"]), max_size=12), case=words)
def test_what_is_not_a_field_stands_for_itself(literal, case):
    pattern = compile_pattern(literal + "{case}", {"case": [case]})
    assert pattern.fullmatch(literal + case)
    assert not pattern.fullmatch(literal + case + "x")


@checked
@given(
    values=st.dictionaries(st.integers(0, 2000) | st.integers(65530, 10**6), st.integers(0, 300), min_size=1),
    kind=st.sampled_from([np.int16, np.uint16, np.int64, np.float32, np.float64]),
    data=st.data(),
)
def test_labels_are_those_of_a_dictionary(values, kind, data):
    kind = np.dtype(kind).type if max(values) <= 2000 or np.dtype(kind).itemsize > 2 else np.int32
    shape = data.draw(array_shapes(max_dims=3, max_side=4))
    labels = data.draw(arrays(kind, shape, elements=st.sampled_from([kind(value) for value in values])))
    found = remap_labels(labels, values)
    assert found.shape == labels.shape
    assert found.dtype == (np.uint16 if max(values.values()) > 255 else np.uint8)
    for before, after in zip(labels.ravel().tolist(), found.ravel().tolist(), strict=True):
        assert after == values[int(before)]


@checked
@given(values=st.dictionaries(st.integers(0, 2000), st.integers(0, 300), min_size=1), value=st.integers(-5, 70000))
def test_a_label_that_is_not_expected_is_named(values, value):
    labels = np.array([min(values), value])
    if value in values:
        assert remap_labels(labels, values).tolist() == [values[min(values)], values[value]]
    else:
        with pytest.raises(UserError, match=rf"labels {value}, and"):
            remap_labels(labels, values)


@checked
@given(value=st.integers(0, 1000), error=st.floats(-0.4, 0.4))
def test_rounding_is_mended_and_fractions_are_not(value, error):
    labels = np.array([value + error], np.float64)
    if abs(labels[0] - value) <= 1e-3:
        assert remap_labels(labels, {value: 1}).tolist() == [1]
    else:
        with pytest.raises(UserError, match="is no whole number"):
            remap_labels(labels, {value: 1})


@checked
@given(st.lists(st.lists(st.integers(1, 10**6), min_size=1, max_size=3), min_size=1, max_size=5))
def test_labels_are_numbered_in_their_order(groups):
    flat = [value for group in groups for value in group]
    texts = [f"l{number}={'+'.join(map(str, group))}" for number, group in enumerate(groups)]
    if len(set(flat)) < len(flat):
        with pytest.raises(UserError, match="is given twice"):
            parse_labels(texts)
        return
    labels, values = parse_labels(texts)
    assert list(labels.values()) == list(range(len(groups) + 1))  # consecutive from 0, as nnU-Net wants them
    assert values == {0: 0, **{value: number for number, group in enumerate(groups, 1) for value in group}}


@checked
@given(st.lists(st.integers(0, 7), min_size=1, max_size=30))
def test_folds_keep_groups_together_and_use_every_case_once(groups):
    cases = [SourceCase(f"c{number:02d}", {}, group=f"g{group}") for number, group in enumerate(groups)]
    folds = group_folds(cases)
    if len(set(groups)) in (1, len(groups)):
        assert folds is None
        return
    group_of = {case.name: case.group for case in cases}
    assert len(folds) == min(5, len(set(groups)))
    assert sorted(name for fold in folds for name in fold["val"]) == [case.name for case in cases]
    for fold in folds:
        assert sorted(fold["train"] + fold["val"]) == [case.name for case in cases]
        assert not {group_of[name] for name in fold["train"]} & {group_of[name] for name in fold["val"]}


@checked
@given(st.text(st.characters(max_codepoint=400), max_size=20))
def test_case_names_are_of_harmless_characters(text):
    assert re.fullmatch(r"[A-Za-z0-9_-]*", case_name(text))


@pytest.mark.parametrize(
    ("path", "test"),
    [
        ("imagesTs/a.nii.gz", True),
        ("hecktor2022_testing/imagesTs/a.nii.gz", True),
        ("MICCAI_BraTS2020_ValidationData/BraTS20_Validation_001/a.nii", True),
        ("BraTS20_Validation_001/a.nii", True),
        ("ct_test/a.nii.gz", True),
        ("test01/a.nii.gz", True),
        ("imagesTr/test.nii.gz", False),
        ("Testicular/latest/contest/a.nii.gz", False),
        ("MICCAI_BraTS2020_TrainingData/a.nii.gz", False),
    ],
)
def test_folders_of_test_images(path, test):
    assert is_test(PurePosixPath(path)) == test
