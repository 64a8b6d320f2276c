"""Built indexes in the user's cache, so that the next process maps what this one built.

Each lies in a folder of its own below `indexes`, named by the hash of the manifest and of what else
decides the index: the index as faiss writes it, and a JSON with the hashes of its blocks and of
pieces of the row files. It holds what was made of rows that were hashed, is ours alone (mode 0600),
and no byte of it is parsed that was not hashed just before. Nobody needs it: what is missing,
damaged, of another version of faiss or of somebody else is built again.
"""

import functools
import hashlib
import logging
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
from filelock import FileLock, Timeout

from ..core import manifest as manifest_module
from ..core.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    SHA256_PATTERN,
    DatastoreError,
    FileRecord,
    IndexInfo,
    Manifest,
    check_format,
    hash_read_blocks,
    parse_index,
    read_at,
    signed_json,
)
from ..core.plain_json import Fields, read_json
from .folders import cache_root, short_name
from .mapped import RowFile

logger = logging.getLogger(__name__)

FOLDER, ABOUT_NAME, INDEX_NAME = "indexes", "about.json", "index.faiss"

MOST_BYTES = 10 * 10**9
"""All kept indexes together: one of ten million rows of 384 values in float16."""

MOMENT = 0.5
"""Seconds that an index took to build at least, if it is kept."""

_FORMAT = "hf_knn.kept-index"
_MADE = 1  # to be raised where the rows of an index are made of stored ones in another way
_LOCK_NAME = ".lock"


class IndexFile(Protocol):
    """A serialized index that native code may parse.

    Attributes:
        record: what it holds.
    """

    @property
    def record(self) -> FileRecord:
        """See above."""
        ...

    def read(self, library: Any) -> Any:
        """The index, parsed by faiss within limits that the caller sets."""
        ...


class TrustedIndex(NamedTuple):
    """One that lies beside the rows, for callers who said that they trust it.

    Attributes:
        file: open for reading.
        record: what it held when it was opened.
    """

    file: BinaryIO
    record: FileRecord

    def read(self, library: Any) -> Any:
        """Reads from the open file that was hashed, whatever has its name by now."""
        found, position = hashlib.sha256(), 0

        def read(size: int) -> bytes:
            nonlocal position
            piece = read_at(self.file, position, size)
            position += len(piece)
            found.update(piece)
            return piece

        index = library.read_index(library.PyCallbackIOReader(read))
        while read(2**20):
            pass  # what faiss had no use for was promised too
        if found.hexdigest() != self.record.sha256:
            raise DatastoreError(
                f"Expected {self.record.name} to be as it was opened, but it changed on disk "
                "since; open the datastore again, without trust_faiss_index, and save it."
            )
        return index


class MappedIndex:
    """One of the user's own cache, mapped into memory and hashed; other processes share its pages.

    The index that faiss reads of it looks into this memory, so this object must live as long.

    Args:
        path: of the file.
        record: what it must hold.

    Raises:
        OSError: if it is gone.
        DatastoreError: if it holds something else, or is not ours alone.
    """

    def __init__(self, path: Path, record: FileRecord) -> None:
        self.record = record
        with _opened(path) as file:
            if os.fstat(file.fileno()).st_size != record.size or not record.size:
                raise DatastoreError(f"Expected {path} to have {record.size} bytes.")
            self._map = mmap.mmap(file.fileno(), record.size, access=mmap.ACCESS_READ)
        view = memoryview(self._map)
        record.compare(lambda start, count: view[start : start + count])
        self._reader: Any = None

    def read(self, library: Any) -> Any:
        """See `IndexFile`."""
        values = np.frombuffer(self._map, np.uint8)
        self._reader = library.ZeroCopyIOReader(library.swig_ptr(values), len(values))
        return library.read_index(self._reader)


@dataclass(frozen=True)
class Known:
    """What is known of a kept index.

    Attributes:
        info: which index it is, with its parameters and measured recall.
        largest: length of the longest row, see `RowSpace`.
        made_by: the version of faiss that wrote it.
        record: of the file with the index.
        pieces: by name of a row file, a hash of each of its pieces; empty where nobody saw it.
    """

    info: IndexInfo
    largest: float
    made_by: str
    record: FileRecord
    pieces: dict[str, list[str]]

    @classmethod
    def read(cls, path: Path, key: str | None = None) -> tuple["Known", Fields]:
        """Reads an `about.json`, and what else it says.

        Raises:
            OSError: if it is gone.
            DatastoreError: if it is damaged, not ours, or of another key.
        """
        _opened(path).close()
        fields = Fields(read_json(path), "")
        check_format(fields, _FORMAT)
        if key not in (None, fields.matching("key", SHA256_PATTERN)):
            raise DatastoreError(f"Expected {path} to be of {key}.")
        largest, pieces = fields.get("largest"), fields.get("pieces")
        lists = [fields.items("blocks"), *(pieces.values() if isinstance(pieces, dict) else [None])]
        if not isinstance(largest, float) or not all(map(_are_hashes, lists)):
            raise DatastoreError(f"Expected {path} to hold a length, and hashes.")
        record = FileRecord(INDEX_NAME, fields.count("size"), "", fields.items("blocks"))
        if len(record.blocks) != _blocks_of(record.size):
            raise fields.wrong("blocks", f"the hashes of {record.size} bytes")
        info, made_by = parse_index(fields.get("index")), fields.text("made_by")
        return cls(info, largest, made_by, record, pieces), fields


class KeptIndex:
    """Where the built index of one version of a datastore is kept.

    Args:
        manifest: of the version.
        info: which index it is to be.
        folder: where the version lies; it is kept as long as it lies there.
    """

    def __init__(self, manifest: Manifest, info: IndexInfo, folder: Path) -> None:
        self.mark, self.folder, self.info = _mark(manifest), folder.absolute(), info
        self.rows = manifest.num_rows
        facts = repr((_FORMAT, _MADE, self.mark, sorted(asdict(info).items())))
        self.key = hashlib.sha256(facts.encode()).hexdigest()
        self._known: Known | None = None

    @property
    def place(self) -> Path:
        """The folder of the index, which need not be there."""
        return _root() / short_name(self.key)

    def known(self) -> Known | None:
        """What is known of it; None if it is not kept."""
        if self._known is None:
            try:
                self._known, _ = Known.read(self.place / ABOUT_NAME, self.key)
            except (FileNotFoundError, NotADirectoryError):
                return None
            except (OSError, DatastoreError) as error:
                self.discard(error)
        return self._known

    def tell(self, files: Sequence[RowFile]) -> None:
        """Tells row files the hashes of their pieces, or to note them."""
        known = self.known()
        for file in files:
            pieces = [] if known is None else known.pieces.get(file.record.name, [])
            if len(pieces) == len(file.pieces):
                file.pieces = list(pieces)
            file.notes_pieces = known is None

    def open(self, made_by: str) -> MappedIndex | None:
        """The index, hashed; None, with a warning if it is damaged, where there is none to read.

        Args:
            made_by: the version of faiss that will read it.
        """
        known = self.known()
        if known is None or known.made_by != made_by:
            return None
        try:
            found = MappedIndex(self.place / INDEX_NAME, known.record)
        except (OSError, DatastoreError) as error:
            self.discard(error)
            return None
        with suppress(OSError):  # a cache that can only be read is of use too
            os.utime(self.place / ABOUT_NAME)  # when it was last of use
        return found

    def discard(self, error: Exception) -> None:
        """Removes it, and says why."""
        self._known = None
        logger.warning("The index is built again, the kept one cannot be used: %s", error)
        shutil.rmtree(self.place, ignore_errors=True)

    def write(
        self, write: Callable[[Path], object], info: IndexInfo, largest: float, made_by: str,
        files: Sequence[RowFile],
    ) -> None:  # fmt: skip
        """Keeps an index; a folder that is full or cannot be written is one warning.

        Whoever else is just writing goes first, and this one is not kept.

        Args:
            write: writes it to a path.
            info: what it is.
            largest: see `Known`.
            made_by: the version of faiss.
            files: the row files that are mapped, whose pieces are remembered.
        """
        facts = {
            "format": _FORMAT, "format_version": FORMAT_VERSION, "key": self.key,
            "manifest": self.mark, "folder": str(self.folder), "rows": self.rows,
            "index": asdict(info), "largest": float(largest), "made_by": made_by,
            "pieces": {file.record.name: file.pieces for file in files},
        }  # fmt: skip
        root = self.place.parent
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            with FileLock(root / _LOCK_NAME, timeout=0):
                self._write(root, write, facts)
        except Timeout:
            logger.debug("%s is just being written to.", root)
        except OSError as error:
            _warn_once(f"{root}: {error}")

    def _write(self, root: Path, write: Callable[[Path], object], facts: dict[str, object]) -> None:
        _remove([*_litter(root), *_superseded(root)])
        with suppress(OSError, DatastoreError):
            if Known.read(self.place / ABOUT_NAME, self.key)[0].made_by == facts["made_by"]:
                return  # another process was faster
        shutil.rmtree(self.place, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(prefix=".", dir=root))  # with mode 0700
        try:
            size = _write_privately(staging / INDEX_NAME, write)
            if size > MOST_BYTES or size > shutil.disk_usage(root).free:
                logger.info("The index takes %d bytes, which are too many to be kept.", size)
                return
            with (staging / INDEX_NAME).open("rb") as file:
                blocks = hash_read_blocks(partial(read_at, file), _blocks_of(size))
            text = signed_json(facts | {"size": size, "blocks": blocks}).encode()
            _write_privately(staging / ABOUT_NAME, lambda path: path.write_bytes(text))
            _opened(staging / ABOUT_NAME).close()  # a file system without modes keeps nothing
            _make_room(root, size)
            staging.rename(self.place)
            if not _lies_in(self.folder, self.mark):  # it was replaced meanwhile
                _remove([self.place])
        except DatastoreError as error:
            _warn_once(str(error))
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def tidy() -> None:
    """Removes what is no longer of use: indexes of versions that were replaced, and litter.

    Whoever replaces a version calls it afterwards: of rows that were removed nothing is left. An
    index that is just written needs no waiting for: its writer looks for the version at the end.
    """
    root = _root()
    if not os.path.isdir(root):  # also one that this user may not look into, and so has not filled
        return
    try:
        _remove(list(_superseded(root)))
        with FileLock(root / _LOCK_NAME, timeout=0):
            _remove(list(_litter(root)))
    except Timeout:
        pass  # whoever is writing cleared it first
    except OSError as error:
        logger.warning("Indexes in %s may still hold rows that were removed: %s", root, error)


def _root() -> Path:
    try:
        return cache_root() / FOLDER
    except RuntimeError:  # nobody's home: a place where nothing can be
        return Path(os.devnull, FOLDER)


def _entries(root: Path) -> Iterator[tuple[Path, Fields | None]]:
    """The folders of kept indexes and what they say of themselves; None for a damaged one."""
    for path in sorted(root.glob("[!.]*")):
        try:
            if not _is_ours(path.stat()):
                continue  # of another user of the same cache
            yield path, Known.read(path / ABOUT_NAME)[1]
        except FileNotFoundError:
            if path.is_dir():
                yield path, None
        except (OSError, DatastoreError):
            yield path, None


def _litter(root: Path) -> Iterator[Path]:
    """What writers left that were killed; whoever asks has the lock."""
    return (path for path in root.glob(".*") if path.is_dir())


def _superseded(root: Path) -> Iterator[Path]:
    """Kept indexes that are damaged, or whose version no longer lies where it was opened."""
    for path, fields in _entries(root):
        if fields is None or not _lies_in(Path(fields.text("folder")), fields.text("manifest")):
            yield path


def _lies_in(folder: Path, mark: str) -> bool:
    try:
        return _mark(Manifest.read(folder / MANIFEST_NAME)) == mark
    except (OSError, DatastoreError):
        return False


def _mark(manifest: Manifest) -> str:
    """What tells versions apart that are searched otherwise; backbone and source do not matter."""
    searched = replace(manifest, binding=None, source={}, faiss_index=None)
    return hashlib.sha256(searched.to_json().encode()).hexdigest()


def _remove(places: Sequence[Path]) -> None:
    for place in places:
        try:
            shutil.rmtree(place)
        except FileNotFoundError:
            pass  # somebody else removed it just now
        except OSError as error:
            logger.warning("%s may still hold rows that were removed: %s", place, error)


def _make_room(root: Path, size: int) -> None:
    """Removes what was not of use for longest, until so many bytes more are within the bound."""
    found = []
    for entry, _ in _entries(root):
        states = [path.stat() for path in entry.glob("*")]
        used = max((state.st_mtime for state in states), default=0.0)
        found.append((used, sum(state.st_size for state in states), entry))
    total = size + sum(bytes_of for _, bytes_of, _ in found)
    for _, bytes_of, entry in sorted(found):
        if total <= MOST_BYTES:
            return
        _remove([entry])
        total -= bytes_of


def _write_privately(path: Path, write: Callable[[Path], object]) -> int:
    """Writes a file that nobody else may read; returns its size."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    write(path)
    return path.stat().st_size


def _opened(path: Path) -> BinaryIO:
    """Opens a file that nobody else can have written, or can read."""
    file = path.open("rb")
    state = os.fstat(file.fileno())
    if not _is_ours(state) or (os.name == "posix" and state.st_mode & 0o077):
        file.close()
        raise DatastoreError(f"Expected {path} to be our own, with mode 0600.")
    return file


def _is_ours(state: os.stat_result) -> bool:
    return not hasattr(os, "geteuid") or state.st_uid == os.geteuid()


def _blocks_of(size: int) -> int:
    return -(-size // manifest_module.HASH_BLOCK)


def _are_hashes(found: object) -> bool:
    return isinstance(found, list) and all(
        isinstance(text, str) and (not text or SHA256_PATTERN.fullmatch(text)) for text in found
    )


@functools.cache
def _warn_once(problem: str) -> None:
    logger.warning("Built indexes are not kept for the next process: %s", problem)
