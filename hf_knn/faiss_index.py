"""Search with faiss. The only file that imports it."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .first_pass import Ints, Limits, Singles, float32_rounding, limits

try:
    import faiss
except ImportError:  # a missing CUDA runtime of faiss-gpu is a RuntimeError, and stays one
    faiss = None  # type: ignore[assignment]

FAISS_HINT = "run `pip install hf-knn[cpu]`, or `hf-knn[gpu]` where there is an NVIDIA GPU"

_TRAINING_ROWS_PER_LIST = 64
_KMEANS_ROUNDS = 10
_ADD_ROWS = 131_072
_SEARCH_PARAMETERS = ("nprobe", "efSearch")


def has_faiss() -> bool:
    """Whether faiss can be used for search."""
    return faiss is not None


def require_faiss(why: str) -> None:
    """Raises a clear error without faiss.

    Args:
        why: what needs it.

    Raises:
        ImportError: naming the extra to install.
    """
    if faiss is None:
        raise ImportError(f"faiss is not installed, and {why} needs it; {FAISS_HINT}.")


class FaissFlat:
    """Exhaustive search with faiss.

    Args:
        rows: [N, D'] float32.
    """

    extra = 12

    def __init__(self, rows: Singles) -> None:
        self.index = faiss.IndexFlatIP(rows.shape[1])
        self.index.add(rows)
        self.rounding = float32_rounding(rows.shape[1])

    def add(self, rows: Singles) -> None:
        """See `FirstPass.add`."""
        self.index.add(rows)

    def candidates(self, queries: Singles, count: int) -> tuple[Ints, Limits]:
        """See `FirstPass.candidates`."""
        scores, positions = self.index.search(queries, count)
        return positions, limits(scores[:, -1], self.rounding)


class FaissApproximate:
    """Any other faiss index: it proposes, and how often it misses is measured.

    Args:
        index: a trained faiss index that holds the rows.
        parameters: search parameters (`nprobe`, `efSearch`).
    """

    extra = 44

    def __init__(self, index: Any, parameters: Mapping[str, int]) -> None:
        self.index = index
        self.parameters: dict[str, int] = {}
        self.set_parameters(parameters)

    @classmethod
    def from_rows(cls, spec: str, rows: Singles) -> "FaissApproximate":
        """Trains and fills the index that a factory string names.

        Args:
            spec: `IVF4096,Flat`, `HNSW32`, ….
            rows: [N, D'] float32.

        Raises:
            ValueError: for a string that faiss does not understand, or too few rows to train on.
        """
        index = empty_index(spec, rows.shape[1], len(rows))
        lists = _inverted_lists(index)
        if lists is not None:
            lists.cp.niter = _KMEANS_ROUNDS
            lists.cp.max_points_per_centroid = _TRAINING_ROWS_PER_LIST
            lists.cp.seed = 1234
        if not index.is_trained:
            index.train(rows)
        approximate = cls(index, {})
        approximate.add(rows)
        return approximate

    @classmethod
    def from_lists(
        cls, spec: str, rows: Singles, centroids: Singles, lists: Ints
    ) -> "FaissApproximate":
        """Rebuilds an inverted-file index from its stored centroids and lists, without k-means.

        Args:
            spec: `IVF<n>,Flat` or `IVF<n>,SQ8`.
            rows: [N, D'] float32.
            centroids: [n, D'] float32.
            lists: [N] int64, the list of each row.
        """
        index = faiss.index_factory(rows.shape[1], spec, faiss.METRIC_INNER_PRODUCT)
        inverted = _inverted_lists(index)
        assert inverted is not None
        inverted.quantizer.reset()
        inverted.quantizer.add(np.ascontiguousarray(centroids))
        if not spec.endswith("Flat"):
            # the codec's ranges come from the same rows, so they come out the same
            inverted.train(rows)
        inverted.is_trained = True
        ids = np.arange(len(rows), dtype=np.int64)
        for start in range(0, len(rows), _ADD_ROWS):
            part = slice(start, start + _ADD_ROWS)
            block, wanted = np.ascontiguousarray(rows[part]), np.ascontiguousarray(lists[part])
            inverted.add_core(
                len(block), faiss.swig_ptr(block), faiss.swig_ptr(ids[part]), faiss.swig_ptr(wanted)
            )
        return cls(index, {})

    def add(self, rows: Singles) -> None:
        """See `FirstPass.add`."""
        for start in range(0, len(rows), _ADD_ROWS):
            self.index.add(rows[start : start + _ADD_ROWS])

    def candidates(self, queries: Singles, count: int) -> tuple[Ints, Limits]:
        """See `FirstPass.candidates`."""
        _, positions = self.index.search(queries, count)
        return positions, np.full(len(queries), -np.inf)

    def set_parameters(self, parameters: Mapping[str, int]) -> None:
        """Sets search parameters.

        Args:
            parameters: `nprobe` or `efSearch`, >= 1.
        """
        for name, value in parameters.items():
            faiss.ParameterSpace().set_index_parameter(self.index, name, value)
            self.parameters[name] = value

    def tunable(self) -> tuple[str, int] | None:
        """The parameter that trades time for recall, and its largest sensible value."""
        lists = _inverted_lists(self.index)
        if lists is not None:
            return "nprobe", lists.nlist
        if isinstance(faiss.downcast_index(self.index), faiss.IndexHNSW):
            return "efSearch", 4096
        return None

    def centroids(self) -> Singles | None:
        """[n, D'] centroids of an inverted-file index without transforms; None for others."""
        lists = faiss.downcast_index(self.index)
        if not isinstance(lists, faiss.IndexIVF):
            return None
        return lists.quantizer.reconstruct_n(0, lists.nlist)

    def lists_of(self, rows: Singles) -> Ints:
        """[M] int64: the list that each row belongs to."""
        lists = _inverted_lists(self.index)
        assert lists is not None
        _, found = lists.quantizer.search(rows, 1)
        return found[:, 0]


def empty_index(spec: str, width: int, count: int) -> Any:
    """The index that a factory string names, untrained and empty.

    Args:
        spec: `IVF4096,Flat`, `HNSW32`, ….
        width: D'.
        count: rows that it shall hold.

    Raises:
        ValueError: for a string that faiss does not understand, or too few rows to train on.
    """
    if any(int(lists) > count for lists in re.findall(r"IVF(\d+)", spec)):
        raise ValueError(
            f"Expected at least as many rows as lists for `index` {spec!r}, one per list, "
            f"but got {count} rows; use index='flat'."
        )
    try:
        index = faiss.index_factory(width, spec, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(
            f"Expected `index` to be auto, flat or a faiss factory string, but got {spec!r}: "
            f"{str(error).splitlines()[-1]}"
        ) from error
    return index


def serialized_flat(rows: Singles, ids: Ints, is_l2: bool) -> bytes:
    """A flat index with ids, as bytes for users of faiss.

    Args:
        rows: [N, D] normalised float32.
        ids: [N] int64.
        is_l2: squared distances instead of inner products.
    """
    width = rows.shape[1]
    flat = faiss.IndexFlatL2(width) if is_l2 else faiss.IndexFlatIP(width)
    index = faiss.IndexIDMap2(flat)
    index.add_with_ids(rows, ids)
    data: NDArray[np.uint8] = faiss.serialize_index(index)
    return data.tobytes()


def _inverted_lists(index: Any) -> Any:
    try:
        return faiss.extract_index_ivf(index)
    except RuntimeError:  # not an inverted file
        return None
