"""``nnunet-multimodal evaluate --all-subsets`` and ``features`` on models that nnU-Net's command trained."""

import csv
import shutil

import numpy as np
import pytest

from nnunet_multimodal import cli
from nnunet_multimodal.errors import UserError
from tests.nnunet import DATASET, PLANS, segmentation

OURS, STOCK = "ShaSpecModalityDropoutTrainer_1epoch_2iterations", "nnUNetTrainer_1epoch_2iterations"
NAMES = ["T1", "T2", "PET", "T1+T2", "T1+PET", "T2+PET", "T1+T2+PET"]


@pytest.fixture(scope="module")
def trained(datasets, tmp_path_factory):
    nnunet = datasets("labels").with_results(tmp_path_factory.mktemp("results"))
    for trainer in (OURS, STOCK):
        nnunet.train(trainer)
    return nnunet


@pytest.fixture(scope="module")
def images(trained, tmp_path_factory):
    """Two cases; the second lacks T2."""
    folder = tmp_path_factory.mktemp("images")
    for file in (trained.raw / DATASET / "imagesTr").glob("case_[01]_*"):
        if file.name != "case_1_0001.nii.gz":
            (folder / file.name).symlink_to(file)
    return folder


def evaluate(nnunet, images, output, *more, trainers=(STOCK, OURS)):
    model = ["-d", "900", "-p", PLANS, "-c", "3d_fullres", "-f", "0", "-device", "cpu", "-np", "1"]
    labels = nnunet.raw / DATASET / "labelsTr"
    with nnunet.environment():
        return cli.main(
            ["evaluate", "--all-subsets", str(labels), str(output), "-i", str(images), "-tr", *trainers, *model, *more]
        )


def test_all_subsets_are_predicted_measured_and_compared(trained, images, tmp_path, capsys):
    assert evaluate(trained, images, tmp_path) == 0
    for trainer in (OURS, STOCK):
        folders = sorted(path.name for path in (tmp_path / trainer).iterdir() if path.is_dir())
        assert folders == sorted(NAMES)
        for name in NAMES:
            files = sorted(path.name for path in (tmp_path / trainer / name).iterdir())
            assert files == ["case_0.nii.gz"] + ["case_1.nii.gz"] * ("T2" not in name)
    printed = capsys.readouterr().out
    assert "no T2: case_1" in printed
    assert (tmp_path / "subsets.md").read_text() in printed
    rows = list(csv.DictReader((tmp_path / "subsets_cases.csv").read_text().splitlines()))
    assert len(rows) == 2 * (7 + 3) * 2
    assert (tmp_path / "subsets.png").read_bytes().startswith(b"\x89PNG")
    # all modalities: nnU-Net's own prediction
    stock = trained.predict(OURS, "3d_fullres", tmp_path / "stock")
    whole = tmp_path / OURS / "T1+T2+PET" / "case_0.nii.gz"
    assert segmentation(whole).any()
    assert np.array_equal(segmentation(whole), segmentation(stock / "case_0.nii.gz"))
    # one of them: predict --drop
    with trained.environment():
        cli.main([
            "predict", "-i", str(images), "-o", str(tmp_path / "dropped"), "-d", "900", "-tr", OURS, "-p", PLANS,
            "-c", "3d_fullres", "-f", "0", "-device", "cpu", "--drop", "T1,T2", "--maps", "--samples", "1",
        ])  # fmt: skip
    single = tmp_path / OURS / "PET" / "case_0.nii.gz"
    assert np.array_equal(segmentation(single), segmentation(tmp_path / "dropped" / "case_0.nii.gz"))


def test_parts_are_predicted_apart_and_a_second_run_predicts_what_is_missing_alone(trained, images, tmp_path):
    for part in (0, 1):
        assert evaluate(trained, images, tmp_path, "-num_parts", "2", "-part_id", str(part), trainers=(OURS,)) == 0
        there = {file.name for file in (tmp_path / OURS).rglob("case_*")}
        assert there == {f"case_{case}.nii.gz" for case in range(part + 1)}
        assert not (tmp_path / "subsets.csv").exists()
    parts = {file: file.stat().st_mtime_ns for file in (tmp_path / OURS).rglob("case_*")}
    evaluate(trained, images, tmp_path, trainers=(OURS,))
    assert parts == {file: file.stat().st_mtime_ns for file in (tmp_path / OURS).rglob("case_*")}
    gone, kept = (tmp_path / OURS / name / "case_0.nii.gz" for name in ("T1", "T2"))
    table, before = (tmp_path / "subsets.csv").read_text(), kept.stat().st_mtime_ns
    gone.unlink()
    evaluate(trained, images, tmp_path, trainers=(OURS,))
    assert gone.is_file()
    assert kept.stat().st_mtime_ns == before
    assert (tmp_path / "subsets.csv").read_text() == table
    other = trained.model(OURS, "3d_fullres") / "fold_1"  # a fold that is done meanwhile, and not asked for
    shutil.copytree(other.with_name("fold_0"), other)
    try:
        assert evaluate(trained, images, tmp_path, trainers=(OURS,)) == 0
    finally:
        shutil.rmtree(other)
    with pytest.raises(
        UserError, match=r"predictions of another model, of other images or with other flags .*delete it"
    ):
        evaluate(trained, images, tmp_path, "--disable_tta", trainers=(OURS,))


def test_what_is_missing_is_named(trained, images, tmp_path):
    with pytest.raises(UserError, match=r"--baseline X must be one of -tr"):
        evaluate(trained, images, tmp_path, "--baseline", "X")
    with pytest.raises(UserError, match=r"--chill has no meaning with --all-subsets"):
        evaluate(trained, images, tmp_path, "--chill")
    with pytest.raises(UserError, match=r"-part_id 2 must be at least 0 and less than -num_parts 2"):
        evaluate(trained, images, tmp_path, "-num_parts", "2", "-part_id", "2")
    with pytest.raises(UserError, match=r"--merge has no meaning with --all-subsets"):
        evaluate(trained, images, tmp_path, "-num_parts", "2", "--merge")
    with pytest.raises(UserError, match=r"--all-subsets needs -i, -d, -c, -tr"):
        cli.main(["evaluate", "--all-subsets", str(tmp_path), str(tmp_path)])
    with pytest.raises(UserError, match=r"case_0.nii.gz is not there; give a reference"), trained.environment():
        cli.main([
            "evaluate", "--all-subsets", str(tmp_path / "none"), str(tmp_path), "-i", str(images), "-d", "900",
            "-c", "3d_fullres", "-p", PLANS, "-tr", STOCK, "-f", "0", "-device", "cpu", "-np", "1",
        ])  # fmt: skip


def test_features_are_exported_and_drawn(trained, images, tmp_path):
    model = ["-d", "900", "-p", PLANS, "-c", "3d_fullres", "-f", "0", "-device", "cpu"]
    with trained.environment():
        assert cli.main(["features", "-i", str(images), "-o", str(tmp_path), "-tr", OURS, *model]) == 0
        with pytest.raises(UserError, match="has no shared and specific features"):
            cli.main(["features", "-i", str(images), "-o", str(tmp_path), "-tr", STOCK, *model])
    found = np.load(tmp_path / "features.npz")
    assert set(found["kind"]) == {"shared", "specific"}
    assert len(found["features"]) == len(found["case"]) == len(found["modality"])
    assert "T2" not in found["modality"][found["case"] == "case_1"]
    assert np.isfinite(found["features"]).all()
    assert (tmp_path / "features.png").read_bytes().startswith(b"\x89PNG")
