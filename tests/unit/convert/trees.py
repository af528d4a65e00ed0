"""Tiny files of the sources' layouts, and the command that converts them."""

import csv
import gzip
import json
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import nibabel
import numpy as np
import SimpleITK
from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

from nnunet_multimodal import cli
from nnunet_multimodal.preprocessing import PLACEHOLDER

SHAPE = (6, 5, 4)  # x, y, z
AFFINE = np.array([[1.0, 0, 0, 3], [0, 1.5, 0, -4], [0, 0, 2, 5], [0, 0, 0, 1]])


def image(seed=0, shape=SHAPE):
    """Values that differ in every voxel."""
    return np.random.default_rng(seed).permutation(np.arange(1, np.prod(shape) + 1)).reshape(shape).astype(np.int16)


def label_map(*values, shape=SHAPE):
    """Background, and a few voxels of each value."""
    array = np.zeros(shape, np.int16)
    for number, value in enumerate(values):
        array[number, 1:3, 1:3] = value
    return array


def nifti(path, array, affine=AFFINE, slope=None, intercept=0.0):
    """Write by nibabel; with a slope, the array (int16) is what is stored."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = nibabel.Nifti1Image(array, affine)
    if slope is None:
        file.to_filename(path)
    else:  # nibabel would rescale the array: put slope and intercept into the header's bytes
        content = bytearray(file.to_bytes())
        content[112:120] = np.array([slope, intercept], np.float32).tobytes()
        path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return path


def convert(*args):
    return cli.main(["convert", *map(str, args), "-np", "1"])


class Result:
    """A data set as nnU-Net reads it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.description = json.loads((folder / "dataset.json").read_text())
        self.ending = self.description["file_ending"]

    def names(self, folder="imagesTr"):
        return sorted(file.name for file in (self.folder / folder).glob(f"*{self.ending}"))

    def array(self, name):
        """In the order of nibabel: x, y, z."""
        return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(self.folder / (name + self.ending)))).T

    def is_placeholder(self, name):
        return bool((self.array(name) == PLACEHOLDER).all())

    def geometry(self, name):
        file = SimpleITK.ReadImage(str(self.folder / (name + self.ending)))
        return file.GetSize(), file.GetSpacing(), file.GetOrigin(), file.GetDirection()

    @property
    def table(self):
        with (self.folder / "conversion.csv").open(newline="") as lines:
            return {row["case"]: row for row in csv.DictReader(lines)}

    @property
    def splits(self):
        return json.loads((self.folder / "splits_final.json").read_text())

    def verify(self):
        """nnU-Net's own check, in threads: its processes would import torch anew."""
        with mock.patch("multiprocessing.get_context", return_value=SimpleNamespace(Pool=ThreadPool)):
            verify_dataset_integrity(str(self.folder), 1)
