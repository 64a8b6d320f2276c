"""Which index Milvus searches a collection with: exact, or approximate with a recall that is known.

An approximate one is set to a recall that was measured on a sample of the rows, each without
itself, against an exact search of all rows, before the collection is said to be whole.
"""

import logging
import math
from collections.abc import Callable
from enum import StrEnum
from typing import Any

import numpy as np

from .first_pass import Ints
from .indexing import MIN_RECALL, RECALL_SAMPLE
from .search import recall_of

logger = logging.getLogger(__name__)

RECALL_K = 20


class MilvusIndex(StrEnum):
    """An index of Milvus, by its name there."""

    FLAT = "FLAT"
    IVF_FLAT = "IVF_FLAT"
    HNSW = "HNSW"
    AUTOINDEX = "AUTOINDEX"


_EFFORT = {MilvusIndex.IVF_FLAT: "nprobe", MilvusIndex.HNSW: "ef"}
_LEAST_EFFORT = {MilvusIndex.IVF_FLAT: 4, MilvusIndex.HNSW: 64}
_LARGEST_EF = 4096
_HNSW = {"M": 16, "efConstruction": 200}


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


def sample_rows(count: int) -> Ints:
    """[S] row numbers that recall is measured on."""
    return np.sort(np.random.default_rng(0).permutation(count)[:RECALL_SAMPLE])


def set_effort(
    kind: str, count: int, ask: Callable[[int], Ints], wanted: Ints, min_recall: float = MIN_RECALL
) -> tuple[int, float]:
    """The smallest effort tried whose recall is enough; it is doubled until then.

    Args:
        kind: of a `MilvusIndex`, not `FLAT`.
        count: rows in the index.
        ask: from an effort to the ids that are found, [S, k].
        wanted: [S, k] the ids of the nearest rows.
        min_recall: in (0, 1].

    Returns:
        The effort (0 for an index without), and its recall.

    Raises:
        ValueError: if no effort is enough, with what was reached.
    """
    largest = {MilvusIndex.IVF_FLAT: _lists(count), MilvusIndex.HNSW: _LARGEST_EF}
    most = largest.get(MilvusIndex(kind), 0)
    effort = min(_LEAST_EFFORT.get(MilvusIndex(kind), 0), most)
    while True:
        recall = recall_of(ask(effort), wanted)
        logger.info("%s, effort %d: recall %.4f of %d rows", kind, effort, recall, len(wanted))
        if recall >= min_recall:
            return effort, recall
        if effort >= most:
            raise ValueError(
                f"Expected recall {min_recall:g} of the index {kind} in Milvus, but it reached "
                f"{recall:.4f}; load again with a smaller `min_recall`, or under another name with "
                "index='flat'."
            )
        effort = min(2 * effort, most)


def check_parts(kind: Any, effort: Any, recall: Any) -> str:
    """What is wrong with a record's facts about its index; empty if nothing."""
    if kind not in list(MilvusIndex):
        return f"index among {[str(one) for one in MilvusIndex]}"
    if not isinstance(effort, int) or isinstance(effort, bool) or effort < 0:
        return "effort a whole number >= 0"
    if recall is not None and not (isinstance(recall, float) and 0 <= recall <= 1):
        return "recall between 0 and 1"
    return ""


def _lists(count: int) -> int:
    return max(1, min(65_536, round(4 * math.sqrt(count)), count))
