"""How often an approximate index misses: on rows, near rows, and on queries that are unlike them.

An index is set to reach its recall on rows and on perturbed rows, which is what new pictures of the
same things are like. What it then has on strangers is measured and said: to reach it there too
takes ten times the work, for queries that hardly anybody asks.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..core.manifest import MEASURED_ON, IndexInfo
from ..core.search import Floats, Ints, Rows
from .searcher import RECALL_K, recall_of

RECALL_SAMPLE = 256
_SPREAD_ROWS = 4096
_FAR = 4.0
_LARGEST = float(np.finfo(np.float32).max)

_SHARE = 0.25
"""Of the way to another row, so far that a search must read up to twice as many lists.

50,000 rows in 512 lists, read for recall 0.99: jittered features 5 for rows, 8 for such queries, 80
for the middle of two rows, 3 for new queries; without clusters 80, 128, 160 and 64.
"""

ROWS, PERTURBED, STRANGERS = MEASURED_ON
AIMED_AT = (ROWS, PERTURBED)
"""Kinds of queries that an index is set to reach its recall on."""

Recalls = dict[str, float]
"""By kind of queries."""


class Queries(NamedTuple):
    """What a recall is measured with.

    Attributes:
        kind: of `MEASURED_ON`.
        features: [S, D] finite raw features.
        own: [S] ids that are no neighbours of them, -1 for none.
    """

    kind: str
    features: NDArray
    own: Ints


Find = Callable[[Queries, int], Ints]
"""From queries and k to the ids of the k nearest rows of each."""


def queries_for(features: Rows, ids: Ints, near: Find) -> list[Queries]:
    """Rows without themselves, perturbed rows, and queries that are unlike any of them.

    Perturbed ones are on their way to another row, and then as far off as their neighbour lies, in
    a direction in which rows differ: in others, one-bit codes would be judged by what never comes.
    Strangers lie where rows could, but in none of their clusters: independent in every value, with
    the mean and the spread that rows have there. Pictures of other things than the rows are between
    these and the rows. Others lie farther out, which is another matter where lengths count.

    Args:
        features: [N, D] raw rows, N >= 1.
        ids: [N] int64, unique.
        near: finds rows that are near, among these; it may miss some.
    """
    chosen = np.sort(np.random.default_rng(0).permutation(len(ids))[:RECALL_SAMPLE])
    rows = Queries(ROWS, np.asarray(features[chosen]), ids[chosen])
    generator = np.random.default_rng(1)
    sample = np.sort(generator.permutation(len(ids))[:_SPREAD_ROWS])
    known = np.asarray(features[sample], np.float64)
    mean, spread = known.mean(axis=0), known.std(axis=0)
    found = [rows, Queries(PERTURBED, _perturbed(features, ids, rows, near), _nobody(rows.own))]
    for scale, count in ((1.0, 2 * RECALL_SAMPLE), (_FAR, RECALL_SAMPLE)):  # they vary more
        noise = generator.standard_normal((count, features.shape[1]))
        drawn = _singles(mean + scale * spread * noise)
        found.append(Queries(STRANGERS, drawn, np.full(len(drawn), -1)))
    return found


def _perturbed(features: Rows, ids: Ints, rows: Queries, near: Find) -> NDArray:
    """Some rows, moved: a part of the way to others, and as far as their neighbour lies."""
    generator = np.random.default_rng(2)
    own = np.asarray(rows.features, np.float64)
    others = np.asarray(features[generator.integers(len(ids), size=len(own))], np.float64)
    moved = own + _SHARE * (others - own)
    if len(ids) > 1:
        order = np.argsort(ids)
        places = order[np.searchsorted(ids, near(rows, 1)[:, 0], sorter=order)]
        pairs = generator.integers(len(ids), size=(2, len(own)))
        noise = np.subtract(*(np.asarray(features[one], np.float64) for one in pairs))
        length = _lengths(np.asarray(features[places], np.float64) - own)
        far = _lengths(noise)
        moved += length * (noise / np.where(far > 0, far, 1.0))  # equal rows have no direction
    return _singles(moved)


def _lengths(vectors: Floats) -> Floats:
    """[S, 1]; of any float32, whose squares may not fit into one."""
    return np.linalg.norm(vectors, axis=1, keepdims=True)


def _singles(values: Floats) -> NDArray:
    return np.clip(values, -_LARGEST, _LARGEST).astype(np.float32)


def _nobody(own: Ints) -> Ints:
    return np.full_like(own, -1)


class RecallTest:
    """Measures a search of some rows, by queries whose answer is known.

    Args:
        features: [N, D] raw rows.
        ids: [N] int64, unique.
        exact: finds the true answer.
        near: finds rows that are near, quickly; it may miss some.
    """

    def __init__(self, features: Rows, ids: Ints, exact: Find, near: Find) -> None:
        self.k = min(RECALL_K, len(ids) - 1)
        self.queries: list[Queries] = []
        self.wanted: list[Ints] = []
        if self.k > 0:
            self.queries = queries_for(features, ids, near)
            # at once, since each time all rows are read
            asked = np.concatenate([np.asarray(each.features) for each in self.queries])
            own = np.concatenate([each.own for each in self.queries])
            ends = np.cumsum([len(each.own) for each in self.queries])[:-1]
            self.wanted = np.split(exact(Queries("", asked, own), self.k), ends)

    def recalls(self, find: Find, kinds: Sequence[str] = MEASURED_ON) -> Recalls:
        """By kind of queries, the worst of each; where one row is, nothing is missed."""
        found = dict.fromkeys(kinds, 1.0)
        for queries, wanted in zip(self.queries, self.wanted, strict=True):
            if queries.kind in found:
                recall = recall_of(find(queries, self.k), wanted)
                found[queries.kind] = min(found[queries.kind], recall)
        return found

    def aimed(self, find: Find) -> tuple[float, str]:
        """What an index is judged by: the worst of `AIMED_AT`, and which that is."""
        return worst(self.recalls(find, AIMED_AT))


def worst(recalls: Recalls) -> tuple[float, str]:
    """The worst recall, and of which kind of queries."""
    return min(((recall, kind) for kind, recall in recalls.items()), key=lambda pair: pair[0])


def aimed_recall(info: IndexInfo) -> float | None:
    """What an index that was measured is judged by; one that was before this, by its worst."""
    found = {kind: recall for kind, recall in info.recalls.items() if kind in AIMED_AT}
    return worst(found)[0] if found else info.recall
