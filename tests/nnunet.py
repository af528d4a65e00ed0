"""Runs nnU-Net's own commands on tiny data, in this process (their imports would take longer than their work)."""

import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from unittest import mock

import numpy as np
import SimpleITK
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_multimodal import cli
from nnunet_multimodal.raters.preprocessing import save_raters

DATASET = "Dataset900_Tiny"
PLANS = "nnUNetTinyPlans"
LABELS = {
    "labels": {"background": 0, "organ": 1, "lesion": 2},
    "regions": {"background": 0, "whole": [1, 2], "lesion": 2},
    "ignore": {"background": 0, "organ": 1, "lesion": 2, "ignore": 3},
    "regions_ignore": {"background": 0, "whole": [1, 2], "lesion": 2, "ignore": 3},
}
CHANNELS = ("T1", "T2", "PET")
RATERS = {0: "ABC", 1: "AB", 2: "B", 3: "ABC", 4: "AC"}
SHIFT = {"A": 0, "B": 1, "C": -1}


# nnU-Net's workers are spawned and import torch anew, which takes longer than their work here. These are forked from a
# process that has imported it; the demo's test and the benchmarks run the commands as they are.
WORKERS = (
    "nnunet_multimodal.preprocessing",
    "nnunetv2.inference.predict_from_raw_data",
    "nnunetv2.evaluation.evaluate_predictions",
    "nnunet_multimodal.trainers.combinations",
    "nnunetv2.run.run_training",
)
_get_context = multiprocessing.get_context


def forkserver():
    """The context of workers that import nothing anew."""
    multiprocessing.set_forkserver_preload(list(WORKERS))
    return _get_context("forkserver")


def _forked_workers(method: str | None = None):
    return forkserver() if method == "spawn" else _get_context(method)


class NnUNet:
    """nnU-Net's three folders under one, and its commands with the variables that name them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.raw, self.preprocessed, self.results = (root / f for f in ("raw", "preprocessed", "results"))
        for folder in (self.raw, self.preprocessed, self.results):
            folder.mkdir(exist_ok=True)

    def with_results(self, results: Path) -> "NnUNet":
        """The same data with another (empty) results folder."""
        results.mkdir(parents=True, exist_ok=True)
        other = NnUNet(self.root)
        other.results = results
        return other

    def environment(self, **more: str):
        return mock.patch.dict(
            os.environ,
            {
                "nnUNet_raw": str(self.raw),
                "nnUNet_preprocessed": str(self.preprocessed),
                "nnUNet_results": str(self.results),
                "nnUNet_n_proc_DA": "0",
                **more,
            },
        )

    def __call__(self, command: str, *args: object, **environment: str) -> None:
        """``nnunet("nnUNetv2_train", 900, "2d", 0)``: what the console script of that name does, nnU-Net's or ours."""
        (script,) = entry_points(group="console_scripts", name=command)
        argv = [command, *map(str, args)]
        threads = torch.get_num_threads()
        quickly = mock.patch.object(multiprocessing, "get_context", _forked_workers)
        with self.environment(**environment), mock.patch.object(sys, "argv", argv), quickly:
            if command == "nnunet-multimodal":
                assert cli.main(argv[1:]) == 0
            else:
                script.load()()
        torch.set_num_threads(threads)

    def train(self, trainer: str, configuration: str = "3d_fullres", fold: object = 0, *more: object) -> Path:
        """Train on the CPU; returns the folder of the fold."""
        self("nnUNetv2_train", 900, configuration, fold, "-tr", trainer, "-p", PLANS, "-device", "cpu", *more)
        return self.model(trainer, configuration) / f"fold_{fold}"

    def predict(
        self, trainer: str, configuration: str, output: Path, *more: object, images: Path | None = None
    ) -> Path:
        """Predict the raw dataset's images."""
        images = images or self.raw / DATASET / "imagesTr"
        model = ("-d", 900, "-tr", trainer, "-p", PLANS, "-c", configuration, "-f", 0)
        self("nnUNetv2_predict", "-i", images, "-o", output, *model, "-device", "cpu", "-npp", 1, "-nps", 1, *more)
        return output

    def model(self, trainer: str, configuration: str) -> Path:
        return self.results / DATASET / f"{trainer}__{PLANS}__{configuration}"

    def plans(self, name: str = PLANS) -> dict:
        return json.loads((self.preprocessed / DATASET / f"{name}.json").read_text())

    def write_plans(self, plans: dict) -> None:
        (self.preprocessed / DATASET / f"{plans['plans_name']}.json").write_text(json.dumps(plans))

    def trainer(self, name: str, configuration: str = "3d_fullres", plans: str = PLANS, fold: int = 0):
        """An instance of a trainer, as nnU-Net's command makes it."""
        from nnunetv2.run.run_training import get_trainer_from_args

        with self.environment():
            return get_trainer_from_args("900", configuration, fold, name, plans, device=torch.device("cpu"))


def make_dataset(
    root: Path,
    kind: str,
    channels: tuple[str, ...] = CHANNELS,
    cases: int = 5,
    absent: Mapping[int, Sequence[int]] | None = None,
) -> NnUNet:
    """A raw dataset of bright boxes, planned and preprocessed by nnU-Net, with a cascade added to the plans.

    ``absent`` has the channels that a case lacks; they are completed with placeholders, and planned accordingly.
    """
    nnunet = NnUNet(root)
    write_raw(nnunet, kind, channels, cases)
    knowing: dict[str, tuple[str, ...]] = {"fingerprint": (), "plan": ()}
    if absent is not None:
        remove_channels(nnunet.raw / DATASET / "imagesTr", absent)
        assert cli.main(["complete", str(nnunet.raw / DATASET / "imagesTr"), "-np", "1"]) == 0
        knowing["fingerprint"] = ("-fpe", "MultimodalFingerprintExtractor")
        knowing["plan"] = ("-preprocessor_name", "MultimodalPreprocessor")
    nnunet("nnUNetv2_extract_fingerprint", "-d", 900, "-np", 1, *knowing["fingerprint"])
    nnunet(
        "nnUNetv2_plan_experiment", "-d", 900, "-pl", "nnUNetPlannerTiny", "-gpu_memory_target", 0.005,
        *knowing["plan"], nnUNet_n_proc_DA="1",
    )  # fmt: skip
    nnunet.write_plans(_with_cascade(nnunet.plans()))
    nnunet("nnUNetv2_preprocess", "-d", 900, "-plans_name", PLANS, "-c", "2d", "3d_fullres", "3d_lowres", "-np", 1)
    return nnunet


def remove_channels(folder: Path, absent: Mapping[int, Sequence[int]]) -> None:
    """Take files of cases away."""
    for case, gone in absent.items():
        for channel in gone:
            (folder / f"case_{case}_{channel:04d}.nii.gz").unlink()


def write_raw(nnunet: NnUNet, kind: str, channels: tuple[str, ...] = CHANNELS, cases: int = 5) -> None:
    """Images, label maps and dataset.json."""
    folder = nnunet.raw / DATASET
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for case in range(cases):
        _write_case(folder, f"case_{case}", rng, len(channels), kind)
    labels = LABELS[kind]
    description = {
        "channel_names": dict(enumerate(channels)),
        "labels": labels,
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    if "regions" in kind:
        description["regions_class_order"] = [1, 2]
    (folder / "dataset.json").write_text(json.dumps(description))


def _write_case(folder: Path, case: str, rng: np.random.Generator, channels: int, kind: str) -> None:
    shape = (18, 20, 22)
    label = np.zeros(shape, dtype=np.uint8)
    corner = rng.integers(2, 6, 3)
    label[tuple(slice(c, c + 10) for c in corner)] = 1
    label[tuple(slice(c + 3, c + 7) for c in corner)] = 2
    images = [rng.normal(0, 0.3, shape) + 2.0 * (label > channel % 2) for channel in range(channels)]
    if "ignore" in kind:
        label[:, :, -3:] = 3
    files = [(f"imagesTr/{case}_{channel:04d}", image.astype(np.float32)) for channel, image in enumerate(images)]
    for name, array in [*files, (f"labelsTr/{case}", label)]:
        image = SimpleITK.GetImageFromArray(array)
        image.SetSpacing((1.0, 1.1, 1.5))
        SimpleITK.WriteImage(image, str(folder / f"{name}.nii.gz"))


def write_raters(nnunet: NnUNet, ignore: bool) -> Path:
    """The folder of a raw dataset's raters: each draws the same, moved; their ignore label lies elsewhere."""
    folder = nnunet.raw / DATASET / "ratersTr"
    folder.mkdir()
    for case, names in RATERS.items():
        image = SimpleITK.ReadImage(str(nnunet.raw / DATASET / "labelsTr" / f"case_{case}.nii.gz"))
        labels = SimpleITK.GetArrayFromImage(image)
        for name in names:
            own = np.roll(np.where(labels == 3, 0, labels), SHIFT[name], 1)
            if ignore:
                own[..., -2:] = 3
            rater = SimpleITK.GetImageFromArray(own)
            rater.CopyInformation(image)
            SimpleITK.WriteImage(rater, str(folder / f"case_{case}__{name}.nii.gz"))
    (folder / "raters.csv").write_text("case,rater,weight\ncase_0,A,2\ncase_0,C,0\n")
    return folder


def with_raters(nnunet: NnUNet, root: Path, ignore: bool) -> NnUNet:
    """A copy of a preprocessed dataset, with raters as ``MultimodalPreprocessor`` keeps them."""
    for folder in (nnunet.raw, nnunet.preprocessed):
        shutil.copytree(folder, root / folder.name)
    made = NnUNet(root)
    write_raters(made, ignore)
    raw, plans = made.raw / DATASET, PlansManager(made.plans())
    description = json.loads((raw / "dataset.json").read_text())
    for name in ("2d", "3d_fullres", "3d_lowres"):
        configuration = plans.get_configuration(name)
        data = made.preprocessed / DATASET / configuration.data_identifier
        for case in (f"case_{number}" for number in RATERS):
            image, label = raw / "imagesTr" / f"{case}_0000.nii.gz", raw / "labelsTr" / f"{case}.nii.gz"
            save_raters(str(data / case), str(image), str(label), plans, configuration, description)
    return made


def _with_cascade(plans: dict) -> dict:
    configurations = plans["configurations"]
    fullres = configurations["3d_fullres"]
    configurations["3d_lowres"] = {
        "inherits_from": "3d_fullres",
        "data_identifier": f"{PLANS}_3d_lowres",
        "spacing": [1.3 * spacing for spacing in fullres["spacing"]],
        "next_stage": "3d_cascade_fullres",
    }
    configurations["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    for configuration in configurations.values():
        if "batch_size" in configuration:
            configuration["batch_size"] = 2
            configuration["nnunet_multimodal"] = {
                "modality_dropout": {"warm_up": 0},  # trainings are of one epoch
                "mose": {"num_experts": 2, "samples_per_expert": 2},
            }
    return plans


def segmentation(path: Path) -> np.ndarray:
    """The array of an image file."""
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
