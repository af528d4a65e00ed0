"""Volumes and what is measured of them, in one unit."""

import json
import math
from dataclasses import replace

import pandas as pd
import pytest

from nnunet_multimodal.cli import main
from nnunet_multimodal.evaluate.report import FOREGROUND
from nnunet_multimodal.report import gather, page, read_views, units
from tests.unit.report.study import CASES, LABEL, SPACING_MM, WellFormed, json_of, make_flat, write_predictions

VOXEL_ML = math.prod(SPACING_MM) / 1000


@pytest.fixture(scope="module")
def found(study):
    return gather.gather_study([study / "results"], None, None)


def test_crps_is_in_the_unit_of_the_volumes(found, study):
    table = pd.read_csv(study / "results" / "predictions" / "evaluation.csv").set_index(["case", "label"])
    assert units.crps_unit(found) == "ml"
    (run,) = units.with_crps_in(found, "ml").predictions
    for case in CASES:
        for label in (LABEL, FOREGROUND):
            expected = table.loc[(case, label), "volume_CRPS"] * VOXEL_ML
            assert run.evaluation.cases[case][label]["volume_CRPS"] == pytest.approx(expected)
    expected = table.loc[("mean", LABEL), "volume_CRPS"] * VOXEL_ML
    assert run.evaluation.mean[LABEL]["volume_CRPS"] == pytest.approx(expected)
    assert run.evaluation.mean[LABEL]["Dice"] == found.predictions[0].evaluation.mean[LABEL]["Dice"]
    text = page.render(found, read_views(found, 0, 0.1), "units")
    assert "CRPS (ml)" in WellFormed(text).text
    assert "volumes, in ml;" in " ".join(WellFormed(text).text.split())
    (data,) = json_of(text, 'id="data"')
    assert "CRPS (ml)" in data["cases"]["case_1"]["runs"]["predictions"]["distribution"]["columns"]


def test_the_mean_is_of_cases_with_voxels_of_their_own_size(found):
    (run,) = found.predictions
    large = {**run.summaries["case_1"], "spacing": [2 * size for size in SPACING_MM]}
    run = replace(run, summaries={**run.summaries, "case_1": large})
    (run,) = units.with_crps_in(gather.Study(predictions=(run,)), "ml").predictions
    voxels = {case: found.predictions[0].evaluation.cases[case][LABEL]["volume_CRPS"] for case in CASES}
    expected = sum(voxels[case] * VOXEL_ML * (8 if case == "case_1" else 1) for case in CASES) / len(CASES)
    assert run.evaluation.mean[LABEL]["volume_CRPS"] == pytest.approx(expected)


def test_crps_stays_in_voxels_where_a_size_is_not_known(found, tmp_path):
    (run,) = found.predictions
    alone = replace(run, name="alone", summaries={})
    both = replace(found, predictions=(run, alone))
    assert (both.unit, units.crps_unit(both)) == ("ml", "voxels")
    assert units.with_crps_in(both, "voxels").predictions[0].evaluation == run.evaluation
    assert page.headings(both)["volume_CRPS"] == "CRPS (voxels)"
    make_flat(tmp_path)
    flags = ["-np", "1", "--raters", str(tmp_path / "raters")]
    assert main(["evaluate", str(tmp_path / "labels"), str(tmp_path / "p"), *flags]) == 0
    assert units.crps_unit(gather.gather_study([tmp_path / "p"], None, None)) == "voxels"


def test_why_there_is_no_interval(found):
    (run,) = found.predictions
    summary = run.summaries["case_1"]
    assert units.no_interval(run, "case_1", LABEL, "ml") == ""
    lost = {**summary["labels"][LABEL], "volume_ml": {**summary["labels"][LABEL]["volume_ml"], "p2.5": math.nan}}
    for changed, reason in (
        ({"samples": 1}, "at least two samples"),
        ({"labels": {LABEL: {**lost, "volume_ml": None}}}, "no volume in ml"),
        ({"labels": {}}, "no volume in ml"),
        ({"labels": {LABEL: lost}}, "not finite"),
    ):
        own = replace(run, summaries={"case_1": {**summary, **changed}})
        assert reason in units.no_interval(own, "case_1", LABEL, "ml")
    assert "nnunet-multimodal predict" in units.no_interval(run, "somebody", LABEL, "ml")


def test_what_has_no_interval_is_one_dash_that_says_why(tmp_path):
    write_predictions(tmp_path / "p", CASES[:2])
    file = tmp_path / "p" / f"{CASES[0]}.json"
    summary = json.loads(file.read_text())
    summary["labels"][LABEL]["volume_ml"]["p2.5"] = math.nan
    file.write_text(json.dumps(summary))
    assert main(["report", str(tmp_path / "p"), "-o", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text()
    assert text.count('<td class="n" title="A number of this volume in CASE.json is not finite.">–</td>') == 1
    assert "– to –" not in WellFormed(text).text
    assert "95 % of samples (ml)" in text
    (data,) = json_of(text, 'id="data"')
    assert "not finite" in data["cases"][CASES[0]]["runs"]["p"]["no_interval"][LABEL]
    assert data["cases"][CASES[1]]["runs"]["p"]["no_interval"] == {LABEL: ""}
