"""Predict a folder with samples, uncertainty maps and intervals, from one forward pass per tile.

Takes nnUNetv2_predict's flags and writes its files, so that its other commands work on the folder: CASE.nii.gz is the
mean prediction. Cases need not be complete: a modality without a file is absent, and so is one that --drop names.
Beside it:

  CASE.json                            volume, lesion count and presence of every label, with intervals over the samples
  uncertainty/CASE_entropy.nii.gz      total uncertainty, in nats         (--maps; all three if not given)
  uncertainty/CASE_expected_entropy.nii.gz, CASE_mutual_information.nii.gz
  samples/CASE__000.nii.gz, ...        label maps of the samples          (--save-samples)
  distribution/CASE.npz                what the samples are drawn from    (--save-distribution)

Models with the SSN or MoSE head are sampled; all other models, nnU-Net's own included, have their folds and mirrors as
samples. MoSE's samples can have weights instead of repeating its experts (--compact). All folds are held at once:
(2 + rank) x labels x voxels x 2 bytes each of SSN, (labels + features + experts) x voxels x 2 bytes of MoSE, (2 +
mirrors) x labels x voxels x 2 bytes of others.
"""

from __future__ import annotations

import argparse
import glob
import itertools
import json
import math
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.export_prediction import (
    convert_predicted_logits_to_segmentation_with_correct_shape,
    export_prediction_from_logits,
)
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor
from tqdm import tqdm

from nnunet_multimodal.errors import UserError
from nnunet_multimodal.files import write_json
from nnunet_multimodal.images import rename_files
from nnunet_multimodal.inference.base import (
    Case,
    Preprocessed,
    add_model_arguments,
    add_part_arguments,
    check_part,
    model_folder,
    voxel_volume_ml,
    write_map,
)
from nnunet_multimodal.inference.maps import MAPS, RunningMaps
from nnunet_multimodal.inference.quantities import RunningQuantities
from nnunet_multimodal.inference.sampling import ImageDistribution, SamplePredictor
from nnunet_multimodal.provenance import made


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """nnUNetv2_predict's flags, and those of sampling."""
    add_model_arguments(parser, "SSNTrainer")
    parser.add_argument("--disable_tta", action="store_true", help="no mirroring")
    parser.add_argument("--save_probabilities", action="store_true", help="probabilities of the mean, to ensemble")
    parser.add_argument(
        "--continue_prediction", action="store_true", help="leave out cases that this model predicted with these flags"
    )
    parser.add_argument("--disable_progress_bar", action="store_true", help="for logs")
    parser.add_argument("--not_on_device", action="store_true", help="keep the blended image off the GPU")
    parser.add_argument("--verbose", action="store_true", help="as nnUNetv2_predict's")
    parser.add_argument("-nps", type=int, default=0, help="accepted for nnU-Net's scripts; results are written here")
    parser.add_argument("-npp", type=int, default=1, help="cases to preprocess ahead, 0: none (default: 1)")
    add_part_arguments(parser)
    parser.add_argument(
        "--drop", type=_names, default=[], metavar="NAME,...", help="modalities to leave out, such as FLAIR,T1"
    )
    group = parser.add_argument_group("sampling")
    group.add_argument("--samples", type=int, default=20, metavar="S", help="how many (default: 20)")
    group.add_argument("--seed", type=int, default=0, help="the same seed gives a case the same samples (default: 0)")
    group.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="factor on the samples' deviations (default: 1)"
    )
    group.add_argument(
        "--class-scale",
        nargs="+",
        default=[],
        metavar="NAME=FACTOR",
        help="factors on the deviations of labels or regions, such as tumour=2; negative ones mirror at the mean",
    )
    group.add_argument(
        "--compact", action="store_true", help="samples of all experts in turn, with weights (MoSE alone)"
    )
    group.add_argument("--maps", nargs="*", default=list(MAPS), choices=MAPS, help="which maps (default: all)")
    group.add_argument("--save-samples", action="store_true", help="label maps of the samples")
    group.add_argument("--save-distribution", action="store_true", help="on the network's grid, for use from Python")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def run(args: argparse.Namespace) -> int:
    """Predict a folder; returns the exit status.

    Raises:
        UserError: a flag out of its range, or a label that does not exist.
    """
    check_flags(args)
    device = torch.device(args.device)
    predictor = SamplePredictor.from_model(
        model_folder(args),
        args.f,
        device,
        args.chk,
        args.step_size,
        use_mirroring=not args.disable_tta,
        on_device=not args.not_on_device,
        progress_bar=not args.disable_progress_bar,
    )
    predictor.verbose = args.verbose
    output = Path(args.o)
    writer = CaseWriter(predictor, args, output)
    cases = predictor.cases(args.i, args.prev_stage_predictions, args.drop)[args.part_id :: args.num_parts]
    if args.continue_prediction:
        others = [case.name for case in cases if writer.is_of_another_run(case)]
        if others:
            print(f"{output}: predicted with another model or other flags, and now again: {', '.join(others)}")
        cases = [case for case in cases if not writer.is_complete(case)]
    output.mkdir(parents=True, exist_ok=True)
    for name, content in (("dataset", predictor.dataset_json), ("plans", predictor.plans_manager.plans)):
        write_json(output / f"{name}.json", content)  # nnU-Net's evaluation and postprocessing read them here
    with tqdm(total=len(cases), desc="predict", unit="case", disable=args.disable_progress_bar) as progress:
        for case, preprocessed in preprocess_ahead(predictor, cases, args.npp):
            writer.write(case, preprocessed)
            progress.update()
    return 0


def check_flags(args: argparse.Namespace) -> None:
    """Raise a UserError if a flag is out of its range."""
    if args.samples < 1:
        raise UserError(f"--samples {args.samples}: at least one is needed; nnUNetv2_predict predicts without any")
    if args.seed < 0 or not math.isfinite(args.temperature) or args.npp < 0:
        raise UserError(
            f"--seed {args.seed}, --temperature {args.temperature}, -npp {args.npp}: the seed and -npp must be at "
            "least 0, the temperature a finite number"
        )
    check_part(args)


def preprocess_ahead(predictor: SamplePredictor, cases: list[Case], ahead: int) -> Iterator[tuple[Case, Preprocessed]]:
    """Cases with their preprocessed data, some of which are read while others are predicted."""
    if ahead == 0:
        yield from ((case, predictor.preprocess(case)) for case in cases)
        return
    with ThreadPoolExecutor(ahead) as pool:
        try:
            queued = [pool.submit(predictor.preprocess, case) for case in cases[:ahead]]
            for index, case in enumerate(cases):
                preprocessed = queued.pop(0).result()
                if index + ahead < len(cases):
                    queued.append(pool.submit(predictor.preprocess, cases[index + ahead]))
                yield case, preprocessed
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class CaseWriter:
    """Everything that is written for a case. Its JSON comes last: where it is, all of the case is."""

    predictor: SamplePredictor
    args: argparse.Namespace
    output: Path

    def __post_init__(self) -> None:
        self.class_scale()  # a label that does not exist is noticed before anything is predicted
        if self.args.compact and not self.predictor.has_weights:
            raise UserError(f"--compact: {self.predictor.trainer_name} has no weights of samples; MoSETrainer's have")
        least = self.predictor.num_experts * len(self.predictor.list_of_parameters) if self.args.compact else 0
        if self.args.samples < least:
            raise UserError(
                f"--compact --samples {self.args.samples}: {least} are one of each expert and fold; give more"
            )

    @property
    def labels(self) -> LabelManager:
        """nnU-Net's knowledge of the labels."""
        return self.predictor.plans_manager.get_label_manager(self.predictor.dataset_json)

    @property
    def ending(self) -> str:
        """Of the label maps' files."""
        return self.predictor.dataset_json["file_ending"]

    def summary_file(self, case: Case) -> Path:
        """CASE.json."""
        return self.output / f"{case.name}.json"

    def settings(self) -> dict[str, Any]:
        """What the results depend on, besides the case."""
        args = self.args
        several = args.compact or len(self.predictor.list_of_parameters) > 1
        return {
            **self.predictor.identity(),
            **({"numbered": "folds in turn"} if several else {}),  # folders of earlier versions are not gone on with
            "samples_wanted": args.samples,
            "seed": args.seed,
            "temperature": args.temperature,
            "class_scale": args.class_scale,
            "compact": args.compact,
            "drop": args.drop,
        }

    def files(self, case: Case) -> dict[str, list[Path]]:
        """What earlier runs left of a case beside its label map and CASE.json, by what asks for it."""
        name, samples = glob.escape(case.name), self.output / "samples"
        patterns = {
            **{map_: f"uncertainty/{name}_{map_}.nii.gz" for map_ in MAPS},
            "distribution": f"distribution/{name}.npz",
            "probabilities": f"{name}.npz",
            "properties": f"{name}.pkl",
        }
        found = {kind: sorted(self.output.glob(pattern)) for kind, pattern in patterns.items()}
        numbered = {path: path.name.removesuffix(self.ending).removeprefix(f"{case.name}__")
                    for path in samples.glob(f"{name}__*{self.ending}")}  # fmt: skip
        # P1__0__000 is a sample of P1__0
        return {"samples": sorted(path for path, number in numbered.items() if number.isdecimal()), **found}

    def is_of_another_run(self, case: Case) -> bool:
        """Whether what is there of a case was made with another model or other settings."""
        if not self.summary_file(case).is_file():
            return False
        summary = json.loads(self.summary_file(case).read_text())
        return {key: summary.get(key) for key in self.settings()} != self.settings()

    def is_complete(self, case: Case) -> bool:
        """Whether all that the flags ask for is there, made with the same model and settings."""
        there = self.files(case)
        wanted = dict.fromkeys(self.args.maps, True)
        wanted |= {"samples": self.args.save_samples, "distribution": self.args.save_distribution}
        wanted |= {"probabilities": self.args.save_probabilities}
        complete = self.summary_file(case).is_file() and all(there[kind] for kind, needed in wanted.items() if needed)
        return complete and not self.is_of_another_run(case)

    def foreground_labels(self) -> dict[str, Any]:
        """Names and values of all labels or regions but background and ignore label."""
        labels = self.predictor.dataset_json["labels"]
        return {name: value for name, value in labels.items() if name != "ignore" and value != 0 and value != [0]}

    def class_scale(self) -> Tensor | None:
        """Factors (C,) of ``--class-scale``, None without one.

        Raises:
            UserError: not NAME=FACTOR, or no such label.
        """
        if not self.args.class_scale:
            return None
        labels = self.predictor.dataset_json["labels"]
        if self.labels.has_regions:
            names = list(self.foreground_labels())
        else:
            names = sorted((n for n in labels if n != "ignore"), key=lambda n: int(np.atleast_1d(labels[n])[0]))
        factors = torch.ones(len(names))
        for item in self.args.class_scale:
            name, _, factor = item.partition("=")
            try:
                factors[names.index(name)] = float(factor)
                finite = math.isfinite(float(factor))
            except ValueError:
                finite = False
            if not finite:
                raise UserError(
                    f"--class-scale {item!r} is not NAME=FACTOR with a number and one of the names {', '.join(names)}"
                )
        return factors

    def write(self, case: Case, preprocessed: Preprocessed) -> None:
        """Predict and write a case; what an earlier run left of it goes first."""
        for path in (self.summary_file(case), *itertools.chain(*self.files(case).values())):
            path.unlink(missing_ok=True)
        for folder in self._folders():
            (self.output / folder).mkdir(parents=True, exist_ok=True)
        distribution = self.predictor.predict_distribution(preprocessed.data, preprocessed.foreground)
        properties = preprocessed.properties
        if self.args.save_distribution:
            self._write_distribution(case, distribution)
        prediction = self._write_mean(case, distribution.mean, properties)
        maps, quantities = RunningMaps(self.labels.has_regions), self._quantities(properties)
        count = distribution.count(self.args.samples)
        if count < self.args.samples:
            tqdm.write(f"{case.name}: {count} of {self.args.samples} samples; this deterministic model has no more")
        if count < len(distribution.folds):
            tqdm.write(f"{case.name}: {count} samples for {len(distribution.folds)} folds; the last ones have none")
        weights = distribution.weights(count) if self.args.compact else None
        for index, logits in zip(distribution.numbers(count), self._samples(case, distribution), strict=True):
            weight = 1.0 if weights is None else weights[index]
            segmentation, probabilities = self._to_image(logits, properties)
            if self.args.maps:
                maps.add(torch.from_numpy(probabilities), weight)
            quantities.add(segmentation, weight)
            if self.args.save_samples:
                self._write_labels(segmentation, self.output / "samples" / f"{case.name}__{index:03d}", properties)
        if self.args.maps:
            self._write_maps(case, maps.maps(), properties)
        summary = {
            "case": case.name,
            "samples": count,
            "sample_weights": weights,
            "sample_groups": None if weights is None else distribution.groups(count),
            **self.settings(),
            "drawn_from": "members (folds and mirrors)" if distribution.members else "distribution",
            "trainer": self.predictor.trainer_name,
            "absent": [n for n, gone in zip(self.predictor.channel_names(), preprocessed.absent, strict=True) if gone],
            "spacing": [float(size) for size in properties["spacing"]],  # nnU-Net's TIFF reader looks for it here
            "labels": quantities.summary(prediction),
            "made": made(),
        }
        write_json(self.summary_file(case), summary)

    def _write_maps(self, case: Case, maps: dict[str, Tensor], properties: dict) -> None:
        for name in self.args.maps:
            path = self.output / "uncertainty" / f"{case.name}_{name}.nii.gz"
            write_map(maps[name].numpy(), case.first_image, properties, path)

    def _folders(self) -> list[str]:
        wanted = {
            "uncertainty": bool(self.args.maps),
            "samples": self.args.save_samples,
            "distribution": self.args.save_distribution,
        }
        return [folder for folder, needed in wanted.items() if needed]

    def _samples(self, case: Case, distribution: ImageDistribution) -> Iterator[Tensor]:
        seed = np.random.SeedSequence([self.args.seed, zlib.crc32(case.name.encode())]).generate_state(1, np.uint64)
        generator = torch.Generator(self.predictor.device).manual_seed(int(seed[0] >> 1))
        args = self.args
        return distribution.draw(args.samples, generator, args.temperature, self.class_scale(), args.compact)

    def _to_image(self, logits: Tensor, properties: dict) -> tuple[np.ndarray, np.ndarray]:
        """Label map and probabilities on the image's own grid, resampled once."""
        predictor = self.predictor
        return convert_predicted_logits_to_segmentation_with_correct_shape(
            logits, predictor.plans_manager, predictor.configuration_manager, self.labels, properties, True,
            torch.get_num_threads(),
        )  # fmt: skip

    def _quantities(self, properties: dict) -> RunningQuantities:
        reader = self.predictor.plans_manager.plans["image_reader_writer"]
        return RunningQuantities(self.foreground_labels(), voxel_volume_ml(properties, reader))

    def _write_mean(self, case: Case, mean: Tensor, properties: dict) -> np.ndarray:
        """Write the mean prediction through nnU-Net's own export; returns its label map."""
        predictor, beside = self.predictor, self.output / f".{case.name}"
        export_prediction_from_logits(
            mean, properties, predictor.configuration_manager, predictor.plans_manager, predictor.dataset_json,
            str(beside), self.args.save_probabilities, torch.get_num_threads(),
        )  # fmt: skip
        rename_files(beside, self.output / case.name, ".npz", ".pkl", ".json", self.ending)
        reader = predictor.plans_manager.image_reader_writer_class()
        return reader.read_seg(str(self.output / f"{case.name}{self.ending}"))[0][0].astype(np.int64)

    def _write_labels(self, segmentation: np.ndarray, path: Path, properties: dict) -> None:
        beside = path.with_name(f".{path.name}")
        reader = self.predictor.plans_manager.image_reader_writer_class()
        reader.write_seg(segmentation, f"{beside}{self.ending}", properties)
        rename_files(beside, path, ".json", self.ending)

    def _write_distribution(self, case: Case, distribution: ImageDistribution) -> None:
        path = self.output / "distribution" / f"{case.name}.npz"
        beside = path.with_name(f".{path.name}")
        arrays: dict[str, Any] = {"mean": distribution.mean.numpy()}
        for index, fold in enumerate(distribution.folds):
            tensors = {name: value for name, value in vars(fold).items() if isinstance(value, Tensor)}
            arrays |= {f"fold_{index}_{name}": value.numpy() for name, value in tensors.items()}
        arrays |= {f"member_{index}": member.numpy() for index, member in enumerate(distribution.members)}
        np.savez_compressed(beside, **arrays)
        beside.replace(path)
