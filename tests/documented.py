"""The shell commands of README and docs, and which test runs them.

Right above the fence of a block of commands stand comments that the rendered page does not show:

    <!-- test: tests/integration/test_walk.py::test_the_whole_walk -->
    <!-- not run: `pip install`: the package under test is installed already -->

The first names the test that runs the block. The second says which of its commands no test runs, by how they begin
(without such a beginning, all of the block), and why. ``tests/unit/test_documented_commands.py`` checks that the
comments are there and fit.

The test takes the fixture ``documented``, which reads its blocks from the pages, and runs them by
``documented.run(shell)``. What runs a command is the test's own: it may give other values (a data set's number, a
trainer with a length) and more flags (the CPU), but the program's parser must see every flag that the page has.
Commands in sentences and in docstrings need no test of their own where a block has the program with their flags;
programs other than ours, nnU-Net's and torchrun are not looked at there.
"""

import argparse
import importlib.util
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from types import ModuleType
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {
    str(page.relative_to(ROOT)): page
    for page in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "benchmarks" / "README.md",
        *sorted(DOCS.rglob("*.md")),
    )
}
GENERATED = "docs/reference/commands.md"  # from docstrings; its commands must be those of other pages
BLOCK = re.compile(
    r"(?P<comments>(?:^<!--[^\n]*-->\n)*)^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
COMMENT = re.compile(r"<!-- (?:test: (?P<test>\S+)|not run: (?:`(?P<beginning>[^`]+)`: )?(?P<reason>[^`]+)) -->")
OURS = "nnunet-multimodal"
PROGRAM = re.compile(rf"{OURS}|nnUNetv2_\w+|torchrun")
FLAG = re.compile(r"--?[A-Za-z]")
OPERATORS = "&;|()"
SHELL = ("bash", "sh", "console")

Command = tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """A fenced block of shell commands.

    Attributes:
        page: relative to the repository.
        code: as it stands there.
        comments: ``(test, beginning, reason)`` of each comment above it; what a comment does not have is empty.
    """

    page: str
    code: str
    comments: tuple[tuple[str, str, str], ...]

    @property
    def tests(self) -> list[str]:
        """Tests that are named."""
        return [test for test, _, _ in self.comments if test]

    @property
    def not_run(self) -> list[str]:
        """How commands begin that no test runs; the empty beginning is that of all commands."""
        return [beginning for _, beginning, reason in self.comments if reason]

    @property
    def commands(self) -> list[Command]:
        """What the test has to run."""
        return [
            command for command in commands_in(self.code) if not any(begins(command, prefix) for prefix in self.not_run)
        ]


def begins(command: Command, beginning: str) -> bool:
    """Whether a command begins with these words."""
    return list(command[: len(beginning.split())]) == beginning.split()


def commands_in(code: str) -> Iterator[Command]:
    """Commands of a shell script, as words. Variables stay as they are, and so does a synopsis (``[--flag] …``)."""
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="" if is_synopsis(line) else OPERATORS)
        lexer.whitespace_split = True
        for is_operator, words in groupby(lexer, lambda word: set(word) <= set(OPERATORS)):
            if not is_operator:
                yield tuple(words)


def is_synopsis(line: str) -> bool:
    """Whether a line says what may stand in a command, in place of one."""
    return re.search(r" \[|…", line) is not None


@cache
def blocks_of(page: str) -> list[Block]:
    """Blocks of shell commands, by their language; others are shown output or pictures."""
    return [
        Block(page, block["code"], tuple(COMMENT.findall(block["comments"])))
        for block in BLOCK.finditer(PAGES[page].read_text(encoding="utf-8"))
        if block["language"] in SHELL
    ]


def flags(command: Iterable[str]) -> set[str]:
    """The flags in a command."""
    return {word for word in command if FLAG.match(word)}


class Documented:
    """The commands of the blocks that name a test, for that test to run.

    Attributes:
        left: those that it has not run yet, in the order of the pages.
    """

    def __init__(self, test: str) -> None:
        self._blocks = [block for page in PAGES for block in blocks_of(page) if test in block.tests]
        self.left = [(block.page, command) for block in self._blocks for command in block.commands]
        self._done: list[Command] = []

    def run(self, shell: Callable[[Command], object], *pages: str, values: Mapping[str, str] | None = None) -> None:
        """Give ``shell`` the commands of these pages in this order (of all, if none is named), equal ones once.

        Args:
            shell: runs a command in this process; it raises or returns something else than 0 and None if that fails.
            pages: relative to the repository.
            values: words, and what to put in their place.

        Raises:
            AssertionError: it failed, or the program's parser did not see all flags.
        """
        commands = [(page, command) for page in pages for p, command in self.left if p == page] if pages else self.left
        for entry in commands:
            command = tuple((values or {}).get(word, word) for word in entry[1])
            if command not in self._done:
                with _parsed() as calls:
                    status = shell(command)
                assert not status, f"{shlex.join(command)} ended with status {status}"
                assert any(_is_call(command, *call) for call in calls), f"{shlex.join(command)} was not run: {calls}"
                self._done.append(command)
        self.left = [entry for entry in self.left if entry not in commands]

    def script(self) -> str:
        """All blocks as one script. Nothing but its own assertions checks that the test runs it."""
        self.left = []
        return "\n".join(block.code for block in self._blocks)


def without_blocks(page: Path) -> str:
    """The text of a page."""
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def load(file: str) -> ModuleType:
    """A file of the repository, such as ``docs/examples/mean_fusion.py``, as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{Path(file).stem}", ROOT / file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # torch.compile imports it by its name
    spec.loader.exec_module(module)
    return module


@contextmanager
def _parsed() -> Iterator[list[tuple[str, list[str]]]]:
    """The program and the arguments of every parser that is used in this process meanwhile."""
    calls = []
    parse = argparse.ArgumentParser.parse_known_args

    def record(self, args=None, namespace=None):
        calls.append((self.prog, [*(sys.argv[1:] if args is None else args)]))
        return parse(self, args, namespace)

    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", record):
        yield calls


def _is_call(command: Command, program: str, arguments: list[str]) -> bool:
    name, *rest = command
    return program == name and flags(command) <= {*arguments} and (name != OURS or rest[0] in arguments)
