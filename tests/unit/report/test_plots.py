"""What the page's plots hold, as matplotlib's figures."""

import io
from dataclasses import replace

import numpy as np
import pytest

from nnunet_multimodal.report import gather, plots
from tests.unit.report.study import LABEL, RATERS, SPACING_MM, TRAINER, rated


@pytest.fixture
def found(rated_study, monkeypatch):
    """The study, whose plots stay figures."""
    monkeypatch.setattr(plots, "_uri", lambda figure: figure)
    return gather.gather_study([rated_study / "results"], None, None)


def legend(figure):
    (own,) = figure.legends
    return [text.get_text() for text in own.get_texts()]


def test_names_are_no_formulas_and_may_begin_with_an_underscore(found):
    runs = [replace(found.predictions[0], name=name) for name in ("_old", r"a$\frac$b")]
    for figure in (plots.sample_quality(runs), plots.reliability(runs), plots.volumes(runs, LABEL, "ml", {})):
        assert [name.strip() for name in legend(figure)] == ["_old", r"a$\frac$b"]
        figure.savefig(io.BytesIO(), format="svg")  # where a formula would not be read


def test_folds_are_told_apart(found):
    (model,) = found.models
    (fold,) = model.folds
    folds = tuple(replace(fold, name=str(number)) for number in range(5))
    other = replace(model, configuration="2d", folds=folds)
    figure = plots.training_curves([replace(model, folds=folds), other, replace(other, trainer="Other")])
    names = legend(figure)
    assert len(set(names)) == 15
    assert [TRAINER in names[0], "3d_big" in names[0], "2d" in names[5], names[10]] == [True] * 3 + ["Other, fold 0"]
    lines = figure.axes[1].lines
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 15


def test_reliability_names_who_has_a_curve_of_any_label(found):
    (run,) = found.predictions
    curve = run.evaluation.reliability[LABEL]
    labels = [f"label {number}" for number in range(6)]
    first = replace(run, evaluation=replace(run.evaluation, reliability=dict.fromkeys(labels[:5], curve)))
    second = replace(run, name="second", evaluation=replace(run.evaluation, reliability={labels[5]: curve}))
    figure = plots.reliability([first, second])
    assert legend(figure) == ["predictions", "second"]
    assert [axis.get_title() for axis in figure.axes] == labels
    assert figure.get_figwidth() <= 13  # rows of a few


def test_volumes_show_the_raters_range_and_overlapping_runs_side_by_side(found):
    (run,) = found.predictions
    voxels = {"case_1": {LABEL: [int(rated(rater).sum()) for rater in RATERS]}}
    figure = plots.volumes([run, replace(run, name="other")], LABEL, "ml", voxels)
    ranges = [lines for lines in figure.axes[0].collections if lines.get_linestyle()[0][1] is not None]
    expected = np.sort(voxels["case_1"][LABEL]) * np.prod(SPACING_MM) / 1000
    for lines in ranges:
        (segment,) = lines.get_segments()  # of the only case with raters
        np.testing.assert_allclose(segment[:, 0], expected)
    assert len(ranges) == 2
    left, right = figure.axes[0].lines[:2]
    assert (left.get_xdata() < right.get_xdata()).all()
    np.testing.assert_array_equal(left.get_ydata(), right.get_ydata())


def test_nothing_is_drawn_of_volumes_that_are_not_known(found):
    (run,) = found.predictions
    assert plots.volumes([run], "no label", "ml", {}) == ""
    lost = {case: {LABEL: {"n_ref": np.nan}} for case in run.summaries}
    assert plots.volumes([replace(run, evaluation=replace(run.evaluation, cases=lost))], LABEL, "ml", {}) == ""
