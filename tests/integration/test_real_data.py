"""CRNP through nnU-Net's commands on real PET/CT/MR images; benchmarks/sts.py trains for long enough to compare."""

import json
import shutil

import numpy as np
import pytest
import SimpleITK

from tests.nnunet import DATASET, PLANS, NnUNet

CASES = ("STS_001", "STS_003", "STS_004")


@pytest.fixture
def nnunet(tmp_path, real_data):
    nnunet = NnUNet(tmp_path)
    for folder in ("imagesTr", "labelsTr"):
        (nnunet.raw / DATASET / folder).mkdir(parents=True)
        for file in (real_data / "sts_petct_mr" / folder).iterdir():
            if file.name.startswith(CASES):
                shutil.copy(file, nnunet.raw / DATASET / folder)
    description = {
        "channel_names": {"0": "CT", "1": "PET", "2": "T1"},
        "labels": {"background": 0, "tumour": 1},
        "numTraining": len(CASES),
        "file_ending": ".nii.gz",
    }
    (nnunet.raw / DATASET / "dataset.json").write_text(json.dumps(description))
    nnunet("nnUNetv2_extract_fingerprint", "-d", 900, "-np", 1)
    spacing = ("-overwrite_target_spacing", 8, 6, 6)
    nnunet("nnUNetv2_plan_experiment", "-d", 900, "-pl", "nnUNetPlannerTiny", *spacing, nnUNet_n_proc_DA="1")
    nnunet("nnUNetv2_preprocess", "-d", 900, "-plans_name", PLANS, "-c", "3d_fullres", "-np", 1)
    return nnunet


def test_crnp_trains_and_predicts_on_the_images_own_grid(nnunet, tmp_path):
    trainer = "CRNPTrainer_1epoch_5iterations"
    nnunet.train(trainer, "3d_fullres", "all")
    model = ("-d", 900, "-tr", trainer, "-p", PLANS, "-c", "3d_fullres", "-f", "all", "-device", "cpu")
    images = nnunet.raw / DATASET / "imagesTr"
    nnunet("nnUNetv2_predict", "-i", images, "-o", tmp_path / "out", *model, "-npp", 1, "-nps", 1)
    for case in CASES:
        prediction = SimpleITK.ReadImage(str(tmp_path / "out" / f"{case}.nii.gz"))
        image = SimpleITK.ReadImage(str(images / f"{case}_0001.nii.gz"))
        assert prediction.GetSize() == image.GetSize()
        np.testing.assert_allclose(prediction.GetOrigin(), image.GetOrigin())
        np.testing.assert_allclose(prediction.GetSpacing(), image.GetSpacing())
