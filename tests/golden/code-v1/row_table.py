"""The rows of a datastore in memory, and how they are divided over files.

Both parts are values: a change returns a new table that shares what did not change, so copies cost
nothing and a change that fails leaves everything as it was.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .manifest import FileRecord

SHARD_BYTES = 5 * 10**9
"""A row file holds at most this many bytes of features."""

SMALL_SHARD_BYTES = 16 * 10**6
"""Added rows go into the last row file while it is smaller than this, else into a new one."""


_FEW = 8


class Shard(NamedTuple):
    """One row file: how many rows, and its record if the file holds them as they are."""

    rows: int
    record: FileRecord | None = None


class RowParts:
    """[N, D] features in one or more arrays, such as the mapped files of a large datastore.

    Indexed like one array, so that nobody has to join what would not fit into memory.

    Args:
        parts: tensors [n, D] of one dtype, at least one.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        filled = [part.contiguous() for part in parts if len(part)]
        self.parts = filled or [parts[0]]
        self._ends = np.cumsum([len(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        return len(self), self.parts[0].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of every part."""
        return self.parts[0].dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.shape[1] * self.parts[0].element_size()

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> NDArray:
        """Rows by slice (without a copy inside one part) or by positions, in their order."""
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step != 1:
                raise ValueError(f"Expected a slice of step 1, but got {step}.")
            return self._between(start, stop)
        if len(self.parts) == 1:
            return self.parts[0].numpy()[rows]
        taken = np.empty((len(rows), self.shape[1]), self.parts[0].numpy().dtype)
        owner = np.searchsorted(self._ends, rows, side="right")
        for number, part in enumerate(self.parts):
            mine = owner == number
            taken[mine] = part.numpy()[rows[mine] - (self._ends[number] - len(part))]
        return taken

    def joined(self) -> Tensor:
        """[N, D] all rows as one tensor; a copy if there are several parts."""
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)

    def to(self, dtype: torch.dtype) -> "RowParts":
        """The same rows in another dtype."""
        return RowParts([part.to(dtype) for part in self.parts])

    def append(self, rows: Tensor) -> "RowParts":
        """With more rows at the end; only a small last part is copied."""
        last = self.parts[-1]
        if len(last) * self.row_bytes < SMALL_SHARD_BYTES:
            return RowParts([*self.parts[:-1], torch.cat([last, rows])])
        return RowParts([*self.parts, rows])

    def keep(self, kept: Tensor) -> "RowParts":
        """Without the rows whose `kept` [N] is False; parts that lose none are shared."""
        masks = kept.split([len(part) for part in self.parts])
        pairs = zip(self.parts, masks, strict=True)
        return RowParts([part if bool(mask.all()) else part[mask] for part, mask in pairs])

    def _between(self, start: int, stop: int) -> NDArray:
        pieces, begin = [], 0
        for part, end in zip(self.parts, self._ends.tolist(), strict=True):
            if start < end and stop > begin:
                pieces.append(part.numpy()[max(0, start - begin) : stop - begin])
            begin = end
        if not pieces:
            return self.parts[0].numpy()[:0]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


@dataclass(frozen=True)
class RowTable:
    """Rows of (features, label, id, path, list).

    Attributes:
        features: [N, D] float16 or float32.
        labels: [N] int64.
        ids: [N] int64, unique.
        paths: N strings, or None.
        lists: [N] int64, each row's list in an inverted-file index, or None.
        shards: how the rows are divided over files, at least one.
    """

    features: RowParts
    labels: Tensor
    ids: Tensor
    paths: list[str] | None
    lists: NDArray[np.int64] | None
    shards: list[Shard]

    @classmethod
    def of(
        cls, features: Tensor, labels: Tensor, ids: Tensor, paths: list[str] | None = None
    ) -> "RowTable":
        """A table of rows that no file holds yet."""
        parts = RowParts([features])
        return cls(parts, labels, ids, paths, None, split_into_shards(len(ids), parts.row_bytes))

    def __len__(self) -> int:
        return len(self.ids)

    def append(
        self,
        features: Tensor,
        labels: Tensor,
        ids: Tensor,
        paths: list[str] | None,
        lists: NDArray[np.int64] | None,
    ) -> "RowTable":
        """With more rows at the end.

        Args:
            features: [M, D]; all rows take this dtype.
            labels: [M].
            ids: [M], none of which is there.
            paths: M strings, or None; rows without one get an empty one where others have one.
            lists: [M] the lists of the rows; None forgets those of all.
        """
        mine = self.features
        same_files = features.dtype == mine.dtype and (self.paths is not None or paths is None)
        if features.dtype != mine.dtype:
            mine = mine.to(features.dtype)
        all_paths = None
        if self.paths is not None or paths is not None:
            all_paths = (self.paths or [""] * len(self)) + (paths or [""] * len(ids))
        if same_files:
            shards = append_to_shards(self.shards, len(ids), mine.row_bytes)
        else:
            shards = split_into_shards(len(self) + len(ids), mine.row_bytes)
        known = None
        if self.lists is not None and lists is not None:
            known = np.concatenate([self.lists, lists])
        return RowTable(
            mine.append(features),
            torch.cat([self.labels, labels]),
            torch.cat([self.ids, ids]),
            all_paths,
            known,
            shards,
        )

    def keep(self, kept: Tensor) -> "RowTable":
        """Without the rows whose `kept` [N] is False; their files will be written anew."""
        paths = None
        if self.paths is not None:
            paths = [p for p, stays in zip(self.paths, kept.tolist(), strict=True) if stays]
        return RowTable(
            self.features.keep(kept),
            self.labels[kept],
            self.ids[kept],
            paths,
            None if self.lists is None else self.lists[kept.numpy()],
            change_shards(self.shards, ~kept, kept),
        )

    def relabel(self, rows: Tensor, labels: Tensor) -> "RowTable":
        """With other labels [M] for the rows at some positions [M]."""
        changed = torch.zeros(len(self), dtype=torch.bool)
        changed[rows] = True
        shards = change_shards(self.shards, changed, torch.ones_like(changed))
        return replace(self, labels=self.labels.index_put((rows,), labels), shards=shards)

    def with_lists(self, lists: NDArray[np.int64] | None) -> "RowTable":
        """With other lists of an inverted-file index; all files will be written anew."""
        if self.lists is None and lists is None:
            return self
        return replace(self, lists=lists, shards=[Shard(shard.rows) for shard in self.shards])

    def with_new_mean(self) -> "RowTable":
        """To be written with another mean, which lies in the first file."""
        return replace(self, shards=[Shard(self.shards[0].rows), *self.shards[1:]])

    def positions(self, ids: Tensor) -> Tensor:
        """Where ids [M] lie: [M] int64, -1 for an id that is not there."""
        if not len(self):
            return torch.full_like(ids, -1)
        if len(ids) <= _FEW:  # looked for one by one: sorting all ids takes longer
            found = self.ids == ids.unsqueeze(1)  # [M, N]
            return torch.where(found.any(dim=1), found.int().argmax(dim=1), -1)
        wanted, back = ids.unique(return_inverse=True)  # fewer to sort than all that are there
        places = torch.searchsorted(wanted, self.ids).clamp(max=len(wanted) - 1)  # [N]
        hits = (wanted[places] == self.ids).nonzero().flatten()
        rows = torch.full_like(wanted, -1)
        rows[places[hits]] = hits
        return rows[back]


def split_into_shards(rows: int, row_bytes: int) -> list[Shard]:
    """Row files for new rows; one empty file for none.

    Args:
        rows: how many.
        row_bytes: bytes of features per row.
    """
    most = max(1, SHARD_BYTES // max(1, row_bytes))
    return [Shard(min(most, rows - start)) for start in range(0, max(1, rows), most)]


def append_to_shards(shards: Sequence[Shard], rows: int, row_bytes: int) -> list[Shard]:
    """Row files after rows were appended; large ones stay as they are."""
    if not rows:
        return list(shards)
    kept, last = list(shards[:-1]), shards[-1]
    if last.rows * row_bytes < SMALL_SHARD_BYTES:
        return [*kept, *split_into_shards(last.rows + rows, row_bytes)]
    return [*shards, *split_into_shards(rows, row_bytes)]


def change_shards(shards: Sequence[Shard], changed: Tensor, kept: Tensor) -> list[Shard]:
    """Row files after some rows were changed or removed; only theirs must be written again.

    Args:
        shards: the row files before.
        changed: [N] bool, rows with other content.
        kept: [N] bool, rows that are still there.
    """
    result, start = [], 0
    for shard in shards:
        part = slice(start, start + shard.rows)
        rows = int(kept[part].sum())
        touched = rows < shard.rows or bool(changed[part].any())
        result.append(Shard(rows, None if touched else shard.record))
        start += shard.rows
    filled = [shard for shard in result if shard.rows] or [Shard(0)]
    if filled[0] is not result[0]:
        filled[0] = Shard(filled[0].rows)  # the first file is the one with the mean
    return filled
