"""A small study, made with this package's own writers and as nnU-Net writes its files; and what reads a page."""

import base64
import csv
import gzip
import html.parser
import io
import json
import math
import re

import numpy as np
import SimpleITK
from PIL import Image

from nnunet_multimodal.cli import main
from nnunet_multimodal.evaluate.subset_report import Measured, Scores, as_csv, summarise
from nnunet_multimodal.inference.quantities import RunningQuantities
from nnunet_multimodal.metrics.case import CaseMeasures

CASES = ("case_1", "case_10", "case_2")
LABEL = 'tumour <b>&"core" </script> $\\frac$'  # of a label map, to be shown as it is
RATERS = ("A", "B <b>")  # B draws less than A, and a slope
SHAPE, SPACING_MM = (6, 10, 12), (2.0, 1.5, 1.0)  # (Z, Y, X)
CHANNELS = ("CT", "PET")
TRAINER = "SSNTrainer_3epochs"
LOG = """
2026-11-21 15:02:47.100000: Started with: {"versions": {"nnunet-multimodal": "0.0.1", "nnunetv2": "2.8.0"}, "command": ["nnUNetv2_train", "7", "3d_big", "0", "-pretrained_weights", "/home/me/start.pth"]} 
This is the configuration used by this training:
2026-11-21 15:02:47.276726: Epoch 0 
2026-11-21 15:02:47.276837: Current learning rate: 0.01 
2026-11-21 15:06:22.749192: train_loss -0.3531 
2026-11-21 15:06:22.749415: val_loss -0.4019 
2026-11-21 15:06:22.749485: Pseudo dice [np.float32(0.5), np.float32(nan), np.float32(0.7)] 
2026-11-21 15:06:22.749634: Epoch time: 215.47 s 
2026-11-21 15:06:22.749702: Yayy! New best EMA pseudo Dice: 0.7825999855995178 
2026-11-21 15:06:24.073638: Epoch 1 
2026-11-21 15:06:24.073753: Current learning rate: 0.00925 
2026-11-21 15:07:00.000000: Step skipped (1 of at most 10 an epoch): loss or gradient not finite
2026-11-21 15:11:03.526818: train_loss nan 
2026-11-21 15:11:03.527030: val_loss 1.2e-05 
2026-11-21 15:11:03.527081: Pseudo dice [nan, nan] 
2026-11-21 15:11:03.527145: Epoch time: 20.0 s 
2026-11-21 15:11:04.997690: Epoch 2 
2026-11-21 15:11:04.997810: Current learning rate: 0.00849 
"""  # noqa: E501, W291  (nnU-Net's lines end in a space)
DATASET = {
    "channel_names": dict(zip("01", CHANNELS, strict=True)),
    "labels": {"background": 0, LABEL: 1},
    "numTraining": 3,
    "file_ending": ".nii.gz",
}
PLANS = {
    "dataset_name": "Dataset007_Study",
    "plans_name": "nnUNetPlans",
    "image_reader_writer": "SimpleITKIO",
    "label_manager": "LabelManager",
    "experiment_planner_used": "ExperimentPlanner",
    "foreground_intensity_properties_per_channel": {"0": {"percentile_00_5": -75.0, "percentile_99_5": 185.0}},
    "configurations": {
        "3d_fullres": {
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": 2,
            "patch_size": [32, 48, 48],
            "spacing": [4.0, 3.0, 3.0],
            "normalization_schemes": ["CTNormalization", "ZScoreNormalization"],
            "architecture": {
                "network_class_name": "a.b.PlainConvUNet",
                "arch_kwargs": {"features_per_stage": [16, 32]},
            },
        },
        "3d_big": {"inherits_from": "3d_fullres", "batch_size": 4, "nnunet_multimodal": {"ssn": {"rank": 7}}},
    },
}

IDENTITY = {
    "model": f"Dataset007_Study/{TRAINER}__nnUNetPlans__3d_big",
    "checkpoints": [["fold_0/checkpoint_final.pth", 12_345_678, 1_764_000_000]],
    "step_size": 0.5,
    "mirroring": True,
}


def made(*command):
    """What our commands write down of themselves."""
    versions = {"python": "3.11.1", "nnunet-multimodal": "0.0.1", "nnunetv2": "2.8.0", "torch": "2.8.0"}
    return {"versions": versions, "command": ["nnunet-multimodal", *command]}


def save(file, array, direction=(1, 0, 0, 0, 1, 0, 0, 0, 1)):
    file.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(SPACING_MM[::-1])
    image.SetDirection([float(value) for value in direction])
    SimpleITK.WriteImage(image, str(file))


def box(shift):
    """A label map (Z, Y, X) with a box."""
    array = np.zeros(SHAPE, np.uint8)
    array[1:4, 2 : 6 + shift, 3:8] = 1
    return array


def write_predictions(folder, cases=CASES, samples=3):
    for index, case in enumerate(cases):
        prediction = box(index)
        save(folder / f"{case}.nii.gz", prediction)
        quantities = RunningQuantities({LABEL: 1}, math.prod(SPACING_MM) / 1000)
        if not samples:
            continue
        for sample in range(samples):
            drawn = box(index + sample - 1)
            save(folder / "samples" / f"{case}__{sample:03d}.nii.gz", drawn)
            quantities.add(drawn)
        save(folder / "uncertainty" / f"{case}_entropy.nii.gz", 0.7 * prediction.astype(np.float32))
        summary = {
            "case": case, "samples": samples, "sample_weights": None, "samples_wanted": samples, "seed": 5,
            "temperature": 1.0, "class_scale": [], "compact": False, "drop": [], "drawn_from": "distribution",
            "trainer": TRAINER, "absent": ["PET"] if index == 2 else [], "spacing": list(SPACING_MM),
            "labels": quantities.summary(prediction), **IDENTITY, "made": made("predict", "-i", "/home/me/images"),
        }  # fmt: skip
        (folder / f"{case}.json").write_text(json.dumps(summary))
        probabilities = np.stack([1 - 0.9 * prediction, 0.9 * prediction]).astype(np.float32)
        np.savez_compressed(folder / f"{case}.npz", probabilities=probabilities)
    (folder / "dataset.json").write_text(json.dumps(DATASET))
    (folder / "plans.json").write_text(json.dumps(PLANS))


def write_model(folder):
    fold = folder / "fold_0"
    (fold / "validation").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(PLANS))
    (folder / "dataset.json").write_text(json.dumps(DATASET))
    (fold / "training_log_2026_11_21_15_02_46.txt").write_text(LOG)
    debug = {
        "torch_version": "2.9.0",
        "device": "cuda:0",
        "gpu_name": "None",
        "hostname": "secret-host",
        "num_epochs": "3",
    }
    (fold / "debug.json").write_text(json.dumps(debug))
    measures = {"Dice": 0.625, "IoU": 0.4545, "n_pred": 10, "n_ref": 12}
    summary = {
        "foreground_mean": measures,
        "mean": {"1": measures},
        "metric_per_case": [
            {"metrics": {"1": measures}, "prediction_file": "/v/case_1.nii.gz", "reference_file": "/g/case_1.nii.gz"}
        ],
    }
    (fold / "validation" / "summary.json").write_text(json.dumps(summary))
    (fold / "checkpoint_final.pth").touch()


def rated(rater):
    """The label map (Z, Y, X) of a rater."""
    if rater == RATERS[0]:
        return box(1)
    z, y, x = np.indices(SHAPE)
    return ((z < 4) & (x + y < 10)).astype(np.uint8)


def write_raters(folder, cases=CASES):
    for case in cases:
        for rater in RATERS:
            save(folder / f"{case}__{rater}.nii.gz", rated(rater))
        save(folder / f"{case}__C.nii.gz", box(4))
    rows = [f"{case},C,0" for case in cases]  # C does not count
    (folder / "raters.csv").write_text("\n".join(["case,rater,weight", *rows]) + "\n")


def write_subsets(folder):
    folder.mkdir()
    subsets = [(0,), (1,), (0, 1)]
    measured = [
        Measured(model, subset, case, CaseMeasures({1: (m := {"Dice": 0.5 + 0.1 * i + 0.05 * s, "HD95_mm": 3.0})}, m))
        for i, model in enumerate(("A_5epochs", "B_5epochs"))
        for s, subset in enumerate(subsets)
        for case in CASES
    ]
    scores = summarise(measured, Scores(("A_5epochs", "B_5epochs"), "A_5epochs", CHANNELS, (1,), (LABEL,)))
    (folder / "subsets.csv").write_text(as_csv(scores))
    for model, step in (("A_5epochs", 0.5), ("B_5epochs", 0.25)):
        own = f"/home/me/Dataset007/{model}"
        checkpoints = [[f"{own}/fold_0/checkpoint_final.pth", 2_000_000, 1_764_000_000]]
        identity = {"folder": own, "checkpoints": checkpoints, "step_size": step, "mirroring": False}
        (folder / model).mkdir()
        (folder / model / "model.json").write_text(json.dumps(identity))
    note = {"baseline": "A_5epochs", "made": made("evaluate", "--all-subsets", r"C:\Users\me\labelsTs")}
    (folder / "provenance_evaluate.json").write_text(json.dumps(note))
    return scores


def write_explained(folder):
    folder.mkdir()
    with (folder / "contributions.csv").open("w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(
            ("case", "modality", "label", "volume_ml", "volume_without_ml", "changed", "Dice", "Dice_without")
        )
        writer.writerow(("case_1", "CT", LABEL, 0.3, 0.1, 0.25, 0.75, 0.5))
        writer.writerow(("case_2", "CT", LABEL, 0.3, 0.1, 0.75, 0.5, 0.5))
        writer.writerow(("case_1", "PET", LABEL, 0.3, 0.3, 0, "", ""))
        writer.writerow(("case_10", "1", LABEL, "", "", 0.5, "", ""))  # a modality whose name is a number
    note = {**IDENTITY, "attribution": None, "steps": 20, "made": made("explain", "-o=/home/me/explained/")}
    (folder / "provenance_explain.json").write_text(json.dumps(note))
    save(folder / "complementary" / "case_1_CT_core_from_PET.nii.gz", np.full(SHAPE, 0.5, np.float32))


def make_study(root, cases=CASES, raters=False):
    """Images, references, predictions (evaluated by our command), a model, subsets and explanations below root."""
    rng = np.random.default_rng(0)
    for index, case in enumerate(cases):
        save(root / "labels" / f"{case}.nii.gz", box(1))
        for channel in range(2 if index < 2 else 1):
            image = rng.normal(0, 10, SHAPE) + 50 * box(1) * (channel + 1)
            save(root / "images" / f"{case}_{channel:04d}.nii.gz", image.astype(np.float32))
    write_predictions(root / "results" / "predictions", cases)
    write_model(root / "results" / "Dataset007_Study" / f"{TRAINER}__nnUNetPlans__3d_big")
    write_subsets(root / "results" / "subsets")
    write_explained(root / "results" / "explained")
    flags = ["--raters", str(root / "raters")] if raters else []
    if raters:
        write_raters(root / "raters", cases)
    assert main(["evaluate", str(root / "labels"), str(root / "results" / "predictions"), "-np", "1", *flags]) == 0
    return root


def make_flat(root):
    """A PNG: prediction with a sample, reference and two raters below root, no image."""
    wide = {"p/a": 16, "p/samples/a__000": 18, "labels/a": 20, "raters/a__A": 20, "raters/a__B": 12}
    drawn = {}
    for name, width in wide.items():
        drawn[name] = np.zeros((30, 40), np.uint8)
        drawn[name][5:10, 5 : 5 + width] = 1
        file = root / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn[name]).save(file)
    quantities = RunningQuantities({LABEL: 1}, None)
    quantities.add(drawn["p/samples/a__000"])
    summary = {"case": "a", "samples": 1, "spacing": [1, 1], "labels": quantities.summary(drawn["p/a"])}
    (root / "p" / "a.json").write_text(json.dumps(summary))
    (root / "p" / "dataset.json").write_text(json.dumps({**DATASET, "file_ending": ".png"}))
    (root / "p" / "plans.json").write_text(json.dumps({**PLANS, "image_reader_writer": "NaturalImage2DIO"}))


def unzip(text, shape):
    return np.frombuffer(gzip.decompress(base64.b64decode(text)), np.uint8).reshape(shape)


def unfold(text, view):
    """A mosaic's slices (Z, Y, X)."""
    whole = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("L")).astype(float)
    depth, height, width = view["shape"]
    places = [divmod(z, view["columns"]) for z in range(depth)]
    return np.stack([whole[r * height : (r + 1) * height, c * width : (c + 1) * width] for r, c in places])


class WellFormed(html.parser.HTMLParser):
    """Checks that elements close in order, and collects what the page has."""

    VOID = frozenset({"meta", "link", "input", "img", "br", "wbr"})

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.tags, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        own = dict(attributes)
        assert len(own) == len(attributes), f"twice the same attribute: {attributes}"
        self.ids += [own["id"]] if "id" in own else []
        self.links += [value for name, value in attributes if name in ("src", "href", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> without a beginning"
        assert self.open.pop() == tag, f"</{tag}> after {self.open}"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data


def json_of(text, pattern):
    return [
        json.loads(found) for found in re.findall(rf'<script type="application/json" {pattern}>(.*?)</script>', text)
    ]
