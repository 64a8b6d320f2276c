"""Exact search: a fast first pass proposes candidates, float64 rescoring decides.

The order of the answer is (similarity, id), compared in float64 pair by pair, so it does not depend
on the batch size, the number of threads, the order of insertion or the library of the first pass.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from .configuration_knn import Normalization
from .functional import Metric

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_EXTRA_CANDIDATES = 12
_RESCORE_BYTES = 128 * 2**20
_FLOAT32_ROUNDING = 2.0**-24


class FirstPass(Protocol):
    """A fast search by inner product over float32 rows that all have length at most 1."""

    def candidates(self, queries: NDArray[np.float32], count: int) -> tuple[NDArray, Ints]:
        """The `count` best rows per query.

        Args:
            queries: [B, D'] float32.
            count: at most the number of rows.

        Returns:
            Scores [B, count] float32, best first, and row positions [B, count] int64.
        """
        ...


class TorchFirstPass:
    """Blocked matmul and top-k in plain torch; needs no faiss.

    Args:
        rows: [N, D'] float32.
    """

    BLOCK = 65_536

    def __init__(self, rows: NDArray[np.float32]) -> None:
        self.rows = torch.from_numpy(rows)

    def candidates(self, queries: NDArray[np.float32], count: int) -> tuple[NDArray, Ints]:
        """See `FirstPass.candidates`."""
        wanted = torch.from_numpy(queries)
        scores, positions = [], []
        for start in range(0, len(self.rows), self.BLOCK):
            block = wanted @ self.rows[start : start + self.BLOCK].T  # [B, block]
            best = block.topk(min(count, block.shape[1]), dim=1)
            scores.append(best.values)
            positions.append(best.indices + start)
        merged = torch.cat(scores, dim=1).topk(count, dim=1)
        found = torch.cat(positions, dim=1).gather(1, merged.indices)
        return merged.values.numpy(), found.numpy()


def normalize_rows(features: NDArray, mean: Floats, normalization: str) -> Floats:
    """Applies the datastore's normalisation in float64.

    Args:
        features: [N, D] raw features of any float dtype.
        mean: [D] float64, used by `l2_centered` only.
        normalization: `l2_centered`, `l2` or `none`.

    Returns:
        [N, D] float64; a zero vector stays zero, so its cosine with everything is 0.
    """
    rows = features.astype(np.float64)
    if normalization == Normalization.NONE:
        return rows
    if normalization == Normalization.L2_CENTERED:
        rows -= mean
    lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    rows /= np.where(lengths > 0, lengths, 1.0)[:, None]
    return rows


class ExactSearcher:
    """Exact nearest neighbours of queries among the rows of a datastore.

    Both metrics become one inner product for the first pass: for `l2` the rows are extended by
    ``-|x|^2 / 2`` and the queries by 1, which keeps the order, and everything is scaled to length
    at most 1, which bounds the rounding error by the width alone.

    Args:
        features: [N, D] stored raw features, float16 or float32.
        ids: [N] int64, unique.
        mean: [D] float64.
        metric: `cosine` or `l2`.
        normalization: `l2_centered`, `l2` or `none`.
        first_pass: builds the first pass from its [N, D'] float32 rows.
    """

    def __init__(
        self,
        features: NDArray,
        ids: Ints,
        mean: Floats,
        metric: str,
        normalization: str,
        first_pass: Callable[[NDArray[np.float32]], FirstPass],
    ) -> None:
        self.features, self.ids, self.mean = features, ids, mean
        self.metric, self.normalization = Metric(metric), normalization
        self.scale, rows = self._first_pass_rows()
        self.first_pass = first_pass(rows)
        self.rounding = 4 * (rows.shape[1] + 4) * _FLOAT32_ROUNDING

    def search(self, queries: NDArray, k: int, exclude_ids: Ints | None) -> tuple[Floats, Ints]:
        """Finds the k nearest rows.

        Args:
            queries: [B, D] finite raw features.
            k: from 1 to N, or to N - 1 with `exclude_ids`.
            exclude_ids: [B] int64; the row with that id is no neighbour of that query (-1 = none).

        Returns:
            Similarities [B, k] float64 and positions [B, k] int64, by (similarity, id).
        """
        normalized = normalize_rows(queries, self.mean, self.normalization)  # [B, D]
        similarities = np.empty((len(queries), k))
        positions = np.empty((len(queries), k), np.int64)
        pending = np.arange(len(queries))
        count = k + (exclude_ids is not None) + _EXTRA_CANDIDATES
        while len(pending):
            certain = []
            # beyond a half, proposing candidates costs more than comparing with every row
            every_row = 2 * count >= len(self.ids)
            width = len(self.ids) if every_row else count
            step = max(1, _RESCORE_BYTES // (8 * width * max(1, queries.shape[1])))
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
        scaled, length = self._first_pass_queries(queries)
        if every_row:
            candidates = np.broadcast_to(np.arange(width), (len(queries), width))
            limit = np.full(len(queries), -np.inf)
        else:
            scores, candidates = self.first_pass.candidates(scaled, width)
            limit = scores[:, -1].astype(np.float64) + self.rounding
        similarities = self._rescore(queries, candidates)  # [B, width]
        if excluded is not None:
            similarities[self.ids[candidates] == excluded[:, None]] = -np.inf
        order = np.lexsort((self.ids[candidates], -similarities), axis=-1)[:, :k]
        best = np.take_along_axis(similarities, order, axis=1)
        # what the first pass left out scores at most `limit`: the k-th place must be above it
        certain = self._as_score(best[:, -1], queries, length) > limit
        return best, np.take_along_axis(candidates, order, axis=1), certain

    def _rescore(self, queries: Floats, candidates: Ints) -> Floats:
        """Similarity of each query with each of its candidates, one pair at a time in float64."""
        used, places = np.unique(candidates, return_inverse=True)
        rows = normalize_rows(self.features[used], self.mean, self.normalization)
        places = places.reshape(candidates.shape)
        similarities = np.empty(candidates.shape)
        for i, query in enumerate(queries):
            near = rows[places[i]]  # [width, D]
            if self.metric is Metric.L2:
                near = near - query
                similarities[i] = -np.einsum("kd,kd->k", near, near)
            else:
                similarities[i] = np.einsum("kd,d->k", near, query)
        return similarities

    def _first_pass_rows(self) -> tuple[float, NDArray[np.float32]]:
        count, dim = self.features.shape
        is_l2 = self.metric is Metric.L2
        rows = np.empty((count, dim + is_l2), np.float32)
        scale = self._largest_length() if is_l2 else 1.0
        for start in range(0, count, TorchFirstPass.BLOCK):
            part = slice(start, start + TorchFirstPass.BLOCK)
            block = normalize_rows(self.features[part], self.mean, self.normalization) / scale
            rows[part, :dim] = block
            if is_l2:
                rows[part, dim] = -0.5 * np.einsum("nd,nd->n", block, block)
        return scale, rows

    def _first_pass_queries(self, queries: Floats) -> tuple[NDArray[np.float32], Floats]:
        """Queries of length 1 for the first pass, and the length each had."""
        if self.metric is Metric.COSINE:
            return queries.astype(np.float32), np.ones(len(queries))
        extended = np.concatenate([queries / self.scale, np.ones((len(queries), 1))], axis=1)
        length = np.sqrt(np.einsum("nd,nd->n", extended, extended))
        return (extended / length[:, None]).astype(np.float32), length

    def _as_score(self, similarities: Floats, queries: Floats, length: Floats) -> Floats:
        """What an exact first pass would have scored, less float64's own rounding error."""
        if self.metric is Metric.COSINE:
            return similarities
        squares = np.einsum("nd,nd->n", queries, queries)
        scores = (similarities + squares) / (2 * self.scale**2 * length)
        return scores - 1e-14 * squares / (self.scale**2 * length)

    def _largest_length(self) -> float:
        largest = 0.0
        for start in range(0, len(self.features), TorchFirstPass.BLOCK):
            block = self.features[start : start + TorchFirstPass.BLOCK]
            rows = normalize_rows(block, self.mean, self.normalization)
            largest = max(largest, float(np.einsum("nd,nd->n", rows, rows).max()))
        return largest**0.5 or 1.0
