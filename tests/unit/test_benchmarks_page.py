"""docs/benchmarks.md is what the committed results say."""

import json
from importlib import import_module

from tests.documented import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def test_the_page_is_up_to_date(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    page = ROOT / "docs" / "benchmarks.md"
    expected = import_module("make_page").page(RESULTS, page.parent)
    assert page.read_text(encoding="utf-8") == expected, "run python benchmarks/make_page.py"


def test_every_result_names_a_benchmark_that_is_there():
    commands = [json.loads(file.read_text()).get("command", "") for file in RESULTS.glob("*.json")]
    scripts = [command.split()[1] for command in commands if command.startswith("python benchmarks/")]
    assert len(scripts) > 20
    assert [script for script in scripts if not (ROOT / script).is_file()] == []
