"""Which series is which modality of which case, by conditions on DICOM attributes."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydicom import Dataset
from pydicom.datadict import tag_for_keyword
from pydicom.multival import MultiValue

from nnunet_multimodal.datasets.base import case_name, parse_named
from nnunet_multimodal.dicom.files import Series
from nnunet_multimodal.errors import UserError

_CONDITION = re.compile(r"(\w+)\s*(==|!=|!~|~)\s*(.*)", re.DOTALL)


@dataclass(frozen=True)
class Condition:
    """``keyword`` of a header compared (``==``, ``!=``, ``~``, ``!~``) with ``value``."""

    keyword: str
    operator: str
    value: str

    def holds(self, header: Dataset) -> bool:
        """Whether a header is so."""
        there = text(header, self.keyword)
        if self.operator.endswith("~"):
            same = re.search(self.value, there, re.IGNORECASE) is not None
        else:
            same = there.casefold() == self.value.casefold() or _equal_numbers(there, self.value)
        return same != self.operator.startswith("!")


@dataclass(frozen=True)
class Rule:
    """A channel and what its series must be.

    Attributes:
        channel: name of the modality.
        written: the rule as the user gave it.
        conditions: that must all hold.
    """

    channel: str
    written: str
    conditions: tuple[Condition, ...]

    def fits(self, series: Series) -> bool:
        """Whether all conditions hold."""
        return all(condition.holds(series.header) for condition in self.conditions)


def parse_rules(texts: Sequence[str]) -> tuple[Rule, ...]:
    """``NAME=CONDITION & CONDITION`` each.

    Raises:
        UserError: not of this form, no such DICOM attribute, or no regular expression.
    """
    return tuple(
        Rule(channel, written, tuple(_parse(part, f"--channels {channel}={written}") for part in written.split("&")))
        for channel, written in parse_named(texts, "--channels").items()
    )


def _parse(written: str, where: str) -> Condition:
    match = _CONDITION.fullmatch(written.strip())
    if match is None or not match[3].strip():
        raise UserError(f"{where}: {written.strip()!r} is no condition; write Modality==CT or SeriesDescription~t1")
    if tag_for_keyword(match[1]) is None:
        raise UserError(f"{where}: DICOM has no attribute {match[1]}; keywords are as in SeriesDescription")
    condition = Condition(match[1], match[2], match[3].strip())
    if condition.operator.endswith("~"):
        try:
            re.compile(condition.value)
        except re.error as error:
            raise UserError(f"{where}: {condition.value!r} is no regular expression ({error})") from error
    return condition


def text(header: Dataset, keyword: str) -> str:
    """An attribute as text, several values with a backslash between them; empty if it is not there."""
    value = header.get(keyword)
    if isinstance(value, (list, tuple, MultiValue)):
        return "\\".join(map(str, value)).strip()
    return "" if value is None else str(value).strip()


def _equal_numbers(a: str, b: str) -> bool:
    try:
        return float(a) == float(b)
    except ValueError:
        return False


def group_cases(series: Sequence[Series], template: str) -> dict[str, list[Series]]:
    """Series by the case that they belong to, whose name the template makes of their headers.

    Raises:
        UserError: the template names no attribute, a series lacks it, or two cases would have one name.
    """
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise UserError(f"--case {template!r}: {error}; write {{PatientID}}_{{StudyDate}}") from error
    unknown = [field for field in fields if tag_for_keyword(field) is None]
    if unknown or not fields:
        raise UserError(
            f"--case {template!r}: DICOM has no attribute {unknown or ''}; write {{PatientID}}_{{StudyDate}}"
        )
    cases: dict[str, list[Series]] = {}
    origins: dict[str, tuple[str, ...]] = {}
    for one in series:
        values = {field: text(one.header, field) for field in fields}
        lacking = [field for field, value in values.items() if not value]
        if lacking:
            raise UserError(f"--case {template!r}: {one} has no {', '.join(lacking)}; name cases by something else")
        name = case_name(template.format(**values))
        origin = origins.setdefault(name, tuple(values.values()))
        if not name or origin != tuple(values.values()):
            raise UserError(f"--case {template!r}: {origin} and {tuple(values.values())} would both be {name!r}")
        cases.setdefault(name, []).append(one)
    return cases


def choose(case: str, series: Sequence[Series], rules: Sequence[Rule]) -> tuple[dict[str, Series], list[str]]:
    """The series of each channel, and the channels that have none.

    Raises:
        UserError: several series for a channel, or one for several; the candidates are named.
    """
    fitting = {rule.channel: [one for one in series if rule.fits(one)] for rule in rules}
    taken: dict[str, str] = {}
    for rule in rules:
        candidates = fitting[rule.channel]
        if len(candidates) > 1:
            raise UserError(
                f"{case}: {len(candidates)} series are {rule.channel} ({rule.written}); a further condition has to "
                f"choose, or move the others away:\n{listing(candidates)}"
            )
        for one in candidates:
            other = taken.setdefault(one.uid, rule.channel)
            if other != rule.channel:
                raise UserError(
                    f"{case}: one series is {other} and {rule.channel}; narrow a condition:\n{listing([one])}"
                )
    missing = [channel for channel, candidates in fitting.items() if not candidates]
    return {channel: candidates[0] for channel, candidates in fitting.items() if candidates}, missing


def listing(series: Sequence[Series] | Mapping[str, Series]) -> str:
    """Series, one a line."""
    return "\n".join(f"  {one}" for one in (series.values() if isinstance(series, Mapping) else series))
