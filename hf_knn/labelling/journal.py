"""The answers of a session on disk, one line for each: on disk before the next question comes.

A kill leaves half a line at most, which is cut off when somebody goes on: at most the answer that
was under way is lost. What is undone stays in the file, with a line that says so.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from ..store.folders import fsync_path
from .state import Record

JOURNAL_NAME = "answers.jsonl"
_FORMAT = 1
_UNDO = {"undo": True}


class Journal:
    """A file of answers.

    Args:
        path: of the file; its folder is there.
        facts: what the answers are about, by the words that a refusal says.

    Attributes:
        records: the answers that stand, the oldest first.

    Raises:
        ValueError: for a file of other facts, or with a line that is no answer.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self._path, self.records = path, list[Record]()
        data = path.read_bytes() if path.exists() else b""
        end = data.rfind(b"\n") + 1
        lines = data[:end].splitlines()
        self._read(lines, dict(facts))
        self._file: IO[bytes] = path.open("r+b" if path.exists() else "w+b", buffering=0)
        self._file.truncate(end)  # half a line, which a kill left
        self._file.seek(end)
        if not lines:
            self._write({"format": _FORMAT, **facts})
            fsync_path(path.parent)

    def add(self, record: Record) -> None:
        """Keeps an answer; it is on disk when this returns.

        Raises:
            OSError: for a disk that is full; nothing was added then.
        """
        self._write(record.as_json())
        self.records.append(record)

    def undo(self) -> Record:
        """Takes the last answer back that stands, and returns it.

        Raises:
            OSError: see `add`.
        """
        self._write(_UNDO)
        return self.records.pop()

    def close(self) -> None:
        """Ends writing."""
        self._file.close()

    def _write(self, entry: Mapping[str, Any]) -> None:
        line, start = json.dumps(entry).encode("ascii") + b"\n", self._file.tell()
        try:
            while line:  # an unbuffered file may take a part
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(start)
            self._file.seek(start)
            raise

    def _read(self, lines: list[bytes], facts: dict[str, Any]) -> None:
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                if not isinstance(entry, dict):
                    raise ValueError("it is no object")
                if number == 1:
                    self._check(entry, facts)
                elif entry == _UNDO:
                    self.records.pop()
                else:
                    self.records.append(Record.from_json(entry))
            except _OtherSessionError:
                raise
            except (ValueError, IndexError) as error:
                raise ValueError(
                    f"Expected {self._path} to hold the answers of `hf-knn label`, but line "
                    f"{number} is none ({error}); name another folder with -o, or mend the line."
                ) from error

    def _check(self, entry: dict[str, Any], facts: dict[str, Any]) -> None:
        if entry.pop("format", None) != _FORMAT:
            raise ValueError("its first line says no format that is known")
        other = [name for name in entry | facts if entry.get(name) != facts.get(name)]
        if other:
            was = " and ".join(f"{name} {entry.get(name)}" for name in other)
            raise _OtherSessionError(
                f"Expected {self._path} to go on with, but it was begun with the {was}; run the "
                "command as it was, or name another folder with -o."
            )


class _OtherSessionError(ValueError):
    """The answers are about something else."""
