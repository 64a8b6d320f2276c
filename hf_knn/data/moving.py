"""Files that are moved aside and can be put back: nothing is overwritten, lost or doubled.

A journal in the folder says where each file came from. It is on disk before the first file is
moved, so whoever comes after a kill knows what was under way: a file is where it was or where it
goes; where it had to be copied to another file system, one of two whole copies is removed then.
"""

import errno
import filecmp
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ..store.folders import exclusive_lock, fsync_path, rename_new, write_durably

JOURNAL_NAME = "journal.jsonl"
"""Of a folder into which files were moved: one line for each, the oldest first."""

_DONE = '{"done": true}'
"""A line of the journal: what stands above it was moved as far as it could be."""

_PART = ".hf-knn-moving"
"""Name of a copy that is not whole yet; one at a time, since the lock is held."""


class Move(NamedTuple):
    """A file and its place in a folder.

    Attributes:
        source: where it was.
        target: where it goes, relative to the folder, with `/`.
        why: in words; kept in the journal.
    """

    source: Path
    target: str
    why: str


@dataclass(frozen=True)
class Moved:
    """What became of files.

    Attributes:
        done: those that were moved.
        left: those that were not, with the reason.
    """

    done: list[Move]
    left: list[tuple[Move, str]]


def move_aside(folder: Path, wanted: Sequence[Move]) -> Moved:
    """Moves files into a folder, each under a name that nothing has there.

    Args:
        folder: is made; one that is there must be empty, or of an earlier call.
        wanted: the files; where a target is taken, a number is put behind its name.

    Returns:
        What was moved, with the targets as they are. A file that cannot be moved stays.

    Raises:
        ValueError: for a folder that holds other things, or a journal that cannot be read.
        OSError: if the journal cannot be written; nothing is moved then.
    """
    with exclusive_lock(folder):
        if folder.is_dir() and os.listdir(folder) and not (folder / JOURNAL_NAME).is_file():
            raise ValueError(
                f"Expected {folder} to be new, empty or a folder of files moved aside, but it "
                "holds other things; choose another one."
            )
        folder.mkdir(parents=True, exist_ok=True)
        _settle(folder)
        gone = [move for move in wanted if not os.path.lexists(move.source)]
        plan = [*_with_free_names(folder, [move for move in wanted if move not in gone])]
        _append(folder, [_line_of(move) for move in plan])
        found = Moved([], [(move, f"{move.source} is not there") for move in gone])
        for move in plan:
            _try(move, move.source, folder / move.target, found)
        _append(folder, [_DONE])
    return found


def put_back(folder: Path) -> Moved:
    """Moves every file of a folder back to where it came from; called again, it goes on.

    A file whose place is taken by another one stays in the folder, and so does its line. When
    nothing is left, the journal goes, and the folders that are empty.

    Args:
        folder: that `move_aside` filled.

    Raises:
        ValueError: if it has no journal, or one that cannot be read.
        OSError: if it cannot be listed, or its journal not be written.
    """
    if not (folder / JOURNAL_NAME).is_file():
        raise ValueError(
            f"Expected {folder} to be a folder of files that were moved aside, but it has no "
            f"{JOURNAL_NAME}; pass the one that --move-to named."
        )
    with exclusive_lock(folder):
        found = Moved([], [])
        for move, _ in reversed(_read(folder)):
            source, target = move.source, folder / move.target
            _remove_parts(source, target)
            if not os.path.lexists(target):
                if not os.path.lexists(source):
                    found.left.append((move, "it is neither in the folder nor in its place"))
                continue  # else it was never moved, or is back
            if os.path.lexists(source) and _is_same(source, target):  # a kill between two copies
                target.unlink()
                found.done.append(move)
                continue
            _try(move, target, source, found)
        found.done.reverse()
        waiting = [move for move, _ in reversed(found.left) if _is_there(folder, move)]
        _keep_only(folder, waiting)
    return found


def _is_there(folder: Path, move: Move) -> bool:
    return os.path.lexists(folder / move.target)


def _keep_only(folder: Path, moves: Sequence[Move]) -> None:
    """A journal of what is left; without any, nothing of the folder that is ours."""
    journal = folder / JOURNAL_NAME
    if moves:
        text = "".join(f"{line}\n" for line in [*map(_line_of, moves), _DONE])
        write_durably(journal, lambda path: path.write_text(text, encoding="ascii"))
    else:
        journal.unlink()
    for place, _, _ in os.walk(folder, topdown=False):
        if not os.listdir(place):
            os.rmdir(place)


def _try(move: Move, source: Path, target: Path, found: Moved) -> None:
    """Moves one file, or notes why not."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _move(source, target)
    except FileExistsError:
        found.left.append((move, f"{target} is there already"))
    except FileNotFoundError:
        found.left.append((move, f"{source} is not there"))
    except OSError as error:
        found.left.append((move, error.strerror or str(error)))
    else:
        found.done.append(move)


def _move(source: Path, target: Path) -> None:
    """Moves a file, also to another file system, where it is copied, compared and then removed."""
    try:
        rename_new(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    else:
        return
    part, before = target.parent / _PART, _state(source)
    part.unlink(missing_ok=True)
    try:
        shutil.copy2(source, part, follow_symlinks=False)
        if not part.is_symlink():
            fsync_path(part)
        if not _is_same(source, part) or _state(source) != before:
            raise OSError(errno.EAGAIN, "it was changed while it was copied")
        rename_new(part, target)
    finally:
        part.unlink(missing_ok=True)
    fsync_path(target.parent)
    source.unlink()
    fsync_path(source.parent)


def _state(path: Path) -> tuple[int, int, int]:
    found = path.lstat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _is_same(one: Path, other: Path) -> bool:
    """Whether two files hold the same bytes, or two links lead to the same place."""
    if one.is_symlink() or other.is_symlink():
        both = one.is_symlink() and other.is_symlink()
        return both and os.readlink(one) == os.readlink(other)
    both = one.is_file() and other.is_file()
    return both and filecmp.cmp(one, other, shallow=False)


def _settle(folder: Path) -> None:
    """Ends what a kill interrupted: of two copies the first goes, and what is half goes too."""
    moves = _read(folder)
    for move, is_done in moves:
        target = folder / move.target
        _remove_parts(move.source, target)
        if is_done:
            continue
        both = os.path.lexists(move.source) and os.path.lexists(target)
        if both and _is_same(move.source, target):
            move.source.unlink()
    if moves and not moves[-1][1]:
        _append(folder, [_DONE])


def _remove_parts(*ends: Path) -> None:
    """Copies that a kill left half made, on the way in or out."""
    for path in ends:
        with suppress(OSError):  # the folder is gone, or no folder any more
            (path.parent / _PART).unlink(missing_ok=True)


def _with_free_names(folder: Path, wanted: Sequence[Move]) -> Iterator[Move]:
    taken = set[str]()
    for move in wanted:
        path, number, name = PurePosixPath(move.target), 1, move.target
        while name.casefold() in taken or os.path.lexists(folder / name):
            number += 1
            name = str(path.with_name(f"{path.stem} ({number}){path.suffix}"))
        taken.add(name.casefold())
        yield move._replace(target=name)


def _line_of(move: Move) -> str:
    return json.dumps({"source": str(move.source), "target": move.target, "why": move.why})


def _append(folder: Path, lines: Sequence[str]) -> None:
    """Adds lines to the journal, which are on disk then; half a line of a kill is cut off."""
    path = folder / JOURNAL_NAME
    with path.open("ab+") as file:
        file.seek(0)
        end = file.read().rfind(b"\n") + 1
        file.truncate(end)
        file.write("".join(f"{line}\n" for line in lines).encode("ascii"))
        file.flush()
        os.fsync(file.fileno())
    fsync_path(folder)


def _read(folder: Path) -> list[tuple[Move, bool]]:
    """The moves of the journal, each with whether its call came to its end."""
    path = folder / JOURNAL_NAME
    if not path.is_file():
        return []
    whole = path.read_bytes()
    moves: list[Move] = []
    ended = 0
    for number, line in enumerate(whole[: whole.rfind(b"\n") + 1].splitlines(), 1):
        if line.decode("ascii", "replace") == _DONE:
            ended = len(moves)
            continue
        try:
            entry = json.loads(line)
            move = Move(Path(entry["source"]), str(entry["target"]), str(entry["why"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"Expected {path} to be a journal of moved files, but line {number} is not one of "
                f"its lines ({error!r})."
            ) from error
        target = PurePosixPath(move.target)
        if not move.source.is_absolute() or target.is_absolute() or ".." in target.parts:
            raise ValueError(
                f"Expected {path} to name files in its folder and whole paths outside, but line "
                f"{number} does not."
            )
        moves.append(move)
    return [(move, place < ended) for place, move in enumerate(moves)]
