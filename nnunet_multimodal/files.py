"""Files that are whole or not there, whenever their writing is cut off."""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def written_beside(file: Path) -> Iterator[Path]:
    """A file beside ``file``, of this process alone, which takes its place at the end unless nothing is written."""
    beside = file.with_name(f".{file.stem}.{platform.node()}.{os.getpid()}{file.suffix}")
    try:
        yield beside
        if beside.is_file():
            beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write a text file."""
    with written_beside(file) as beside:
        beside.write_text(text)


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file, indented."""
    write_text(file, json.dumps(content, indent=2) + "\n")
