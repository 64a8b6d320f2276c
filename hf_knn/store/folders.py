"""Files that survive a kill: locks, durable writes, hashes and the exchange of whole folders.

Nothing here knows what the files mean; names and formats belong to the callers.
"""

import ctypes
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

try:  # a dependency of torch; inside `try` because remote-code users are not asked to install it
    from filelock import FileLock
except ImportError as error:  # pragma: no cover
    raise ImportError(
        "hf_knn needs filelock to save safely; run `pip install filelock`."
    ) from error


_AT_FDCWD = -100

_RENAME_EXCHANGE = 2


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Holds the writers' lock of a folder; it ends with the process, however that ends.

    The lock file lies beside the folder, since the folder itself may be exchanged, and is removed
    while the lock is held. Whoever holds it may ask for it again: to read, change and save as one.

    Args:
        folder: the folder to be written; it need not exist, its parent is created.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.parent / f".{folder.name}.lock"
    lock = FileLock(path, is_singleton=True)
    with lock:
        try:
            yield
        finally:
            if lock.lock_counter == 1:
                path.unlink(missing_ok=True)


def write_durably(path: Path, write: Callable[[Path], None]) -> None:
    """Writes a file beside `path` and renames it into place once it is on disk.

    Args:
        path: where the file goes; an old version is replaced in one step.
        write: called with the temporary path, writes the content.
    """
    temporary = stage_file(path, write)
    try:
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that is renamed to it at the end; of a failure nothing stays.

    For what can be computed again: nothing is flushed, and several processes may write at once.

    Args:
        path: where the file goes; its folder is made.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def stage_file(path: Path, write: Callable[[Path], None], scratch: Path | None = None) -> Path:
    """Writes what `path` shall become and flushes it; the caller renames it into place.

    Args:
        path: where the file will go.
        write: called with the temporary path, writes the content.
        scratch: a folder of the same file system for it; None is the folder of `path`.

    Returns:
        The temporary path.
    """
    temporary = (scratch or path.parent) / f".{path.name}.tmp"
    try:
        write(temporary)
        fsync_path(temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def identity(path: Path) -> tuple[int, int, int] | None:
    """Tells a file from one that was renamed over it, even with the same content.

    Args:
        path: the file.

    Returns:
        Inode, time and size; None if there is no file.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def fsync_path(path: Path) -> None:
    """Flushes a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def give_default_mode(path: Path) -> None:
    """Sets the permissions a new file has by default (safetensors leaves 0600)."""
    probe = path.with_name(f".{path.name}.mode")
    probe.touch()
    try:
        shutil.copymode(probe, path)
    finally:
        probe.unlink()


@contextmanager
def replaced_folder(folder: Path, is_owned: Callable[[str], bool]) -> Iterator[Path]:
    """Builds a new version of a folder beside it and puts it in place in one step.

    A kill at any moment leaves the old version or the new one, and at most one staging folder,
    which the next call clears. Files of the old version that the new one neither wrote nor owns
    (a user's notes, the runs of a trainer) are carried over as hard links.

    Args:
        folder: the folder to be replaced; need not exist.
        is_owned: tells by name which files belong to the version, so that old ones must go.

    Yields:
        The empty staging folder to be filled.

    Raises:
        NotADirectoryError: if `folder` is a file.
    """
    folder = Path(os.path.abspath(folder))
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(
            f"Expected {folder} to be a folder, but got a file; choose another."
        )
    folder = folder.resolve()  # the link stays, what it points to is replaced
    with exclusive_lock(folder):
        staging = folder.parent / f".{folder.name}.staging"
        discarded = _discarded(folder)
        if discarded.exists() and not folder.exists():
            os.rename(discarded, folder)  # a kill between two renames
        if staging.exists():
            shutil.rmtree(staging)
        staging.mkdir()
        try:
            yield staging
            if folder.exists():
                shutil.copymode(folder, staging)
                _carry_over(folder, staging, is_owned)
            fsync_tree(staging)
            _swap_in(staging, folder)
        finally:
            # the half-built version after an error, the old version after success
            shutil.rmtree(staging, ignore_errors=True)


def _carry_over(old: Path, new: Path, is_owned: Callable[[str], bool]) -> None:
    for entry in os.scandir(old):
        target = new / entry.name
        if is_owned(entry.name):
            continue
        if target.is_dir() and entry.is_dir(follow_symlinks=False):
            _carry_over(Path(entry.path), target, lambda _: False)
        elif target.exists():
            continue
        elif entry.is_dir(follow_symlinks=False):
            shutil.copytree(entry.path, target, symlinks=True, copy_function=link_or_copy)
        else:
            link_or_copy(entry.path, str(target))


def link_or_copy(source: str, target: str) -> None:
    """Hard-links a file, or copies it where the file system has no hard links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def fsync_tree(folder: Path) -> None:
    """Flushes every file and folder below a folder, and itself, to disk."""
    for path, _, files in os.walk(folder):
        for name in files:
            if not os.path.islink(os.path.join(path, name)):
                fsync_path(Path(path, name))
        fsync_path(Path(path))


def _swap_in(staging: Path, folder: Path) -> None:
    working_directory = _cwd_below(folder)
    if not folder.exists():
        os.rename(staging, folder)
    elif not exchange(staging, folder):
        discarded = _discarded(folder)
        shutil.rmtree(discarded, ignore_errors=True)
        os.rename(folder, discarded)
        try:
            os.rename(staging, folder)
        except OSError:
            os.rename(discarded, folder)
            raise
        shutil.rmtree(discarded)
    fsync_path(folder.parent)
    if working_directory is not None:
        os.chdir(working_directory)  # the old folder, where we stood, is about to be deleted


def _discarded(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _cwd_below(folder: Path) -> Path | None:
    try:
        current = Path.cwd()
    except FileNotFoundError:  # it was deleted long ago
        return None
    return current if current == folder or folder in current.parents else None


def exchange(first: Path, second: Path) -> bool:
    """Swaps two folders atomically; False where the system cannot (other than Linux).

    Args:
        first: an existing folder.
        second: another one, on the same file system.
    """
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    first_bytes, second_bytes = os.fsencode(first), os.fsencode(second)
    return rename(_AT_FDCWD, first_bytes, _AT_FDCWD, second_bytes, _RENAME_EXCHANGE) == 0
