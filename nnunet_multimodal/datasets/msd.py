"""The Medical Segmentation Decathlon (Task01_BrainTumour), through nnU-Net's own converter of it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nnunetv2.dataset_conversion.convert_MSD_dataset import convert_msd_dataset

from nnunet_multimodal.datasets.base import TEST, Request, Source, SourceCase, list_files
from nnunet_multimodal.errors import UserError
from nnunet_multimodal.images import list_channels, read_json
from nnunet_multimodal.preprocessing import channel_names

RAW = "nnUNet_raw"


def read(request: Request) -> Source:
    """The cases of a task, its images of four dimensions split by nnU-Net into ``request.beside``.

    Raises:
        UserError: not a task of the Decathlon, or nnU-Net's converter fails at it.
    """
    path = request.folder  # nnU-Net's converter takes the data set's name from it
    task = re.fullmatch(r"Task\d+_([^_]+)", path.name)
    if task is None:
        raise UserError(
            f"{request.path}: it is called {path.name!r}; it must be called as in the download, such as "
            "Task01_BrainTumour"
        )
    list_files(path)
    for name in ("imagesTr", "labelsTr", "imagesTs"):
        if not (path / name).is_dir():
            raise UserError(f"{path / name} is not there; unpack the whole download")
    stated = read_json(path / "dataset.json", "modality", "labels", "training", "test", "numTraining")
    request.beside.mkdir(parents=True)
    with _raw_folder(request.beside):
        try:
            convert_msd_dataset(str(path), request.dataset_id, request.processes)
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"{request.path}: nnU-Net's converter says: {error}; unpack the download again") from error
    (folder,) = request.beside.iterdir()
    description = read_json(folder / "dataset.json", "channel_names", "labels")
    channels = tuple(channel_names(description))
    cases = []
    for suffix, split in (("Tr", ""), ("Ts", TEST)):
        images = folder / f"images{suffix}"
        if any(images.iterdir()):
            for case, numbers in sorted(list_channels(images, ".nii.gz", len(channels)).items()):
                files = {channels[number]: images / f"{case}_{number:04d}.nii.gz" for number in sorted(numbers)}
                label = folder / f"labels{suffix}" / f"{case}.nii.gz"
                cases.append(SourceCase(case, files, label if label.is_file() else None, split=split))
    number = sum(case.split != TEST for case in cases)
    remark = f"dataset.json of the task says {stated['numTraining']} training cases, and here are {number}"
    return Source(
        name=task[1],
        channels=channels,
        labels=description["labels"],
        cases=tuple(cases),
        more={key: stated[key] for key in ("reference", "description") if key in stated},
        remarks=() if number == stated["numTraining"] else (remark,),
        is_temporary=True,
    )


@contextmanager
def _raw_folder(folder: Path) -> Iterator[None]:
    """nnU-Net's variable names another folder meanwhile: its converter writes to the one that it names."""
    before = os.environ.get(RAW)
    os.environ[RAW] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[RAW]
        else:
            os.environ[RAW] = before
