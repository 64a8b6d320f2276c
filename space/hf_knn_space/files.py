"""The files of a Space: where they lie, and how a new one is begun."""

import shutil
from pathlib import Path

SPACE_FILES = ("app.py", "README.md", "requirements.txt")
"""What lies beside this package in a clone and in a Space."""

CLONED_BENCHMARK = Path(__file__).parents[2] / "benchmark"
"""Pictures, backbones and results of a clone; a folder that is not there elsewhere."""

_PACKAGE = Path(__file__).parent
_INSTALLED = "space_files"
"""The folder in this package where a wheel has them, see setup.py."""


def space_file(name: str) -> Path:
    """Where one of `SPACE_FILES` lies.

    Args:
        name: of the file.
    """
    installed = _PACKAGE / _INSTALLED
    return (installed if installed.is_dir() else _PACKAGE.parent) / name


def begin_space(folder: Path) -> None:
    """Puts the page into a new folder: `SPACE_FILES`, and this package beside them.

    Args:
        folder: which is made.

    Raises:
        FileExistsError: if it is there.
    """
    folder.mkdir(parents=True)
    for name in SPACE_FILES:
        shutil.copy(space_file(name), folder / name)
    left_out = shutil.ignore_patterns("__pycache__", _INSTALLED)
    shutil.copytree(_PACKAGE, folder / _PACKAGE.name, ignore=left_out)
