import csv
import math

import numpy as np
import pytest

from nnunet_multimodal.evaluate.subset_report import (
    AVERAGE,
    Key,
    Measured,
    Scores,
    as_csv,
    as_markdown,
    case_csv,
    draw,
    summarise,
)
from nnunet_multimodal.evaluate.subsets import all_subsets, subset_name
from nnunet_multimodal.metrics.case import CaseMeasures

SUBSETS = [(0,), (1,), (0, 1)]
CASES = [f"case_{i}" for i in range(6)]


def measures(*dice, hd95=None):
    by_label = {
        label: {"Dice": value, "HD95_mm": 10 * (1 - value) if hd95 is None else hd95}
        for label, value in enumerate(dice, 1)
    }
    return CaseMeasures(by_label, {})


@pytest.fixture
def measured():
    """The second model is better with one modality only, by a little more in every case."""
    rows = []
    for subset in SUBSETS:
        for index, case in enumerate(CASES):
            base = 0.5 + 0.02 * index + 0.1 * len(subset)
            rows.append(Measured("A", subset, case, measures(base, base / 2)))
            better = base + (0.1 + 0.01 * index if len(subset) == 1 else 0)
            rows.append(Measured("B", subset, case, measures(better, better / 2)))
    return rows


@pytest.fixture
def empty():
    return Scores(("A", "B"), "A", ("CT", "PET"), (1, 2), ("organ", "lesion"))


def test_subsets_grow_and_have_folders_of_their_own():
    assert all_subsets(3) == [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
    assert len(all_subsets(4)) == 15
    assert subset_name((0, 2), ("FLAIR", "T1", "T1/Gd")) == "FLAIR+T1_Gd"


def test_cells_are_means_over_cases(measured, empty):
    scores = summarise(measured, empty)
    expected = [0.6 + 0.02 * index for index in range(6)]
    cell = scores.cells[Key("A", (0,), "organ", "Dice")]
    assert cell.mean == pytest.approx(np.mean(expected))
    assert min(expected) < cell.low < cell.mean < cell.high < max(expected)
    assert cell.n == 6
    assert scores.cells[Key("A", (0,), "mean", "Dice")].mean == pytest.approx(np.mean(expected) * 0.75)
    average = scores.cells[Key("A", AVERAGE, "organ", "Dice")].mean
    assert average == pytest.approx(np.mean([scores.cells[Key("A", s, "organ", "Dice")].mean for s in SUBSETS]))


def test_differences_to_the_baseline_are_corrected_over_a_models_cells(measured, empty):
    scores = summarise(measured, empty)
    assert math.isnan(scores.cells[Key("A", (0,), "organ", "Dice")].p)
    cell = scores.cells[Key("B", (0,), "organ", "Dice")]
    assert cell.p == pytest.approx(2 / 2**6)
    # 3 subsets and their average, 2 labels and their mean; 9 of the 12 differ
    assert cell.p_holm == pytest.approx(12 * 2 / 2**6)
    assert scores.cells[Key("B", (0, 1), "organ", "Dice")].p == 1


def test_infinite_distances_are_counted_and_undefined_ones_left_out(measured, empty):
    measured = [
        entry._replace(measures=measures(0.0, 0.5, hd95=math.inf))
        if entry[:3] == ("B", (0,), "case_0")
        else entry._replace(measures=measures(math.nan, 0.5, hd95=math.nan))
        if entry[:3] == ("B", (0,), "case_1")
        else entry
        for entry in measured
    ]
    scores = summarise(measured, empty)
    cell = scores.cells[Key("B", (0,), "organ", "HD95_mm")]
    assert (cell.n, cell.without_value, cell.cases) == (4, 1, 6)
    assert scores.cells[Key("B", AVERAGE, "organ", "HD95_mm")].without_value == 1
    assert scores.cells[Key("B", (0,), "mean", "HD95_mm")].without_value == 1
    assert scores.cells[Key("B", (0,), "organ", "Dice")].n == 5
    assert "(1 ∞)" in as_markdown(scores)


def test_a_model_that_finds_nothing_is_worse_than_one_that_finds_something_far_away(empty):
    """Its finite distances are small, and its infinite ones still decide the comparison."""
    rows = []
    for index, case in enumerate(CASES):
        for subset in SUBSETS:
            far = CaseMeasures(
                {1: {"Dice": 0.3, "HD95_mm": 30.0 + index}, 2: {"Dice": 0.9, "HD95_mm": 5.0 + index}}, {}
            )
            none = CaseMeasures({1: {"Dice": 0.0, "HD95_mm": math.inf}, 2: {"Dice": 0.9, "HD95_mm": 4.0 + index}}, {})
            rows += [Measured("A", subset, case, far), Measured("B", subset, case, none if subset == (0,) else far)]
    scores = summarise(rows, empty)
    for subset, label in (((0,), "organ"), ((0,), "mean"), (AVERAGE, "organ"), (AVERAGE, "mean")):
        cell = scores.cells[Key("B", subset, label, "HD95_mm")]
        assert cell.without_value == 6
        assert cell.p == pytest.approx(2 / 2**6)
    swapped = summarise([m._replace(model={"A": "B", "B": "A"}[m.model]) for m in rows], empty)
    assert swapped.cells[Key("B", (0,), "mean", "HD95_mm")].p == pytest.approx(2 / 2**6)
    assert "– (6 ∞)" in as_markdown(scores)


def test_the_average_is_over_cases_that_have_all_subsets(measured, empty):
    fewer = [entry for entry in measured if entry[1:3] != ((0, 1), "case_5")]
    scores = summarise(fewer, empty)
    assert scores.cells[Key("A", (0, 1), "organ", "Dice")].n == 5
    assert scores.cells[Key("A", (0,), "organ", "Dice")].n == 6
    assert scores.cells[Key("A", AVERAGE, "organ", "Dice")].n == 5


def test_the_table_has_dots_intervals_and_a_row_of_averages(measured, empty):
    text = as_markdown(summarise(measured, empty))
    lines = text.splitlines()
    assert lines[0].startswith("Mean over the n cases that have the subset's modalities")
    assert "with 6 cases" in lines[0]
    assert "p is at least 0.031 before it" in lines[0]
    assert "| CT | PET | n | organ: A | organ: B | lesion: A | lesion: B | mean: A | mean: B |" in lines
    assert [line[:9] for line in lines if line.startswith(("| ●", "| ○"))] == [
        "| ● | ○ |",
        "| ○ | ● |",
        "| ● | ● |",
    ] * 2
    assert sum(line.startswith("| average |  |") for line in lines) == 2
    assert "0.650 [0." in text


def test_csv_files_hold_everything(measured, empty):
    scores = summarise(measured, empty)
    rows = list(csv.DictReader(as_csv(scores).splitlines()))
    assert len(rows) == 2 * 4 * 3 * 2
    row = next(r for r in rows if (r["model"], r["subset"], r["label"], r["metric"]) == ("B", "PET", "organ", "Dice"))
    assert float(row["p_holm"]) == pytest.approx(0.375)
    assert {r["subset"] for r in rows} == {"CT", "PET", "CT+PET", "average"}
    cases = list(csv.DictReader(case_csv(scores, measured).splitlines()))
    assert len(cases) == 2 * 3 * 6 * 2
    assert cases[0] == {
        "model": "A", "subset": "CT", "case": "case_0", "label": "organ", "Dice": "0.6", "HD95_mm": "4"
    }  # fmt: skip


def test_a_picture_is_drawn(measured, empty, tmp_path):
    draw(summarise(measured, empty), tmp_path / "table.png")
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["table.png"]
