"""One file to another place: moved, copied or linked, as a whole or not at all, over nothing."""

import errno
import filecmp
import hashlib
import os
import shutil
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from ..store.folders import fsync_path, rename_new

PART_NAME = ".hf-knn-moving"
"""Name of a copy that is not whole yet; one at a time, since a lock is held."""

_DIGITS = 32
"""Of a digest: 128 bits."""

_CHANGED = "it was changed while it was copied"


class How(StrEnum):
    """What becomes of a file."""

    MOVE = "move"
    COPY = "copy"
    LINK = "link"
    """A symbolic link to it, which other file systems and other files do not mind."""


class Mark(NamedTuple):
    """Tells a file from one that was changed.

    Attributes:
        size: in bytes.
        time: of the last change, in nanoseconds.
        digest: of its bytes, in hexadecimal digits.
    """

    size: int
    time: int
    digest: str

    @classmethod
    def of(cls, path: Path) -> "Mark":
        """Reads a file, or what a link leads to.

        Raises:
            OSError: if it cannot be read.
        """
        with path.open("rb") as file:
            state = os.fstat(file.fileno())
            digest = hashlib.file_digest(file, "blake2b").hexdigest()[:_DIGITS]
        return cls(state.st_size, state.st_mtime_ns, digest)

    def is_of(self, path: Path) -> bool:
        """Whether a file holds the same bytes; what cannot be read does not."""
        try:
            state = path.stat()
            if (state.st_size, state.st_mtime_ns) == (self.size, self.time):
                return True
            return state.st_size == self.size and Mark.of(path).digest == self.digest
        except OSError:
            return False

    def holds(self, path: Path) -> bool:
        """The same, whatever size and time say: every byte is read."""
        try:
            return Mark.of(path).digest == self.digest
        except OSError:
            return False


def carry(source: Path, target: Path, how: How = How.MOVE, mark: Mark | None = None) -> None:
    """Moves, copies or links a file.

    To another file system a file is moved by a copy that is flushed and compared before the first
    one is removed.

    Args:
        source: the file, or a link, which is moved as a link and copied as what it leads to.
        target: its new place, in a folder that is there.
        how: what is done.
        mark: of the source when a copy was decided on.

    Raises:
        FileExistsError: if something is there; it stays.
        OSError: if it cannot be done; nothing of it is left then.
    """
    if how is How.LINK:
        os.symlink(source, target)
    elif how is How.COPY:
        _put(source, target, follow=True, mark=mark)
    else:
        _move(source, target)


def is_same(one: Path, other: Path) -> bool:
    """Whether two files hold the same bytes, or two links lead to the same place."""
    if one.is_symlink() or other.is_symlink():
        both = one.is_symlink() and other.is_symlink()
        return both and os.readlink(one) == os.readlink(other)
    both = one.is_file() and other.is_file()
    return both and filecmp.cmp(one, other, shallow=False)


def remove_parts(*ends: Path) -> None:
    """Removes copies beside some files that a kill left half made."""
    for path in ends:
        with suppress(OSError):  # the folder is gone, or no folder any more
            (path.parent / PART_NAME).unlink(missing_ok=True)


def _move(source: Path, target: Path) -> None:
    try:
        rename_new(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    else:
        return
    _put(source, target, follow=False)
    try:
        fsync_path(target.parent)
        source.unlink()
    except BaseException:
        if os.path.lexists(source):  # it may not be taken away, so it was not moved
            target.unlink()
        raise
    fsync_path(source.parent)


def _put(source: Path, target: Path, *, follow: bool, mark: Mark | None = None) -> None:
    """A copy under its name once it is whole, flushed and the same."""
    part, before = target.parent / PART_NAME, _state(source)
    part.unlink(missing_ok=True)
    try:
        shutil.copyfile(source, part, follow_symlinks=follow)
        with suppress(PermissionError):  # of a file system that knows no modes
            shutil.copystat(source, part, follow_symlinks=follow)
        if not part.is_symlink():
            fsync_path(part)
        is_whole = is_same(source, part) if mark is None else mark.holds(part)
        if not is_whole or _state(source) != before:
            raise OSError(errno.EAGAIN, _CHANGED)
        rename_new(part, target)
    finally:
        part.unlink(missing_ok=True)


def _state(path: Path) -> tuple[int, int, int]:
    found = path.lstat()
    return found.st_ino, found.st_size, found.st_mtime_ns
