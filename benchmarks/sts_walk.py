"""docs/howto/walk.md on real PET/CT/MR data: from a folder of files to the report, with incomplete test cases.

Types the page's own commands, changed only in what the data ask for: ``convert pattern`` in place of ``convert brats``,
a plan of the size of ``sts.py``'s, names, and the length of the training. Every fifth patient is held out; every other
one of these lacks a modality. The work folder keeps everything, the report among it; it must not be there yet.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
from itertools import cycle
from pathlib import Path
from time import perf_counter

import _common as common
from _missing_sections import read_table
from tqdm import tqdm

DATA = "sts_petct_mr"
CHANNELS = ("CT", "PET", "T1")
DATASET = "Dataset021_STS"
PAGE = common.ROOT / "docs" / "howto" / "walk.md"
CONVERT = (
    f"nnunet-multimodal convert pattern download/train --dataset-id 21 --name {DATASET[11:]} "
    "--pattern '{case}/{channel}.nii.gz' --label-pattern '{case}/tumour.nii.gz' "
    f"--channels {' '.join(f'{name}={name}' for name in CHANNELS)} --labels tumour=1"
)


def blocks(args: argparse.Namespace) -> dict[str, str]:
    """The page's commands, by the word in bold before them, for these data.

    Raises:
        ValueError: the page does not have what is replaced.
    """
    found = re.findall(r"(?:\*\*([\w ]+)\.?\*\*[^`]*?|)\n```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    text = {name or "folders": commands for name, commands in found}
    text["The download"], text["Convert"] = "", CONVERT
    replaced = {
        "Dataset021_BraTS": DATASET,
        "-pl nnUNetPlannerTiny": f"-pl nnUNetPlannerCPU -overwrite_target_spacing {' '.join(map(str, args.spacing))}",
        "nnUNetTinyPlans": "nnUNetCPUPlans",
        "--over FLAIR": "--over PET",
        "_6epochs_60iterations": f"_{args.epochs}epochs_{args.iterations}iterations",
    }
    for old, new in replaced.items():
        if not any(old in commands for commands in text.values()):
            raise ValueError(f"{PAGE.name} has no {old!r}")
        text = {name: commands.replace(old, new) for name, commands in text.items()}
    return text


def download(source: Path, work: Path) -> dict[str, str]:
    """Links the patients, to train each in a folder of its own, the others as a test set; absent modality by case."""
    names = sorted(file.name.removesuffix(".nii.gz") for file in (source / "labelsTr").glob("*.nii.gz"))
    held_out = names[::5]
    for case in set(names) - set(held_out):
        folder = work / "download" / "train" / case
        folder.mkdir(parents=True)
        (folder / "tumour.nii.gz").symlink_to(source / "labelsTr" / f"{case}.nii.gz")
        for number, channel in enumerate(CHANNELS):
            (folder / f"{channel}.nii.gz").symlink_to(source / "imagesTr" / f"{case}_{number:04d}.nii.gz")
    absent = dict(zip(held_out[1::2], cycle(reversed(CHANNELS)), strict=False))
    for case in held_out:
        for folder, files in (
            ("labelsTs", {f"{case}.nii.gz": source / "labelsTr" / f"{case}.nii.gz"}),
            ("imagesTs", {f.name: f for f in (source / "imagesTr").glob(f"{case}_*.nii.gz")}),
        ):
            (work / "download" / folder).mkdir(parents=True, exist_ok=True)
            for name, file in files.items():
                if case not in absent or not name.endswith(f"_{CHANNELS.index(absent[case]):04d}.nii.gz"):
                    (work / "download" / folder / name).symlink_to(file)
    return absent


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--work", type=Path, metavar="DIR", help="new folder; default: work/sts_walk beside OUT")
    p.add_argument("--epochs", type=int, default=6)
    p.add_argument("--iterations", type=int, default=100)
    p.add_argument("--spacing", type=float, nargs=3, default=[4, 3, 3], metavar=("Z", "Y", "X"))
    p.add_argument("--threads", type=int, default=1)
    args = p.parse_args()
    work = (args.work or args.out.resolve().parent / "work" / "sts_walk").resolve()
    work.mkdir(parents=True)
    absent = download(common.data_folder(DATA).resolve(), work)
    environment = {
        **os.environ,
        "PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": str(args.threads),
        "nnUNet_def_n_proc": str(args.threads),
        "nnUNet_n_proc_DA": "1",
    }
    seconds, exports = {}, ""
    for name, commands in tqdm(blocks(args).items(), desc="walk"):
        start = perf_counter()
        step = subprocess.run(["bash", "-euxc", exports + commands], cwd=work, env=environment, check=False)
        if step.returncode:
            sys.exit(f"{name}: status {step.returncode}")
        exports += "".join(line + "\n" for line in commands.splitlines() if line.startswith("export "))
        if name == "Convert":
            for folder in ("imagesTs", "labelsTs"):
                (work / "download" / folder).rename(work / "raw" / DATASET / folder)
        seconds[name] = round(perf_counter() - start)
    evaluation = json.loads((work / "predictions" / "evaluation.json").read_text())
    dice = {
        Path(case["prediction_file"]).name.removesuffix(".nii.gz"): case["metrics"]["1"]["Dice"]
        for case in evaluation["metric_per_case"]
    }
    figures = {
        "seconds": seconds,
        "cases": {case: {"absent": absent.get(case, ""), "Dice": value} for case, value in dice.items()},
        "subsets": read_table(work / "subsets" / "subsets.csv"),
        "report_mb": round((work / "report.html").stat().st_size / 1e6, 1),
    }
    common.write(args, "sts_walk", figures)


if __name__ == "__main__":
    main()
