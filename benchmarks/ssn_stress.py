"""A thousand training steps of SSN in half precision on data that breaks careless implementations.

Batches cycle through constant patches (no contrast at all), air (all zero), empty foreground, single-voxel labels,
labels that fill the patch and ordinary ones, under autocast with bf16 and with fp16 and gradient scaling, for softmax,
regions and an ignore label. On a CPU autocast emulates both types. Counts values that are not finite in losses,
gradients after unscaling (fp16's scaler may skip steps, as in nnU-Net; such steps are counted too) and weights.
"""

from __future__ import annotations

import argparse
from typing import Any

import _common as common
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import nn
from tqdm import tqdm

from nnunet_multimodal.network import MultimodalUNet

PATCH = (8, 16, 16)
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LABELS = {
    "softmax": ({"background": 0, "organ": 1, "lesion": 2}, None),
    "regions": ({"background": 0, "whole": [1, 2], "lesion": 2}, [1, 2]),
    "ignore": ({"background": 0, "organ": 1, "lesion": 2, "ignore": 3}, None),
}
KINDS = ("ordinary", "constant image", "air", "no foreground", "single voxel", "all foreground")


def build_network(num_classes: int) -> MultimodalUNet:
    network = MultimodalUNet(
        2, num_classes, backbone="early", head="ssn", n_stages=2, features_per_stage=[4, 8], conv_op=nn.Conv3d,
        kernel_sizes=[[3] * 3] * 2, strides=[[1] * 3, [2] * 3], n_conv_per_stage=[2, 2],
        n_conv_per_stage_decoder=[2], conv_bias=True, norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
    )  # fmt: skip
    network.apply(network.initialize)
    return network


def mean_loss(labels: LabelManager) -> nn.Module:
    """nnU-Net's loss, as its trainer builds it."""
    dice = {"batch_dice": False, "do_bg": labels.has_regions, "smooth": 1e-5, "ddp": False}
    if labels.has_regions:
        return DC_and_BCE_loss({}, dice, use_ignore_label=labels.has_ignore_label)
    return DC_and_CE_loss(dice, {}, ignore_label=labels.ignore_label, dice_class=MemoryEfficientSoftDiceLoss)


def batch(kind: str, labels: LabelManager, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Image with nnU-Net's non-zero mask (2, 2 + 1, *D), and target as nnU-Net gives it."""
    organ = torch.zeros(2, 1, *PATCH, dtype=torch.long)
    organ[..., 2:6, 4:12, 4:12], organ[..., 3:5, 6:10, 6:10] = 1, 2
    image = torch.randn(2, 2, *PATCH, generator=generator) + organ
    foreground = torch.ones(2, 1, *PATCH)
    if kind == "constant image":
        image[:] = 3.0
    elif kind == "air":
        image[:], foreground[:], organ[:] = 0.0, 0.0, 0
    elif kind == "no foreground":
        organ[:] = 0
    elif kind == "single voxel":
        organ[:] = 0
        organ[..., 4, 8, 8] = 2
    elif kind == "all foreground":
        organ[:] = 2
    if labels.has_ignore_label:
        organ[..., -2:] = labels.ignore_label
    target = torch.cat((organ > 0, organ == 2), 1) if labels.has_regions else organ
    return torch.cat((image, foreground), 1), target


def not_finite(tensors: Any) -> int:
    return sum(int((~torch.isfinite(tensor)).sum()) for tensor in tensors if tensor is not None)


def stress(args: argparse.Namespace, kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """Train; returns what was not finite, the first and last losses, and the largest standard deviation seen."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    labels = LabelManager(*LABELS[kind])
    network = build_network(labels.num_segmentation_heads).to(args.device).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.99, nesterov=True, weight_decay=3e-5)
    scaler = torch.amp.GradScaler(args.device, enabled=dtype == torch.float16)
    loss_of = network.build_loss(mean_loss(labels), labels)
    found = {"losses": 0, "gradients": 0, "weights": 0, "skipped_steps": 0}
    losses, deviation = [], 0.0
    for step in tqdm(range(args.steps), desc=f"{kind}, {dtype}", leave=False, disable=None):
        image, target = (x.to(args.device) for x in batch(KINDS[step % len(KINDS)], labels, generator))
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(args.device, dtype):
            distribution = network(image).distribution
            loss = loss_of(distribution, target, 1.0)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradients = not_finite(p.grad for p in network.parameters())
        nn.utils.clip_grad_norm_(network.parameters(), 12)
        scaler.step(optimizer)
        scaler.update()
        scaled = dtype == torch.float16
        found["losses"] += not_finite([loss])
        found["gradients"] += 0 if scaled else gradients
        found["skipped_steps"] += int(scaled and gradients > 0)
        found["weights"] += not_finite(network.parameters())
        losses.append(loss.item())
        variance = distribution.cov_factor.detach().float().square().sum(1) + distribution.cov_diag.detach()
        deviation = max(deviation, variance.max().sqrt().item())
    ends = {"first": sum(losses[:50]) / 50, "last": sum(losses[-50:]) / 50}
    return {"not_finite": found, "mean_loss_of_50_steps": ends, "largest_deviation": deviation}


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--steps", type=int, default=1000)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    results = {f"{kind}, {name}": stress(args, kind, dtype) for kind in LABELS for name, dtype in TYPES.items()}
    for name, result in results.items():
        print(f"{name:16} {result}")
    common.write(args, "ssn_stress", {"repeats": 1, "patch": PATCH, "batches": KINDS, "results": results})


if __name__ == "__main__":
    main()
