"""The rows of one extraction: which are known, which are bad, which are still to be computed."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .encoding import Encoded
from .feature_cache import FeatureCache, Shard, key_list, stacked

SHARD_ROWS = 256
"""Rows per cache file: what a kill can cost, beside the batches under way."""

_UNKNOWN, _GOOD, _BAD = 0, 1, 2


class Part(NamedTuple):
    """What one rank knows.

    Attributes:
        rows: [n] int64.
        features: [n, D] float32.
        reasons: of bad rows, by row.
    """

    rows: NDArray[np.int64]
    features: Tensor
    reasons: dict[int, str]


class FeatureTable:
    """N rows to be filled in; rows that hold the same picture are computed once.

    Args:
        rows: N.
        width: D.
        keys: [N, 16] uint8, see `picture_keys`; None takes each row for another picture and keeps
            nothing.
    """

    def __init__(self, rows: int, width: int, keys: NDArray[np.uint8] | None) -> None:
        self.features = torch.empty(rows, width)
        self._state = np.zeros(rows, np.uint8)
        self._mine = np.ones(rows, bool)
        self._reasons: dict[int, str] = {}
        self._keys = None if keys is None else key_list(keys)
        self._rows_of: dict[bytes, list[int]] = {}
        for row, key in enumerate(self._keys or []):
            self._rows_of.setdefault(key, []).append(row)
        self._unwritten: list[int] = []

    def share(self, rank: int, ranks: int) -> None:
        """Leaves this rank its share of the rows, in blocks of a shard."""
        self._mine = (np.arange(len(self._state)) // SHARD_ROWS) % ranks == rank

    def take(self, cache: FeatureCache, with_bad: bool) -> None:
        """Fills in what was computed before.

        Args:
            cache: to look in.
            with_bad: whether pictures that could not be decoded are known to be bad; else they are
                tried again.
        """
        if self._keys is None:
            return
        wanted = {key for key, is_mine in zip(self._keys, self._mine, strict=True) if is_mine}
        for shard in cache.shards_with(wanted):
            places, sources = [], []
            for place, key in enumerate(key_list(shard.keys)):
                rows = [row for row in self._rows_of.get(key, ()) if self._mine[row]]
                if place < len(shard.features):
                    places += rows
                    sources += [place] * len(rows)
                elif with_bad:
                    self._set_bad(rows, shard.reasons[place - len(shard.features)])
            self.features[places] = shard.features[sources]
            self._state[places] = _GOOD

    def missing(self) -> list[int]:
        """This rank's rows that are not known, one per picture."""
        rows = np.flatnonzero(self._mine & (self._state == _UNKNOWN)).tolist()
        if self._keys is None:
            return rows
        first = {self._keys[row]: row for row in reversed(rows)}
        return sorted(first.values())

    def put(self, part: Encoded, cache: FeatureCache) -> None:
        """Fills in what was just computed, and writes each shard that is full."""
        if part.features is not None:
            for row, feature in zip(part.rows, part.features, strict=True):
                same = self._same(row)
                self.features[same] = feature
                self._state[same] = _GOOD
        for bad in part.bad:
            self._set_bad(self._same(bad.row), bad.reason)
        self._unwritten += sorted([*part.rows, *(bad.row for bad in part.bad)])
        while len(self._unwritten) >= SHARD_ROWS:
            self._write(self._unwritten[:SHARD_ROWS], cache)
            del self._unwritten[:SHARD_ROWS]

    def flush(self, cache: FeatureCache) -> None:
        """Writes the last shard."""
        if self._unwritten:
            self._write(self._unwritten, cache)
            self._unwritten = []

    def own(self) -> Part:
        """What this rank knows, for the others."""
        rows = np.flatnonzero(self._mine & (self._state == _GOOD))
        return Part(rows, self.features[rows], self._reasons)

    def merge(self, parts: Iterable[Part]) -> None:
        """Fills in what the ranks know."""
        for part in parts:
            self.features[part.rows] = part.features
            self._state[part.rows] = _GOOD
            for row, reason in part.reasons.items():
                self._set_bad([row], reason)

    def good(self) -> Tensor:
        """[n] int64: the rows with features, ascending."""
        return torch.from_numpy(np.flatnonzero(self._state == _GOOD))

    def bad(self) -> list[tuple[int, str]]:
        """The rows without, and why, ascending."""
        return sorted(self._reasons.items())

    def _same(self, row: int) -> list[int]:
        if self._keys is None:
            return [row]
        return [other for other in self._rows_of[self._keys[row]] if self._mine[other]]

    def _set_bad(self, rows: Iterable[int], reason: str) -> None:
        for row in rows:
            self._state[row] = _BAD
            self._reasons[row] = reason

    def _write(self, rows: list[int], cache: FeatureCache) -> None:
        if self._keys is None:
            return
        good = [row for row in rows if self._state[row] == _GOOD]
        bad = [row for row in rows if self._state[row] == _BAD]
        keys = stacked([self._keys[row] for row in good + bad])
        cache.write(Shard(keys, self.features[good], [self._reasons[row] for row in bad]))
