"""What samples of a whole image cost beside its plain prediction: time and memory at BraTS's size.

A 155 x 240 x 240 image of 4 channels through nnU-Net's 3D U-Net with random weights and an SSN head of 4 classes and
rank 10. Plain prediction is nnU-Net's predictor (network and blending, no mirroring). Sampling is the same window over
48 parameters instead of 4 logits, then 20 samples. What follows (label map, probabilities, entropies, volumes and
lesions of every sample) is timed apart. Plain and sampling run in processes of their own, whose peak resident memory is
reported.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import _common as common
import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import nn
from tqdm import tqdm

from nnunet_multimodal.inference.maps import RunningMaps
from nnunet_multimodal.inference.quantities import RunningQuantities
from nnunet_multimodal.inference.sampling import SamplePredictor
from nnunet_multimodal.network import MultimodalUNet

CHANNELS, CLASSES, STAGES = 4, 4, 6
LABELS = {"background": 0, "necrosis": 1, "oedema": 2, "enhancing": 3}
STEPS = ("plain", "sampling")


def build_network(features: int) -> MultimodalUNet:
    torch.manual_seed(0)
    network = MultimodalUNet(
        CHANNELS, CLASSES, backbone="early", head="ssn", n_stages=STAGES, conv_op=nn.Conv3d,
        features_per_stage=[min(features * 2**stage, 320) for stage in range(STAGES)], kernel_sizes=[[3] * 3] * STAGES,
        strides=[[1] * 3, *[[2] * 3] * (STAGES - 1)], n_conv_per_stage=[2] * STAGES,
        n_conv_per_stage_decoder=[2] * (STAGES - 1), conv_bias=True, norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
    )  # fmt: skip
    network.apply(network.initialize)
    return network


def build_predictor(args: argparse.Namespace, cls: type[nnUNetPredictor]) -> Any:
    device = torch.device(args.device)
    predictor = cls(0.5, True, False, device.type == "cuda", device, allow_tqdm=True)
    plans = SimpleNamespace(get_label_manager=lambda _: LabelManager(LABELS, None))
    configuration = SimpleNamespace(patch_size=tuple(args.patch))
    network = build_network(args.features)
    predictor.manual_initialization(network, plans, configuration, [network.state_dict()], {}, "", None)
    return predictor


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One of ``STEPS``: seconds of its parts, and the process's peak resident memory."""
    image = torch.randn(CHANNELS, *args.size, generator=torch.Generator().manual_seed(1))
    start = perf_counter()
    seconds: dict[str, float] = {}

    def lap(name: str) -> None:
        nonlocal start
        common.synchronise(args.device)
        seconds[name] = seconds.get(name, 0.0) + perf_counter() - start
        start = perf_counter()

    if args.step == "plain":
        build_predictor(args, nnUNetPredictor).predict_logits_from_preprocessed_data(image)
        lap("network and blending")
    else:
        predictor = build_predictor(args, SamplePredictor)
        foreground = torch.ones(1, *args.size, dtype=torch.bool)
        distribution = predictor.predict_distribution(image, foreground)
        lap("network and blending")
        maps, quantities = RunningMaps(), RunningQuantities(dict(list(LABELS.items())[1:]), 1e-3)
        labels, generator = LabelManager(LABELS, None), torch.Generator(args.device).manual_seed(0)
        for logits in tqdm(distribution.draw(args.samples, generator), total=args.samples, desc="samples"):
            lap("drawing")
            probabilities = labels.apply_inference_nonlin(logits)
            segmentation = np.asarray(labels.convert_probabilities_to_segmentation(probabilities))
            lap("label maps and probabilities")
            maps.add(probabilities)
            lap("uncertainty maps")
            quantities.add(segmentation)
            lap("volumes and lesions")
        maps.maps()
        lap("uncertainty maps")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": {k: round(v, 2) for k, v in seconds.items()}, "peak_resident_bytes": peak}


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--size", type=int, nargs=3, default=[155, 240, 240])
    p.add_argument("--patch", type=int, nargs=3, default=[128, 128, 128])
    p.add_argument("--features", type=int, default=32, help="of the first stage")
    p.add_argument("--samples", type=int, default=20)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    if args.step:
        print(json.dumps(measure(args)))
        return
    results = {}
    for step in STEPS:
        done = subprocess.run(
            [sys.executable, *sys.argv, "--step", step], stdout=subprocess.PIPE, text=True, check=True
        )
        results[step] = json.loads(done.stdout.splitlines()[-1])
        print(step, results[step], flush=True)
    plain = results["plain"]["seconds"]["network and blending"]
    sampled = results["sampling"]["seconds"]
    del args.step
    added = sampled["network and blending"] + sampled["drawing"] - plain
    figures = {"repeats": 1, "results": results, "sampling_adds_to_plain": round(added / plain, 3)}
    print(f"sampling adds {100 * added / plain:.0f} % to plain prediction")
    common.write(args, "ssn_predict", figures)


if __name__ == "__main__":
    main()
