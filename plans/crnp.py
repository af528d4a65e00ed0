"""Planners for CRNP: nnU-Net's own, with patch and batch size for one encoder pass per modality."""

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncL,
    nnUNetPlannerResEncM,
    nnUNetPlannerResEncXL,
)

from nnunet_multimodal.planning import MultimodalPlannerMixin


class nnUNetPlannerCRNP(MultimodalPlannerMixin, ExperimentPlanner):
    """Plain encoders, 8 GB; plans ``nnUNetCRNPPlans``."""

    backbone = "crnp"

    def __init__(
        self,
        dataset_name_or_id,
        gpu_memory_target_in_gb=8,
        preprocessor_name="DefaultPreprocessor",
        plans_name="nnUNetCRNPPlans",
        **kwargs,
    ):
        super().__init__(dataset_name_or_id, gpu_memory_target_in_gb, preprocessor_name, plans_name, **kwargs)


class nnUNetPlannerCRNPResEncM(MultimodalPlannerMixin, nnUNetPlannerResEncM):
    """Residual encoders, 8 GB; plans ``nnUNetCRNPResEncMPlans``."""

    backbone = "crnp"

    def __init__(
        self,
        dataset_name_or_id,
        gpu_memory_target_in_gb=8,
        preprocessor_name="DefaultPreprocessor",
        plans_name="nnUNetCRNPResEncMPlans",
        **kwargs,
    ):
        super().__init__(dataset_name_or_id, gpu_memory_target_in_gb, preprocessor_name, plans_name, **kwargs)


class nnUNetPlannerCRNPResEncL(MultimodalPlannerMixin, nnUNetPlannerResEncL):
    """Residual encoders, 24 GB; plans ``nnUNetCRNPResEncLPlans``."""

    backbone = "crnp"

    def __init__(
        self,
        dataset_name_or_id,
        gpu_memory_target_in_gb=24,
        preprocessor_name="DefaultPreprocessor",
        plans_name="nnUNetCRNPResEncLPlans",
        **kwargs,
    ):
        super().__init__(dataset_name_or_id, gpu_memory_target_in_gb, preprocessor_name, plans_name, **kwargs)


class nnUNetPlannerCRNPResEncXL(MultimodalPlannerMixin, nnUNetPlannerResEncXL):
    """Residual encoders, 40 GB; plans ``nnUNetCRNPResEncXLPlans``."""

    backbone = "crnp"

    def __init__(
        self,
        dataset_name_or_id,
        gpu_memory_target_in_gb=40,
        preprocessor_name="DefaultPreprocessor",
        plans_name="nnUNetCRNPResEncXLPlans",
        **kwargs,
    ):
        super().__init__(dataset_name_or_id, gpu_memory_target_in_gb, preprocessor_name, plans_name, **kwargs)
