"""Runs the tests of tests/hub in a process of their own, since they need another Hub."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*options: str) -> None:
    environment = os.environ | {"HF_KNN_HUB_TESTS": "1"}
    command = [sys.executable, "-m", "pytest", "tests/hub", "-p", "no:cacheprovider", *options]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_the_hub() -> None:
    run()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_hub_and_another_environment() -> None:
    run("-m", "slow", "--timeout", "3600")


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_the_hub_with_many_faults() -> None:
    run("-m", "faults", "--timeout", "3600")
