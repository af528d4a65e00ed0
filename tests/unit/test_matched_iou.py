"""M-IoU, volumes and agreement with the raters: what the samples of several raters are measured by besides D_GED^2."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest

from nnunet_multimodal.metrics.calibration import expected_calibration_error
from nnunet_multimodal.metrics.distribution import (
    continuous_ranked_probability_score,
    generalized_energy_distance,
    matched_iou,
    pairwise_iou_distance,
    score_distribution,
)

REFERENCE = Path(
    os.environ.get("NNUNET_MULTIMODAL_REFERENCE", Path(__file__).resolve().parents[3] / "shared" / "reference_values")
)
RNG = np.random.default_rng(0)


def label_maps(count, labels=3):
    return RNG.integers(0, labels, (count, 9, 8))


def test_ged_m_iou_and_ece_are_the_authors():
    file = REFERENCE / "mose_ot_ref.npz"
    if not file.is_file():
        pytest.skip(f"no {file}; set NNUNET_MULTIMODAL_REFERENCE")
    with np.load(file) as data:
        r = {name: np.asarray(data[name]) for name in data.files}
    samples, raters = r["logits"].argmax(2), r["y"].astype(int)
    found = [
        [f(s, y, [1], w, v) for s, y, w, v in zip(samples, raters, r["w"], r["pg"], strict=True)]
        for f in (generalized_energy_distance, matched_iou)
    ]
    np.testing.assert_allclose(np.mean(found, 1), r["ged_miou"], atol=1e-5)
    p = np.exp(r["logits"]) / np.exp(r["logits"]).sum(2, keepdims=True)
    marginal = np.einsum("bn,bnhw->bhw", r["w"], p[:, :, 1])
    theirs = np.einsum("bm,bmhw->bhw", r["pg"], raters)
    assert expected_calibration_error(np.clip(marginal, 0, 1), theirs) == pytest.approx(float(r["ece_fg"]), abs=1e-5)


def test_with_equal_weights_it_is_the_best_assignment():
    samples, raters = label_maps(4), label_maps(4)
    distance = pairwise_iou_distance(samples, raters, [1, 2])
    best = min(distance[list(order), range(4)].mean() for order in itertools.permutations(range(4)))
    assert matched_iou(samples, raters, [1, 2]) == pytest.approx(1 - best)


def test_weights_stand_for_repeated_samples():
    samples, raters = label_maps(2), label_maps(4)
    repeated = matched_iou(samples[[0, 0, 0, 1]], raters, [1, 2])
    assert matched_iou(samples, raters, [1, 2], [0.75, 0.25]) == pytest.approx(repeated)
    assert matched_iou(raters, raters, [1, 2]) == pytest.approx(1)


def test_crps_is_the_integral_of_the_squared_difference_of_the_distributions():
    samples, weights = np.array([2.0, 5.0, 9.0]), np.array([0.5, 0.2, 0.3])
    x = np.linspace(-5, 15, 200001)
    below = ((samples <= x[:, None]) * weights).sum(1)
    expected = ((below - (x >= 4)) ** 2).mean() * 20
    assert continuous_ranked_probability_score(samples, weights, 4.0) == pytest.approx(expected, abs=1e-3)
    assert continuous_ranked_probability_score(np.array([3.0]), np.ones(1), 5.0) == 2


def boxes(*sizes):
    maps = np.zeros((len(sizes), 10, 10), int)
    for own, size in zip(maps, sizes, strict=True):
        own[0, :size] = 1
    return maps


def test_volumes_of_raters_in_the_samples_interval():
    scores = score_distribution(boxes(5)[0], boxes(3, 4, 6), boxes(2, 3, 5, 7), [1]).average
    assert scores.volume_coverage == 0.5
    crps = [continuous_ranked_probability_score(np.array([3.0, 4, 6]), np.full(3, 1 / 3), y) for y in (2, 3, 5, 7)]
    assert scores.volume_crps == pytest.approx(np.mean(crps))


def test_a_prediction_within_the_raters_own_spread():
    raters = boxes(4, 5, 9)
    close = score_distribution(boxes(5)[0], boxes(5), raters, [1]).average
    far = score_distribution(boxes(1)[0], boxes(1), raters, [1]).average
    assert (close.within_raters, far.within_raters) == (1, 0)
    dice = [[2 * min(a, b) / (a + b) for b in (4, 5, 9)] for a in (4, 5, 9)]
    expected = [np.mean([dice[i][j] for j in range(3) if j != i]) for i in range(3)]
    np.testing.assert_allclose(close.interrater_dice, expected)
    alone = score_distribution(boxes(5)[0], boxes(5), boxes(5), [1]).average
    assert np.isnan(alone.within_raters)


def agreement(prediction, raters, weights=None):
    prediction, raters = np.array([prediction]), np.array(raters)[:, None]
    return score_distribution(prediction, prediction[None], raters, (1,), rater_weights=weights).average


def test_predicting_nothing_is_not_within_raters_who_drew():
    drawn, other, empty = [1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]
    assert agreement(empty, [drawn, other, empty]).within_raters == 0  # Dice 0.4: the empty one's 1 is not its own
    assert agreement(empty, [drawn, other, drawn, empty]).within_raters == 0
    for raters in ([drawn, drawn, empty], [drawn, drawn, drawn, empty], [drawn, drawn, [1, 1, 1, 0]]):
        assert agreement(empty, raters).within_raters == 0
        assert agreement(drawn, raters).within_raters == 1
    assert agreement(empty, [drawn, empty, empty]).within_raters == 1  # most drew nothing
    assert agreement([0, 0, 0, 1], [drawn, empty, empty]).within_raters == 0
    assert agreement(empty, [empty, empty]).within_raters == 1
    assert agreement(drawn, [empty, empty]).within_raters == 0
    assert agreement(empty, [drawn, drawn, empty, empty]).within_raters == 1  # so much as the drawn one
    assert agreement(drawn, [drawn, drawn, empty, empty]).within_raters == 1


def test_weights_decide_who_are_half_of_the_raters():
    drawn, more, other = [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]
    raters = [drawn, more, other]
    assert agreement(other, raters).within_raters == 0
    assert agreement(other, raters, (1, 1, 8)).within_raters == 1
    found = agreement(more, raters, (1, 2, 3))
    np.testing.assert_allclose(found.interrater_dice, [2 * 0.8 / 5, 0.8 / 4, 0])
    np.testing.assert_allclose(found.others_dice, [2 / 5, 0.8 / 4, (0.8 + 2) / 3])
    np.testing.assert_allclose(found.rater_dice, [0.8, 1, 0])
    assert found.advantage.tolist() == [1, 1, 1]
    assert agreement([0, 1, 0, 0], raters).advantage.tolist() == [0, 0, 1]
    assert found.mean_interrater_dice == pytest.approx((0.32 + 2 * 0.2) / 6)
    assert np.isnan(agreement(more, [drawn]).advantage).all()


def test_one_more_rater_is_often_within_the_others_and_their_majority_nearly_always():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:24, :24]

    def disc():
        centre, radius = 12 + rng.standard_normal(2), 6 + rng.standard_normal()
        return ((y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2).astype(int)

    found = []
    for _ in range(50):
        one_more, *raters = (disc() for _ in range(5))
        majority = (np.sum(raters, 0) > 2).astype(int)
        scores = [score_distribution(p, p[None], np.stack(raters), [1]).average for p in (one_more, majority)]
        found.append([own.within_raters for own in scores])
    assert 0.25 < np.mean(found, 0)[0] < 0.6
    assert np.mean(found, 0)[1] > 0.95
