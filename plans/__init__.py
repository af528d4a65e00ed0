"""Planners that nnU-Net's commands find by name (``-pl``)."""
