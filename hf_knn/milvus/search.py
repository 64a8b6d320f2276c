"""How a collection is searched: what Milvus is asked for, and what is compared here.

Milvus compares vectors in float32 or float16, so its order among nearly equal rows is its own. It
is asked for some rows more than wanted; their stored features are compared here in float64, as
those of rows in memory are. If a row that it left out could still belong to the answer it is asked
for more of them, and in the end all rows are read. With an approximate index that is so only where
it returns too few.
"""

import logging

import numpy as np
from numpy.typing import NDArray

from ..core.manifest import DatastoreError
from ..core.rows import Values, as_whole_numbers
from ..core.search import Floats, Ints, RowSpace, Singles, float32_rounding, nearest_first
from ..store.backend import NOBODY, Hits
from ..store.faiss import limits
from ..store.table import StoredRows
from .about import About
from .collection import (
    LARGEST_ANSWER,
    ROW_FIELDS,
    MilvusCollection,
    decode_rows,
    rows_per_call,
)
from .kinds import FLOAT32, MilvusIndex, search_parameters

logger = logging.getLogger(__name__)

_EXTRA, _WIDEN = 12, 4


def rows_where(labels: Values | None, split: str | None) -> str:
    """The Milvus expression for rows of some classes and one split.

    Args:
        labels: the classes; None for all.
        split: None for all.
    """
    parts = []
    if labels is not None:
        classes = as_whole_numbers(labels, "labels").unique().tolist()
        parts.append(f"label in {classes}")
    if split is not None:
        text = split.replace("\\", "\\\\").replace('"', '\\"')
        parts.append(f'split == "{text}"')
    return " and ".join(parts)


def search_collection(
    collection: MilvusCollection,
    about: About,
    space: RowSpace,
    queries: Floats,
    k: int,
    excluded: Ints | None,
    where: str = "",
) -> Hits:
    """Finds the k nearest rows of each query.

    Args:
        collection: where to search.
        about: the record about it.
        space: how rows are compared.
        queries: [B, D] float64, normalised.
        k: how many, no more than there are.
        excluded: [B] ids that are no neighbours of the queries, -1 for none; or None.
        where: a Milvus expression; empty for all rows.

    Returns:
        Hits [B, k] by (similarity, id).

    Raises:
        DatastoreConnectionError: if the server does not answer.
        DatastoreError: if rows are missing, or are not what the record says.
    """
    if k == 0 or len(queries) == 0:
        return Hits.none(len(queries), k)
    answer = Hits.none(len(queries), k)
    pending, count = np.arange(len(queries)), k + (excluded is not None) + _EXTRA
    while len(pending) and count <= LARGEST_ANSWER:
        uncertain = []
        # a reply holds no more rows than a write
        step = max(1, rows_per_call(about.dim, LARGEST_ANSWER) // count)
        for start in range(0, len(pending), step):
            chunk = pending[start : start + step]
            own = None if excluded is None else excluded[chunk]
            hits, is_certain = _ask(collection, about, space, queries[chunk], k, own, where, count)
            answer.put(chunk[is_certain], Hits(*(values[is_certain] for values in hits)))
            uncertain.append(chunk[~is_certain])
        pending, count = np.concatenate(uncertain), _WIDEN * count
    if len(pending):
        logger.warning(
            "%d queries need more candidates than %s can return (%d): all rows are read.",
            len(pending), collection, LARGEST_ANSWER,
        )  # fmt: skip
        own = None if excluded is None else excluded[pending]
        answer.put(pending, _read_all(collection, about, space, queries[pending], k, own, where))
    if (answer.ids < 0).any():
        raise DatastoreError(
            f"Expected {collection} to hold {about.count} rows, but it has fewer now; somebody "
            "else changed it, connect again."
        )
    return answer


def _ask(
    collection: MilvusCollection,
    about: About,
    space: RowSpace,
    queries: Floats,
    k: int,
    excluded: Ints | None,
    where: str,
    count: int,
) -> tuple[Hits, np.ndarray]:
    """The best of what Milvus proposes, and for which queries nothing nearer was left out."""
    exact, length = space.first_pass_queries(queries)
    vectors = exact.astype(about.vectors)
    parameters = search_parameters(about.index, about.effort, count, about.count)
    replies = collection.search(vectors, count, where, ROW_FIELDS, parameters)
    # fewer than were asked for are all there are
    last = [reply[-1]["distance"] if len(reply) >= count else -np.inf for reply in replies]
    limit = limits(np.array(last, np.float32), float32_rounding(vectors.shape[1]))
    limit += _lost(exact, vectors)
    found = {hit["entity"]["id"]: hit["entity"] for reply in replies for hit in reply}
    rows = decode_rows(list(found.values()), about)
    place = {row_id: i for i, row_id in enumerate(rows.ids.tolist())}
    candidates = np.full((len(queries), max(map(len, replies), default=0)), NOBODY)
    for i, reply in enumerate(replies):
        candidates[i, : len(reply)] = [place[hit["entity"]["id"]] for hit in reply]
    hits = _compare(rows, candidates, space, queries, k, excluded)
    if about.index != MilvusIndex.FLAT:  # nothing is known of what it left out
        return hits, hits.ids[:, -1] != NOBODY
    score = space.as_score(hits.similarities[:, -1], queries, length)
    return hits, (score > limit) | np.isneginf(limit)


def _lost(exact: Singles, vectors: NDArray) -> Floats:
    """[B] how far a product may be off since rows and queries are kept in a shorter dtype.

    Args:
        exact: [B, D'] queries of length 1.
        vectors: the same as they are sent, in the dtype that the rows have on the server.
    """
    if vectors.dtype == FLOAT32:
        return np.zeros(len(exact))
    lost = np.linalg.norm(exact.astype(np.float64) - vectors, axis=1)
    kept = np.finfo(vectors.dtype)
    # half of the last place of each value, or of the smallest step, of a row of length at most 1
    of_row = float(kept.eps) / 2 + float(kept.smallest_subnormal) / 2 * exact.shape[1] ** 0.5
    of_product: Floats = lost + of_row * (1 + lost)
    return of_product


def _compare(
    rows: StoredRows,
    candidates: Ints,
    space: RowSpace,
    queries: Floats,
    k: int,
    excluded: Ints | None,
) -> Hits:
    """The k best of each query's candidates [B, K], positions in `rows` with -1 for none."""
    normalized = space.normalize(rows.features)
    similarities = np.full((len(queries), max(k, candidates.shape[1])), -np.inf)
    places = np.full(similarities.shape, NOBODY)
    places[:, : candidates.shape[1]] = candidates
    for i, query in enumerate(queries):
        mine = candidates[i][candidates[i] >= 0]
        similarities[i, : len(mine)] = space.compare(normalized[mine], query)
    # one more at the end, which stands for no row
    ids, labels = np.append(rows.ids, NOBODY), np.append(rows.labels, NOBODY)
    if excluded is not None:
        is_own = (ids[places] == excluded[:, None]) & (places >= 0)
        similarities[is_own], places[is_own] = -np.inf, NOBODY
    order = nearest_first(similarities, ids[places], k)
    best = np.take_along_axis(places, order, axis=1)
    return Hits(np.take_along_axis(similarities, order, axis=1), labels[best], ids[best])


def _read_all(
    collection: MilvusCollection,
    about: About,
    space: RowSpace,
    queries: Floats,
    k: int,
    excluded: Ints | None,
    where: str,
) -> Hits:
    best = Hits.none(len(queries), k)
    for page in collection.pages(ROW_FIELDS, where, rows_per_call(about.dim, 4096)):
        rows = decode_rows(page, about)
        everything = np.broadcast_to(np.arange(len(rows.ids)), (len(queries), len(rows.ids)))
        best = best.best_with(_compare(rows, everything, space, queries, k, excluded), k)
    return best
