"""A folder that is measured in parts, by calls on any machines, and their results put together.

Part I of N takes every N-th case from the I-th on and writes OUTPUT.parts/I_of_N.json when it has measured all of them:
the numbers before any mean and the sums of the reliability curves, which JSON keeps to the last bit. Means are then
taken over the cases in their own order, so that nothing differs from an evaluation in one part but the command that the
JSON tells. Whoever finds all parts puts them together: the last one, or two that finish at once, with the same numbers.

Every part notes what it was measured with: settings, version, and names, sizes and times of the files of all cases. One
that was measured with anything else is not taken.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_multimodal import __version__
from nnunet_multimodal.evaluate.cases import CaseFiles, CaseResult, LeftOut, Settings
from nnunet_multimodal.files import write_json
from nnunet_multimodal.metrics.calibration import ReliabilityCurve
from nnunet_multimodal.metrics.case import CaseMeasures, RaterMeasures
from nnunet_multimodal.metrics.distribution import Label

SUFFIX = ".parts"  # of their folder


@dataclass(frozen=True)
class Parts:
    """The parts of an evaluation.

    Attributes:
        folder: where their files are.
        number: of parts.
        labels: of the measures, in their order.
        made_with: what all parts must have been measured with; JSON.
    """

    folder: Path
    number: int
    labels: tuple[Label, ...]
    made_with: dict[str, Any]

    def file(self, part: int) -> Path:
        """The file of one part."""
        return self.folder / f"{part}_of_{self.number}.json"

    def write(self, part: int, results: Iterable[CaseResult]) -> None:
        """Write a part, in the place of one that may be there."""
        content = [_to_json(result, self.labels) for result in results]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.file(part), {"part": part, "made_with": self.made_with, "results": content})

    def read(self, num_cases: int) -> tuple[list[CaseResult], list[str]]:
        """The results of all cases in their order, and why there are none: a reason for each part that is lacking."""
        merged: list[Any] = [None] * num_cases
        lacking = []
        for part in range(self.number):
            try:
                content = json.loads(self.file(part).read_text())
            except FileNotFoundError:
                lacking.append(f"part {part}: there is no {self.file(part)}")
                continue
            except ValueError as error:  # not JSON, not UTF-8
                lacking.append(f"part {part}: {self.file(part)} cannot be read ({error})")
                continue
            other = self._other(part, content)
            if other:
                lacking.append(f"part {part}: {self.file(part)} was measured with other {', '.join(other)}")
            else:
                merged[part :: self.number] = [_from_json(result, self.labels) for result in content["results"]]
        return ([] if lacking else merged), lacking

    def _other(self, part: int, content: dict[str, Any]) -> list[str]:
        """What a part's file was measured with and this evaluation is not."""
        ours = {"part": part, **self.made_with}
        theirs = {"part": content["part"], **content["made_with"]}
        return [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)]


def parts_of(
    output: Path, number: int, cases: Sequence[CaseFiles], left_out: Sequence[LeftOut], settings: Settings
) -> Parts:
    """The parts of an evaluation whose results go to `output`.

    Args:
        output: the JSON file of the results.
        number: of parts.
        cases: all of the folder, not only those of a part.
        left_out: what is not there, of all cases.
        settings: what cases are measured with.
    """
    made_with = {
        "version": __version__,
        **asdict(settings),
        "reader": settings.reader.__name__,
        "files": _digest(cases, left_out),
    }
    return Parts(output.with_suffix(SUFFIX), number, settings.labels, json.loads(json.dumps(made_with)))


def _digest(cases: Sequence[CaseFiles], left_out: Sequence[LeftOut]) -> str:
    """Of names, sizes, times and weights of all files; their folders may have other names on other machines."""
    content: list[Any] = [asdict(entry) for entry in left_out]
    for case in cases:
        files = (case.reference, case.prediction, *case.samples, *case.raters, case.quantities, case.probabilities)
        states = [(file.name, file.stat().st_size, int(file.stat().st_mtime)) for file in files if file is not None]
        content.append((case.case, case.rater_weights, states))
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _to_json(result: CaseResult, labels: Sequence[Label]) -> dict[str, Any]:
    """A case's result; what labels have as lists in their order."""
    content: dict[str, Any] = {"left_out": [asdict(entry) for entry in result.left_out]}
    if result.measures is not None:
        curves = [result.measures.curves[label] for label in labels if label in result.measures.curves]
        content["by_label"] = [result.measures.by_label[label] for label in labels]
        content["average"] = result.measures.average
        content["curves"] = [{name: sums.tolist() for name, sums in asdict(curve).items()} for curve in curves]
        content["raters"] = {
            name: {"by_label": [own.by_label[label] for label in labels], "average": own.average}
            for name, own in result.measures.raters.items()
        }
    return content


def _from_json(content: dict[str, Any], labels: Sequence[Label]) -> CaseResult:
    """The result that `_to_json` was given."""
    left_out = [LeftOut(**entry) for entry in content["left_out"]]
    if "by_label" not in content:
        return CaseResult(None, left_out)
    curves = [ReliabilityCurve(**{n: np.array(sums) for n, sums in curve.items()}) for curve in content["curves"]]
    by_label = dict(zip(labels, content["by_label"], strict=True))
    of_labels = dict(zip(labels, curves, strict=False))  # of every label, or none
    raters = {
        name: RaterMeasures(dict(zip(labels, own["by_label"], strict=True)), own["average"])
        for name, own in content["raters"].items()
    }
    return CaseResult(CaseMeasures(by_label, content["average"], of_labels, raters), left_out)
