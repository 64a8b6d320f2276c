"""Files that survive a kill: locks, durable writes, hashes and the exchange of whole folders.

Nothing here knows what the files mean; names and formats belong to the callers.
"""

import ctypes
import errno
import hashlib
import json
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

try:  # a dependency of torch; inside `try` because remote-code users are not asked to install it
    from filelock import FileLock
except ImportError as error:  # pragma: no cover
    raise ImportError(
        "hf_knn needs filelock to save safely; run `pip install filelock`."
    ) from error


_AT_FDCWD = -100

_RENAME_EXCHANGE = _RENAME_SWAP = 2
_RENAME_NO_REPLACE, _RENAME_EXCL = 1, 4
"""Of Linux and of macOS."""

_WHOLE = ".whole"
"""File of a new version from the moment it is whole until nothing is left of the old one."""

_LEAVING = ".leaving"
"""Name of a file on its way out of an old version."""

_HELD_OPEN = (".nfs", ".fuse_hidden")
"""How network file systems call removed files that somebody still reads."""

_DRAINS = 100


@contextmanager
def exclusive_lock(folder: Path, seconds: float = -1) -> Iterator[None]:
    """Holds the writers' lock of a folder; it ends with the process, however that ends.

    The lock file lies beside the folder, since the folder itself may be exchanged, and is removed
    while the lock is held. Whoever holds it may ask for it again: to read, change and save as one.

    Args:
        folder: the folder to be written, by any of its names; it need not exist, its parent is
            created.
        seconds: how long to wait for others; below 0 as long as it takes.

    Raises:
        TimeoutError: if others hold it for longer.
    """
    folder = folder.resolve()  # a link, `..` and a relative path are one folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.parent / f".{folder.name}.lock"
    lock = FileLock(path, is_singleton=True)
    with lock.acquire(seconds):
        try:
            yield
        finally:
            if lock.lock_counter == 1:
                path.unlink(missing_ok=True)


def write_durably(path: Path, write: Callable[[Path], object]) -> None:
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


def cache_root() -> Path:
    """Where this project keeps what it can compute again: `$HF_KNN_CACHE` or `~/.cache/hf_knn`."""
    return Path(os.environ.get("HF_KNN_CACHE") or Path.home() / ".cache" / "hf_knn")


def short_name(key: Any) -> str:
    """A name for what depends on some JSON values."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]


def stage_file(path: Path, write: Callable[[Path], object], scratch: Path | None = None) -> Path:
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
    (a user's notes, the runs of a trainer) are carried over as hard links, also those that others
    write, change or remove there meanwhile.

    Args:
        folder: the folder to be replaced; need not exist.
        is_owned: tells by name which files belong to the version, so that old ones must go.

    Yields:
        The empty staging folder to be filled.

    Raises:
        NotADirectoryError: if `folder` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(
            f"Expected {folder} to be a folder, but got a file; choose another."
        )
    folder = folder.resolve()  # the link stays, what it points to is replaced
    with exclusive_lock(folder):
        _settle(folder, is_owned)
        move, staging = _Move(folder, is_owned), _staging(folder)
        before = dict(move.foreign(folder))
        staging.mkdir()
        try:
            yield staging
            if folder.exists():
                shutil.copymode(folder, staging)
                move.carry_over(staging, before)
            (staging / _WHOLE).touch()
            fsync_tree(staging)
            old = _swap_in(staging, folder)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        if old is not None:
            move.drain(old)
        (folder / _WHOLE).unlink()


def restore(folder: Path) -> None:
    """Puts a folder back that a kill between two renames left hidden beside its place.

    Args:
        folder: that is to be read; nothing happens if it is there, or was never written.
    """
    if folder.exists():
        return
    folder = folder.resolve()
    if _discarded(folder).is_dir():
        with exclusive_lock(folder):  # whose holder may just be putting the new version there
            _put_back(folder)


def _put_back(folder: Path) -> None:
    if _discarded(folder).is_dir() and not folder.exists():
        os.rename(_discarded(folder), folder)
        fsync_path(folder.parent)


def _settle(folder: Path, is_owned: Callable[[str], bool]) -> None:
    """Ends what a kill interrupted; the caller holds the lock."""
    _put_back(folder)
    staging = _staging(folder)
    is_old = (folder / _WHOLE).exists() and not (staging / _WHOLE).exists()
    if not is_old:  # it did not come to the exchange
        shutil.rmtree(staging, ignore_errors=True)
    for old in (_discarded(folder), staging):
        if old.exists():
            _Move(folder, is_owned).drain(old)
            shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        (folder / _WHOLE).unlink(missing_ok=True)


class _Identity(NamedTuple):
    """Tells a file from one that was changed, or renamed over it; a folder from a file."""

    is_folder: bool
    node: int = 0
    time: int = 0
    size: int = 0

    @classmethod
    def of(cls, path: Path) -> "_Identity | None":
        try:
            status = path.lstat()
        except FileNotFoundError:
            return None
        if stat.S_ISDIR(status.st_mode):
            return cls(True)
        return cls(False, status.st_ino, status.st_mtime_ns, status.st_size)


class _Move:
    """What others have in a folder, on its way from an old version to the new one.

    Args:
        folder: that is replaced.
        is_owned: see `replaced_folder`.
    """

    def __init__(self, folder: Path, is_owned: Callable[[str], bool]) -> None:
        self.folder, self.is_owned = folder, is_owned
        self.known: dict[Path, _Identity] = {}
        self.placed: dict[Path, _Identity | None] = {}

    def carry_over(self, staging: Path, before: dict[Path, _Identity]) -> None:
        """Links what is there into the new version, whose own files win unless others edited them.

        Args:
            staging: of the new version.
            before: what was there when it was begun.
        """
        self.known = dict(self.foreign(self.folder))
        for place, found in self.known.items():
            source, target = self.folder / place, staging / place
            if not target.parent.is_dir() or target.is_dir():
                continue  # a file and a folder of one name, or a folder that is there
            if found.is_folder:
                if not os.path.lexists(target):
                    target.mkdir()
                    shutil.copymode(source, target)
            elif not os.path.lexists(target) or before.get(place) != found:
                target.unlink(missing_ok=True)
                with suppress(FileNotFoundError):  # it is just being removed
                    link_or_copy(str(source), str(target))
                self.placed[place] = _Identity.of(target)

    def drain(self, old: Path) -> None:
        """Moves what came or changed meanwhile into the new version, and removes the old one.

        What cannot be removed now is left to the next save.

        Args:
            old: the old version, beside its former place.
        """
        left = dict(self.foreign(old))
        for place in sorted(self.known, reverse=True):
            if place not in left or left[place].is_folder != self.known[place].is_folder:
                self._remove(place)  # as somebody did in the old version
        for _ in range(_DRAINS):
            if not old.exists():
                return
            with suppress(OSError):  # somebody is faster
                self._drain_once(old)

    def _drain_once(self, old: Path) -> None:
        for entry in list(os.scandir(old)):
            if self.is_owned(entry.name):
                is_folder = entry.is_dir(follow_symlinks=False)
                (shutil.rmtree if is_folder else os.unlink)(entry.path)
        for place, found in sorted(self.foreign(old), reverse=True):  # what is below comes first
            if not found.is_folder:
                self._bring(old, place, found)
                continue
            if place not in self.known:
                (self.folder / place).mkdir(parents=True, exist_ok=True)
            with suppress(OSError):  # somebody wrote there again
                (old / place).rmdir()
        for name in (_WHOLE, _LEAVING):
            (old / name).unlink(missing_ok=True)
        with suppress(OSError):
            old.rmdir()

    def _bring(self, old: Path, place: Path, found: _Identity) -> None:
        """One file: it is moved where it is new, or was changed since it was carried over."""
        target = self.folder / place
        there, leaving = _Identity.of(target), old / _LEAVING
        if there is None:
            is_wanted = self.known.get(place) != found  # else somebody removed it just now
        elif self.known.get(place) == found or there.node == found.node:
            is_wanted = False
        else:
            is_wanted = there == self.placed.get(place) or there.time < found.time
        if is_wanted:
            target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(old / place, target if is_wanted else leaving)
        if not is_wanted and _Identity.of(leaving) != found:  # replaced since it was looked at
            os.replace(leaving, target)

    def _remove(self, place: Path) -> None:
        """What somebody removed after it was carried over, unless it was written anew."""
        target, known = self.folder / place, self.known.pop(place)
        with suppress(OSError):
            if known.is_folder:
                target.rmdir()
            elif place in self.placed and _Identity.of(target) == self.placed[place]:
                target.unlink()

    def foreign(self, root: Path, below: Path = Path()) -> Iterator[tuple[Path, _Identity]]:
        """Every file and folder that belongs to others; folders come before what they hold."""
        try:
            names = sorted(os.listdir(root / below))
        except FileNotFoundError:  # there is none, or it is just being removed
            return
        for name in names:
            if below == Path() and (name in (_WHOLE, _LEAVING) or self.is_owned(name)):
                continue
            found = _Identity.of(root / below / name)
            if found is None or name.startswith(_HELD_OPEN):
                continue
            yield below / name, found
            if found.is_folder:
                yield from self.foreign(root, below / name)


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


def _swap_in(staging: Path, folder: Path) -> Path | None:
    """Puts the new version in place; returns where the old one is now, if there was one."""
    working_directory, old = _cwd_below(folder), None
    if not folder.exists():
        os.rename(staging, folder)
    elif exchange(staging, folder):
        old = staging
    else:
        old = _discarded(folder)
        os.rename(folder, old)
        try:
            os.rename(staging, folder)
        except OSError:
            os.rename(old, folder)
            raise
    fsync_path(folder.parent)
    if working_directory is not None:
        os.chdir(working_directory)  # the old folder, where we stood, is about to be deleted
    return old


def _staging(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.staging")


def _discarded(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _cwd_below(folder: Path) -> Path | None:
    try:
        current = Path.cwd()
    except FileNotFoundError:  # it was deleted long ago
        return None
    return current if current == folder or folder in current.parents else None


def exchange(first: Path, second: Path) -> bool:
    """Swaps two folders in one step; False where system or file system cannot.

    Args:
        first: an existing folder.
        second: another one, on the same file system.
    """
    return _rename(first, second, _RENAME_EXCHANGE, _RENAME_SWAP) == 0


def rename_new(source: Path, target: Path) -> None:
    """Renames what nothing stands in the place of; on Linux and macOS in one step.

    Args:
        source: a file, a link or a folder.
        target: where to, on the same file system.

    Raises:
        FileExistsError: if something is there; it stays.
        OSError: if it cannot be renamed, by `EXDEV` to another file system.
    """
    error = _rename(source, target, _RENAME_NO_REPLACE, _RENAME_EXCL)
    if error in (None, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # system or file system cannot
        if os.path.lexists(target):
            error = errno.EEXIST
        else:
            os.rename(source, target)
            return
    if error:
        raise OSError(error, os.strerror(error), str(source), None, str(target))


def _rename(first: Path, second: Path, on_linux: int, on_mac: int) -> int | None:
    """Renames with a flag; returns the number of the error, 0 for none, None if nobody can."""
    if not sys.platform.startswith(("linux", "darwin")):
        return None
    library = ctypes.CDLL(None, use_errno=True)
    one, other = os.fsencode(first), os.fsencode(second)
    if hasattr(library, "renameat2"):
        failed = library.renameat2(_AT_FDCWD, one, _AT_FDCWD, other, on_linux)
    elif hasattr(library, "renamex_np"):
        failed = library.renamex_np(one, other, on_mac)
    else:
        return None
    return (ctypes.get_errno() or errno.EINVAL) if failed else 0
