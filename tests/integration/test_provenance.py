"""What commands leave on disk of themselves, and that the report finds all of it."""

import json

import pytest

from nnunet_multimodal import __version__
from nnunet_multimodal.report import gather, provenance
from tests.nnunet import DATASET, PLANS

OURS, STOCK = "CRNPSSNTrainer_1epoch_2iterations", "nnUNetTrainer_1epoch_2iterations"


@pytest.fixture(scope="module")
def results(datasets, tmp_path_factory):
    """A study's folders, and the data they are of."""
    folder = tmp_path_factory.mktemp("study")
    nnunet = datasets("labels").with_results(folder / "nnUNet_results")
    where = [900, "3d_fullres", 0, "-p", PLANS, "-device", "cpu"]
    nnunet("nnUNetv2_train", *where, "-tr", OURS)
    nnunet("nnunet-multimodal", "train", *where, "-tr", STOCK, "--seed", 5)
    raw = nnunet.raw / DATASET
    model = ["-d", 900, "-tr", OURS, "-p", PLANS, "-c", "3d_fullres", "-f", 0, "-device", "cpu"]
    images = ["-i", raw / "imagesTr"]
    sampled = ["--samples", 2, "--save-samples", "--temperature", 0.5, "--disable_tta"]
    nnunet("nnunet-multimodal", "predict", *images, "-o", folder / "sampled", *model, *sampled)
    nnunet.predict(STOCK, "3d_fullres", folder / "stock")
    nnunet("nnunet-multimodal", "evaluate", raw / "labelsTr", folder / "sampled", "-np", 1, "--samples", 1)
    nnunet("nnunet-multimodal", "explain", *images, "-o", folder / "explained", *model)
    nnunet("nnunet-multimodal", "uncertainty", *images, "-o", folder / "maps", *model)
    subsets = ["evaluate", "--all-subsets", raw / "labelsTr", folder / "subsets", *images, *model, "--disable_tta"]
    nnunet("nnunet-multimodal", *subsets, "-np", 1)
    return folder


def told(record):
    """Row -> the one thing that it says."""
    return {row.name: row.values[0].text for row in record.rows if len(row.values) == 1}


def test_everything_is_recorded(results):
    study = gather.gather_study([results], None, None)
    records = {record.heading: told(record) for record in provenance.records(study, "now")}
    ours, stock = (records[f"Training: {trainer}, 3d_fullres"] for trainer in (OURS, STOCK))
    assert ours["command"] == f"nnUNetv2_train 900 3d_fullres 0 -p {PLANS} -device cpu -tr {OURS}"
    assert stock["command"].endswith(f"-tr {STOCK} --seed 5")
    assert (ours["seed"], stock["seed"], stock["processes"]) == ("none", "5", "1")
    sampled = records["Predictions: sampled"]
    assert sampled["command"].startswith("nnunet-multimodal predict -i imagesTr -o sampled -d 900")
    assert (sampled["samples"], sampled["temperature"], sampled["mirrored"]) == ("2", "0.5", "no")
    assert records["Predictions: stock"]["images"] == "imagesTr"
    evaluated = records["Evaluation: sampled"]
    assert (evaluated["references"], evaluated["first samples measured too"]) == ("labelsTr", "1")
    assert evaluated["command"] == "nnunet-multimodal evaluate labelsTr sampled -np 1 --samples 1"
    assert records["Explanation: explained"]["mirrored"] == "yes"
    subsets = records["Subsets of the modalities: subsets"]
    assert (subsets["baseline"], subsets["mirrored"]) == (OURS, "no")
    makers = {name: own for name, own in records.items() if name not in ("This page", "Predictions: stock")}
    assert len(makers) == 7
    for name, own in makers.items():
        assert provenance.UNKNOWN not in own.values(), name
        assert own["versions"].startswith(f"nnunet-multimodal {__version__}, nnunetv2 2."), name
        assert provenance.UNKNOWN not in own["versions"], name


def test_an_interrupted_study_of_subsets_still_goes_on(results):
    """What is compared to go on is not what changes from call to call."""
    identity = json.loads((results / "subsets" / OURS / "model.json").read_text())
    assert not {"made", "command", "versions"} & identity.keys()
