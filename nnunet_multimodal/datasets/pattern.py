"""Any folder of co-registered files: ``--pattern '{case}/{case}_{channel}.nii.gz'``.

A pattern names files, relative to the source. ``{case}``, ``{channel}``, ``{rater}`` and ``{patient}`` stand for a part
of a name, ``*`` for anything but a slash, and what stands twice must be the same twice. Case does not matter. Cases of
one patient stay together in the folds. Folders called train and val, both with label maps, are the split.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from nnunet_multimodal.datasets.base import (
    TEST,
    TRAIN,
    VALIDATION,
    Collector,
    Request,
    Source,
    case_name,
    common_ending,
    list_files,
    named_part,
    parse_labels,
    parse_named,
)
from nnunet_multimodal.errors import UserError

FIELDS = ("case", "channel", "rater", "patient")
_PART = re.compile(r"\{([^{}]*)\}|\*")


def compile_pattern(pattern: str, choices: Mapping[str, Sequence[str]], known: Sequence[str] = FIELDS) -> re.Pattern:
    """A pattern of file names as a regular expression with a group for each field.

    Args:
        pattern: see above.
        choices: field -> all that it may be; other fields take anything but a slash, as little as fits.
        known: the fields that there are.

    Raises:
        UserError: a field that does not exist, a brace that is not closed.
    """
    written, position, seen = [], 0, set()
    for part in _PART.finditer(pattern):
        written.append(re.escape(pattern[position : part.start()]))
        position, name = part.end(), part[1]
        if name is None:
            written.append("[^/]*")
        elif name not in known:
            fields = ", ".join(f"{{{field}}}" for field in known)
            raise UserError(f"pattern {pattern!r}: there is no {{{name}}}; there are {fields} and *")
        elif name in seen:
            written.append(f"(?P={name})")
        else:
            of_field = "|".join(re.escape(text) for text in choices.get(name, ())) or "[^/]+?"
            written.append(f"(?P<{name}>{of_field})")
            seen.add(name)
    written.append(re.escape(pattern[position:]))
    if {"{", "}"} & set(_PART.sub("", pattern)):
        raise UserError(f"pattern {pattern!r}: a brace is not closed; fields look like {{case}}")
    return re.compile("".join(written), re.IGNORECASE)


def read(request: Request) -> Source:
    """The cases of a folder, from patterns of file names.

    Raises:
        UserError: no pattern, channels or labels, or nothing that they fit.
    """
    if not request.pattern:
        raise UserError("--pattern is needed here, such as '{case}/{case}_{channel}.nii.gz'")
    channels = parse_named(request.channels, "--channels")
    labels, values = parse_labels(request.labels)
    by_text: dict[str, str] = {}
    for name, text in channels.items():
        if (first := by_text.setdefault(text.casefold(), name)) != name:
            raise UserError(f"--channels {name}={text}: {first} has this text (capitals do not matter); give another")
    images = compile_pattern(request.pattern, {"channel": list(channels.values())})
    if "case" not in images.groupindex or ("channel" not in images.groupindex and len(channels) > 1):
        raise UserError(f"--pattern {request.pattern!r} needs {{case}}, and {{channel}} where there are several")
    maps = compile_pattern(request.label_pattern, {}) if request.label_pattern else None
    if maps is not None and "case" not in maps.groupindex:
        raise UserError(f"--label-pattern {request.label_pattern!r} needs {{case}}")
    found, patients = Collector(request.path), {}
    for file in list_files(request.path):
        # a label map may fit the images' pattern as well, where there is but one channel
        if maps is not None and (match := maps.fullmatch(file.as_posix())):
            case = found.add_label(_case(match), file, match.groupdict().get("rater") or "")
        elif match := images.fullmatch(file.as_posix()):
            text = match.groupdict().get("channel") or next(iter(by_text))
            case = found.add_image(_case(match), by_text[text.casefold()], file)
        else:
            found.ignored.append(file)
            continue
        patients[case.casefold()] = match.groupdict().get("patient") or ""
    splits = _splits(found)
    cases = tuple(
        found.case(name, group=patients[name.casefold()], values=values, **splits.get(name, {})) for name in found
    )
    if not cases:
        some = ", ".join(map(str, found.ignored[:3])) or "no files"
        raise UserError(f"--pattern {request.pattern!r} fits nothing in {request.path}, where there are {some}")
    files = [file for case in cases for file in (*case.images.values(), *case.label_maps.values())]
    return Source(
        name=case_name(request.folder.name),
        channels=tuple(channels),
        labels=labels,
        cases=cases,
        ending=common_ending(files),
        ignored=tuple(found.ignored),
    )


def _splits(found: Collector) -> dict[str, dict[str, str]]:
    """Case -> its ``split``, where names of folders say one: the validation part is held out, or test images.

    It is held out if it has label maps and there is a training part that has some, and test images if it has none.
    """
    parts = {name: named_part(found.files(name)) for name in found}
    with_labels = {parts[name] for name in found if found.case(name).label_maps}
    if VALIDATION not in with_labels:
        parts = {name: TEST if part == VALIDATION else part for name, part in parts.items()}
    elif TRAIN not in with_labels:
        parts = {name: "" if part == VALIDATION else part for name, part in parts.items()}
    return {name: {"split": part} for name, part in parts.items() if part}


def _case(match: re.Match) -> str:
    fields = match.groupdict()
    return "_".join(filter(None, (fields.get("patient"), fields["case"])))
