"""PET in Bq/ml to standardised uptake value by body weight, in g/ml.

    SUVbw = activity (Bq/ml) * weight (g) / dose at the time to which the activity is corrected (Bq)

DecayCorrection says which time that is: ADMIN the injection, START the start of the acquisition. The latter is
SeriesTime on some scanners and the first AcquisitionTime on others, and a series that was made later has another
SeriesTime. DecayFactor, by which the scanner multiplied a slice, decides between the two: a slice that was acquired
from a for T seconds was corrected to the time r with

    DecayFactor = 2^((a - r) / half-life) * x / (1 - e^-x),  x = T ln 2 / half-life

Where it is missing, the two times have to agree. Whatever contradicts or is missing is refused. The dose is taken as it
is in the header; what remained in the syringe is not known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from pydicom import Dataset
from pydicom.valuerep import DA, DT, TM

from nnunet_multimodal.errors import UserError

AGREEMENT = 0.02  # relative, of factors that should be the same
SMALLEST_DOSE_BQ = 1e6  # less is a dose in MBq or kBq, against the standard; people get 1e7 to 1e9
MOST_HALF_LIVES = 10.0


@dataclass(frozen=True)
class Uptake:
    """How a series becomes SUV.

    Attributes:
        factor: SUV in g/ml of 1 unit of the series' values.
        units: of these: BQML or GML.
        weight_kg: of the patient.
        dose_bq: that was injected.
        half_life_s: of the radionuclide.
        injection: when.
        reference: the time to which values are corrected for decay.
        decay_correction: START or ADMIN.
    """

    factor: float
    units: str
    weight_kg: float = math.nan
    dose_bq: float = math.nan
    half_life_s: float = math.nan
    injection: str = ""
    reference: str = ""
    decay_correction: str = ""

    def record(self) -> dict[str, Any]:
        """For a JSON file, without what is not known."""
        return {key: value for key, value in asdict(self).items() if value == value and value != ""}


def uptake(headers: Sequence[Dataset]) -> Uptake:
    """The factor of a PET series.

    Args:
        headers: of all its slices.

    Raises:
        UserError: a field is missing, not of the standard's kind, or contradicts another.
    """
    units = _common(headers, "Units")
    if units == "GML":
        kind = str(headers[0].get("SUVType") or "BW")
        if kind != "BW":
            raise UserError(f"its values are SUV already, by {kind} (SUVType) and not by body weight")
        return Uptake(1.0, units)
    if units != "BQML":
        raise UserError(f"Units is {units}; SUV is computed of BQML alone (Philips' CNTS needs a private factor)")
    corrected = set(_value(headers[0], "CorrectedImage"))
    if not {"ATTN", "DECY"} <= corrected:
        raise UserError(
            f"CorrectedImage is {sorted(corrected)}; SUV needs values corrected for attenuation and decay (ATTN, DECY)"
        )
    isotope = _radiopharmaceutical(headers[0])
    dose, half_life = _positive(isotope, "RadionuclideTotalDose"), _positive(isotope, "RadionuclideHalfLife")
    weight = _positive(headers[0], "PatientWeight")
    if dose < SMALLEST_DOSE_BQ:
        raise UserError(
            f"RadionuclideTotalDose {dose:g} is too little for Bq, which DICOM asks for; correct the header"
        )
    correction = _common(headers, "DecayCorrection")
    injected = _injection(headers[0], isotope)
    reference = _reference(headers, correction, injected, half_life)
    half_lives = (reference - injected).total_seconds() / half_life
    if not 0 <= half_lives <= MOST_HALF_LIVES:
        raise UserError(
            f"injected at {injected}, and the scan is of {reference}, {half_lives:.1f} half-lives later; correct "
            "RadiopharmaceuticalStartDateTime (de-identification may have shifted it otherwise than the other dates)"
        )
    factor = weight * 1000 / (dose * 2**-half_lives)
    times = injected.isoformat(), reference.isoformat()
    return Uptake(factor, units, weight, dose, half_life, *times, correction)


def _reference(headers: Sequence[Dataset], correction: str, injected: datetime, half_life: float) -> datetime:
    """The time to which the values are corrected.

    Raises:
        UserError: times and decay factors contradict each other, or do not tell.
    """
    if correction not in ("START", "ADMIN"):
        raise UserError(f"DecayCorrection is {correction}; SUV is computed of START and ADMIN alone")
    starts = [_acquired(header) for header in headers]
    series = _moment(headers[0], "SeriesDate", "SeriesTime")
    first = min(starts)
    candidates = [injected] if correction == "ADMIN" else [time for time in (series, first) if time <= first]

    def disagreement(reference: datetime) -> float:
        """The largest relative difference of a decay factor from what it would be; NaN if there is none."""
        ratios = [
            float(header.DecayFactor) / _decay_factor(start, _duration(header), reference, half_life)
            for header, start in zip(headers, starts, strict=True)
            if header.get("DecayFactor") and header.get("ActualFrameDuration")
        ]
        return max((abs(ratio - 1) for ratio in ratios), default=math.nan)

    off = {time: disagreement(time) for time in candidates}
    best = min(off, key=lambda time: off[time])
    if off[best] > AGREEMENT:
        raise UserError(
            f"DecayFactor differs by {off[best]:.1%} from a correction to {best} (DecayCorrection {correction}; the "
            f"series is of {series}, its first slice of {first}); the header does not say how its values are corrected"
        )
    if math.isnan(off[best]) and 2 ** ((max(candidates) - min(candidates)).total_seconds() / half_life) > 1 + AGREEMENT:
        raise UserError(
            f"the series starts at {series} and its first slice at {first}, and there is no DecayFactor that tells to "
            "which of them its values are corrected"
        )
    return best


def _decay_factor(start: datetime, duration_s: float, reference: datetime, half_life: float) -> float:
    x = duration_s * math.log(2) / half_life
    return 2 ** ((start - reference).total_seconds() / half_life) * (x / -math.expm1(-x) if x else 1.0)


def _duration(header: Dataset) -> float:
    return float(header.ActualFrameDuration) / 1000  # DICOM has milliseconds


def _radiopharmaceutical(header: Dataset) -> Dataset:
    items = _value(header, "RadiopharmaceuticalInformationSequence")
    if len(items) != 1:
        raise UserError(f"RadiopharmaceuticalInformationSequence has {len(items)} items, and must have one")
    return items[0]


def _injection(header: Dataset, isotope: Dataset) -> datetime:
    """When the radiopharmaceutical was given: its date and time, else its time on the day of the series."""
    written = str(isotope.get("RadiopharmaceuticalStartDateTime") or "")
    if not written:
        time = _time(str(_value(isotope, "RadiopharmaceuticalStartTime")), "RadiopharmaceuticalStartTime")
        return datetime.combine(_date(header, "SeriesDate"), time)
    try:
        moment = DT(written)
    except ValueError as error:
        raise UserError(f"RadiopharmaceuticalStartDateTime is {written!r}, which is no time") from error
    if moment is None or len(written.split("+")[0].split("-")[0]) < 12:  # DICOM lets the end be left out
        raise UserError(f"RadiopharmaceuticalStartDateTime is {written!r}, which has no time of day")
    if moment.tzinfo is None:
        return datetime.combine(moment.date(), moment.time())
    offset = str(header.get("TimezoneOffsetFromUTC") or "")
    if not offset:
        raise UserError(
            f"RadiopharmaceuticalStartDateTime {written} has a time zone, and the scan's times have none "
            "(TimezoneOffsetFromUTC)"
        )
    local = moment.astimezone(datetime.strptime(offset, "%z").tzinfo)
    return datetime.combine(local.date(), local.time())


def _acquired(header: Dataset) -> datetime:
    """When a slice's acquisition started."""
    return _moment(header, "AcquisitionDate", "AcquisitionTime")


def _moment(header: Dataset, date: str, time: str) -> datetime:
    return datetime.combine(_date(header, date), _time(str(_value(header, time)), time))


def _date(header: Dataset, keyword: str) -> Any:
    written = str(_value(header, keyword))
    try:
        return DA(written)
    except ValueError as error:
        raise UserError(f"{keyword} is {written!r}, which is no date") from error


def _time(written: str, keyword: str) -> Any:
    try:
        return TM(written)
    except ValueError as error:
        raise UserError(f"{keyword} is {written!r}, which is no time") from error


def _positive(header: Dataset, keyword: str) -> float:
    written = _value(header, keyword)
    try:
        number = float(written)
    except (TypeError, ValueError) as error:
        raise UserError(f"{keyword} is {written!r}, which is no number") from error
    if not 0 < number < math.inf:
        raise UserError(f"{keyword} is {number:g}; SUV needs its real value")
    return number


def _common(headers: Sequence[Dataset], keyword: str) -> str:
    values = sorted({str(_value(header, keyword)) for header in headers})
    if len(values) > 1:
        raise UserError(f"its slices have different {keyword}: {', '.join(values)}")
    return values[0]


def _value(header: Dataset | Mapping[str, Any], keyword: str) -> Any:
    value = header.get(keyword)
    if value is None or value == "" or value == []:
        raise UserError(f"{keyword} is missing, which SUV needs; leave --suv out, or complete the header")
    return value
