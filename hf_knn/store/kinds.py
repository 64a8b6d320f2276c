"""Which index a file may ask for: whoever wrote it decides what is built at the first search.

A factory string of faiss can take hours, all memory or the process. Only kinds whose cost follows
from the rows that are there are built unasked.
"""

import logging
import re
from math import isqrt

from ..core.manifest import MANIFEST_NAME, DatastoreError, IndexInfo

logger = logging.getLogger(__name__)

AUTO, LATENCY, FLAT = "auto", "auto:latency", "flat"
"""The second takes a graph: slow to build, quick for one query at a time."""

LARGEST_EF = 4096
"""Rows of a graph that a search keeps in mind at most."""

LARGEST_K_FACTOR = 64
"""Times as many rows as are wanted are compared behind codes at most."""

FLOAT16, CODES, CODES_ALONE = "SQfp16", "RaBitQfs,Refine(SQfp16)", "RaBitQfs"
"""What lists hold: float16 rows; or a bit for each value, and such rows for what these propose.

With codes alone, what these propose is compared with the stored rows, which may lie on disk.
"""

_HELD = f"(?:Flat|SQ8|SQfp16|{re.escape(CODES)}|{CODES_ALONE})"
_REBUILDABLE = re.compile(rf"IVF\d+,{_HELD}")
_LISTS = re.compile(rf"IVF0*([1-9]\d{{0,8}}),{_HELD}")
_GRAPH = re.compile(r"HNSW(?:0*([1-9]\d{0,2}))?(?:,Flat|_SQfp16)?")
_FEWEST_LISTS, _LISTS_PER_ROOT = 1024, 16  # as many as faiss advises at most, per root of the rows
_MOST_LINKS = 64
_FLOAT16_ROUNDING = 2.0**-11  # of a row of length 1 at most, with a query of length 1


def is_rebuildable(spec: str) -> bool:
    """Whether an index is stored as centroids and lists."""
    return _REBUILDABLE.fullmatch(spec) is not None


def has_codes(spec: str) -> bool:
    """Whether an index compares codes, and then some of the rows."""
    return spec.endswith((CODES, CODES_ALONE))


def rounding_of(spec: str) -> float | None:
    """How far the inner product of a row is off by how it is held; None for more than rounding."""
    is_coarse = spec.endswith(("SQ8", CODES_ALONE))
    if is_coarse or not (_LISTS.fullmatch(spec) or _GRAPH.fullmatch(spec)):
        return None
    return _FLOAT16_ROUNDING if FLOAT16 in spec else 0.0


def is_modest(name: str, count: int) -> bool:
    """Whether an index costs what the rows are worth, so that it is built for anybody's file.

    Args:
        name: `auto`, `auto:latency`, `flat` or a factory string.
        count: rows.
    """
    if name in (AUTO, LATENCY, FLAT):
        return True
    if lists := _LISTS.fullmatch(name):
        return int(lists[1]) <= max(_FEWEST_LISTS, _LISTS_PER_ROOT * isqrt(count))
    graph = _GRAPH.fullmatch(name)
    return graph is not None and 2 <= int(graph[1] or 32) <= _MOST_LINKS


def allowed(info: IndexInfo, count: int, is_trusted: bool) -> IndexInfo:
    """What of the index that a file names is built.

    Args:
        info: of the file.
        count: rows of the file.
        is_trusted: whether the caller said that the file is one of their own.

    Returns:
        The same; an exact one, with a warning, in place of a kind that nobody asked for.

    Raises:
        DatastoreError: for parameters that the index does not have, or out of their range.
    """
    if not is_trusted and not (is_modest(info.requested, count) and is_modest(info.spec, count)):
        name = info.requested if is_modest(info.spec, count) else info.spec
        logger.warning(
            "%s names the index %.80r, which is not built for a file of others (flat, "
            "IVF<n> with Flat, SQ8, SQfp16, %s or %s, and HNSW<m>, of usual size are): its rows "
            "are searched exactly. If the file is your own, pass trust_faiss_index=True.",
            MANIFEST_NAME, name, CODES_ALONE, CODES,
        )  # fmt: skip
        return IndexInfo(FLAT, FLAT)
    lists = re.search(r"IVF(\d{1,9})", info.spec)
    ranges = {"nprobe": int(lists[1])} if lists else {}
    ranges |= {"efSearch": LARGEST_EF} if "HNSW" in info.spec else {}
    ranges |= {"k_factor": LARGEST_K_FACTOR} if has_codes(info.spec) else {}
    for name, value in info.parameters.items():
        if not 1 <= value <= ranges.get(name, 0):
            wanted = " and ".join(f"{name} in [1, {most}]" for name, most in ranges.items())
            raise DatastoreError(
                f"Expected `index.parameters` in {MANIFEST_NAME} to be {wanted or 'none'} for the "
                f"index {info.spec}, but got {name[:40]!r}: {value}; save the datastore again."
            )
    return info
