"""What holds for every source, shown by folders of two channels."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from nibabel.processing import resample_to_output
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

from nnunet_multimodal.datasets import engine
from nnunet_multimodal.datasets.engine import half_written
from nnunet_multimodal.doctor import cpu_cores
from nnunet_multimodal.errors import UserError
from tests.documented import ROOT
from tests.unit.convert.trees import AFFINE, SHAPE, convert, image, label_map, nifti

FLAGS = (
    "--pattern", "{case}_{channel}.nii.gz", "--label-pattern", "{case}_seg.nii.gz",
    "--channels", "CT=ct", "PET=pt", "--labels", "lesion=1",
)  # fmt: skip


@pytest.fixture
def source(tmp_path):
    """Two cases."""
    for case in "ab":
        for channel, part in enumerate(("ct", "pt")):
            nifti(tmp_path / "data" / f"{case}_{part}.nii.gz", image(channel))
        nifti(tmp_path / "data" / f"{case}_seg.nii.gz", label_map(1))
    return tmp_path / "data"


def run(source, *more):
    return convert("pattern", source, "--dataset-id", 5, *FLAGS, *more)


def test_complete_data_are_copied_and_accepted_by_nnunet(source, raw, result, capsys):
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    run(source)
    printed = capsys.readouterr().out
    data = result()
    data.verify()
    assert data.description == {
        "channel_names": {"0": "CT", "1": "PET"},
        "labels": {"background": 0, "lesion": 1},
        "numTraining": 2,
        "file_ending": ".nii.gz",
        "licence": "see the source",
        "converted_by": "nnunet-multimodal convert",
    }
    assert (data.folder / "imagesTr" / "b_0001.nii.gz").read_bytes() == before["b_pt.nii.gz"]
    assert (data.folder / "labelsTr" / "a.nii.gz").read_bytes() == before["a_seg.nii.gz"]
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    assert not (data.folder / "splits_final.json").exists()
    assert not (data.folder / "imagesTr" / "modalities.csv").exists()
    assert "files: 6 copied" in printed
    assert printed.endswith("next: nnUNetv2_plan_and_preprocess -d 5\n")


def test_several_processes_do_the_same(source, raw, result, monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: multiprocessing.context.ForkContext())
    run(source, "-np", 2)
    assert result().table["b"]["files"] == "3 copied"
    result().verify()


def test_links_across_file_systems_are_symbolic(source, raw, result, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(engine.os, "link", refuse)
    run(source, "--link")
    link = result().folder / "imagesTr" / "a_0000.nii.gz"
    assert link.is_symlink()
    assert link.resolve() == (source / "a_ct.nii.gz").resolve()
    assert result().table["a"]["files"] == "3 symbolic link"


def test_a_scale_is_kept_and_read_as_it_is(source, raw, result):
    """Stored 16-bit numbers with slope and intercept, as scanners write them."""
    stored = image(7)
    nifti(source / "a_ct.nii.gz", stored, slope=0.5, intercept=-1024)
    run(source)
    np.testing.assert_array_equal(result().array("imagesTr/a_0000"), stored * 0.5 - 1024)
    remark = "a_ct.nii.gz: int16 with slope 0.5 and intercept -1024, which readers apply"
    assert result().table["a"]["remarks"] == remark


def test_scaled_labels_are_stored_as_whole_numbers(source, raw, result):
    nifti(source / "a_seg.nii.gz", label_map(10), slope=0.1)
    nifti(source / "b_seg.nii.gz", label_map(1).astype(np.float32))
    run(source, "--link")
    for case in "ab":
        np.testing.assert_array_equal(result().array(f"labelsTr/{case}"), label_map(1))
        assert nibabel.load(result().folder / "labelsTr" / f"{case}.nii.gz").get_data_dtype() == np.uint8
        assert result().table[case]["remarks"] == f"{case}_seg.nii.gz: labels stored as whole numbers"


def shifted(axis, by):
    affine = AFFINE.copy()
    affine[axis, 3] += by
    return affine


def test_affines_that_differ_by_rounding_become_one(source, raw, result):
    nifti(source / "a_pt.nii.gz", image(1), shifted(0, 2e-4))
    nifti(source / "a_seg.nii.gz", label_map(1), shifted(2, -3e-4))
    run(source, "--link")
    data = result()
    assert data.geometry("imagesTr/a_0001") == data.geometry("imagesTr/a_0000") == data.geometry("labelsTr/a")
    np.testing.assert_array_equal(data.array("imagesTr/a_0001"), image(1))
    assert data.table["a"]["files"] == "1 hard link, 2 written"
    assert data.table["a"]["remarks"].count("header differed by rounding") == 2


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: nifti(s / "a_pt.nii.gz", image(1), shifted(0, 0.5)), r"a: .*a_pt.nii.gz lies on another grid than "
         r".*a_ct.nii.gz: it has origin .*; --resample puts"),
        (lambda s: nifti(s / "b_seg.nii.gz", label_map(1, shape=(6, 5, 5))), r"b: .*b_seg.nii.gz lies on another grid"),
        (lambda s: nifti(s / "a_seg.nii.gz", label_map(1, 3)), r"a_seg.nii.gz: labels 3, and 0, 1 are expected"),
        (lambda s: nifti(s / "a_seg.nii.gz", label_map(1) * np.float32(0.5)), r"a_seg.nii.gz: 0.5 is no whole number"),
        (lambda s: nifti(s / "a_ct.nii.gz", np.full(SHAPE, np.nan, np.float32)), r"a_ct.nii.gz: NaN in 120 voxels"),
        (lambda s: nifti(s / "a_ct.nii.gz", np.stack([image()] * 2, -1)), r"a_ct.nii.gz has 4 dimensions; split it"),
        (lambda s: (s / "b_ct.nii.gz").write_bytes(b"no"), r"b_ct.nii.gz cannot be read"),
        (lambda s: (s / "b_pt.nii.gz").unlink(), r"b lacks PET; --incomplete keep or drop"),
        (lambda s: (s / "b_seg.nii.gz").unlink(), r"b lacks a label map; --incomplete drop"),
        (lambda s: nifti(s / "c_seg.nii.gz", label_map(1)), r"c lacks any image; --incomplete drop"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_and_nothing_is_written(source, raw, spoil, message):
    spoil(source)
    with pytest.raises(UserError, match=message):
        run(source)
    assert not list(raw.iterdir())


def test_all_problems_are_said_at_once(source, raw):
    nifti(source / "a_seg.nii.gz", label_map(3))
    nifti(source / "b_pt.nii.gz", image(), shifted(1, 9))
    with pytest.raises(UserError, match=r"nothing is written:\na: .*labels 3[\s\S]*\nb: .*b_pt.nii.gz lies on"):
        run(source)


SKEWED = AFFINE.copy()
SKEWED[0, 1] = 0.4


@pytest.mark.parametrize("remedy", ["nearest", "resampled"])
def test_axes_that_are_not_perpendicular_have_a_remedy(source, raw, result, remedy):
    """The one that the message and docs/howto/convert.md name."""
    files = [nifti(source / f"a_{part}.nii.gz", image(seed), SKEWED) for seed, part in enumerate(("ct", "pt"))]
    files.append(nifti(source / "a_seg.nii.gz", label_map(1), SKEWED))
    with pytest.raises(UserError, match=r"a_ct.nii.gz: the axes of its affine \[\[1.0, 0.4, .* are not perpendicular"):
        run(source)
    assert not list(raw.iterdir())
    for file in files:
        loaded = nibabel.load(file)
        if remedy == "nearest":
            loaded.set_qform(loaded.affine, 1)
            loaded.set_sform(loaded.get_qform(), 1)
            nibabel.save(loaded, file)
        else:
            order = 0 if file.name.endswith("_seg.nii.gz") else 3
            nibabel.save(resample_to_output(loaded, (1, 1.5, 2), order=order), file)
    run(source)
    axes = np.array(result().geometry("imagesTr/a_0000")[3]).reshape(3, 3)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-5)
    result().verify()


def test_a_fourth_dimension_of_one_is_taken_off(source, raw, result):
    nifti(source / "a_ct.nii.gz", image(3)[..., None])
    run(source)
    np.testing.assert_array_equal(result().array("imagesTr/a_0000"), image(3))
    assert result().geometry("imagesTr/a_0000") == result().geometry("imagesTr/a_0001")


def test_an_image_of_zeros_is_said_to_be_absent(source, raw, result):
    nifti(source / "a_pt.nii.gz", np.zeros(SHAPE, np.int16))
    run(source)
    assert result().table["a"]["remarks"] == "a_pt.nii.gz is 0 everywhere, which counts as absent"


# --- resampling


def ramp(shape, affine):
    """An image whose value is linear in the position in mm: linear interpolation gives it back."""
    x, y, z = np.einsum("ij,j...->i...", affine[:3, :3], np.indices(shape)) + affine[:3, 3].reshape(3, 1, 1, 1)
    return (2 * x - 3 * y + 0.5 * z).astype(np.float32)


def inside_coarse():
    """Fine voxels between the centres of coarse ones, where interpolation needs nothing from outside."""
    index = np.linalg.inv(AFFINE) @ FINE @ [*np.indices((24, 30, 16)).reshape(3, -1), np.ones(24 * 30 * 16)]
    last = np.array(SHAPE).reshape(3, 1) - 1
    return ((index[:3] > -1e-6) & (index[:3] < last + 1e-6)).all(0).reshape(24, 30, 16)


FINE = np.diag([0.5, 0.5, 1, 1.0])
FINE[:3, 3] = 1, -7, 3  # around the coarse grid


@pytest.fixture
def fine_ct(source):
    """CT and label map of a on a grid of their own."""
    nifti(source / "a_ct.nii.gz", ramp((24, 30, 16), FINE), FINE)
    nifti(source / "a_pt.nii.gz", ramp(SHAPE, AFFINE))
    nifti(source / "a_seg.nii.gz", inside_coarse().astype(np.uint8), FINE)
    return source


def test_images_are_resampled_to_the_label_maps_grid(fine_ct, raw, result):
    run(fine_ct, "--resample", "--link")
    data = result()
    assert data.geometry("imagesTr/a_0001") == data.geometry("labelsTr/a") == data.geometry("imagesTr/a_0000")
    assert data.table["a"]["files"] == "2 hard link, 1 written"
    expected = ramp((24, 30, 16), FINE)
    found = data.array("imagesTr/a_0001")
    inside = inside_coarse()
    assert inside.sum() > 800
    np.testing.assert_allclose(found[inside], expected[inside], atol=1e-3)
    assert found[0, 0, 0] == ramp(SHAPE, AFFINE).min()  # where the PET does not reach
    words = "a_pt.nii.gz: resampled from 6 x 5 x 4 voxels of 1 x 1.5 x 2 mm to 24 x 30 x 16 voxels of 0.5 x 0.5 x 1 mm"
    assert words in data.table["a"]["remarks"]


def test_images_and_labels_are_resampled_to_a_channels_grid(fine_ct, raw, result):
    run(fine_ct, "--resample", "PET")
    data = result()
    assert data.geometry("imagesTr/a_0000")[0] == SHAPE
    assert data.geometry("imagesTr/a_0000") == data.geometry("imagesTr/a_0001") == data.geometry("labelsTr/a")
    np.testing.assert_allclose(data.array("imagesTr/a_0000"), ramp(SHAPE, AFFINE), atol=1e-3)
    assert (data.array("labelsTr/a") == 1).all()  # the fine mask is that of the coarse grid
    data.verify()


def test_a_label_that_resampling_loses_is_said(fine_ct, raw, result):
    labels = np.zeros((24, 30, 16), np.uint8)
    labels[0, 0, 0] = 1  # outside
    nifti(fine_ct / "a_seg.nii.gz", labels, FINE)
    run(fine_ct, "--resample", "PET")
    assert "label 1 lost by resampling" in result().table["a"]["remarks"]


def test_a_grid_without_a_voxel_in_common_is_refused(source, raw):
    nifti(source / "a_pt.nii.gz", image(1), shifted(0, 500))
    with pytest.raises(UserError, match=r"a_pt.nii.gz has nothing in common with the grid of .*a_seg.nii.gz"):
        run(source, "--resample")


def test_a_grid_of_another_name_is_refused(source, raw):
    with pytest.raises(UserError, match=r"--resample MR: give labels or one of CT, PET"):
        run(source, "--resample", "MR")


def test_a_case_without_the_channel_of_the_grid_has_remedies(source, raw, result):
    (source / "b_ct.nii.gz").unlink()
    with pytest.raises(UserError, match=r"b: has no CT, .*; plain --resample takes .* and --incomplete drop leaves"):
        run(source, "--resample", "CT", "--incomplete", "keep")
    run(source, "--resample", "--incomplete", "keep")
    assert result().is_placeholder("imagesTr/b_0000")


# --- interruptions

STALLED = Path(__file__).with_name("stalled_worker.py")
posix = pytest.mark.skipif(os.name != "posix", reason="signals and locks of POSIX")


def start_stalled(source, raw):
    """A conversion in two processes, both of which have begun to copy and do not end."""
    command = ("convert", "pattern", source, "--dataset-id", "5", *FLAGS, "-np", "2")
    process = subprocess.Popen(
        [sys.executable, STALLED, *command], env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while process.poll() is None and len(list(raw.glob(".*/dataset/*/*"))) < min(2, cpu_cores()):
        if time.monotonic() > deadline:
            process.kill()
            pytest.fail(process.communicate()[0])
        time.sleep(0.05)
    return process


@posix
def test_a_termination_leaves_neither_files_nor_processes(source, raw):
    process = start_stalled(source, raw)
    process.terminate()
    output, _ = process.communicate(timeout=120)  # until all of its processes have closed it
    assert process.returncode == 128 + signal.SIGTERM, output
    assert not list(raw.iterdir())


@posix
def test_a_kill_leaves_no_processes_and_the_next_conversion_removes_its_files(source, raw, result):
    process = start_stalled(source, raw)
    with pytest.raises(UserError, match=r"another conversion to Dataset005 is running \(.*\.Dataset005.lock is held\)"):
        run(source)
    assert list(raw.glob(".*/dataset/*/*"))
    process.kill()
    process.communicate(timeout=120)
    assert sorted(path.name for path in raw.iterdir()) == [".Dataset005.lock", ".Dataset005.part"]
    run(source)
    result().verify()


@posix
def test_signals_that_are_ignored_stay_ignored(tmp_path):
    """nohup."""
    before = [signal.getsignal(kind) for kind in (signal.SIGHUP, signal.SIGTERM)]
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with half_written(tmp_path / "x"):
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        for kind, handler in zip((signal.SIGHUP, signal.SIGTERM), before, strict=True):
            signal.signal(kind, handler)


def test_a_file_system_without_locks_is_said(source, raw, result, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    run(source)
    assert "raw has no locks ([Errno 38] Function not implemented): see to it that no" in capsys.readouterr().err
    result().verify()


def test_a_file_system_without_links_is_an_error(source, raw, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(engine.os, "link", refuse)
    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(
        UserError, match=r"--link: .*a_0000.nii.gz cannot be a link to .*a_ct.nii.gz .*leave out --link"
    ):
        run(source, "--link")
    assert not list(raw.iterdir())


def test_an_interrupted_conversion_leaves_nothing(source, raw, monkeypatch):
    written = []

    def interrupted(file, output, conversion):
        if len(written) == 4:
            raise KeyboardInterrupt  # a signal itself is ignored where tests run in the background
        written.append(output)
        return take(file, output, conversion)

    take = engine.take
    monkeypatch.setattr(engine, "take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(source)
    assert len(written) == 4
    assert not list(raw.iterdir())


def test_what_a_kill_left_is_no_data_set_and_goes_away(source, raw, result):
    (raw / ".Dataset005.part" / "dataset" / "imagesTr").mkdir(parents=True)
    (raw / ".Dataset005.part" / "dataset" / "imagesTr" / "z_0000.nii.gz").write_bytes(b"half")
    run(source)
    assert result().names() == ["a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz"]


@pytest.mark.parametrize("where", ["raw", "preprocessed", "results"])
def test_a_number_that_is_taken_is_refused(source, raw, where):
    there = raw.parent / where / "Dataset005_Other"
    there.mkdir()
    with pytest.raises(UserError, match=r"--dataset-id 5 is taken by Dataset005_Other"):
        run(source)
    assert not list(there.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--dataset-id", 0), r"--dataset-id 0: give a number from 1 to 999"),
        (("--name", "my data"), r"--name 'my data': letters, digits"),
        (("--derivatives", "x"), r"--derivatives is not for pattern; it is for bids"),
    ],
)
def test_flags_that_do_not_fit_are_refused(source, raw, flags, message):
    with pytest.raises(UserError, match=message):
        run(source, *flags)


def test_the_raw_folder_must_be_known(source, raw, monkeypatch):
    monkeypatch.delenv("nnUNet_raw")
    with pytest.raises(UserError, match="nnUNet_raw is not set"):
        run(source)


def test_nnunets_planner_takes_the_folds_over(tmp_path, raw):
    """It copies splits_final.json of the raw folder to where its trainer looks."""
    for patient in ("p1", "p2"):
        for study in ("a", "b"):
            nifti(tmp_path / "data" / patient / study / "ct.nii.gz", image())
            nifti(tmp_path / "data" / patient / study / "seg.nii.gz", label_map(1))
    flags = ("--pattern", "{patient}/{case}/ct.nii.gz", "--label-pattern", "{patient}/{case}/seg.nii.gz")
    convert("pattern", tmp_path / "data", "--dataset-id", 6, *flags, "--channels", "CT=ct", "--labels", "lesion=1")
    preprocessed = raw.parent / "preprocessed" / "Dataset006_data"
    preprocessed.mkdir()
    (preprocessed / "dataset_fingerprint.json").write_text("{}")
    ExperimentPlanner(6)
    splits = json.loads((preprocessed / "splits_final.json").read_text())
    assert [sorted(fold["val"]) for fold in splits] in (
        [["p1_a", "p1_b"], ["p2_a", "p2_b"]],
        [["p2_a", "p2_b"], ["p1_a", "p1_b"]],
    )


def test_other_readers_get_what_nnunet_gets(source, raw, result):
    """nibabel and SimpleITK agree on what was written anew."""
    nifti(source / "a_pt.nii.gz", ramp(SHAPE, AFFINE), shifted(1, 1e-4))
    run(source)
    file = result().folder / "imagesTr" / "a_0001.nii.gz"
    np.testing.assert_allclose(nibabel.load(file).get_fdata(), ramp(SHAPE, AFFINE), atol=1e-6)
    np.testing.assert_allclose(nibabel.load(file).affine, AFFINE, atol=1e-5)
    assert SimpleITK.ReadImage(str(file)).GetPixelIDTypeAsString() == "32-bit float"


def test_files_are_counted(source, raw, monkeypatch):
    """Should somebody write to the folder as well."""
    write = engine.write_case

    def and_another(conversion, folder, case, report):
        nifti(folder / "labelsTr" / "x.nii.gz", label_map(1))
        return write(conversion, folder, case, report)

    monkeypatch.setattr(engine, "write_case", and_another)
    with pytest.raises(RuntimeError, match="labelsTr has 3 files and must have 2"):
        run(source)
    assert not list(raw.iterdir())
