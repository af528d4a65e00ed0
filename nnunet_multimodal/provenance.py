"""What made a result: versions and command, left beside it for whoever asks later."""

from __future__ import annotations

import json
import platform
import re
import sys
from pathlib import Path
from typing import Any

from nnunet_multimodal.doctor import installed_version
from nnunet_multimodal.files import write_json

FILE = "provenance_{command}.json"  # of results that have no JSON of their own
STARTED = "Started with: "  # in nnU-Net's training log, then JSON; for every start of a training
PACKAGES = ("nnunet-multimodal", "nnunetv2", "torch")
OF_PACKAGE = ("__main__.py", "nnunet_multimodal")  # python -m nnunet_multimodal
OF_NNUNET = re.compile(r"nnUNetv2_\w+")


def made() -> dict[str, Any]:
    """``versions`` by package, and ``command``: its words, None if no command of ours or nnU-Net's is running."""
    versions = {name: found for name in PACKAGES if (found := installed_version(name))}
    return {"versions": {"python": platform.python_version(), **versions}, "command": running_command()}


def note(folder: Path, command: str, **settings: Any) -> None:
    """Leave beside a command's results what made them."""
    write_json(folder / FILE.format(command=command), {**settings, "made": made()})


def running_command() -> list[str] | None:
    """Name and arguments of this process, as they were typed."""
    script = Path(sys.argv[0])
    name = script.name.removesuffix(".exe")
    if (script.name, script.parent.name) == OF_PACKAGE or name == "nnunet-multimodal":
        return ["nnunet-multimodal", *sys.argv[1:]]
    return [name, *sys.argv[1:]] if OF_NNUNET.fullmatch(name) else None


def log_start(trainer: Any, **known: Any) -> None:
    """A line in the log of one of nnU-Net's trainers or ours: what starts it, and what else is known of the start."""
    trainer.print_to_log_file(f"{STARTED}{json.dumps({**made(), **known})}", also_print_to_console=False)


def logged_start(log: str) -> dict[str, Any]:
    """What the lines of one training log say together, a log of one start; empty without such a line."""
    found: dict[str, Any] = {}
    for line in log.splitlines():
        _, there, text = line.partition(STARTED)
        try:
            found |= json.loads(text) if there else {}
        except ValueError:  # cut off with the training
            continue
    return found
