"""Images with several channels in a file: nothing is absent because there is one file, and a channel can be dropped."""

import json

import numpy as np
import pytest
from skimage import io

from nnunet_multimodal import cli
from nnunet_multimodal.errors import UserError
from tests.nnunet import DATASET, PLANS, NnUNet

TRAINER = "ModalityDropoutTrainer_1epoch_2iterations"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    nnunet = NnUNet(tmp_path_factory.mktemp("rgb"))
    folder = nnunet.raw / DATASET
    rng = np.random.default_rng(0)
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True)
    for case in range(5):
        label = np.zeros((48, 56), np.uint8)
        label[10:30, 12:40] = 1
        image = rng.integers(0, 100, (48, 56, 3)) + 100 * label[..., None]
        io.imsave(folder / f"imagesTr/case_{case}_0000.png", image.astype(np.uint8), check_contrast=False)
        io.imsave(folder / f"labelsTr/case_{case}.png", label, check_contrast=False)
    description = {
        "channel_names": {"0": "R", "1": "G", "2": "B"},
        "labels": {"background": 0, "thing": 1},
        "numTraining": 5,
        "file_ending": ".png",
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    nnunet(
        "nnUNetv2_plan_and_preprocess", "-d", 900, "-pl", "nnUNetPlannerTiny", "-c", "2d", "-npfp", 1, "-np", 1,
        "-fpe", "MultimodalFingerprintExtractor", "-preprocessor_name", "MultimodalPreprocessor", nnUNet_n_proc_DA="1",
    )  # fmt: skip
    nnunet.train(TRAINER, "2d")
    return nnunet


def predict(nnunet, output, *more):
    images = nnunet.raw / DATASET / "imagesTr"
    model = ["-d", "900", "-tr", TRAINER, "-p", PLANS, "-c", "2d", "-f", "0", "-device", "cpu", "--samples", "1"]
    with nnunet.environment():
        cli.main(["predict", "-i", str(images), "-o", str(output), *model, "--maps", "--save_probabilities", *more])
    return np.load(output / "case_0.npz")["probabilities"]


def test_one_file_holds_all_channels(trained, tmp_path):
    stock = trained.predict(TRAINER, "2d", tmp_path / "stock", "--save_probabilities")
    ours = predict(trained, tmp_path / "ours")
    np.testing.assert_allclose(np.load(stock / "case_0.npz")["probabilities"], ours, atol=1e-6)
    assert json.loads((tmp_path / "ours" / "case_0.json").read_text())["absent"] == []


def test_a_channel_can_be_dropped_but_not_all(trained, tmp_path):
    dropped = predict(trained, tmp_path / "dropped", "--drop", "R,B")
    assert json.loads((tmp_path / "dropped" / "case_0.json").read_text())["absent"] == ["R", "B"]
    assert np.abs(dropped - predict(trained, tmp_path / "all")).max() > 1e-4
    with pytest.raises(UserError, match="case_0: --drop leaves nothing; drop less"):
        predict(trained, tmp_path / "none", "--drop", "R,G,B")


def test_such_files_cannot_be_completed(trained):
    with pytest.raises(UserError, match=r"case_0_0000.png has 3 channels in one file; split it"):
        cli.main(["complete", str(trained.raw / DATASET / "imagesTr"), "-np", "1"])
