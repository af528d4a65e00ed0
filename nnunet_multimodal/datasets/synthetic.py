"""A small synthetic data set of three co-registered modalities, in nnU-Net's raw format.

An organ with a lesion and the lesion's core, nested, in a piece of tissue. Every modality is blind to one of the three
(:data:`INTENSITY`), so no single modality is enough, and every structure is seen by two, so that it can be found where
one of them is corrupted. As in real images there are bias fields, noise and partial volume (rendered at twice the
resolution, then averaged). In every case a ball of one modality is corrupted: its content is replaced by strong noise.

The same seed gives the same images, and a case does not depend on how many others there are.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MODALITIES = ("T1", "T2", "PET")  # none is called CT: nnU-Net z-scores every modality
STRUCTURES = ("organ", "lesion", "core")
SHAPE = (32, 32, 32)  # z, y, x
SPACING_MM = (2.0, 1.75, 1.75)

# Mean intensity in a modality (row) of tissue, organ, lesion, core: a structure is invisible where its value is that of
# the structure around it.
INTENSITY = np.array([[0.3, 0.8, 0.8, 1.3], [0.3, 0.6, 1.2, 1.2], [0.2, 0.2, 1.0, 0.6]])
SCALE = 1000  # intensities are stored as int16

_NOISE = 0.05
_BIAS = 0.12
SUPERSAMPLING = 2


@dataclass(frozen=True)
class SyntheticCase:
    """One case.

    Attributes:
        images: (M, Z, Y, X) int16.
        labels: (Z, Y, X) uint8; 0 is tissue, 1.. are ``STRUCTURES``.
        corrupted_modality: index of the modality with the corrupted ball.
        corruption: (Z, Y, X), 1 inside the ball, 0 outside, in between at its rim.
    """

    images: np.ndarray
    labels: np.ndarray
    corrupted_modality: int
    corruption: np.ndarray


def make_case(seed: int, index: int) -> SyntheticCase:
    """Case number ``index`` of the data set that belongs to ``seed``."""
    rng = np.random.default_rng([seed, index])
    tissue = render_structures(rng)  # (2Z, 2Y, 2X), 0..3
    # nested structures: a voxel's label is the number of structures that fill at least half of it
    labels = np.sum([average(tissue >= label) >= 0.5 for label in range(1, len(STRUCTURES) + 1)], axis=0)
    images = np.stack([average(intensity[tissue]) for intensity in INTENSITY])
    images *= np.exp(_BIAS * np.stack([smooth_field(rng, SHAPE) for _ in MODALITIES]))
    images += _NOISE * rng.standard_normal(images.shape)
    corrupted, corruption = _corrupt(rng, images, labels)
    return SyntheticCase(np.rint(images * SCALE).astype(np.int16), labels.astype(np.uint8), corrupted, corruption)


def write_dataset(folder: str | os.PathLike, *, num_training: int = 20, num_test: int = 6, seed: int = 0) -> None:
    """Write the data set: ``imagesTr``, ``labelsTr``, ``imagesTs``, ``labelsTs`` and ``dataset.json``.

    It is written beside ``folder`` and then renamed, so ``folder`` is either complete or not there.

    Args:
        folder: such as ``nnUNet_raw/Dataset900_Demo``.
        num_training: training cases; they are the first of the seed's cases.
        num_test: held-out cases; they are the next.
        seed: any integer >= 0.

    Raises:
        FileExistsError: ``folder`` exists.
        ValueError: a negative seed.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; delete it or give another folder")
    if seed < 0:
        raise ValueError(f"seed is {seed}; use 0 or more")
    beside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    for index in range(num_training + num_test):
        _write_case(beside, "Tr" if index < num_training else "Ts", f"demo_{index:03d}", make_case(seed, index))
    description = {
        "name": "Synthetic multi-modal demonstration",
        "description": f"nnunet_multimodal.datasets.synthetic, seed {seed}",
        "channel_names": {str(channel): name for channel, name in enumerate(MODALITIES)},
        "labels": {"background": 0, **{name: label for label, name in enumerate(STRUCTURES, start=1)}},
        "numTraining": num_training,
        "numTest": num_test,
        "file_ending": ".nii.gz",
    }
    (beside / "dataset.json").write_text(json.dumps(description, indent=2) + "\n")
    beside.rename(folder)


def render_structures(rng: np.random.Generator) -> np.ndarray:
    """The nested structures at the fine resolution: 0 tissue, 1 organ, 2 lesion, 3 core."""
    shape = [SUPERSAMPLING * size for size in SHAPE]
    steps = [size / SUPERSAMPLING for size in SPACING_MM]
    axes = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(shape, steps, strict=True)]
    position_mm = np.stack(np.meshgrid(*axes, indexing="ij"))  # (3, 2Z, 2Y, 2X), 0 at the centre

    centre_mm = rng.uniform(-5, 5, 3)
    organ = blob(rng, position_mm, centre_mm, rng.uniform(18, 22, 3))
    centre_mm = centre_mm + rng.uniform(-5, 5, 3)
    lesion = organ & blob(rng, position_mm, centre_mm, rng.uniform(12, 15, 3))
    centre_mm = centre_mm + rng.uniform(-1.5, 1.5, 3)
    core = lesion & blob(rng, position_mm, centre_mm, rng.uniform(8, 10.5, 3))
    return organ.astype(np.uint8) + lesion + core


def blob(rng: np.random.Generator, position_mm: np.ndarray, centre_mm: np.ndarray, radii_mm: np.ndarray) -> np.ndarray:
    """A randomly rotated ellipsoid with a wavy surface, as a mask on the grid ``position_mm`` (3, *D)."""
    rotation, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    offset = position_mm - centre_mm[:, None, None, None]
    radius = np.linalg.norm(np.tensordot(rotation / radii_mm[:, None], offset, 1), axis=0)
    return radius < 1 + 0.08 * smooth_field(rng, offset.shape[1:])


def smooth_field(rng: np.random.Generator, shape: tuple[int, ...], knots: int = 5) -> np.ndarray:
    """A random field of mean 0 and variance 1 that varies over about a fourth of the volume."""
    field = rng.standard_normal((knots,) * len(shape))
    for size in shape:  # spread the first axis by Gaussian bumps around its knots; it then is the last one
        distance = np.linspace(0, knots - 1, size)[:, None] - np.arange(knots)
        field = np.tensordot(field, np.exp(-(distance**2)), axes=(0, 1))
    return (field - field.mean()) / field.std()


def average(fine: np.ndarray) -> np.ndarray:
    """Mean of every voxel's subvoxels."""
    blocks = [part for size in fine.shape for part in (size // SUPERSAMPLING, SUPERSAMPLING)]
    return fine.reshape(blocks).mean(axis=(1, 3, 5))


def _corrupt(rng: np.random.Generator, images: np.ndarray, labels: np.ndarray) -> tuple[int, np.ndarray]:
    """Corrupt a ball of one modality in place, somewhere in the organ; see :class:`SyntheticCase`."""
    modality = int(rng.integers(len(images)))
    voxels = np.argwhere(labels > 0)
    offset = np.indices(labels.shape).transpose(1, 2, 3, 0) - voxels[rng.integers(len(voxels))]
    distance_mm = np.linalg.norm(offset * SPACING_MM, axis=-1)
    corruption = np.clip((rng.uniform(7, 10) - distance_mm) / 3 + 0.5, 0, 1)  # a rim of 3 mm
    noise = rng.uniform(0, 1) + 0.3 * rng.standard_normal(labels.shape)
    images[modality] += corruption * (noise - images[modality])
    return modality, corruption


def _write_case(folder: Path, split: str, name: str, case: SyntheticCase) -> None:
    import SimpleITK

    channels = {f"images{split}/{name}_{channel:04d}": image for channel, image in enumerate(case.images)}
    for stem, array in {**channels, f"labels{split}/{name}": case.labels}.items():
        image = SimpleITK.GetImageFromArray(array)
        image.SetSpacing(SPACING_MM[::-1])
        file = folder / f"{stem}.nii.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        SimpleITK.WriteImage(image, str(file), useCompression=True)
