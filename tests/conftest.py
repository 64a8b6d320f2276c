"""No network, and every cache in a folder of its own.

The Hub libraries read their variables when they are imported, so these are set before that.
"""

import atexit
import gc
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.long_runs import pytest_addoption, pytest_configure  # noqa: F401, hooks
from tqdm import tqdm

_CACHE = tempfile.mkdtemp(prefix="hf-knn-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_DATASETS_CACHE"] = os.path.join(_CACHE, "datasets")
os.environ["HF_MODULES_CACHE"] = os.path.join(_CACHE, "modules")
os.environ["HF_EVALUATE_CACHE"] = os.path.join(_CACHE, "evaluate")
os.environ["HF_KNN_CACHE"] = os.path.join(_CACHE, "features")  # of fixtures that tests share

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also in the processes that tests start
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a thread that spins takes the core that works

# tqdm's own lock is shared with forked children: one that is killed while it holds it would leave
# every later progress bar of the parent waiting for ever
tqdm.set_lock(threading.RLock())

# the tensors here are tiny: threads only wait for each other, minutes of it on a busy machine
torch.set_num_threads(1)


# in processes of their own: see test_hub.py and test_transformers_common.py
_PLACES = {"hub": "HF_KNN_HUB_TESTS", "common_suite": "HF_KNN_COMMON_SUITE"}
collect_ignore = [folder for folder, switch in _PLACES.items() if not os.environ.get(switch)]


def pytest_collection_finish() -> None:
    """What was imported by now stays: each training collects garbage, and need not look there.

    That was most of the time of a test that trains on a few rows.
    """
    gc.collect()
    gc.freeze()


_BARS = {
    "transformers.utils.logging": "enable_progress_bar",
    "datasets.utils.tqdm": "enable_progress_bars",
}


@pytest.fixture(autouse=True)
def knn_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's features are cached; empty at first."""
    folder = tmp_path / "hf-knn-cache"
    monkeypatch.setenv("HF_KNN_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def progress_bars() -> Iterator[None]:
    """Commands hide the bars of libraries in their process, which is the next test's too."""
    yield
    for name, function in _BARS.items():
        if name in sys.modules:
            getattr(sys.modules[name], function)()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a test's datastore lies; not made yet."""
    return tmp_path / "store"


@pytest.fixture
def saved(folder: Path) -> Path:
    """The folder of a stored datastore."""
    from support.stored import make_store  # imports the Hub libraries, see above

    make_store().save(folder)
    return folder


@pytest.fixture
def without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    """No `datastore.faiss` is written."""
    monkeypatch.setattr("hf_knn.store.disk.has_faiss", lambda: False)
