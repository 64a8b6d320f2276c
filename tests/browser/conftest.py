"""One browser for each module of tests."""

from collections.abc import Iterator
from typing import Any

import pytest
from support.browsers import opened_browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with opened_browser() as opened:
        yield opened
