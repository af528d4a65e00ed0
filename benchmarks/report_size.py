"""How large is the report of 50 cases of BraTS's size, what does it cost to make, and does a browser open it?

A synthetic study: four modalities of 155 x 240 x 240 voxels (zero outside the head, bias fields, noise), a tumour of
three nested labels, its prediction, 20 samples and three maps of each case, and an evaluation of all that. The report
is made by the command, with its own defaults, in a process of its own, whose peak resident memory is reported. Then
headless Chromium opens the page, without a GPU: seconds until the first case's pictures are there, and until those of
another case are.

The evaluation measures pieces of the cases that hold all tumours, so its numbers are those of whole images.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import _common as common
import numpy as np
import SimpleITK
import torch
from tqdm import tqdm

from nnunet_multimodal.cli import main as nnunet_multimodal
from nnunet_multimodal.datasets.synthetic import smooth_field
from nnunet_multimodal.inference.maps import RunningMaps
from nnunet_multimodal.inference.quantities import RunningQuantities
from nnunet_multimodal.report import MEGABYTES, SAMPLES

sys.path.insert(0, str(common.ROOT))
from tests.browser import Browser

MODALITIES = ("FLAIR", "T1", "T1ce", "T2")
LABELS = {"oedema": 1, "necrosis": 2, "enhancing": 3}
LEVELS = {1: 1.0, 2: 0.7, 3: 0.45}  # relative radius of each label's outline
# mean intensity in a modality (row) of brain and these labels
INTENSITY = np.array([[0.4, 1.0, 0.95, 0.95], [0.8, 0.7, 0.35, 0.5], [0.6, 0.55, 0.3, 1.2], [0.4, 0.9, 1.2, 1.0]])
NOISE, BIAS, SCALE = 0.06, 0.1, 1000
DATASET = {
    "channel_names": dict(enumerate(MODALITIES)),
    "labels": {"background": 0, **LABELS},
    "numTraining": 1,
    "file_ending": ".nii.gz",
}
PLANS = {
    "dataset_name": "Dataset001_BraTS",
    "plans_name": "nnUNetPlans",
    "image_reader_writer": "SimpleITKIO",
    "label_manager": "LabelManager",
    "foreground_intensity_properties_per_channel": {},
    "configurations": {},
}


def save(file: Path, array: np.ndarray) -> None:
    """Write a volume of 1 mm, as fast as gzip allows."""
    file.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(file), True, 1)


def tumour_radius(rng: np.random.Generator, piece: tuple[int, ...], least: int) -> np.ndarray:
    """Distance from the tumour's centre over its radius, with a wavy surface, on a piece of the image."""
    axes = np.meshgrid(*(np.arange(size, dtype=np.float32) - size / 2 for size in piece), indexing="ij")
    radii = rng.uniform(0.13 * least, 0.2 * least, 3)  # inside the piece, waves and all
    round_ = np.sqrt(sum((axis / radius) ** 2 for axis, radius in zip(axes, radii, strict=True)))
    return (round_ + 0.1 * smooth_field(rng, piece, 7)).astype(np.float32)


def label_map(radius: np.ndarray) -> np.ndarray:
    labels = np.zeros(radius.shape, np.uint8)
    for label, level in LEVELS.items():
        labels[radius < level] = label
    return labels


def head(size: tuple[int, ...]) -> np.ndarray:
    """An ellipsoid of about a sixth of the image, as the brain in BraTS."""
    axes = np.ogrid[tuple(slice(-1, 1, complex(n)) for n in size)]
    return sum(axis**2 for axis in axes) < 0.46


def bias_fields(size: list[int]) -> list[np.ndarray]:
    """A factor for each modality, the same in all cases."""
    rng = np.random.default_rng(1)
    return [np.exp(BIAS * smooth_field(rng, tuple(size))).astype(np.float32) for _ in MODALITIES]


def write_case(root: Path, name: str, rng: np.random.Generator, bias: list[np.ndarray], samples: int) -> None:
    """Files of a case below root, its JSON at last, and of its piece with the tumour below root/piece."""
    size = bias[0].shape
    least = min(size)
    piece = (int(0.5 * least),) * 3
    start = [int(n / 2 - piece[0] / 2 + rng.uniform(-0.08, 0.08) * n) for n in size]
    box = tuple(slice(at, at + n) for at, n in zip(start, piece, strict=True))
    radius = tumour_radius(rng, piece, least)

    def write(place: str, labels: np.ndarray) -> None:
        whole = np.zeros(size, np.uint8)
        whole[box] = labels
        save(root / f"{place}.nii.gz", whole)
        save(root / "piece" / f"{place}.nii.gz", labels)

    truth = label_map(radius + 0.06 * smooth_field(rng, piece, 9))
    write(f"labels/{name}", truth)
    prediction = label_map(radius)
    write(f"predictions/{name}", prediction)
    maps, quantities = RunningMaps(), RunningQuantities(LABELS, 1e-3)
    for index in range(samples):
        drawn = radius + 0.06 * smooth_field(rng, piece, 9)
        labels = label_map(drawn)
        write(f"predictions/samples/{name}__{index:03d}", labels)
        quantities.add(labels)
        logits = [(level - drawn) * 20 for level in LEVELS.values()]  # soft outlines, a few voxels wide
        maps.add(torch.softmax(torch.from_numpy(np.stack([np.zeros_like(drawn), *np.cumsum(logits, 0)])), 0))
    for kind, array in maps.maps().items():
        whole = np.zeros(size, np.float32)
        whole[box] = array
        save(root / "predictions" / "uncertainty" / f"{name}_{kind}.nii.gz", whole)
    tissue = np.zeros(size, np.uint8)
    tissue[box] = truth
    inside = head(size) | (tissue > 0)
    for channel, intensity in enumerate(INTENSITY.astype(np.float32)):
        image = np.zeros(size, np.int16)
        noise = NOISE * rng.standard_normal(np.count_nonzero(inside), dtype=np.float32)
        noisy = intensity[tissue[inside]] * bias[channel][inside] + noise
        image[inside] = np.rint(SCALE * np.maximum(noisy, 1 / SCALE))
        save(root / "images" / f"{name}_{channel:04d}.nii.gz", image)
    summary = {"case": name, "samples": samples, "sample_weights": None, "drawn_from": "distribution",
               "absent": [], "spacing": [1, 1, 1], "labels": quantities.summary(prediction)}  # fmt: skip
    for folder in (root / "piece", root):
        (folder / "predictions" / f"{name}.json").write_text(json.dumps(summary))


def write_study(root: Path, args: argparse.Namespace) -> None:
    """All cases that are not there yet, and their evaluation beside the predictions."""
    bias = bias_fields(args.size)
    for index in tqdm(range(args.cases), desc="study", unit="case"):
        name = f"BraTS_{index:05d}"
        if not (root / "predictions" / f"{name}.json").is_file():
            write_case(root, name, np.random.default_rng([0, index]), bias, args.samples)
    for folder in (root, root / "piece"):
        for name, content in (("dataset", DATASET), ("plans", PLANS)):
            (folder / "predictions" / f"{name}.json").write_text(json.dumps(content))
    pieces, output = root / "piece", root / "predictions" / "evaluation.json"
    if output.is_file():
        return
    measured = ["evaluate", str(pieces / "labels"), str(pieces / "predictions"), "-np", "1", "-o", str(output)]
    assert nnunet_multimodal(measured) == 0


def make_report(root: Path, page: Path) -> dict[str, Any]:
    """Seconds, its own of the processor, and the peak resident memory of the command."""
    command = [sys.executable, "-m", "nnunet_multimodal", "report", str(root / "predictions"), "-i"]
    start = perf_counter()
    process = subprocess.Popen(
        [*command, str(root / "images"), "-ref", str(root / "labels"), "-o", str(page), "--overwrite"]
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"the report was not made: exit status {process.returncode}")
    return {
        "seconds": round(perf_counter() - start, 1),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_resident_bytes": usage.ru_maxrss * 1024,
    }


def open_page(page: Path, profile: Path) -> dict[str, Any]:
    """Seconds until pictures are there, bytes of the script's objects, and what the console said."""
    browser = Browser(profile)
    start = perf_counter()
    browser.open(page)
    first = perf_counter() - start
    last = browser.run("document.querySelectorAll('script.view').length - 1")
    start = perf_counter()
    browser.run(
        "(() => { document.getElementById('view-title').textContent = '';"
        f" const e = document.getElementById('view-case'); e.value = '{last}';"
        " e.dispatchEvent(new Event('change', { bubbles: true })) })()"
    )
    browser.wait("document.getElementById('view-title').textContent !== ''")
    other = perf_counter() - start
    found = {
        "seconds_to_first_pictures": round(first, 2),
        "seconds_to_another_case": round(other, 2),
        "script_heap_bytes": browser.run("performance.memory.usedJSHeapSize"),
        "rows_of_cases": browser.run("document.querySelectorAll('#case-table tbody tr').length"),
        "pictures": browser.run("document.querySelectorAll('#panels canvas').length"),
        "smaller": browser.run("document.querySelector('#case .note').textContent.trim()"),
        "console_errors_and_warnings": browser.problems,
        "requests_of_a_network": [u for u in browser.requests if not u.startswith(("file:", "data:", "blob:"))],
    }
    browser.close()
    return found


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--cases", type=int, default=50)
    p.add_argument("--size", type=int, nargs=3, default=[155, 240, 240], help="voxels of a case (Z Y X)")
    p.add_argument("--samples", type=int, default=20, help=f"of each case; the page shows {SAMPLES} of them")
    p.add_argument("--work", type=Path, metavar="DIR", help="keeps study and page (default: a temporary folder)")
    args = p.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="report_size_") as folder:
        root = args.work or Path(folder)
        page = root / "report.html"
        write_study(root, args)
        made = make_report(root, page)
        bytes_of = {"page": page.stat().st_size, "pictures_at_most": round(MEGABYTES * 1e6)}
        for kind in ("images", "labels", "predictions"):
            bytes_of[kind] = sum(file.stat().st_size for file in (root / kind).rglob("*") if file.is_file())
        opened = open_page(page, Path(folder) / "profile")
    figures = {"shown_samples": SAMPLES, "bytes": bytes_of, "report": made, "browser": opened}
    print(json.dumps(figures, indent=1))
    common.write(args, "report_size", figures)


if __name__ == "__main__":
    main()
