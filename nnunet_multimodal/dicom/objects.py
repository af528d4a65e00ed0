"""Label maps as DICOM-SEG and uncertainty maps as parametric maps, by highdicom. Research only.

A segment is a label or region of dataset.json. Regions overlap, so segments are binary (SegmentationType BINARY, which
viewers know best), one frame for every slice in which a segment is.

Uncertainty maps are 32-bit floats. Their unit, nat, has no code of its own in UCUM. It is written {nat}, UCUM's way to
annotate the number 1: software which knows UCUM reads a number without dimension, and people read what it is. Entropy
of a prediction has no code in DICOM either: the quantity is one of our private coding scheme, 99NNUNETMM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
from pydicom import Dataset
from pydicom.sr.coding import Code

from nnunet_multimodal import __version__
from nnunet_multimodal.errors import UserError
from nnunet_multimodal.images import read_json

TISSUE = Code("85756007", "SCT", "Tissue")  # category and type of what is not told, as in 3D Slicer
AI = Code("123110", "DCM", "Artificial Intelligence")
NAT = Code("{nat}", "UCUM", "nat")
SCHEME = "99NNUNETMM"
QUANTITIES = {
    "entropy": Code("entropy", SCHEME, "Entropy of the predicted label"),
    "expected_entropy": Code("expected_entropy", SCHEME, "Expected entropy of the predicted label"),
    "mutual_information": Code("mutual_information", SCHEME, "Mutual information of label and sample"),
}
# may be empty in DICOM, and highdicom wants them; de-identified series often lack them
MAY_BE_EMPTY = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime",
    "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
NOTICE = "Research only, not for diagnosis"
SERIES_NUMBERS = {"seg": 9001, "entropy": 9002, "expected_entropy": 9003, "mutual_information": 9004}
CODE_KEYS = ("category", "type", "anatomic_region")


@dataclass(frozen=True)
class Segment:
    """What is written of a label.

    Attributes:
        name: of the label or region.
        values: of the label map that it consists of.
        category: coded, as "Morphologically Abnormal Structure".
        kind: coded, as "Neoplasm".
        region: coded, as "Brain"; None if not told.
        is_generic: category and kind are not told.
    """

    name: str
    values: tuple[int, ...]
    category: Code = TISSUE
    kind: Code = TISSUE
    region: Code | None = None
    is_generic: bool = True


@dataclass(frozen=True)
class Algorithm:
    """What predicted.

    Attributes:
        trainer: its name.
        parameters: data set, plans, configuration and the like.
    """

    trainer: str
    parameters: Mapping[str, str] = field(default_factory=dict)

    def identification(self) -> highdicom.AlgorithmIdentificationSequence:
        """For a segment."""
        return highdicom.AlgorithmIdentificationSequence(
            name=f"nnunet-multimodal {self.trainer}"[:64],
            family=AI,
            version=__version__,
            source="nnunet-multimodal, a plugin for nnU-Net",
            parameters={"trainer": self.trainer, **self.parameters},
        )


def read_segments(dataset: Mapping[str, Any], codes: Path | None) -> tuple[Segment, ...]:
    """A segment for each label and region of dataset.json but background and ignore.

    Args:
        dataset: content of dataset.json.
        codes: JSON: label -> category and type, and optionally anatomic_region, each [value, scheme, meaning].

    Raises:
        UserError: the codes cannot be read, are of labels that there are not, or are not of this form.
    """
    names = [name for name in dataset["labels"] if name not in ("background", "ignore")]
    given = {} if codes is None else read_json(codes)
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise UserError(f"{codes}: dataset.json has no label {', '.join(unknown)}; it has {', '.join(names)}")
    segments = []
    for name in names:
        value = dataset["labels"][name]
        values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        coded = {key: _code(code, f"{codes}: {name}: {key}") for key, code in given.get(name, {}).items()}
        if name in given and (not {"category", "type"} <= set(coded) or not set(coded) <= set(CODE_KEYS)):
            raise UserError(f"{codes}: {name} has {', '.join(coded) or 'nothing'}; give category and type, and no more "
                            "than anatomic_region with them")  # fmt: skip
        if coded:
            kinds = coded["category"], coded["type"], coded.get("anatomic_region")
            segments.append(Segment(name, values, *kinds, is_generic=False))
        else:
            segments.append(Segment(name, values))
    return tuple(segments)


def _code(written: Any, where: str) -> Code:
    if not (isinstance(written, list) and len(written) == 3 and all(isinstance(t, str) and t for t in written)):
        raise UserError(f'{where} is {written!r}; give ["108369006", "SCT", "Neoplasm"]')
    if len(written[0]) > 16 or len(written[2]) > 64:
        raise UserError(f"{where}: a code has up to 16 characters, its meaning up to 64")
    return Code(*written)


def complete_headers(source: Sequence[Dataset], spacing_mm: float) -> None:
    """Give headers what highdicom copies from them and they lack: empty text, and the slices' distance as thickness."""
    for header in source:
        for keyword in MAY_BE_EMPTY:
            if keyword not in header:
                setattr(header, keyword, "")
        if not header.get("SliceThickness"):
            header.SliceThickness = spacing_mm


def segmentation(
    source: Sequence[Dataset], labels: np.ndarray, segments: Sequence[Segment], algorithm: Algorithm
) -> highdicom.seg.Segmentation:
    """A DICOM-SEG of a label map.

    Args:
        source: headers of the slices, in the order of the label map's first axis.
        labels: (slices, rows, columns), whole numbers.
        segments: what is written of it.
        algorithm: what predicted it.
    """
    descriptions = []
    for number, segment in enumerate(segments, start=1):
        description = highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=segment.name[:64],
            segmented_property_category=segment.category,
            segmented_property_type=segment.kind,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm.identification(),
            anatomic_regions=None if segment.region is None else [segment.region],
        )
        generic = "; its codes are generic, no others were given" if segment.is_generic else ""
        description.SegmentDescription = f"{segment.name}{generic}"
        descriptions.append(description)
    masks = np.stack([np.isin(labels, segment.values) for segment in segments], axis=-1)
    return highdicom.seg.Segmentation(
        source_images=source,
        pixel_array=masks.astype(np.uint8),
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=descriptions,
        content_label="PREDICTION",
        content_description=NOTICE,
        **_common("seg", f"Segmentation by {algorithm.trainer}"),
    )


def parametric_map(
    source: Sequence[Dataset], values: np.ndarray, name: str, algorithm: Algorithm
) -> highdicom.pm.ParametricMap:
    """A parametric map of an uncertainty map.

    Args:
        source: headers of the slices, in the order of the map's first axis.
        values: (slices, rows, columns), in nats.
        name: which map, of ``QUANTITIES``.
        algorithm: what predicted it.
    """
    values = values.astype(np.float32)
    low, high = float(values.min()), float(values.max())
    mapping = highdicom.pm.RealWorldValueMapping(
        lut_label=name[:16],
        lut_explanation=f"{QUANTITIES[name].meaning}, in nats",
        unit=NAT,
        value_range=(low, high),
        slope=1,
        intercept=0,
        quantity_definition=QUANTITIES[name],
    )
    width = max(high - low, 1e-3)
    window = highdicom.VOILUTTransformation(
        window_center=low + width / 2,
        window_width=width,
        voi_lut_function=highdicom.VOILUTFunctionValues.LINEAR_EXACT,  # LINEAR has no widths below 1
    )
    return highdicom.pm.ParametricMap(
        source_images=source,
        pixel_array=values,
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[mapping],
        voi_lut_transformations=[window],
        content_label=name.upper()[:16],
        content_description=NOTICE,
        content_qualification=highdicom.ContentQualificationValues.RESEARCH,
        **_common(name, f"{QUANTITIES[name].meaning}, {algorithm.trainer}"),
    )


def _common(name: str, description: str) -> dict[str, Any]:
    """What both kinds of objects say of themselves."""
    return {
        "series_instance_uid": highdicom.UID(),
        "series_number": SERIES_NUMBERS[name],
        "sop_instance_uid": highdicom.UID(),
        "instance_number": 1,
        "manufacturer": "nnunet-multimodal",
        "manufacturer_model_name": "nnunet-multimodal",
        "software_versions": __version__,
        "device_serial_number": "none",
        "series_description": f"{description} (research only)"[:64],
    }
