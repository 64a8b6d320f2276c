"""A search that follows its rows as they come and go, also through an approximate index."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..core.search import (
    ROW_BLOCK,
    FirstPass,
    Floats,
    Ints,
    Rows,
    RowSpace,
    Searcher,
    Singles,
    nearest_first,
)
from .first_pass import GrowingFirstPass

_MOST_REMOVED, _MOST_ADDED = 0.3, 0.1
_FARTHEST = 1e3  # where what drawing nearer and what float32 loses are about the same
_EXACT_BLOCK = 262_144


class IndexSpace(RowSpace):
    """How rows look to an index of faiss, which knows distances itself.

    Its graphs and lists would not survive the extension by one value of `RowSpace`.
    """

    def holds(self, features: Rows) -> bool:
        """Whether rows fit the scale that was fixed by others."""
        return not self.is_l2 or self.largest_length(features) <= self.largest

    def index_rows(self, features: Rows) -> Singles:
        """[N, D] raw features to the [N, D] float32 rows of an approximate index."""
        rows = np.empty(features.shape, np.float32)
        for start in range(0, len(features), ROW_BLOCK):
            part = slice(start, start + ROW_BLOCK)
            rows[part] = self.normalize(features[part]) / self.scale
        return rows

    def index_queries(self, queries: Floats) -> Singles:
        """[B, D] normalised queries as an approximate index takes them.

        One that lies far beyond all rows is drawn nearer on its own line: the order of the rows
        hardly changes, and float32 can still tell their distances apart.
        """
        scaled = queries / self.scale
        # the largest value first: its square may not fit
        highest = np.abs(scaled).max(axis=1, initial=0.0)[:, None]
        unit = scaled / np.where(highest > 0, highest, 1.0)
        length = highest * np.sqrt(np.einsum("nd,nd->n", unit, unit))[:, None]
        shrunk = scaled * (_FARTHEST / np.maximum(length, _FARTHEST))
        return shrunk.astype(np.float32)


class MovedRows:
    """A first pass of whose rows some have gone: what it proposes, where the rows lie now.

    Args:
        first_pass: over the rows that there were.
        places: [M] where each of them lies; -1 for one that has gone.
    """

    def __init__(self, first_pass: FirstPass, places: Ints) -> None:
        self.first_pass, self.places, self.extra = first_pass, places, first_pass.extra

    def candidates(self, queries: Singles, count: int) -> tuple[Ints, Floats]:
        """See `FirstPass.candidates`."""
        proposed, limit = self.first_pass.candidates(queries, count)
        is_row = (proposed >= 0) & (proposed < len(self.places))
        return np.where(is_row, self.places[np.where(is_row, proposed, 0)], -1), limit


class GrowingSearcher(Searcher):
    """Nearest neighbours of queries among the rows of a datastore that changes.

    Args:
        features: [N, D] stored raw features, float16 or float32.
        ids: [N] int64, unique.
        space: how rows are compared.
        index: an exact first pass over the rows that `space` makes of them.
    """

    space: IndexSpace

    def __init__(
        self, features: Rows, ids: Ints, space: IndexSpace, index: GrowingFirstPass
    ) -> None:
        super().__init__(features, ids, space, index)
        self.index = index
        # where each row of the index lies in the store; -1 once it was removed
        self.places = np.arange(len(ids))

    @property
    def has_removed_rows(self) -> bool:
        """Whether the index still holds rows that the store does not."""
        return len(self.places) > len(self.ids)

    def add(self, features: Rows, ids: Ints) -> bool:
        """Follows the store after rows were appended; False if it must be built again.

        Args:
            features: [N + M, D] the store's rows now.
            ids: [N + M].
        """
        added = features[len(self.ids) : len(ids)]
        if not self.space.holds(added) or not self.take_in(added):
            return False
        self._moved_to(
            np.concatenate([self.places, np.arange(len(self.ids), len(ids))]), features, ids
        )
        return True

    def take_in(self, added: NDArray) -> bool:
        """Appends raw features [M, D] to the index; False if it cannot take them in."""
        self.index.add(self.space.first_pass_rows(added))
        return True

    def remove(self, features: Rows, ids: Ints, kept: NDArray[np.bool_]) -> bool:
        """Follows the store after rows were removed; False if it should be built again.

        Args:
            features: [N - M, D] the store's rows now.
            ids: [N - M].
            kept: [N] which of the old rows are still there.
        """
        moved = np.where(kept, np.cumsum(kept) - 1, -1)
        self._moved_to(np.where(self.places >= 0, moved[self.places], -1), features, ids)
        return len(ids) >= (1 - _MOST_REMOVED) * len(self.places)

    def _moved_to(self, places: Ints, features: Rows, ids: Ints) -> None:
        self.places, self.features, self.ids = places, features, ids
        if self.has_removed_rows:
            self.first_pass = MovedRows(self.index, places)


class ApproximateSearcher(GrowingSearcher):
    """One whose index knows distances itself, and may miss rows.

    Args:
        features: [N, D] stored raw features, float16 or float32.
        ids: [N] int64, unique.
        space: how rows are compared.
        index: over the rows that `space.index_rows` makes of them.
    """

    def __init__(
        self, features: Rows, ids: Ints, space: IndexSpace, index: GrowingFirstPass
    ) -> None:
        super().__init__(features, ids, space, index)
        self.measured = len(ids)

    def propose(self, queries: Floats, count: int) -> tuple[Ints, Floats, Floats]:
        """See `Searcher.propose`."""
        found, limit = self.first_pass.candidates(self.space.index_queries(queries), count)
        is_row = (found >= 0) & (found < len(self.ids))  # an index that was read may say anything
        return np.where(is_row, found, -1), limit, np.ones(len(queries))

    def take_in(self, added: NDArray) -> bool:
        """See `GrowingSearcher.take_in`."""
        if len(self.ids) + len(added) > (1 + _MOST_ADDED) * self.measured:
            return False  # its lists and its stated recall are those of other rows
        try:
            self.index.add(self.space.index_rows(added))
        except NotImplementedError:
            return False
        return True


def nearest_in_blocks(
    features: Rows,
    ids: Ints,
    space: RowSpace,
    first_pass: Callable[[Singles], FirstPass],
    queries: NDArray,
    k: int,
    exclude_ids: Ints,
) -> Ints:
    """The exact k nearest rows, without a copy of all rows in memory.

    Args:
        features: [N, D] raw features.
        ids: [N] int64, unique.
        space: how rows are compared.
        first_pass: makes an exact one from rows.
        queries: [B, D] finite raw features.
        k: from 1 to N - 1.
        exclude_ids: [B] ids that are no neighbours of the queries.

    Returns:
        [B, k] positions by (similarity, id).
    """
    blocks = -(-len(ids) // _EXACT_BLOCK)
    similarities, positions = np.empty((len(queries), 0)), np.empty((len(queries), 0), np.int64)
    for part in np.array_split(np.arange(len(ids)), blocks):
        rows = slice(int(part[0]), int(part[-1]) + 1)
        block = Searcher(
            features[rows], ids[rows], space, first_pass(space.first_pass_rows(features[rows]))
        )
        found, places = block.search(queries, min(k, len(part) - 1), exclude_ids)
        similarities = np.concatenate([similarities, found], axis=1)
        positions = np.concatenate([positions, places + rows.start], axis=1)
        order = nearest_first(similarities, ids[positions], k)
        similarities = np.take_along_axis(similarities, order, axis=1)
        positions = np.take_along_axis(positions, order, axis=1)
    return positions


def recall_of(found: Ints, wanted: Ints) -> float:
    """Share of the wanted neighbours [B, k] that were found [B, k]."""
    hits = (wanted[:, :, None] == found[:, None, :]).any(axis=2)
    return float(hits.mean(axis=1).mean())
