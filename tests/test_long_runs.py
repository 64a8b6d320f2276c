"""A long run that was stopped goes on: what passed at this state of the code is not run again."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.long_runs import ROOT, is_done, state_of

TESTS = """
import os
def test_good(): pass
def test_bad(): assert os.environ.get("MENDED")
"""


def run(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--record", "known"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")} | variables
    return subprocess.run(
        [*command, *words], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "words", [(), pytest.param(("-n", "2", "--dist", "loadfile"), marks=pytest.mark.slow)]
)
def test_what_passed_is_left_out_and_what_failed_is_not(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    hooks = "from support.long_runs import pytest_addoption, pytest_configure\n"
    (tmp_path / "conftest.py").write_text(hooks)
    (tmp_path / "test_both.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    first = run(tmp_path, *words)
    assert first.returncode == 1
    assert "1 passed, 1 failed, 0 skipped (0 of" in first.stdout
    second = run(tmp_path, *words, MENDED="yes")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "2 passed, 0 failed, 0 skipped (2 of" in second.stdout
    third = run(tmp_path, *words)  # nothing is left
    assert third.returncode == 0
    assert "2 passed" in third.stdout
    (known,) = (tmp_path / "known").glob("*.json")
    assert known.stem == state_of(ROOT)
    assert all(one["outcome"] == "passed" for one in json.loads(known.read_text()).values())


@pytest.mark.parametrize("target", ["test-slow", "faults"])
@pytest.mark.slow
def test_the_commands_of_the_makefile_work_a_second_time(tmp_path: Path, target: str) -> None:
    """A folder behind `--record` that is there must not be taken for the tests to be run."""
    recipe = re.search(rf"^{target}:.*\n\t\$\(BIN\)/python (.*)$", makefile(), re.MULTILINE)
    assert recipe is not None
    words = [*shlex.split(recipe[1]), "-n", "0", "-p", "no:cacheprovider"]
    (tmp_path / "tests").mkdir()
    hooks = "from support.long_runs import pytest_addoption, pytest_configure\n"
    (tmp_path / "tests" / "conftest.py").write_text(hooks)
    marked = "import pytest\n@pytest.mark.slow\n@pytest.mark.faults\ndef test_it(): pass\n"
    (tmp_path / "tests" / "test_one.py").write_text(marked)
    settings = "[pytest]\ntestpaths = tests\nmarkers =\n    slow: s\n    faults: f\n"
    (tmp_path / "pytest.ini").write_text(settings)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    for before in range(2):
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"1 passed, 0 failed, 0 skipped ({before} of" in done.stdout


def makefile() -> str:
    return (ROOT / "Makefile").read_text(encoding="utf-8")


def test_another_state_of_the_code_has_another_name(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "a.py").write_text("1")
    git("add", ".")
    git("commit", "-qm", "one")
    names = [state_of(tmp_path)]
    (tmp_path / "b.py").write_text("new")
    names.append(state_of(tmp_path))
    (tmp_path / "a.py").write_text("2")
    names.append(state_of(tmp_path))
    git("commit", "-qam", "two")
    names.append(state_of(tmp_path))
    assert len(set(names)) == 4
    assert len(names[0]) == 40
    with pytest.raises(pytest.UsageError, match="checkout of git"):
        state_of(Path("/"))


def test_only_a_pass_is_done() -> None:
    assert not is_done(None)
    for outcome, wanted in (("passed", True), ("failed", False), ("skipped", False)):
        assert is_done({"outcome": outcome, "seconds": 1.0, "at": ""}) == wanted
