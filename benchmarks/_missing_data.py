"""Four synthetic modalities, of which every structure shows in two and one structure in a single one.

An organ with a lesion and the lesion's core, nested, and a node beside the organ. Contrast is of either sign, so that a
channel of zeros is nothing that a modality ever looks like.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import SimpleITK
from tqdm import tqdm

from nnunet_multimodal.datasets.synthetic import SHAPE, SPACING_MM, SUPERSAMPLING, average, blob, smooth_field

MODALITIES = ("T1", "T1Gd", "T2", "FLAIR")
STRUCTURES = ("organ", "lesion", "core", "node")
# how far a structure is from what surrounds it, in a modality (row); 0: not to be seen
CONTRAST = np.array([[0.5, 0, 0, 0], [-0.4, 0.5, 0, 0], [0, 0.5, -0.4, 0], [0, 0, 0.5, 0.6]])
NOISE, BIAS = 0.08, 0.1


def make_case(seed: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (M, Z, Y, X) float32 and label map (Z, Y, X) uint8 of a case."""
    rng = np.random.default_rng([seed, index])
    shape = [SUPERSAMPLING * size for size in SHAPE]
    steps = [size / SUPERSAMPLING for size in SPACING_MM]
    axes = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(shape, steps, strict=True)]
    position_mm = np.stack(np.meshgrid(*axes, indexing="ij"))
    centre = rng.uniform(-5, 5, 3)
    organ = blob(rng, position_mm, centre, rng.uniform(17, 20, 3))
    inner = centre + rng.uniform(-4, 4, 3)
    lesion = organ & blob(rng, position_mm, inner, rng.uniform(11, 14, 3))
    core = lesion & blob(rng, position_mm, inner + rng.uniform(-2, 2, 3), rng.uniform(7, 9, 3))
    direction = rng.standard_normal(3)
    node = ~organ & blob(rng, position_mm, centre + 24 * direction / np.linalg.norm(direction), rng.uniform(8, 11, 3))
    masks = np.stack([organ, lesion, core, node]).astype(np.float64)
    coarse = np.stack([average(mask) for mask in masks])
    labels = np.zeros(SHAPE, np.uint8)
    for label, mask in enumerate(coarse, start=1):
        labels[mask >= 0.5] = label
    images = 0.4 + np.tensordot(CONTRAST, coarse, 1)
    images *= np.exp(BIAS * np.stack([smooth_field(rng, SHAPE) for _ in MODALITIES]))
    images += NOISE * rng.standard_normal(images.shape)
    return images.astype(np.float32), labels


def write_dataset(folder: Path, training: int, test: int, seed: int, missing: float = 0.0) -> None:
    """nnU-Net's raw format; of the training cases a part of the modalities is left out at random, never all."""
    rng = np.random.default_rng([seed, 10**6])
    for index in tqdm(range(training + test), desc=folder.name):
        images, labels = make_case(seed, index)
        split, case = ("Tr", "Ts")[index >= training], f"case_{index:03d}"
        keep = np.ones(len(MODALITIES), bool)
        if split == "Tr":
            keep = rng.random(len(MODALITIES)) >= missing
            keep[rng.integers(len(MODALITIES))] |= not keep.any()
        files = {f"images{split}/{case}_{m:04d}": image for m, image in enumerate(images) if keep[m]}
        for stem, array in {**files, f"labels{split}/{case}": labels}.items():
            image = SimpleITK.GetImageFromArray(array)
            image.SetSpacing(SPACING_MM[::-1])
            file = folder / f"{stem}.nii.gz"
            file.parent.mkdir(parents=True, exist_ok=True)
            SimpleITK.WriteImage(image, str(file))
    description = {
        "channel_names": dict(enumerate(MODALITIES)),
        "labels": {"background": 0, **{name: label for label, name in enumerate(STRUCTURES, start=1)}},
        "numTraining": training,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=1) + "\n")
