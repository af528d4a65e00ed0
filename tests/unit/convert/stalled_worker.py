"""Our command, whose copies begin and never end. Spawned workers import this file as well."""

import time

from nnunet_multimodal import cli
from nnunet_multimodal.datasets import engine
from nnunet_multimodal.parallel import in_parallel


def take(file, output, conversion):
    output.touch()
    time.sleep(3600)


def only_writing_in_parallel(function, items, processes, name):
    """Every process imports torch anew."""
    return in_parallel(function, items, 1 if name == "check" else processes, name)


engine.take, engine.in_parallel = take, only_writing_in_parallel

if __name__ == "__main__":
    cli.entry_point()
