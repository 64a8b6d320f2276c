"""What somebody gets who installs a wheel: three packages, and the demo in them."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "hf_knn", "hf_knn_cli", "space")
_BEGIN = """
import sys
from pathlib import Path
from hf_knn_space.files import begin_space
begin_space(Path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like site-packages, with the content of a wheel of this tree."""
    place = tmp_path_factory.mktemp("wheel")
    (place / "tree").mkdir()  # a copy: building leaves files beside the sources
    for source in (ROOT / name for name in _SOURCES):
        target = place / "tree" / source.name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(place), str(place / "tree")]
    subprocess.run(command, check=True, timeout=240)
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(place / "installed")
    return place / "installed"


def run(installed: Path, *arguments: str) -> str:
    """The output of Python, which sees the wheel before anything else of that name."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=installed.parent, env=environment,
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules(folder: Path) -> set[str]:
    paths = folder.rglob("*.py")
    return {str(path.relative_to(folder)) for path in paths if "space_files" not in path.parts}


def test_a_wheel_puts_three_packages_at_the_top_and_nothing_else(installed):
    tops = {path.name for path in installed.iterdir() if path.suffix != ".dist-info"}
    assert tops == {"hf_knn", "hf_knn_cli", "hf_knn_space"}
    assert len([path for path in installed.iterdir() if path.suffix == ".dist-info"]) == 1


@pytest.mark.parametrize("folder", ["hf_knn", "hf_knn_cli", "space/hf_knn_space"])
def test_no_module_is_missing_in_a_wheel(folder, installed):
    assert modules(installed / Path(folder).name) == modules(ROOT / folder)
    assert (installed / "hf_knn" / "py.typed").is_file()


def test_the_page_of_label_is_in_a_wheel(installed):
    theirs, ours = (
        {path.name: path.read_bytes() for path in (folder / "labelling" / "static").iterdir()}
        for folder in (installed / "hf_knn", ROOT / "hf_knn")
    )
    assert theirs == ours
    assert set(ours) == {"index.html", "page.css", "page.js"}


def test_the_demo_is_imported_and_says_how_to_start_it(installed):
    code = "import hf_knn_space; print(hf_knn_space.__file__, callable(hf_knn_space.main))"
    place, is_there = run(installed, "-c", code).split()
    assert Path(place).is_relative_to(installed)
    assert is_there == "True"
    said = run(installed, "-m", "hf_knn_space", "--help")
    assert said.startswith("usage: python -m hf_knn_space")
    assert "--pictures" in said


def test_a_space_begun_from_a_wheel_is_the_one_begun_in_a_clone(installed, tmp_path):
    from hf_knn_space.files import SPACE_FILES, begin_space

    run(installed, "-c", _BEGIN, str(tmp_path / "theirs"))
    begin_space(tmp_path / "ours")
    theirs, ours = (
        {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        for folder in (tmp_path / "theirs", tmp_path / "ours")
    )
    assert theirs == ours
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {*SPACE_FILES, "hf_knn_space"}
    assert not [name for name in ours if "__pycache__" in name or "space_files" in name]
    assert "## API" in ours["README.md"].decode(), "what the page shows on its endpoints"
