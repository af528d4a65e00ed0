"""Writes ``docs/reference/commands.md`` from the parsers of all commands: ``python docs/_hooks/commands.py [FILE]``.

Parsers are made by importing the commands, and some of those import torch. So this runs where the package is installed
and its result is committed; building the site needs neither. ``tests/unit/test_docs.py`` tells when it is out of date.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "reference" / "commands.md"
INTRODUCTION = """\
# Commands

<!-- Written by python docs/_hooks/commands.py from the commands' own help; change nothing here by hand. -->

`nnunet-multimodal COMMAND`, or `python -m nnunet_multimodal COMMAND`. `COMMAND --help` prints what stands here.
nnU-Net's own commands (`nnUNetv2_train`, …) are not listed: they are nnU-Net's, and take the trainers and planners of
this package.
"""
TITLES = {"positional arguments": "arguments"}
COMMAND_WORDS = ("nnunet-multimodal ", "nnUNetv2_", "torchrun ")


def build_parser(name: str, module: str) -> argparse.ArgumentParser:
    """The parser of a command."""
    command = import_module(module)
    parser = argparse.ArgumentParser(f"nnunet-multimodal {name}", description=command.__doc__)
    command.add_arguments(parser)
    return parser


def write_page(commands: dict[str, tuple[str, str]]) -> str:
    """The page, from command -> (module, line of help)."""
    overview = [f"| [`{name}`](#{name}) | {_cell(help_)} |" for name, (_, help_) in commands.items()]
    sections = [line for name, (module, _) in commands.items() for line in _section(name, build_parser(name, module))]
    return "\n".join([INTRODUCTION, "| command | what it does |", "|---|---|", *overview, "", *sections])


def _section(title: str, parser: argparse.ArgumentParser, level: int = 2) -> Iterator[str]:
    yield from (f"{'#' * level} {title}", "", *_description(parser.description or ""))
    for group in parser._action_groups:
        hidden = (argparse._HelpAction, argparse._SubParsersAction)
        actions = [action for action in group._group_actions if not isinstance(action, hidden)]
        if actions:
            heading = TITLES.get(group.title or "", group.title)
            yield from (f"| {heading} | |", "|---|---|", *(_row(parser, action) for action in actions), "")
    yield from _description(parser.epilog or "")
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help for choice in action._choices_actions}
            for name, subparser in action.choices.items():
                subparser.description = subparser.description or helps.get(name)
                yield from _section(f"{title} {name}", subparser, level + 1)


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    formatter = parser._get_formatter()
    value = "" if action.nargs == 0 else formatter._format_args(action, _metavar(action))
    flag = " ".join(part for part in (", ".join(action.option_strings), value) if part)
    required = " (required)" if action.option_strings and action.required else ""
    return (
        f"| `{flag.replace('|', ' or ')}`{required} | {_cell(formatter._expand_help(action) if action.help else '')} |"
    )


def _metavar(action: argparse.Action) -> str:
    """As argparse has it, which differs a little between versions of Python."""
    if action.choices is not None and action.metavar is None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return str(action.metavar or (action.dest.upper() if action.option_strings else action.dest))


def _description(text: str) -> Iterator[str]:
    """A docstring as Markdown: its indented parts are code."""
    for paragraph in filter(None, text.strip().split("\n\n")):
        if all(line.startswith("  ") for line in paragraph.splitlines()):
            code = textwrap.dedent(paragraph)
            yield from (f"```{'bash' if code.startswith(COMMAND_WORDS) else 'text'}", code, "```", "")
        else:
            yield from (_escape(paragraph), "")


def _cell(text: str) -> str:
    return _escape(" ".join(text.split())).replace("|", "\\|")


def _escape(text: str) -> str:
    for character in "\\*<":
        text = text.replace(character, f"\\{character}")
    return text


if __name__ == "__main__":
    os.environ.pop("nnUNet_def_n_proc", None)  # it is the default of -np
    from nnunet_multimodal.cli import COMMANDS

    page = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    page.write_text(write_page(COMMANDS), encoding="utf-8")
    print(page)
