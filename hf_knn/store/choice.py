"""Which index `auto` takes for a number of rows, and whether it was worth it."""

import logging
import re

import numpy as np

from ..core.manifest import IndexInfo
from .faiss import empty_index, has_faiss, require_faiss
from .kinds import AUTO, CODES, CODES_ALONE, FLAT, FLOAT16, LARGEST_EF, LATENCY, has_codes
from .recall import aimed_recall

logger = logging.getLogger(__name__)

LARGEST_EXACT = 20_000
"""`auto` searches exactly up to this many rows.

At 20,000 x 384, lists answer one query in half the time and batches in 0.4 to 0.9 of it; they take
four seconds of a processor to build and measure, an exact search less than one.
"""

LARGEST_SHARE, LARGEST_CODED_SHARE = 0.2, 0.5
"""Of the lists that a search looks into, without codes and with; beyond it an exact search of many
queries takes no longer: 10 ns a row in int8, 70 for each float16 row of a list."""

MANY_READ = 10_000
"""Where a search reads so many float16 rows, comparing codes first takes half the time or less.

Without clusters, recall 0.99, one thread: of 50,000 rows 6,000 are read, and codes take 0.6 ms
instead of 0.7; of 250,000 23,000, and codes take 0.9 ms instead of 3.7.
"""

_LINKS = 16
_CODE_BYTES = 24  # of a row besides its bits: its id, and what its length was


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


def choose_index(
    requested: str, count: int, width: int, max_memory: int | None, *, fall_back: bool = False
) -> IndexInfo:
    """The index for a number of rows.

    Args:
        requested: `auto`, `auto:latency`, `flat` or a faiss factory string.
        count: N.
        width: D, values per row.
        max_memory: bytes that the index may take; None for no limit.
        fall_back: search exactly, with a message, where the rows are too few for the index.

    Raises:
        ImportError: for a faiss index without faiss.
        ValueError: for a string that faiss does not understand, or too few rows for it.
    """
    is_automatic = requested in (AUTO, LATENCY)
    if requested == FLAT or (is_automatic and (count <= LARGEST_EXACT or not has_faiss())):
        return IndexInfo(requested, FLAT)
    if not is_automatic:
        require_faiss(f"index={requested!r}")
        spec = re.sub(r"(?<!\d)0+(?=\d)", "", requested)
        try:
            empty_index(spec, width, count, is_l2=False)
        except ValueError as error:
            if not fall_back:
                raise
            logger.warning("%s They are searched exactly.", error)
            spec = FLAT
        return IndexInfo(requested, spec)
    lists = 2 ** round(np.log2(2 * count**0.5))
    full = count * (2 * width + 8) + lists * 4 * width
    if requested == LATENCY:
        full += count * 4 * 2 * _LINKS
    if max_memory is not None and full > max_memory:
        if count * (width + 8) + lists * 4 * width <= max_memory:
            return IndexInfo(requested, f"IVF{lists},SQ8")
        # codes are compared so fast that half of the lists, found in half of the time, are enough
        return IndexInfo(requested, f"IVF{lists // 2},{CODES_ALONE}")
    kind = f"HNSW{_LINKS}_{FLOAT16}" if requested == LATENCY else f"IVF{lists},{FLOAT16}"
    return IndexInfo(requested, kind)


def with_codes(info: IndexInfo, count: int, width: int, max_memory: int | None) -> IndexInfo | None:
    """The same lists with codes, where those pay; None where they do not.

    Args:
        info: an index that was measured.
        count: N.
        width: D, values per row.
        max_memory: bytes that the index may take; None for no limit.
    """
    lists = re.fullmatch(rf"IVF(\d+),{FLOAT16}", info.spec)
    if lists is None or info.requested != AUTO:
        return None
    number, nprobe = int(lists[1]), info.parameters["nprobe"]
    full = count * (2 * width + 8 + width // 8 + _CODE_BYTES) + number * 4 * width
    if not MANY_READ / count <= nprobe / number <= LARGEST_CODED_SHARE:
        return None
    if max_memory is not None and full > max_memory:
        return None
    return IndexInfo(AUTO, f"IVF{number},{CODES}", {"nprobe": nprobe})


def most_that_pays(info: IndexInfo, largest: dict[str, int]) -> dict[str, int]:
    """How far the parameters of an index are raised.

    Args:
        info: which index.
        largest: the largest sensible value of each parameter.
    """
    if info.requested != AUTO or not has_codes(info.spec):
        return largest
    return largest | {"nprobe": int(LARGEST_CODED_SHARE * largest["nprobe"])}


def pays(info: IndexInfo, min_recall: float) -> bool:
    """Whether an index that `auto` took is worth what it may miss, as it was measured.

    Args:
        info: with its parameters and recall.
        min_recall: that it was to reach.
    """
    recall = aimed_recall(info)
    if recall is None or info.requested not in (AUTO, LATENCY):
        return True
    lists = re.search(r"IVF(\d+)", info.spec)
    share = LARGEST_CODED_SHARE if info.spec.endswith(CODES) else LARGEST_SHARE
    most = share * int(lists[1]) if lists else LARGEST_EF
    effort = info.parameters.get("nprobe" if lists else "efSearch", 1)
    return recall >= min_recall and effort <= most


def was_refused(info: IndexInfo, before: int, count: int) -> bool:
    """Whether `auto` knows of about as many rows that nothing pays but an exact search.

    Args:
        info: of an exact index.
        before: rows that it was chosen for.
        count: rows that there are now; after they have doubled it is tried again.
    """
    is_large = info.requested in (AUTO, LATENCY) and before > LARGEST_EXACT
    return is_large and before.bit_length() == count.bit_length()
