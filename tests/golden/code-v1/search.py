"""Nearest neighbours: a fast first pass proposes candidates, float64 rescoring decides.

The order of the answer is (similarity, id), compared in float64 pair by pair, so it does not depend
on the batch size, the number of threads, the order of insertion or the library of the first pass.
An exact first pass says how good a row that it left out can be at most: candidates are widened
until none of those could belong to the answer.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from .configuration_knn import Normalization
from .first_pass import FirstPass, Ints, Singles
from .functional import Metric
from .row_table import RowParts

Floats = NDArray[np.float64]
Rows = NDArray | RowParts

_RESCORE_BYTES = 128 * 2**20
_COMPARE_BYTES = 2**20  # rows that stay in the cache while each query is compared with them
_FEW_MORE = 3  # times as many rows as asked for are compared rather than gathered
_PAIRS_FOR_THREADS = 4096  # fewer pairs are compared before a thread has started
_ROW_BLOCK = 65_536
_EXACT_BLOCK = 262_144
_MOST_REMOVED = 0.3
_SMALLEST_SQUARE = 2.0**-800  # of a length; smaller and larger ones are scaled first
_EXTENDED = 1.2  # a little more than sqrt(5) / 2, which rounding must not exceed
_MOST_ADDED = 0.1
_FARTHEST = 1e3  # where what drawing nearer and what float32 loses are about the same


def normalize_rows(features: NDArray, mean: Floats, normalization: str) -> Floats:
    """Applies the datastore's normalisation in float64.

    Args:
        features: [N, D] raw features of any float dtype.
        mean: [D] float64, used by `l2_centered` only.
        normalization: `l2_centered`, `l2` or `none`.

    Returns:
        [N, D] float64; a zero vector stays zero, so its cosine with everything is 0.
    """
    rows = _widened(features)
    if normalization == Normalization.NONE:
        return rows
    if normalization == Normalization.L2_CENTERED:
        rows -= mean
    squares = np.einsum("nd,nd->n", rows, rows)
    if not ((squares > _SMALLEST_SQUARE) & (squares < 1 / _SMALLEST_SQUARE)).all():
        _, exponents = np.frexp(np.abs(rows).max(axis=1, initial=0.0))
        rows = np.ldexp(rows, -exponents[:, None])  # exact; keeps the squares in range
        squares = np.einsum("nd,nd->n", rows, rows)
    lengths = np.sqrt(squares)
    rows /= np.where(lengths > 0, lengths, 1.0)[:, None]
    return rows


class RowSpace:
    """How stored rows and queries look to a first pass, and how a pair is really compared.

    Both metrics become one inner product for an exact first pass: for `l2` the rows are extended
    by ``-|x|^2 / 2`` and the queries by 1, which keeps the order, and everything is scaled to
    length at most 1, which bounds the rounding error by the width alone. Approximate indexes know
    distances themselves, and their graphs and lists would not survive the extension.

    Args:
        mean: [D] float64.
        metric: `cosine` or `l2`.
        normalization: `l2_centered`, `l2` or `none`.
        features: [N, D] rows that fix the scale.
        largest: of the rows' lengths once they are normalised, if it is known; it fixes the scale.
    """

    def __init__(
        self,
        mean: Floats,
        metric: str,
        normalization: str,
        features: Rows,
        largest: float | None = None,
    ) -> None:
        self.mean, self.normalization = mean, normalization
        self.is_l2 = Metric(metric) is Metric.L2
        self.largest = 1.0
        if self.is_l2:
            self.largest = largest or self._largest_length(features) or 1.0
        # a row of length 1 is sqrt(1 + 1/4) long once it is extended
        self.scale = self.largest * _EXTENDED if self.is_l2 else 1.0

    def normalize(self, features: NDArray) -> Floats:
        """[N, D] raw features to the float64 vectors that are compared."""
        return normalize_rows(features, self.mean, self.normalization)

    def holds(self, features: Rows) -> bool:
        """Whether rows fit the scale that was fixed by others."""
        return not self.is_l2 or self._largest_length(features) <= self.largest

    def first_pass_rows(self, features: Rows) -> Singles:
        """[N, D] raw features to [N, D'] float32 rows of length at most 1."""
        count, dim = features.shape
        rows = np.empty((count, dim + self.is_l2), np.float32)
        for start in range(0, count, _ROW_BLOCK):
            part = slice(start, start + _ROW_BLOCK)
            block = self.normalize(features[part]) / self.scale
            rows[part, :dim] = block
            if self.is_l2:
                rows[part, dim] = -0.5 * np.einsum("nd,nd->n", block, block)
        return rows

    def index_rows(self, features: Rows) -> Singles:
        """[N, D] raw features to the [N, D] float32 rows of an approximate index."""
        rows = np.empty(features.shape, np.float32)
        for start in range(0, len(features), _ROW_BLOCK):
            part = slice(start, start + _ROW_BLOCK)
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

    def first_pass_queries(self, queries: Floats) -> tuple[Singles, Floats]:
        """[B, D] normalised queries to [B, D'] of length 1, and the length each had."""
        if not self.is_l2:
            return queries.astype(np.float32), np.ones(len(queries))
        extended = np.concatenate([queries / self.scale, np.ones((len(queries), 1))], axis=1)
        length = np.sqrt(np.einsum("nd,nd->n", extended, extended))
        return (extended / length[:, None]).astype(np.float32), length

    def as_score(self, similarities: Floats, queries: Floats, length: Floats) -> Floats:
        """What an exact first pass would have scored, less float64's own rounding error."""
        if not self.is_l2:
            return similarities
        squares = np.einsum("nd,nd->n", queries, queries)
        scores = (similarities + squares) / (2 * self.scale**2 * length)
        return scores - 1e-14 * squares / (self.scale**2 * length)

    def compare(self, rows: Floats, query: Floats) -> Floats:
        """Similarity of one query with [K, D] normalised rows, each pair by itself."""
        # [1, D] by [D, 1] for each row is one dot product of BLAS, by itself, also in numpy 1
        if self.is_l2:
            rows = rows - query
            return -np.matmul(rows[:, None, :], rows[:, :, None])[:, 0, 0]
        return np.matmul(rows[:, None, :], query[:, None])[:, 0, 0]

    def _largest_length(self, features: Rows) -> float:
        largest = 0.0
        for start in range(0, len(features), _ROW_BLOCK):
            rows = self.normalize(features[start : start + _ROW_BLOCK])
            largest = max(largest, float(np.einsum("nd,nd->n", rows, rows).max()))
        return largest**0.5


class Searcher:
    """Nearest neighbours of queries among the rows of a datastore.

    Args:
        features: [N, D] stored raw features, float16 or float32.
        ids: [N] int64, unique.
        space: how rows are compared.
        first_pass: over the rows that `space` makes of them.
        is_exact: False for an index that may miss rows.
    """

    def __init__(
        self,
        features: Rows,
        ids: Ints,
        space: RowSpace,
        first_pass: FirstPass,
        is_exact: bool = True,
    ) -> None:
        self.features, self.ids, self.space, self.first_pass = features, ids, space, first_pass
        self.is_exact = is_exact
        self.measured = len(ids)
        # where each row of the first pass lies in the store; -1 once it was removed
        self.places = np.arange(len(ids))

    @property
    def has_removed_rows(self) -> bool:
        """Whether the first pass still holds rows that the store does not."""
        return len(self.places) > len(self.ids)

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

    def search(self, queries: NDArray, k: int, exclude_ids: Ints | None) -> tuple[Floats, Ints]:
        """Finds the k nearest rows.

        Args:
            queries: [B, D] finite raw features.
            k: from 1 to N, or to N - 1 with `exclude_ids`.
            exclude_ids: [B] int64; the row with that id is no neighbour of that query (-1 = none).

        Returns:
            Similarities [B, k] float64 and positions [B, k] int64, by (similarity, id).
        """
        normalized = self.space.normalize(queries)  # [B, D]
        similarities = np.empty((len(queries), k))
        positions = np.empty((len(queries), k), np.int64)
        pending = np.arange(len(queries))
        count = k + (exclude_ids is not None) + self.first_pass.extra
        while len(pending):
            certain = []
            # beyond a third, gathering candidates costs more than comparing with every row
            every_row = 3 * count >= len(self.places)
            width = len(self.ids) if every_row else count
            apart = 1 if every_row else max(1, queries.shape[1])  # each has candidates of its own
            step = max(1, _RESCORE_BYTES // (8 * width * apart))
            for start in range(0, len(pending), step):
                chunk = pending[start : start + step]
                excluded = None if exclude_ids is None else exclude_ids[chunk]
                found = self._search_chunk(normalized[chunk], k, excluded, width, every_row)
                similarities[chunk], positions[chunk], is_certain = found
                certain.append(is_certain)
            pending = pending[~np.concatenate(certain)]
            count *= 4
        return similarities, positions

    def _search_chunk(
        self, queries: Floats, k: int, excluded: Ints | None, width: int, every_row: bool
    ) -> tuple[Floats, Ints, NDArray[np.bool_]]:
        if self.is_exact:
            scaled, length = self.space.first_pass_queries(queries)
        else:
            scaled, length = self.space.index_queries(queries), np.ones(len(queries))
        limit = np.full(len(queries), -np.inf)
        if every_row:
            candidates = np.broadcast_to(np.arange(width), (len(queries), width))
        else:
            proposed, limit = self.first_pass.candidates(scaled, width)
            is_row = (proposed >= 0) & (proposed < len(self.places))
            candidates = np.where(is_row, self.places[np.where(is_row, proposed, 0)], -1)
        rescore = self._compare_all if every_row else self._rescore
        similarities = rescore(queries, candidates)  # [B, width]
        similarities[candidates < 0] = -np.inf
        if excluded is not None:
            similarities[self.ids[candidates] == excluded[:, None]] = -np.inf
        order = nearest_first(similarities, self.ids[candidates], k)
        best = np.take_along_axis(similarities, order, axis=1)
        # what the first pass left out scores at most `limit`: the k-th place must be above it
        certain = self.space.as_score(best[:, -1], queries, length) > limit
        return best, np.take_along_axis(candidates, order, axis=1), certain

    def _rescore(self, queries: Floats, candidates: Ints) -> Floats:
        """Similarity of each query with each of its candidates, one pair at a time in float64."""
        used, places = np.unique(candidates, return_inverse=True)
        places = places.reshape(candidates.shape)
        similarities = np.empty(candidates.shape)
        step = max(1, _RESCORE_BYTES // (8 * queries.shape[1]))
        for start in range(0, len(used), step):
            rows = self.space.normalize(self.features[used[start : start + step]])

            def fill(i: int, rows: Floats = rows, start: int = start) -> None:
                if len(used) <= min(step, _FEW_MORE * candidates.shape[1]):
                    similarities[i] = self.space.compare(rows, queries[i])[places[i]]  # [width]
                elif len(used) <= step:
                    similarities[i] = self.space.compare(rows[places[i]], queries[i])
                else:
                    here = (places[i] >= start) & (places[i] < start + step)
                    chosen = rows[places[i, here] - start]
                    similarities[i, here] = self.space.compare(chosen, queries[i])

            _in_threads(fill, len(queries), similarities.size)
        return similarities

    def _compare_all(self, queries: Floats, candidates: Ints) -> Floats:
        """What `_rescore` finds where the candidates of each query are all rows in their order."""
        similarities = np.empty(candidates.shape)
        step = max(1, _COMPARE_BYTES // (8 * queries.shape[1]))
        for start in range(0, len(self.ids), step):
            part = slice(start, start + step)
            rows = self.space.normalize(self.features[part])

            def fill(i: int, rows: Floats = rows, part: slice = part) -> None:
                similarities[i, part] = self.space.compare(rows, queries[i])

            _in_threads(fill, len(queries), len(queries) * len(rows))
        return similarities


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


def nearest_first(similarities: Floats, ids: Ints, k: int) -> Ints:
    """Where the k nearest of each row of [B, K] similarities lie: [B, k], by (similarity, id).

    Args:
        similarities: [B, K] float64.
        ids: [B, K] int64.
        k: how many.
    """
    return np.lexsort((ids, -similarities), axis=-1)[:, :k]


def _widened(features: NDArray) -> Floats:
    """A float64 copy; of float16 by torch, whose conversion is several times as fast."""
    if features.dtype == np.float16:
        return torch.from_numpy(features).double().numpy()
    return features.astype(np.float64)


def _in_threads(task: Callable[[int], None], count: int, pairs: int) -> None:
    """Runs a task for each of `count` numbers; numpy lets go of the interpreter meanwhile."""
    threads = min(torch.get_num_threads(), count) if pairs > _PAIRS_FOR_THREADS else 1

    def run(span: Ints) -> None:
        for number in span:
            task(int(number))

    spans = np.array_split(np.arange(count), max(1, threads))
    if threads < 2:
        run(spans[0])
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(run, span) for span in spans]:
            done.result()


def recall_of(found: Ints, wanted: Ints) -> float:
    """Share of the wanted neighbours [B, k] that were found [B, k]."""
    hits = (wanted[:, :, None] == found[:, None, :]).any(axis=2)
    return float(hits.mean(axis=1).mean())
