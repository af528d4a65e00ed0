"""What README and docs say exists: links lead somewhere, options are those of the code."""

import inspect
import pkgutil
import re
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import torch

import nnunet_multimodal
from nnunet_multimodal import lookup
from nnunet_multimodal.backbones import BACKBONES
from nnunet_multimodal.backbones.ciml import CIMLBackbone
from nnunet_multimodal.backbones.crnp import CRNPBackbone, CRNPFusion
from nnunet_multimodal.backbones.shaspec import ShaSpecBackbone
from nnunet_multimodal.heads.mose import MoSEHead
from nnunet_multimodal.heads.ssn import SSNHead
from tests.contracts import NetworkContract
from tests.documented import DOCS, PAGES, ROOT, load, without_blocks

# --- links


@cache
def anchors(page: Path) -> set[str]:
    text = without_blocks(page)
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


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`\n]+`", "", without_blocks(page))
    for target, anchor in re.findall(r"\]\((?![a-z]+:)([^)#\s]*)(?:#([^)\s]*))?\)", text):
        file = page.parent / target if target else page
        assert file.exists(), f"{page}: {target}"
        if anchor.startswith("nnunet_multimodal."):
            assert is_documented(file, anchor), f"{page}: {target}#{anchor}"
        elif anchor:
            assert anchor in anchors(file), f"{page}: {target}#{anchor}; there are {sorted(anchors(file))}"


# --- what pages say of the code


RESOLVED = "has_regions"  # by the trainer: no option


def defaults(*constructors: object) -> dict[str, str]:
    parameters = [p for c in constructors for p in inspect.signature(c).parameters.values()]
    found = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty and p.name != RESOLVED}
    return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in found.items()}


@pytest.mark.parametrize(
    ("page", "constructors"),
    [
        ("methods/crnp", (CRNPBackbone, CRNPFusion)),
        ("methods/ssn", (SSNHead,)),
        ("methods/shaspec", (ShaSpecBackbone,)),
        ("ciml", (CIMLBackbone,)),
        ("mose", (MoSEHead,)),
    ],
)
def test_options_are_those_of_the_code(page, constructors):
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    section = text.split("## Options")[1].split("\n## ")[0]
    said = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", section, re.MULTILINE))
    expected = defaults(*constructors)
    assert said.keys() == expected.keys()
    for name, default in expected.items():
        assert default == "None" or said[name] == f"`{default}`", name


PACKAGES = "backbones", "heads", "metrics", "inference", "evaluate", "raters", "datasets", "dicom", "report", "explain"


@pytest.mark.parametrize("package", PACKAGES)
def test_api_page_has_all_modules(package):
    page = (DOCS / "reference" / "api" / f"{package}.md").read_text(encoding="utf-8")
    folder = Path(nnunet_multimodal.__file__).parent / package
    for module in pkgutil.iter_modules([str(folder)]):
        assert f"::: nnunet_multimodal.{package}.{module.name}\n" in f"{page}\n"


def test_api_pages_have_all_other_modules():
    pages = [page.read_text(encoding="utf-8") for page in (DOCS / "reference" / "api").glob("*.md")]
    there = {module for page in pages for module in re.findall(r"^::: nnunet_multimodal\.(\S+)$", page, re.MULTILINE)}
    modules = pkgutil.iter_modules([str(Path(nnunet_multimodal.__file__).parent)])
    public = {module.name for module in modules if not module.ispkg and not module.name.startswith("_")}
    assert public - there == set()


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
