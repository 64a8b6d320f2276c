"""A list of pictures as people write it: csv, tsv or txt, from Excel, pandas or an editor.

Every cell is text, exactly as it was typed: 007, 01 and 1 are three labels, NA and None are labels,
and only an empty cell is missing. What had to be guessed is said in the notes.
"""

import codecs
import csv
import io
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn
from urllib.parse import unquote

from .decode import PICTURE_SUFFIXES

PATH_NAMES = (
    "path", "file_name", "file", "image", "picture", "file_path", "image_path", "image_file", "img",
)  # fmt: skip
LABEL_NAMES = ("label", "class", "category", "label_name", "class_name", "category_name")
SPLIT_NAME = "split"

_SUFFIXES = (".csv", ".tsv", ".txt")
_SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}
_SHAPE = "one line per picture, below a first line such as path,label"
_BINARY = {
    b"PK\x03\x04": "an Excel or Numbers workbook; save it as csv there",
    b"\xd0\xcf\x11\xe0": "an Excel workbook; save it as csv there",
    b"PAR1": "a parquet file; end its name in .parquet",
    b"\x1f\x8b": "a compressed file; unpack it first",
}
_MARKS = {  # the longer first: the mark of UTF-32 begins as that of UTF-16 does
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_DRIVE = re.compile(r"/[A-Za-z]:/")
_WRITTEN = re.compile(r"[^\s,;]")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_WEB = re.compile(r"https?://[^/]", re.IGNORECASE)


class Table(NamedTuple):
    """A list of N pictures.

    Attributes:
        places: where each lies, relative to the folder of the list or absolute, with `/`.
        labels: of each, "" where the cell is empty; None without such a column, or if it is empty.
        splits: of each; None without a column `split`.
        columns: every column by its name, without spaces around it.
        notes: what was guessed, a sentence each.
    """

    places: list[str]
    labels: list[str] | None
    splits: list[str] | None
    columns: dict[str, list[str]]
    notes: list[str]


class _Rows(NamedTuple):
    """The records of a file, with the line that each begins on."""

    lines: list[int]
    cells: list[list[str]]


def is_table(path: str | Path) -> bool:
    """Whether a file is named as a list of pictures: .csv, .tsv or .txt, in any case."""
    return Path(path).suffix.lower() in _SUFFIXES


def is_address(place: str) -> bool:
    """Whether a place is on the web: http or https."""
    return _WEB.match(place) is not None


def read_table(path: Path, *, with_addresses: bool = False) -> Table:
    """Reads a list of pictures.

    Args:
        path: of a file with a line per picture. The separator is a comma, a semicolon or a tab. The
            first line names the columns, or there is none: then one column holds paths of pictures
            and at most one more their labels. The text is UTF-8, UTF-16 or cp1252.
        with_addresses: whether pictures may be named by http or https.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read so, with the line and the reason.
    """
    data = path.read_bytes()
    notes: list[str] = []
    text = _decoded(path, data, notes)
    separator, rows = _parsed(path, text, notes)
    names, rows = _named(path, rows, separator, notes)
    places = _chosen(path, names, PATH_NAMES, notes)
    labels = _chosen(path, names, LABEL_NAMES, notes)
    splits = next((number for number, name in enumerate(names) if _plain(name) == SPLIT_NAME), None)
    if places is None:
        _refuse(
            path,
            f"its columns are {names}",
            "name them path and label, separated by commas, semicolons or tabs",
        )
    needed = {"picture": places, "label": labels, "split": splits}
    columns = _columns(path, rows, names, needed, notes)
    for kind in ("picture", "split"):
        _need_every_cell(path, rows, columns, needed[kind], kind)
    if labels is not None and not any(columns[labels]):
        notes.append(f"The column {names[labels]} of {path.name} is empty: no picture has a label.")
        labels = None
    table = Table(
        places=_local(path, rows, columns[places], with_addresses),
        labels=None if labels is None else columns[labels],
        splits=None if splits is None else columns[splits],
        columns=dict(zip(names, columns, strict=True)),
        notes=notes,
    )
    notes += _repeated(path, table)
    return table


# ---- text ---------------------------------------------------------------------------------------


def _decoded(path: Path, data: bytes, notes: list[str]) -> str:
    for mark, kind in _BINARY.items():
        if data.startswith(mark):
            _refuse(path, f"it is {kind.partition(';')[0]}", kind.partition("; ")[2])
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), None)
    if encoding is None and b"\0" in data[:4096]:
        encoding = _unmarked_utf16(data)
        if encoding:
            notes.append(f"{path.name} was read as UTF-16; save it as UTF-8 to be sure.")
    try:
        text = data.decode(encoding or "utf-8")
    except UnicodeDecodeError as error:
        if encoding is not None:
            _refuse(path, f"it is no whole {encoding} text ({error})", "save it as UTF-8")
        text = _decoded_by_windows(path, data, notes)
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        _refuse(
            path, f"line {line} has a NUL byte, so that it is damaged or no text", "save it anew"
        )
    return text.lstrip("\ufeff")


def _unmarked_utf16(data: bytes) -> str | None:
    """UTF-16 without its mark: in mostly Latin text every other byte is zero."""
    start = data[:4096]
    first, second = start[::2].count(0), start[1::2].count(0)
    if max(first, second) < len(start) / 8:
        return None
    return "utf-16-le" if second > first else "utf-16-be"


def _decoded_by_windows(path: Path, data: bytes, notes: list[str]) -> str:
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError:
        line = _first_foreign_line(data)
        _refuse(path, f"line {line} is neither UTF-8 nor cp1252", "save it as UTF-8")
    notes.append(
        f"{path.name} is not UTF-8 and was read as cp1252 (Western Windows); if its names look "
        "wrong, save it as UTF-8."
    )
    return text


def _first_foreign_line(data: bytes) -> int:
    for number, line in enumerate(data.split(b"\n"), start=1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError:
            return number
    return 1


# ---- records ------------------------------------------------------------------------------------


def _parsed(path: Path, text: str, notes: list[str]) -> tuple[str, _Rows]:
    """The separator, and the records that are not empty."""
    lines = io.StringIO(text, newline="").readlines()
    start, separator = 0, None
    if lines and re.fullmatch(r"sep=[,;\t]\s*", lines[0], re.IGNORECASE):  # Excel's own
        separator, start = lines[0][4], 1
    remarks = len(list(itertools.takewhile(_is_remark, lines[start:])))
    if remarks:
        notes.append(f"{remarks} lines of remarks (#) at the top of {path.name} were left out.")
    start += remarks
    if not any(map(_WRITTEN.search, lines[start:])):
        _refuse(path, "it is empty", f"write {_SHAPE}")
    separator = separator or _separator(path, lines[start:])
    rows = _records(path, lines, start, separator, skip_spaces=False)
    if separator != "\t" and _has_spaces(rows):
        # comma and space separate here, and a quote counts behind the space as well
        rows = _records(path, lines, start, separator, skip_spaces=True)
        name = _SEPARATORS[separator]
        notes.append(f"The spaces behind every {name} of {path.name} were read as part of it.")
    return separator, rows


def _records(
    path: Path, lines: list[str], start: int, separator: str, *, skip_spaces: bool
) -> _Rows:
    reader = csv.reader(
        lines[start:], delimiter=separator, strict=True, skipinitialspace=skip_spaces
    )
    rows = _Rows([], [])
    line = start + 1
    try:
        for cells in reader:
            if any(map(str.strip, cells)):
                rows.lines.append(line)
                rows.cells.append(cells)
            line = start + reader.line_num + 1
    except csv.Error as error:
        _refuse(
            path, f"the quotes of line {line} do not close where a cell ends ({error})", "mend them"
        )
    return rows


def _separator(path: Path, lines: Sequence[str]) -> str:
    """The separator that makes a header of the first line, or else paths of pictures in it."""
    first = next(line for line in lines if _WRITTEN.search(line))
    known = [mark for mark in _SEPARATORS if _is_header(first, mark)]
    if not known:
        known = [mark for mark in _SEPARATORS if any(map(_is_picture, _split_line(first, mark)))]
    present = known or list(_SEPARATORS)
    counts = {mark: len(_split_line(first, mark)) for mark in present}
    return max(
        counts, key=lambda mark: (counts[mark], path.suffix.lower() == ".tsv" and mark == "\t")
    )


def _split_line(line: str, separator: str) -> list[str]:
    return next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])


def _is_header(line: str, separator: str | None = None) -> bool:
    """Whether a line names a column of pictures, and holds no picture."""
    marks = _SEPARATORS if separator is None else [separator]
    cells = {cell for mark in marks for cell in _split_line(line, mark)}
    names = {_plain(cell) for cell in cells}
    return not names.isdisjoint(map(_plain, PATH_NAMES)) and not any(map(_is_picture, cells))


def _is_remark(line: str) -> bool:
    holds_picture = any(
        _is_picture(cell) for mark in _SEPARATORS for cell in _split_line(line, mark)
    )
    return line.startswith("#") and not holds_picture and not _is_header(line)


def _has_spaces(rows: _Rows) -> bool:
    """Whether every cell but the first of every row begins with a space."""
    behind = [cell for cells in rows.cells for cell in cells[1:]]
    return bool(behind) and all(cell.startswith(" ") for cell in behind)


# ---- columns ------------------------------------------------------------------------------------


def _named(path: Path, rows: _Rows, separator: str, notes: list[str]) -> tuple[list[str], _Rows]:
    """The names of the columns, and the rows below them."""
    first = [cell.strip() for cell in rows.cells[0]]
    while first and not first[-1]:  # a separator at the end of the line
        first.pop()
    if not any(map(_is_picture, first)):
        names = [name or f"column {number}" for number, name in enumerate(first, start=1)]
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            _refuse(
                path, f"several of its columns are called {twice[0]}", "give each a name of its own"
            )
        if len(rows.cells) == 1 and _chosen(path, names, PATH_NAMES, []) is not None:
            _refuse(path, "it has a header and no rows", f"write {_SHAPE}")
        return names, _Rows(rows.lines[1:], rows.cells[1:])
    places = [number for number, cell in enumerate(first) if _is_picture(cell)]
    if len(places) > 1 or len(first) > 2:
        _refuse(
            path,
            f"it has no header, and {len(first)} columns of which {len(places)} hold pictures",
            "write a first line that names them, such as path,label",
        )
    names = ["path" if number in places else "label" for number in range(len(first))]
    notes.append(
        f"{path.name} has no header: its {_SEPARATORS[separator]}-separated columns were read as "
        f"{', '.join(names)}."
        if len(names) > 1
        else f"{path.name} has no header: each line was read as the path of a picture."
    )
    return names, rows


def _chosen(path: Path, names: list[str], known: tuple[str, ...], notes: list[str]) -> int | None:
    """The number of the column with the first of the known names; says which were passed over."""
    plain = [_plain(name) for name in names]
    order = [_plain(name) for name in known]
    found = sorted(
        (number for number, name in enumerate(plain) if name in order),
        key=lambda number: order.index(plain[number]),
    )
    if not found:
        return None
    others = [names[number] for number in found[1:]]
    if others and plain[found[0]] == plain[found[1]]:
        _refuse(
            path,
            f"both {names[found[0]]} and {others[0]} may be its {known[0]}",
            "rename one of them",
        )
    if others:
        notes.append(
            f"The column {names[found[0]]} of {path.name} was read as the {known[0]}, not "
            f"{', '.join(others)}."
        )
    return found[0]


def _columns(
    path: Path,
    rows: _Rows,
    names: list[str],
    needed: dict[str, int | None],
    notes: list[str],
) -> list[list[str]]:
    """The cells by column, of rows that are all as wide as the header."""
    width = len(names)
    for line, cells in zip(rows.lines, rows.cells, strict=True):
        if len(cells) == width:
            continue
        if any(cells[width:]):
            _refuse(
                path,
                f"line {line} has {len(cells)} cells where the first has {width}",
                'put a cell that contains the separator into quotes ("a, b.png")',
            )
        absent = [kind for kind, number in needed.items() if (number or 0) >= len(cells)]
        if absent:
            _refuse(
                path,
                f"line {line} has {len(cells)} of the {width} cells, and no {absent[0]}",
                "complete it",
            )
        # Excel leaves out empty cells at the end of some lines
        cells[:] = (cells + [""] * width)[:width]
    return [list(column) for column in zip(*rows.cells, strict=True)] or [[] for _ in names]


def _need_every_cell(
    path: Path, rows: _Rows, columns: list[list[str]], number: int | None, kind: str
) -> None:
    if number is not None and "" in columns[number]:
        line = rows.lines[columns[number].index("")]
        _refuse(path, f"line {line} names no {kind}", "complete or delete it")


def _local(path: Path, rows: _Rows, places: list[str], with_addresses: bool) -> list[str]:
    """Paths with `/`, whatever system wrote them; addresses as they are."""
    return [
        place
        if ("\\" not in place and ":" not in place) or (with_addresses and is_address(place))
        else _one_local(path, line, place)
        for line, place in zip(rows.lines, places, strict=True)
    ]


def _one_local(path: Path, line: int, place: str) -> str:
    if place.lower().startswith("file:"):
        inner = unquote(place[len("file:") :]).replace("\\", "/")
        inner = re.sub(r"^//(localhost)?(?=/)", "", inner)  # another host stays: //server/folder
        return inner[1:] if _DRIVE.match(inner) else inner
    if _ADDRESS.match(place):
        _refuse(path, f"line {line} names an address ({place})", "download the pictures first")
    if os.sep == "/" and os.path.isfile(f"{path.parent}/{place}"):
        return place  # here a backslash may be part of a name
    return place.replace("\\", "/")


def _repeated(path: Path, table: Table) -> Iterator[str]:
    """What is listed several times."""
    twice = {place for place, count in Counter(table.places).items() if count > 1}
    if not twice:
        return
    labels: dict[str, set[str]] = {}
    for place, label in zip(table.places, table.labels or [], strict=False):
        if place in twice:
            labels.setdefault(place, set()).add(label)
    several = [place for place, found in labels.items() if len(found) > 1]
    end = f", {len(several)} of them under several labels ({several[0]})" if several else ""
    yield f"{len(twice)} pictures of {path.name} are listed more than once{end}."


def _plain(name: str) -> str:
    """A name of a column as it is compared: file_name, File Name and #filename are one."""
    return re.sub(r"[\s_-]", "", name.lstrip("#").casefold())


def _is_picture(cell: str) -> bool:
    return cell.strip().lower().endswith(PICTURE_SUFFIXES)


def _refuse(path: Path, cause: str, remedy: str) -> NoReturn:
    raise ValueError(f"Expected {path} to be a list of pictures, but {cause}; {remedy}.")
