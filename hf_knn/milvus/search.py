"""How a collection is searched: by which index, how hard, and what is compared here.

Milvus compares float32 vectors, so its order among nearly equal rows is its own. It is asked for
some rows more than wanted; their stored features are compared here in float64, as those of rows in
memory are. If a row that it left out could still belong to the answer it is asked for more of them,
and in the end all rows are read. With an approximate index that is so only where it returns too
few.
"""

import logging
import math
from collections.abc import Callable

import numpy as np

from ..core.manifest import DatastoreError
from ..core.rows import Values, as_whole_numbers
from ..core.search import Floats, Ints, RowSpace, float32_rounding, nearest_first
from ..store.backend import NOBODY, Hits
from ..store.faiss import limits
from ..store.index import MIN_RECALL
from ..store.table import StoredRows
from .collection import (
    LARGEST_ANSWER,
    ROW_FIELDS,
    About,
    MilvusCollection,
    MilvusIndex,
    decode_rows,
    rows_per_call,
)

logger = logging.getLogger(__name__)

_EFFORT = {MilvusIndex.IVF_FLAT: "nprobe", MilvusIndex.HNSW: "ef"}
_LEAST_EFFORT = {MilvusIndex.IVF_FLAT: 4, MilvusIndex.HNSW: 64}
_LARGEST_EF = 4096
_HNSW = {"M": 16, "efConstruction": 200}
_EXTRA, _WIDEN = 12, 4


def build_parameters(kind: str, count: int) -> dict[str, int]:
    """What an index is built with.

    Args:
        kind: of a `MilvusIndex`.
        count: rows that it shall hold.
    """
    if kind == MilvusIndex.HNSW:
        return dict(_HNSW)
    return {"nlist": _lists(count)} if kind == MilvusIndex.IVF_FLAT else {}


def search_parameters(kind: str, effort: int, wanted: int) -> dict[str, int]:
    """What an index is searched with.

    Args:
        kind: of a `MilvusIndex`.
        effort: see `set_effort`.
        wanted: how many rows are asked for, which `ef` must not be below.
    """
    if kind == MilvusIndex.HNSW:
        return {"ef": max(effort, wanted)}
    return {_EFFORT[MilvusIndex(kind)]: effort} if kind in _EFFORT else {}


def effort_name(kind: str) -> str:
    """What the effort of an index is called; empty for one without."""
    return _EFFORT.get(MilvusIndex(kind), "")


def set_effort(
    kind: str,
    count: int,
    measure: Callable[[int], tuple[float, str]],
    min_recall: float = MIN_RECALL,
) -> tuple[int, float, str]:
    """The smallest effort tried whose recall is enough; it is doubled until then.

    Args:
        kind: of a `MilvusIndex`, not `FLAT`.
        count: rows in the index.
        measure: from an effort to the recall, and what it was measured on.
        min_recall: in (0, 1].

    Returns:
        The effort (0 for an index without), its recall, and what that was measured on.

    Raises:
        ValueError: if no effort is enough, with what was reached.
    """
    largest = {MilvusIndex.IVF_FLAT: _lists(count), MilvusIndex.HNSW: _LARGEST_EF}
    most = largest.get(MilvusIndex(kind), 0)
    effort = min(_LEAST_EFFORT.get(MilvusIndex(kind), 0), most)
    while True:
        recall, measured_on = measure(effort)
        logger.info("%s, effort %d: recall %.4f on %s", kind, effort, recall, measured_on)
        if recall >= min_recall:
            return effort, recall, measured_on
        if effort >= most:
            raise ValueError(
                f"Expected recall {min_recall:g} of the index {kind} in Milvus, but it reached "
                f"{recall:.4f} on {measured_on}; load again with a smaller `min_recall`, or under "
                "another name with index='flat'."
            )
        effort = min(2 * effort, most)


def _lists(count: int) -> int:
    return max(1, min(65_536, round(4 * math.sqrt(count)), count))


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
    vectors, length = space.first_pass_queries(queries)
    parameters = search_parameters(about.index, about.effort, count)
    replies = collection.search(vectors, count, where, ROW_FIELDS, parameters)
    # fewer than were asked for are all there are
    last = [reply[-1]["distance"] if len(reply) >= count else -np.inf for reply in replies]
    limit = limits(np.array(last, np.float32), float32_rounding(vectors.shape[1]))
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
