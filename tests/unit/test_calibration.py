from pathlib import Path

import numpy as np
import pytest

from nnunet_multimodal.metrics.calibration import expected_calibration_error, reliability_curve

REFERENCE_VALUES = Path(__file__).resolve().parents[3] / "shared" / "reference_values" / "mose_ot_ref.npz"


def oracle(probability, reference, bins):
    """Slow and obvious: one bin after the other."""
    error = 0.0
    for i in range(bins):
        inside = [
            (p, r)
            for p, r in zip(probability.ravel(), reference.ravel(), strict=True)
            if i / bins <= p < (i + 1) / bins or (p == 1 and i == bins - 1)
        ]
        if inside:
            confidence, frequency = np.mean(inside, axis=0)
            error += len(inside) / probability.size * abs(confidence - frequency)
    return error


def test_agrees_with_the_reference_code():
    if not REFERENCE_VALUES.is_file():
        pytest.skip(f"reference values not found at {REFERENCE_VALUES}")
    reference = np.load(REFERENCE_VALUES)
    odds = np.exp(reference["logits"])
    foreground = odds[:, :, 1] / odds.sum(2)  # (B, S, *D)
    mean = np.einsum("bs...,bs->b...", foreground, reference["w"])
    raters = np.einsum("br...,br->b...", reference["y"], reference["pg"])
    assert expected_calibration_error(mean, raters) == pytest.approx(float(reference["ece_fg"]), abs=1e-6)


@pytest.mark.parametrize("bins", [1, 4, 10])
@pytest.mark.parametrize("shape", [(500,), (10, 9), (4, 5, 6)])
def test_error_agrees_with_counting(bins, shape):
    rng = np.random.default_rng(0)
    probability, soft = rng.random(shape), rng.integers(0, 5, shape) / 4
    for reference in (soft, rng.random(shape) < 0.3):
        found = expected_calibration_error(probability, reference, bins)
        assert found == pytest.approx(oracle(probability, reference, bins))


def test_curve_of_hand_counted_voxels():
    curve = reliability_curve(np.array([0.0, 0.1, 0.6, 1.0]), np.array([0.0, 1.0, 0.5, 1.0]), bins=4)
    assert curve.edges.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert curve.count.tolist() == [2, 0, 1, 1]
    np.testing.assert_allclose(curve.confidence, [0.05, np.nan, 0.6, 1])
    np.testing.assert_allclose(curve.frequency, [0.5, np.nan, 0.5, 1])
    assert curve.expected_calibration_error == pytest.approx((2 * 0.45 + 0.1 + 0) / 4)


def test_calibrated_probabilities_have_no_error():
    probability = np.repeat(np.arange(11) / 10, 1000)
    drawn = np.concatenate([np.arange(1000) < 100 * i for i in range(11)])
    assert expected_calibration_error(probability, drawn, bins=11) == pytest.approx(0, abs=1e-12)
    assert expected_calibration_error(probability, ~drawn, bins=11) > 0.5


def test_curves_of_two_images_add_up_to_that_of_both():
    rng = np.random.default_rng(0)
    probability, reference = rng.random((2, 50)), rng.random((2, 50)) < 0.5
    both = reliability_curve(probability, reference)
    added = reliability_curve(probability[0], reference[0]) + reliability_curve(probability[1], reference[1])
    np.testing.assert_array_equal(added.count, both.count)
    assert added.expected_calibration_error == pytest.approx(both.expected_calibration_error)
    with pytest.raises(ValueError, match="10 and 5 bins"):
        both + reliability_curve(probability, reference, bins=5)


def test_voxels_that_do_not_count():
    probability, reference = np.array([0.2, 0.7, 0.9]), np.array([0, 1, 0])
    valid = np.array([True, True, False])
    expected = expected_calibration_error(probability[:2], reference[:2])
    assert expected_calibration_error(probability, reference, valid=valid) == expected
    assert np.isnan(expected_calibration_error(probability, reference, valid=np.zeros(3, dtype=bool)))


def test_errors_name_the_value():
    p = np.array([0.5, 0.5])
    with pytest.raises(ValueError, match="bins is 0"):
        reliability_curve(p, p, bins=0)
    with pytest.raises(ValueError, match=r"probability has shape \(2,\) and reference \(1,\)"):
        reliability_curve(p, p[:1])
    with pytest.raises(ValueError, match=r"probability has shape \(2,\) and valid \(1,\)"):
        reliability_curve(p, p, valid=np.array([True]))
    for bad in (-0.5, 1.5, np.nan):
        with pytest.raises(ValueError, match=r"probability spans .*between 0 and 1"):
            reliability_curve(np.array([bad, 0.5]), p)
    with pytest.raises(ValueError, match=r"reference spans 0.5 to 2.0"):
        reliability_curve(p, np.array([0.5, 2.0]))
    assert reliability_curve(np.array([1 + 1e-6]), np.array([1])).count.tolist() == [0] * 9 + [1]  # rounding of float32
