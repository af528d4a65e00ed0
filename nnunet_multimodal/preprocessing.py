"""Absent modalities through nnU-Net's fingerprint and preprocessing.

In files an absent modality is a placeholder: an image of nothing but ``PLACEHOLDER``, with the geometry of the others
(``nnunet-multimodal complete`` writes them). nnU-Net finds the two classes here by name:

    nnUNetv2_plan_and_preprocess -d 1 -fpe MultimodalFingerprintExtractor -preprocessor_name MultimodalPreprocessor

Placeholders enter neither the intensity statistics nor the crop nor a normalisation, and are all-NaN channels when
preprocessed. Where there are none, the results are those of nnU-Net's own classes, bit by bit.
"""

from __future__ import annotations

import csv
import multiprocessing
import os
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_json, save_json
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from nnunetv2.utilities.utils import get_identifiers_from_splitted_dataset_folder
from tqdm import tqdm

from nnunet_multimodal.errors import SHOWN, UserError
from nnunet_multimodal.images import check_finite, check_labels, geometry_difference, read_images, read_seg
from nnunet_multimodal.raters.preprocessing import save_raters

# nnU-Net's readers and writers keep it (but for BMP): above 255 they write uint16, and float32 holds it exactly.
PLACEHOLDER = 65521
MANIFEST = "modalities.csv"
STOCK_PREPROCESSOR, PREPROCESSOR = "DefaultPreprocessor", "MultimodalPreprocessor"
FINGERPRINT_KEY = "nnunet_multimodal"

Properties = dict[str, Any]
RunCase = Callable[..., tuple[np.ndarray, np.ndarray, Properties]]


def channel_names(dataset_json: dict) -> list[str]:
    """Names of the image channels, in the order of their numbers; not always different ones."""
    names = dataset_json.get("channel_names", dataset_json.get("modality", {}))
    return [str(names[key]) for key in sorted(names, key=int)]


def find_placeholders(data: np.ndarray) -> np.ndarray:
    """Which channels of raw images (C, *D) are placeholders: (C,) bool."""
    return np.array([channel.flat[0] == PLACEHOLDER and bool((channel == PLACEHOLDER).all()) for channel in data])


def check_image(data: np.ndarray, files: Sequence[str | os.PathLike], num_channels: int) -> np.ndarray:
    """Which channels (C, *D) of a case are placeholders: (C,) bool.

    Raises:
        UserError: all of them, a channel without a file or too many, or NaN or infinity in an image.
    """
    if len(data) > num_channels:
        raise UserError(
            f"{', '.join(map(str, files))}: {len(data)} images, and the dataset has {num_channels} modalities; take "
            "away what is too much"
        )
    if len(data) != num_channels:
        raise UserError(
            f"{', '.join(map(str, files))}: {len(data)} of {num_channels} modalities; complete the folder with "
            f"nnunet-multimodal complete {os.path.dirname(str(files[0])) or 'FOLDER'}"
        )
    wrong = sorted({int(channel) for channel in np.argwhere(~np.isfinite(data))[:, 0]})
    if wrong:
        named = ", ".join(str(files[c]) for c in wrong) if len(files) == len(data) else str(list(files))
        check_finite(named, data)
    absent = find_placeholders(data)
    if absent.all():
        raise UserError(f"{', '.join(map(str, files))}: no modality is there, all are placeholders; leave out the case")
    return absent


def preprocess_present(
    run_case: RunCase, data: np.ndarray, seg: np.ndarray | None, properties: Properties, absent: np.ndarray, *plan: Any
) -> tuple[np.ndarray, np.ndarray, Properties]:
    """nnU-Net's ``run_case_npy`` with absent channels left out of everything, and all-NaN in the result.

    Args:
        run_case: nnU-Net's, or another preprocessor's.
        data: raw images (C, *D).
        seg: raw segmentation (1, *D), or None.
        properties: what the reader says of them.
        absent: (C,) bool.
        plan: what ``run_case`` takes besides.
    """
    if absent.any():
        data = data.copy()
        data[absent] = 0  # nothing, for the crop; channels are normalised one by one
    data, seg, properties = run_case(data, seg, properties, *plan)
    data[: len(absent)][absent] = np.nan
    return data, seg, properties


class MultimodalPreprocessor(DefaultPreprocessor):
    """nnU-Net's preprocessor; placeholders become all-NaN channels, and several raters are kept with the data."""

    def run_case_save(
        self,
        output_filename_truncated: str,
        image_files: list[str],
        seg_file: str,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        dataset_json: dict,
    ) -> None:
        """nnU-Net's, and the case's raters.

        Raises:
            UserError: raters of other cases and none of this one, or damaged ones, on another grid or with labels that
                are not declared.
        """
        what = plans_manager, configuration_manager, dataset_json
        super().run_case_save(output_filename_truncated, image_files, seg_file, *what)
        save_raters(output_filename_truncated, image_files[0], seg_file, *what)

    def run_case_npy(
        self, data: np.ndarray, seg: np.ndarray | None, properties: Properties, *plan: Any, **named_plan: Any
    ) -> tuple[np.ndarray, np.ndarray, Properties]:
        """nnU-Net's; channels that are placeholders become NaN.

        Raises:
            UserError: all of them, channels too few or too many, NaN or infinity in an image, or labels that are not
                declared.
        """
        configuration = named_plan.get("configuration_manager") or plan[1]
        names = [f"channel {channel}" for channel in range(len(data))]
        absent = check_image(data, names, len(configuration.normalization_schemes))
        if seg is not None:
            plans, dataset_json = named_plan.get("plans_manager") or plan[0], named_plan.get("dataset_json") or plan[2]
            labels = plans.get_label_manager(dataset_json)
            check_labels(seg, [*labels.all_labels, *([labels.ignore_label] if labels.has_ignore_label else [])])
        run_case = partial(super().run_case_npy, **named_plan)
        return preprocess_present(run_case, data, seg, properties, absent, *plan)

    def run_case(
        self, image_files: list[str], seg_file: str | None, *args: Any, **kwargs: Any
    ) -> tuple[np.ndarray, np.ndarray, Properties]:
        """nnU-Net's, with the files' names in an error."""
        try:
            return super().run_case(image_files, seg_file, *args, **kwargs)
        except UserError as error:
            files = [*image_files, *([] if seg_file is None else [seg_file])]
            raise UserError(f"{', '.join(map(str, files))}: {error}") from error


class CaseFingerprint(NamedTuple):
    """What nnU-Net's fingerprint takes from a case; ``intensities`` has None for an absent channel."""

    shape: tuple[int, ...]
    spacing: Sequence[float]
    intensities: list[np.ndarray | None]
    relative_size: float


def analyze_case(
    image_files: list[str],
    segmentation_file: str,
    reader: type[BaseReaderWriter],
    num_samples: int,
    num_channels: int,
) -> CaseFingerprint:
    """nnU-Net's analysis of a case, absent modalities left out.

    Raises:
        UserError: no modality is present, one has no file, a file cannot be read, has NaN or infinite voxels or lies on
            another grid.
    """
    images, properties = read_images(reader(), image_files)
    absent = check_image(images, image_files, num_channels)
    images[absent] = 0
    seg, theirs = read_seg(reader(), segmentation_file)
    difference = geometry_difference(
        image_files[0], images.shape[1:], properties, segmentation_file, seg.shape[1:], theirs
    )
    if difference:
        raise UserError(f"{difference}; resample the label map onto its image's grid")
    cropped, seg, _ = crop_to_nonzero(images, seg)
    present, _ = DatasetFingerprintExtractor.collect_foreground_intensities(
        seg, cropped[~absent], num_samples=num_samples
    )
    found = iter(present)
    return CaseFingerprint(
        shape=cropped.shape[1:],
        spacing=properties["spacing"],
        intensities=[None if gone else next(found) for gone in absent],
        relative_size=np.prod(cropped.shape[1:]) / np.prod(images.shape[1:]),
    )


class MultimodalFingerprintExtractor(DatasetFingerprintExtractor):
    """nnU-Net's fingerprint, from the modalities that are there."""

    def run(self, overwrite_existing: bool = False) -> dict:
        """Extract and save the fingerprint, as nnU-Net's extractor does; returns it.

        Raises:
            UserError: a modality is absent in all cases, a case has none, or NaN in an image.
        """
        file = Path(nnUNet_preprocessed) / self.dataset_name / "dataset_fingerprint.json"
        if file.is_file() and not overwrite_existing:
            return load_json(str(file))
        cases = list(self._analyze_all())
        statistics, counts = {}, []
        for channel, name in enumerate(channel_names(self.dataset_json)):
            there = [values for case in cases if (values := case.intensities[channel]) is not None]
            if not there:
                raise UserError(
                    f"{self.dataset_name}: no case has {name} (_{channel:04d}); take it out of dataset.json"
                )
            values = np.concatenate(there)
            if not len(values):
                raise UserError(
                    f"{self.dataset_name}: no case with {name} has a label but background in labelsTr; draw one"
                )
            statistics[channel] = intensity_statistics(values)
            counts.append(len(there))
        fingerprint = {
            "spacings": [case.spacing for case in cases],
            "shapes_after_crop": [case.shape for case in cases],
            "foreground_intensity_properties_per_channel": statistics,
            "median_relative_size_after_cropping": np.median([case.relative_size for case in cases], 0),
        }
        if min(counts) < len(cases):
            fingerprint[FINGERPRINT_KEY] = {"cases": len(cases), "cases_with_channel": counts}
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(f".{file.name}.part")
        save_json(fingerprint, str(beside))
        beside.replace(file)
        return fingerprint

    def _analyze_all(self) -> list[CaseFingerprint]:
        files = list(self.dataset.values())
        reader = determine_reader_writer_from_dataset_json(self.dataset_json, files[0]["images"][0])
        num_samples = int(self.num_foreground_voxels_for_intensitystats // len(files))
        num_channels = len(channel_names(self.dataset_json))
        analyze = partial(analyze_case, reader=reader, num_samples=num_samples, num_channels=num_channels)
        columns = [case["images"] for case in files], [case["label"] for case in files]
        progress = partial(
            tqdm, desc="Extracting dataset fingerprint", total=len(files), disable=not self.show_progress_bar
        )
        if self.num_processes <= 1:
            return list(progress(map(analyze, *columns)))
        with ProcessPoolExecutor(self.num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            return list(progress(pool.map(analyze, *columns)))


def intensity_statistics(values: np.ndarray) -> dict[str, float]:
    """What nnU-Net's fingerprint says of a channel."""
    low, median, high = np.percentile(values, (0.5, 50.0, 99.5))
    return {
        "mean": float(np.mean(values)),
        "median": float(median),
        "std": float(np.std(values)),
        "min": float(np.min(values)),
        "max": float(np.max(values)),
        "percentile_99_5": float(high),
        "percentile_00_5": float(low),
    }


def read_manifest(file: Path, channels: Sequence[str]) -> dict[str, list[bool]]:
    """Case -> which modalities it has, from the table that ``nnunet-multimodal complete`` writes.

    Raises:
        UserError: not a table in UTF-8, other columns, or an entry that is neither 0 nor 1.
    """
    rows = _read_rows(file)
    if not rows or rows[0] != ["case", *channels]:
        found = ",".join(rows[0]) if rows else "nothing"
        raise UserError(f"{file} begins with {found!r}, not 'case,{','.join(channels)}'; correct it or delete it")
    manifest = {}
    for row in rows[1:]:
        if len(row) != len(rows[0]) or not set(row[1:]) <= {"0", "1"}:
            raise UserError(f"{file}: {','.join(row)!r} is not a case with 0 or 1 for each of {', '.join(channels)}")
        manifest[row[0]] = [entry == "1" for entry in row[1:]]
    return manifest


def manifest_of(dataset_name: str) -> tuple[Path, dict[str, list[bool]]]:
    """The manifest of a dataset's raw training images, and what it says; nothing where there is none."""
    file = Path(nnUNet_raw or "") / dataset_name / "imagesTr" / MANIFEST
    if not nnUNet_raw or not file.is_file():
        return file, {}
    columns = next(iter(_read_rows(file)), [])
    return file, read_manifest(file, columns[1:])


def _read_rows(file: Path) -> list[list[str]]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:  # spreadsheets begin it with a mark
            return [row for row in csv.reader(lines) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} cannot be read ({error}); save it as CSV in UTF-8") from error


def cases_without(dataset_name: str, groups: Sequence[Sequence[int]]) -> set[str]:
    """Training cases that have none of some modalities, each of which is whole or not there (channels of each)."""
    _, present = manifest_of(dataset_name)
    return {case for case, has in present.items() if not any(all(has[c] for c in group) for group in groups)}


def check_preprocessed(folder: Path, dataset_json: dict) -> None:
    """Refuse data whose preprocessing was cut off: nnU-Net would train on what there is, without a word.

    Args:
        folder: preprocessed data of a configuration, in the dataset's preprocessed folder.
        dataset_json: the dataset's.

    Raises:
        UserError: cases are missing or half written. They are counted by the raw dataset, or by numTraining where that
            is not at hand; nnU-Net's gt_segmentations may be those of an earlier, smaller dataset.
    """
    # nnU-Net writes a case's .pkl last
    whole = {file.stem for file in folder.glob("*.pkl") if _is_whole(file)}
    begun = {file.stem.removesuffix("_seg") for ending in ("b2nd", "npz") for file in folder.glob(f"*.{ending}")}
    raw = training_cases(folder.parent.name, dataset_json)
    wrong = sorted((begun | raw) - whole)
    if wrong or (not raw and len(whole) < dataset_json["numTraining"]):
        count = f"{len(raw)} in {nnUNet_raw}" if raw else f"{dataset_json['numTraining']} in dataset.json"
        named = f"; not whole: {', '.join(wrong[:SHOWN])}{' ...' * (len(wrong) > SHOWN)}" if wrong else ""
        mistaken = "" if raw else f", or correct numTraining in {folder.parent / 'dataset.json'}"
        raise UserError(
            f"{folder} has {len(whole)} whole cases of {count}{named}; run nnUNetv2_preprocess again{mistaken}"
        )


def training_cases(dataset_name: str, dataset_json: dict) -> set[str]:
    """The cases that nnU-Net preprocesses, by its own rules; none where neither dataset.json nor nnUNet_raw tells."""
    images = Path(nnUNet_raw or "") / dataset_name / "imagesTr"
    if "dataset" in dataset_json:
        return set(dataset_json["dataset"])
    if not nnUNet_raw or not images.is_dir():
        return set()
    return set(map(str, get_identifiers_from_splitted_dataset_folder(str(images), dataset_json["file_ending"])))


def _is_whole(pickled: Path) -> bool:
    with pickled.open("rb") as stream:
        stream.seek(0, os.SEEK_END)
        stream.seek(max(0, stream.tell() - 1))
        return stream.read() == pickle.STOP


def check_incomplete(dataset_name: str, fingerprint: dict, preprocessor: str) -> None:
    """Refuse plans that take placeholders for images.

    Args:
        dataset_name: whose raw folder may have a manifest.
        fingerprint: of the dataset.
        preprocessor: the plans'.

    Raises:
        UserError: there are placeholders, and fingerprint or preprocessor do not know them.
    """
    file, present = manifest_of(dataset_name)
    incomplete = [case for case, has in present.items() if not all(has)]
    if not incomplete:
        return
    remedy = (
        f"plan with nnUNetv2_plan_and_preprocess -fpe {MultimodalFingerprintExtractor.__name__} "
        f"-preprocessor_name {PREPROCESSOR} --clean"
    )
    what = f"{len(incomplete)} cases of {dataset_name} lack modalities ({file})"
    if FINGERPRINT_KEY not in fingerprint:
        raise UserError(f"{what}, and its fingerprint was taken of their placeholders; {remedy}")
    if preprocessor == STOCK_PREPROCESSOR:
        raise UserError(f"{what}, and {preprocessor} takes their placeholders for images; {remedy}")
