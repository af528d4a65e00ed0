"""Work on many cases in several processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

from tqdm import tqdm

from nnunet_multimodal.doctor import cpu_cores


def in_parallel(function: Callable[..., Any], items: Sequence[tuple], processes: int, name: str) -> Iterator[Any]:
    """Results in the order of the items, with progress; in this process if one is enough.

    Args:
        function: that a spawned process finds by its name.
        items: its arguments, one tuple for each call.
        processes: at most; no more than this process may use CPUs, as each begins with importing torch.
        name: of what is done, for the progress bar.
    """
    progress = partial(tqdm, total=len(items), desc=name, unit="case")
    processes = min(processes, len(items), cpu_cores())
    arguments = zip(*items, strict=True)
    if processes <= 1:
        yield from progress(map(function, *arguments) if items else ())
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from progress(pool.map(function, *arguments))
