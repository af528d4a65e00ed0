"""Does a plan for so much GPU memory need so much? Without a GPU: counted in a training step that computes nothing.

nnU-Net's planners and ours plan typical data sets for their own memory targets. One training step of each plan's
``3d_fullres`` then runs on tensors that have a size but no content (PyTorch's FakeTensorMode), in half precision and
with the sizes of pieces that our losses take on a GPU: all tensors that live at a time are added up, in blocks of 512
bytes as CUDA's allocator has them, with parameters, gradients and momentum. What a GPU needs beyond its tensors
(kernels' workspaces, context, fragmentation) is not in it, neither for ours nor for nnU-Net's own network, whose plans
are the yardstick.
"""

from __future__ import annotations

import json
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import _common as common
import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from nnunet_multimodal import losses
from nnunet_multimodal.backbones import ciml
from nnunet_multimodal.heads import mose, ssn, streamed, transport_cost

BLOCK = 512  # bytes, of CUDA's caching allocator
STOCK = "nnU-Net"
# name: shape, spacing (mm), channels, labels beside the background
DATA: dict[str, dict[str, Any]] = {
    "BraTS": {
        "shape": (138, 171, 136),
        "spacing": (1.0, 1.0, 1.0),
        "channels": ("T1", "T1ce", "T2", "FLAIR"),
        "labels": 3,
    },
    "PET/CT": {"shape": (326, 400, 400), "spacing": (3.0, 2.04, 2.04), "channels": ("CT", "PET"), "labels": 1},
}
CASES = 200
HEADS = ("deterministic", "ssn", "mose")
ENCODERS = {"plain": "", "ResEncM": "ResEncM", "ResEncL": "ResEncL"}


class Peak(TorchDispatchMode):
    """The highest sum of tensors, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.known:
            return
        self.known[storage._cdata] = size = -(-storage.nbytes() // BLOCK) * BLOCK
        weakref.finalize(storage, self._release, storage._cdata)
        self.held += size
        self.peak = max(self.peak, self.held)

    def _release(self, key: int) -> None:
        self.held -= self.known.pop(key)


def write_dataset(root: Path, number: int, name: str) -> str:
    """A raw data set without images, and its fingerprint; returns nnU-Net's name of it."""
    data = DATA[name]
    dataset = f"Dataset{number:03d}_{name.replace('/', '')}"
    raw, preprocessed = root / "raw" / dataset, root / "preprocessed" / dataset
    for folder in (raw / "imagesTr", raw / "labelsTr", preprocessed):
        folder.mkdir(parents=True)
    for case in range(CASES):
        (raw / "labelsTr" / f"case_{case:03d}.nii.gz").touch()
        for channel in range(len(data["channels"])):
            (raw / "imagesTr" / f"case_{case:03d}_{channel:04d}.nii.gz").touch()
    description = {
        "channel_names": dict(enumerate(data["channels"])),
        "labels": {"background": 0, **{f"label {k}": k for k in range(1, data["labels"] + 1)}},
        "numTraining": CASES,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "SimpleITKIO",
    }
    statistics = {"max": 1, "mean": 0, "median": 0, "min": 0, "percentile_00_5": 0, "percentile_99_5": 1, "std": 1}
    fingerprint = {
        "spacings": [data["spacing"]] * CASES,
        "shapes_after_crop": [data["shape"]] * CASES,
        "foreground_intensity_properties_per_channel": {str(c): statistics for c in range(len(data["channels"]))},
        "median_relative_size_after_cropping": 1.0,
    }
    (raw / "dataset.json").write_text(json.dumps(description))
    (preprocessed / "dataset.json").write_text(json.dumps(description))
    (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    return dataset


def make_plans(dataset: str, planner: str, folder: Path) -> tuple[float, Any, Any]:
    """The planner's own memory target (GB), its plans and their configuration 3d_fullres."""
    import nnunetv2
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    search = str(Path(nnunetv2.__path__[0]) / "experiment_planning")
    made = recursive_find_python_class(search, planner, "nnunetv2.experiment_planning")(int(dataset[7:10]))
    with redirect_stdout(None):
        made.plan_experiment()
    plans = PlansManager(str(folder / dataset / f"{made.plans_identifier}.json"))
    return made.UNet_vram_target_GB, plans, plans.get_configuration("3d_fullres")


class Step:
    """A training step of a plan by a trainer's network and loss, without any numbers."""

    def __init__(self, trainer: str, plans: Any, configuration: Any, dataset_json: dict[str, Any]) -> None:
        from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

        self.labels = plans.get_label_manager(dataset_json)
        self.channels = determine_num_input_channels(plans, configuration, dataset_json)
        self.configuration = configuration
        self.network = _trainer_class(trainer).build_network_architecture(
            plans, configuration, self.channels, self.labels.num_segmentation_heads, True
        )
        scales = 1 / np.cumprod(np.vstack(configuration.pool_op_kernel_sizes), axis=0)[:-1]
        self.sizes = [[round(s * f) for s, f in zip(configuration.patch_size, scale, strict=True)] for scale in scales]

    def loss(self) -> Callable[..., Tensor]:
        """nnU-Net's, or the objective of our trainers."""
        from crnp_cost import stock_loss
        from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper

        from nnunet_multimodal.losses import build_objective
        from nnunet_multimodal.network import MultimodalUNet

        weights = np.array([1 / 2**level for level in range(len(self.sizes))])
        weights[-1] = 0
        share, stock = (weights / weights.sum()).tolist(), stock_loss()
        stock.dc, stock.ce = InSinglePrecision(stock.dc), InSinglePrecision(stock.ce)
        if isinstance(self.network, MultimodalUNet):
            return build_objective(self.network, stock, share, self.labels)
        return DeepSupervisionWrapper(stock, share)

    def peak_bytes(self) -> int:
        """Of the second step, in which there is momentum."""
        self.network.train()
        with without_numbers() as memory:
            forget(self.network)
            loss = self.loss()
            optimiser = torch.optim.SGD(self.network.parameters(), 1e-2, momentum=0.99, nesterov=True)
            batch = self.configuration.batch_size
            for _ in range(2):
                memory.peak = memory.held
                x = torch.randn(batch, self.channels, *self.configuration.patch_size)
                targets = [torch.zeros(batch, 1, *size) for size in self.sizes]
                optimiser.zero_grad(set_to_none=True)
                with torch.autocast("cpu", dtype=torch.float16):
                    value = loss(self.network(x), targets)
                value.backward()
                nn.utils.clip_grad_norm_(self.network.parameters(), 12)
                optimiser.step()
                del value, x, targets
            return memory.peak


def _trainer_class(name: str) -> Any:
    import nnunetv2
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    folder = Path(nnunetv2.__path__[0]) / "training" / "nnUNetTrainer"
    return recursive_find_python_class(str(folder), name, "nnunetv2.training.nnUNetTrainer")


class InSinglePrecision(nn.Module):
    """A term of nnU-Net's loss that autocast computes in single precision on a GPU, and does not on a CPU."""

    def __init__(self, term: Callable[..., Tensor]) -> None:
        super().__init__()
        self.term = term

    def forward(self, logits: Tensor, *others: Any, **options: Any) -> Tensor:
        """The term."""
        return self.term(logits.float(), *others, **options)


@contextmanager
def without_numbers() -> Iterator[Peak]:
    """Tensors without content, and the pieces of a GPU; what depends on content is as if all modalities were there."""
    with ExitStack() as stack:
        for sizes in (mose.CHUNK, transport_cost.CHUNK, ssn.CHUNK, ciml.SLAB):
            stack.enter_context(mock.patch.dict(sizes, cpu=sizes["cuda"]))
        stack.enter_context(mock.patch("torch.compiler.is_compiling", return_value=True))
        stack.enter_context(mock.patch.object(streamed, "_pairs_that_count", _all_pairs))
        stack.enter_context(mock.patch.object(losses.SubtaskLoss, "__call__", _all_answer))
        stack.enter_context(mock.patch.object(Tensor, "__int__", return_value=0))  # a seed, the only one that is read
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(Peak())


def _all_pairs(gradient: Tensor) -> list[list[int]]:
    """Of SSN's samples, those whose share of the gradient counts: all."""
    return [list(range(gradient.shape[1]))] * gradient.shape[2]


def _all_answer(loss: losses.SubtaskLoss, logits: Tensor, active: Tensor, target: Tensor) -> Tensor:
    """CIML's loss where every segmentor answers for everything in all samples; copies what the original does."""
    samples, channels, total = torch.arange(len(logits)), torch.arange(logits.shape[2]), logits.new_zeros((1,)).float()
    for s in range(logits.shape[1]):
        own = loss.select(target[samples], torch.ones(len(channels), dtype=torch.bool))
        total = total + loss.segmentation_loss(logits[samples, s][:, channels], own)
    return total


def forget(network: nn.Module) -> None:
    """Parameters and buffers of the same size without content."""
    moved: dict[int, tuple[Tensor, Tensor]] = {}  # with the old one, so that no other takes its address
    for module in network.modules():
        for store in (module._parameters, module._buffers):
            for name, old in store.items():
                if old is None:
                    continue
                if id(old) not in moved:
                    new = torch.empty_like(old.data)
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=old.requires_grad)
                    moved[id(old)] = (new, old)
                store[name] = moved[id(old)][0]


def measure(dataset: str, folder: Path, planner: str, trainer: str) -> dict[str, Any]:
    """What is planned, and the peak of its step."""
    target, plans, configuration = make_plans(dataset, planner, folder)
    step = Step(trainer, plans, configuration, json.loads((folder / dataset / "dataset.json").read_text()))
    return {
        "planner": planner,
        "target_gb": target,
        "patch": list(map(int, configuration.patch_size)),
        "batch": int(configuration.batch_size),
        "peak_gb": round(step.peak_bytes() / 1e9, 2),
    }


def contenders(encoder: str) -> dict[str, tuple[str, str]]:
    """Name -> planner and trainer of nnU-Net's own network, and of every backbone with every head."""
    from nnunet_multimodal.lookup import COMBINATIONS, PLANNERS

    trainers = {parts: trainer for trainer, parts in COMBINATIONS.items()}
    stock = f"nnUNetPlanner{encoder}" if encoder else "ExperimentPlanner"
    return {
        STOCK: (stock, "nnUNetTrainer"),
        **{
            f"{backbone}, {head}": (planner, trainers[backbone, head, False])
            for planner, (backbone, head, own) in PLANNERS.items()
            if own == encoder and head in HEADS
        },
    }


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--encoders", nargs="+", default=["plain", "ResEncM"], choices=list(ENCODERS))
    p.add_argument("--data", nargs="+", default=list(DATA), choices=list(DATA))
    args = p.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ |= {f"nnUNet_{name}": str(root / name) for name in ("raw", "preprocessed", "results")}
        for number, name in enumerate(args.data, 900):
            dataset = write_dataset(root, number, name)
            for encoder in args.encoders:
                found = results.setdefault(name, {})[encoder] = {}
                for title, names in tqdm(contenders(ENCODERS[encoder]).items(), desc=f"{name}, {encoder}"):
                    found[title] = measure(dataset, root / "preprocessed", *names)
                    tqdm.write(f"{name}, {encoder}, {title}: {found[title]}")
    common.write(args, "planning_target", {"cases": CASES, "data": DATA, "results": results})


if __name__ == "__main__":
    main()
