import pytest

from tests.unit.convert.trees import Result


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """nnU-Net's folders, empty."""
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    return tmp_path / "raw"


@pytest.fixture
def result(raw):
    """Opens the only data set that there is."""

    def get():
        (folder,) = raw.iterdir()
        return Result(folder)

    return get
