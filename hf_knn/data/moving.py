"""Files that go into a folder and come back: nothing is overwritten, lost or doubled.

A journal in the folder says where each file came from. It is on disk before the first file is
touched, so whoever comes after a kill knows what was under way: a file is where it was or where it
goes; where it had to be copied to another file system, one of two whole copies is removed then.
"""

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from ..store.folders import fsync_path
from .carrying import How, Mark, carry, is_same, remove_parts
from .journal import JOURNAL_NAME, Journal, Move
from .naming import FreeNames

LOCK_NAME = ".hf-knn-moving.lock"

_NO_MORE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""After these nothing else can be written either."""

Watch = Callable[[Sequence[Move]], Iterable[Move]]
"""Goes through some files, and may show how far it is."""


@dataclass(frozen=True)
class Moved:
    """What became of files.

    Attributes:
        done: those that were moved, copied or linked, or put back.
        left: those that were not, with the reason.
    """

    done: list[Move] = field(default_factory=list)
    left: list[tuple[Move, str]] = field(default_factory=list)


class Group(NamedTuple):
    """Files that keep one name but for their endings: a picture, and what lies beside it.

    Attributes:
        first: decides about the others, which stay where it stays.
        others: their targets begin with the stem of the first.
    """

    first: Move
    others: Sequence[Move] = ()

    @property
    def all(self) -> list[Move]:
        """The first, and the others."""
        return [self.first, *self.others]


class Folder:
    """A folder that takes files, while its lock is held; see `open_folder`.

    Attributes:
        journal: of what it took.
        targets: whole paths of what it took.
    """

    def __init__(self, place: Path, journal: Journal) -> None:
        self._place, self.journal, self._names = place.absolute(), journal, FreeNames(place)
        self.targets: set[Path] = set()
        self._known: dict[Path, list[Move]] = {}
        self._know(journal.moves)

    def has(self, source: Path) -> bool:
        """Whether a file was copied or linked before, and is as it was then."""
        return any(
            move.how is How.LINK or (move.mark is not None and move.mark.is_of(source))
            for move in self._known.get(source, ())
        )

    def take(self, groups: Iterable[Group]) -> Moved:
        """Takes files, each under a name that nothing has there.

        Args:
            groups: where a target is taken, a number is put behind the names of its group.

        Returns:
            What was taken, with the targets as they are. A file that cannot be taken stays.

        Raises:
            OSError: if nothing more can be written; what was taken until then is in the journal.
        """
        found = Moved()
        plan = [one for group in groups if (one := self._marked(group, found)) is not None]
        plan = [self._named(group) for group in plan]
        moves = [move for group in plan for move in group.all]
        self.journal.begin(moves, self._new_folders(moves))
        full: OSError | None = None
        for group in plan:
            if full is None:
                full = self._take_group(group, found)
            else:
                found.left.append((group.first, _reason(full)))
        for parent in {(self._place / move.target).parent for move in found.done if move.mark}:
            fsync_path(parent)
        done = {move.target for move in found.done}
        self.journal.end([move.target for move in moves if move.target not in done])
        self._know(found.done)
        if full is not None:
            raise full
        return found

    def _know(self, moves: Iterable[Move]) -> None:
        for move in moves:
            self._known.setdefault(move.source, []).append(move)
            self.targets.add(self._place / move.target)

    def _marked(self, group: Group, found: Moved) -> Group | None:
        """With marks of what is copied; None for a picture that is gone."""
        marked = []
        for move in group.all:
            try:
                marked.append(_with_mark(move))
            except OSError as error:
                found.left.append((move, _reason(error)))
                if move is group.first:
                    return None
        return Group(marked[0], marked[1:])

    def _named(self, group: Group) -> Group:
        """With names that are free."""
        targets = self._names.of([move.target for move in group.all])
        first, *others = (
            move._replace(target=target) for move, target in zip(group.all, targets, strict=True)
        )
        return Group(first, others)

    def _take_group(self, group: Group, found: Moved) -> OSError | None:
        """Takes the first file and then the others; returns what keeps all that follow out."""
        for move in group.all:
            error = _tried(move, move.source, self._place / move.target, found)
            if error is not None and error.errno in _NO_MORE:
                return error
            if error is not None and move is group.first:
                found.left.extend((other, f"{move.source} stays") for other in group.others)
                return None
        return None

    def _new_folders(self, moves: Sequence[Move]) -> list[str]:
        """The folders of some targets that have to be made, those above first."""
        wanted = {
            parent.as_posix(): None
            for move in moves
            for parent in reversed(Path(move.target).parents[:-1])
        }
        return [name for name in wanted if not os.path.lexists(self._place / name)]


class Rehearsal(Folder):
    """A folder that only says where files would go.

    Args:
        place: need not be there.
        journal: its name.

    Raises:
        ValueError: for a journal that cannot be read.
    """

    def __init__(self, place: Path, journal: str) -> None:
        lines = Journal(place, journal)
        lines.read()
        super().__init__(place, lines)

    def take(self, groups: Iterable[Group]) -> Moved:
        """What `Folder.take` would do if nothing went wrong."""
        return Moved([move for group in groups for move in self._named(group).all])


@contextmanager
def open_folder(
    place: Path, journal: str = JOURNAL_NAME, *, is_shared: bool = False
) -> Iterator[Folder]:
    """A folder to take files; what a kill interrupted there is ended first.

    Args:
        place: is made, with those above it.
        journal: name of its journal.
        is_shared: it may hold other things; else it has to be empty, or of an earlier call.

    Returns:
        A context, within which no other process has the folder open.

    Raises:
        ValueError: for a folder that holds other things, that is open elsewhere, or whose journal
            cannot be read.
        OSError: if the folder or its journal cannot be written.
    """
    has_journal = (place / journal).is_file()
    if place.is_dir() and not (is_shared or has_journal) and {*os.listdir(place)} - {LOCK_NAME}:
        raise ValueError(
            f"Expected {place} to be new, empty or a folder of files moved aside, but it "
            "holds other things; choose another one."
        )
    above, lines = [*_missing(place)], Journal(place, journal)
    place.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(place):
            lines.read()
            if not has_journal:
                lines.start(len(above))
            _settle(place, lines, goes_on=True)
            try:
                yield Folder(place, lines)
            finally:
                if not (has_journal or lines.moves or lines.pending):
                    lines.path.unlink(missing_ok=True)
    finally:
        if not lines.path.is_file():  # nothing was taken
            _remove_empty([*above, *(place.absolute() / name for name in lines.made)])


def move_aside(folder: Path, wanted: Sequence[Move]) -> Moved:
    """Moves files into a folder of their own, each under a name that nothing has there.

    Args:
        folder: is made; one that is there must be empty, or of an earlier call.
        wanted: the files; where a target is taken, a number is put behind its name.

    Returns:
        What was moved, with the targets as they are. A file that cannot be moved stays.

    Raises:
        ValueError: for a folder that holds other things, or a journal that cannot be read.
        OSError: if the journal cannot be written; nothing is moved then.
    """
    with open_folder(folder) as opened:
        return opened.take(map(Group, wanted))


def put_back(
    folder: Path, journal: str = JOURNAL_NAME, watch: Watch = iter, option: str = "--move-to"
) -> Moved:
    """Takes back what was done to every file of a folder; called again, it goes on.

    A file that was moved goes where it came from; one whose place is taken by another one stays. A
    copy or a link is removed if nobody changed it and its original is there; else it stays. So do
    their lines. When nothing is left, the journal goes, and the folders that were made, if they are
    empty.

    Args:
        folder: that took files.
        journal: name of its journal.
        watch: shows how far it is.
        option: that named the folder, for an error.

    Raises:
        ValueError: if it has no journal, or one that cannot be read, or if it is open elsewhere.
        OSError: if it cannot be listed, or its journal not be written.
    """
    if not (folder / journal).is_file():
        raise ValueError(
            f"Expected {folder} to be a folder that files were moved into, but it has no "
            f"{journal}; pass the one that {option} named."
        )
    with _locked(folder):
        lines, found = Journal(folder, journal), Moved()
        lines.read()
        _settle(folder, lines, goes_on=False)
        for move in watch(lines.moves[::-1]):
            _take_back(folder, move, found)
        found.done.reverse()
        found.left.reverse()
        waiting = [move for move, _ in found.left if os.path.lexists(folder / move.target)]
        _remove_empty(folder / name for name in lines.made)
        lines.keep_only(waiting)
    if not waiting:
        place = folder.absolute()
        _remove_empty([place, *place.parents][: lines.above])
    return found


def _take_back(folder: Path, move: Move, found: Moved) -> None:
    source, target = move.source, folder / move.target
    remove_parts(source, target)
    if move.how is not How.MOVE:
        if os.path.lexists(target):
            _remove_copy(move, target, found)
        return
    if not os.path.lexists(target):
        if not os.path.lexists(source):
            found.left.append((move, "it is neither in the folder nor in its place"))
        return  # else it was never moved, or is back
    if target.is_dir() and not target.is_symlink():
        found.left.append((move, "a folder is in its place now"))
    elif os.path.lexists(source) and is_same(source, target):  # a kill between two copies
        target.unlink()
        found.done.append(move)
    else:
        _tried(move, target, source, found)


def _remove_copy(move: Move, target: Path, found: Moved) -> None:
    """Removes a copy or a link, if it is still the one that was made."""
    if not _is_ours(move, target):
        what = "copied" if move.how is How.COPY else "linked"
        found.left.append((move, f"it was changed since it was {what}, so it stays"))
    elif move.how is How.COPY and not move.source.is_file():
        found.left.append((move, f"{move.source} is gone, so this copy of it stays"))
    else:
        try:
            target.unlink()
        except OSError as error:
            found.left.append((move, _reason(error)))
        else:
            found.done.append(move)


def _is_ours(move: Move, target: Path) -> bool:
    if move.how is How.LINK:
        return target.is_symlink() and os.readlink(target) == str(move.source)
    return move.mark is not None and not target.is_symlink() and move.mark.holds(target)


def _settle(folder: Path, journal: Journal, *, goes_on: bool) -> None:
    """Ends what a kill interrupted: of two copies the first goes, and what is half goes too.

    Args:
        folder: that took files.
        journal: of it.
        goes_on: also take what was still to be taken, so that what belongs together stays so.
    """
    never = []
    for move in journal.pending:
        source, target = move.source, folder / move.target
        remove_parts(source, target)
        is_there = os.path.lexists(target)
        if is_there and move.how is not How.MOVE:
            is_there = _is_ours(move, target)
        elif is_there and os.path.lexists(source):
            is_there = is_same(source, target)
            if is_there:
                source.unlink()
        elif not is_there and goes_on:
            is_there = _tried(move, source, target, Moved()) is None
        if not is_there:
            never.append(move.target)
    journal.end(never)


def _tried(move: Move, source: Path, target: Path, found: Moved) -> OSError | None:
    """Carries one file, or notes why not, and returns the error."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        carry(source, target, move.how, move.mark)
    except OSError as error:
        reason = _reason(error)
        if not os.path.lexists(source):
            reason = f"{source} is not there"
        elif os.path.lexists(target):
            reason = f"{target} is there already"
        found.left.append((move, reason))
        return error
    found.done.append(move)
    return None


def _with_mark(move: Move) -> Move:
    """A file to be copied with what it is now."""
    if not os.path.lexists(move.source):
        raise FileNotFoundError(errno.ENOENT, f"{move.source} is not there")
    return move._replace(mark=Mark.of(move.source)) if move.how is How.COPY else move


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _missing(place: Path) -> Iterator[Path]:
    """The folder and those above it that are not there, itself first."""
    for one in (place.absolute(), *place.absolute().parents):
        if os.path.lexists(one):
            return
        yield one


def _remove_empty(folders: Iterable[Path]) -> None:
    """Removes what is empty of some folders, those below first."""
    for folder in sorted(folders, key=lambda one: len(one.parts), reverse=True):
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    place = folder / LOCK_NAME
    lock = FileLock(place, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"Expected {folder} to be filled or emptied by one command at a time, but another one "
            "is at it; wait for it."
        ) from error
    try:
        yield
    finally:
        place.unlink(missing_ok=True)
        lock.release()
