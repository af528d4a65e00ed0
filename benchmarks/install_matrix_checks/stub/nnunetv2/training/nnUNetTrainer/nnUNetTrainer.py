"""Stub."""  # noqa: N999


class nnUNetTrainer:
    """Stub of nnU-Net's trainer."""

    def __init__(self, plans, configuration, fold, dataset_json, device=None):
        self.num_epochs = 1000
