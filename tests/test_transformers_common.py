"""Unpacks the source distribution of transformers and runs its common model tests on our model."""

import os
import re
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MISSING = {
    "__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
}
"""Modules that the common tests import and the distribution leaves out: other tests, not these."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of the distribution, from the package registry."""
    folder = tmp_path_factory.mktemp("transformers")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:"]
    command += ["--no-build-isolation", "--dest", str(folder)]
    wanted = f"transformers=={version('transformers')}"
    done = subprocess.run([*command, wanted], capture_output=True, text=True, check=False)
    archives = list(folder.glob("transformers-*.tar.gz"))
    if not archives:
        pytest.skip(f"the package registry has no {wanted}: {done.stderr[-300:]}")
    with tarfile.open(archives[0]) as archive:
        archive.extractall(folder, filter="data")
    root = archives[0].with_name(archives[0].name.removesuffix(".tar.gz"))
    for name, text in MISSING.items():
        path = root / "tests" / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_text(text)
    return root


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_common_tests_of_transformers(source: Path) -> None:
    environment = os.environ | {"HF_KNN_COMMON_SUITE": "1", "PYTHONPATH": str(source)}
    command = [sys.executable, "-m", "pytest", "tests/common_suite", "-p", "no:cacheprovider"]
    command += ["-q", "-rs", "--timeout", "600", "-o", "pythonpath=tests", "-o", "addopts="]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 120  # 138 with transformers 5.23
