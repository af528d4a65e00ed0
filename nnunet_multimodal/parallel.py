"""Work on many cases in several processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

from tqdm import tqdm


def in_parallel(function: Callable[..., Any], items: Sequence[tuple], processes: int, name: str) -> Iterator[Any]:
    """Results in the order of the items, with progress; in this process if one is enough.

    Args:
        function: that a spawned process finds by its name.
        items: its arguments, one tuple for each call.
        processes: at most; no more than there are CPUs, as each begins with importing torch.
        name: of what is done, for the progress bar.
    """
    progress = partial(tqdm, total=len(items), desc=name, unit="case")
    processes = min(processes, len(items), os.cpu_count() or 1)
    arguments = zip(*items, strict=True)
    if processes <= 1:
        yield from progress(map(function, *arguments) if items else ())
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from progress(pool.map(function, *arguments))
