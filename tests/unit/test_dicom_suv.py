from datetime import datetime, timedelta
from math import log

import numpy as np
import pytest

from tests.dicom import CT, FDG, PET, import_series, refused, set_attributes, values, volume, write_series

pytest.importorskip("pydicom", reason="the extra 'dicom' is not installed")
pytest.importorskip("highdicom", reason="the extra 'dicom' is not installed")

ONE_HOUR = {**FDG, "RadionuclideHalfLife": 3600}  # injected an hour before the scan: half of the dose is left


def suv_of(root, concentration=10000, **attributes):
    """SUV of a PET whose voxels all have this activity concentration, in Bq/ml."""
    stored = np.full((3, 2, 2), concentration, np.uint16)
    write_series(root / "src", stored, "PT", **attributes)
    import_series(root, "--channels", PET, "--suv")
    found = values(root)
    assert found.min() == found.max()
    return found[0, 0, 0]


@pytest.mark.parametrize(
    ("changes", "by_hand"),
    [
        ({}, 4.0),  # 10 000 Bq/ml * 70 000 g / 175 MBq
        ({"DecayCorrection": "ADMIN"}, 2.0),  # ... / 350 MBq
        ({"PatientWeight": 35}, 2.0),
        ({"RadiopharmaceuticalStartDateTime": "20200102090000"}, 8.0),  # two hours; goes before the time of day
        ({"RadiopharmaceuticalStartDateTime": "20200102090000.00+0000", "TimezoneOffsetFromUTC": "+0100"}, 4.0),
        (
            {"RadiopharmaceuticalStartDateTime": "20200101230000", "SeriesTime": "010000", "AcquisitionTime": "010000"},
            8.0,
        ),
        ({"Units": "GML"}, 10000.0),
    ],
)
def test_suv_is_what_it_is_by_hand(tmp_path, changes, by_hand):
    assert suv_of(tmp_path, **{**ONE_HOUR, **changes}) == pytest.approx(by_hand, rel=1e-6)


def test_suv_of_fdg_after_an_hour(tmp_path):
    """18F, 109.77 minutes: 10 000 * 70 000 / (350e6 * e^(-ln 2 * 60 / 109.77)) = 2.9212."""
    assert suv_of(tmp_path, **FDG) == pytest.approx(2.9212, abs=2e-4)


def decay_factors(reference, half_life, starts, duration_s):
    """What a scanner multiplies a slice with: one over the mean of the activity over the frame, in small steps."""
    factors = []
    for start in starts:
        seconds = (start - reference).total_seconds() + (np.arange(100000) + 0.5) * duration_s / 100000
        factors.append(float(1 / np.mean(np.exp(-log(2) * seconds / half_life))))
    return factors


@pytest.mark.parametrize("duration_s", [180, 1200])
@pytest.mark.parametrize(("reference", "by_hand"), [("series", 4.0), ("first slice", 4.0 * 2 ** (1 / 3))])
def test_the_decay_factor_tells_what_values_are_corrected_to(tmp_path, reference, by_hand, duration_s):
    """The series' time is 20 minutes before the first slice's: a protocol that was opened early, or late frames."""
    series = datetime(2020, 1, 2, 11)
    starts = [series + timedelta(minutes=20 + 3 * (index // 2)) for index in range(6)]  # three bed positions
    factors = decay_factors(series if reference == "series" else starts[0], 3600, starts, duration_s)

    def beds(index, dataset):
        dataset.AcquisitionTime = starts[index].strftime("%H%M%S")
        dataset.DecayFactor, dataset.ActualFrameDuration = f"{factors[index]:.5f}", duration_s * 1000

    write_series(tmp_path / "src", np.full((6, 2, 2), 10000, np.uint16), "PT", change=beds, **ONE_HOUR)
    import_series(tmp_path, "--channels", PET, "--suv")
    np.testing.assert_allclose(values(tmp_path), by_hand, rtol=1e-5)


@pytest.mark.parametrize("field", FDG)
def test_suv_refuses_without_a_field(tmp_path, field):
    write_series(tmp_path / "src", volume(), "PT", **{key: value for key, value in FDG.items() if key != field})
    assert f"{field} is missing" in refused(tmp_path, "--channels", PET, "--suv")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"Units": "CNTS"}, "Units is CNTS"),
        ({"Units": "GML", "SUVType": "LBM"}, "LBM"),
        ({"DecayCorrection": "NONE"}, "DecayCorrection is NONE"),
        ({"CorrectedImage": ["NORM", "DECY"]}, "corrected for attenuation"),
        ({"PatientWeight": 0}, "PatientWeight is 0"),
        ({"RadionuclideTotalDose": 350}, "too little for Bq"),
        ({"RadiopharmaceuticalStartTime": "120000"}, "half-lives later"),
        ({"RadiopharmaceuticalStartDateTime": "20100102100000"}, "half-lives later"),
        ({"RadiopharmaceuticalStartDateTime": "20200102"}, "no time of day"),
        ({"RadiopharmaceuticalStartDateTime": "20200102100000+0100"}, "TimezoneOffsetFromUTC"),
        ({"SeriesTime": "104000"}, "no DecayFactor"),
        ({"DecayFactor": 1.5, "ActualFrameDuration": 180000}, "DecayFactor differs by"),
        ({"DecayCorrection": "ADMIN", "DecayFactor": 1.01, "ActualFrameDuration": 180000}, "DecayFactor differs by"),
    ],
)
def test_suv_refuses_what_contradicts_itself(tmp_path, changes, said):
    write_series(tmp_path / "src", volume(), "PT", **{**FDG, **changes})
    assert said in refused(tmp_path, "--channels", PET, "--suv")


def test_suv_of_slices_in_different_units_is_refused(tmp_path):
    def change(index, dataset):
        set_attributes(dataset, {"Units": "CNTS" if index == 2 else "BQML"})

    write_series(tmp_path / "src", volume(), "PT", change=change, **FDG)
    assert "different Units" in refused(tmp_path, "--channels", PET, "--suv")


def test_suv_leaves_other_modalities_alone(tmp_path):
    write_series(tmp_path / "src" / "ct", volume(seed=1), "CT")
    assert "no chosen series is PET" in refused(tmp_path, "--channels", CT, "--suv")
    write_series(tmp_path / "src" / "pt", volume(seed=2), "PT", number=2, **FDG)
    import_series(tmp_path, "--channels", CT, PET, "--suv")
    np.testing.assert_array_equal(values(tmp_path, 0), volume(seed=1))
