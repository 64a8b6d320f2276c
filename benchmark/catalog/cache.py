"""What tasks and backbones share: folders made once, named after versions, found by name."""

import difflib
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from filelock import FileLock


def cache_root(cache_dir: Path | None = None) -> Path:
    """Return `cache_dir`, or else the folder in `HF_KNN_CACHE`, or else `~/.cache/hf_knn`."""
    return Path(cache_dir or os.environ.get("HF_KNN_CACHE") or "~/.cache/hf_knn").expanduser()


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Make `folder` with `build` unless it is there; it appears whole or not at all.

    Args:
        folder: The folder wanted. When it exists it is returned as it is.
        build: Writes the content below the empty folder it is given. What it raises passes through.

    Returns:
        `folder`.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():  # another process made it while this one waited
            return folder
        partial = folder.with_name(f".{folder.name}.partial")
        if partial.exists():  # its builder was killed: nobody else holds the lock
            shutil.rmtree(partial)
        partial.mkdir()
        build(partial)
        for file in (path for path in partial.rglob("*") if path.is_file()):
            with file.open("rb+") as stream:  # the rename must not reach the disk before the data
                os.fsync(stream.fileno())
        partial.rename(folder)
    return folder


def versioned(name: str, packages: Sequence[str], revision: int) -> str:
    """Return a folder name that changes when a package or the builder does.

    Raises:
        ModuleNotFoundError: A package is not installed.
    """
    try:
        parts = [f"{package}-{version(package)}" for package in packages]
    except PackageNotFoundError as error:
        raise ModuleNotFoundError(
            f"Expected the package {error.name} to be installed for {name}, but got nothing; "
            f"do `pip install {error.name}`."
        ) from error
    return "_".join([name, *parts, f"r{revision}"])


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """Return the error for a name that is not in `known`, with the nearest names in it."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, cutoff=0.4) or names
    return ValueError(
        f"Expected the name of a {kind}, but got {name!r}; do you mean {' or '.join(near)}?"
    )
