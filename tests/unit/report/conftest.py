"""The study and its page, made once for all files here."""

import pytest

from nnunet_multimodal.cli import main
from tests.unit.report.study import CASES, make_study


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="session")
def rated_study(tmp_path_factory):
    """With raters, of which one does not count."""
    return make_study(tmp_path_factory.mktemp("rated"), CASES[:2], raters=True)


@pytest.fixture(scope="session")
def written(study):
    """The study's page."""
    file = study / "report.html"
    assert main(["report", str(study / "results"), "-i", str(study / "images"), "-o", str(file)]) == 0
    return file.read_text()
