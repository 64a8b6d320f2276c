"""Which indexes Milvus has, which server has which, and how they are built and searched.

Codes of one bit a value (`IVF_RABITQ`) propose a few times as many rows as are wanted, which the
server compares in float16 before it answers; how many follows from how hard is searched.
"""

import logging
import math
import re
from collections.abc import Callable
from enum import StrEnum

from ..store.index import MIN_RECALL

logger = logging.getLogger(__name__)


class MilvusIndex(StrEnum):
    """An index of Milvus, by its name there."""

    FLAT = "FLAT"
    IVF_FLAT = "IVF_FLAT"
    IVF_SQ8 = "IVF_SQ8"
    IVF_RABITQ = "IVF_RABITQ"
    IVF_RABITQ_FASTSCAN = "IVF_RABITQ_FASTSCAN"
    SCANN = "SCANN"
    HNSW = "HNSW"
    HNSW_SQ = "HNSW_SQ"
    AUTOINDEX = "AUTOINDEX"


Build = dict[str, int | bool | str]
"""What an index is built with, as Milvus takes it."""

LITE = "lite"
"""Part of the version that Milvus Lite gives."""

FLOAT32, FLOAT16 = "float32", "float16"
VECTOR_DTYPES = (FLOAT32, FLOAT16)
"""What Milvus keeps the vectors in that it searches."""

_OF_SERVERS = {
    MilvusIndex.SCANN: (2, 3),
    MilvusIndex.IVF_RABITQ: (2, 6),
    MilvusIndex.IVF_RABITQ_FASTSCAN: (3, 0),
}
"""Indexes that Milvus Lite does not have, and the first server that has them."""

_FLOAT16_SINCE = (2, 4)

_GRAPHS = (MilvusIndex.HNSW, MilvusIndex.HNSW_SQ)
_MOST_LISTS, _ROWS_PER_LIST = 65_536, 39  # fewer rows make poor centroids, faiss says
_LEAST_PROBES, _LEAST_EF = 4, 64
_LARGEST_EF = 4096
_GRAPH: Build = {"M": 16, "efConstruction": 200}
_REFINED: dict[str, Build] = {
    MilvusIndex.IVF_RABITQ: {"refine": True, "refine_type": "FP16"},
    MilvusIndex.IVF_RABITQ_FASTSCAN: {"refine": True, "refine_type": "FP32"},  # it has no other
}
_LEAST_REFINED, _PROBES_PER_REFINED = 4, 4
_IN_REACH = 4  # times the rows that are asked for, in the lists that are read


def index_of(name: str) -> MilvusIndex:
    """The index that a name means, in capitals or not.

    Raises:
        ValueError: for another name.
    """
    try:
        return MilvusIndex(name.upper())
    except ValueError:
        known = [str(kind).lower() for kind in MilvusIndex]
        raise ValueError(f"Expected `index` to be one of {known}, but got {name!r}.") from None


def check_offered(kind: str, version: str, place: str) -> None:
    """Refuses an index that a server does not have, before anything is made there.

    Args:
        kind: of a `MilvusIndex`.
        version: what the server says it is, such as `v2.6.1` or `milvus_lite-3.2.2`.
        place: address of the server, for the message.

    Raises:
        ValueError: naming what Milvus Lite has, or the version that it takes.
    """
    since = _OF_SERVERS.get(MilvusIndex(kind))
    if since is None:
        return
    name = kind.lower()
    if LITE in version:
        offered = [str(one).lower() for one in MilvusIndex if one not in _OF_SERVERS]
        raise ValueError(
            f"Expected `index` to be one of {offered} for Milvus Lite ({place}), but got {name!r}; "
            f"a server of Milvus {since[0]}.{since[1]} or later has it."
        )
    if _is_before(version, since):
        raise ValueError(
            f"Expected Milvus {since[0]}.{since[1]} or later for index={name!r}, but {place} is "
            f"{version}; take another index, or a newer server."
        )


def vector_dtype(dtype: str, metric: str, version: str) -> str:
    """What the vectors of new rows are kept in by a server.

    Distances (`l2`) are told apart by the last bits of a float16 product: hardly a query would be
    certain of its answer.

    Args:
        dtype: of the stored rows.
        metric: `cosine` or `l2`.
        version: what the server says it is; Milvus Lite has float32 alone.
    """
    has_float16 = LITE not in version and not _is_before(version, _FLOAT16_SINCE)
    return FLOAT16 if dtype == FLOAT16 and metric == "cosine" and has_float16 else FLOAT32


def _is_before(version: str, since: tuple[int, int]) -> bool:
    """Whether a version is older; one that names no number is not known to be."""
    found = re.search(r"(\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) < since


def build_parameters(kind: str, count: int, width: int) -> Build:
    """What an index is built with.

    Args:
        kind: of a `MilvusIndex`.
        count: rows that it shall hold.
        width: of the vectors.
    """
    if kind in _GRAPHS:
        return _GRAPH | ({"sq_type": "SQ8"} if kind == MilvusIndex.HNSW_SQ else {})
    if not _has_lists(kind):
        return {}
    parts: Build = {"sub_dim": 2 - width % 2} if kind == MilvusIndex.SCANN else {}  # divides it
    return {"nlist": _lists(count)} | parts | _REFINED.get(kind, {})


def tuned(kind: str, effort: int) -> dict[str, int]:
    """What an effort means for an index, whatever is asked for.

    Args:
        kind: of a `MilvusIndex`.
        effort: see `set_effort`.
    """
    if kind in _GRAPHS:
        return {"ef": effort}
    if not _has_lists(kind):
        return {}
    refined = {"refine_k": _refined(effort)} if kind in _REFINED else {}
    return {"nprobe": effort} | refined


def search_parameters(kind: str, effort: int, wanted: int, count: int) -> dict[str, int]:
    """What an index is searched with.

    Args:
        kind: of a `MilvusIndex`.
        effort: see `set_effort`.
        wanted: how many rows are asked for; a graph must keep as many in mind, and the lists that
            are read must hold several times as many.
        count: rows in the index.
    """
    if kind in _GRAPHS:
        return {"ef": max(effort, wanted)}
    if not _has_lists(kind):
        return {}
    lists = _lists(count)
    effort = max(effort, min(lists, -(-_IN_REACH * wanted * lists // max(1, count))))
    compared = {"reorder_k": wanted * _refined(effort)} if kind == MilvusIndex.SCANN else {}
    return tuned(kind, effort) | compared


def set_effort(
    kind: str,
    count: int,
    measure: Callable[[int], tuple[float, str]],
    min_recall: float = MIN_RECALL,
) -> int:
    """The smallest effort tried whose recall is enough; it is doubled until then.

    Args:
        kind: of a `MilvusIndex`, not `FLAT`.
        count: rows in the index.
        measure: from an effort to the recall, and what it was measured on.
        min_recall: in (0, 1].

    Returns:
        The effort: lists that are probed, or rows that a graph keeps in mind; 0 for an index
        without.

    Raises:
        ValueError: if no effort is enough, with what was reached.
    """
    least, most = 0, 0
    if kind in _GRAPHS:
        least, most = _LEAST_EF, _LARGEST_EF
    elif _has_lists(kind):
        least, most = _LEAST_PROBES, _lists(count)
    effort = min(least, most)
    while True:
        recall, measured_on = measure(effort)
        logger.info("%s, effort %d: recall %.4f on %s", kind, effort, recall, measured_on)
        if recall >= min_recall:
            return effort
        if effort >= most:
            raise ValueError(
                f"Expected recall {min_recall:g} of the index {kind} in Milvus, but it reached "
                f"{recall:.4f} on {measured_on}; load again with a smaller `min_recall`, or under "
                "another name with index='flat'."
            )
        effort = min(2 * effort, most)


def _has_lists(kind: str) -> bool:
    return kind.startswith("IVF_") or kind == MilvusIndex.SCANN


def _lists(count: int) -> int:
    return max(1, min(_MOST_LISTS, round(4 * math.sqrt(count)), count // _ROWS_PER_LIST))


def _refined(effort: int) -> int:
    """How many times the rows that are asked for are compared once more by the server."""
    return max(_LEAST_REFINED, effort // _PROBES_PER_REFINED)
