"""Row files that are mapped: each byte is hashed before it is first used, and no more than that.

A manifest has a hash per block of 64 MiB. Who hashes a block may hash its pieces of 256 KiB in the
same breath; where those are remembered (see `kept.py`), another process hashes what it reads.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..core import manifest
from ..core.lazy import Once
from ..core.manifest import DatastoreError, FileRecord, read_at
from ..core.rows import RowParts, refuse_non_finite
from ..core.search import Ints, Rows

PIECE = 256 * 2**10
"""Bytes that are hashed for a row that is read, where pieces are known; a part of a block."""

Span = tuple[int, int]
"""Bytes of a file: the first, and the one behind the last."""

_COPIED = 2**20
_LOOKED_AT = 2**20  # numbers at once: they stay in the processor's cache


class RowFile:
    """A row file that stays open, since the features in it are mapped into memory.

    They are what the file holds now: whoever writes into it changes them. So whoever copied some of
    them compares the file with its record afterwards, which finds a change of any time before.

    Args:
        record: what the file held when it was opened.
        file: open for reading; closed when nobody has its rows any more.
        features: [n, D] mapped.
        start: the byte of the file at which they begin.
        others: what else is copied when the file is opened.

    Attributes:
        pieces: a hash of each piece, as it was when its block was found whole; empty if unknown.
        notes_pieces: whether pieces are hashed with their blocks.
        is_whole: whether all rows were compared.
    """

    def __init__(
        self, record: FileRecord, file: BinaryIO, features: Tensor, start: int,
        others: Sequence[Span],
    ) -> None:  # fmt: skip
        self.record, self.file, self.features = record, file, features
        self.start, self.others = start, others
        self.pieces = [""] * -(-record.size // PIECE)
        self.notes_pieces = False
        self.is_whole = False
        end = start + features.numel() * features.dtype.itemsize
        self._of_rows = slice(start // PIECE, -(-end // PIECE))
        self._compared = np.zeros(len(self.pieces), bool)
        self._blocks = [
            Once(partial(self._compare_block, number)) for number in range(len(record.blocks))
        ]

    def __del__(self) -> None:
        self.file.close()

    def is_among(self, parts: Sequence[Tensor]) -> bool:
        """Whether some of these tensors [n, D] is mapped from the file."""
        return any(part is self.features for part in parts)

    def check_size(self) -> None:
        """Refuses a file that was cut off: whoever reads behind its end is killed.

        Raises:
            DatastoreError: with both sizes.
        """
        size = os.fstat(self.file.fileno()).st_size
        if size != self.record.size:
            raise DatastoreError(
                f"Expected {self.record.name} to keep the {self.record.size} bytes that it had "
                f"when it was opened, but got {size}; put a whole copy back, and open it again."
            )

    def verify(self) -> None:
        """Hashes the file as it is now.

        Raises:
            DatastoreError: if it is not what was opened.
        """
        self.check_size()
        pieces: dict[int, str] = {}
        try:
            self.record.compare(partial(self._read, 0, pieces))
        except DatastoreError as error:
            raise _changed(error) from error
        self._are_whole(np.arange(len(self.pieces)), pieces)

    def check_others(self) -> None:
        """Compares what was copied when the file was opened, unless it was compared since.

        Raises:
            DatastoreError: if the file is not what was promised.
        """
        for start, stop in self.others:
            self._check(np.arange(start // PIECE, -(-stop // PIECE)))

    def check_rows(self, first: Ints, last: Ints) -> None:
        """Compares the bytes of rows, unless they were compared before.

        Args:
            first: [M] positions in the file.
            last: [M] likewise, of rows up to and with which those from `first` on are meant.

        Raises:
            DatastoreError: if the file is not what was promised.
        """
        if self.is_whole or not len(first):
            return
        width = self.features.shape[1] * self.features.dtype.itemsize
        starts = (self.start + first * width) // PIECE
        counts = (self.start + (last + 1) * width - 1) // PIECE - starts + 1
        numbers = [starts[counts > more] + more for more in range(int(counts.max()))]
        self._check(np.unique(np.concatenate(numbers)))

    def copy_to(self, path: Path) -> None:
        """Copies the file, which may have lost its name.

        Raises:
            DatastoreError: if it is not what was opened.
        """
        self.check_size()
        with path.open("wb") as copy:
            while piece := read_at(self.file, copy.tell(), _COPIED):
                copy.write(piece)
        try:
            self.record.verify(path)
        except DatastoreError:
            self.verify()  # which says more, unless it was the copy that failed
            raise

    def _check(self, numbers: Ints) -> None:
        """Compares pieces, by number, that were not compared yet; those without a hash by block."""
        missing: list[int] = numbers[~self._compared[numbers]].tolist()
        known = [number for number in missing if self.pieces[number]]
        blocks = {self._block_of(number) for number in missing if not self.pieces[number]}
        are_seen = _in_threads(self._compare_piece, known)
        pairs = zip(known, are_seen, strict=True)
        blocks |= {self._block_of(number) for number, is_seen in pairs if not is_seen}
        _in_threads(lambda number: self._blocks[number](), sorted(blocks))

    def _compare_piece(self, number: int) -> bool:
        """Whether a piece is as it was seen to be; if not, its block is to be compared."""
        data = read_at(self.file, number * PIECE, PIECE)
        is_seen = hashlib.sha256(data).hexdigest() == self.pieces[number]
        if is_seen:
            self._are_whole(np.array([number]), {})
        return is_seen

    def _block_of(self, piece: int) -> int:
        return piece * PIECE // manifest.HASH_BLOCK

    def _compare_block(self, number: int) -> bool:
        """Compares a block with the record; numbers of rows in it must be finite."""
        start = number * manifest.HASH_BLOCK
        stop, pieces = min(start + manifest.HASH_BLOCK, self.record.size), dict[int, str]()

        def read(position: int, count: int) -> bytes:
            return self._read(start, pieces, position, min(count, stop - start - position))

        self.record.compare(read, number)
        self._refuse_non_finite(start, stop)
        self._are_whole(np.arange(start // PIECE, -(-stop // PIECE)), pieces)
        return True

    def _read(self, start: int, pieces: dict[int, str], position: int, count: int) -> bytes:
        """Bytes of the file from `start + position` on; notes the hashes of whole pieces."""
        data = read_at(self.file, start + position, count)
        if self.notes_pieces:
            for place in range(0, len(data), PIECE):
                piece = hashlib.sha256(memoryview(data)[place : place + PIECE])
                pieces[(start + position + place) // PIECE] = piece.hexdigest()
        return data

    def _are_whole(self, numbers: Ints, pieces: dict[int, str]) -> None:
        for number, digest in pieces.items():
            self.pieces[number] = digest
        self._compared[numbers] = True
        self.is_whole = bool(self._compared[self._of_rows].all())

    def _refuse_non_finite(self, start: int, stop: int) -> None:
        """Looks at the numbers of rows that lie between two bytes of the file."""
        dim, size = self.features.shape[1], self.features.dtype.itemsize
        first = max(0, start - self.start) // size
        last = -(-max(0, stop - self.start) // size)
        for place in range(first, min(last, self.features.numel()), _LOOKED_AT):
            part = slice(place, min(place + _LOOKED_AT, last))
            if not _are_finite(self.features.flatten()[part].numpy()):
                rows = self.features[place // dim : -(-part.stop // dim)]
                try:
                    refuse_non_finite(rows, f"features from row {place // dim} on")
                except ValueError as error:
                    raise DatastoreError(f"The datastore is not usable: {error}") from error


class CheckedRows(RowParts):
    """[N, D] features, of which those in mapped files are compared with their records when read.

    Args:
        parts: see `RowParts`.
        files: from which some of them are mapped.
    """

    def __init__(self, parts: Sequence[Tensor], files: Sequence[RowFile]) -> None:
        super().__init__(parts)
        owners = [next((f for f in files if f.is_among([part])), None) for part in self.parts]
        starts = np.cumsum([0, *map(len, self.parts)]).tolist()
        self._files = [
            (file, start, start + len(file.features))
            for file, start in zip(owners, starts, strict=False)
            if file is not None
        ]

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> NDArray:
        """Rows by slice (without a copy inside one part) or by positions, in their order.

        Raises:
            DatastoreError: naming a file that is not what was promised.
        """
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self))
            self._check(np.array([start]), np.array([stop - 1]))
        else:
            places = rows % max(1, len(self))
            self._check(places, places)
        return super().__getitem__(rows)

    def joined(self) -> Tensor:
        """[N, D] all rows as one tensor; a copy if there are several parts."""
        self._check(np.array([0]), np.array([len(self) - 1]))
        return super().joined()

    def _check(self, first: Ints, last: Ints) -> None:
        for file, start, stop in self._files:
            if not file.is_whole:
                mine = (last >= start) & (first < stop) & (first <= last)
                inside = np.maximum(first[mine], start) - start
                file.check_rows(inside, np.minimum(last[mine], stop - 1) - start)


def files_behind(features: Rows) -> list[RowFile]:
    """The files that some of the rows are mapped from."""
    return [file for file, _, _ in features._files] if isinstance(features, CheckedRows) else []


def _changed(error: DatastoreError) -> DatastoreError:
    return DatastoreError(
        f"{error} It changed on disk after it was opened, so that nothing that was read of it is "
        "kept or saved; put a whole copy back, and open it again."
    )


def _are_finite(values: NDArray) -> bool:
    """Whether floats are neither NaN nor infinite, by their exponents: much faster for float16."""
    kind, exponent = {2: (np.uint16, 0x7C00), 4: (np.uint32, 0x7F800000)}[values.dtype.itemsize]
    return not ((values.view(kind) & exponent) == exponent).any()


def _in_threads(task: Callable[[int], bool], numbers: Sequence[int]) -> list[bool]:
    """What a task makes of each number; hashing lets go of the interpreter."""
    if len(numbers) < 2:
        return [task(number) for number in numbers]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(task, numbers))
