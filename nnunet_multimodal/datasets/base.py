"""What a source of cases is. A converter is a function that finds them; ``datasets/engine.py`` does the rest."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_multimodal.errors import UserError

TRAIN, VALIDATION, TEST = "train", "val", "test"
FOLDS = 5  # nnU-Net's
IGNORE = "ignore"  # nnU-Net's label of voxels without an annotation
NIFTI = r"\.nii(?:\.gz)?"
# imagesTs, ct_test, hecktor2022_testing, MICCAI_BraTS2020_ValidationData, BraTS20_Validation_001
_TEST_FOLDER = re.compile(
    r"(images|labels)Ts|(.*[^a-z])?(test|testing|valid|validation)(data|set)?([^a-z].*)?", re.IGNORECASE
)
# imagesTr, train, training_data; imagesVa, val, validation; imagesTs, ct_test, testset
_PARTS = {
    part: re.compile(rf"(images|labels)({short})|(.*[^a-z])?({names})(data|set)?([^a-z].*)?", re.IGNORECASE)
    for part, short, names in (
        (TRAIN, "Tr", "train|training"),
        (VALIDATION, "Va|Val", "val|valid|validation"),
        (TEST, "Ts", "test|testing"),
    )
}


@dataclass(frozen=True)
class SourceCase:
    """A case as it lies in the source.

    Attributes:
        name: of the case in nnU-Net's files.
        images: channel -> file, of the modalities that are there.
        label: its label map, if it has one.
        raters: rater -> label map, if there are several.
        split: ``TEST`` goes to imagesTs; ``TRAIN`` and ``VALIDATION`` where the source itself says so, else empty.
        group: what must not be torn apart by a split, such as the patient; the case itself if empty.
        values: label in the source -> label of the data set; None if they are the same.
        remarks: what was irregular about it, in words.
    """

    name: str
    images: Mapping[str, Path]
    label: Path | None = None
    raters: Mapping[str, Path] = field(default_factory=dict)
    split: str = ""
    group: str = ""
    values: Mapping[int, int] | None = None
    remarks: tuple[str, ...] = ()

    @property
    def suffix(self) -> str:
        """Of nnU-Net's folders: imagesTr, imagesTs."""
        return "Ts" if self.split == TEST else "Tr"

    @property
    def label_maps(self) -> dict[str, Path]:
        """Rater -> file; the label map itself has no rater's name."""
        return {**({"": self.label} if self.label else {}), **self.raters}


@dataclass(frozen=True)
class Source:
    """Everything that becomes a data set.

    Attributes:
        name: of the data set, unless the user gives another.
        channels: names of the modalities, in nnU-Net's order.
        labels: as in dataset.json, with regions.
        cases: sorted by name.
        regions_class_order: as in dataset.json.
        ending: of the files that are written.
        incomplete: what becomes of cases that lack a modality unless the user says otherwise: keep, drop or error.
        irregular: values of label maps that are known to be wrong, and what is said where they are met.
        advice: what is said after an error of a label map.
        more: further entries of dataset.json.
        remarks: what there is to say of the whole.
        ignored: files that belong to no case.
        is_temporary: the files are ours and may be moved.
    """

    name: str
    channels: tuple[str, ...]
    labels: Mapping[str, int | Sequence[int]]
    cases: tuple[SourceCase, ...]
    regions_class_order: tuple[int, ...] | None = None
    ending: str = ".nii.gz"
    incomplete: str = "error"
    irregular: Mapping[int, str] = field(default_factory=dict)
    advice: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    ignored: tuple[Path, ...] = ()
    is_temporary: bool = False

    @property
    def declared(self) -> set[int]:
        """All values of its labels."""
        values = [[value] if isinstance(value, int) else value for value in self.labels.values()]
        return {0, *(label for of_region in values for label in of_region)}


@dataclass(frozen=True)
class Request:
    """What a converter is asked for.

    Attributes:
        path: the source's folder.
        beside: a folder for temporary files; it is not there yet.
        dataset_id: of nnU-Net's data set.
        processes: how many may run.
        pattern: of the images' names.
        label_pattern: of the label maps' names.
        channels: ``NAME`` or ``NAME=TEXT`` each.
        labels: ``NAME=VALUE`` or ``NAME=VALUE+VALUE`` each.
        derivatives: a BIDS tree's folder of label maps.
        incomplete: what becomes of cases that lack something: keep, drop or error; None if the user does not say.
    """

    path: Path
    beside: Path = Path()
    dataset_id: int = 0
    processes: int = 1
    pattern: str | None = None
    label_pattern: str | None = None
    channels: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    derivatives: str | None = None
    incomplete: str | None = None

    @property
    def folder(self) -> Path:
        """The source's absolute path, of the name that was given: a link's own, not that of what it leads to."""
        path = self.path.absolute()
        return path.resolve() if path.name == ".." else path


def list_files(folder: Path) -> list[Path]:
    """All files below a folder, sorted and relative to it; without hidden ones (and macOS' ``._`` twins).

    Links to folders are followed, but for those that lead back to a folder that they lie in.

    Raises:
        UserError: there is no such folder, or a name is not UTF-8.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; unpack the download and name the folder that it makes")
    found = []
    for path, folders, names in os.walk(folder.absolute(), followlinks=True):
        here = Path(path)
        folders[:] = [name for name in folders if not _is_hidden(name) and not _leads_back(here / name)]
        found += [here / name for name in names if not _is_hidden(name) and (here / name).is_file()]
    for file in found:
        check_encoding(file)
    return [file.relative_to(folder.absolute()) for file in sorted(found)]


def check_encoding(file: Path) -> None:
    """Raise a UserError for a name that is not UTF-8: it would end SimpleITK and this process without a word."""
    try:
        str(file).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{str(file)!r}: a name that is not UTF-8; rename it, or all of a folder by "
            "'convmv -f latin1 -t utf8 -r --notest FOLDER'"
        ) from error


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _leads_back(folder: Path) -> bool:
    """Whether it is a link to a folder that it lies in."""
    return folder.is_symlink() and any(folder.samefile(parent) for parent in folder.parents)


def case_name(*parts: str) -> str:
    """A name that nnU-Net and every file system take: letters, digits, ``-`` and ``_``."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", "_".join(part for part in parts if part)).strip("_")


def common_ending(files: Iterable[Path]) -> str:
    """The ending of the data set's files: .png if all of the source's are, else .nii.gz."""
    return ".png" if {file.suffix.lower() for file in files} == {".png"} else ".nii.gz"


def is_test(file: Path) -> bool:
    """Whether a folder that a file (relative to the source) lies in is one of test or validation images."""
    return any(_TEST_FOLDER.fullmatch(part) for part in file.parts[:-1])


def named_part(files: Iterable[Path]) -> str:
    """``TEST`` if any folder of files (relative) says so; else what the innermost that says anything does; or empty."""
    names = [name for file in files for name in reversed(file.parts[:-1])]
    parts = [part for name in names for part, pattern in _PARTS.items() if pattern.fullmatch(name)]
    return TEST if TEST in parts else next(iter(parts), "")


class Collector:
    """Files of cases, as they are found; names that differ in upper and lower case alone are one.

    Cases and raters are named as in the source; :func:`case_name` makes nnU-Net's names of that.

    Attributes:
        root: the source's folder; files are relative to it.
        ignored: files that belong to no case.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ignored: list[Path] = []
        self._names: dict[tuple[str, str], tuple[str, str, Path]] = {}
        self._files: dict[str, dict[tuple[str, str], Path]] = {}

    def add_image(self, case: str, channel: str, file: Path) -> str:
        """Note the image of a modality; returns nnU-Net's name of the case.

        Raises:
            UserError: the case has another one, or the name is not fit for nnU-Net or that of two cases.
        """
        return self._add(case, ("image", channel), file)

    def add_label(self, case: str, file: Path, rater: str = "") -> str:
        """Note a label map, or a rater's; returns nnU-Net's name of the case.

        Raises:
            UserError: see :meth:`add_image`; the same of the rater's name.
        """
        return self._add(case, ("label map", self._name("rater", rater, file) if rater else ""), file)

    def _add(self, case: str, kind: tuple[str, str], file: Path) -> str:
        name = self._name("case", case, file)
        files = self._files.setdefault(name, {})
        if kind in files:
            what = " ".join(kind).strip()
            first, second = self.root / files[kind], self.root / file
            raise UserError(f"{name}: two files are its {what}: {first} and {second}; move one away")
        files[kind] = file
        return name

    def _name(self, what: str, text: str, file: Path) -> str:
        """nnU-Net's name of a case or rater, which must not be that of another one."""
        name = case_name(text)
        if not re.search("[A-Za-z0-9]", name):
            raise UserError(f"{self.root / file}: {what} {text!r} has no letter or digit of ASCII; rename the file")
        name, known, before = self._names.setdefault((what, name.casefold()), (name, text, file))
        if text.casefold() != known.casefold():
            raise UserError(
                f"{what}s {known!r} ({self.root / before}) and {text!r} ({self.root / file}) would both be called "
                f"{name}; rename one"
            )
        return name

    def __iter__(self) -> Iterator[str]:
        """Names of the cases, sorted."""
        return iter(sorted(self._files))

    def files(self, case: str) -> list[Path]:
        """All of a case's files, relative to the source."""
        return list(self._files[case].values())

    def case(self, name: str, **more: Any) -> SourceCase:
        """A case of what was found; it is a test case where its folder says so.

        Args:
            name: of the case.
            more: further attributes of :class:`SourceCase`.
        """
        files = self._files[name]
        images = {channel: self.root / file for (kind, channel), file in files.items() if kind == "image"}
        maps = {rater: self.root / file for (kind, rater), file in files.items() if kind != "image"}
        split = TEST if any(map(is_test, files.values())) else ""
        raters = dict(sorted((rater, file) for rater, file in maps.items() if rater))
        return SourceCase(name, images, maps.get(""), raters, **{"split": split, **more})


def group_folds(cases: Iterable[SourceCase]) -> list[dict[str, list[str]]] | None:
    """The folds of ``splits_final.json``, of training cases; None where nnU-Net's own will do.

    The source's own split is one fold; all cases that are not of its validation part are trained on. Else, if groups
    have several cases, groups are dealt out to five folds, as nnU-Net deals out cases.
    """
    cases = sorted((case for case in cases if case.split != TEST), key=lambda case: case.name)
    if {case.split for case in cases} >= {TRAIN, VALIDATION}:
        held_out = [case.name for case in cases if case.split == VALIDATION]
        return [{TRAIN: [case.name for case in cases if case.split != VALIDATION], VALIDATION: held_out}]
    members: dict[str, list[str]] = {}
    for case in cases:
        members.setdefault(case.group or case.name, []).append(case.name)
    if len(members) in (1, len(cases)):
        return None
    folds = generate_crossval_split(sorted(members), n_splits=min(FOLDS, len(members)))
    return [{part: [name for group in groups for name in members[group]] for part, groups in f.items()} for f in folds]


def parse_named(texts: Sequence[str], option: str) -> dict[str, str]:
    """``NAME=TEXT`` each, or ``NAME`` for itself.

    Raises:
        UserError: none, an empty part, or a name twice.
    """
    named: dict[str, str] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not name.strip() or (separator and not value.strip()) or name.strip() in named:
            raise UserError(f"{option} {text!r}: give NAME=TEXT, every name once")
        named[name.strip()] = value.strip() or name.strip()
    if not named:
        raise UserError(f"{option} is needed here: NAME=TEXT, one or more")
    return named


def parse_labels(texts: Sequence[str]) -> tuple[dict[str, int], dict[int, int]]:
    """``NAME=VALUE`` or ``NAME=VALUE+VALUE`` each: labels of dataset.json, and what becomes of the source's values.

    Labels are numbered from 1, as nnU-Net wants them, in the order in which they are given, but for ``ignore``, which
    must be the highest.

    Raises:
        UserError: not of this form, a name or value twice, 0, which is background, or ``ignore`` alone.
    """
    labels, values = {"background": 0}, {0: 0}
    named = parse_named(texts, "--labels")
    if list(named) == [IGNORE]:
        raise UserError(f"--labels {texts[0]}: nothing to learn but what is ignored; name another label too")
    for number, (name, text) in enumerate(sorted(named.items(), key=lambda item: item[0] == IGNORE), start=1):
        for part in text.split("+"):
            if not part.strip().isdecimal():
                raise UserError(f"--labels {name}={text}: {part!r} is not a whole number of at least 1")
            if int(part) in values or name in labels:
                raise UserError(f"--labels {name}={text}: {int(part)} is given twice, or is 0, which is background")
            values[int(part)] = number
        labels[name] = number
    return labels, values
