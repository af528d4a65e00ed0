"""Pictures of what nnunet-multimodal predict wrote: samples, uncertainty, experts, manipulated samples.

  nnunet-multimodal sheets predictions -i imagesTs -o sheets -ref labelsTs
  nnunet-multimodal sheets compact -i imagesTs -o sheets --kind experts --raters ratersTs
  nnunet-multimodal sheets half whole double -i imagesTs -o sheets --kind manipulated

  samples       images, reference or raters, prediction, entropy, and samples whose volumes are spread over those of all
                (Monteiro et al., 2020, Fig. 4)
  uncertainty   the maps on one scale, and where the prediction is wrong
  experts       the heaviest samples with their weights (predict --compact; with --samples 4 they are MoSE's 4 experts)
  manipulated   the same samples from several folders: other --temperature or --class-scale, same --seed (Fig. 6 there)

CASE_KIND.png shows the slice with the most foreground. Voxels that the reference ignores are not foreground, and there
the prediction is not wrong. Samples need predict --save-samples.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
from tqdm import tqdm

from nnunet_multimodal.errors import UserError
from nnunet_multimodal.evaluate.cases import Settings, files_by_case, group_by_case, read_label_map, read_settings
from nnunet_multimodal.images import geometry_difference, list_channels, read_images, read_json
from nnunet_multimodal.inference.base import voxel_volume_ml
from nnunet_multimodal.inference.maps import MAPS
from nnunet_multimodal.pictures import (
    foreground,
    label_legend,
    new_figure,
    outline,
    save_png,
    show_image,
    widest_slice,
)
from nnunet_multimodal.preprocessing import channel_names
from nnunet_multimodal.raters.files import find_raters

COLUMNS = 6
DEFAULT_TOLERANCE_MM = 1.0  # of a measure that is not used here


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Folders, and what to draw."""
    parser.add_argument("predictions", nargs="+", type=Path, help="folders of nnunet-multimodal predict")
    parser.add_argument("-i", type=Path, required=True, metavar="FOLDER", help="the images that were predicted")
    parser.add_argument("-o", type=Path, required=True, metavar="FOLDER", help="for the pictures")
    parser.add_argument("-ref", type=Path, metavar="FOLDER", help="reference label maps")
    parser.add_argument("--raters", type=Path, metavar="FOLDER", help="CASE__NAME files, several for each case")
    parser.add_argument("--kind", nargs="+", choices=KINDS, help="what to draw (default: all that can be)")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="these alone (default: all)")
    parser.add_argument("--over", metavar="NAME", help="the modality under label maps (default: the first)")
    parser.add_argument("--samples", type=int, default=4, metavar="S", help="how many are shown (default: 4)")


def run(args: argparse.Namespace) -> int:
    """Draw; returns the exit status.

    Raises:
        UserError: a folder, a case or what a kind of picture needs is not there, or files do not fit each other.
    """
    if args.samples < 1:
        raise UserError(f"--samples {args.samples}: show at least one")
    folders = [Folder(path) for path in args.predictions]
    first = folders[0]
    lacking = {kind: lacks(folders) for kind, (_, lacks) in KINDS.items()}
    kinds = args.kind or [kind for kind, reason in lacking.items() if not reason]
    for kind in kinds:
        if lacking[kind]:
            raise UserError(f"--kind {kind}: {lacking[kind]}")
    if not kinds:
        raise UserError("; ".join(f"no {kind}: {reason}" for kind, reason in lacking.items()))
    unknown = sorted(set(args.cases or ()) - set(first.labels))
    if unknown or not first.labels:
        raise UserError(
            f"{first.path} has no prediction of {', '.join(unknown) or 'any case'}; it has {', '.join(first.labels)}"
        )
    reader = ImageReader(args, first)
    args.o.mkdir(parents=True, exist_ok=True)
    for case in tqdm(args.cases or list(first.labels), desc="sheets", unit="case"):
        shown = reader.read(case)
        for kind in kinds:
            KINDS[kind][0](shown, folders, args.samples, args.o / f"{case}_{kind}.png")
    return 0


class Folder:
    """What predict wrote.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = read_settings(path / "dataset.json", path / "plans.json", DEFAULT_TOLERANCE_MM)

    @cached_property
    def labels(self) -> dict[str, Path]:
        """Case -> its prediction."""
        return files_by_case(self.path, self.settings.ending)

    @cached_property
    def samples(self) -> dict[str, tuple[Path, ...]]:
        """Case -> its samples."""
        return group_by_case(files_by_case(self.path / "samples", self.settings.ending))

    @cached_property
    def has_maps(self) -> bool:
        """Whether there are uncertainty maps."""
        return any(self.path.glob("uncertainty/*.nii.gz"))

    def summary(self, case: str) -> dict[str, Any]:
        """CASE.json.

        Raises:
            UserError: it is not there, or is another command's.
        """
        return read_json(self.path / f"{case}.json", "samples", "sample_weights", "temperature", "class_scale", "seed")

    def read_samples(self, case: str, numbers: Sequence[int]) -> list[np.ndarray]:
        """Label maps (Z, Y, X) of some samples.

        Raises:
            UserError: there are not so many.
        """
        files = self.samples.get(case, ())
        if max(numbers, default=-1) >= len(files):
            raise UserError(f"{self.path / 'samples'} has {len(files)} samples of {case}; predict with --save-samples")
        return [read_label_map(files[number], self.settings).array for number in numbers]

    def read_maps(self, case: str) -> dict[str, np.ndarray]:
        """Uncertainty maps (Z, Y, X) in nats, by name, as far as they are there."""
        files = {name: self.path / "uncertainty" / f"{case}_{name}.nii.gz" for name in MAPS}
        arrays = {n: SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(f))) for n, f in files.items() if f.is_file()}
        return {name: array.reshape(-1, *array.shape[-2:]) for name, array in arrays.items()}


@dataclass(frozen=True)
class Shown:
    """A case's images and label maps, (Z, Y, X) each.

    Attributes:
        case: its name.
        images: by modality.
        references: by rater, or one.
        prediction: of the first folder.
        aspect: a voxel's height over its width.
        voxel_ml: its volume; None without a physical size.
        over: the modality that label maps are drawn over.
        settings: the labels.
    """

    case: str
    images: Mapping[str, np.ndarray]
    references: Mapping[str, np.ndarray]
    prediction: np.ndarray
    aspect: float
    voxel_ml: float | None
    over: str
    settings: Settings

    @cached_property
    def index(self) -> int:
        """The slice that is shown."""
        return widest_slice(self.settings.labels, *self.references.values(), self.prediction)

    @property
    def title(self) -> str:
        """The case, and the slice if it has several."""
        return self.case if len(self.prediction) == 1 else f"{self.case}, slice {self.index}"

    @property
    def background(self) -> np.ndarray:
        """Under label maps: a slice of one modality, of another one where it is absent."""
        return self.images.get(self.over, next(iter(self.images.values())))[self.index]

    @property
    def height(self) -> float:
        """Of a panel, in units of its width."""
        return self.background.shape[0] * self.aspect / self.background.shape[1]

    def count(self, labels: np.ndarray) -> int:
        """Voxels of all foreground."""
        return int(foreground(labels, self.settings.labels).sum())

    def volume(self, labels: np.ndarray) -> str:
        """Of all foreground, in words."""
        voxels = self.count(labels)
        if self.voxel_ml is None:
            return f"{voxels} pixels"
        volume_ml = voxels * self.voxel_ml
        return f"{volume_ml:.3g} ml" if volume_ml < 1000 else f"{volume_ml:.0f} ml"


class ImageReader:
    """Reads cases.

    Args:
        args: of the command.
        folder: the first one.

    Raises:
        UserError: an image's name is not nnU-Net's, a rater's is not CASE__NAME, or there is no such modality.
    """

    def __init__(self, args: argparse.Namespace, folder: Folder) -> None:
        self.folder, self.settings = folder, folder.settings
        description = read_json(folder.path / "dataset.json", "labels")
        self.names = channel_names(description)
        self.over = args.over or self.names[0]
        if self.over not in self.names:
            raise UserError(f"--over {self.over}: the modalities are {', '.join(self.names)}")
        self.images, self.channels = args.i, list_channels(args.i, self.settings.ending, len(self.names))
        raters = find_raters(args.raters, self.settings.ending) if args.raters else {}
        self.references = {case: {rater.name: rater.file for rater in found} for case, found in raters.items()}
        for case, file in files_by_case(args.ref, self.settings.ending).items() if args.ref else ():
            self.references[case] = {"reference": file, **self.references.get(case, {})}

    def read(self, case: str) -> Shown:
        """A case.

        Raises:
            UserError: there is no image of it, a file cannot be read, or files lie on different grids.
        """
        if case not in self.channels:
            raise UserError(f"{self.images} has no image of {case}; give the images that were predicted with -i")
        prediction = read_label_map(self.folder.labels[case], self.settings)
        images: dict[str, np.ndarray] = {}
        for channel in sorted(self.channels[case]):
            file = str(self.images / f"{case}_{channel:04d}{self.settings.ending}")
            arrays, properties = read_images(self.settings.reader(), [file])
            images |= dict(zip(self.names[channel:], arrays, strict=False))  # a colour image has several
        spacing = [float(size) for size in prediction.properties["spacing"]]
        references = {}
        for name, path in self.references.get(case, {}).items():
            references[name] = read_label_map(path, self.settings)
            difference = geometry_difference(
                str(prediction.file), prediction.array.shape, prediction.properties,
                str(path), references[name].array.shape, references[name].properties,
            )  # fmt: skip
            if difference:
                raise UserError(f"{difference}; give the references of these images")
        if prediction.array.shape != arrays.shape[1:]:
            raise UserError(f"{prediction.file} has shape {prediction.array.shape} and {file} {arrays.shape[1:]}")
        return Shown(
            case,
            images,
            {name: label_map.array for name, label_map in references.items()},
            prediction.array,
            spacing[1] / spacing[2],
            voxel_volume_ml(properties, self.settings.reader.__name__),
            self.over,
            self.settings,
        )


def draw_samples(shown: Shown, folders: Sequence[Folder], count: int, file: Path) -> None:
    """Images, references, prediction, entropy, samples at equally spaced quantiles of volume."""
    folder = folders[0]
    sizes = [shown.count(folder.read_samples(shown.case, [n])[0]) for n in range(len(folder.samples[shown.case]))]
    order = np.argsort(sizes, kind="stable")
    numbers = order[np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)].tolist()
    samples = folder.read_samples(shown.case, numbers)
    panels = [(f"sample {number}\n{shown.volume(own)}", own) for number, own in zip(numbers, samples, strict=True)]
    entropy = folder.read_maps(shown.case).get("entropy")
    _draw_label_maps(shown, folder, panels, entropy, file)


def draw_experts(shown: Shown, folders: Sequence[Folder], count: int, file: Path) -> None:
    """Images, references, prediction, and the heaviest samples with their weights."""
    folder = folders[0]
    weights = folder.summary(shown.case)["sample_weights"]
    if weights is None:
        raise UserError(f"{folder.path / shown.case}.json has no sample_weights; predict with --compact")
    numbers = np.argsort(weights, kind="stable")[::-1][:count].tolist()
    samples = folder.read_samples(shown.case, numbers)
    panels = [(f"weight {weights[n]:.2f}\n{shown.volume(own)}", own) for n, own in zip(numbers, samples, strict=True)]
    _draw_label_maps(shown, folder, panels, None, file)


def draw_uncertainty(shown: Shown, folders: Sequence[Folder], count: int, file: Path) -> None:
    """Images, the maps on one scale, and where the prediction differs from the reference."""
    folder, index = folders[0], shown.index
    maps = folder.read_maps(shown.case)
    if not maps:
        raise UserError(f"{folder.path / 'uncertainty'} has no map of {shown.case}; predict it again")
    reference = next(iter(shown.references.values()), None)
    columns = len(shown.images) + len(maps) + (reference is not None)
    figure, axes = new_figure(1, columns, shown.title, shown.height)
    panels = iter(axes[0])
    for name, image in shown.images.items():
        show_image(next(panels), image[index], name, shown.aspect)
    if reference is not None:
        axis = next(panels)
        show_image(axis, shown.background, "prediction is wrong", shown.aspect)
        wrong = (reference != shown.prediction) & (reference != shown.settings.ignore_label)
        wrong = np.ma.masked_equal(wrong[index], False)
        axis.imshow(wrong, cmap="autumn", alpha=0.7, aspect=shown.aspect, interpolation="nearest")
    high = max(float(array.max()) for array in maps.values()) or 1.0
    for name, array in maps.items():
        axis = next(panels)
        drawn = axis.imshow(array[index], cmap="viridis", vmin=0, vmax=high, aspect=shown.aspect)
        axis.set_title(name.replace("_", " "), fontsize=7)
        outline(axis, shown.prediction[index], folder.settings.labels, "white")
    figure.colorbar(drawn, ax=axes[0, -1], shrink=0.8, label="nats")
    save_png(figure, file)


def draw_manipulated(shown: Shown, folders: Sequence[Folder], count: int, file: Path) -> None:
    """Rows: samples; columns: the folders that they are from."""
    summaries = [folder.summary(shown.case) for folder in folders]
    for key in ("seed", "samples"):
        values = [summary[key] for summary in summaries]
        if len(set(values)) > 1:
            raise UserError(f"{shown.case}: the folders' {key} are {values}; predict all with the same --{key}")
    numbers = range(min(count, summaries[0]["samples"]))
    titles = [" ".join([f"T = {s['temperature']:g}", *s["class_scale"]]) for s in summaries]
    figure, axes = new_figure(len(numbers), len(folders) + 1, shown.title, shown.height)
    labels = folders[0].settings.labels
    columns = [[shown.prediction] * len(numbers), *(folder.read_samples(shown.case, numbers) for folder in folders)]
    for column, (title, label_maps) in enumerate(zip(["mean", *titles], columns, strict=True)):
        for row, label_map in enumerate(label_maps):
            own = title if column == 0 or row else f"{title}\n"
            show_image(axes[row, column], shown.background, f"{own.strip()}\n{shown.volume(label_map)}", shown.aspect)
            outline(axes[row, column], label_map[shown.index], labels)
    label_legend(figure, folders[0].settings.names)
    save_png(figure, file)


def _draw_label_maps(
    shown: Shown,
    folder: Folder,
    samples: Sequence[tuple[str, np.ndarray]],
    entropy: np.ndarray | None,
    file: Path,
) -> None:
    """Images; then label maps over the first image; the map between them."""
    label_maps = [(f"{name}\n{shown.volume(own)}", own) for name, own in shown.references.items()]
    label_maps += [(f"prediction\n{shown.volume(shown.prediction)}", shown.prediction), *samples]
    total = len(shown.images) + len(label_maps) + (entropy is not None)
    columns = min(COLUMNS, total)
    figure, axes = new_figure(-(-total // columns), columns, shown.title, shown.height)
    panels = iter(axes.flat)
    for name, image in shown.images.items():
        show_image(next(panels), image[shown.index], name, shown.aspect)
    if entropy is not None:
        axis = next(panels)
        drawn = axis.imshow(entropy[shown.index], cmap="viridis", vmin=0, aspect=shown.aspect)
        axis.set_title("entropy (nats)", fontsize=7)
        figure.colorbar(drawn, ax=axis, shrink=0.8)
    for title, label_map in label_maps:
        axis = next(panels)
        show_image(axis, shown.background, title, shown.aspect)
        outline(axis, label_map[shown.index], folder.settings.labels)
    label_legend(figure, folder.settings.names)
    save_png(figure, file)


def _without_samples(folders: Sequence[Folder]) -> str:
    return "" if folders[0].samples else f"{folders[0].path} has no samples; predict with --save-samples"


def _without_maps(folders: Sequence[Folder]) -> str:
    return "" if folders[0].has_maps else f"{folders[0].path} has no uncertainty maps; predict with --maps"


def _without_weights(folders: Sequence[Folder]) -> str:
    case = next(iter(folders[0].samples), None)
    if case is None:
        return _without_samples(folders)
    weighted = folders[0].summary(case)["sample_weights"] is not None
    return "" if weighted else f"{folders[0].path} has samples without weights; predict with --compact"


def _alone(folders: Sequence[Folder]) -> str:
    if len(folders) == 1:
        return "give several folders, of other --temperature or --class-scale"
    return next((f"{f.path} has no samples; predict with --save-samples" for f in folders if not f.samples), "")


Draw = Callable[[Shown, Sequence[Folder], int, Path], None]
# name -> how it is drawn, and why it cannot be (empty if it can)
KINDS: dict[str, tuple[Draw, Callable[[Sequence[Folder]], str]]] = {
    "samples": (draw_samples, _without_samples),
    "uncertainty": (draw_uncertainty, _without_maps),
    "experts": (draw_experts, _without_weights),
    "manipulated": (draw_manipulated, _alone),
}
