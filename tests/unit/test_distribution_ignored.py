"""What raters ignore: each counts where he says something, whatever the others ignore; and the first samples alone."""

from dataclasses import fields

import numpy as np
import pytest

from nnunet_multimodal.metrics.distribution import (
    generalized_energy_distance,
    matched_iou,
    sample_diversity,
    score_distribution,
)
from nnunet_multimodal.metrics.transport import transport_plan
from tests.unit.test_distribution import LABELS, dice_of, label_maps, mean_distance


def own_voxels(count, shape=(5, 6, 7), seed=5):
    """Of which voxels each rater says something; all of them have some in common."""
    valid = np.random.default_rng(seed).random((count, *shape)) < 0.7
    valid[:, 0, 0] = True
    return valid


def test_raters_and_samples_meet_where_the_rater_says_something():
    samples, raters, prediction = label_maps(4), label_maps(3, seed=1), label_maps(1, seed=2)[0]
    valid, w, v = own_voxels(3), np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.5, 0.3, 0.2])
    found = score_distribution(prediction, samples, raters, LABELS, w, v, valid).average

    def dice(a, b, valid):
        return np.mean([dice_of(np.where(valid, a, 0), np.where(valid, b, 0), label) for label in LABELS])

    with_prediction = [dice(prediction, rater, own) for rater, own in zip(raters, valid, strict=True)]
    np.testing.assert_allclose(found.rater_dice, with_prediction)
    assert found.dice == pytest.approx(v @ with_prediction)
    sampled = np.array(
        [[dice(sample, rater, own) for rater, own in zip(raters, valid, strict=True)] for sample in samples]
    )
    np.testing.assert_allclose(found.sample_dice, sampled @ v)
    np.testing.assert_allclose(found.rater_sample_dice, w @ sampled)
    between = np.array([[dice(raters[i], raters[j], valid[i] & valid[j]) for j in range(3)] for i in range(3)])
    others = [[j for j in range(3) if j != i] for i in range(3)]
    expected = [np.average(between[i][o], weights=v[o]) for i, o in enumerate(others)]
    np.testing.assert_allclose(found.interrater_dice, expected)
    np.testing.assert_allclose(
        found.others_dice, [np.average(np.array(with_prediction)[o], weights=v[o]) for o in others]
    )
    assert found.mean_interrater_dice == pytest.approx(v @ expected)
    distance = [[mean_distance(s, r, valid=own) for r, own in zip(raters, valid, strict=True)] for s in samples]
    plan = transport_plan(np.array([distance]), w[None], v[None])[0]
    assert found.matched_iou == pytest.approx(1 - (plan * distance).sum())
    assert matched_iou(samples, raters, LABELS, w, v, valid) == pytest.approx(found.matched_iou)
    theirs = sum(v[i] * v[j] * mean_distance(raters[i], raters[j], valid=valid[i] & valid[j])
                 for i in range(3) for j in range(3))  # fmt: skip
    assert found.rater_diversity == pytest.approx(theirs)
    assert found.sample_diversity == pytest.approx(sample_diversity(samples, LABELS, w, valid.any(0)))


def test_volumes_are_compared_where_the_rater_says_something():
    samples, raters, valid = label_maps(5), label_maps(2, seed=1), own_voxels(2)
    found = score_distribution(samples[0], samples, raters, (1,), valid=valid).average
    alone = [score_distribution(samples[0], samples, raters[i : i + 1], (1,), valid=valid[i]).average for i in range(2)]
    assert found.volume_crps == pytest.approx(np.mean([scores.volume_crps for scores in alone]))
    assert found.volume_coverage == pytest.approx(np.mean([scores.volume_coverage for scores in alone]))


def test_energy_distance_is_that_of_what_each_rater_sees():
    samples, raters, valid = label_maps(3), label_maps(4, seed=1), own_voxels(4)
    valid[3] = valid[0]
    w, v = np.array([0.5, 0.2, 0.3]), np.array([0.4, 0.3, 0.2, 0.1])
    seen = np.concatenate([np.where(own, samples, 0) for own in valid])
    expected = generalized_energy_distance(seen, np.where(valid, raters, 0), LABELS, np.outer(v, w).ravel(), v)
    found = generalized_energy_distance(samples, raters, LABELS, w, v, valid)
    assert found == pytest.approx(expected)
    assert found >= 0
    case = score_distribution(samples[0], samples, raters, LABELS, w, v, valid)
    assert case.average.generalized_energy_distance == pytest.approx(found)
    by_label = [scores.generalized_energy_distance for scores in case.by_label.values()]
    assert found == pytest.approx(np.mean(by_label))


def test_raters_of_different_voxels_do_not_reward_diversity():
    """Eq. 8 of distances that are each taken on a pair's own voxels is -0.36 here and -0.49 below."""
    raters = np.zeros((2, 1, 20), np.uint8)
    raters[:, 0, 0], raters[1, 0, 10:20] = 1, 1
    samples = raters[[1, 1]].copy()
    samples[0, 0, 15:], samples[1, 0, 10:15] = 0, 0  # what a rater of a tenth drew in halves
    valid = np.ones((2, 1, 20), bool)
    valid[0, 0, 10:] = False
    assert generalized_energy_distance(samples, raters, (1,), rater_weights=(9, 1), valid=valid) >= 0
    valid = np.zeros((2, 1, 402), bool)
    valid[:, 0, :2], valid[0, 0, 2:202], valid[1, 0, 202:] = True, True, True
    truth = np.ones((2, 1, 402), np.uint8)
    truth[0, 0, 0] = truth[1, 0, 1] = 0  # all that they disagree on
    found = generalized_energy_distance(truth, truth, (1,), valid=valid)
    assert 0 <= found < 0.01
    assert generalized_energy_distance(1 - truth, truth, (1,), valid=valid) > 0.9


@pytest.mark.parametrize("per_rater", [False, True])
def test_raters_of_the_same_voxels_are_compared_on_these(per_rater):
    samples, raters, own = label_maps(4), label_maps(3, seed=1), own_voxels(1)[0]
    cut = [stack[:, own][:, None] for stack in (samples, raters)]
    expected = score_distribution(cut[0][0], *cut, LABELS).average
    valid = np.stack([own] * 3) if per_rater else own
    found = score_distribution(samples[0], samples, raters, LABELS, valid=valid).average
    for each in fields(found):
        np.testing.assert_allclose(getattr(found, each.name), getattr(expected, each.name), err_msg=each.name)


def test_a_rater_who_says_nothing_takes_nothing_from_the_others():
    lesion, wrong = np.zeros((2, 6, 7), np.uint8)
    lesion[1:3, 1:4], wrong[4:, 3:] = 1, 1
    raters = np.stack([lesion, lesion, lesion, np.full_like(lesion, 3)])
    found = score_distribution(wrong, wrong[None], raters, (1,), valid=raters != 3).average
    assert found.generalized_energy_distance == pytest.approx(2)
    assert found.matched_iou == pytest.approx(0)
    assert (found.dice, found.volume_coverage, found.within_raters) == (0, 0, 0)
    expected = score_distribution(wrong, wrong[None], raters[:3], (1,)).average
    for each in fields(found):
        value = getattr(found, each.name)
        if np.ndim(value) and len(value) == 4:
            assert value[3] == 0 if each.name == "rater_weights" else np.isnan(value[3])
            value = value[:3]
        np.testing.assert_allclose(value, getattr(expected, each.name), err_msg=each.name)
    for measure in (generalized_energy_distance, matched_iou):
        assert measure(wrong[None], raters, (1,), valid=raters != 3) == pytest.approx(
            measure(wrong[None], raters[:3], (1,))
        )


@pytest.mark.parametrize("per_rater", [False, True])
def test_without_a_voxel_that_counts_there_is_no_measure(per_rater):
    samples, raters = label_maps(3), label_maps(2, seed=1)
    valid = np.zeros(raters.shape if per_rater else raters.shape[1:], bool)
    case = score_distribution(samples[0], samples, raters, LABELS, valid=valid, first=(2,))
    for scores in (case.average, *case.by_label.values(), case.first[2].average):
        for each in fields(scores):
            if each.name not in ("sample_weights", "rater_weights"):
                assert np.isnan(getattr(scores, each.name)).all(), each.name
        assert np.isnan([scores.fraction_better, scores.within_raters, scores.mean_interrater_dice]).all()
        assert np.isnan([*scores.advantage, scores.sample_dice_quantile(0.5)]).all()
    for measure in (generalized_energy_distance, matched_iou):
        assert np.isnan(measure(samples, raters, LABELS, valid=valid))


def test_nothing_ignored_changes_nothing():
    samples, raters = label_maps(6), label_maps(3, seed=1)
    expected = score_distribution(samples[0], samples, raters, LABELS).average
    found = score_distribution(samples[0], samples, raters, LABELS, valid=np.ones(raters.shape, bool)).average
    for each in fields(found):
        np.testing.assert_array_equal(getattr(found, each.name), getattr(expected, each.name), err_msg=each.name)


@pytest.mark.parametrize("weights", [None, (1, 2, 3, 4, 5)])
@pytest.mark.parametrize("ignoring", [False, True])
def test_the_first_samples_are_scored_as_if_they_were_all(weights, ignoring):
    samples, raters = label_maps(5), label_maps(2, seed=1)
    valid = own_voxels(2) if ignoring else None
    case = score_distribution(samples[4], samples, raters, LABELS, weights, valid=valid, first=(2, 5))
    assert list(case.first) == [2, 5]
    for number, few in case.first.items():
        own = None if weights is None else weights[:number]
        alone = score_distribution(samples[4], samples[:number], raters, LABELS, own, valid=valid)
        for found, expected in ((few.average, alone.average), (few.by_label[1], alone.by_label[1])):
            for each in fields(found):
                np.testing.assert_array_equal(getattr(found, each.name), getattr(expected, each.name), each.name)
    with pytest.raises(ValueError, match="first is 6; there are 5 samples"):
        score_distribution(samples[4], samples, raters, LABELS, first=(6,))
