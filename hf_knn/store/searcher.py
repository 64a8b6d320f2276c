"""How candidates are proposed, and a search that follows its rows as they come and go.

Exact first passes say how good a row that they left out can be at most, so that the search can tell
whether it could still belong to the answer. Approximate ones (in `faiss.py`) promise nothing.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.search import (
    ROW_BLOCK,
    FirstPass,
    Floats,
    Ints,
    Rows,
    RowSpace,
    Searcher,
    Singles,
    best_of_blocks,
    float32_rounding,
    nearest_first,
    shortcut,
)

_ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11}
"""How far a score may be off, as a part of it, by being stored in a dtype."""

_FLOAT16_SUMS = 2.0**-8
"""What a device may lose by adding up parts of a float16 product in float16."""


class GrowingFirstPass(FirstPass, Protocol):
    """A first pass that rows can be appended to."""

    def add(self, rows: Singles) -> None:
        """Appends rows [M, D'] float32."""
        ...


class GrowingIndex(GrowingFirstPass, Protocol):
    """An index that knows distances itself, and that rows can be appended to.

    Attributes:
        per_neighbour: rows that must be compared for each that is wanted.
    """

    @property
    def per_neighbour(self) -> int:
        """See above."""
        ...

    def add(self, rows: "Singles | IndexRows") -> None:
        """Appends rows [M, D'] float32, which may be made as they are read."""
        ...


class PlacedFirstPass:
    """Blocked matmul and top-k in torch, on any devices.

    Args:
        rows: [N, D'] float32.
        devices: where the blocks of rows lie, in turn: several devices share the work.
        dtype: of the rows there, `float32` or `float16`; half of the memory, and more candidates.
    """

    def __init__(
        self,
        rows: Singles,
        devices: Sequence[torch.device] = (torch.device("cpu"),),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.devices, self.dtype = devices, dtype
        self.extra = 12 if dtype == torch.float32 else 44
        self.rounding = float32_rounding(rows.shape[1])
        self.rounding += _FLOAT16_SUMS if dtype == torch.float16 else 0.0
        self.blocks: list[Tensor] = []
        self.lost = 0.0
        self.add(rows)

    def add(self, rows: Singles) -> None:
        """See `GrowingFirstPass.add`."""
        added = torch.from_numpy(rows)
        if self.blocks and len(self.blocks[-1]) < ROW_BLOCK:
            last = self.blocks[-1]
            fitting = added[: ROW_BLOCK - len(last)]
            self.blocks[-1] = torch.cat([last, self._rounded(fitting).to(last.device)])
            added = added[len(fitting) :]
        for block in added.split(ROW_BLOCK) if len(added) else ():
            device = self.devices[len(self.blocks) % len(self.devices)]
            self.blocks.append(self._rounded(block).to(device))

    def candidates(self, queries: Singles, count: int) -> tuple[Ints, Floats]:
        """See `FirstPass.candidates`."""
        exact = torch.from_numpy(queries)
        rounded = exact.to(self.dtype)
        scores, positions = best_of_blocks(self.blocks, rounded, count)
        lost = (exact - rounded.float()).norm(dim=1).double()  # [B]
        rounding = self.rounding + shortcut()
        return positions.numpy(), _reach(scores, lost[:, None], self.lost, rounding)

    def _rounded(self, rows: Tensor) -> Tensor:
        rounded = rows.to(self.dtype)
        for block, kept in zip(rows.split(ROW_BLOCK), rounded.split(ROW_BLOCK), strict=True):
            lost = (block - kept.float()).norm(dim=1)
            self.lost = max(self.lost, float(lost.max()) if len(lost) else 0.0)
        return rounded


def _reach(scores: Tensor, lost_queries: Tensor, lost_rows: float, rounding: float) -> Floats:
    """What rows can score at most, where both sides were rounded to a shorter dtype.

    Args:
        scores: [B, count] in the dtype of the product.
        lost_queries: [B, 1] float64, length of what each query lost; it had length 1.
        lost_rows: the largest length of what a row lost; a row has length at most 1.
        rounding: of the float32 sums.
    """
    exact = scores.double()
    own = exact.abs() * _ROUNDING[scores.dtype]
    limit: Floats = (exact + lost_queries + lost_rows * (1 + lost_queries) + own + rounding).numpy()
    return limit


RECALL_K = 20
"""So many neighbours are asked for where a recall is measured."""

_MOST_REMOVED, _MOST_ADDED = 0.3, 0.1
_NORMALIZED = 4096  # rows at once, which stay in the processor's cache
_FARTHEST = 1e3  # where what drawing nearer and what float32 loses are about the same
_EXACT_BLOCK = 262_144


class IndexSpace(RowSpace):
    """How rows look to an index of faiss, which knows distances itself.

    Its graphs and lists would not survive the extension by one value of `RowSpace`.
    """

    def holds(self, features: Rows) -> bool:
        """Whether rows fit the scale that was fixed by others."""
        return not self.is_l2 or self.largest_length(features) <= self.largest

    def first_pass_rows(self, features: Rows) -> Singles:
        """See `RowSpace`; in threads."""
        return _in_parts(super().first_pass_rows, features, self.width + self.is_l2)

    def index_rows(self, features: Rows) -> Singles:
        """[N, D] raw features to the float32 rows of an approximate index, which are normalised."""
        return _in_parts(lambda part: self.normalize(part) / self.scale, features, self.width)

    def read_for_index(self, features: Rows) -> "IndexRows":
        """The same, made when they are read: those of all rows need not fit into memory."""
        return IndexRows(self, features)

    def index_queries(self, queries: Floats) -> Singles:
        """[B, D] normalised queries as an approximate index takes them.

        One that lies far beyond all rows is drawn nearer on its own line: the order of the rows
        hardly changes, and float32 can still tell their distances apart.
        """
        if not self.is_l2:
            return queries.astype(np.float32)
        scaled = queries / self.scale
        # the largest value first: its square may not fit
        highest = np.abs(scaled).max(axis=1, initial=0.0)[:, None]
        unit = scaled / np.where(highest > 0, highest, 1.0)
        length = highest * np.sqrt(np.einsum("nd,nd->n", unit, unit))[:, None]
        shrunk = scaled * (_FARTHEST / np.maximum(length, _FARTHEST))
        return shrunk.astype(np.float32)


class IndexRows:
    """[N, E] float32 rows of an approximate index, made of raw features as they are read.

    Args:
        space: how rows are compared.
        features: [N, D] raw rows.
    """

    def __init__(self, space: IndexSpace, features: Rows) -> None:
        self.space, self.features = space, features
        self.shape = (len(features), space.width)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Ints) -> Singles:
        """Rows by slice or by positions."""
        return self.space.index_rows(self.features[rows])


def _in_parts(make: Callable[[NDArray], NDArray], features: Rows, width: int) -> Singles:
    """[N, width] float32, made of [N, D] raw rows in as many threads as torch has.

    Each thread has rows beside each other, so that it hashes its own part of a mapped file.
    """
    made = np.empty((len(features), width), np.float32)

    def fill(span: Ints) -> None:
        for start in span.tolist():
            made[start : start + _NORMALIZED] = make(features[start : start + _NORMALIZED])

    starts = np.arange(0, len(features), _NORMALIZED)
    spans = np.array_split(starts, max(1, min(torch.get_num_threads(), len(starts))))
    if len(spans) == 1:
        fill(spans[0])
        return made
    with ThreadPoolExecutor(len(spans)) as pool:
        list(pool.map(fill, spans))
    return made


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

    is_exact = False

    def __init__(self, features: Rows, ids: Ints, space: IndexSpace, index: GrowingIndex) -> None:
        super().__init__(features, ids, space, index)
        self.lists, self.measured = index, len(ids)

    def search(self, queries: NDArray, k: int, exclude_ids: Ints | None) -> tuple[Floats, Ints]:
        """See `Searcher.search`: an index of codes alone needs many rows compared for each."""
        most, per_neighbour = len(self.ids) - (exclude_ids is not None), self.lists.per_neighbour
        if per_neighbour > 1:  # of which some are rows that were removed
            per_neighbour = -(-per_neighbour * len(self.places) // max(1, len(self.ids)))
        width = min(max(k, most), k * per_neighbour)
        similarities, positions = super().search(queries, width, exclude_ids)
        return similarities[:, :k], positions[:, :k]

    def propose(self, queries: Floats, count: int) -> tuple[Ints, Floats, Floats]:
        """See `Searcher.propose`."""
        found, limit = self.first_pass.candidates(self.space.index_queries(queries), count)
        is_row = (found >= 0) & (found < len(self.ids))  # an index that was read may say anything
        return np.where(is_row, found, -1), limit, np.ones(len(queries))

    def compares_every_row(self, count: int) -> bool:
        """See `Searcher.compares_every_row`: also of fewer candidates where the recall was so."""
        return super().compares_every_row(max(count, RECALL_K + 1 + self.first_pass.extra))

    def take_in(self, added: NDArray) -> bool:
        """See `GrowingSearcher.take_in`."""
        if len(self.ids) + len(added) > (1 + _MOST_ADDED) * self.measured:
            return False  # its lists and its stated recall are those of other rows
        try:
            self.lists.add(self.space.read_for_index(added))
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
