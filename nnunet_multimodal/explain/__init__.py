"""Which modality contributed what, where: for a folder of cases and any model, nnU-Net's own included.

  contributions.csv                each modality left out: change of the label map and of its volume, of Dice with -ref
  CASE.png                         images, reference, prediction, maps and contributions side by side

Of CIML's models (Shen et al., 2024, Eq. 14 to 17), for every region of every segmentor and each that it hears:

  complementary/CASE_PRIMARY_REGION_from_AUXILIARY.nii.gz    Grad-CAM on the complementary information
  complementary_weights.csv, complementary_weights.png       its shares, per case and averaged

Of CRNP's models (Wang et al., ECCV 2022, Fig. 3):

  uncertainty/CASE_MODALITY.nii.gz, uncertainty.csv          where a modality is unlike the training data, and its mean

With --attribution, by captum (pip install nnunet-multimodal[explain]), for each label and image channel:

  attribution/CASE_LABEL_from_CHANNEL.nii.gz, attribution.csv    and the share of each channel
"""

from __future__ import annotations

import argparse
import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from nnunet_multimodal.backbones.crnp import CRNPBackbone
from nnunet_multimodal.errors import UserError
from nnunet_multimodal.evaluate.cases import read_settings
from nnunet_multimodal.explain.attribution import METHODS, AttributionPredictor
from nnunet_multimodal.explain.complementary import ComplementaryPredictor, Pair, has_complementary_information
from nnunet_multimodal.explain.leave_out import leave_each_out, predict_case
from nnunet_multimodal.explain.sheet import Sheet, draw_sheet, draw_weights
from nnunet_multimodal.files import write_text
from nnunet_multimodal.images import geometry_difference
from nnunet_multimodal.inference.base import (
    Case,
    ModelPredictor,
    Preprocessed,
    add_model_arguments,
    model_folder,
    voxel_volume_ml,
    write_map,
)
from nnunet_multimodal.inference.uncertainty import UncertaintyPredictor
from nnunet_multimodal.network import MultimodalUNet, unwrap
from nnunet_multimodal.provenance import note

DEFAULT_TOLERANCE_MM = 1.0  # of a measure that is not used here
AVERAGE = "mean"
RESERVED = {AVERAGE, "complementary_weights"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """nnUNetv2_predict's flags, and what to explain."""
    add_model_arguments(parser, "CIMLTrainer")
    parser.add_argument("-ref", type=Path, metavar="FOLDER", help="reference label maps")
    parser.add_argument("--disable_tta", action="store_true", help="no mirroring where modalities are left out")
    parser.add_argument("--attribution", choices=METHODS, help="attribution of labels to image channels, by captum")
    parser.add_argument("--steps", type=int, default=20, help="of integrated gradients (default: 20)")


class WeightRow(NamedTuple):
    """A share of complementary information."""

    case: str
    primary: str
    region: str
    auxiliary: str
    weight: float


class Table:
    """Rows of a CSV file, which is written anew after every case."""

    def __init__(self, file: Path, columns: Sequence[str]) -> None:
        self.file, self.columns = file, columns
        self.rows: list[Sequence[Any]] = []

    def add(self, rows: Iterable[Sequence[Any]]) -> None:
        """Add the rows of a case; NaN is an empty cell."""
        self.rows += rows
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(
            ["" if isinstance(v, float) and math.isnan(v) else f"{v:.6g}" if isinstance(v, float) else v for v in row]
            for row in self.rows
        )
        write_text(self.file, text.getvalue())


class Explainer:
    """A model and everything that there is to say about its predictions.

    Args:
        args: of the command.

    Raises:
        UserError: the model cannot be explained, or a reference is not there.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        folder = model_folder(args)
        self.args, self.output = args, Path(args.o)
        self.predictor = self._open(ModelPredictor, not args.disable_tta)
        self.settings = read_settings(Path(folder) / "dataset.json", Path(folder) / "plans.json", DEFAULT_TOLERANCE_MM)
        self.labels = dict(zip(self.settings.names, self.settings.labels, strict=True))
        self.cases = self.predictor.cases(args.i, args.prev_stage_predictions)
        for case in self.cases if args.ref else ():
            file = self._reference_file(case)
            if not file.is_file():
                raise UserError(f"{file} is not there; give a reference for every image, or no -ref")
        self._check_names()
        network = unwrap(self.predictor.network)
        self.complementary: ComplementaryPredictor | None = None
        self.uncertainty: UncertaintyPredictor | None = None
        self.attribution: AttributionPredictor | None = None
        self.pairs: list[Pair] = []
        if has_complementary_information(self.predictor):
            self.complementary = self._open(ComplementaryPredictor, False)
            self.pairs = self.complementary.pairs()
        if isinstance(network, MultimodalUNet) and isinstance(network.backbone, CRNPBackbone):
            self.uncertainty = self._open(UncertaintyPredictor, False)
            self.uncertainty.check()
        if args.attribution:
            self.attribution = self._open(AttributionPredictor, False)
            self.attribution.check(args.attribution, args.steps)
        columns = ("case", "modality", "label", "volume_ml", "volume_without_ml", "changed", "Dice", "Dice_without")
        self.contributions = Table(self.output / "contributions.csv", columns)
        self.weights = Table(self.output / "complementary_weights.csv", WeightRow._fields)
        self.scores = Table(self.output / "uncertainty.csv", ("case", "modality", "uncertainty"))
        self.shares = Table(self.output / "attribution.csv", ("case", "label", "channel", "share"))

    def _check_names(self) -> None:
        for what, names in (("channels", self.predictor.channel_names()), ("labels", list(self.labels))):
            if len({_safe(name) for name in names}) < len(names):
                raise UserError(
                    f"{what} {', '.join(names)} need different names in {model_folder(self.args)}/dataset.json, which "
                    "files are named after"
                )
        for case in self.cases:
            if case.name in RESERVED:
                raise UserError(f"{self.args.i} has a case named {case.name!r}, which a result is named; rename it")

    def _open(self, kind: Any, mirroring: bool) -> Any:
        args = self.args
        device = torch.device(args.device)
        return kind.from_model(model_folder(args), args.f, device, args.chk, args.step_size, mirroring)

    def _reference_file(self, case: Case) -> Path:
        return self.args.ref / f"{case.name}{self.settings.ending}"

    def explain(self, case: Case) -> None:
        """Write all that there is of a case; its sheet comes last."""
        preprocessed = self.predictor.preprocess(case)
        prediction = predict_case(self.predictor, preprocessed, preprocessed.data)
        reference = None
        if self.args.ref:
            reference = self._read_reference(case, preprocessed.properties, prediction.shape)
        contributions = leave_each_out(
            self.predictor, preprocessed, prediction, self.labels, reference, self.settings.ignore_label
        )
        maps = [
            *self._complementary(case, preprocessed),
            *self._uncertainty(case, preprocessed),
            *self._attribution(case, preprocessed),
        ]
        images = self._images(case)
        sheet = Sheet(case.name, images, prediction, reference, maps, contributions, list(self.labels.values()))
        draw_sheet(sheet, self.output / f"{case.name}.png")
        reader = self.predictor.plans_manager.plans["image_reader_writer"]
        voxel_ml = voxel_volume_ml(preprocessed.properties, reader) or math.nan
        self.contributions.add(
            (case.name, c.modality, c.label, c.voxels * voxel_ml, c.voxels_without * voxel_ml, *c[4:])
            for c in contributions
        )

    def _read_reference(self, case: Case, properties: dict, shape: tuple[int, ...]) -> np.ndarray:
        file = self._reference_file(case)
        reference, theirs = self.settings.reader().read_seg(str(file))
        image = case.first_image
        difference = geometry_difference(image, shape, properties, str(file), reference.shape[1:], theirs)
        if difference:
            raise UserError(f"{difference}; a reference must be on its image's grid")
        return reference[0]

    def _images(self, case: Case) -> dict[str, np.ndarray]:
        """The images that there are, by the names of their channels."""
        files = [file for file in case.images if file is not None]
        data, _ = self.settings.reader().read_images(files)
        names = self.predictor.channel_names()
        kept = names if len(data) == len(names) else [n for n, f in zip(names, case.images, strict=True) if f]
        return dict(zip(kept, data, strict=True))

    def _complementary(self, case: Case, preprocessed: Preprocessed) -> list[tuple[str, np.ndarray]]:
        if self.complementary is None:
            return []
        maps, weights = self.complementary.explain(preprocessed, self.pairs)
        shown = []
        for pair, pair_maps, shares in zip(self.pairs, maps, weights, strict=True):
            largest = float(pair_maps.max()) or 1.0  # as in Fig. 16, maps of a pair have one scale
            for auxiliary, array in zip(pair.auxiliary_names, pair_maps, strict=True):
                name = f"{pair.primary_name}_{pair.region_name}_from_{auxiliary}"
                self._write(array, case, preprocessed, "complementary", name)
                shown.append((f"{pair.primary_name}: {pair.region_name}\nfrom {auxiliary}", array / largest))
            self.weights.add(
                WeightRow(case.name, pair.primary_name, pair.region_name, auxiliary, float(share))
                for auxiliary, share in zip(pair.auxiliary_names, shares, strict=True)
            )
        return shown

    def _uncertainty(self, case: Case, preprocessed: Preprocessed) -> list[tuple[str, np.ndarray]]:
        if self.uncertainty is None:
            return []
        maps, means, _ = self.uncertainty.predict_preprocessed(preprocessed)
        names = self.uncertainty.modality_names(unwrap(self.uncertainty.network).groups)
        for name, array in zip(names, maps, strict=True):
            self._write(array, case, preprocessed, "uncertainty", name)
        self.scores.add((case.name, name, mean) for name, mean in zip(names, means, strict=True))
        largest = float(maps.max()) or 1.0
        return [(f"uncertainty\n{name}", array / largest) for name, array in zip(names, maps, strict=True)]

    def _attribution(self, case: Case, preprocessed: Preprocessed) -> list[tuple[str, np.ndarray]]:
        if self.attribution is None:
            return []
        maps, shares = self.attribution.explain(preprocessed)
        names, shown = self.predictor.channel_names(), []
        for label, label_maps, label_shares in zip(self.attribution.outputs(), maps, shares, strict=True):
            largest = float(np.abs(label_maps).max()) or 1.0
            for channel, array in zip(names, label_maps, strict=True):
                self._write(array, case, preprocessed, "attribution", f"{label}_from_{channel}")
                shown.append((f"{self.args.attribution}: {label}\nfrom {channel}", np.abs(array) / largest))
            self.shares.add(
                (case.name, label, channel, float(share)) for channel, share in zip(names, label_shares, strict=True)
            )
        return shown

    def _write(self, array: np.ndarray, case: Case, preprocessed: Preprocessed, folder: str, name: str) -> None:
        file = self.output / folder / f"{case.name}_{_safe(name)}.nii.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_map(array.astype(np.float32), case.first_image, preprocessed.properties, file)

    def finish(self) -> None:
        """The means over the cases, and what all this was made with."""
        attribution = {"attribution": self.args.attribution, "steps": self.args.steps}
        note(self.output, "explain", **self.predictor.identity(), **attribution)
        if self.complementary is None:
            return
        rows: list[WeightRow] = [WeightRow(*row) for row in self.weights.rows]
        keys = list(dict.fromkeys((row.primary, row.region, row.auxiliary) for row in rows))
        means = []
        for key in keys:
            values = [row.weight for row in rows if row[1:4] == key and not math.isnan(row.weight)]
            means.append(WeightRow(AVERAGE, *key, float(np.mean(values)) if values else math.nan))
        self.weights.add(means)
        draw_weights([row[1:] for row in means], self.output / "complementary_weights.png")


def _safe(name: str) -> str:
    """With nothing in it that a file's name cannot have."""
    return "".join(c if c.isalnum() or c in "-.+" else "_" for c in name)


def run(args: argparse.Namespace) -> int:
    """Explain a folder; returns the exit status."""
    explainer = Explainer(args)
    explainer.output.mkdir(parents=True, exist_ok=True)
    for case in tqdm(explainer.cases, desc="explain", unit="case"):
        explainer.explain(case)
    explainer.finish()
    print(f"{len(explainer.cases)} cases explained in {explainer.output}")
    return 0
