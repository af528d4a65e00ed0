"""What a conversion found and did, as a table for every case and a few lines for the user."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_multimodal.datasets.base import TEST, TRAIN, Source, SourceCase
from nnunet_multimodal.errors import SHOWN

TABLE = "conversion.csv"
COLUMNS = ("case", "part", "modalities", "files", "remarks")


@dataclass(frozen=True)
class FileReport:
    """What becomes of a file; ``changes`` is empty where it is taken as it is."""

    target: str
    file: Path
    changes: tuple[str, ...]


@dataclass(frozen=True)
class CaseReport:
    """What was found in a case's files."""

    files: tuple[FileReport, ...] = ()
    labels: frozenset[int] = frozenset()
    remarks: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def write_table(
    folder: Path,
    source: Source,
    cases: Sequence[SourceCase],
    reports: Sequence[CaseReport],
    done: Sequence[Sequence[str]],
    dropped: Mapping[str, str],
) -> None:
    """Write what was done with every case; ``done`` says how each of its files came there."""
    with (folder / TABLE).open("w", newline="") as lines:
        table = csv.writer(lines, lineterminator="\n")
        table.writerow(COLUMNS)
        for case, report, how in zip(cases, reports, done, strict=True):
            changes = [f"{file.file.name}: {', '.join(file.changes)}" for file in report.files if file.changes]
            there = " ".join(channel for channel in source.channels if channel in case.images)
            remarks = "; ".join([*report.remarks, *changes])
            table.writerow([case.name, case.split or TRAIN, there, _counted(Counter(how)), remarks])
        table.writerows([name, "left out", "", "", why] for name, why in dropped.items())


def summarise(
    source: Source,
    cases: Sequence[SourceCase],
    reports: Sequence[CaseReport],
    done: Sequence[Sequence[str]],
    dropped: Mapping[str, str],
    folds: Sequence[Mapping[str, Sequence[str]]] | None,
) -> str:
    """What was done, in words."""
    training = [report for case, report in zip(cases, reports, strict=True) if case.split != TEST]
    lines = [f"{len(training)} training cases, {len(cases) - len(training)} test cases"]
    lines.append(f"files: {_counted(Counter(way for ways in done for way in ways))}")
    # what differs between cases, such as sizes, stands in the table
    changes = Counter(change.split(" from ")[0] for r in reports for file in r.files for change in file.changes)
    lines += [f"{text}: {number} files" for text, number in changes.items()]
    absent = {channel: sum(channel not in case.images for case in cases) for channel in source.channels}
    lines += [f"{channel}: absent in {number} cases, placeholders" for channel, number in absent.items() if number]
    for name, value in source.labels.items():
        values = ({value} if isinstance(value, int) else set(value)) - {0}
        if not values:  # background is everywhere
            continue
        found = sum(bool(values & report.labels) for report in training)
        lines.append(f"{name} ({', '.join(map(str, sorted(values)))}): in {found} of {len(training)} training cases")
    if folds:
        lines.append(f"splits_final.json: {len(folds)} fold{'s' if len(folds) > 1 else ''}")
    lines += source.remarks
    if source.ignored:
        some = ", ".join(map(str, source.ignored[:3]))
        lines.append(f"{len(source.ignored)} files belong to no case and were not looked at: {some}")
    remarks = {case.name: "; ".join(r.remarks) for case, r in zip(cases, reports, strict=True) if r.remarks}
    lines += [shorten(dropped)] if dropped else []
    lines += [shorten(remarks)] if remarks else []
    return "\n".join(lines)


def shorten(lines: Mapping[str, str]) -> str:
    """The first of many lines."""
    shown = [f"{name}: {text}" for name, text in list(lines.items())[:SHOWN]]
    return "\n".join([*shown, f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else shown)


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {what}" for what, number in sorted(counts.items()))
