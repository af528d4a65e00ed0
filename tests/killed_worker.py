"""One of nnU-Net's commands or ours, killed with all its workers half way through a file.

KILL_AT: "replace 3" kills before the third file takes its place, "pickle 2" in the second case that is preprocessed.
Spawned workers import this file as well.
"""

import os
import signal
import sys
from importlib.metadata import entry_points
from pathlib import Path

from nnunetv2.training.dataloading import nnunet_dataset

WHERE, NUMBER = os.environ["KILL_AT"].split()
counted = []
replace, write_pickle = Path.replace, nnunet_dataset.write_pickle


def last(file):
    """Counts; the last file that is written is cut in half, and nothing happens after it."""
    counted.append(file)
    if len(counted) == int(NUMBER):
        Path(file).write_bytes(Path(file).read_bytes()[: Path(file).stat().st_size // 2])
        os.killpg(0, signal.SIGKILL)


def counting_replace(self, target):
    last(self)
    return replace(self, target)


def counting_pickle(content, file):
    write_pickle(content, file)
    last(file)


if WHERE == "replace":
    Path.replace = counting_replace
else:
    nnunet_dataset.write_pickle = counting_pickle

if __name__ == "__main__":
    (script,) = entry_points(group="console_scripts", name=sys.argv.pop(1))
    sys.exit(script.load()())
