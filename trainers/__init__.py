"""Trainers that nnU-Net's commands find by name (``-tr``); each only names its method."""
