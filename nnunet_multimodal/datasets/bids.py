"""A BIDS tree, read by ancpbids: a modality is a suffix, with entities where that is not enough.

    --channels FLAIR=FLAIR T1=T1w T1CE=T1w:ce-gadolinium PET=pet
    --derivatives masks --label-pattern dseg:label-lesion

A case is a session of a subject, or the subject. A channel without entities takes the file that has none of those by
which the tree's other channels of this suffix are told apart. Label maps lie in ``derivatives/NAME``, or in a folder of
its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from nnunet_multimodal.datasets.base import (
    Collector,
    Request,
    Source,
    case_name,
    check_encoding,
    parse_labels,
    parse_named,
)
from nnunet_multimodal.errors import UserError

LABEL = "dseg"
INDICES = frozenset(("chunk", "echo", "flip", "inv", "run", "split"))  # BIDS counts by these: 01 is 1
SOURCES = "sourcedata"  # what the tree was made from, such as images with faces


class Kind(NamedTuple):
    """What files are looked for: a BIDS suffix, and entities that they have, or must not have."""

    suffix: str
    entities: tuple[tuple[str, str], ...]
    forbidden: tuple[tuple[str, str], ...] = ()

    def fits(self, suffix: str, entities: Mapping[str, str]) -> bool:
        """Whether a file is of this kind."""
        has = {(name, _value(name, str(value))) for name, value in entities.items()}
        return suffix == self.suffix and set(self.entities) <= has and not set(self.forbidden) & has


def parse_kind(text: str) -> Kind:
    """``SUFFIX`` or ``SUFFIX:entity-value:entity-value``.

    Raises:
        UserError: not of this form.
    """
    suffix, *entities = text.split(":")
    pairs = [entity.partition("-") for entity in entities]
    if not suffix or not all(name and value for name, _, value in pairs):
        raise UserError(f"{text!r}: give a BIDS suffix and its entities, such as T1w:ce-gadolinium")
    return Kind(suffix, tuple((name, _value(name, value)) for name, _, value in pairs))


def _value(entity: str, text: str) -> str:
    """What an entity's value is compared by: without regard to case, numbers without leading zeros."""
    return str(int(text)) if entity in INDICES and text.isdecimal() else text.casefold()


def read(request: Request) -> Source:
    """The cases of a BIDS tree.

    Raises:
        UserError: ancpbids is not installed, no such tree or derivatives, or several files for one modality of a case.
    """
    channels = {name: parse_kind(text) for name, text in parse_named(request.channels, "--channels").items()}
    for (first, kind), (second, other) in combinations(channels.items(), 2):
        if (kind.suffix, set(kind.entities)) == (other.suffix, set(other.entities)):
            raise UserError(f"--channels: {first} and {second} are the same files; give other entities, or one of them")
    labels, values = parse_labels(request.labels)
    if not request.derivatives:
        raise UserError("--derivatives is needed here: the folder of label maps, or its name below derivatives/")
    folder = request.path / "derivatives" / request.derivatives
    folder = folder if folder.is_dir() else Path(request.derivatives)
    found, subjects = Collector(request.path.resolve()), {}
    told_apart = _told_apart(channels)
    for file, suffix, entities in _files(request.path, scope="raw"):
        for name, kind in told_apart.items():
            if kind.fits(suffix, entities):
                subjects[_add(found, entities, name, file).casefold()] = entities["sub"]
    kind = parse_kind(request.label_pattern or LABEL)
    for file, suffix, entities in _files(folder, scope=None):
        if kind.fits(suffix, entities):
            subjects[_add(found, entities, None, file).casefold()] = entities["sub"]
    cases = tuple(found.case(name, split="", group=subjects[name.casefold()], values=values) for name in found)
    if not cases:
        raise UserError(f"{request.path} has no file of the suffixes that --channels names: {', '.join(channels)}")
    return Source(name=case_name(request.folder.name), channels=tuple(channels), labels=labels, cases=cases)


def _add(found: Collector, entities: Mapping[str, Any], channel: str | None, file: Path) -> str:
    """Note a file of a subject's session; returns the name of the case.

    Raises:
        UserError: ancpbids read but a part of subject or session, or see :class:`Collector`.
    """
    named = [f"{name}-{entities[name]}" for name in ("sub", "ses") if name in entities]
    for entity in named:
        if entity not in file.name.split("_"):
            raise UserError(f"{file}: ancpbids reads {entity}: BIDS has letters and digits alone there; rename it")
    case = "_".join(named)
    try:
        return found.add_label(case, file) if channel is None else found.add_image(case, channel, file)
    except UserError as error:
        raise UserError(f"{error}, or name an entity that one of them has, as in T1w:run-1") from error


def _told_apart(channels: Mapping[str, Kind]) -> dict[str, Kind]:
    """A kind must not have what other kinds of its suffix ask for and it does not."""
    return {
        name: kind._replace(
            forbidden=tuple(
                entity
                for other in channels.values()
                if other.suffix == kind.suffix
                for entity in other.entities
                if entity not in kind.entities
            )
        )
        for name, kind in channels.items()
    }


def _files(folder: Path, scope: str | None) -> Iterable[tuple[Path, str, dict[str, Any]]]:
    """NIfTI files of a tree: path, suffix, entities; those with a subject, and none of ``sourcedata``."""
    try:
        import ancpbids
    except ImportError as error:
        raise UserError("ancpbids is not installed; pip install 'nnunet-multimodal[bids]'") from error
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; --derivatives names one below derivatives/, or any other")
    # a pickle in a stranger's tree would run code
    options = ancpbids.DatasetOptions(ignore_pickle_file=True)
    root = folder.resolve()
    dataset = ancpbids.load_dataset(str(root), options)
    artifacts: Any = dataset.query(extension=[".nii", ".nii.gz"], scope=scope)
    for artifact in sorted(artifacts, key=lambda artifact: artifact.get_absolute_path()):
        file = Path(artifact.get_absolute_path())
        check_encoding(file)
        if "sub" in artifact.entities and SOURCES not in file.relative_to(root).parts:
            yield file, artifact.suffix, dict(artifact.entities)
