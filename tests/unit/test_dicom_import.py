"""Many files: which are a series, which series a channel, which channels a case."""

import json
import shutil

import numpy as np
import pytest

from nnunet_multimodal import cli
from nnunet_multimodal.errors import UserError
from tests.dicom import (
    AXIAL,
    CASE,
    CT,
    FDG,
    PET,
    import_series,
    refused,
    uid,
    values,
    volume,
    voxel_position,
    write_series,
)
from tests.unit.test_dicom_series import missing

pydicom = pytest.importorskip("pydicom", reason="the extra 'dicom' is not installed")
pytest.importorskip("highdicom", reason="the extra 'dicom' is not installed")


# which files, which series, which case


def test_any_tree_of_files(tmp_path):
    """Names and folders say nothing; DICOMDIR, reports and files of other kinds are left alone."""
    stored = volume()
    files = write_series(tmp_path / "src" / "a", stored, names=lambda index: f"IM{index}")
    shutil.move(files[1], tmp_path / "src" / "elsewhere")
    (tmp_path / "src" / "a" / "notes.txt").write_text("no DICOM")
    (tmp_path / "src" / "empty").touch()
    report = pydicom.Dataset()
    report.SOPClassUID, report.SOPInstanceUID, report.Modality = "1.2.840.10008.5.1.4.1.1.88.11", uid("sr"), "SR"
    report.SeriesInstanceUID, report.file_meta = uid("reports"), pydicom.dcmread(files[0]).file_meta
    report.file_meta.MediaStorageSOPClassUID, report.file_meta.MediaStorageSOPInstanceUID = (
        report.SOPClassUID,
        uid("sr"),
    )
    report.save_as(tmp_path / "src" / "report.dcm", enforce_file_format=True)
    index = pydicom.data.get_testdata_file("DICOMDIR", download=False)
    if index is not None:  # not all of pydicom's packages hold it
        shutil.copy(index, tmp_path / "src" / "DICOMDIR")
    import_series(tmp_path, "--channels", CT)
    np.testing.assert_array_equal(values(tmp_path), stored)


def test_a_file_that_is_there_twice_counts_once(tmp_path):
    stored = volume()
    files = write_series(tmp_path / "src", stored)
    shutil.copy(files[3], tmp_path / "src" / "again.dcm")
    import_series(tmp_path, "--channels", CT)
    np.testing.assert_array_equal(values(tmp_path), stored)
    record = json.loads((tmp_path / "out" / f"{CASE}.json").read_text())
    assert record["channels"][0]["remarks"] == ["1 files are there twice"]


def test_two_contents_of_one_instance_are_refused(tmp_path):
    files = write_series(tmp_path / "src", volume())
    dataset = pydicom.dcmread(files[3])
    dataset.PixelData = bytes(len(dataset.PixelData))
    dataset.save_as(tmp_path / "src" / "again.dcm")
    assert "one SOPInstanceUID" in refused(tmp_path, "--channels", CT)


@pytest.mark.parametrize(
    ("rule", "number"),
    [
        ("SeriesDescription~^t1.*gd", 2),
        ("SeriesDescription==t1 pre", 1),  # upper and lower case are one
        ("EchoTime==90.0", 3),
        ("Modality==MR & SeriesDescription!~t1", 3),
        (r"ImageType~\\PRIMARY\\OTHER$ & EchoTime!=90", 2),
    ],
)
def test_rules_choose(tmp_path, rule, number):
    kinds = {1: ("T1 pre", 10, "AXIAL"), 2: ("T1 post Gd", 11, "OTHER"), 3: ("FLAIR", 90, "OTHER")}
    stored = {key: volume(seed=key) for key in kinds}
    for key, (description, echo, kind) in kinds.items():
        write_series(
            tmp_path / "src" / str(key),
            stored[key],
            "MR",
            number=key,
            SeriesDescription=description,
            EchoTime=echo,
            ImageType=["ORIGINAL", "PRIMARY", kind],
        )
    import_series(tmp_path, "--channels", f"X={rule}")
    np.testing.assert_array_equal(values(tmp_path), stored[number])


def test_ambiguous_rules_name_the_candidates(tmp_path):
    for number in (1, 2):
        write_series(tmp_path / "src" / str(number), volume(), number=number)
    message = refused(tmp_path, "--channels", CT)
    assert "2 series are CT (Modality==CT)" in message
    assert "'CT 1'" in message
    assert "'CT 2'" in message


def test_rules_that_choose_nothing_name_what_there_is(tmp_path):
    write_series(tmp_path / "src", volume())
    message = refused(tmp_path, "--channels", CT, PET)
    assert "no series is PET (Modality==PT)" in message
    assert "'CT 1', 6 files" in message


def test_a_series_for_two_channels_is_refused(tmp_path):
    write_series(tmp_path / "src", volume())
    assert "one series is CT and X" in refused(tmp_path, "--channels", CT, "X=SeriesNumber==1")


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("CT=Modality", "is no condition"),
        ("CT=Modality==", "is no condition"),
        ("CT=Modalty==CT", "no attribute Modalty"),
        ("CT=SeriesDescription~(", "no regular expression"),
        ("CT", "is no condition"),
    ],
)
def test_rules_of_another_form_are_refused(tmp_path, rule, said):
    assert said in refused(tmp_path, "--channels", rule)


def test_cases_are_patients_and_days(tmp_path):
    stored = {}
    for patient, study in (("A 1", "20200101"), ("A 1", "20200301"), ("B", "20200101")):
        stored[f"{patient.replace(' ', '_')}_{study}"] = volume(seed=len(stored))
        write_series(tmp_path / "src" / patient / study, list(stored.values())[-1], patient=patient, study=study)
    import_series(tmp_path, "--channels", CT)
    for case, expected in stored.items():
        np.testing.assert_array_equal(values(tmp_path, case=case), expected)


def test_names_that_would_be_those_of_two_cases_are_refused(tmp_path):
    for patient in ("A 1", "A_1"):
        write_series(tmp_path / "src" / patient, volume(), patient=patient)
    assert "would both be 'A_1'" in refused(tmp_path, "--channels", CT, "--case", "{PatientID}")


@pytest.mark.parametrize("template", ["case", "{Patient}", "{PatientID", "{AccessionNumber}"])
def test_templates_that_name_nothing_are_refused(tmp_path, template):
    write_series(tmp_path / "src", volume())
    assert "--case" in refused(tmp_path, "--channels", CT, "--case", template)


# several modalities


def write_pair(root, patients=("P1",), without_pet=()):
    for patient in patients:
        write_series(root / "src" / patient / "ct", volume(seed=1), "CT", patient=patient)
        if patient not in without_pet:
            write_series(root / "src" / patient / "pt", volume(seed=2), "PT", patient=patient, number=2)


def test_channels_are_in_the_order_given(tmp_path):
    write_pair(tmp_path)
    import_series(tmp_path, "--channels", PET, CT)
    np.testing.assert_array_equal(values(tmp_path, 0), volume(seed=2))
    np.testing.assert_array_equal(values(tmp_path, 1), volume(seed=1))


def test_incomplete_cases(tmp_path):
    write_pair(tmp_path, ("P1", "P2"), without_pet=("P2",))
    assert "P2_20200102: no series is PET" in refused(tmp_path, "--channels", CT, PET)
    import_series(tmp_path, "--channels", CT, PET, "--incomplete", "drop")
    assert sorted(file.name for file in (tmp_path / "out").glob("*.nii.gz")) == [
        f"{CASE}_0000.nii.gz",
        f"{CASE}_0001.nii.gz",
    ]
    import_series(tmp_path, "--channels", CT, PET, "--incomplete", "keep", "--overwrite")
    assert sorted(file.name for file in (tmp_path / "out").glob("P2*")) == [
        "P2_20200102.json",
        "P2_20200102_0000.nii.gz",
    ]


def test_images_of_other_frames_of_reference_are_refused(tmp_path):
    write_series(tmp_path / "src" / "ct", volume(), "CT")
    write_series(tmp_path / "src" / "pt", volume(), "PT", number=2, FrameOfReferenceUID=uid("another"))
    assert "CT and PET have different FrameOfReferenceUIDs" in refused(tmp_path, "--channels", CT, PET)
    assert import_series(tmp_path, "--channels", CT, PET, "--any-frame-of-reference") == 0


def linear(shape, spacing, origin):
    """A volume whose values are linear in the place."""
    places = np.array([voxel_position(i, AXIAL, spacing, origin) for i in np.ndindex(*shape)])
    return np.rint(places @ [3, 5, 7]).reshape(shape).astype(np.int16)


def test_resampling_needs_its_flag_and_puts_all_on_one_grid(tmp_path):
    coarse, fine = (4.0, 4.0, 4.0), (2.0, 1.0, 1.0)
    inside = (2.0, 3.0, 104.0)
    write_series(
        tmp_path / "src" / "pt", linear((8, 8, 8), coarse, (0, 0, 100)), "PT", spacing=coarse, origin=(0, 0, 100)
    )
    expected = linear((5, 6, 7), fine, inside)
    write_series(tmp_path / "src" / "ct", expected, "CT", spacing=fine, origin=inside, number=2)
    assert "--resample" in refused(tmp_path, "--channels", CT, PET)
    assert "give one of CT, PET" in refused(tmp_path, "--channels", CT, PET, "--resample", "MR")
    import_series(tmp_path, "--channels", CT, PET, "--resample", "CT")
    np.testing.assert_array_equal(values(tmp_path, 0), expected)
    np.testing.assert_allclose(values(tmp_path, 1), expected, atol=1)  # whole numbers on either side
    record = json.loads((tmp_path / "out" / f"{CASE}.json").read_text())["channels"]
    assert [channel["on_source_grid"] for channel in record] == [True, False]


def test_the_record_says_what_images_come_from(tmp_path):
    files = write_series(tmp_path / "src", volume(), "PT", **FDG)
    import_series(tmp_path, "--channels", PET, "--suv")
    record = json.loads((tmp_path / "out" / f"{CASE}.json").read_text())
    channel = record["channels"][0]
    datasets = [pydicom.dcmread(file) for file in files]
    assert (record["case"], channel["file"], channel["name"]) == (CASE, f"{CASE}_0000.nii.gz", "PET")
    assert channel["SOPInstanceUIDs"] == [dataset.SOPInstanceUID for dataset in datasets]
    assert channel["SeriesInstanceUID"] == datasets[0].SeriesInstanceUID
    assert channel["units"] == "SUVbw, g/ml"
    assert channel["suv"]["dose_bq"] == 350e6


def test_nothing_is_overwritten_unasked(tmp_path):
    write_pair(tmp_path)
    import_series(tmp_path, "--channels", CT, PET)
    before = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match="--overwrite"):
        import_series(tmp_path, "--channels", CT)
    assert {file: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    import_series(tmp_path, "--channels", CT, "--overwrite")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [f"{CASE}.json", f"{CASE}_0000.nii.gz"]


# the command


def test_list_shows_series_and_what_keeps_them_from_being_imported(tmp_path, capsys):
    write_series(tmp_path / "src" / "a", volume(), patient="P7", SeriesDescription="thorax")
    write_series(tmp_path / "src" / "b", volume(), patient="P7", number=2, change=missing)
    assert cli.main(["dicom", "list", str(tmp_path / "src")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "patient 'P7', study of 20200102" in lines[0]
    assert "'thorax', 6 files" in lines[1]
    assert "'CT 2'" in lines[2]
    assert "not to be imported: 2 slices are missing" in lines[3]
    assert lines[4].startswith("2 series")


def test_a_folder_without_dicom_is_refused(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "notes.txt").write_text("no DICOM")
    assert "no DICOM image among 1 files" in refused(tmp_path, "--channels", CT)


def test_the_extra_is_named_where_it_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr("nnunet_multimodal.dicom.find_spec", lambda name: None)
    assert "pip install 'nnunet-multimodal[dicom]'" in refused(tmp_path, "--channels", CT)
