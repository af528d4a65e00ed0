"""Runs the demo's steps: one progress bar, one log per command, and a clean end on an error or Ctrl-C."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from nnunet_multimodal.demo.settings import DemoError, Settings
from nnunet_multimodal.demo.steps import Step

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
_TAIL_BYTES = 1 << 16
_TAIL_LINES = 15


def run_steps(settings: Settings, steps: list[Step]) -> None:
    """Run every step that is not done.

    Raises:
        DemoError: a command failed; the message has the end of its log.
    """
    print(f"Every command below can be typed after:\n  cd {shlex.quote(str(settings.out))}")
    print(f"  export {' '.join(f'{folder}=$PWD/{folder}' for folder in FOLDERS)}\n", flush=True)
    # the elapsed time says nothing about what remains: steps differ too much
    form = "{l_bar}{bar}| {n_fmt}/{total_fmt} steps, {elapsed}{postfix}"
    # disable=None: no bar where the output is not a terminal; the lines below are enough there
    with tqdm(total=len(steps), bar_format=form, dynamic_ncols=True, disable=None) as bar, _sigterm_as_interrupt():
        for number, step in enumerate(steps, start=1):
            bar.set_postfix_str("", refresh=False)
            bar.set_description(step.name)
            done = step.is_done()
            _say(bar, f"[{number:2d}/{len(steps)}] {step.name}{': done before' if done else ''}")
            if not done:
                name = f"{number:02d}_{step.name.replace(' ', '_')}.log"
                _run_step(settings, step, settings.out / "logs" / name, bar)
            bar.update()
        bar.set_description("done")


def _say(bar: tqdm, line: str) -> None:
    """Print a line above the bar."""
    bar.write(line, file=sys.stdout)
    sys.stdout.flush()


def _run_step(settings: Settings, step: Step, log: Path, bar: tqdm) -> None:
    for path in step.makes_stale:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if step.action is not None:
        step.action()
        return
    command = [*step.command, *(step.prepare() if step.prepare is not None else ())]
    _say(bar, f"        $ {shlex.join(command)}")
    program = [_script(command[0])] if step.program is None else [sys.executable, *step.program]
    log.parent.mkdir(parents=True, exist_ok=True)
    status = _execute([*program, *command[1:]], settings, step, log, bar)
    if status != 0 or not step.is_done():
        what = f"ended with exit status {status}" if status else "ended well, but not all of its output is there"
        tail = "\n".join(f"  | {line}" for line in _read_tail(log).splitlines()[-_TAIL_LINES:])
        raise DemoError(f"{step.name} {what}. The end of its log:\n{tail}\nlog: {log}\ncommand: {shlex.join(command)}")


def _execute(argv: list[str], settings: Settings, step: Step, log: Path, bar: tqdm) -> int:
    """Run a program in a session of its own, so that its workers end with it; returns the exit status."""
    training = step.progress is not None
    with log.open("wb") as output:
        process = subprocess.Popen(
            argv,
            cwd=settings.out,
            env=environment(settings, training),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while True:
                try:
                    return process.wait(timeout=1)
                except subprocess.TimeoutExpired:
                    if step.progress is not None:
                        bar.set_postfix_str(step.progress(_read_tail(log)), refresh=False)
                    bar.refresh()  # moves the elapsed time on
        finally:
            _end(process)


def environment(settings: Settings, training: bool) -> dict[str, str]:
    """Environment variables of nnU-Net's commands; what the user has set stays, except nnU-Net's three folders."""
    env = {**os.environ, **{folder: str(settings.out / folder) for folder in FOLDERS}, "PYTHONUNBUFFERED": "1"}
    if settings.device == "cpu":
        env.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads that spin slow a shared machine down tenfold
        env.setdefault("nnUNet_npp", "1")
        env.setdefault("nnUNet_nps", "1")
    if settings.data is None or settings.device == "cpu":
        env.setdefault("nnUNet_def_n_proc", "1" if settings.data is None else "2")
        env.setdefault("nnUNet_n_proc_DA", "0")
        env.setdefault("nnUNet_compile", "f")  # would take longer than the training
    if not training and env.get("nnUNet_n_proc_DA") == "0":
        env["nnUNet_n_proc_DA"] = "1"  # nnU-Net's planning fails with 0
    return env


def _script(command: str) -> str:
    """The script that pip installed for a command, beside the Python that runs us.

    Raises:
        DemoError: there is none.
    """
    folders = [str(Path(sys.executable).parent), sysconfig.get_path("scripts")]
    found = shutil.which(command, path=os.pathsep.join(folders)) or shutil.which(command)
    if found is None:
        package = "nnunetv2" if command.startswith("nnUNet") else "nnunet-multimodal"
        raise DemoError(f"{command} is not in {' or '.join(folders)}; install it with: pip install {package}")
    return found


def _read_tail(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        return file.read().decode(errors="replace").replace("\r", "\n")


def _end(process: subprocess.Popen) -> None:
    """End the program and its workers, politely at first; nothing remains to be done after a normal end."""
    if process.poll() is None:
        for kind in (signal.SIGINT, signal.SIGTERM):
            _signal(process, kind)
            try:
                process.wait(timeout=5)
                break
            except subprocess.TimeoutExpired:
                continue
    if process.poll() != 0:
        _signal(process, getattr(signal, "SIGKILL", signal.SIGTERM))
        process.wait()


def _signal(process: subprocess.Popen, kind: signal.Signals) -> None:
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):  # all gone
            os.killpg(process.pid, kind)
    else:
        process.terminate()


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Let a termination (a batch system, a closed terminal) end the commands as Ctrl-C does: they would live on."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kinds = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    previous = [signal.signal(kind, interrupt) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in zip(kinds, previous, strict=True):
            signal.signal(kind, handler)
