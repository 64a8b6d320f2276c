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


class GrowingSearcher(Searcher):
    """Nearest neighbours of queries among the rows of a datastore that changes.

    Args:
        features: [N, D] stored raw features, float16 or float32.
        ids: [N] int64, unique.
        space: how rows are compared.
        first_pass: over the rows that `space` makes of them.
        is_exact: False for an index that may miss rows.
    """

    space: IndexSpace
    first_pass: GrowingFirstPass

    def __init__(
        self,
        features: Rows,
        ids: Ints,
        space: IndexSpace,
        first_pass: GrowingFirstPass,
        is_exact: bool = True,
    ) -> None:
        super().__init__(features, ids, space, first_pass)
        self.is_exact = is_exact
        self.measured = len(ids)
        # where each row of the first pass lies in the store; -1 once it was removed
        self.places = np.arange(len(ids))

    @property
    def has_removed_rows(self) -> bool:
        """Whether the first pass still holds rows that the store does not."""
        return len(self.places) > len(self.ids)

    @property
    def proposable(self) -> int:
        """How many rows the first pass chooses from."""
        return len(self.places)

    def propose(self, queries: Floats, count: int) -> tuple[Ints, Floats, Floats]:
        """See `Searcher.propose`; rows that were removed are no candidates."""
        if self.is_exact:
            proposed, limit, length = super().propose(queries, count)
        else:
            length = np.ones(len(queries))
            proposed, limit = self.first_pass.candidates(self.space.index_queries(queries), count)
        is_row = (proposed >= 0) & (proposed < len(self.places))
        return np.where(is_row, self.places[np.where(is_row, proposed, 0)], -1), limit, length

    def add(self, features: Rows, ids: Ints) -> bool:
        """Follows the store after rows were appended; False if it must be built again.

        Args:
            features: [N + M, D] the store's rows now.
            ids: [N + M].
        """
        added = features[len(self.ids) : len(ids)]
        if not self.space.holds(added):
            return False
        if self.is_exact:
            self.first_pass.add(self.space.first_pass_rows(added))
        elif len(ids) > (1 + _MOST_ADDED) * self.measured:
            return False  # its lists and its stated recall are those of other rows
        else:
            try:
                self.first_pass.add(self.space.index_rows(added))
            except NotImplementedError:
                return False
        self.places = np.concatenate([self.places, np.arange(len(self.ids), len(ids))])
        self.features, self.ids = features, ids
        return True

    def remove(self, features: Rows, ids: Ints, kept: NDArray[np.bool_]) -> bool:
        """Follows the store after rows were removed; False if it should be built again.

        Args:
            features: [N - M, D] the store's rows now.
            ids: [N - M].
            kept: [N] which of the old rows are still there.
        """
        moved = np.where(kept, np.cumsum(kept) - 1, -1)
        self.places = np.where(self.places >= 0, moved[self.places], -1)
        self.features, self.ids = features, ids
        return len(ids) >= (1 - _MOST_REMOVED) * len(self.places)


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
