"""Planners for every backbone and head: nnU-Net's own, with patch and batch size for what these need.

Their classes are made from nnU-Net's when it asks for a name (see ``nnunet_multimodal.lookup.PLANNERS``). Plans have
the planner's name without "Planner": ``nnUNetCRNPResEncMPlans``.
"""

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncL,
    nnUNetPlannerResEncM,
    nnUNetPlannerResEncXL,
)

from nnunet_multimodal.lookup import PLANNERS
from nnunet_multimodal.planning import MultimodalPlannerMixin

# nnU-Net's encoder -> its planner and GPU memory target in GB
_STOCK = {
    "": (ExperimentPlanner, 8),
    "ResEncM": (nnUNetPlannerResEncM, 8),
    "ResEncL": (nnUNetPlannerResEncL, 24),
    "ResEncXL": (nnUNetPlannerResEncXL, 40),
}
_made: dict[str, type] = {}


def __getattr__(name: str) -> type:
    if name not in PLANNERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _made:
        backbone, head, encoder = PLANNERS[name]
        stock, memory_gb = _STOCK[encoder]
        members = {
            "backbone": backbone,
            "head": head,
            "memory_target_in_gb": memory_gb,
            "name_of_plans": f"{name.replace('Planner', '')}Plans",
            "__module__": __name__,
            "__doc__": f"nnU-Net's {stock.__name__} for the {backbone!r} backbone and {head!r} head, {memory_gb} GB.",
        }
        _made[name] = type(name, (MultimodalPlannerMixin, stock), members)
    return _made[name]
