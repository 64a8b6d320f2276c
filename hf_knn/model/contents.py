"""Prints of stored pictures, by which a picture is known again; kept in one file of a checkpoint.

A row holds features alone, so the print of its picture lies beside it, with a mark of the features
that it was made with. Whatever became of the rows behind a model's back: a print is never believed
of a row that is another one now.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.manifest import DatastoreError
from ..core.reading import CONTENTS_NAME
from ..core.search import Ints
from ..data.batches import CONTENT_BYTES
from ..store.table import StoredRows

_LARGEST_FILE = 4 * 2**30
_NAMES = ("ids", "marks", "prints")


@dataclass(frozen=True)
class Contents:
    """Prints by row id; never changed, so that copies of a model share them.

    Attributes:
        ids: [N] int64, unique.
        marks: [N] int64, of the features of each row, see `marks_of`.
        prints: [N, 16] uint8, of the picture of each row, see `content_of`.
    """

    ids: Ints
    marks: Ints
    prints: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.ids)

    def __deepcopy__(self, _: Any) -> Self:
        return self

    @classmethod
    def of(cls, blocks: Iterable[StoredRows], ids: Tensor, prints: Tensor | None) -> Self | None:
        """Prints of pictures for their rows as they are stored.

        Args:
            blocks: all of the rows, in any order.
            ids: [N] int64, of the rows.
            prints: [N, 16] uint8, of their pictures, in the order of the ids; None if nobody knows.
        """
        if prints is None:
            return None
        marks: dict[int, int] = {}
        for rows in blocks:
            marks |= zip(rows.ids.tolist(), marks_of(rows.features).tolist(), strict=True)
        wanted = ids.tolist()
        return cls(
            np.array(wanted, np.int64),
            np.array([marks[row_id] for row_id in wanted], np.int64),
            prints.numpy().copy(),
        )

    def only(self, ids: Iterable[int]) -> Self:
        """Those of some rows, where there are any.

        Args:
            ids: of the rows.
        """
        return self._at(np.isin(self.ids, np.fromiter(ids, np.int64)))

    def without(self, ids: Iterable[int]) -> Self:
        """All but those of some rows.

        Args:
            ids: of the rows.
        """
        return self._at(~np.isin(self.ids, np.fromiter(ids, np.int64)))

    def joined(self, other: "Contents") -> Self:
        """These and others, which win where both have one.

        Args:
            other: the others.
        """
        mine = self.without(other.ids.tolist())
        return type(self)(
            np.concatenate([mine.ids, other.ids]),
            np.concatenate([mine.marks, other.marks]),
            np.concatenate([mine.prints, other.prints]),
        )

    def prints_of(self, rows: StoredRows) -> dict[int, NDArray[np.uint8]]:
        """The prints that are still true.

        Args:
            rows: as they are stored now.

        Returns:
            Row id to print, of those that have one.
        """
        places = dict(zip(self.ids.tolist(), range(len(self)), strict=True))
        marks = marks_of(rows.features)
        return {
            row_id: self.prints[places[row_id]]
            for row_id, mark in zip(rows.ids.tolist(), marks, strict=True)
            if row_id in places and self.marks[places[row_id]] == mark
        }

    def rows_with(self, prints: NDArray[np.uint8]) -> list[list[tuple[int, int]]]:
        """Rows that have the prints of pictures.

        Args:
            prints: [M, 16] uint8.

        Returns:
            For each picture the id and the mark of each row, most often of none.
        """
        order, halves = self._by_print
        wanted = _first_half(prints)
        starts, stops = (np.searchsorted(halves, wanted, side) for side in ("left", "right"))
        found: list[list[tuple[int, int]]] = [[] for _ in wanted]
        for place in np.flatnonzero(starts < stops).tolist():
            for row in order[starts[place] : stops[place]].tolist():
                if np.array_equal(self.prints[row], prints[place]):
                    found[place].append((int(self.ids[row]), int(self.marks[row])))
        return found

    @cached_property
    def _by_print(self) -> tuple[Ints, NDArray[np.uint64]]:
        halves = _first_half(self.prints)
        order = np.argsort(halves, kind="stable").astype(np.int64)
        return order, halves[order]

    def _at(self, rows: NDArray[Any]) -> Self:
        return type(self)(*(column[rows] for column in self._columns()))

    def _columns(self) -> tuple[Ints, Ints, NDArray[np.uint8]]:
        return self.ids, self.marks, self.prints

    def save(self, folder: Path) -> None:
        """Writes the file into a folder, in the order of the ids.

        Args:
            folder: of a checkpoint, or of a backup of rows.
        """
        columns = self._at(np.argsort(self.ids))._columns()
        tensors = {name: torch.tensor(c) for name, c in zip(_NAMES, columns, strict=True)}
        save_file(tensors, folder / CONTENTS_NAME)

    @classmethod
    def load(cls, path: Path | None) -> Self | None:
        """Reads a file that `save` wrote, trusting nothing in it.

        Args:
            path: of the file; None if there is none.

        Raises:
            DatastoreError: for a file that is not what `save` writes.
        """
        if path is None:
            return None
        try:
            if path.stat().st_size > _LARGEST_FILE:
                raise ValueError("it is larger than 4 GiB.")
            with safe_open(path, "pt") as file:
                ids, marks, prints = (file.get_tensor(name) for name in _NAMES)
            _check(ids, marks, prints)
        except (SafetensorError, ValueError) as error:
            raise DatastoreError(
                f"Expected {CONTENTS_NAME} to hold prints of stored pictures, but: {error} "
                "Download or save the checkpoint again."
            ) from error
        return cls(ids.numpy(), marks.numpy(), prints.numpy())


def marks_of(features: NDArray[Any]) -> Ints:
    """[N] int64: equal for rows of equal values, whatever dtype they are stored as.

    Args:
        features: [N, D] float16 or float32.
    """
    rows = np.ascontiguousarray(features, "<f4")
    marks = [xxhash.xxh3_64_intdigest(row) for row in rows]
    return np.array(marks, np.uint64).astype(np.int64)


def _first_half(prints: NDArray[np.uint8]) -> NDArray[np.uint64]:
    return np.ascontiguousarray(prints).view("<u8")[:, 0]


def _check(ids: Tensor, marks: Tensor, prints: Tensor) -> None:
    if (ids.dtype, marks.dtype, prints.dtype) != (torch.int64, torch.int64, torch.uint8):
        raise ValueError("its tensors have other types.")
    if ids.ndim != 1 or marks.shape != ids.shape or prints.shape != (len(ids), CONTENT_BYTES):
        raise ValueError("its tensors have other shapes.")
    if len(ids.unique()) != len(ids):
        raise ValueError("some ids are doubled.")
