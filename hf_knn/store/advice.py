"""What messages say to install: the command that works here, in a clone and from an index."""

import json
import os
import shlex
import shutil
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlparse

_PROJECT = "hf-knn"
_CLONE = Path(__file__).parents[2]


def install(*extras: str) -> str:
    """How to install this project with extras, as it was installed.

    Args:
        extras: such as `onnx`.

    Returns:
        A command, such as `pip install '.[onnx]'` in a clone.
    """
    return f"{_pip()} {_requirement(','.join(extras))}"


def install_package(name: str) -> str:
    """How to install another package.

    Args:
        name: of the package.
    """
    return f"{_pip()} {name}"


def needs(modules: dict[str, str], what: str, how: str) -> None:
    """Refuses to begin without packages that the work needs.

    Args:
        modules: the name of each module, and of the package that has it.
        what: needs them, in words.
        how: the command that installs them.

    Raises:
        ImportError: naming those that are missing, and the command.
    """
    missing = [package for module, package in modules.items() if find_spec(module) is None]
    if missing:
        raise ImportError(f"{what} needs {' and '.join(missing)}; run `{how}`.")


def _pip() -> str:
    """The pip of this interpreter: another one would install elsewhere."""
    found = shutil.which("pip")
    if found is not None and Path(found).parent == Path(sys.executable).parent:
        return "pip install"
    return f"{_shown(Path(sys.executable))} -m pip install"


@cache
def _source() -> tuple[str, bool]:
    """Where this project was installed from, empty for an index; and whether from a folder."""
    try:
        text = distribution(_PROJECT).read_text("direct_url.json")
    except PackageNotFoundError:
        text = None
    if text is not None:
        origin = json.loads(text)
        url = str(origin.get("url", ""))
        if "dir_info" in origin:
            folder = Path(unquote(urlparse(url).path))
            if (folder / "pyproject.toml").is_file():
                return str(folder), True
        elif "vcs_info" in origin:
            return f"{origin['vcs_info']['vcs']}+{url}", False
        elif url:
            return url, False
    if (_CLONE / "pyproject.toml").is_file():
        return str(_CLONE), True
    return "", False


def _requirement(extras: str) -> str:
    place, is_folder = _source()
    if not place:
        return f"'{_PROJECT}[{extras}]'"
    if not is_folder:
        return shlex.quote(f"{_PROJECT}[{extras}] @ {place}")
    folder = "." if Path(place).resolve() == Path.cwd().resolve() else place
    return f"-e {shlex.quote(f'{folder}[{extras}]')}"


def _shown(path: Path) -> str:
    """A path as one would type it from the current folder."""
    absolute, here = Path(os.path.abspath(path)), Path.cwd()
    inside = absolute.is_relative_to(here)
    return shlex.quote(str(absolute.relative_to(here) if inside else absolute))
