"""The journal of a folder that files were moved, copied or linked into."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..store.folders import fsync_path, write_durably
from .carrying import How, Mark

JOURNAL_NAME = "journal.jsonl"
"""Of a folder into which files were moved: one line for each, the oldest first."""


class Move(NamedTuple):
    """A file and its place in a folder.

    Attributes:
        source: where it was; a whole path in a journal.
        target: where it goes, relative to the folder, with `/`.
        why: in words; kept in the journal.
        how: it goes there.
        mark: of what is copied, by which a copy is known that nobody changed.
    """

    source: Path
    target: str
    why: str
    how: How = How.MOVE
    mark: Mark | None = None


class Journal:
    """Lines of JSON: files that are to be carried, and after each lot that it is done.

    Args:
        folder: that it lies in.
        name: of the file.

    Attributes:
        path: of the file.
        moves: what was carried.
        pending: what was under way when nobody could say more.
        made: folders that were made for it, relative to the folder.
        above: how many folders were made to have the folder itself, it among them.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / name
        self.moves: list[Move] = []
        self.pending: list[Move] = []
        self.made: list[str] = []
        self.above = 0
        self._end = 0

    def read(self) -> None:
        """Reads what is there, up to the last whole line.

        Raises:
            ValueError: for a line that is none of a journal.
        """
        if not self.path.is_file():
            return
        whole = self.path.read_bytes()
        self._end = whole.rfind(b"\n") + 1
        for number, line in enumerate(whole[: self._end].splitlines(), 1):
            try:
                self._hear(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"Expected {self.path} to be a journal of moved files, but line {number} is "
                    f"not one of its lines ({error!r})."
                ) from error

    def start(self, above: int) -> None:
        """Writes the first line.

        Args:
            above: see the class.
        """
        self.above = above
        self._append([{"above": above}])

    def begin(self, moves: Sequence[Move], folders: Sequence[str]) -> None:
        """Writes what is to be done now; it is on disk then.

        Args:
            moves: files.
            folders: that will be made for them.
        """
        if moves:
            self._append([*({"folder": name} for name in folders), *map(_entry_of, moves)])
            self.made += folders
            self.pending += moves

    def end(self, never: Iterable[str] = ()) -> None:
        """Writes that what was pending is done.

        Args:
            never: the targets of those that were not carried after all.
        """
        if self.pending:
            done = {"done": True, "never": [*never]}
            self._append([done])
            self._hear(done)

    def keep_only(self, moves: Sequence[Move]) -> None:
        """Forgets all other files, and folders that are no more; without any, itself.

        Args:
            moves: that are left.
        """
        if not moves:
            self.path.unlink()
            return
        self.made = [name for name in self.made if (self.path.parent / name).is_dir()]
        entries: list[dict[str, Any]] = [
            {"above": self.above},
            *({"folder": name} for name in self.made),
        ]
        entries += [*map(_entry_of, moves), {"done": True, "never": []}]
        text = "".join(map(_line, entries))
        write_durably(self.path, lambda path: path.write_text(text, encoding="ascii"))

    def _hear(self, entry: dict[str, Any]) -> None:
        if "done" in entry:
            never = {*entry["never"]}
            self.moves += [move for move in self.pending if move.target not in never]
            self.pending = []
        elif "folder" in entry:
            self.made.append(_inside(entry["folder"]))
        elif "above" in entry:
            self.above = int(entry["above"])
        else:
            mark = entry.get("mark")
            move = Move(
                Path(entry["source"]), _inside(entry["target"]), str(entry["why"]),
                How(entry["how"]), mark and Mark(*mark),
            )  # fmt: skip
            if not move.source.is_absolute():
                raise ValueError(f"{move.source} is no whole path")
            self.pending.append(move)

    def _append(self, entries: Iterable[dict[str, Any]]) -> None:
        """Adds lines, which are on disk then; half a line of a kill is cut off."""
        text = "".join(map(_line, entries)).encode("ascii")
        with self.path.open("r+b" if self._end else "wb") as file:
            file.truncate(self._end)
            file.seek(self._end)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self._end += len(text)
        fsync_path(self.path.parent)


def _entry_of(move: Move) -> dict[str, Any]:
    entry = {"source": str(move.source), "target": move.target, "why": move.why}
    return entry | {"how": move.how} | ({"mark": [*move.mark]} if move.mark else {})


def _inside(name: object) -> str:
    """A path relative to the folder that does not lead out of it."""
    path = PurePosixPath(str(name))
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"{name} is no place in the folder")
    return str(name)


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"
