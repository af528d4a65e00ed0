"""The names that nnU-Net's class lookup finds here, and the length suffix that every trainer takes.

``CRNPTrainer_5epochs`` is ``CRNPTrainer`` with ``num_epochs = 5``, for any number, without a class per length.
``_100iterations`` after it (or alone) sets the iterations of an epoch as well, a fifth as many for its validation,
which is nnU-Net's own ratio. nnU-Net's trainers take the second suffix too, so that a comparison can give every
trainer the same, short schedule: ``nnUNetTrainer_12epochs_100iterations``.
"""

import itertools
import re
from collections.abc import Callable
from importlib import import_module

TRAINERS = "nnunetv2.training.nnUNetTrainer"
PLANNING = "nnunetv2.experiment_planning"
PREPROCESSING = "nnunetv2.preprocessing"

# How backbones and heads (registries in nnunet_multimodal.backbones and .heads) and modality dropout appear in the name
# of a trainer, in this order: CRNPSSNModalityDropoutTrainer. Nothing here may import torch: every start of Python reads
# this module's tables.
_BACKBONES = {"early": "", "crnp": "CRNP", "shaspec": "ShaSpec", "ciml": "CIML"}
_HEADS = {"deterministic": "", "mose": "MoSE", "ssn": "SSN", "ssn_diagonal": "SSNDiagonal"}
_MODALITY_DROPOUT = {False: "", True: "ModalityDropout"}


def _trainer_name(backbone: str, head: str, modality_dropout: bool) -> str:
    return f"{_BACKBONES[backbone]}{_HEADS[head]}{_MODALITY_DROPOUT[modality_dropout]}" or "EarlyFusion"


# trainer -> (backbone, head, whether it drops modalities)
COMBINATIONS = {
    f"{_trainer_name(*parts)}Trainer": parts for parts in itertools.product(_BACKBONES, _HEADS, _MODALITY_DROPOUT)
}

# Planners are nnU-Net's, for the memory of a backbone and a head: nnUNetPlannerCRNPSSNResEncL. Early fusion with
# nnU-Net's own head is planned by nnU-Net's.
ENCODER_PLANS = ("", "ResEncM", "ResEncL", "ResEncXL")
# planner -> (backbone, head, nnU-Net's encoder)
PLANNERS = {
    f"nnUNetPlanner{_BACKBONES[backbone]}{_HEADS[head]}{encoder}": (backbone, head, encoder)
    for backbone, head, encoder in itertools.product(_BACKBONES, _HEADS, ENCODER_PLANS)
    if (backbone, head) != ("early", "deterministic")
}

# The package that nnU-Net searches -> our class -> our module.
CLASSES: dict[str, dict[str, str]] = {
    TRAINERS: dict.fromkeys(COMBINATIONS, "nnunet_multimodal.trainers.combinations"),
    PLANNING: {
        **dict.fromkeys(PLANNERS, "nnunet_multimodal.plans.combinations"),
        "nnUNetPlannerCPU": "nnunet_multimodal.plans.cpu",
        "nnUNetPlannerTiny": "nnunet_multimodal.plans.cpu",
        "MultimodalFingerprintExtractor": "nnunet_multimodal.preprocessing",
    },
    PREPROCESSING: {"MultimodalPreprocessor": "nnunet_multimodal.preprocessing"},
}

_LENGTH = re.compile(r"(?P<base>.+?)(?:_(?P<epochs>\d+)epochs?)?(?:_(?P<iterations>\d+)iterations?)?$")
_with_length: dict[tuple[type, str], type] = {}


def find_class(name: str, package: str | None, find_stock: Callable[[str], type | None]) -> type | None:
    """Answer nnU-Net's search for a class.

    Args:
        name: class name as the user typed it, such as ``CRNPTrainer_5epochs``.
        package: dotted name of the nnU-Net package that is searched; None for a folder of ``nnUNet_extTrainer``.
        find_stock: nnU-Net's own search in that package.

    Returns:
        The class, or None where neither we nor nnU-Net have it.

    Raises:
        ValueError: a length of zero.
    """
    if package == TRAINERS:
        return _find_trainer(name, find_stock)
    ours = CLASSES.get(package or "", {})
    if name in ours:
        return getattr(import_module(ours[name]), name)
    return find_stock(name)


def _find_trainer(name: str, find_stock: Callable[[str], type | None]) -> type | None:
    length = split_length(name)
    ours = CLASSES[TRAINERS]
    if length[0] in ours:
        return getattr(import_module(ours[length[0]]), name)
    if length[2] is None:  # stock names, stock lengths: none of our business
        return find_stock(name)
    stock = find_stock(length[0])
    return None if stock is None else trainer_with_length(stock, name)


def split_length(name: str) -> tuple[str, int | None, int | None]:
    """``CRNPTrainer_5epochs_100iterations`` -> ("CRNPTrainer", 5, 100); None for a part that is not there.

    Raises:
        ValueError: a length of zero.
    """
    match = _LENGTH.match(name)
    if match is None:
        return name, None, None
    lengths = [None if match[key] is None else int(match[key]) for key in ("epochs", "iterations")]
    if 0 in lengths:
        raise ValueError(f"trainer {name!r} asks for a training of length 0; use 1 or more: {match['base']}_5epochs")
    return match["base"], lengths[0], lengths[1]


def trainer_with_length(trainer: type, name: str) -> type:
    """The subclass of ``trainer`` that a name with a length suffix stands for; the same object on every call."""
    if (trainer, name) not in _with_length:
        _, epochs, iterations = split_length(name)
        base_init: Callable[..., None] = trainer.__init__  # type: ignore[misc]

        def __init__(self, plans, configuration, fold, dataset_json, device=None):  # noqa: N807
            # nnU-Net reads the names of these parameters to save them in the checkpoint
            device = [] if device is None else [device]
            base_init(self, plans, configuration, fold, dataset_json, *device)
            if epochs is not None:
                self.num_epochs = epochs
            if iterations is not None:
                self.num_iterations_per_epoch = iterations
                self.num_val_iterations_per_epoch = max(1, iterations // 5)

        members = {"__init__": __init__, "__module__": trainer.__module__, "__doc__": trainer.__doc__}
        _with_length[trainer, name] = type(name, (trainer,), members)
    return _with_length[trainer, name]


def trainers_of_combinations(module: str, base: type) -> Callable[[str], type]:
    """A module's ``__getattr__`` (PEP 562) that makes the trainer of a combination, with or without a length suffix.

    It makes the names work wherever a trainer's module is looked into: in our lookup, in a folder of
    ``nnUNet_extTrainer`` and when a class is unpickled.

    Args:
        module: name of that module.
        base: the trainer that takes ``backbone``, ``head`` and ``modality_dropout``.
    """
    made: dict[str, type] = {}

    def __getattr__(name: str) -> type:  # noqa: N807
        combination, *length = split_length(name)
        if combination not in COMBINATIONS:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        if combination not in made:
            backbone, head, modality_dropout = COMBINATIONS[combination]
            dropping = ", dropping modalities in training" if modality_dropout else ""
            members = {
                "backbone": backbone,
                "head": head,
                "modality_dropout": modality_dropout,
                "__module__": module,
                "__doc__": f"nnU-Net's trainer with the {backbone!r} backbone and the {head!r} head{dropping}.",
            }
            made[combination] = type(combination, (base,), members)
        return made[combination] if length == [None, None] else trainer_with_length(made[combination], name)

    return __getattr__
