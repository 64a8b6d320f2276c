"""The rows of a datastore in memory, how they are divided over files, and their fingerprint.

A table is a value: a change returns a new one that shares what did not change, so copies cost
nothing and a change that fails leaves everything as it was.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.manifest import FileRecord
from ..core.rows import RowParts
from ..core.search import Ints
from .mapped import RowFile
from .views import appended, kept, parts_of, reordered, with_parts

_MODULUS = 2**256


def check_paths(paths: Sequence[str] | None, count: int) -> list[str] | None:
    """Checks that there is one path per row, if there are paths.

    Raises:
        ValueError: with both numbers.
    """
    if paths is not None and len(paths) != count:
        raise ValueError(f"Expected one path per row ({count}), but got {len(paths)}.")
    return None if paths is None else list(paths)


class StoredRows(NamedTuple):
    """Rows as they are stored.

    Attributes:
        ids: [N] int64, unique.
        labels: [N] int64.
        features: [N, D] float16 or float32.
        paths: N strings; empty where unknown.
        splits: N strings; empty where unknown.
    """

    ids: Ints
    labels: Ints
    features: NDArray
    paths: list[str]
    splits: list[str]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Features, labels and ids."""
        features, labels = torch.from_numpy(self.features), torch.from_numpy(self.labels)
        return features, labels, torch.from_numpy(self.ids)

    def part(self, rows: slice) -> "StoredRows":
        """Some of them, by position."""
        ids, labels, features, paths, splits = self
        return StoredRows(ids[rows], labels[rows], features[rows], paths[rows], splits[rows])


def sum_of(rows: StoredRows) -> int:
    """The sum of the rows' hashes: add what of new rows, subtract that of removed ones.

    It finds accidents: a row lost, doubled or changed. It does not stop somebody who looks for
    other rows with the same sum.

    Args:
        rows: in any order.

    Returns:
        In [0, 2 ** 256).
    """
    total = 0
    values = np.ascontiguousarray(rows.features)
    little = values.astype(values.dtype.newbyteorder("<"), copy=False)
    for i, (row_id, label) in enumerate(zip(rows.ids.tolist(), rows.labels.tolist(), strict=True)):
        facts = json.dumps([row_id, label, rows.splits[i], rows.paths[i]]).encode()
        digest = hashlib.sha256(len(facts).to_bytes(8, "little") + facts + little[i].tobytes())
        total += int.from_bytes(digest.digest(), "little")
    return total % _MODULUS


def combine(total: int, count: int, mean: Tensor, *facts: str) -> str:
    """The fingerprint of a datastore.

    Args:
        total: the sum of its rows, taken modulo 2 ** 256.
        count: how many rows.
        mean: [D] float32.
        facts: metric, normalisation and whatever else must agree.

    Returns:
        64 hexadecimal digits.
    """
    parts = [f"{total % _MODULUS:064x}", str(count), *facts]
    parts.append(hashlib.sha256(mean.numpy().astype("<f4").tobytes()).hexdigest())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


SHARD_BYTES = 10**9
"""A row file holds at most this many bytes of features: they are in memory while it is written."""

SMALL_SHARD_BYTES = 16 * 10**6
"""Added rows go into the last row file while it is smaller than this, else into a new one."""

_FEW = 8


class Shard(NamedTuple):
    """One row file: how many rows, and its record if the file holds them as they are."""

    rows: int
    record: FileRecord | None = None


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
        files: those that features are mapped from.
    """

    features: RowParts
    labels: Tensor
    ids: Tensor
    paths: list[str] | None
    lists: NDArray[np.int64] | None
    shards: list[Shard]
    files: tuple[RowFile, ...] = ()

    @classmethod
    def of(
        cls, features: Tensor, labels: Tensor, ids: Tensor, paths: list[str] | None = None
    ) -> "RowTable":
        """A table of rows that no file holds yet."""
        parts = RowParts([features])
        return cls(parts, labels, ids, paths, None, split_into_shards(len(ids), _row_bytes(parts)))

    def __len__(self) -> int:
        return len(self.ids)

    def verify(self) -> None:
        """Hashes the files that features are mapped from, as they are now.

        Raises:
            DatastoreError: naming one that is not what was opened.
        """
        for file in self.files:
            file.verify()

    def not_cut_off(self) -> "RowTable":
        """Itself; a DatastoreError for a mapped file that was cut off, instead of a kill."""
        for file in self.files:
            file.check_size()
        return self

    def in_memory(self) -> "RowTable":
        """The same rows, none of them mapped.

        Raises:
            DatastoreError: for a file that is not what was opened.
        """
        parts = [part.clone() if self.files else part for part in self.features.parts]
        return replace(self, features=with_parts(self.features, parts))._copied_from(self)

    def files_behind(self, rows: slice) -> list[RowFile]:
        """The files that some rows, by position, are mapped from."""
        parts = parts_of(self.features, rows)
        return [file for file in self.files if file.is_among(parts)]

    def _copied_from(self, before: "RowTable") -> "RowTable":
        """With the files of the table that it was made of, if what was copied of them is whole."""
        mapped = []
        for file in before.files:
            if file.is_among(self.features.parts):
                mapped.append(file)
            else:
                file.verify()
        return replace(self, files=tuple(mapped))

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
            mine = with_parts(mine, [part.to(features.dtype) for part in mine.parts])
        all_paths = None
        if self.paths is not None or paths is not None:
            all_paths = (self.paths or [""] * len(self)) + (paths or [""] * len(ids))
        if same_files:
            shards = append_to_shards(self.shards, len(ids), _row_bytes(mine))
        else:
            shards = split_into_shards(len(self) + len(ids), _row_bytes(mine))
        known = None
        if self.lists is not None and lists is not None:
            known = np.concatenate([self.lists, lists])
        return RowTable(
            _append(mine, features, self.files),
            torch.cat([self.labels, labels]),
            torch.cat([self.ids, ids]),
            all_paths,
            known,
            shards,
        )._copied_from(self)

    def keep(self, stays: Tensor) -> "RowTable":
        """Without the rows whose `stays` [N] is False; their files will be written anew."""
        paths = None
        if self.paths is not None:
            paths = [p for p, stay in zip(self.paths, stays.tolist(), strict=True) if stay]
        mapped = [_is_mapped(part, self.files) for part in self.features.parts]
        return RowTable(
            kept(self.features, stays, mapped),
            self.labels[stays],
            self.ids[stays],
            paths,
            None if self.lists is None else self.lists[stays.numpy()],
            change_shards(self.shards, ~stays, stays),
        )._copied_from(self)

    def in_list_order(self) -> "RowTable":
        """With rows of one list beside each other, so that a search reads what is near."""
        assert self.lists is not None
        order = np.argsort(self.lists, kind="stable")
        places = torch.from_numpy(order)
        return replace(
            self,
            features=reordered(self.features, order),
            labels=self.labels[places],
            ids=self.ids[places],
            paths=None if self.paths is None else [self.paths[place] for place in order.tolist()],
            lists=self.lists[order],
            shards=[Shard(shard.rows) for shard in self.shards],
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

    def with_paths(self, paths: list[str] | None) -> "RowTable":
        """With the paths that its files hold."""
        return replace(self, paths=paths)

    def with_new_first_file(self) -> "RowTable":
        """To be written with another mean or learned map, which lie in the first file."""
        return replace(self, shards=[Shard(self.shards[0].rows), *self.shards[1:]])

    def with_records(self, records: Sequence[FileRecord]) -> "RowTable":
        """Of which the files, whose records these are, hold the rows as they are."""
        pairs = zip(self.shards, records, strict=True)
        return replace(self, shards=[shard._replace(record=record) for shard, record in pairs])

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


def _row_bytes(features: RowParts) -> int:
    return features.shape[1] * features.dtype.itemsize


def _append(features: RowParts, rows: Tensor, files: Sequence[RowFile]) -> RowParts:
    """With more rows [M, D] at the end; only a small last part is copied, unless it is mapped."""
    last = features.parts[-1]
    is_small = len(last) * _row_bytes(features) < SMALL_SHARD_BYTES
    return appended(features, rows, joins_last=is_small and not _is_mapped(last, files))


def _is_mapped(part: Tensor, files: Sequence[RowFile]) -> bool:
    return any(file.is_among([part]) for file in files)


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
