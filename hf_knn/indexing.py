"""Which index a datastore gets, how it is built, and how often it misses."""

import dataclasses
import functools
import logging
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .faiss_index import (
    FAISS_HINT,
    FaissApproximate,
    FaissFlat,
    empty_index,
    has_faiss,
    require_faiss,
)
from .first_pass import (
    BFloat16FirstPass,
    FirstPass,
    Ints,
    Singles,
    TorchFirstPass,
    has_fast_bfloat16,
)
from .manifest import IndexInfo
from .search import RowSpace, Searcher, measure_recall

logger = logging.getLogger(__name__)

AUTO, FLAT = "auto", "flat"
LARGEST_EXACT = 200_000
"""`auto` searches exactly up to this many rows."""

MIN_RECALL = 0.99
RECALL_K = 20
RECALL_SAMPLE = 256

_SMALLEST_BFLOAT16 = 20_000
_REBUILDABLE = re.compile(r"IVF\d+,(Flat|SQ8)")


@dataclass(frozen=True)
class StoredLists:
    """What an inverted-file index is rebuilt from.

    Attributes:
        centroids: [n, D'] float32.
        lists: [N] int64, the list of each row.
    """

    centroids: Singles
    lists: Ints


def parse_memory(text: str | int) -> int:
    """Bytes from a number or a text like `2GB`, `512MB` or `1.5 GiB`.

    Args:
        text: the limit.

    Raises:
        ValueError: for anything else.
    """
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B|)\s*", str(text).upper())
    if found is None or float(found[1]) == 0:
        raise ValueError(f"Expected `max_memory` to be like '2GB', but got {text!r}.")
    return int(float(found[1]) * units[found[2]])


def choose_index(requested: str, count: int, width: int, max_memory: int | None) -> IndexInfo:
    """The index for a number of rows.

    Args:
        requested: `auto`, `flat` or a faiss factory string.
        count: N.
        width: D', values per row.
        max_memory: bytes that the index may take; None for no limit.

    Raises:
        ImportError: for a faiss index without faiss.
        ValueError: for a string that faiss does not understand, or too few rows for it.
    """
    if requested == FLAT or (requested == AUTO and (count <= LARGEST_EXACT or not has_faiss())):
        return IndexInfo(requested, FLAT)
    if requested != AUTO:
        require_faiss(f"index={requested!r}")
        empty_index(requested, width, count)
        return IndexInfo(requested, requested)
    lists = 2 ** round(np.log2(2 * count**0.5))
    full = count * (4 * width + 8) + lists * 4 * width
    codec = "Flat" if max_memory is None or full <= max_memory else "SQ8"
    return IndexInfo(requested, f"IVF{lists},{codec}")


def is_rebuildable(spec: str) -> bool:
    """Whether an index is stored as centroids and lists."""
    return _REBUILDABLE.fullmatch(spec) is not None


def build_searcher(
    features: NDArray,
    ids: Ints,
    space: RowSpace,
    info: IndexInfo,
    stored: StoredLists | None,
    min_recall: float,
) -> tuple[Searcher, IndexInfo, StoredLists | None]:
    """Builds the index, and measures it where it is approximate.

    Args:
        features: [N, D] stored raw features.
        ids: [N] int64.
        space: how rows are compared.
        info: which index; with parameters if it was measured before.
        stored: centroids and lists to rebuild from, if there are any.
        min_recall: nprobe or efSearch is raised until this recall at 20 is measured.

    Returns:
        The searcher, what was measured, and the lists to store (None for other kinds).
    """
    if info.spec == FLAT:
        return Searcher(features, ids, space, _exact_first_pass(len(ids))), info, None
    if not has_faiss():
        logger.warning(
            "faiss is not installed: %s is searched exactly instead; %s.", info.spec, FAISS_HINT
        )
        return Searcher(features, ids, space, _exact_first_pass(len(ids))), info, stored
    kept: list[StoredLists | None] = [stored]

    def approximate(rows: Singles) -> FirstPass:
        if stored is not None:
            index = FaissApproximate.from_lists(info.spec, rows, stored.centroids, stored.lists)
        else:
            index = FaissApproximate.from_rows(info.spec, rows)
            centroids = index.centroids() if is_rebuildable(info.spec) else None
            if centroids is not None:
                kept[0] = StoredLists(centroids, index.lists_of(rows))
        index.set_parameters(info.parameters)
        return index

    searcher = Searcher(features, ids, space, approximate)
    if info.recall is None:
        info = _tune(searcher, features, ids, space, info, min_recall)
    return searcher, info, kept[0]


def _exact_first_pass(count: int) -> type[FirstPass]:
    if count >= _SMALLEST_BFLOAT16 and has_fast_bfloat16():
        return BFloat16FirstPass
    if has_faiss():
        return FaissFlat
    _say_once_that_faiss_is_missing()
    return TorchFirstPass


@functools.cache
def _say_once_that_faiss_is_missing() -> None:
    logger.warning("faiss is not installed, searching with torch; %s.", FAISS_HINT)


def _tune(
    searcher: Searcher,
    features: NDArray,
    ids: Ints,
    space: RowSpace,
    info: IndexInfo,
    min_recall: float,
) -> IndexInfo:
    """Raises nprobe or efSearch until the recall on a sample of rows is reached."""
    sample = np.random.default_rng(0).permutation(len(ids))[:RECALL_SAMPLE]
    queries, own = np.asarray(features[sample]), ids[sample]
    exact = Searcher(features, ids, space, _exact_first_pass(len(ids)))
    k = min(RECALL_K, len(ids) - 1)
    index = searcher.first_pass
    assert isinstance(index, FaissApproximate)
    tunable = index.tunable()
    recall = measure_recall(searcher, exact, queries, k, own)
    if tunable is not None:
        name, largest = tunable
        value = max(1, index.parameters.get(name, 1))
        index.set_parameters({name: value})
        recall = measure_recall(searcher, exact, queries, k, own)
        while recall < min_recall and value < largest:
            value = min(largest, 2 * value)
            index.set_parameters({name: value})
            recall = measure_recall(searcher, exact, queries, k, own)
    settings = ", ".join(f"{name} {value}" for name, value in index.parameters.items())
    logger.info(
        "index %s: %s (%s), recall@%d %.4f measured on %d rows",
        info.requested, info.spec, settings or "no parameters", k, recall, len(sample),
    )  # fmt: skip
    if recall < min_recall:
        logger.warning(
            "index %s reaches recall@%d %.4f, below %.4f; use index='flat' for exact answers.",
            info.spec, k, recall, min_recall,
        )  # fmt: skip
    return dataclasses.replace(info, parameters=dict(index.parameters), recall=recall)
