"""Fixtures: tiny real nnU-Net datasets, made once per session through nnU-Net's own commands."""

import os

# before torch and nnU-Net are imported: spin-waiting threads make tiny steps many times slower
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("nnUNet_def_n_proc", "1")
os.environ.setdefault("nnUNet_compile", "f")

from multiprocessing.pool import ThreadPool
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.documented import ROOT, Documented
from tests.nnunet import NnUNet, make_dataset

torch.set_num_threads(1)

REAL_DATA = Path(os.environ.get("NNUNET_MULTIMODAL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def datasets(tmp_path_factory):
    """Planned and preprocessed datasets by kind of labels; made at first use."""
    made: dict[str, NnUNet] = {}

    def get(kind: str) -> NnUNet:
        if kind not in made:
            made[kind] = make_dataset(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return get


@pytest.fixture(scope="session", autouse=True)
def small_fingerprints():
    """nnU-Net draws 1e8 intensities for a fingerprint, however few there are: seconds for nothing in every dataset."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

    initialise = DatasetFingerprintExtractor.__init__

    def with_fewer_samples(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        self.num_foreground_voxels_for_intensitystats = 1e5

    with mock.patch.object(DatasetFingerprintExtractor, "__init__", with_fewer_samples):
        yield


@pytest.fixture(scope="session", autouse=True)
def threads_match_file_names():
    """nnU-Net forks 12 processes to match file names, in every training and prediction; threads do it here."""
    with mock.patch("nnunetv2.utilities.utils.Pool", ThreadPool):
        yield


@pytest.fixture(autouse=True)
def few_progress_plots(request):
    """nnU-Net's 30 x 54 inch plot of every epoch takes longer than the epoch; tests marked ``plots`` have it drawn."""
    if request.node.get_closest_marker("plots"):
        yield
    else:
        # nnU-Net's zip export wants the file
        quick = mock.patch(
            "nnunetv2.training.logging.nnunet_logger.LocalLogger.plot_progress_png",
            lambda self, folder: Path(folder, "progress.png").touch(),
        )
        with quick:
            yield


@pytest.fixture
def documented(request):
    """The commands that pages say the test runs; at its end it must have run them all."""
    test = f"{request.path.relative_to(ROOT).as_posix()}::{request.node.originalname}"
    documented = Documented(test)
    assert documented.left, f"no page names {test}"
    yield documented
    assert not documented.left, f"{test} did not run {documented.left}"


@pytest.fixture
def real_data():
    """The folder of real data sets; skips where it is not there."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"real data not found at {REAL_DATA}; set NNUNET_MULTIMODAL_DATA")
    return REAL_DATA
