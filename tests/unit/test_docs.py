"""What README and docs say exists: commands parse, links lead somewhere, options are those of the code."""

import argparse
import importlib.util
import inspect
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from unittest import mock

import nnunetv2
import pytest
import torch

import nnunet_multimodal
from nnunet_multimodal import lookup
from nnunet_multimodal.backbones import BACKBONES
from nnunet_multimodal.backbones.crnp import CRNPBackbone, CRNPFusion
from nnunet_multimodal.backbones.shaspec import ShaSpecBackbone
from nnunet_multimodal.cli import COMMANDS
from nnunet_multimodal.heads.ssn import SSNHead
from tests.contracts import NetworkContract

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *sorted(DOCS.rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
SEARCHED = {
    "tr": lookup.TRAINERS,
    "pl": lookup.PLANNING,
    "fpe": lookup.PLANNING,
    "preprocessor_name": lookup.PREPROCESSING,
}


def load(file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{Path(file).stem}", ROOT / file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # torch.compile imports it by its name
    spec.loader.exec_module(module)
    return module


generator = load("docs/_hooks/commands.py")

# --- commands


@cache
def parser_of(command: str, subcommand: str = "") -> argparse.ArgumentParser:
    """Of ours, of nnU-Net's (by starting it up to where it parses) or of torchrun."""
    if command == "nnunet-multimodal":
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


def flags(parser: argparse.ArgumentParser) -> set[str]:
    inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    nested = (flags(subparser) for action in inner for subparser in action.choices.values())
    return set(parser._option_string_actions).union(*nested)


def is_checked(word: str) -> bool:
    return word in ("nnunet-multimodal", "torchrun") or word.startswith("nnUNetv2_")


def commands_in(code: str, page: str = "") -> Iterator[tuple[list[str], bool]]:
    """Commands of ours, of nnU-Net and of torchrun in a shell script, and whether they are whole or a synopsis.

    Variables have the value that the page exports, or 1, and so do numbers that the reader is to fill in.
    """
    exported = dict(re.findall(r"^export (\w+)=(\S+)$", page, re.MULTILINE))
    code = re.sub(r"\$\{?([A-Za-z_]+)\}?", lambda match: exported.get(match[1], "1"), code.replace("\\\n", " "))
    for line in code.splitlines():
        whole = re.search(r" \[|…", line) is None
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|()" if whole else "")
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("&;|()"):
                if command:
                    yield command, whole
                command = []
            elif command or is_checked(word):
                command.append("1" if word in ("ID", "I", "N") else word if whole else word.strip("[]"))


def exists(name: str, package: str) -> bool:
    """A class that nnU-Net finds there: ours, or in one of its files (its own search imports all of them)."""
    names = {name, lookup.split_length(name)[0]}
    files = Path(nnunetv2.__path__[0]).joinpath(*package.split(".")[1:]).rglob("*.py")
    stock = re.compile(rf"^class ({'|'.join(names)})\(", re.MULTILINE)
    return bool(names & lookup.CLASSES[package].keys()) or any(stock.search(f.read_text("utf-8")) for f in files)


def check(command: list[str], whole: bool) -> None:
    """Raise an AssertionError unless the command parses or, where it is a part of one, has flags that there are."""
    ours = command[0] == "nnunet-multimodal"
    if ours:
        assert len(command) == 1 or command[1] in COMMANDS, f"{command[1]!r} is not a command"
    rest = command[1 + ours :]
    parser = parser_of(*command[: 1 + ours])
    if not whole:
        if "--" in rest:  # submit
            check(rest[rest.index("--") + 1 :], whole)
            rest = rest[: rest.index("--")]
        used = {word for word in rest if re.match(r"--?[A-Za-z]", word)}
        assert used <= flags(parser), f"{' '.join(command)}: there is no {used - flags(parser)}"
        return
    with mock.patch.object(
        argparse.ArgumentParser, "error", lambda self, message: pytest.fail(f"{command}: {message}")
    ):
        args = parser.parse_args(rest)
    for option, package in SEARCHED.items():
        value = getattr(args, option, None)
        for name in [value] if isinstance(value, str) else value or []:
            assert exists(name, package), f"{command}: no class {name}"
    if command[:2] == ["nnunet-multimodal", "submit"]:
        check([word.replace("{}", "0") for word in args.argv if word != "--"], whole=True)
    if command[0] == "torchrun":
        assert (args.module, args.training_script) == (True, "nnunet_multimodal")
        check(["nnunet-multimodal", *args.training_script_args], whole=True)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_in_code_blocks_parse(page):
    text = page.read_text(encoding="utf-8")
    for block in FENCE.finditer(text):
        if block["language"] in ("bash", "sh", "console"):
            for command, whole in commands_in(block["code"], text):
                check(command, whole)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_flags_in_sentences_exist(page):
    for code in re.findall(r"`([^`]+)`", FENCE.sub("", page.read_text(encoding="utf-8"))):
        words = code.split()
        if words and is_checked(words[0]) and len(words) > 1 and words[1] != "COMMAND":
            check(words, whole=False)
        elif len(words) > 1 and words[0] in COMMANDS and words[1].startswith("-"):
            check(["nnunet-multimodal", *words], whole=False)


def test_a_wrong_command_is_found():
    for wrong in (
        "nnunet-multimodal predict -i images --no_such_flag",
        "nnUNetv2_train 1 3d_fullres 0 -tr NoSuchTrainer",
        "nnUNetv2_train 1 3d_fullres 0 --no_such_flag",
        "cd folder && nnunet-multimodal submit --array 5 -- nnUNetv2_train 1 3d_fullres {} -tr NoSuchTrainer",
        "torchrun --nnodes 2 -m nnunet_multimodal train 1 3d_fullres",
    ):
        ((command, _),) = commands_in(wrong)
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            check(command, whole=True)


def test_extras_that_are_named_exist():
    (extras,) = re.findall(
        r"^\[project.optional-dependencies\]\n(.*?)^\[", (ROOT / "pyproject.toml").read_text(), re.M | re.S
    )
    there = set(re.findall(r"^(\w+) = \[", extras, re.M))
    for page in PAGES:
        for named in re.findall(r"(?:\.|nnunet-multimodal)\[([a-z,]+)\]", page.read_text(encoding="utf-8")):
            assert set(named.split(",")) <= there, (page, named)


def test_the_page_of_commands_is_up_to_date(tmp_path):
    """Otherwise: python docs/_hooks/commands.py."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet_")}
    script = [sys.executable, generator.__file__, tmp_path / "commands.md"]
    subprocess.run(script, env=environment, check=True, capture_output=True)
    assert generator.PAGE.read_text(encoding="utf-8") == (tmp_path / "commands.md").read_text(encoding="utf-8")


# --- links


@cache
def anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = (re.sub(r"[^\w\s-]", "", title).strip().lower() for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE))
    return {re.sub(r"[-\s]+", "-", title) for title in titles}


def is_documented(page: Path, name: str) -> bool:
    """An object of the package on one of the API's pages."""
    modules = re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    (module,) = sorted((m for m in modules if f"{name}.".startswith(f"{m}.")), key=len)[-1:] or [None]
    if module is None:
        return False
    thing: object = import_module(module)
    for part in name.removeprefix(module).split(".")[1:]:
        thing = getattr(thing, part, None)
    return thing is not None


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`\n]+`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    for target, anchor in re.findall(r"\]\((?![a-z]+:)([^)#\s]*)(?:#([^)\s]*))?\)", text):
        file = page.parent / target if target else page
        assert file.exists(), f"{page}: {target}"
        if anchor.startswith("nnunet_multimodal."):
            assert is_documented(file, anchor), f"{page}: {target}#{anchor}"
        elif anchor:
            assert anchor in anchors(file), f"{page}: {target}#{anchor}; there are {sorted(anchors(file))}"


# --- what pages say of the code


def defaults(*constructors: object) -> dict[str, str]:
    parameters = [p for c in constructors for p in inspect.signature(c).parameters.values()]
    return {p.name: str(p.default) for p in parameters if p.default is not inspect.Parameter.empty}


@pytest.mark.parametrize(
    ("page", "constructors"),
    [("crnp", (CRNPBackbone, CRNPFusion)), ("ssn", (SSNHead,)), ("shaspec", (ShaSpecBackbone,))],
)
def test_options_are_those_of_the_code(page, constructors):
    text = (DOCS / "methods" / f"{page}.md").read_text(encoding="utf-8")
    section = text.split("## Options")[1].split("\n## ")[0]
    said = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", section, re.MULTILINE))
    expected = defaults(*constructors)
    assert said.keys() == expected.keys()
    for name, default in expected.items():
        assert default == "None" or said[name] == f"`{default}`", name


@pytest.mark.parametrize("package", ["backbones", "heads", "metrics", "inference", "evaluate", "raters"])
def test_api_page_has_all_modules(package):
    page = (DOCS / "reference" / "api" / f"{package}.md").read_text(encoding="utf-8")
    folder = Path(nnunet_multimodal.__file__).parent / package
    for module in pkgutil.iter_modules([str(folder)]):
        assert f"::: nnunet_multimodal.{package}.{module.name}\n" in f"{page}\n"


def test_site_builds_without_a_warning(tmp_path):
    for module in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(module, reason="pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    example = (tmp_path / "site" / "adding-a-method.html").read_text(encoding="utf-8")
    assert ">MeanFusionBackbone<" in example
    assert ">test_a_lone_modality_is_seen_as_it_is<" in example


# --- the worked example of adding-a-method.md

mean_fusion = load("docs/examples/mean_fusion.py")


@pytest.fixture(autouse=True)
def _mean_fusion_is_registered(monkeypatch):
    monkeypatch.setitem(BACKBONES, "mean_fusion", mean_fusion.MeanFusionBackbone)


# --8<-- [start:worked_example]
class TestMeanFusion(NetworkContract):
    backbone = "mean_fusion"

    def test_the_order_of_the_modalities_does_not_matter(self):
        network = self.build().eval()
        x = self.data()
        torch.testing.assert_close(network(x[:, [2, 0, 1]])[0], network(x)[0])

    def test_a_lone_modality_is_seen_as_it_is(self):
        network = self.build().eval()
        x = self.data()
        alone = x.clone()
        alone[:, 1:] = torch.nan
        thrice = x[:, :1].expand_as(x)
        torch.testing.assert_close(network(alone)[0], network(thrice)[0])


# --8<-- [end:worked_example]


def test_names_of_the_worked_example():
    """With the line that the page shows, lookup.py has the trainers and planners that it names."""
    page = (DOCS / "adding-a-method.md").read_text(encoding="utf-8")
    assert '\n--8<-- "docs/examples/mean_fusion.py"\n' in page  # ruff would format it, but for the comments around it
    (line,) = re.findall(r"^_BACKBONES = .*$", page, re.MULTILINE)
    source, count = re.subn(r"^_BACKBONES = .*$", line, Path(lookup.__file__).read_text(), flags=re.MULTILINE)
    assert count == 1
    changed: dict = {"__name__": "changed"}
    exec(source, changed)
    assert changed["COMBINATIONS"].items() > lookup.COMBINATIONS.items()
    assert changed["COMBINATIONS"]["MeanFusionTrainer"] == ("mean_fusion", "deterministic", False)
    assert changed["COMBINATIONS"]["MeanFusionSSNModalityDropoutTrainer"] == ("mean_fusion", "ssn", True)
    assert changed["PLANNERS"]["nnUNetPlannerMeanFusionResEncL"] == ("mean_fusion", "deterministic", "ResEncL")
