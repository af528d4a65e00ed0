"""Sanity checks of explanations: of three modalities one shows A, one B and one nothing at all."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK
import torch

from nnunet_multimodal import cli
from nnunet_multimodal.errors import UserError
from nnunet_multimodal.explain.complementary import ComplementaryPredictor
from nnunet_multimodal.inference.base import model_folder
from nnunet_multimodal.preprocessing import PLACEHOLDER
from tests.nnunet import DATASET, PLANS, NnUNet, segmentation

SHOWS_A, SHOWS_B, BLIND = "T1", "T2", "PET"
STATED = {SHOWS_A: ["A"], SHOWS_B: ["B"], BLIND: ["A", "B"]}
CASES = 3
LENGTH = "5epochs_40iterations"


def write_case(folder, name, rng):
    shape = (8, 24, 24)
    labels = np.zeros(shape, np.uint8)
    for label, corner in ((1, rng.integers(2, 5, 2)), (2, rng.integers(13, 16, 2))):
        labels[1:7, corner[0] : corner[0] + 6, corner[1] : corner[1] + 6] = label
    images = [rng.normal(0, 0.05, shape) + 2.0 * (labels == label) for label in (1, 2, 99)]
    for stem, array in [(f"imagesTr/{name}_{c:04d}", i.astype(np.float32)) for c, i in enumerate(images)] + [
        (f"labelsTr/{name}", labels)
    ]:
        image = SimpleITK.GetImageFromArray(array)
        image.SetSpacing((1.0, 1.0, 3.0))
        SimpleITK.WriteImage(image, str(folder / f"{stem}.nii.gz"))


@pytest.fixture(scope="module")
def nnunet(tmp_path_factory):
    nnunet = NnUNet(tmp_path_factory.mktemp("explain"))
    folder = nnunet.raw / DATASET
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for case in range(CASES):
        write_case(folder, f"case_{case}", rng)
    description = {
        "channel_names": {0: SHOWS_A, 1: SHOWS_B, 2: BLIND},
        "labels": {"background": 0, "A": 1, "B": 2},
        "numTraining": CASES,
        "file_ending": ".nii.gz",
        "nnunet_multimodal": {"decomposition": STATED},
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    nnunet("nnUNetv2_extract_fingerprint", "-d", 900, "-np", 1)
    nnunet(
        "nnUNetv2_plan_experiment", "-d", 900, "-pl", "nnUNetPlannerTiny", "-gpu_memory_target", 0.005,
        nnUNet_n_proc_DA="1",
    )  # fmt: skip
    plans = nnunet.plans()
    plans["configurations"]["2d"]["batch_size"] = 4
    nnunet.write_plans(plans)
    nnunet("nnUNetv2_preprocess", "-d", 900, "-plans_name", PLANS, "-c", "2d", "-np", 1)
    return nnunet


@pytest.fixture(scope="module")
def trained(nnunet):
    """A CIML model that has learnt both structures."""
    torch.manual_seed(0)
    nnunet.train(f"CIMLTrainer_{LENGTH}", "2d", "all")
    return nnunet


def explain(nnunet, output, *more, trainer=f"CIMLTrainer_{LENGTH}", images=None, configuration="2d"):
    model = ("-d", "900", "-p", PLANS, "-tr", trainer, "-c", configuration, "-f", "all", "-device", "cpu")
    images = images or nnunet.raw / DATASET / "imagesTr"
    with nnunet.environment():
        assert cli.main(["explain", "-i", str(images), "-o", str(output), *model, *map(str, more)]) == 0
    return output


def rows(file):
    return list(csv.DictReader(file.read_text().splitlines()))


@pytest.fixture(scope="module")
def explained(trained, tmp_path_factory):
    return explain(trained, tmp_path_factory.mktemp("out"), "-ref", trained.raw / DATASET / "labelsTr")


def test_the_weights_point_at_the_modality_that_shows_the_region(explained):
    weights = {
        (row["primary"], row["region"], row["auxiliary"]): float(row["weight"])
        for row in rows(explained / "complementary_weights.csv")
        if row["case"] == "mean"
    }
    assert weights[BLIND, "A", SHOWS_A] > 0.8
    assert weights[BLIND, "B", SHOWS_B] > 0.8
    assert weights[SHOWS_A, "A", SHOWS_B] + weights[SHOWS_A, "A", BLIND] == pytest.approx(1, abs=1e-3)
    assert (explained / "complementary_weights.png").stat().st_size > 5000


def test_leaving_out_points_at_the_modality_that_shows_the_region(explained):
    table = rows(explained / "contributions.csv")
    assert len(table) == CASES * 3 * 2
    for label, shown in (("A", SHOWS_A), ("B", SHOWS_B)):
        for column in ("changed", "lost"):
            values = {
                modality: np.mean(
                    [
                        float(r["changed"]) if column == "changed" else float(r["Dice"]) - float(r["Dice_without"])
                        for r in table
                        if (r["label"], r["modality"]) == (label, modality)
                    ]
                )
                for modality in STATED
            }
            assert values[shown] > 0.8 * sum(abs(value) for value in values.values())
    volume = {r["modality"]: float(r["volume_ml"]) for r in table if (r["case"], r["label"]) == ("case_0", "A")}
    assert volume[SHOWS_A] == pytest.approx(6 * 6 * 6 * 3 / 1000, rel=0.2)


def test_maps_light_up_where_the_region_is_on_the_images_grid(explained, trained):
    labels = segmentation(trained.raw / DATASET / "labelsTr" / "case_1.nii.gz")
    file = explained / "complementary" / f"case_1_{BLIND}_A_from_{SHOWS_A}.nii.gz"
    heat = segmentation(file)
    assert heat.shape == labels.shape
    assert SimpleITK.ReadImage(str(file)).GetSpacing() == pytest.approx((1, 1, 3))
    assert heat[labels == 1].mean() > 5 * heat[labels == 0].mean()
    assert len(list((explained / "complementary").glob("case_1_*"))) == 4 * 2
    assert all((explained / f"case_{case}.png").stat().st_size > 20000 for case in range(CASES))


def test_maps_do_not_change_with_the_placeholder_of_an_absent_modality(trained, tmp_path):
    outputs = []
    for kind in ("missing", "placeholder"):
        images = tmp_path / kind
        images.mkdir()
        for channel in range(3):
            name = f"case_0_{channel:04d}.nii.gz"
            image = SimpleITK.ReadImage(str(trained.raw / DATASET / "imagesTr" / name))
            if channel == 1 and kind == "missing":
                continue
            if channel == 1:
                image = SimpleITK.Cast(image * 0, SimpleITK.sitkUInt16) + PLACEHOLDER
            SimpleITK.WriteImage(image, str(images / name))
        outputs.append(explain(trained, tmp_path / f"out_{kind}", images=images))
    for file in (outputs[0] / "complementary").iterdir():
        other = outputs[1] / "complementary" / file.name
        assert np.array_equal(segmentation(file), segmentation(other))
        if file.name.endswith(f"from_{SHOWS_B}.nii.gz"):
            assert not segmentation(file).any()
    for name in ("complementary_weights.csv", "contributions.csv"):
        assert (outputs[0] / name).read_text() == (outputs[1] / name).read_text()
    assert {row["modality"] for row in rows(outputs[0] / "contributions.csv")} == {SHOWS_A, BLIND}


def test_who_is_absent_explains_nothing(trained, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for channel in (0, 1):
        name = f"case_0_{channel:04d}.nii.gz"
        image = SimpleITK.ReadImage(str(trained.raw / DATASET / "imagesTr" / name))
        SimpleITK.WriteImage(image, str(images / name))
    output = explain(trained, tmp_path / "out", images=images)
    for row in rows(output / "complementary_weights.csv"):
        lacks = BLIND in (row["primary"], row["auxiliary"])
        assert (row["weight"] == "") == lacks
        if row["primary"] == BLIND and row["case"] == "case_0":
            name = f"case_0_{BLIND}_{row['region']}_from_{row['auxiliary']}.nii.gz"
            assert not segmentation(output / "complementary" / name).any()


def test_a_reference_on_another_grid_is_refused(trained, tmp_path):
    for case in range(CASES):
        image = SimpleITK.ReadImage(str(trained.raw / DATASET / "labelsTr" / f"case_{case}.nii.gz"))
        image.SetOrigin((0.0, 5.0, 0.0))
        SimpleITK.WriteImage(image, str(tmp_path / f"case_{case}.nii.gz"))
    with pytest.raises(UserError, match=r"origin .*a reference must be on its image's grid"):
        explain(trained, tmp_path / "out", "-ref", tmp_path)


def test_random_weights_destroy_the_maps(trained):
    """Adebayo et al., Sanity Checks for Saliency Maps, NeurIPS 2018."""
    args = SimpleNamespace(d="900", tr=f"CIMLTrainer_{LENGTH}", p=PLANS, c="2d")
    with trained.environment():
        predictor = ComplementaryPredictor.from_model(
            model_folder(args), ["all"], torch.device("cpu"), "checkpoint_final.pth", use_mirroring=False
        )
    (case, *_) = predictor.cases(str(trained.raw / DATASET / "imagesTr"), None)
    preprocessed, pairs = predictor.preprocess(case), predictor.pairs()
    index = next(i for i, pair in enumerate(pairs) if (pair.primary_name, pair.region_name) == (BLIND, "A"))
    trained_map = predictor.explain(preprocessed, pairs)[0][index, 0]
    alike = []
    for seed in range(5):
        torch.manual_seed(seed)
        predictor.network.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
        predictor.list_of_parameters = [{k: v.clone() for k, v in predictor.network.state_dict().items()}]
        random_map = predictor.explain(preprocessed, pairs)[0][index, 0]
        if random_map.any():
            alike.append(np.corrcoef(trained_map.ravel(), random_map.ravel())[0, 1])
    assert trained_map.any()
    assert len(alike) >= 2
    assert np.mean(np.abs(alike)) < 0.6


# --- other data


def check_shares(file, columns, cases):
    """Each pair's shares are at least 0 and sum to 1, or there are none."""
    found = {}
    for row in rows(file):
        found.setdefault(tuple(row[c] for c in columns), []).append(row[file_column(row)])
    assert {key[0] for key in found} >= {f"case_{case}" for case in range(cases)}
    for shares in found.values():
        given = [float(share) for share in shares if share]
        assert not given or (len(given) == len(shares) and sum(given) == pytest.approx(1, abs=1e-3) and min(given) >= 0)


def file_column(row):
    return "weight" if "weight" in row else "share"


def test_regions_in_three_dimensions_after_a_cascades_first_stage(datasets, tmp_path):
    nnunet, trainer = datasets("regions"), "CIMLTrainer_1epoch_2iterations"
    nnunet.train(trainer, "3d_lowres", "all")
    nnunet.train(trainer, "3d_cascade_fullres", "all")
    raw = nnunet.raw / DATASET
    first = nnunet.model(trainer, "3d_lowres") / "fold_all" / "validation"
    flags = ("-ref", raw / "labelsTr", "-prev_stage_predictions", first, "--disable_tta")
    flags += ("--attribution", "integrated_gradients", "--steps", 1)
    images = tmp_path / "images"
    images.mkdir()
    for file in (raw / "imagesTr").glob("case_0_*"):
        (images / file.name).symlink_to(file)
    output = tmp_path / "out"
    explain(nnunet, output, *flags, trainer=trainer, configuration="3d_cascade_fullres", images=images)
    image = raw / "imagesTr" / "case_0_0000.nii.gz"
    patch = nnunet.plans()["configurations"]["3d_fullres"]["patch_size"]
    assert any(size > side for size, side in zip(segmentation(image).shape, patch, strict=True))  # several tiles
    maps = [*(output / "complementary").glob("case_0_*"), *(output / "attribution").glob("case_0_*")]
    assert len(maps) == 3 * 2 * 2 + 2 * 3
    for file in maps:
        assert SimpleITK.ReadImage(str(file)).GetSpacing() == pytest.approx((1.0, 1.1, 1.5))
        assert segmentation(file).shape == segmentation(image).shape
        assert np.isfinite(segmentation(file)).all()
    check_shares(output / "complementary_weights.csv", ("case", "primary", "region"), 1)
    check_shares(output / "attribution.csv", ("case", "label"), 1)
    assert {row["label"] for row in rows(output / "contributions.csv")} == {"whole", "lesion"}


def test_colour_pictures(tmp_path):
    """PNG: three channels in one file, no spacing."""
    nnunet, trainer = NnUNet(tmp_path), "CIMLTrainer_1epoch_2iterations"
    folder = nnunet.raw / DATASET
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for case in range(CASES):
        labels = np.zeros((40, 36), np.uint8)
        labels[8:20, 10 + case : 24] = 1
        picture = rng.integers(0, 60, (40, 36, 3)) + 150 * (labels == 1)[..., None] * np.array([1, 0, 0])
        for name, array in (
            (f"imagesTr/case_{case}_0000", picture.astype(np.uint8)),
            (f"labelsTr/case_{case}", labels),
        ):
            SimpleITK.WriteImage(
                SimpleITK.GetImageFromArray(array, isVector=array.ndim == 3), str(folder / f"{name}.png")
            )
    description = {
        "channel_names": {0: "R", 1: "G", 2: "B"},
        "labels": {"background": 0, "A": 1},
        "numTraining": CASES,
        "file_ending": ".png",
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    nnunet("nnUNetv2_extract_fingerprint", "-d", 900, "-np", 1)
    nnunet(
        "nnUNetv2_plan_experiment", "-d", 900, "-pl", "nnUNetPlannerTiny", "-gpu_memory_target", 0.005,
        nnUNet_n_proc_DA="1",
    )  # fmt: skip
    nnunet("nnUNetv2_preprocess", "-d", 900, "-plans_name", PLANS, "-c", "2d", "-np", 1)
    nnunet.train(trainer, "2d", "all")
    output = explain(nnunet, tmp_path / "out", "-ref", folder / "labelsTr", trainer=trainer)
    for case in range(CASES):
        assert (output / f"case_{case}.png").stat().st_size > 10000
        assert segmentation(output / "complementary" / f"case_{case}_R_A_from_G.nii.gz").squeeze().shape == (40, 36)
    check_shares(output / "complementary_weights.csv", ("case", "primary", "region"), CASES)
    assert len(rows(output / "contributions.csv")) == CASES * 3


# --- other models


def test_nnunets_own_model_and_captum(nnunet, tmp_path):
    trainer = "nnUNetTrainer_3epochs_40iterations"
    nnunet.train(trainer, "2d", "all")
    for method in ("integrated_gradients", "gradcam"):
        output = explain(nnunet, tmp_path / method, "--attribution", method, "--steps", 5, trainer=trainer)
        assert not (output / "complementary_weights.csv").exists()
        table = rows(output / "attribution.csv")
        for label, shown in (("A", SHOWS_A), ("B", SHOWS_B)):
            mean = {
                channel: np.mean([float(r["share"]) for r in table if (r["label"], r["channel"]) == (label, channel)])
                for channel in STATED
            }
            assert mean[shown] > 1.5 * mean[SHOWS_B if shown == SHOWS_A else SHOWS_A]
        assert segmentation(output / "attribution" / f"case_0_A_from_{SHOWS_A}.nii.gz").any()
    assert all(row["Dice"] == "" for row in rows(output / "contributions.csv"))


def test_crnps_uncertainty_is_the_one_of_its_command(nnunet, tmp_path):
    trainer = "CRNPTrainer_1epoch_2iterations"
    nnunet.train(trainer, "2d", "all")
    output = explain(nnunet, tmp_path / "out", trainer=trainer)
    model = ["-d", "900", "-p", PLANS, "-tr", trainer, "-c", "2d", "-f", "all", "-device", "cpu"]
    images = str(nnunet.raw / DATASET / "imagesTr")
    with nnunet.environment():
        cli.main(["uncertainty", "-i", images, "-o", str(tmp_path / "same"), *model])
    expected = json.loads((tmp_path / "same" / "uncertainty.json").read_text())
    for row in rows(output / "uncertainty.csv"):
        assert float(row["uncertainty"]) == pytest.approx(expected[row["case"]][row["modality"]], rel=1e-4)
    own = segmentation(output / "uncertainty" / f"case_2_{SHOWS_B}.nii.gz")
    assert np.array_equal(own, segmentation(tmp_path / "same" / "case_2_0001.nii.gz"))


def test_what_cannot_be_explained_is_said_before_anything_is_written(trained, tmp_path):
    references = tmp_path / "labels"
    references.mkdir()
    with pytest.raises(UserError, match=r"case_0.nii.gz is not there"):
        explain(trained, tmp_path / "out", "-ref", references)
    with pytest.raises(UserError, match="no common features for Grad-CAM"):
        explain(trained, tmp_path / "out", "--attribution", "gradcam")
    with pytest.raises(UserError, match="--steps 0"):
        explain(trained, tmp_path / "out", "--attribution", "integrated_gradients", "--steps", 0)
    assert not (tmp_path / "out").exists()
