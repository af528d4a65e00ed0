import itertools
from pathlib import Path

import numpy as np
import pytest

from nnunet_multimodal.metrics import overlaps
from nnunet_multimodal.metrics.distribution import (
    first_weights,
    generalized_energy_distance,
    sample_diversity,
    score_distribution,
    valid_voxels,
    weighted_quantile,
)
from nnunet_multimodal.metrics.overlaps import count_overlaps, pairwise_iou_distance

REFERENCE_VALUES = Path(__file__).resolve().parents[3] / "shared" / "reference_values"
LABELS = (1, (2, 3), (1, 2, 3))


def reference_values(name):
    file = REFERENCE_VALUES / name
    if not file.is_file():
        pytest.skip(f"reference values not found at {file}")
    return np.load(file)


def label_maps(count, shape=(5, 6, 7), labels=4, seed=0):
    return np.random.default_rng(seed).integers(0, labels, (count, *shape), dtype=np.uint8)


def voxels_of(label_map, label, valid=None):
    """Slow and obvious: the set of voxels that have a label."""
    values = label if isinstance(label, tuple) else (label,)
    return {i for i in np.ndindex(label_map.shape) if label_map[i] in values and (valid is None or valid[i])}


def distance_of(a, b, label, valid=None):
    a, b = voxels_of(a, label, valid), voxels_of(b, label, valid)
    return 1 - len(a & b) / len(a | b) if a | b else 0.0


def dice_of(a, b, label):
    a, b = voxels_of(a, label), voxels_of(b, label)
    return 2 * len(a & b) / (len(a) + len(b)) if a or b else 1.0


def mean_distance(a, b, labels=LABELS, valid=None):
    return np.mean([distance_of(a, b, label, valid) for label in labels])


def expectation(a, b, w, v):
    pairs = itertools.product(zip(a, w, strict=True), zip(b, v, strict=True))
    return sum(x * y * mean_distance(one, other) for (one, x), (other, y) in pairs)


def test_agrees_with_the_reference_code():
    reference = reference_values("ssn_ged_ref.npz")
    energy_distance, _, diversity = reference["ged"]
    samples, seg = reference["samples"], reference["seg"]
    assert generalized_energy_distance(samples, seg, (1, 2, 3)) == pytest.approx(energy_distance, abs=1e-6)
    assert sample_diversity(samples, (1, 2, 3)) == pytest.approx(diversity, abs=1e-6)
    average = score_distribution(seg[0], samples, seg, (1, 2, 3)).average
    assert average.generalized_energy_distance == pytest.approx(energy_distance, abs=1e-6)
    assert average.sample_diversity == pytest.approx(diversity, abs=1e-6)
    assert average.rater_diversity == 0.0


def test_agrees_with_the_reference_code_of_weighted_samples():
    reference = reference_values("mose_ot_ref.npz")
    samples = reference["logits"].argmax(2)
    found = [
        generalized_energy_distance(*maps, labels=(1,), sample_weights=w, rater_weights=v)
        for *maps, w, v in zip(samples, reference["y"], reference["w"], reference["pg"], strict=True)
    ]
    assert np.mean(found) == pytest.approx(reference["ged_miou"][0], abs=1e-6)


def test_distance_of_hand_counted_maps():
    a, b = np.array([[[1, 1, 0, 2]], [[0, 0, 0, 0]]]), np.array([[[0, 1, 1, 2]]])
    np.testing.assert_allclose(pairwise_iou_distance(a, b, (1,)), [[2 / 3], [1]])
    np.testing.assert_allclose(pairwise_iou_distance(a, b, (1, 2)), [[1 / 3], [1]])
    np.testing.assert_allclose(pairwise_iou_distance(a, b, ((1, 2),)), [[1 / 2], [1]])
    assert pairwise_iou_distance(a, b, (3,)).tolist() == [[0.0], [0.0]]  # both empty


@pytest.mark.parametrize("shape", [(9, 8), (5, 6, 7)])
def test_distances_agree_with_sets_of_voxels(shape):
    a, b = label_maps(3, shape), label_maps(2, shape, seed=1)
    expected = [[mean_distance(x, y) for y in b] for x in a]
    np.testing.assert_allclose(pairwise_iou_distance(a, b, LABELS), expected, atol=1e-12)
    expected = [[mean_distance(x, y) for y in a] for x in a]
    np.testing.assert_allclose(pairwise_iou_distance(a, a, LABELS), expected, atol=1e-12)


@pytest.mark.parametrize("chunk", [64, 128, 2**16])
def test_pieces_of_the_image_add_up(chunk, monkeypatch):
    a, b = label_maps(4, (7, 59)), label_maps(3, (7, 59), seed=1)
    a[:, :3] = 0  # a piece without any label
    expected = [[[np.sum((x == label) & (y == label)) for y in b] for x in a] for label in (1, 3)]
    monkeypatch.setattr(overlaps, "CHUNK", chunk)
    found = count_overlaps(a, b, (1, 3))
    np.testing.assert_array_equal(found.intersections, expected)
    np.testing.assert_array_equal(found.sizes_a, [[np.sum(x == label) for x in a] for label in (1, 3)])
    np.testing.assert_array_equal(found.sizes_b, [[np.sum(x == label) for x in b] for label in (1, 3)])


def test_bits_are_counted_alike_without_numpy_2(monkeypatch):
    a = label_maps(4, (40, 50))
    expected = count_overlaps(a, a, LABELS).intersections
    monkeypatch.setattr(overlaps, "_bit_count", overlaps._bit_count_by_table)
    np.testing.assert_array_equal(count_overlaps(a, a, LABELS).intersections, expected)


@pytest.mark.parametrize("type_", [bool, np.int8, np.uint16, np.int64])
def test_any_integer_type_will_do(type_):
    a = label_maps(3, labels=2)
    expected = pairwise_iou_distance(a, a, (1,))
    np.testing.assert_array_equal(pairwise_iou_distance(a.astype(type_), a, (1,)), expected)


def test_energy_distance_is_the_sum_of_its_three_expectations():
    samples, raters = label_maps(4), label_maps(3, seed=1)
    w, v = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.5, 0.25, 0.25])
    diversity, rater_diversity = expectation(samples, samples, w, w), expectation(raters, raters, v, v)
    expected = 2 * expectation(samples, raters, w, v) - diversity - rater_diversity
    assert generalized_energy_distance(samples, raters, LABELS, w, v) == pytest.approx(expected)
    assert sample_diversity(samples, LABELS, w) == pytest.approx(diversity)
    average = score_distribution(samples[0], samples, raters, LABELS, w, v).average
    assert average.generalized_energy_distance == pytest.approx(expected)
    assert average.sample_diversity == pytest.approx(diversity)
    assert average.rater_diversity == pytest.approx(rater_diversity)


def test_a_weight_of_two_is_a_map_given_twice():
    samples, raters = label_maps(3), label_maps(2, seed=1)
    weighted = score_distribution(samples[0], samples, raters, LABELS, (1, 2, 1), (3, 1)).average
    repeated = score_distribution(samples[0], samples[[0, 1, 1, 2]], raters[[0, 0, 0, 1]], LABELS).average
    for name in ("generalized_energy_distance", "sample_diversity", "rater_diversity", "dice", "dice_nod"):
        assert getattr(weighted, name) == pytest.approx(getattr(repeated, name)), name
    assert weighted.fraction_better == pytest.approx(repeated.fraction_better)
    assert weighted.sample_dice_quantile(0.6) == pytest.approx(repeated.sample_dice_quantile(0.6))


def test_the_raters_themselves_are_at_no_distance():
    raters = label_maps(3)
    assert generalized_energy_distance(raters, raters, LABELS) == pytest.approx(0, abs=1e-12)
    assert generalized_energy_distance(raters[[2, 0, 1, 2, 0, 1]], raters, LABELS) == pytest.approx(0, abs=1e-12)


def test_single_maps_are_at_twice_their_distance():
    a, b = label_maps(1), label_maps(1, seed=1)
    assert generalized_energy_distance(a, b, LABELS) == pytest.approx(2 * mean_distance(a[0], b[0]))


def test_scores_of_a_label_are_those_of_that_label_alone():
    samples, raters, weights = label_maps(5), label_maps(2, seed=1), (1, 2, 3, 4, 5)
    together = score_distribution(samples[1], samples, raters, LABELS, weights)
    for label in LABELS:
        alone = score_distribution(samples[1], samples, raters, (label,), weights).average
        assert together.by_label[label].dice == alone.dice
        assert together.by_label[label].generalized_energy_distance == alone.generalized_energy_distance
        np.testing.assert_array_equal(together.by_label[label].sample_dice, alone.sample_dice)
    energy_distances = [scores.generalized_energy_distance for scores in together.by_label.values()]
    assert together.average.generalized_energy_distance == pytest.approx(np.mean(energy_distances))


def test_dice_of_the_mean_and_of_the_samples():
    samples, raters, prediction = label_maps(6), label_maps(2, seed=1), label_maps(1, seed=2)[0]
    v = np.array([0.25, 0.75])

    def dice(label_map):
        return sum(w * np.mean([dice_of(label_map, r, x) for x in LABELS]) for r, w in zip(raters, v, strict=True))

    found = score_distribution(prediction, samples, raters, LABELS, rater_weights=v).average
    expected = [dice(sample) for sample in samples]
    assert found.dice == pytest.approx(dice(prediction))
    assert found.dice_nod == pytest.approx(found.dice)  # every rater drew something
    np.testing.assert_allclose(found.sample_dice, expected)
    assert found.fraction_better == pytest.approx(np.mean(np.array(expected) > dice(prediction)))
    assert 0 < found.fraction_better < 1
    assert found.sample_dice_quantile(0.5) == pytest.approx(sorted(expected)[2])


def test_samples_like_the_mean_are_not_better():
    samples = label_maps(7, (30, 31))[[0] * 7]
    assert score_distribution(samples[0], samples, label_maps(4, (30, 31), seed=1), LABELS).average.fraction_better == 0


def test_nod_counts_raters_that_drew_something():
    prediction, empty = np.array([[1, 1, 0, 0]]), np.zeros((1, 4), dtype=int)
    raters = np.array([[[1, 0, 0, 0]], empty, [[1, 1, 1, 1]]])
    found = score_distribution(prediction, prediction[None], raters, (1,), rater_weights=(1, 2, 3)).average
    assert found.dice == pytest.approx((1 * 2 / 3 + 2 * 0 + 3 * 2 / 3) / 6)
    assert found.dice_nod == pytest.approx((1 * 2 / 3 + 3 * 2 / 3) / 4)
    found = score_distribution(empty, empty[None], empty[None], (1,)).average
    assert found.dice == 1.0
    assert np.isnan(found.dice_nod)
    two = score_distribution(prediction, prediction[None], raters[:1], (1, 2))
    assert two.average.dice_nod == two.by_label[1].dice_nod  # label 2 has none to average


def test_ignored_voxels_do_not_count():
    samples, raters = label_maps(3), label_maps(2, seed=1)
    raters[0, :2], raters[1, :, 3] = 4, 4
    valid = valid_voxels(raters, 4)
    np.testing.assert_array_equal(valid, (raters != 4).all(0))
    expected = np.mean([[mean_distance(s, r, valid=valid) for r in raters] for s in samples])
    assert pairwise_iou_distance(samples, raters, LABELS, valid).mean() == pytest.approx(expected)
    cut = samples[:, valid][:, None], raters[:, valid][:, None]
    assert generalized_energy_distance(samples, raters, LABELS, valid=valid) == pytest.approx(
        generalized_energy_distance(*cut, LABELS)
    )
    assert valid_voxels(raters, None) is None


def test_quantile_is_the_first_value_that_reaches_the_weight():
    values, weights = np.array([0.4, 0.1, 0.3, 0.2]), np.array([0.1, 0.4, 0.0, 0.5])
    found = [weighted_quantile(values, weights, q) for q in (0, 0.4, 0.41, 0.9, 0.95, 1)]
    assert found == [0.1, 0.1, 0.2, 0.2, 0.4, 0.4]
    values = np.random.default_rng(0).random(20)
    for quantile in (0.0, 0.05, 0.5, 0.94, 0.95, 1.0):
        expected = np.quantile(values, quantile, method="inverted_cdf")
        assert weighted_quantile(values, np.full(20, 1 / 20), quantile) == expected


def test_errors_name_the_value():
    a = label_maps(2)
    with pytest.raises(ValueError, match="type float32"):
        pairwise_iou_distance(a.astype(np.float32), a, (1,))
    with pytest.raises(ValueError, match=r"\(2, 5, 6, 7\), \(2, 5, 6, 6\)"):
        pairwise_iou_distance(a, a[..., 1:], (1,))
    with pytest.raises(ValueError, match=r"\(0, 5, 6, 7\)"):
        pairwise_iou_distance(a[:0], a, (1,))
    with pytest.raises(ValueError, match=r"labels is \(\)"):
        pairwise_iou_distance(a, a, ())
    with pytest.raises(ValueError, match=r"valid is uint8 \(2, 5, 6, 7\)"):
        pairwise_iou_distance(a, a, (1,), a)
    for weights in ((1,), (-1, 2), (0, 0), (np.nan, 1)):
        with pytest.raises(ValueError, match=r"sample_weights is .* 2 numbers"):
            sample_diversity(a, (1,), weights)
    with pytest.raises(ValueError, match="rater_weights is"):
        generalized_energy_distance(a, a, (1,), rater_weights=(1, 2, 3))
    for valid in (np.ones((5, 6), bool), np.ones((3, 5, 6, 7), bool), np.ones((2, 5, 6, 7), int)):
        with pytest.raises(ValueError, match=r"valid is .* give bool \(5, 6, 7\) or \(2, 5, 6, 7\)"):
            generalized_energy_distance(a, a, (1,), valid=valid)
    with pytest.raises(ValueError, match="quantile is 95"):
        weighted_quantile(np.ones(2), np.ones(2), 95)


def test_the_first_samples_of_an_expert_share_its_weight_again():
    answers = [np.full((4, 4), k) for k in range(3)]
    raters = np.stack(answers)
    cycle, weights = [0, 1, 2], np.array([0.5, 0.25, 0.25])
    groups = cycle * 3
    samples = np.stack([answers[g] for g in groups])
    each = weights[groups] / 3
    scores = score_distribution(
        samples[0], samples, raters, [1, 2], each, weights, first=(3, 4, 5), sample_groups=groups
    )
    for number in (3, 4, 5):
        assert scores.first[number].average.generalized_energy_distance == pytest.approx(0, abs=1e-12)
    alone = score_distribution(samples[0], samples, raters, [1, 2], each, weights, first=(4,))
    assert alone.first[4].average.generalized_energy_distance > 0.01
    np.testing.assert_allclose(first_weights(each, groups, 4), [0.25, 0.25, 0.25, 0.25])
    np.testing.assert_allclose(first_weights(each, None, 4), np.array([2, 1, 1, 2]) / 6)
