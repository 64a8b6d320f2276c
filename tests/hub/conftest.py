"""Real clients of the Hub against a server of our own; see tests/test_hub.py, which starts these.

The libraries read their variables when they are imported, so the server starts before that, and
these tests have a process of their own.
"""

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.hub_server import TOKEN, Hub, running

assert "huggingface_hub" not in sys.modules, "too late to choose another Hub"
_HOME = tempfile.mkdtemp(prefix="hf-knn-hub-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
_SERVER = running()
_HUB, _ADDRESS = _SERVER.__enter__()
atexit.register(_SERVER.__exit__, None, None, None)
os.environ |= {
    "HF_ENDPOINT": _ADDRESS,
    "HF_TOKEN": TOKEN,
    "HF_HOME": _HOME,
    "HF_HUB_OFFLINE": "0",
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DOWNLOAD_TIMEOUT": "2",
    "HF_HUB_ETAG_TIMEOUT": "2",
}


@pytest.fixture
def hub() -> Iterator[Hub]:
    """The server, empty."""
    _HUB.reset()
    yield _HUB
    _HUB.faults.clear()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A download cache of its own."""
    return tmp_path / "downloads"


@pytest.fixture
def model() -> Any:
    """A tiny ViT with a datastore, and numbers that were measured."""
    from support.tiny import tiny_model

    found = tiny_model("vit")
    found.measured = {
        "metrics": {"eval_head_top1": 0.5, "eval_knn_top1": 0.25, "eval_blend_top1": 0.75},
        "rows": 8, "dataset": "ants & bees", "split": "test", "note": "", "reliability": [],
    }  # fmt: skip
    return found
