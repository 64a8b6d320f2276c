"""Some rows of arrays, in any order: a change of mapped files copies none of what stays.

Rows that were removed from a mapped file are left out of those that are read; the next save writes
the others. So a table of many millions of rows loses some of them within seconds.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.rows import RowParts
from ..core.search import Ints

_AT_ONCE = 65_536


class ChosenRows(RowParts):
    """[N, D] features, each of which lies somewhere in some arrays.

    Args:
        parts: see `RowParts`.
        chosen: [N] int64, where each row lies in them.
    """

    def __init__(self, parts: Sequence[Tensor], chosen: Ints) -> None:
        super().__init__(parts)
        self.chosen = chosen
        self.shape = (len(chosen), self.shape[1])

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> NDArray:
        """Rows by slice or by positions, in their order; copied."""
        places = self.chosen[rows]
        if len(places) <= _AT_ONCE:
            return super().__getitem__(places)
        taken = np.empty((len(places), self.shape[1]), self.parts[0].numpy().dtype)
        order = np.argsort(places)  # a file is read from its beginning to its end
        for start in range(0, len(order), _AT_ONCE):
            some = order[start : start + _AT_ONCE]
            taken[some] = super().__getitem__(places[some])
        return taken

    def joined(self) -> Tensor:
        """[N, D] all rows as one tensor; a copy."""
        return torch.from_numpy(self[:])

    def parts_of(self, rows: slice) -> list[Tensor]:
        """The arrays that some rows, by position, lie in."""
        owners = np.unique(np.searchsorted(self._ends, self.chosen[rows], side="right"))
        return [self.parts[owner] for owner in owners.tolist()]


def parts_of(features: RowParts, rows: slice) -> list[Tensor]:
    """The arrays that some rows, by position, lie in."""
    if isinstance(features, ChosenRows):
        return features.parts_of(rows)
    parts, start = [], 0
    for part in features.parts:
        if start < rows.stop and start + len(part) > rows.start:
            parts.append(part)
        start += len(part)
    return parts


def reordered(features: RowParts, order: Ints) -> ChosenRows:
    """The rows at some positions [N], in that order."""
    return ChosenRows(features.parts, _places(features)[order])


def with_parts(features: RowParts, parts: Sequence[Tensor]) -> RowParts:
    """The same rows, of which other arrays of the same lengths hold the values."""
    if isinstance(features, ChosenRows):
        return ChosenRows(parts, features.chosen)
    return RowParts(parts)


def appended(features: RowParts, rows: Tensor, joins_last: bool) -> RowParts:
    """With more rows [M, D] at the end.

    Args:
        features: [N, D].
        rows: of the same dtype.
        joins_last: whether they are copied into one array with the last part.
    """
    parts = list(features.parts)
    before = sum(map(len, parts))
    parts[-1:] = [torch.cat([parts[-1], rows])] if joins_last else [parts[-1], rows]
    if not isinstance(features, ChosenRows):
        return RowParts(parts)
    added = np.arange(before, before + len(rows))
    return ChosenRows(parts, np.concatenate([features.chosen, added]))


def kept(features: RowParts, stays: Tensor, mapped: Sequence[bool]) -> RowParts:
    """Without some rows; arrays in memory lose them, arrays that are mapped are left as they are.

    Args:
        features: [N, D].
        stays: [N] bool.
        mapped: which of its parts are mapped.
    """
    chosen = _places(features)[stays.numpy()]
    used = np.zeros(sum(map(len, features.parts)), bool)
    used[chosen] = True
    parts, start = [], 0
    for part, is_mapped in zip(features.parts, mapped, strict=True):
        mine = used[start : start + len(part)]
        start += len(part)
        if is_mapped and mine.any():
            mine[:] = True
        parts.append(part if mine.all() else part[torch.from_numpy(mine)])
    places = (np.cumsum(used) - 1)[chosen]
    if np.array_equal(places, np.arange(used.sum())):
        return RowParts(parts)
    return ChosenRows(parts, places)


def _places(features: RowParts) -> Ints:
    """[N] int64, where each row lies in the arrays."""
    return features.chosen if isinstance(features, ChosenRows) else np.arange(len(features))
