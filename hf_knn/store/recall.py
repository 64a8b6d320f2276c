"""How often an approximate index misses: on rows, and on queries that are unlike them."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..core.manifest import MEASURED_ON
from ..core.search import Ints, Rows
from .searcher import RECALL_K, recall_of

RECALL_SAMPLE = 256
_SPREAD_ROWS = 4096
_FAR = 4.0
_LARGEST = float(np.finfo(np.float32).max)

ROWS, STRANGERS = MEASURED_ON


class Queries(NamedTuple):
    """What a recall is measured with.

    Attributes:
        kind: `ROWS` or `STRANGERS`.
        features: [S, D] finite raw features.
        own: [S] ids that are no neighbours of them, -1 for none.
    """

    kind: str
    features: NDArray
    own: Ints


Find = Callable[[Queries, int], Ints]
"""From queries and k to what names the k nearest rows of each: ids, or positions."""


def queries_for(features: Rows, ids: Ints) -> list[Queries]:
    """Rows without themselves, and queries that are unlike any of them.

    The latter lie where rows could, but in none of their clusters: independent in every value, with
    the mean and the spread that rows have there. Pictures of other things than the rows are between
    these and the rows. Others lie farther out, which is another matter where lengths count.

    Args:
        features: [N, D] raw rows, N >= 1.
        ids: [N] int64, unique.
    """
    chosen = np.sort(np.random.default_rng(0).permutation(len(ids))[:RECALL_SAMPLE])
    found = [Queries(ROWS, np.asarray(features[chosen]), ids[chosen])]
    generator = np.random.default_rng(1)
    near = np.sort(generator.permutation(len(ids))[:_SPREAD_ROWS])
    rows = np.asarray(features[near], np.float64)
    mean, spread = rows.mean(axis=0), rows.std(axis=0)
    for scale, count in ((1.0, 2 * RECALL_SAMPLE), (_FAR, RECALL_SAMPLE)):  # they vary more
        noise = generator.standard_normal((count, rows.shape[1]))
        drawn = np.clip(mean + scale * spread * noise, -_LARGEST, _LARGEST).astype(np.float32)
        found.append(Queries(STRANGERS, drawn, np.full(len(drawn), -1)))
    return found


class RecallTest:
    """Measures a search of some rows, by queries whose answer is known.

    Args:
        features: [N, D] raw rows.
        ids: [N] int64, unique.
        exact: finds the true answer.
    """

    def __init__(self, features: Rows, ids: Ints, exact: Find) -> None:
        self.k = min(RECALL_K, len(ids) - 1)
        self.queries = queries_for(features, ids) if self.k > 0 else []
        self.wanted = [exact(queries, self.k) for queries in self.queries]

    def worst(self, find: Find) -> tuple[float, str]:
        """The worst recall, and of which kind of queries; where one row is, nothing is missed."""
        found = [
            (recall_of(find(queries, self.k), wanted), queries.kind)
            for queries, wanted in zip(self.queries, self.wanted, strict=True)
        ]
        return min(found, default=(1.0, ROWS), key=lambda pair: pair[0])
