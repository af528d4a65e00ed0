"""The demo's dataset: the synthetic one, or links to the files of a real one, which itself is never written to."""

from __future__ import annotations

import os
import shutil
from glob import escape
from pathlib import Path

from nnunet_multimodal.demo.settings import DemoError, Settings, read_json, write_json

MIN_CASES = 5  # nnU-Net splits the training cases into five folds


def make_synthetic(settings: Settings) -> None:
    """Write the synthetic dataset anew."""
    from nnunet_multimodal.datasets.synthetic import write_dataset

    shutil.rmtree(settings.raw, ignore_errors=True)
    settings.raw.parent.mkdir(parents=True, exist_ok=True)
    write_dataset(settings.raw, seed=settings.seed)


def describe(settings: Settings) -> dict:
    """``dataset.json`` of the user's dataset, or what the options say in its place.

    Raises:
        DemoError: the folder is no raw dataset of nnU-Net's, or ``dataset.json`` and the options do not fit together.
    """
    data = settings.data
    assert data is not None
    for folder in ("imagesTr", "labelsTr"):
        if not (data / folder).is_dir():
            raise DemoError(f"{data / folder} is not a folder; --data takes a raw dataset with imagesTr and labelsTr")
    file = data / "dataset.json"
    given = settings.channel_names is not None or settings.labels is not None
    if file.exists():
        description = read_json(file)
        if description is None:
            raise DemoError(f"{file} is not valid JSON; correct it")
        if given:
            raise DemoError(f"{file} already names channels and labels; leave out --channel-names and --labels")
        return description
    if settings.channel_names is None or settings.labels is None:
        raise DemoError(
            f"{file} does not exist; name the channels in the order of their file names with --channel-names "
            "(such as: CT PET T1) and the foreground labels 1, 2, ... with --labels (such as: tumour)"
        )
    return {
        "channel_names": {str(channel): name for channel, name in enumerate(settings.channel_names)},
        "labels": {"background": 0, **{name: label for label, name in enumerate(settings.labels, start=1)}},
        "file_ending": _file_ending(data / "labelsTr"),
    }


def training_cases(settings: Settings, description: dict) -> dict[str, tuple[list[Path], Path]]:
    """Case -> its channel files and its label file in the user's dataset.

    Raises:
        DemoError: a file is missing or one too many, or there are fewer cases than nnU-Net's folds.
    """
    data = settings.data
    assert data is not None
    ending = description["file_ending"]
    channels = channel_names(description)
    cases: dict[str, tuple[list[Path], Path]] = {}
    if "dataset" in description:
        for case, files in description["dataset"].items():
            cases[case] = ([_expand(data, image) for image in files["images"]], _expand(data, files["label"]))
    else:
        for label in sorted((data / "labelsTr").glob(f"*{ending}")):
            case = label.name[: -len(ending)]
            images = sorted((data / "imagesTr").glob(f"{escape(case)}_[0-9][0-9][0-9][0-9]{ending}"))
            cases[case] = (images, label)
    for case, (images, label) in cases.items():
        missing = [file for file in (*images, label) if not file.is_file()]
        if missing:
            raise DemoError(f"{missing[0]} of case {case} does not exist; correct {data / 'dataset.json'} or add it")
        if len(images) != len(channels):
            raise DemoError(
                f"case {case} has {len(images)} channel files in {data / 'imagesTr'} and {len(channels)} are named "
                f"({', '.join(channels)}); add or remove files, or name the channels that there are"
            )
    if len(cases) < MIN_CASES:
        raise DemoError(
            f"{data / 'labelsTr'} has {len(cases)} labelled cases (*{ending}); nnU-Net's five folds need {MIN_CASES}"
        )
    return cases


def link_dataset(settings: Settings) -> None:
    """Link the user's files into the demo's raw folder; ``dataset.json`` is written last."""
    description = describe(settings)
    cases = training_cases(settings, description)
    for case, (images, label) in cases.items():
        for file, name in zip((*images, label), _file_names(case, "Tr", description), strict=True):
            _link(file, settings.raw / name)
    description = {name: value for name, value in description.items() if name != "dataset"}
    write_json(settings.raw / "dataset.json", {**description, "numTraining": len(cases)})


def is_complete(settings: Settings) -> bool:
    """Whether the demo's raw dataset has ``dataset.json`` and all files of all cases."""
    description = read_json(settings.raw / "dataset.json")
    if description is None:
        return False
    counts = {"Tr": description["numTraining"], "Ts": description.get("numTest", 0) if settings.data is None else 0}
    for split, count in counts.items():
        labels = settings.raw / f"labels{split}"
        cases = [
            file.name[: -len(description["file_ending"])] for file in labels.glob(f"*{description['file_ending']}")
        ]
        files = [settings.raw / name for case in cases for name in _file_names(case, split, description)]
        if len(cases) != count or not all(file.exists() for file in files):
            return False
    return True


def link_held_out(settings: Settings) -> None:
    """Link the validation cases of the fold, which nnU-Net drew, as held-out cases."""
    for source, link in _held_out_links(settings):
        _link(source, link)


def is_linked(settings: Settings) -> bool:
    """Whether there are validation cases and all of their files are linked."""
    links = [link for _, link in _held_out_links(settings)]
    return bool(links) and all(link.exists() for link in links)


def _held_out_links(settings: Settings) -> list[tuple[Path, Path]]:
    """(file, link to it) for all files of the validation cases."""
    description = read_json(settings.raw / "dataset.json")
    return [
        (settings.raw / source, settings.held_out / link)
        for case in validation_cases(settings)
        for source, link in zip(_file_names(case, "Tr", description), _file_names(case, "Ts", description), strict=True)
    ]


def _file_names(case: str, split: str, description: dict) -> list[str]:
    """Channel files of a case in order, then its label file, relative to the dataset."""
    ending = description["file_ending"]
    channels = [f"images{split}/{case}_{channel:04d}{ending}" for channel in range(len(channel_names(description)))]
    return [*channels, f"labels{split}/{case}{ending}"]


def channel_names(description: dict) -> list[str]:
    """Names of the channels in order, from ``dataset.json``; old ones call them modalities."""
    names = description.get("channel_names", description.get("modality", {}))
    return [str(names[channel]) for channel in sorted(names, key=int)]


def validation_cases(settings: Settings) -> list[str]:
    """Validation cases of the fold; empty before the first training has drawn the folds."""
    splits = read_json(settings.preprocessed / "splits_final.json")
    return [] if splits is None else splits[settings.fold]["val"]


def held_out_cases(settings: Settings) -> dict[str, tuple[list[Path], Path]]:
    """Held-out case -> its channel files and its label file."""
    description = read_json(settings.raw / "dataset.json")
    cases = {}
    for label in sorted((settings.held_out / "labelsTs").glob(f"*{description['file_ending']}")):
        case = label.name[: -len(description["file_ending"])]
        *images, _ = (settings.held_out / name for name in _file_names(case, "Ts", description))
        cases[case] = (images, label)
    return cases


def _file_ending(folder: Path) -> str:
    endings = {"".join(file.suffixes[-2:]) if file.suffix == ".gz" else file.suffix for file in folder.iterdir()}
    if len(endings) != 1:
        raise DemoError(f"files in {folder} end in {sorted(endings)}; keep one kind, or write a dataset.json beside it")
    return endings.pop()


def _expand(data: Path, name: str) -> Path:
    """A path of dataset.json, as nnU-Net reads it: absolute or relative to the file, with environment variables."""
    return data / os.path.expandvars(name)


def _link(source: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(source.resolve())
