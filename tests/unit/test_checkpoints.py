"""Checkpoints that would run code are refused before anything of them runs."""

import os
import zipfile

import numpy as np
import pytest
import torch

from nnunet_multimodal.checkpoints import refuse_code
from nnunet_multimodal.errors import UserError

CHECKPOINT = {
    "network_weights": {"a": torch.zeros(2)},
    "logging": {"ema_fg_dice": [np.float32(0.5), np.float64(1)], "dice_per_class_or_region": [[np.float64(0.1)]]},
    "init_args": {"device": torch.device("cpu"), "plans": {"a": [1, 2.0, None]}},
    "arrays": np.arange(3),
}


class Harmful:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_nnunets_checkpoints_pass(tmp_path):
    torch.save(CHECKPOINT, tmp_path / "checkpoint.pth")
    refuse_code(tmp_path / "checkpoint.pth")


def test_code_is_refused_and_not_run(tmp_path):
    torch.save({**CHECKPOINT, "extra": Harmful(tmp_path / "ran")}, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match=r"checkpoint\.pth would import \w+\.mkdir when loaded"):
        refuse_code(tmp_path / "checkpoint.pth")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "checkpoint.pth", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0, 100, 700])
def test_a_torn_checkpoint_is_named(tmp_path, keep):
    torch.save(CHECKPOINT, tmp_path / "whole.pth")
    (tmp_path / "torn.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:keep])
    with pytest.raises(UserError, match=r"torn\.pth is not a whole checkpoint"):
        refuse_code(tmp_path / "torn.pth")


def test_a_zip_cannot_write_outside_the_results_folder(tmp_path, monkeypatch):
    from nnunetv2.model_sharing import model_import

    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(model_import, "nnUNet_results", str(results))
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("../outside.txt", "")
        archive.writestr(str(tmp_path / "absolute.txt"), "")
        archive.writestr("Dataset001_A/plans.json", "{}")
    model_import.install_model_from_zip_file(str(tmp_path / "model.zip"))
    assert (results / "Dataset001_A" / "plans.json").is_file()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.zip", "results"]
