"""Pictures to be answered, from whatever names them: files, folders, lists, addresses, datasets."""

import glob
import http.client
import os
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from .batches import IMAGE, SAMPLE_ID, cell_source
from .decode import PICTURE_SUFFIXES, BadImageError, limits_of_process
from .loading import read_pictures
from .places import find_local, is_saved
from .tables import is_address, is_table, read_table
from .walk import find_pictures, nfc, shown

STANDARD_INPUT = "-"

MAX_ADDRESS_BYTES = 64 * 2**20
"""Of a picture that is fetched, unless the limit of all pictures is lower."""

FETCH_SECONDS, SILENT_SECONDS = 60.0, 15.0
"""How long fetching one picture may take, and how long nothing may come meanwhile."""

_REDIRECTS = 5
_CHUNK = 2**16
_LOOKED_AT = 100
"""Lines of a list by which it is told from a table."""

_WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff")
_PICTURES = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")


class Picture(NamedTuple):
    """A picture that is to be answered.

    Attributes:
        name: what its answer is called by: the path or address as it was given, or
            `dataset:split:row`.
        place: its file or address; empty for a row of a dataset.
        rows: the dataset that it is a row of, or None.
        row: its number there.
    """

    name: str
    place: str
    rows: Any = None
    row: int = 0

    def cell(self) -> dict[str, Any]:
        """What `cell_source` reads: nothing is opened or fetched yet."""
        if self.rows is not None:
            entry: dict[str, Any] = self.rows[self.row][IMAGE]
            return entry
        found: dict[str, Any] = {"bytes": None, "path": self.place}
        return found | ({"fetch": partial(fetch, self.place)} if is_address(self.place) else {})

    def key(self) -> str:
        """Which picture it is, and of a file in which state: another one has another key."""
        if self.rows is not None:
            return f"{self.rows._fingerprint} {self.name}"
        if is_address(self.place):
            return self.place
        try:
            state = os.stat(self.place)
        except (OSError, ValueError):
            return f"{self.place} ?"
        return f"{self.place} {state.st_size} {state.st_mtime_ns}"


@dataclass
class Sources:
    """What was named.

    Attributes:
        pictures: in the order of the sources; each file and address once.
        notes: what was left out, in sentences.
    """

    pictures: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class SourceRows:
    """Pictures as the rows of a dataset, for `encode_rows`; only one that is decoded is read.

    Args:
        pictures: N of them.
    """

    def __init__(self, pictures: Sequence[Picture]) -> None:
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, numbers: Sequence[int]) -> dict[str, list[Any]]:
        cells = [self._pictures[number].cell() for number in numbers]
        return {IMAGE: cells, SAMPLE_ID: list(numbers)}

    def select_columns(self, _: Sequence[str]) -> "SourceRows":
        """These: there are no other columns than a picture and its number."""
        return self

    def source_of(self, number: int) -> bytes | str:
        """What is to be decoded of one.

        Args:
            number: of the row.

        Raises:
            BadImageError: if there is nothing, or it cannot be fetched.
        """
        return cell_source(self._pictures[number].cell())


def find_sources(
    sources: Sequence[str], read_input: Callable[[], bytes], split: str | None = None
) -> Sources:
    """Finds the pictures that are named, without opening one.

    A file or an address that comes twice is one picture, at its first place. Two names of one file
    (links) are two. Paths in a list are relative to the folder that the list lies in, those of the
    standard input to the current one.

    Args:
        sources: each a picture, a folder (looked through as for training), a pattern such as
            `inbox/**/*.jpg`, an address (http or https), a csv or tsv with a column of paths, a
            text of paths, `-` for such a text from the standard input, a parquet file, a folder of
            `Dataset.save_to_disk`, or a Hub dataset id.
        read_input: reads the standard input.
        split: which split of the datasets; None is all of them, one after the other.

    Returns:
        The pictures and what was left out.

    Raises:
        FileNotFoundError: for a source that is not there.
        ValueError: for a source of another kind, a list that cannot be read, a split that is not
            there, or if there is no picture at all, saying what there is instead.
    """
    found, seen, twice = Sources(), set(), 0
    for source in sources:
        for picture in _pictures_of(source, read_input, split, found.notes):
            once = picture.name if picture.rows is not None else _identity(picture.place)
            if once in seen:
                twice += 1
                continue
            seen.add(once)
            found.pictures.append(picture)
    if not found.pictures:
        raise ValueError(" ".join((
            f"Expected pictures in {shown(sources)}, but there are none.", *found.notes,
        )))  # fmt: skip
    if twice:
        what = "1 picture was" if twice == 1 else f"{twice} pictures were"
        found.notes.append(f"{what} named again and answered once.")
    return found


def fetch(address: str) -> bytes:
    """Gets a picture from the web.

    Args:
        address: http or https; it may lead on to others of these two alone, five times.

    Raises:
        BadImageError: if it cannot be had, is too large or takes too long.
    """
    most = min(limits_of_process().bytes, MAX_ADDRESS_BYTES)
    until = time.monotonic() + FETCH_SECONDS
    try:
        request = urllib.request.Request(
            quote(address, safe="%/:=&?~#+!$,;'@()*[]"), headers={"User-Agent": "hf-knn"}
        )
        with _opener().open(request, timeout=SILENT_SECONDS) as answer:
            data = bytearray()
            while part := answer.read1(_CHUNK):
                data += part
                if len(data) > most:
                    reason = f"it has more than {most} bytes; download it"
                    raise BadImageError(reason, is_unread=True)
                if time.monotonic() > until:
                    raise BadImageError(f"fetching it took more than {FETCH_SECONDS:.0f} seconds")
            return bytes(data)
    except BadImageError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise BadImageError(f"it cannot be fetched ({error})") from error


class _OnlyWeb(urllib.request.HTTPRedirectHandler):
    """Follows addresses of the web alone, and not for ever."""

    max_redirections = _REDIRECTS

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if not is_address(newurl):
            raise BadImageError(f"it leads to {newurl}, which is not on the web")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """One that has nothing for file, ftp or data."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPErrorProcessor, _OnlyWeb,
    ):  # fmt: skip
        opener.add_handler(handler())
    return opener


def _pictures_of(
    source: str, read_input: Callable[[], bytes], split: str | None, notes: list[str]
) -> Iterator[Picture]:
    if source == STANDARD_INPUT:
        lines = _lines(read_input(), "the standard input")
        return map(_of_place, lines)
    if is_address(source):
        return iter([Picture(source, source)])
    place = Path(source).expanduser()
    if place.is_dir() and not is_saved(place):
        return _of_folder(place, notes)
    if is_table(place) and place.is_file():
        return _of_list(place, notes)
    if place.is_file() and place.suffix.lower() != ".parquet":
        return iter([_of_place(str(place))])
    if not place.exists() and glob.has_magic(str(place)):
        return _of_pattern(str(place), notes)
    find_local(source)  # says what a source can be that is nothing of the kind
    return _of_dataset(source, split)


def _of_place(place: str) -> Picture:
    """A file or an address; a name that is no text is spelled."""
    return Picture(os.fsencode(place).decode("utf-8", "backslashreplace"), place)


def _of_folder(folder: Path, notes: list[str]) -> Iterator[Picture]:
    found = find_pictures(str(folder))
    notes += found.notes
    if not found.pictures:
        notes.append(f"{folder} holds no picture.")
    return (_of_place(str(folder / path)) for path in found.pictures)


def _of_pattern(pattern: str, notes: list[str]) -> Iterator[Picture]:
    """The pictures that a pattern names, and those in the folders that it names."""
    places = sorted(glob.glob(pattern, recursive=True), key=lambda path: (nfc(path), path))
    if not places:
        raise FileNotFoundError(
            f"Expected {pattern} to name pictures, but nothing fits it; check the folder."
        )
    found: dict[str, Picture] = {}
    others = []
    for place in places:
        if os.path.isdir(place):
            if "**" not in pattern:  # else what lies in it is named by itself
                found |= {each.place: each for each in _of_folder(Path(place), notes)}
        elif place.lower().endswith(PICTURE_SUFFIXES):
            found.setdefault(place, _of_place(place))
        else:
            others.append(place)
    if others:
        notes.append(f"Left out as no pictures by their names: {shown(others)}.")
    return iter(found.values())


def _of_list(path: Path, notes: list[str]) -> Iterator[Picture]:
    """The pictures of a table, or of a text with one path a line."""
    folder = path.parent
    if path.suffix.lower() == ".txt":
        lines = _lines(path.read_bytes(), str(path))
        if any(is_address(one) or os.path.exists(folder / one) for one in lines[:_LOOKED_AT]):
            return (_of_place(_joined(folder, line)) for line in lines)
    table = read_table(path, with_addresses=True)
    notes += table.notes
    return (_of_place(_joined(folder, place)) for place in table.places)


def _joined(folder: Path, place: str) -> str:
    return place if is_address(place) else str(folder / place)


def _of_dataset(source: str, split: str | None) -> Iterator[Picture]:
    splits = read_pictures(source)
    if split is not None and split not in splits:
        raise ValueError(f"Expected a split of {source}, {sorted(splits)}, but got {split!r}.")
    return (
        Picture(f"{source}:{name}:{row}", "", rows, row)
        for name, rows in splits.items()
        if split in (None, name)
        for row in range(len(rows))
    )


def _lines(data: bytes, what: str) -> list[str]:
    """Paths, one a line, or with a NUL byte behind each as `find -print0` writes them."""
    if data.startswith(_PICTURES) and b"\0" in data:
        raise ValueError(f"Expected {what} to be paths, one a line, but it is a picture; name it.")
    if data.startswith(_WIDE_MARKS):  # as PowerShell writes
        text = data.decode("utf-16")
    else:
        text = os.fsdecode(data.removeprefix(b"\xef\xbb\xbf"))
    if "\0" in text:
        return [path for path in text.split("\0") if path]
    return [path for line in text.split("\n") if (path := line.rstrip("\r")).strip()]


def _identity(place: str) -> str:
    return place if is_address(place) else os.path.abspath(place)
