"""Nearest neighbours: a fast first pass proposes candidates, float64 rescoring decides.

The order of the answer is (similarity, id), compared in float64 pair by pair, so it does not depend
on the batch size, the number of threads, the order of insertion or the library of the first pass.
An exact first pass says how good a row that it left out can be at most: candidates are widened
until none of those could belong to the answer.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .config import Normalization
from .learned import LearnedMap, width_of
from .rows import RowParts, Values, as_features, as_whole_numbers
from .votes import Metric

Ints = NDArray[np.int64]
Singles = NDArray[np.float32]
Floats = NDArray[np.float64]
Rows = NDArray | RowParts

ROW_BLOCK = 65_536
"""So many rows are multiplied, or normalised, at once."""

_FLOAT32_ROUNDING = 2.0**-24
_SHORTCUTS = {"tf32": 2.0**-9, "high": 2.0**-9, "bf16": 2.0**-6, "medium": 2.0**-6}
"""What torch's settings of float32 products let one of unit vectors be off."""

_PAIRS_AT_ONCE = 2**22
_COMPARE_BYTES = 2**20  # rows that stay in the cache while they are compared
_CANDIDATES_PER_ROW = 6  # what it costs to gather one, in rows that are compared in their order
_PAIRS_FOR_THREADS = 4096  # fewer pairs are compared before a thread has started
_PAIRS_OF_FEW = 128  # so many are compared at once, before it is known which are needed
_ONE_THREAD = 32_768  # values that torch converts without threads
_SMALLEST_SQUARE = 2.0**-800  # of a length; smaller and larger ones are scaled first
_EXTENDED = 1.2  # a little more than sqrt(5) / 2, which rounding must not exceed


class Neighbors(NamedTuple):
    """The nearest rows of a batch of queries, by (similarity, id).

    Attributes:
        similarities: [B, k'] float32, higher is closer: inner products of unit vectors (`cosine`)
            or negative squared distances (`l2`).
        labels: [B, k'] int64.
        ids: [B, k'] int64.
    """

    similarities: Tensor
    labels: Tensor
    ids: Tensor

    def rounded(self, like: Tensor | NDArray) -> "Neighbors":
        """The answer to a caller: similarities in float32, on the device of the queries.

        Args:
            like: the queries.
        """
        largest = torch.finfo(torch.float32).max
        device = like.device if isinstance(like, Tensor) else torch.device("cpu")
        return Neighbors(
            self.similarities.clamp(-largest, largest).float().to(device),
            self.labels.to(device),
            self.ids.to(device),
        )


class Request(NamedTuple):
    """A search whose arguments were checked.

    Attributes:
        queries: [B, D] float32 or float64.
        k: >= 1.
        excluded: [B] int64, or None.
    """

    queries: NDArray
    k: int
    excluded: Ints | None

    def width(self, rows: int) -> int:
        """How many neighbours there are among so many rows."""
        return max(0, min(self.k, rows - (self.excluded is not None)))


def check_request(
    queries: Tensor | NDArray, k: int, exclude_ids: Values | None, dim: int
) -> Request:
    """Checks the arguments of a search, the same for every kind of datastore.

    Args:
        queries: [B, dim] finite raw features.
        k: how many.
        exclude_ids: [B] int64, -1 for none; or None.
        dim: width of a row.

    Raises:
        ValueError: for NaN or infinite queries, another width, k < 1, or exclude_ids of another
            length.
    """
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"Expected `k` to be a whole number >= 1, but got {k!r}.")
    wanted = as_features(queries, "queries", dim).numpy()
    excluded: Ints | None = None
    if exclude_ids is not None:
        excluded = as_whole_numbers(exclude_ids, "exclude_ids", lowest=-1).numpy()
        if len(excluded) != len(wanted):
            raise ValueError(
                f"Expected `exclude_ids` to have one id per query ({len(wanted)}), "
                f"but got {len(excluded)}."
            )
    return Request(wanted, int(k), excluded)


class FirstPass(Protocol):
    """A search by inner product over rows that all have length at most 1.

    Attributes:
        extra: how many candidates beyond k are usually enough.
    """

    extra: int

    def candidates(self, queries: Singles, count: int) -> tuple[Ints, Floats]:
        """The best rows per query.

        Args:
            queries: [B, D'] float32 of length 1.
            count: how many, at most the number of rows.

        Returns:
            Row positions [B, count] int64 (-1 where an approximate pass found fewer), and float64
            [B, count]: no row from that place on, nor one that was left out, has an exact inner
            product above that; inf where nothing is promised.
        """
        ...


class TorchFirstPass:
    """Blocked matmul and top-k in plain torch; needs no faiss.

    Args:
        rows: [N, D'] float32 of length at most 1.
    """

    extra = 12

    def __init__(self, rows: Singles) -> None:
        self.blocks = list(torch.from_numpy(rows).split(ROW_BLOCK))
        self.rounding = float32_rounding(rows.shape[1])

    def candidates(self, queries: Singles, count: int) -> tuple[Ints, Floats]:
        """See `FirstPass.candidates`."""
        scores, positions = best_of_blocks(self.blocks, torch.from_numpy(queries), count)
        return positions.numpy(), scores.double().numpy() + self.rounding + shortcut()


def best_of_blocks(blocks: Sequence[Tensor], queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The rows with the largest inner products.

    Args:
        blocks: tensors [n, D'] of one dtype, on any devices.
        queries: [B, D'] of that dtype, on the CPU.
        count: how many.

    Returns:
        Products [B, count] of the dtype of the blocks, best first, and int64 positions.
    """
    scores, positions, start = [], [], 0
    for block in blocks:  # nothing waits for a device before all of them are at work
        with torch.autocast(block.device.type, enabled=False):
            products = queries.to(block.device) @ block.T  # [B, n]
        best = products.topk(min(count, len(block)), dim=1)
        scores.append(best.values)
        positions.append(best.indices + start)
        start += len(block)
    merged = torch.cat([values.cpu() for values in scores], dim=1).topk(count, dim=1)
    found = torch.cat([rows.cpu() for rows in positions], dim=1).gather(1, merged.indices)
    return merged.values, found


def float32_rounding(width: int) -> float:
    """How far an inner product of float32 vectors of length 1 may be off, whatever the order."""
    return 4 * (width + 4) * _FLOAT32_ROUNDING


def shortcut() -> float:
    """How much further off torch's settings let it be, on a GPU or a CPU."""
    backends: Any = torch.backends
    if not hasattr(backends.cuda.matmul, "fp32_precision"):
        return _SHORTCUTS.get(torch.get_float32_matmul_precision(), 0.0)
    found = (backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision)
    return max(_SHORTCUTS.get(precision, 0.0) for precision in found)


def normalize_rows(
    features: NDArray, mean: Floats, normalization: str, learned: LearnedMap | None = None
) -> Floats:
    """Applies the datastore's normalisation in float64: centre, map if there is one, length 1.

    Args:
        features: [N, D] raw features of any float dtype.
        mean: [D] float64, used by `l2_centered` only.
        normalization: `l2_centered`, `l2` or `none`, which is without centring and scaling.
        learned: a map to E values, or None.

    Returns:
        [N, D] or [N, E] float64; a zero vector stays zero, so its cosine with everything is 0.
    """
    rows = _widened(features)
    if normalization == Normalization.L2_CENTERED:
        rows -= mean
    if learned is not None:
        rows = learned.apply(rows)
    if normalization == Normalization.NONE:
        return rows
    squares = np.einsum("nd,nd->n", rows, rows)
    least, most = squares.min(initial=1.0), squares.max(initial=1.0)
    if not _SMALLEST_SQUARE < least <= most < 1 / _SMALLEST_SQUARE:
        _, exponents = np.frexp(np.abs(rows).max(axis=1, initial=0.0))
        rows = np.ldexp(rows, -exponents[:, None])  # exact; keeps the squares in range
        squares = np.einsum("nd,nd->n", rows, rows)
        squares[squares == 0] = 1.0
    rows /= np.sqrt(squares)[:, None]
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
        learned: a map that rows and queries go through, or None.
        features: [N, D] rows that fix the scale.
        largest: of the rows' lengths once they are normalised, if it is known; it fixes the scale.
    """

    def __init__(
        self,
        mean: Floats,
        metric: str,
        normalization: str,
        learned: LearnedMap | None,
        features: Rows,
        largest: float | None = None,
    ) -> None:
        self.mean, self.normalization, self.learned = mean, normalization, learned
        self.width = width_of(learned, features.shape[1])
        self.is_l2 = Metric(metric) is Metric.L2
        self.largest = 1.0
        if self.is_l2:
            self.largest = largest or self.largest_length(features) or 1.0
        # a row of length 1 is sqrt(1 + 1/4) long once it is extended
        self.scale = self.largest * _EXTENDED if self.is_l2 else 1.0

    def normalize(self, features: NDArray) -> Floats:
        """[N, D] raw features to the float64 vectors that are compared, [N, E] behind a map."""
        return normalize_rows(features, self.mean, self.normalization, self.learned)

    def first_pass_rows(self, features: Rows) -> Singles:
        """[N, D] raw features to [N, D'] float32 rows of length at most 1."""
        count, dim = len(features), self.width
        rows = np.empty((count, dim + self.is_l2), np.float32)
        for start in range(0, count, ROW_BLOCK):
            part = slice(start, start + ROW_BLOCK)
            block = self.normalize(features[part]) / self.scale
            rows[part, :dim] = block
            if self.is_l2:
                rows[part, dim] = -0.5 * np.einsum("nd,nd->n", block, block)
        return rows

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

    def compare(self, rows: Floats, queries: Floats) -> Floats:
        """[K, D] normalised rows with one query [D], or [K, D] each with its own: [K]."""
        # [1, D] by [D, 1] for each row is one dot product of BLAS, by itself, also in numpy 1
        if self.is_l2:
            rows = rows - queries
            return -np.matmul(rows[:, None, :], rows[:, :, None])[:, 0, 0]
        return np.matmul(rows[:, None, :], queries[..., None])[:, 0, 0]

    def largest_length(self, features: Rows) -> float:
        """Of the rows, once they are normalised."""
        largest = 0.0
        for start in range(0, len(features), ROW_BLOCK):
            rows = self.normalize(features[start : start + ROW_BLOCK])
            largest = max(largest, float(np.einsum("nd,nd->n", rows, rows).max()))
        return largest**0.5


class Searcher:
    """Nearest neighbours of queries among rows.

    Args:
        features: [N, D] stored raw features, float16 or float32.
        ids: [N] int64, unique.
        space: how rows are compared.
        first_pass: over the rows that `space` makes of them.

    Attributes:
        is_exact: whether the first pass is, so that the answer is the same without it.
    """

    is_exact = True

    def __init__(self, features: Rows, ids: Ints, space: RowSpace, first_pass: FirstPass) -> None:
        self.features, self.ids, self.space, self.first_pass = features, ids, space, first_pass

    def propose(self, queries: Floats, count: int) -> tuple[Ints, Floats, Floats]:
        """Candidates for normalised queries.

        Args:
            queries: [B, D] float64.
            count: how many.

        Returns:
            Positions [B, count] int64, -1 for none; [B, count] what a row from there on can score
            at most; and [B] the length that each query had for the first pass.
        """
        scaled, length = self.space.first_pass_queries(queries)
        return *self.first_pass.candidates(scaled, count), length

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
            every_row = self.compares_every_row(count)
            width = len(self.ids) if every_row else count
            step = max(1, _PAIRS_AT_ONCE // width)
            for start in range(0, len(pending), step):
                chunk = pending[start : start + step]
                excluded = None if exclude_ids is None else exclude_ids[chunk]
                found = self._search_chunk(normalized[chunk], k, excluded, width, every_row)
                similarities[chunk], positions[chunk], is_certain = found
                certain.append(is_certain)
            pending = pending[~np.concatenate(certain)]
            count *= 4
        return similarities, positions

    def compares_every_row(self, count: int) -> bool:
        """Whether that takes less time than to gather so many candidates of each query."""
        return _CANDIDATES_PER_ROW * count >= len(self.ids)

    def _search_chunk(
        self, queries: Floats, k: int, excluded: Ints | None, width: int, every_row: bool
    ) -> tuple[Floats, Ints, NDArray[np.bool_]]:
        nothing = np.full((len(queries), width), -np.inf)
        if every_row:
            candidates = np.broadcast_to(np.arange(width), nothing.shape)
            reach, length = nothing, np.ones(len(queries))
        else:
            candidates, reach, length = self.propose(queries, width)
        allowed = candidates >= 0
        if excluded is not None:
            allowed &= self.ids[candidates] != excluded[:, None]
        if every_row:
            similarities = np.where(allowed, self._compare_all(queries), -np.inf)
        else:
            similarities, count = nothing, np.cumsum(allowed, axis=1)
            is_few = self.is_exact and allowed.size <= _PAIRS_OF_FEW
            first = allowed & (count <= (width if is_few else k))
            self._rescore(queries, candidates, first, similarities)
            # whatever cannot reach the least of these needs no rescoring
            lowest = similarities.min(axis=1, where=first, initial=np.inf)
            lowest = self.space.as_score(lowest, queries, length)
            more = allowed & ~first & (reach >= lowest[:, None])
            self._rescore(queries, candidates, more, similarities)
            width = max(k, 1 + int(np.flatnonzero((first | more).any(axis=0)).max(initial=0)))
        candidates, similarities = candidates[:, :width], similarities[:, :width]
        own = np.arange(len(queries))[:, None]
        order = nearest_first(similarities, self.ids[candidates], k)
        best = similarities[own, order]
        # what the first pass left out must score less than the k-th place
        limit = reach[:, -1] if self.is_exact else -np.inf
        certain = self.space.as_score(best[:, -1], queries, length) > limit
        return best, candidates[own, order], certain

    def _rescore(
        self, queries: Floats, candidates: Ints, chosen: NDArray[np.bool_], similarities: Floats
    ) -> None:
        """Fills in the similarity of each chosen pair, one by one in float64.

        In the order of the rows, so that each is read and normalised once, and in small blocks that
        stay in the cache.
        """
        numbers, places = chosen.nonzero()
        rows = candidates[numbers, places]
        order = np.argsort(rows)
        step = max(1, _COMPARE_BYTES // (8 * self.features.shape[1]))

        def fill(block: int) -> None:
            part = order[block * step : (block + 1) * step]
            wanted = rows[part]
            is_new = np.diff(wanted, prepend=-1) != 0
            normalized = self.space.normalize(self.features[wanted[is_new]])
            if len(normalized) < len(part):
                normalized = normalized[np.cumsum(is_new) - 1]
            asked = queries[numbers[part]] if len(queries) > 1 else queries[0]
            similarities[numbers[part], places[part]] = self.space.compare(normalized, asked)

        _in_threads(fill, -(-len(order) // step), len(order))

    def _compare_all(self, queries: Floats) -> Floats:
        """[B, N] similarity of each query with each row."""
        similarities = np.empty((len(queries), len(self.ids)))
        step = max(1, _COMPARE_BYTES // (8 * self.features.shape[1]))
        for start in range(0, len(self.ids), step):
            part = slice(start, start + step)
            rows = self.space.normalize(self.features[part])

            def fill(i: int, rows: Floats = rows, part: slice = part) -> None:
                similarities[i, part] = self.space.compare(rows, queries[i])

            _in_threads(fill, len(queries), len(queries) * len(rows))
        return similarities


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
    if features.dtype != np.float16:
        return features.astype(np.float64)
    widened = np.empty(features.shape)
    step = max(1, _ONE_THREAD // features.shape[1])
    for start in range(0, len(features), step):  # its threads would be in the way of ours
        part = slice(start, start + step)
        torch.from_numpy(widened[part]).copy_(torch.from_numpy(features[part]))
    return widened


def _in_threads(task: Callable[[int], None], count: int, pairs: int) -> None:
    """Runs a task for each of `count` numbers; numpy lets go of the interpreter meanwhile."""
    threads = max(1, min(torch.get_num_threads(), count)) if pairs > _PAIRS_FOR_THREADS else 1

    def run(first: int) -> None:
        for number in range(first, count, threads):
            task(number)

    if threads < 2:
        run(0)
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(run, first) for first in range(threads)]:
            done.result()
