"""Debian's chromium for tests, which are skipped where there is none."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
_OPTIONS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


def need_browser() -> None:
    """Skips the module that calls it where there is no browser, or fails if one is required."""
    if _BROWSER is None:
        reason = "no chromium on this machine: apt-get install chromium"
        if os.environ.get("HF_KNN_REQUIRE_BROWSER") == "1":
            pytest.fail(f"HF_KNN_REQUIRE_BROWSER=1, but {reason}", pytrace=False)
        print(f"Browser tests are skipped: {reason}")
        pytest.skip(reason, allow_module_level=True)


@contextmanager
def opened_browser() -> Iterator[Any]:
    """One that is open meanwhile."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tools:
        opened = tools.chromium.launch(executable_path=_BROWSER, args=_OPTIONS)
        yield opened
        opened.close()
