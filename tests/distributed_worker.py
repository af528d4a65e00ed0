"""``nnunet-multimodal train`` as torchrun starts it, on given batches, and with what it did written down.

WORKER_FOLDER: ``batches.pt`` is read there and ``rank0.pt`` written, unless batches are nnU-Net's own.
WORKER_KILL: "epoch rank", where a process kills itself.
"""

import itertools
import multiprocessing
import os
import signal
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import torch
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from torch import distributed

from nnunet_multimodal.cli import entry_point
from nnunet_multimodal.network import unwrap
from nnunet_multimodal.trainer import MultimodalTrainer


def given_batches(trainer):
    """Every process takes its part of batches that are the same for any number of processes."""
    rank, size = (distributed.get_rank(), distributed.get_world_size()) if trainer.is_ddp else (0, 1)
    batches = torch.load(Path(os.environ["WORKER_FOLDER"]) / "batches.pt", weights_only=False)
    own = [
        {
            "data": batch["data"][rank::size],
            "target": [level[rank::size] for level in batch["target"]],
            "keys": batch["keys"][rank::size],
        }
        for batch in batches
    ]
    return itertools.cycle(own), itertools.cycle(own)


def main():
    folder = Path(os.environ.get("WORKER_FOLDER", "."))
    kill = tuple(map(int, os.environ.get("WORKER_KILL", "-1 -1").split()))
    train_step, train_end = MultimodalTrainer.train_step, MultimodalTrainer.on_train_end
    done = {"losses": [], "absent": []}

    def step(self, batch):
        if (self.current_epoch, self.local_rank) == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        dropout = self.dropout

        def dropping(data, *more):
            dropped = dropout(data, *more)
            done["absent"].append(dropped.isnan().flatten(2).all(2))
            return dropped

        self.dropout = dropout and dropping
        result = train_step(self, batch)
        self.dropout = dropout
        done["losses"].append(float(result["loss"]))
        return result

    def end(self):
        train_end(self)
        done["weights"] = unwrap(self.network).state_dict()
        torch.save(done, folder / f"rank{self.local_rank}.pt")

    MultimodalTrainer.train_step, MultimodalTrainer.on_train_end = step, end
    initialize = MultimodalTrainer.initialize

    def save_every_epoch(self):
        initialize(self)
        self.save_every = 1

    MultimodalTrainer.initialize = save_every_epoch
    # nnU-Net's plots and the imports of its spawned workers take longer than all the rest
    LocalLogger.plot_progress_png = lambda self, folder: None
    multiprocessing.get_context = lambda method=None: SimpleNamespace(Pool=ThreadPool)
    if (folder / "batches.pt").is_file():
        MultimodalTrainer.get_dataloaders = given_batches
    sys.argv[0] = "nnunet-multimodal"
    entry_point()


if __name__ == "__main__":
    main()
