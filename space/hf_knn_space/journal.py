"""What visitors taught, on disk: one append-only file each, synced before it is acknowledged."""

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_SUM_DIGITS = 16


@dataclass(frozen=True)
class Example:
    """A picture that a visitor taught.

    Attributes:
        row_id: in the visitor's datastore.
        label: its class.
        features: [D] float32, little-endian bytes.
        thumbnail: a small WEBP.
    """

    row_id: int
    label: str
    features: bytes
    thumbnail: bytes


@dataclass(frozen=True)
class Taught:
    """One acknowledged request.

    Attributes:
        key: what the client called it, so that it is done once.
        digest: of label and pictures; a key belongs to one request.
        ids: of the rows it made.
        label: as it was asked for.
        skipped: places of the pictures that made no row, since they are known already.
    """

    key: str
    digest: str
    ids: list[int]
    label: str
    skipped: list[int] = field(default_factory=list)


class JournalError(ValueError):
    """A journal that was damaged after it was written."""


class Journal:
    """The file of one visitor.

    Args:
        path: of the file; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Iterator[tuple[Taught | None, list[Example], int]]:
        """Requests in order: the request (None for rows that changes left), its rows, the next id.

        A last line without its end was never acknowledged; it is cut off.

        Raises:
            JournalError: for any other line that is not what was written.
        """
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with self.path.open("r+b") as file:
                file.truncate(whole)
                os.fsync(file.fileno())
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            digits, _, text = line.partition(b" ")
            if digits.decode("ascii", "replace") != _sum(text):
                raise JournalError(
                    f"Expected line {number} of the visitor's journal to be as it was written, but "
                    "it was changed; restore the file or delete it."
                )
            entry = json.loads(text)
            taught = None if entry["taught"] is None else Taught(**entry["taught"])
            yield taught, [_decode(row) for row in entry["rows"]], entry["next_id"]

    def append(self, taught: Taught, rows: list[Example], next_id: int) -> None:
        """Adds a request; when this returns it survives a power cut.

        Args:
            taught: the request.
            rows: what it taught.
            next_id: the first id that no row ever had.

        Raises:
            OSError: if it could not be written; nothing of it stays.
        """
        is_new = not self.path.exists()
        with self.path.open("ab") as file:
            end = file.tell()
            try:
                file.write(_line(taught, rows, next_id))
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), end)
                raise
        if is_new:
            _sync_folder(self.path.parent)

    def replace(self, done: Iterable[Taught], rows: list[Example], next_id: int) -> None:
        """Puts another content in place, in one step: rows that are gone leave no byte.

        Args:
            done: acknowledged requests, whose keys stay known.
            rows: all that are left.
            next_id: the first id that no row ever had.
        """
        partial = self.path.with_suffix(".partial")
        lines = [_line(request, [], next_id) for request in done]
        lines += [_line(None, [row], next_id) for row in rows]
        with partial.open("wb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)
        _sync_folder(self.path.parent)


def _line(taught: Taught | None, rows: list[Example], next_id: int) -> bytes:
    request = None if taught is None else asdict(taught)
    entry = {"taught": request, "rows": [_encode(row) for row in rows], "next_id": next_id}
    text = json.dumps(entry, ensure_ascii=True).encode()
    return _sum(text).encode() + b" " + text + b"\n"


def _encode(row: Example) -> dict[str, Any]:
    pictures = {"features": row.features, "thumbnail": row.thumbnail}
    coded = {name: base64.b64encode(data).decode() for name, data in pictures.items()}
    return asdict(row) | coded


def _decode(entry: dict[str, Any]) -> Example:
    coded = {name: base64.b64decode(entry[name]) for name in ("features", "thumbnail")}
    return Example(entry["row_id"], entry["label"], **coded)


def _sum(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:_SUM_DIGITS]


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
