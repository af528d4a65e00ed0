"""Stub."""


class ExperimentPlanner:
    """Stub of nnU-Net's planner."""
