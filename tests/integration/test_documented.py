"""README's and the docs' commands as they stand there, on tiny data, with trainings of one step."""

import itertools
import json
import os
import re
import shutil
from functools import partial
from importlib.util import find_spec

import pytest
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

from nnunet_multimodal import cli
from nnunet_multimodal.datasets import synthetic
from nnunet_multimodal.demo import runner
from nnunet_multimodal.lookup import split_length
from tests import nnunet as tiny
from tests.dicom import CASE, FDG, volume, write_series
from tests.documented import DOCS
from tests.nnunet import NnUNet, remove_channels, write_raw

DATASET = "Dataset001_BraTS"
CPU = ("-device", "cpu")
QUICK = (*CPU, "--disable_tta")
# what a command gets besides
SMALLER = {
    "nnUNetv2_plan_and_preprocess": ("-npfp", "1", "-np", "1"),
    "nnUNetv2_preprocess": ("-np", "1"),
    "nnUNetv2_predict": (*QUICK, "-npp", "1", "-nps", "1"),
    "nnUNetv2_evaluate_folder": ("-np", "1"),
    "predict": (*QUICK, "--samples", "4"),
    **dict.fromkeys(("explain", "--all-subsets"), QUICK),
    **dict.fromkeys(("nnUNetv2_train", "train", "uncertainty", "features"), CPU),
}


class Shell:
    """A folder with what the commands name, and what runs them there, in this process.

    Attributes:
        folder: with the images and labels of a case, which is one of the training cases.
        raw: the data set: five cases of bright boxes.
    """

    def __init__(self, folder, channels=("FLAIR", "T1")):
        self.folder, self.nnunet = folder, NnUNet(folder)
        write_raw(self.nnunet, "labels", channels)
        self.raw = (self.nnunet.raw / tiny.DATASET).rename(self.nnunet.raw / DATASET)
        description = json.loads((self.raw / "dataset.json").read_text())
        description["labels"] = {"background": 0, "necrosis": 1, "enhancing": 2}
        (self.raw / "dataset.json").write_text(json.dumps(description))
        for copy, kind in itertools.product(("", "Ts"), ("images", "labels")):
            (folder / f"{kind}{copy}").mkdir()
            for file in (self.raw / f"{kind}Tr").glob("case_0*"):
                shutil.copy(file, folder / f"{kind}{copy}")

    def __call__(self, command):
        with self.nnunet.environment():
            program, *arguments = (self.shorter(os.path.expandvars(word)) for word in command)
        more = [flag for word in (program, *arguments) for flag in SMALLER.get(word, ())]
        self.nnunet(program, *arguments, *more, nnUNet_n_proc_DA=n_proc_da(program))

    def type(self, line):
        """A command that comes before those of the page."""
        self(line.split())

    @staticmethod
    def shorter(word):
        """A trainer's name with the shortest length; other words as they are."""
        name = split_length(word)[0]
        return f"{name}_1epochs_1iterations" if name.endswith("Trainer") else word


@pytest.fixture
def shell(tmp_path, monkeypatch, request):
    """In a folder of its own; networks are narrow."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    initialise = ExperimentPlanner.__init__

    def narrow(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        self.UNet_base_num_features, self.UNet_max_features_2d, self.UNet_max_features_3d = 4, 8, 8

    monkeypatch.setattr(ExperimentPlanner, "__init__", narrow)
    return Shell(tmp_path, **getattr(request, "param", {}))


def n_proc_da(command):
    """No workers, but where nnU-Net's planning would fail."""
    return str(int("plan" in command))


def names(folder, pattern):
    """Of the files in a folder."""
    return sorted(file.name for file in folder.glob(pattern))


def test_crnp(documented, shell):
    """README's first lines and own data, quick start, options, seeds, parts."""
    documented.run(shell, "docs/quickstart.md", "docs/methods/crnp.md")
    assert names(shell.folder / "predictions", "case_*.nii.gz") == ["case_0.nii.gz"]
    assert (shell.folder / "predictions" / "summary.json").is_file()
    assert names(shell.folder / "uncertainty", "*.nii.gz") == ["case_0_0000.nii.gz", "case_0_0001.nii.gz"]
    (example,) = re.findall(r"```json\n(.*?)```", (DOCS / "reference" / "options.md").read_text(), re.DOTALL)
    file = shell.nnunet.preprocessed / DATASET / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"] |= json.loads(f"{{{example}}}")
    file.write_text(json.dumps(plans))
    documented.run(shell)
    assert (shell.folder / "predictions" / "evaluation.parts").is_dir()


def test_demo(documented, shell, monkeypatch):
    """Short, on a few cases, and its steps in this process: a fresh Python for each would import torch again."""

    def execute(argv, settings, step, log, bar):
        nnunet = NnUNet(shell.folder)
        nnunet.raw, nnunet.preprocessed, nnunet.results = (settings.out / folder for folder in runner.FOLDERS)
        arguments = argv[1:] if step.program is None else argv[1 + len(step.program) :]
        with monkeypatch.context() as context:
            context.chdir(settings.out)
            nnunet(step.command[0], *arguments, nnUNet_n_proc_DA=n_proc_da(step.command[0]))
        return 0

    monkeypatch.setattr(runner, "_execute", execute)
    monkeypatch.setattr(synthetic, "write_dataset", partial(synthetic.write_dataset, num_training=5, num_test=1))
    monkeypatch.setattr(synthetic, "SHAPE", (16, 16, 16))
    short = ("--epochs", "1", "--iterations", "1", "--planner", "nnUNetPlannerTiny", "--device", "cpu")
    values = {"/path/to/Dataset001_BraTS": str(shell.raw), "cuda": "cpu"}
    documented.run(lambda command: cli.main([*command[1:], *short]), values=values)
    for folder in ("nnunet_multimodal_demo", "brats_demo"):
        table = json.loads((shell.folder / folder / "results.json").read_text())["table"]
        assert list(table) == ["nnUNetTrainer", "CRNPTrainer"]


def test_five_folds_are_shared(documented, shell, monkeypatch):
    """As an array of jobs trains them; the import is all that the prediction then has."""
    shell.type("nnUNetv2_plan_and_preprocess -d 1 -c 3d_fullres")

    def array(command):
        for fold in range(5):
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(fold))
            shell(command)

    documented.run(array, "docs/cluster.md")
    (model,) = (shell.nnunet.results / DATASET).iterdir()
    shutil.copy(model / "fold_4" / "checkpoint_final.pth", shell.folder)

    def elsewhere(command):
        if command[0] == "nnUNetv2_install_pretrained_model_from_zip":
            shutil.rmtree(shell.nnunet.results)
        shell(command)

    documented.run(elsewhere)
    assert len(names(model, "fold_?/checkpoint_final.pth")) == 5
    assert names(shell.folder / "predictions", "case_*.nii.gz") == ["case_0.nii.gz"]


def test_ssn_and_the_report(documented, shell):
    shell.type("nnUNetv2_plan_and_preprocess -d 1 -c 3d_fullres")
    pages = ("docs/quickstart.md", "docs/methods/ssn.md", "docs/howto/report.md", "README.md", "docs/howto/bids.md")
    values = {"images": "imagesTs", "labels": "labelsTs", "CIMLTrainer": "SSNTrainer", "40": "1"}
    values["$nnUNet_results/Dataset040_STUDY"] = f"$nnUNet_results/{DATASET}"
    documented.run(shell, *pages, values=values)
    assert names(shell.folder / "predictions" / "samples", "*") == [f"case_0__00{i}.nii.gz" for i in range(4)]
    for page in ("report.html", "study.html"):
        assert "case_0" in (shell.folder / page).read_text()


@pytest.mark.skipif(find_spec("highdicom") is None, reason="the extra 'dicom' is not installed")
def test_dicom(documented, shell):
    """A study of CT and PET, predicted by a model of as many modalities."""
    shape = (18, 20, 22)
    write_series(shell.folder / "DOWNLOAD" / "ct", volume(shape, seed=1), "CT")
    write_series(shell.folder / "DOWNLOAD" / "pt", volume(shape, seed=2), "PT", number=2, **FDG)
    shell.type("nnUNetv2_plan_and_preprocess -d 1 -c 3d_fullres")
    shell.type("nnUNetv2_train 1 3d_fullres 0 -tr SSNTrainer")
    documented.run(shell, values={"images": "imported"})
    kinds = ("entropy", "expected_entropy", "mutual_information", "seg")
    assert names(shell.folder / "objects", "*") == [f"{CASE}_{kind}.dcm" for kind in kinds]


def test_several_raters(documented, shell):
    """Two of the same opinion; nobody has made a consensus yet."""
    for source, raters in (
        (shell.raw / "labelsTr", (shell.raw / "ratersTr",)),
        (shell.folder / "labels", (shell.folder / "raters", shell.folder / "ratersTs")),
    ):
        for folder in raters:
            folder.mkdir()
            for file in source.iterdir():
                for rater in "AB":
                    shutil.copy(file, folder / file.name.replace(".nii", f"__{rater}.nii"))
    shutil.rmtree(shell.raw / "labelsTr")
    values = {
        "16": "2",
        "100": "4",
        "$nnUNet_results/Dataset001_Nodules": f"$nnUNet_results/{DATASET}",
    }
    documented.run(shell, "docs/howto/raters.md", "docs/mose.md", "README.md", values=values)
    assert len(list((shell.raw / "labelsTr").iterdir())) == 5
    assert "case_0" in (shell.folder / "report.html").read_text()
    assert names(shell.folder / "pictures", "*_samples.png") == ["case_0_samples.png"]
    assert json.loads((shell.folder / "predictions" / "case_0.json").read_text())["sample_weights"]


def test_missing_modalities(documented, shell):
    """Complete at first; then two training cases lose a modality."""
    shell.type("nnUNetv2_plan_and_preprocess -d 1 -c 3d_fullres")
    shell.type("nnUNetv2_train 1 3d_fullres 0 -tr nnUNetTrainer")

    def incomplete(command):
        if "complete" in command:
            remove_channels(shell.raw / "imagesTr", {2: (0,), 3: (1,)})
            shutil.rmtree(shell.nnunet.preprocessed / DATASET)
        shell(command)

    documented.run(incomplete, "docs/howto/incomplete.md", "README.md")
    assert (shell.raw / "imagesTr" / "modalities.csv").is_file()
    subsets = (shell.folder / "subsets" / "subsets.csv").read_text()
    assert all(name in subsets for name in ("nnUNetTrainer", "ShaSpecModalityDropoutTrainer", "FLAIR+T1"))


def test_ciml(documented, shell):
    documented.run(shell, values={"22": "1", "$nnUNet_results/Dataset022_HECKTOR": f"$nnUNet_results/{DATASET}"})
    assert "case_0" in (shell.folder / "report.html").read_text()
    assert (shell.folder / "explained" / "complementary_weights.png").is_file()


def test_equal_plans(documented, shell):
    documented.run(shell)
    models = {folder.name.split("_")[0] for folder in (shell.nnunet.results / DATASET).iterdir()}
    assert models == {"nnUNetTrainer", "ShaSpecTrainer"}


def test_shaspec(documented, shell):
    documented.run(shell)
    assert (shell.folder / "features" / "features.png").is_file()


@pytest.mark.parametrize("shell", [{"channels": ("FLAIR", "T1", "T1CE", "T2")}], indirect=True)
def test_brats(documented, shell):
    """From a download of five cases to the table of all subsets."""
    for file in sorted((shell.raw / "imagesTr").iterdir()) + sorted((shell.raw / "labelsTr").iterdir()):
        name, channel = re.fullmatch(r"case_(\d)(?:_000(\d))?", file.name.removesuffix(".nii.gz")).groups()
        case = shell.folder / "MICCAI_BraTS2020_TrainingData" / f"BraTS20_Training_00{name}"
        case.mkdir(parents=True, exist_ok=True)
        kind = "seg" if channel is None else ("flair", "t1", "t1ce", "t2")[int(channel)]
        file.rename(case / f"{case.name}_{kind}.nii.gz")
    documented.run(shell)
    assert "case_0" in (shell.folder / "report.html").read_text()
    assert (shell.folder / "subsets" / "subsets.md").read_text().count("●") >= 4 * 2**3
