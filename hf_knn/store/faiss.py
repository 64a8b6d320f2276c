"""faiss: the only file that imports it; exhaustive search, factory strings, and files.

The indexes that may miss rows are in `approximate.py`.
"""

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..core.lazy import Lock
from ..core.manifest import DatastoreError
from ..core.search import Floats, Ints, Singles, float32_rounding
from .advice import install
from .kept import IndexFile, TrustedIndex


def limits(scores: Singles, rounding: float) -> Floats:
    """What rows can score at most: of the last that was not left out, also what those can."""
    return scores.astype(np.float64) + rounding


def how_to_get_faiss() -> str:
    """The commands that install it."""
    return f"run `{install('cpu')}`, or with [gpu] instead where there is an NVIDIA GPU"


_LIMITING = Lock()  # of the limits of faiss, which hold for the whole process

_LARGEST_NUMBER = 4096
"""Numbers in a factory string other than the lists of an IVF: links, sub-vectors, widths."""


@functools.cache
def library() -> Any:
    """faiss, or None; imported by the first search, so that starting does not wait for it."""
    try:
        import faiss
    except ImportError:  # a missing CUDA runtime of faiss-gpu is a RuntimeError, and stays one
        return None
    return faiss


def has_faiss() -> bool:
    """Whether faiss can be used for search."""
    return library() is not None


def made_by() -> str:
    """The library and its version."""
    return f"faiss {library().__version__}"


def require_faiss(why: str) -> None:
    """Raises a clear error without faiss.

    Args:
        why: what needs it.

    Raises:
        ImportError: naming the extra to install.
    """
    if not has_faiss():
        raise ImportError(f"faiss is not installed, and {why} needs it; {how_to_get_faiss()}.")


class FaissFlat:
    """Exhaustive search with faiss.

    Args:
        rows: [N, D'] float32.
        with_ids: a flat index with ids, as `write_flat` writes, whose rows come first.
    """

    extra = 12

    def __init__(self, rows: Singles, with_ids: Any = None) -> None:
        self.owner = with_ids  # kept: it owns the index inside
        self.index: Any
        if with_ids is None:
            self.index = library().IndexFlatIP(rows.shape[1])
        else:
            self.index = library().downcast_index(with_ids.index)
        self.index.add(rows)
        self.rounding = float32_rounding(rows.shape[1])

    def add(self, rows: Singles) -> None:
        """See `GrowingFirstPass.add`."""
        self.index.add(rows)

    def candidates(self, queries: Singles, count: int) -> tuple[Ints, Floats]:
        """See `FirstPass.candidates`."""
        scores, positions = self.index.search(queries, count)
        return positions, limits(scores, self.rounding)


def empty_index(spec: str, width: int, count: int, is_l2: bool) -> Any:
    """The index that a factory string names, untrained and empty.

    Args:
        spec: `IVF4096,Flat`, `HNSW32`, ….
        width: D.
        count: rows that it shall hold.
        is_l2: compare by distance instead of inner product.

    Raises:
        ValueError: for a string that faiss does not understand, numbers that it would not survive,
            or too few rows to train on.
    """
    if any(int(lists) > count for lists in re.findall(r"IVF(\d+)", spec)):
        raise ValueError(
            f"Expected at least as many rows as lists for `index` {spec!r}, one per list, "
            f"but got {count} rows; use index='flat'."
        )
    others, largest = re.sub(r"IVF[1-9]\d*", "", spec), max(_LARGEST_NUMBER, width)
    # native code allocates, divides by or loops over these numbers before it looks at them
    if re.search(r"HNSW1(?!\d)", spec) or any(
        not 1 <= int(number) <= largest for number in re.findall(r"\d+", others)
    ):
        raise ValueError(
            f"Expected numbers up to {largest} and above 0 in `index`, at least 2 for HNSW, "
            f"but got {spec!r}."
        )
    try:
        index = library().index_factory(width, spec, metric_of(is_l2))
    except RuntimeError as error:
        raise ValueError(
            f"Expected `index` to be auto, flat or a faiss factory string, but got {spec!r}: "
            f"{str(error).splitlines()[-1]}"
        ) from error
    return index


def metric_of(is_l2: bool) -> int:
    """The number of a metric in faiss."""
    return library().METRIC_L2 if is_l2 else library().METRIC_INNER_PRODUCT


def write_flat(path: Path, rows: Singles, ids: Ints, is_l2: bool) -> None:
    """Writes a flat index with ids, for users of faiss.

    Args:
        path: where to.
        rows: [N, D] normalised float32.
        ids: [N] int64.
        is_l2: squared distances instead of inner products.
    """
    width = rows.shape[1]
    flat = library().IndexFlatL2(width) if is_l2 else library().IndexFlatIP(width)
    index = library().IndexIDMap2(flat)
    index.add_with_ids(rows, ids)
    write_index(path, index)


def read_flat(trusted: TrustedIndex, ids: Ints, width: int) -> FaissFlat:
    """Reads what `write_flat` wrote for inner products: for trusted files only.

    Args:
        trusted: what `write_flat` wrote.
        ids: [N] int64, which it must hold in this order.
        width: D it must have.

    Raises:
        DatastoreError: for a file that faiss cannot read within the limits, or other rows.
    """
    index = read_index(trusted, len(ids))
    wanted = library().IndexIDMap2(library().IndexFlatIP(width))
    check_same_kind(trusted.record.name, index, wanted, len(ids))
    if not np.array_equal(library().vector_to_array(index.id_map), ids):
        raise DatastoreError(
            f"Expected {trusted.record.name} to hold the ids of the rows; save it again."
        )
    return FaissFlat(np.empty((0, width), np.float32), index)


def write_index(path: Path, index: Any) -> None:
    """Writes an index through a file of Python's, whose errors say that the disk is full."""
    with path.open("wb") as file:
        writer = library().PyCallbackIOWriter(file.write)
        library().write_index(index, writer)
        del writer  # what it still holds goes to the file now


def read_index(source: IndexFile, count: int) -> Any:
    """Reads a serialized index, of which every byte was hashed.

    Args:
        source: the file.
        count: rows that it shall hold.

    Raises:
        DatastoreError: if faiss cannot read it within the limits.
    """
    with _deserialization_limits(source.record.size, count):
        try:
            return source.read(library())
        except RuntimeError as error:
            reason = str(error).splitlines()[-1]
            raise DatastoreError(
                f"Expected {source.record.name} to be an index: {reason}"
            ) from error


@contextmanager
def _deserialization_limits(size: int, count: int) -> Iterator[None]:
    """Lets faiss allocate what a file of that size, and that many rows, can need."""
    with _LIMITING:
        byte_limit = library().get_deserialization_vector_byte_limit()
        loop_limit = library().get_deserialization_loop_limit()
        library().set_deserialization_vector_byte_limit(size)
        library().set_deserialization_loop_limit(max(count, 2**16))
        try:
            yield
        finally:
            library().set_deserialization_vector_byte_limit(byte_limit)
            library().set_deserialization_loop_limit(loop_limit)


def check_same_kind(name: str, index: Any, wanted: Any, count: int) -> None:
    """Refuses an index, or one inside it, of another class, width, metric or number of rows."""
    found: Any = library().downcast_index(index)
    asked: Any = library().downcast_index(wanted)
    facts = {
        "class": (_class_of(found), _class_of(asked)),
        "d": (found.d, asked.d),
        "metric": (found.metric_type, asked.metric_type),
        "ntotal": (found.ntotal, count),
        "is_trained": (found.is_trained, True),
        "code_size": (getattr(found, "code_size", 0), getattr(asked, "code_size", 0)),
        "nlist": (getattr(found, "nlist", 0), getattr(asked, "nlist", 0)),
    }
    for fact, (mine, theirs) in facts.items():
        if mine != theirs:
            raise DatastoreError(f"Expected {name} to have {fact} {theirs}, but got {mine}.")
    if isinstance(found, library().IndexIVF):
        check_same_kind(name, found.quantizer, asked.quantizer, found.nlist)
    elif isinstance(found, library().IndexHNSW):
        check_same_kind(name, found.storage, asked.storage, count)
    elif hasattr(asked, "refine_index"):
        check_same_kind(name, found.base_index, asked.base_index, count)
        check_same_kind(name, found.refine_index, asked.refine_index, count)
        _check_ids(name, found.base_index, count)
    elif hasattr(asked, "index"):  # IDMap, PreTransform
        check_same_kind(name, found.index, asked.index, count)


def _check_ids(name: str, index: Any, count: int) -> None:
    """Refuses lists that name other rows, which native code would look for in memory."""
    inverted = inverted_lists(index)
    for number in range(0 if inverted is None else inverted.nlist):
        size = inverted.invlists.list_size(number)
        ids = library().rev_swig_ptr(inverted.invlists.get_ids(number), size)
        if size and (ids.min() < 0 or ids.max() >= count):
            raise DatastoreError(f"Expected {name} to have ids in [0, {count}); save it again.")


def _class_of(index: Any) -> str:
    """Flat ones come back from a file as the class of their metric, which is compared anyway."""
    return "IndexFlat" if type(index).__name__.startswith("IndexFlat") else type(index).__name__


def inverted_lists(index: Any) -> Any:
    """The inverted file inside an index, or None."""
    try:
        return library().extract_index_ivf(index)
    except RuntimeError:  # not an inverted file
        return None
