"""Planners for small trainings: nnU-Net's own network, narrower and with smaller patches.

Every trainer, stock or ours, can use their plans. Patch and batch size follow ``-gpu_memory_target`` on nnU-Net's
scale. A coarser grid helps as much: ``-overwrite_target_spacing 4 3 3``.
"""

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner


class nnUNetPlannerCPU(ExperimentPlanner):
    """Half of nnU-Net's width, patches of about 48 x 48 x 48 at batch 2: about a second per step on a CPU.

    Plans ``nnUNetCPUPlans``.
    """

    base_num_features = 16

    def __init__(
        self,
        dataset_name_or_id,
        gpu_memory_target_in_gb=0.2,
        preprocessor_name="DefaultPreprocessor",
        plans_name="nnUNetCPUPlans",
        **kwargs,
    ):
        super().__init__(dataset_name_or_id, gpu_memory_target_in_gb, preprocessor_name, plans_name, **kwargs)
        self.UNet_base_num_features = self.base_num_features
        self.UNet_max_features_2d = self.UNet_max_features_3d = 8 * self.base_num_features
        self.max_dataset_covered = 1  # a small dataset would otherwise shrink the batch


class nnUNetPlannerTiny(nnUNetPlannerCPU):
    """A quarter of nnU-Net's width, patches of about 32 x 32 x 32: for the demonstration and for tests.

    Plans ``nnUNetTinyPlans``.
    """

    base_num_features = 8

    def __init__(
        self,
        dataset_name_or_id,
        gpu_memory_target_in_gb=0.03,
        preprocessor_name="DefaultPreprocessor",
        plans_name="nnUNetTinyPlans",
        **kwargs,
    ):
        super().__init__(dataset_name_or_id, gpu_memory_target_in_gb, preprocessor_name, plans_name, **kwargs)
