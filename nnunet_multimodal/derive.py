"""One plan for several methods, so that they are compared at equal patch and batch size.

  nnunet-multimodal derive -d 1 -p nnUNetPlans nnUNetCRNPPlans nnUNetMoSEPlans -o nnUNetEqualPlans
  nnUNetv2_preprocess -d 1 -plans_name nnUNetEqualPlans -c 3d_fullres
  nnUNetv2_train 1 3d_fullres 0 -p nnUNetEqualPlans -tr CRNPTrainer

Each configuration gets the smallest patch of the given plans, with the topology that was planned for it, and their
smallest batch: what fits the memory of the most demanding method fits that of the others. The network in it is
nnU-Net's own, which all of our trainers lift to theirs, so nnU-Net's trainers train with it too. It uses data that are
preprocessed already where the plans agree on how. Configurations that do not stand in all plans, or not at the same
spacing, are left out, and said.
"""

from __future__ import annotations

import argparse
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_multimodal.errors import UserError
from nnunet_multimodal.files import write_json
from nnunet_multimodal.planning import NETWORK_CLASS, OPTIONS_KEY
from nnunet_multimodal.preprocessing import PREPROCESSOR

ARCHITECTURES = "dynamic_network_architectures.architectures.unet"
OURS = ("num_image_channels", "backbone", "head", "backbone_kwargs", "head_kwargs")  # arguments beyond the topology
# what preprocessed data depend on: of the plans, and of a configuration
OF_DATASET = (
    "foreground_intensity_properties_per_channel", "transpose_forward", "transpose_backward", "image_reader_writer",
)  # fmt: skip
PREPROCESSED = (
    "spacing", "normalization_schemes", "use_mask_for_norm", "resampling_fn_data", "resampling_fn_data_kwargs",
    "resampling_fn_seg", "resampling_fn_seg_kwargs",
)  # fmt: skip

Configurations = dict[str, dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A dataset, its plans and a name."""
    parser.add_argument("-d", required=True, help="dataset name or id")
    parser.add_argument("-p", nargs="+", required=True, metavar="PLANS", help="plans identifiers, two or more")
    parser.add_argument("-o", required=True, metavar="PLANS", help="identifier of the plans to write")
    parser.add_argument("--overwrite", action="store_true", help="replace plans of that name")


def run(args: argparse.Namespace) -> int:
    """Write the plans; returns the exit status.

    Raises:
        UserError: plans that are not there or cannot be compared, or would be overwritten.
    """
    if not nnUNet_preprocessed.is_set():
        raise UserError("nnUNet_preprocessed is not set; it names the folder of plans")
    folder = Path(nnUNet_preprocessed) / maybe_convert_to_dataset_name(args.d)
    given = {name: read_plans(folder, name) for name in dict.fromkeys(args.p)}
    if len(given) < 2:
        raise UserError(f"-p {' '.join(args.p)} is one plan; give those of all methods that are to be compared")
    out = folder / f"{args.o}.json"
    if args.o in given or (out.exists() and not args.overwrite):
        raise UserError(f"{out} is there; give another name to -o" + ("" if args.o in given else " or --overwrite"))
    plans = derive(given, args.o)
    write_json(out, plans)
    for name in plans["configurations"]:
        for identifier, own in {**given, args.o: plans}.items():
            configuration = PlansManager(own).get_configuration(name)
            print(f"{name:22} {identifier:32} patch {configuration.patch_size}, batch {configuration.batch_size}")
    left_out = sorted({name for own in given.values() for name in own["configurations"]} - set(plans["configurations"]))
    if left_out:
        print(f"left out, as not in all of the plans or at different spacings: {', '.join(left_out)}")
    data = {PlansManager(plans).get_configuration(name).data_identifier for name in plans["configurations"]}
    missing = sorted(name for name in data if not (folder / name).is_dir())
    if missing:
        print(f"not preprocessed yet: {', '.join(missing)}; run nnUNetv2_preprocess -plans_name {args.o}")
    print(out)
    return 0


def read_plans(folder: Path, name: str) -> dict[str, Any]:
    """A plans file.

    Raises:
        UserError: not there, or not JSON.
    """
    file = folder / f"{name}.json"
    if not file.is_file():
        there = sorted(f.stem for f in folder.glob("*Plans*.json"))
        raise UserError(f"{file} is not there; plan it with nnUNetv2_plan_experiment. There are: {', '.join(there)}")
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not JSON ({error}); run nnUNetv2_plan_experiment again") from error


def derive(given: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """Plans of the smallest patch and batch size.

    Args:
        given: plans by identifier.
        name: identifier of the new ones.

    Raises:
        UserError: planned on different data, nothing in common, different encoders, or options of a method that
            contradict each other.
    """
    first, *others = given
    for other in others:
        different = [key for key in OF_DATASET if given[other].get(key) != given[first].get(key)]
        if different:
            raise UserError(
                f"{first} and {other} differ in {', '.join(different)}, on which preprocessed data depend: the dataset "
                "changed in between; plan all of them anew (nnUNetv2_plan_and_preprocess --clean)"
            )
    plans = deepcopy(given[first])
    plans["plans_name"] = name
    names = [n for n in plans["configurations"] if all(n in own["configurations"] for own in given.values())]
    complete = {n: {i: PlansManager(own).get_configuration(n).configuration for i, own in given.items()} for n in names}
    comparable = {n: own for n, own in complete.items() if len({_data_key(c) for c in own.values()}) == 1}
    derived = {n: smallest(n, own) for n, own in comparable.items()}
    plans["configurations"] = {n: c for n, c in derived.items() if c.get("previous_stage", n) in derived}
    for configuration in plans["configurations"].values():
        following = configuration.get("next_stage")
        following = [following] if isinstance(following, str) else following or []
        if not set(following) <= set(plans["configurations"]):
            configuration["next_stage"] = [n for n in following if n in plans["configurations"]] or None
    if not plans["configurations"]:
        raise UserError(f"{', '.join(given)} have no configuration of one spacing and preprocessing in common")
    return plans


def smallest(configuration: str, plans: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The complete configuration of several plans at the smallest of their patches and batches."""
    chosen = min(plans, key=lambda identifier: int(np.prod(plans[identifier]["patch_size"])))
    result = deepcopy(plans[chosen])
    result["batch_size"] = min(own["batch_size"] for own in plans.values())
    result["architecture"] = stock_architecture(result["architecture"])
    encoders = {stock_architecture(own["architecture"])["network_class_name"] for own in plans.values()}
    if len(encoders) > 1:
        raise UserError(
            f"{configuration} of {', '.join(plans)} has plain and residual encoders; compare like with like"
        )
    for own in plans.values():  # data that know absent modalities do for all
        if own["preprocessor_name"] == PREPROCESSOR:
            result.update({key: own[key] for key in ("preprocessor_name", "data_identifier")})
            break
    options: dict[str, Any] = {}
    for identifier, own in plans.items():
        for method, stated in own.get(OPTIONS_KEY, {}).items():
            if options.setdefault(method, stated) != stated:
                raise UserError(f"{identifier} has other options of {method!r} than the plans before it: {stated}")
    return {**result, **({OPTIONS_KEY: options} if options else {})}


def stock_architecture(architecture: dict[str, Any]) -> dict[str, Any]:
    """The architecture of a plan with nnU-Net's own network of the same topology."""
    if architecture["network_class_name"] != NETWORK_CLASS:
        return architecture
    kwargs = {key: value for key, value in architecture["arch_kwargs"].items() if key not in OURS}
    network = "ResidualEncoderUNet" if "n_blocks_per_stage" in kwargs else "PlainConvUNet"
    return {**architecture, "network_class_name": f"{ARCHITECTURES}.{network}", "arch_kwargs": kwargs}


def _data_key(configuration: dict[str, Any]) -> str:
    return json.dumps([configuration[key] for key in PREPROCESSED])
