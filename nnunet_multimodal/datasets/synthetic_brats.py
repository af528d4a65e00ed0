"""A small synthetic download in the layout of BraTS 2021, to try everything on: four modalities, incomplete test cases.

  python -m nnunet_multimodal.datasets.synthetic_brats download

writes ``download/TrainingData/BraTS2021_00000/BraTS2021_00000_flair.nii.gz`` (``t1``, ``t1ce``, ``t2``, ``seg``) and
``download/ValidationData`` alike, where every other case lacks one or two modalities. Unlike BraTS' own, these cases
have label maps, so that predictions can be measured. Structures, noise and bias fields are those of
:mod:`nnunet_multimodal.datasets.synthetic`; contrasts are roughly those of gliomas: no single modality shows all.
"""

from __future__ import annotations

import argparse
import os
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import SimpleITK
from tqdm import tqdm

from nnunet_multimodal.datasets.synthetic import SCALE, SHAPE, SPACING_MM, average, render_structures, smooth_field

MODALITIES = ("flair", "t1", "t1ce", "t2")
LABELS = (0, 2, 1, 4)  # of tissue, oedema, necrosis, enhancing tumour
# mean intensity in a modality (row) of these
INTENSITY = np.array([[0.4, 1.0, 0.95, 0.95], [0.8, 0.7, 0.35, 0.5], [0.6, 0.55, 0.3, 1.2], [0.4, 0.9, 1.2, 1.0]])
NOISE, BIAS = 0.06, 0.1
TRAINING, TEST = 16, 6


def write_download(
    folder: str | os.PathLike, num_training: int = TRAINING, num_test: int = TEST, seed: int = 0
) -> None:
    """Write the tree; it is complete or not there.

    Args:
        folder: which is not there yet.
        num_training: complete cases.
        num_test: cases that are held out, half of them incomplete.
        seed: any integer >= 0; a case does not depend on how many others there are.

    Raises:
        FileExistsError: ``folder`` exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; delete it or give another folder")
    beside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    for index in tqdm(range(num_training + num_test), desc="synthetic BraTS", unit="case"):
        name = f"BraTS2021_{index:05d}"
        is_test = index >= num_training
        absent = absent_modalities(index - num_training) if is_test else ()
        images, labels = make_case(seed, index)
        arrays = {m: array for m, array in zip(MODALITIES, images, strict=True) if m not in absent} | {"seg": labels}
        place = beside / ("ValidationData" if is_test else "TrainingData") / name
        place.mkdir(parents=True)
        for kind, array in arrays.items():
            image = SimpleITK.GetImageFromArray(array)
            image.SetSpacing(SPACING_MM[::-1])
            SimpleITK.WriteImage(image, str(place / f"{name}_{kind}.nii.gz"), useCompression=True)
    beside.rename(folder)


def make_case(seed: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (4, Z, Y, X) int16, zero outside the head, and label map (Z, Y, X) uint8."""
    rng = np.random.default_rng([seed, index])
    tissue = render_structures(rng)  # (2Z, 2Y, 2X), 0..3
    depth = np.sum([average(tissue >= level) >= 0.5 for level in range(1, len(LABELS))], axis=0)
    images = np.stack([average(intensity[tissue]) for intensity in INTENSITY])
    images *= np.exp(BIAS * np.stack([smooth_field(rng, SHAPE) for _ in MODALITIES]))
    images += NOISE * rng.standard_normal(images.shape)
    axes = np.meshgrid(*(np.linspace(-1, 1, size) for size in SHAPE), indexing="ij")
    head = (np.square(axes).sum(0) < 1.3) | (depth > 0)
    images = np.maximum(images, 1 / SCALE) * head  # zero is what BraTS has outside
    return np.rint(images * SCALE).astype(np.int16), np.array(LABELS, np.uint8)[depth]


def absent_modalities(index: int) -> tuple[str, ...]:
    """What a test case lacks: every other one nothing, the others each modality, then each pair, and so on again."""
    subsets = [subset for size in (1, 2) for subset in combinations(MODALITIES, size)]
    return subsets[index // 2 % len(subsets)] if index % 2 else ()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="which is not there yet")
    parser.add_argument("--training", type=int, default=TRAINING, help=f"complete cases (default: {TRAINING})")
    parser.add_argument("--test", type=int, default=TEST, help=f"held-out cases (default: {TEST})")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_download(args.folder, args.training, args.test, args.seed)


if __name__ == "__main__":
    main()
