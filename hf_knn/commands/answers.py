"""Answers to many pictures in one file: it grows beside its place, and survives a kill.

What was answered lies in `NAME.unfinished`, a line of JSON for each picture, until all pictures
are: then the file itself is written in the order of the pictures, as a whole.
"""

import csv
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from filelock import FileLock, Timeout

from ..store.folders import fsync_path, write_durably

Row = dict[str, Any]
"""One answer, by the names of the columns; None where a cell is empty."""


class Column(NamedTuple):
    """A column of the file.

    Attributes:
        name: in the first line of a csv.
        kind: `text`, `number`, `flag`, or a list of them: `texts`, `numbers`, `ids`.
    """

    name: str
    kind: str


ENDINGS = (".csv", ".jsonl", ".parquet")

_UNFINISHED = ".unfinished"
_FORMAT = 1
_FLUSHED_SECONDS = 5.0
_ROWS_AT_ONCE = 1000
_FORMULAS = ("=", "+", "-", "@", "\t", "\r", "'")


class AnswerFile:
    """A file of answers under way; see `open_answers`.

    Attributes:
        settled: what the run that began it settled, by the words that a refusal says.
    """

    def __init__(self, path: Path, columns: Sequence[Column], facts: Mapping[str, Any]) -> None:
        self._path, self._columns, self._facts = path, columns, dict(facts)
        self._journal = path.with_name(path.name + _UNFINISHED)
        self._places: dict[str, int] = {}
        self._end = 0
        self._file: IO[bytes] | None = None
        self._flushed = time.monotonic()
        self.settled: dict[str, str] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __str__(self) -> str:
        return str(self._journal)

    def begin(self, settled: Mapping[str, str]) -> None:
        """Begins to write, behind what is there.

        Args:
            settled: what this run settled by itself, for those that go on with it.
        """
        self._file = self._journal.open("r+b" if self._end else "wb")
        self._file.truncate(self._end)  # half a line, which a kill left
        self._file.seek(self._end)
        if not self._end:
            header = {"format": _FORMAT, "facts": self._facts, "settled": dict(settled)}
            self._file.write(_line(header))
            self._file.flush()
            fsync_path(self._journal.parent)

    def add(self, rows: Iterable[tuple[str, Row]]) -> None:
        """Keeps some answers, which are there after a kill from now on.

        Args:
            rows: key of the picture, and its answer.

        Raises:
            OSError: for a disk that is full.
        """
        assert self._file is not None
        for key, row in rows:
            self._places[key] = self._file.tell()
            self._file.write(_line([key, [row[column.name] for column in self._columns]]))
        self._file.flush()
        if time.monotonic() - self._flushed > _FLUSHED_SECONDS:  # of a machine that stops, too
            os.fsync(self._file.fileno())
            self._flushed = time.monotonic()

    def rows(self, keys: Iterable[str]) -> Iterator[Row]:
        """Answers by their keys, read one at a time.

        Args:
            keys: of pictures that were answered, in the order wanted.
        """
        names = [column.name for column in self._columns]
        with self._journal.open("rb") as file:
            for key in keys:
                file.seek(self._places[key])
                yield dict(zip(names, json.loads(file.readline())[1], strict=True))

    def finish(self, keys: Iterable[str], see: Callable[[Row], None]) -> None:
        """Writes the file, in one step, and removes what was kept on the way.

        Args:
            keys: of all pictures, in their order.
            see: hears of each answer.
        """

        def seen() -> Iterator[Row]:
            for row in self.rows(keys):
                see(row)
                yield row

        write_answers(self._path, self._columns, seen())
        self.close()
        self.discard()

    def read(self, asked: Mapping[str, str | None]) -> bool:
        """Finds what a run that was stopped has answered, up to the last whole line.

        Args:
            asked: what is settled already; None for what is not.

        Returns:
            Whether there is something to go on with.

        Raises:
            ValueError: if it is of another run.
        """
        if not self._journal.exists():
            return False
        with self._journal.open("rb") as file:
            first = file.readline()
            if not first.endswith(b"\n"):  # killed before the first answer
                return False
            header = _parsed(first, dict) or {}
            self._check_same(header, asked)
            self._end, self.settled = file.tell(), header["settled"]
            while entry := _parsed(line := file.readline(), list):
                self._places[entry[0]] = self._end
                self._end += len(line)
        return True

    def close(self) -> None:
        """Stops writing; what was answered stays."""
        if self._file is not None:
            self._file.close()

    def discard(self) -> None:
        """Removes what was answered."""
        self._journal.unlink()

    def _check_same(self, header: dict[str, Any], asked: Mapping[str, str | None]) -> None:
        if header.get("format") != _FORMAT:
            raise _OtherRunError(
                f"Expected {self._journal} to be answers of a run that was stopped, but it is not; "
                "name another file with -o, or remove it with --overwrite."
            )
        kept = header["facts"] | {name: header["settled"].get(name) for name in asked}
        wanted = self._facts | {name: value or kept[name] for name, value in asked.items()}
        other = [n for n in kept | wanted if kept.get(n) != wanted.get(n)]
        if other:
            raise _OtherRunError(
                f"Expected {self._journal} to go on with the same checkpoint and options, but it "
                f"was begun with another {' and another '.join(other)}; run the command as it was, "
                "name another file with -o, or begin anew with --overwrite."
            )


@contextmanager
def open_answers(
    path: Path,
    columns: Sequence[Column],
    facts: Mapping[str, Any],
    asked: Mapping[str, str | None],
    *,
    overwrite: bool = False,
) -> Iterator[AnswerFile]:
    """A file of answers to begin, or to go on with.

    Args:
        path: of the file, .csv, .jsonl or .parquet; its folder is made.
        columns: of the file.
        facts: what the answers depend on, by the words that a refusal says.
        asked: likewise, of what the run settles by itself where it is None.
        overwrite: begin anew where there is something else.

    Returns:
        A context; within it no other process writes the file.

    Raises:
        ValueError: if there is such a file already, if the one that was stopped depends on other
            facts, or if another run is writing it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock_place = path.with_name(f".{path.name}.lock")
    lock = FileLock(lock_place, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"Expected {path} to be written by one run, but another one is at it; wait for it, or "
            "name another file with -o."
        ) from error
    file = AnswerFile(path, columns, facts)
    try:
        try:
            goes_on = file.read(asked)
        except _OtherRunError:
            if not overwrite:
                raise
            file.discard()
            goes_on = False
        if path.exists() and not goes_on and not overwrite:
            raise ValueError(
                f"Expected {path} not to be there yet, but it holds the answers of a run that is "
                "done, or something else; name another file with -o, or pass --overwrite."
            )
        yield file
    finally:
        file.close()
        lock_place.unlink(missing_ok=True)
        lock.release()


class _OtherRunError(ValueError):
    """What was stopped is another run."""


def _line(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _parsed(line: bytes, kind: type) -> Any:
    """A whole line; None for the half one that a kill leaves."""
    try:
        value = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return value if isinstance(value, kind) else None


# ---- formats ------------------------------------------------------------------------------------


def safe_cell(text: str) -> str:
    """A text as no program takes it for a formula: behind a `'` where it begins like one.

    Whoever reads it removes a `'` at the beginning; so one that was there has another before it.

    Args:
        text: any.
    """
    return f"'{text}" if text.startswith(_FORMULAS) else text


def write_answers(path: Path, columns: Sequence[Column], rows: Iterable[Row]) -> None:
    """Writes a file, in one step.

    Args:
        path: of the file, .csv, .jsonl or .parquet.
        columns: of the file.
        rows: in their order.

    Raises:
        OSError: if it cannot be written; what was there is there still.
    """
    kind = {".csv": _write_csv, ".jsonl": _write_jsonl, ".parquet": _write_parquet}
    write = kind[path.suffix.lower()]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, lambda place: write(place, columns, rows))


def _write_csv(place: Path, columns: Sequence[Column], rows: Iterable[Row]) -> None:
    with place.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([column.name for column in columns])
        for row in rows:
            writer.writerow([_cell(row[column.name], column.kind) for column in columns])


def _cell(value: Any, kind: str) -> str:
    if value is None:
        return ""
    if kind == "text":
        return safe_cell(value)
    # lists as in JSON: their bracket keeps a number below zero from being a formula
    return json.dumps(value, ensure_ascii=False)


def _write_jsonl(place: Path, columns: Sequence[Column], rows: Iterable[Row]) -> None:
    with place.open("w", encoding="utf-8", newline="") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_parquet(place: Path, columns: Sequence[Column], rows: Iterable[Row]) -> None:
    import pyarrow
    from pyarrow import parquet

    kinds = {
        "text": pyarrow.string(), "number": pyarrow.float64(), "flag": pyarrow.bool_(),
        "texts": pyarrow.list_(pyarrow.string()), "numbers": pyarrow.list_(pyarrow.float64()),
        "ids": pyarrow.list_(pyarrow.int64()),
    }  # fmt: skip
    schema = pyarrow.schema([(column.name, kinds[column.kind]) for column in columns])
    with parquet.ParquetWriter(place, schema) as writer:
        for part in _parts(rows, _ROWS_AT_ONCE):
            writer.write_table(pyarrow.Table.from_pylist(part, schema))


def _parts(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    part: list[Row] = []
    for row in rows:
        part.append(row)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part
