"""What ShaSpec's prediction costs with one to four modalities: the encoders of absent ones are not run.

One forward pass of a patch through a network of nnU-Net's own width with random weights, as the sliding window makes
it. All contenders take turns in one process; ratios are those of neighbouring measurements.
"""

from __future__ import annotations

import statistics

import _common as common
import torch
from torch import nn

from nnunet_multimodal.network import MultimodalUNet

MODALITIES, CLASSES, STAGES = 4, 4, 6
BOUND = 0.55  # one modality against all


def build_network(features: int, backbone: str) -> MultimodalUNet:
    torch.manual_seed(0)
    network = MultimodalUNet(
        MODALITIES, CLASSES, backbone=backbone, n_stages=STAGES, conv_op=nn.Conv3d,
        features_per_stage=[min(features * 2**stage, 320) for stage in range(STAGES)], kernel_sizes=[[3] * 3] * STAGES,
        strides=[[1] * 3, *[[2] * 3] * (STAGES - 1)], n_conv_per_stage=[2] * STAGES,
        n_conv_per_stage_decoder=[2] * (STAGES - 1), conv_bias=True, norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
    )  # fmt: skip
    network.apply(network.initialize)
    return network.eval()


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--patch", type=int, nargs=3, default=[96, 96, 96])
    p.add_argument("--features", type=int, default=32, help="of the first stage")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--threads", type=int, default=2)
    args = p.parse_args()
    common.restart_with_steady_malloc()
    torch.set_num_threads(args.threads)
    shaspec = build_network(args.features, "shaspec").to(args.device)
    early = build_network(args.features, "early").to(args.device)
    x = torch.randn(1, MODALITIES, *args.patch, generator=torch.Generator().manual_seed(1))

    def predict(network: MultimodalUNet, count: int) -> None:
        data = x.clone()
        data[:, count:] = torch.nan
        with torch.inference_mode(), common.autocast(args.device):
            network(data.to(args.device))

    contenders = {f"ShaSpec, {n} of {MODALITIES}": (lambda n=n: predict(shaspec, n)) for n in range(1, MODALITIES + 1)}
    contenders["early fusion"] = lambda: predict(early, MODALITIES)
    seconds = common.interleaved(contenders, args.repeats, args.device, "forward passes")
    everything = f"ShaSpec, {MODALITIES} of {MODALITIES}"
    figures = {
        "repeats": args.repeats,
        "seconds": {name: round(statistics.median(times), 3) for name, times in seconds.items()},
        "ratio_to_all": {name: common.ratio(times, seconds[everything]) for name, times in seconds.items()},
        "bound": BOUND,
    }
    for name, times in figures["seconds"].items():
        print(f"{name:16} {times:.3f} s, {figures['ratio_to_all'][name]['median']:.2f} of all")
    common.write(args, "shaspec_inference", figures)


if __name__ == "__main__":
    main()
