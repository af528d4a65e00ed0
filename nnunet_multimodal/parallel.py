"""Work on many cases in several processes, and ends of processes that come from outside."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from nnunet_multimodal.doctor import cpu_cores
from nnunet_multimodal.errors import UserError

if sys.platform != "win32":
    import fcntl


def in_parallel(function: Callable[..., Any], items: Sequence[tuple], processes: int, name: str) -> Iterator[Any]:
    """Results in the order of the items, with progress; in this process if one is enough.

    The processes end when this one does, even if it is killed.

    Args:
        function: that a spawned process finds by its name.
        items: its arguments, one tuple for each call.
        processes: at most; no more than this process may use CPUs, as each begins with importing torch.
        name: of what is done, for the progress bar.

    Raises:
        UserError: a process was ended from outside.
    """
    progress = partial(tqdm, total=len(items), desc=name, unit="case")
    processes = min(processes, len(items), cpu_cores())
    arguments = zip(*items, strict=True)
    if processes <= 1:
        yield from progress(map(function, *arguments) if items else ())
        return
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_end_with_parent)
    try:
        yield from progress(pool.map(function, *arguments))
    except BrokenProcessPool as error:
        raise UserError(
            f"{name}: one of {processes} processes was ended from outside, as where memory is short; give a smaller -np"
        ) from error
    except (SystemExit, KeyboardInterrupt, GeneratorExit):  # nobody waits for what they are at
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Let this process end with the one that started it; a pool's processes would wait for work without end."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Let a termination (a batch system, a closed terminal) raise SystemExit, so that what is half done is removed.

    A signal that is ignored (nohup) or handled already is left alone.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    kinds = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    is_main = threading.current_thread() is threading.main_thread()  # no other may set handlers
    ours = [kind for kind in kinds if is_main and signal.getsignal(kind) is signal.SIG_DFL]
    for kind in ours:
        signal.signal(kind, leave)
    try:
        yield
    finally:
        for kind in ours:
            signal.signal(kind, signal.SIG_DFL)


@contextmanager
def alone(lock: Path, what: str) -> Iterator[None]:
    """Hold a lock file, which is removed afterwards. Its lock ends with this process, however that ends.

    On Windows there is none.

    Args:
        lock: the file; its folder is there.
        what: another process is doing then, for the error.

    Raises:
        UserError: another process holds it, or it cannot be written.
    """
    if sys.platform == "win32":
        yield
        return
    try:
        opened = lock.open("w")
    except OSError as error:
        text = f"{lock} cannot be written ({error}): {what}, by another user, is running or left it"
        raise UserError(text) from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{what} is running ({lock} is held); wait for its end") from error
        except OSError as error:  # Lustre without -o flock
            print(f"{lock.parent} has no locks ({error}): see to it that no {what} runs meanwhile", file=sys.stderr)
        if os.fstat(file.fileno()).st_nlink == 0:  # removed by its holder after it was opened here
            raise UserError(f"{what} has just ended ({lock}); start again")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
