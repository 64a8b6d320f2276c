"""Where the libraries keep what they can fetch or compute again, before they are imported."""

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

_HUB = "HF_HUB_CACHE"
_TRIED_BYTES = 65_536
"""A full disk still makes empty files."""


def cache_places(environment: Mapping[str, str]) -> dict[str, Path | None]:
    """The folders that caches go to, by the variable that names each.

    Args:
        environment: variables, such as `os.environ`.

    Returns:
        The folders; None where there is no home to put one into.
    """
    home = _home(environment)
    below = None if home is None else home / ".cache"
    xdg = Path(environment["XDG_CACHE_HOME"]) if environment.get("XDG_CACHE_HOME") else below
    hub_home = _given(environment, "HF_HOME", home) or _below(xdg, "huggingface")
    old = _given(environment, "HUGGINGFACE_HUB_CACHE", home)
    defaults = {
        _HUB: old or _below(hub_home, "hub"),
        "HF_ASSETS_CACHE": _below(hub_home, "assets"),
        "HF_XET_CACHE": _below(hub_home, "xet"),
        "HF_DATASETS_CACHE": _below(hub_home, "datasets"),
        "HF_MODULES_CACHE": _below(hub_home, "modules"),
        "HF_EVALUATE_CACHE": _below(hub_home, "evaluate"),
        "HF_METRICS_CACHE": _below(hub_home, "metrics"),
        "HF_KNN_CACHE": _below(below, "hf_knn"),
        "MPLCONFIGDIR": _below(home, ".config/matplotlib"),
        "TRITON_CACHE_DIR": _below(home, ".triton/cache"),
    }
    return {name: _given(environment, name, home) or place for name, place in defaults.items()}


def prepare_caches() -> None:
    """Puts caches that cannot be written into a folder of this run, and says so once.

    What is in a cache of the Hub that can only be read is still used.

    Raises:
        SystemExit: with 1, if there is no place for such a folder either.
    """
    places = cache_places(os.environ)
    moved = {
        name: place
        for name, place in places.items()
        if not (can_write(place) or (name == _HUB and place is not None and place.is_dir()))
    }
    if not moved:
        return
    try:
        folder = Path(tempfile.mkdtemp(prefix="hf-knn-caches-"))
    except OSError as error:
        print(f"Error: {error}; set TMPDIR to a folder that can be written.", file=sys.stderr)
        raise SystemExit(1) from error
    atexit.register(_remove, folder, os.getpid())
    for name in moved:
        os.environ[name] = str(folder / name.lower())
    roots = sorted({str(place.parent) for place in moved.values() if place is not None})
    where = ", ".join(roots) or "the home folder, which is not known"
    print(
        f"Note: nothing can be written in {where}. What is cached lies in {folder} and goes with "
        "the end of this run; set HF_HOME and HF_KNN_CACHE to folders that can be written.",
        file=sys.stderr,
    )


def can_write(place: Path | None) -> bool:
    """Whether files can be made in a folder, which need not be there yet.

    Args:
        place: the folder; None is nowhere.
    """
    if place is None:
        return False
    try:
        there = next(path for path in (place, *place.parents) if path.exists())
    except (OSError, StopIteration):
        return False
    return _takes_files(there)


@cache
def _takes_files(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_TRIED_BYTES))
            file.flush()
    except OSError:
        return False
    return True


def _home(environment: Mapping[str, str]) -> Path | None:
    found = environment.get("HOME") or os.path.expanduser("~")
    return None if found == "~" else Path(found)


def _given(environment: Mapping[str, str], name: str, home: Path | None) -> Path | None:
    text = environment.get(name)
    if not text:
        return None
    return home / text[2:] if home is not None and text.startswith("~/") else Path(text)


def _below(place: Path | None, name: str) -> Path | None:
    return None if place is None else place / name


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked child ends too
        shutil.rmtree(folder, ignore_errors=True)
