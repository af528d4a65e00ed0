"""Commands of README and docs parse, and each is run by a test or marked why not."""

import argparse
import ast
import itertools
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from unittest import mock

import nnunetv2
import pytest

from nnunet_multimodal import lookup
from nnunet_multimodal.cli import COMMANDS
from nnunet_multimodal.dicom import SYNTAX
from nnunet_multimodal.sheets import KINDS
from tests.documented import (
    BLOCK,
    GENERATED,
    OURS,
    PAGES,
    PROGRAM,
    ROOT,
    SHELL,
    Command,
    Documented,
    begins,
    blocks_of,
    commands_in,
    flags,
    is_synopsis,
    load,
    without_blocks,
)

SEARCHED = {
    "tr": lookup.TRAINERS,
    "pl": lookup.PLANNING,
    "fpe": lookup.PLANNING,
    "preprocessor_name": lookup.PREPROCESSING,
}
generator = load("docs/_hooks/commands.py")
of_each_page = pytest.mark.parametrize("page", PAGES)

# --- they parse


@cache
def parser_of(command: str, subcommand: str = "") -> argparse.ArgumentParser:
    """Of ours, of nnU-Net's (by starting it up to where it parses) or of torchrun."""
    if command == OURS:
        return generator.build_parser(subcommand, COMMANDS[subcommand][0])
    if command == "torchrun":
        return import_module("torch.distributed.run").get_args_parser()
    (entry,) = (entry for entry in entry_points(group="console_scripts") if entry.name == command)

    parsers = []

    def stop(self, *args):
        parsers.append(self)
        raise SystemExit

    reads = {"parse_args": stop, "parse_known_args": stop}
    with mock.patch.multiple(argparse.ArgumentParser, **reads), pytest.raises(SystemExit):
        entry.load()()
    return parsers[0]


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    nested = (flags_of(subparser) for action in inner for subparser in action.choices.values())
    return set(parser._option_string_actions).union(*nested)


def exists(name: str, package: str) -> bool:
    """A class that nnU-Net finds there: ours, or in one of its files (its own search imports all of them)."""
    names = {name, lookup.split_length(name)[0]}
    files = Path(nnunetv2.__path__[0]).joinpath(*package.split(".")[1:]).rglob("*.py")
    stock = re.compile(rf"^class ({'|'.join(names)})\(", re.MULTILINE)
    return bool(names & lookup.CLASSES[package].keys()) or any(stock.search(f.read_text("utf-8")) for f in files)


def check(command: Command, whole: bool = True, exported: dict[str, str] | None = None) -> None:
    """Raise an AssertionError unless a command of ours, nnU-Net's or torchrun parses; others are not looked at.

    Variables have the value that is exported, or 1, and so do numbers that the reader is to fill in. Of a synopsis or
    a part of a command, only the flags must exist.
    """
    words = iter(command)
    program = next((word for word in words if PROGRAM.fullmatch(word)), None)
    if program is None:
        return
    values = {"ID": "1", "I": "1", "N": "1"}
    rest = [re.sub(r"\$\{?(\w+)\}?", lambda name: (exported or {}).get(name[1], "1"), values.get(w, w)) for w in words]
    subcommand = [rest.pop(0)] if program == OURS and rest else []
    assert not subcommand or subcommand[0] in COMMANDS, f"{subcommand[0]!r} is not a command"
    if not whole or is_synopsis(" ".join(command)):
        rest = [word.strip("[]") for word in rest]
        own = rest[: rest.index("--")] if "--" in rest else rest
        unknown = flags(own) - flags_of(parser_of(program, *subcommand))
        assert not unknown, f"{' '.join(command)}: there is no {unknown}"
        check(tuple(rest[len(own) :]), whole=False)  # submit
        return
    with mock.patch.object(
        argparse.ArgumentParser, "error", lambda self, message: pytest.fail(f"{command}: {message}")
    ):
        args = parser_of(program, *subcommand).parse_args(rest)
    for option, package in SEARCHED.items():
        value = getattr(args, option, None)
        for name in [value] if isinstance(value, str) else value or []:
            assert exists(name, package), f"{command}: no class {name}"
    if subcommand == ["submit"]:
        check(tuple(word.replace("{}", "0") for word in args.argv if word != "--"))
    if program == "torchrun":
        assert (args.module, args.training_script) == (True, "nnunet_multimodal")
        check((OURS, *args.training_script_args))


@of_each_page
def test_commands_in_code_blocks_parse(page):
    exported = dict(re.findall(r"^export (\w+)=(\S+)$", PAGES[page].read_text(encoding="utf-8"), re.MULTILINE))
    for block in blocks_of(page):
        for command in commands_in(block.code):
            check(command, exported=exported)


@of_each_page
def test_blocks_are_shell(page):
    lines = [line for block in blocks_of(page) for line in block.code.splitlines() if not is_synopsis(line)]
    result = subprocess.run([shutil.which("bash"), "-n"], input="\n".join(lines), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@of_each_page
def test_flags_in_sentences_exist(page):
    for words in in_sentences(page):
        check((OURS, *words) if words[0] in COMMANDS else words, whole=False)


def in_sentences(page: str) -> list[Command]:
    """Commands of ours and nnU-Net's, or parts of them, outside of blocks; ours also without their program."""
    codes = [tuple(code.split()) for code in re.findall(r"`([^`]+)`", without_blocks(PAGES[page]))]
    ours = [words for words in codes if words[0] in COMMANDS and words[1:2] and words[1].startswith("-")]
    return ours + [words for words in codes if PROGRAM.fullmatch(words[0]) and words[1:] not in [(), ("COMMAND",)]]


def test_a_wrong_command_is_found():
    for wrong in (
        "nnunet-multimodal predict -i images --no_such_flag",
        "nnUNetv2_train 1 3d_fullres 0 -tr NoSuchTrainer",
        "nnUNetv2_train 1 3d_fullres 0 --no_such_flag",
        "cd folder && nnunet-multimodal submit --array 5 -- nnUNetv2_train 1 3d_fullres {} -tr NoSuchTrainer",
        "torchrun --nnodes 2 -m nnunet_multimodal train 1 3d_fullres",
    ):
        *_, command = commands_in(wrong)
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            check(command)


def test_extras_that_are_named_exist():
    (extras,) = re.findall(
        r"^\[project.optional-dependencies\]\n(.*?)^\[", (ROOT / "pyproject.toml").read_text(), re.M | re.S
    )
    there = set(re.findall(r"^(\w+) = \[", extras, re.M))
    for name, page in PAGES.items():
        for named in re.findall(r"(?:\.|nnunet-multimodal)\[([a-z,]+)\]", page.read_text(encoding="utf-8")):
            assert set(named.split(",")) <= there, (name, named)


def test_the_page_of_commands_is_up_to_date(tmp_path):
    """Otherwise: python docs/_hooks/commands.py."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet_")}
    script = [sys.executable, generator.__file__, tmp_path / "commands.md"]
    subprocess.run(script, env=environment, check=True, capture_output=True)
    assert generator.PAGE.read_text(encoding="utf-8") == (tmp_path / "commands.md").read_text(encoding="utf-8")


def test_the_page_of_commands_has_all_of_the_help():
    """Actions with what they do, what stands below their flags, and tables that stay tables."""
    page = generator.PAGE.read_text(encoding="utf-8")
    assert "```text\n\n```" not in page
    assert "\n### dicom list\n\nthe series of a tree of files\n" in page
    assert generator._escape(SYNTAX) in page.split("\n### dicom import\n")[1].split("\n### ")[0]
    table = page.split("\n## sheets\n")[1].split("```text\n")[1].split("\n```")[0].splitlines()
    assert [line.split()[0] for line in table if not line.startswith(" ")] == list(KINDS)


# --- a test runs them, or the page says why not


@of_each_page
def test_every_block_names_its_test_or_says_why_not(page):
    text = PAGES[page].read_text(encoding="utf-8")
    for block in [] if page == GENERATED else blocks_of(page):
        assert len(block.tests) == (0 if "" in block.not_run else 1), f"{page}: no comment fits\n{block.code}"
        for beginning in block.not_run:
            commands = commands_in(block.code)
            assert any(begins(command, beginning) for command in commands), f"{page}: no {beginning}\n{block.code}"
        for file, name in (test.split("::") for test in block.tests):
            assert "documented" in arguments_of(ROOT / file).get(name, ()), f"{page}: {name} does not run its blocks"
    found = len(re.findall("<!-- (?:test|not run)", text))
    assert found == sum(len(block.comments) for block in blocks_of(page)), f"{page}: a comment is not above a block"


@cache
def arguments_of(file: Path) -> dict[str, list[str]]:
    """Test -> its fixtures."""
    functions = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)]
    return {function.name: [argument.arg for argument in function.args.args] for function in functions}


@of_each_page
def test_other_code_holds_no_commands(page):
    """Blocks of no or another language, and indented lines."""
    text = PAGES[page].read_text(encoding="utf-8")
    code = "".join(block["code"] for block in BLOCK.finditer(text) if block["language"] not in SHELL)
    indented = re.findall(r"^ {4}.*$", without_blocks(PAGES[page]), re.MULTILINE)
    for line in [*code.splitlines(), *indented]:
        assert not PROGRAM.fullmatch(line.strip().partition(" ")[0]), f"{page}: {line}"


def test_a_command_that_is_not_run_is_found():
    documented = Documented("tests/unit/test_postprocess.py::test_documented_commands")

    def without_its_last_flag(command):
        argparse.ArgumentParser(OURS).parse_known_args(command[1:-2])

    for shell in (lambda command: None, without_its_last_flag):
        with pytest.raises(AssertionError, match="was not run"):
            documented.run(shell)
    with pytest.raises(AssertionError, match="ended with status 1"):
        documented.run(lambda command: 1)
    assert len(documented.left) == 2


def test_commands_of_sentences_and_of_the_generated_page_stand_in_blocks():
    """The same program with at least the same flags, in a block that is run or says why not."""
    blocks = [block for page in PAGES if page != GENERATED for block in blocks_of(page)]
    known = [call for block in blocks for command in commands_in(block.code) for call in calls_in(command)]
    others = [(GENERATED, command) for block in blocks_of(GENERATED) for command in commands_in(block.code)]
    others += [(page, words) for page in PAGES for words in in_sentences(page)]
    for page, command in others:
        for program, own in calls_in(command):
            fits = any(program == name and own <= there for name, there in known)
            assert fits, f"{page}: {' '.join(command)} stands in no block with all of its flags"


def calls_in(command: Command) -> list[tuple[str, set[str]]]:
    """A program with our command, if it is ours, and its flags; of submit and torchrun also what they start."""
    words = [OURS if word == "nnunet_multimodal" else word for word in command]
    starts = [index for index, word in enumerate(words) if PROGRAM.fullmatch(word)]
    parts = [words[start:end] for start, end in itertools.pairwise([*starts, len(words)])]
    return [(" ".join(part[: 2 if part[0] == OURS else 1]), flags(part)) for part in parts]
