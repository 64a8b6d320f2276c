"""Search with faiss. The only file that imports it."""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..core.lazy import Lock
from ..core.manifest import DatastoreError
from ..core.search import Floats, Ints, Singles, float32_rounding
from .advice import install
from .kept import IndexFile, MappedIndex, TrustedIndex


def limits(scores: Singles, rounding: float) -> Floats:
    """What rows can score at most: of the last that was not left out, also what those can."""
    return scores.astype(np.float64) + rounding


def how_to_get_faiss() -> str:
    """The commands that install it."""
    return f"run `{install('cpu')}`, or with [gpu] instead where there is an NVIDIA GPU"


_TRAINING_ROWS_PER_LIST = 64

_KMEANS_ROUNDS = 10

_ADD_ROWS = 131_072

_CANDIDATES_IN_REACH = 4
"""The lists that are searched hold this many times the candidates wanted, on average."""

_LARGEST_ON_GPU = 2048
"""faiss-gpu returns at most so many neighbours."""

_LIMITING = Lock()  # of the limits of faiss, which hold for the whole process

_LARGEST_NUMBER = 4096
"""Numbers in a factory string other than the lists of an IVF: links, sub-vectors, widths."""


@functools.cache
def _faiss() -> Any:
    """The library, or None; imported by the first search, so that starting does not wait for it."""
    try:
        import faiss
    except ImportError:  # a missing CUDA runtime of faiss-gpu is a RuntimeError, and stays one
        return None
    return faiss


def has_faiss() -> bool:
    """Whether faiss can be used for search."""
    return _faiss() is not None


def made_by() -> str:
    """The library and its version."""
    return f"faiss {_faiss().__version__}"


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
            self.index = _faiss().IndexFlatIP(rows.shape[1])
        else:
            self.index = _faiss().downcast_index(with_ids.index)
        self.index.add(rows)
        self.rounding = float32_rounding(rows.shape[1])

    def add(self, rows: Singles) -> None:
        """See `GrowingFirstPass.add`."""
        self.index.add(rows)

    def candidates(self, queries: Singles, count: int) -> tuple[Ints, Floats]:
        """See `FirstPass.candidates`."""
        scores, positions = self.index.search(queries, count)
        return positions, limits(scores, self.rounding)


class FaissApproximate:
    """Any other faiss index: it proposes, and how often it misses is measured.

    Args:
        index: a trained faiss index that holds the rows.
        parameters: search parameters (`nprobe`, `efSearch`).
        source: the file that it looks into, so that it cannot grow; None for one in memory.
    """

    extra = 44

    def __init__(
        self, index: Any, parameters: Mapping[str, int], source: MappedIndex | None = None
    ) -> None:
        self.index, self.source = index, source
        self.on_gpus: Any = None
        self._lock = Lock()
        self.parameters: dict[str, int] = {}
        self.set_parameters(parameters)

    @classmethod
    def from_rows(cls, spec: str, rows: Singles, is_l2: bool) -> "FaissApproximate":
        """Trains and fills the index that a factory string names.

        Args:
            spec: `IVF4096,Flat`, `HNSW32`, ….
            rows: [N, D] float32.
            is_l2: compare by distance instead of inner product.

        Raises:
            ValueError: for a string that faiss does not understand, or too few rows to train on.
        """
        index = empty_index(spec, rows.shape[1], len(rows), is_l2)
        lists = _inverted_lists(index)
        if lists is not None:
            lists.cp.niter = _KMEANS_ROUNDS
            lists.cp.max_points_per_centroid = _TRAINING_ROWS_PER_LIST
            lists.cp.seed = 1234
        try:
            if not index.is_trained:
                index.train(rows)
            approximate = cls(index, {})
            approximate._append(rows)
        except RuntimeError as error:
            raise ValueError(
                f"Expected `index` {spec!r} to be one that {len(rows)} rows can be put into, but "
                f"faiss says: {str(error).splitlines()[-1]}"
            ) from error
        return approximate

    @classmethod
    def from_lists(
        cls, spec: str, rows: Singles, centroids: Singles, lists: Ints, is_l2: bool
    ) -> "FaissApproximate":
        """Rebuilds an inverted-file index from its stored centroids and lists, without k-means.

        Args:
            spec: `IVF<n>,Flat` or `IVF<n>,SQ8`.
            rows: [N, D'] float32.
            centroids: [n, D'] float32.
            lists: [N] int64, the list of each row.
            is_l2: compare by distance instead of inner product.
        """
        index = _faiss().index_factory(rows.shape[1], spec, _metric(is_l2))
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
                len(block),
                _faiss().swig_ptr(block),
                _faiss().swig_ptr(ids[part]),
                _faiss().swig_ptr(wanted),
            )
        return cls(index, {})

    @classmethod
    def from_file(
        cls, file: IndexFile, spec: str, width: int, count: int, is_l2: bool
    ) -> "FaissApproximate":
        """Reads a serialized index, which is native code's work: for trusted files only.

        Args:
            file: what `write` wrote.
            spec: the factory string it must have been built from.
            width: D it must have.
            count: rows it must hold.
            is_l2: whether it must compare by distance.

        Raises:
            DatastoreError: for a file that faiss cannot read within the limits, or another kind,
                width, metric or number of rows.
        """
        index = _read(file, count)
        wanted = empty_index(spec, width, count, is_l2)
        _check_same_kind(file.record.name, index, wanted, count)
        return cls(index, {}, file if isinstance(file, MappedIndex) else None)

    def write(self, path: Path) -> None:
        """Writes the index for users of faiss; rows are numbered in the order of the files."""
        _write(path, self.index)

    def add(self, rows: Singles) -> None:
        """See `GrowingFirstPass.add`.

        Raises:
            NotImplementedError: for a kind that takes no rows in once it was built.
        """
        try:
            self._append(rows)
        except RuntimeError as error:
            raise NotImplementedError(str(error).splitlines()[-1]) from error

    def _append(self, rows: Singles) -> None:
        if self.source is not None:  # faiss would abort the process
            library = _faiss()
            self.index = library.deserialize_index(library.serialize_index(self.index))
            self.source = None
            self.set_parameters(self.parameters)
        for index in (self.index, self.on_gpus):
            for start in range(0, len(rows) if index is not None else 0, _ADD_ROWS):
                index.add(rows[start : start + _ADD_ROWS])

    def candidates(self, queries: Singles, count: int) -> tuple[Ints, Floats]:
        """See `FirstPass.candidates`."""
        if self.on_gpus is not None and count > _LARGEST_ON_GPU:
            raise ValueError(
                f"Expected `k` to be at most {_LARGEST_ON_GPU - self.extra} with an index on a "
                f"GPU, but {count} candidates are needed; do store.to('cpu') or index='flat'."
            )
        index = self.index if self.on_gpus is None else self.on_gpus
        parameters, nprobe = self._wide_enough(count)
        if nprobe is None:
            _, positions = index.search(queries, count, params=parameters)
        else:  # a wrapper that takes no parameters of what is inside: they are those of this search
            with self._lock:
                _faiss().ParameterSpace().set_index_parameter(self.index, "nprobe", nprobe)
                _, positions = index.search(queries, count)
        return positions, np.full(positions.shape, np.inf)

    def to_gpus(self, gpus: Sequence[int], float16: bool) -> bool:
        """Searches on GPUs from now on, each of which holds a part of the rows.

        Args:
            gpus: their numbers.
            float16: halve the memory there.

        Returns:
            False where this faiss has no GPUs, or none that can search this kind of index.
        """
        if not hasattr(_faiss(), "StandardGpuResources") or _faiss().get_num_gpus() == 0:
            return False
        options = _faiss().GpuMultipleClonerOptions()
        options.shard, options.useFloat16 = len(gpus) > 1, float16
        resources = [_faiss().StandardGpuResources() for _ in gpus]
        try:
            self.on_gpus = _faiss().index_cpu_to_gpu_multiple_py(
                resources, self.index, options, list(gpus)
            )
        except RuntimeError:  # HNSW, for one
            return False
        return True

    def set_parameters(self, parameters: Mapping[str, int]) -> None:
        """Sets search parameters.

        Args:
            parameters: `nprobe` or `efSearch`, >= 1.
        """
        for name, value in parameters.items():
            _faiss().ParameterSpace().set_index_parameter(self.index, name, value)
            if self.on_gpus is not None:
                _faiss().GpuParameterSpace().set_index_parameter(self.on_gpus, name, value)
            self.parameters[name] = value

    def _wide_enough(self, count: int) -> tuple[Any, int | None]:
        """Enough lists to hold that many candidates a few times over.

        Returns:
            Parameters of one search, and the number of lists if it must be set before instead.
        """
        lists = _inverted_lists(self.index)
        if lists is None:
            return None, None
        needed = -(-_CANDIDATES_IN_REACH * count * lists.nlist // max(1, self.index.ntotal))
        nprobe = min(lists.nlist, max(self.parameters.get("nprobe", 1), needed))
        library = _faiss()
        parameters = library.SearchParametersIVF(nprobe=nprobe)
        kind = _faiss().downcast_index(self.index)
        if isinstance(kind, _faiss().IndexIVF):
            return parameters, None
        if isinstance(kind, _faiss().IndexPreTransform):
            return library.SearchParametersPreTransform(index_params=parameters), None
        return None, nprobe

    def tunable(self) -> tuple[str, int] | None:
        """The parameter that trades time for recall, and its largest sensible value."""
        lists = _inverted_lists(self.index)
        if lists is not None:
            return "nprobe", lists.nlist
        if isinstance(_faiss().downcast_index(self.index), _faiss().IndexHNSW):
            return "efSearch", 4096
        return None

    def centroids(self) -> Singles | None:
        """[n, D'] centroids of an inverted-file index without transforms; None for others."""
        lists = _faiss().downcast_index(self.index)
        if not isinstance(lists, _faiss().IndexIVF):
            return None
        return lists.quantizer.reconstruct_n(0, lists.nlist)

    def lists_of(self, rows: Singles) -> Ints:
        """[M] int64: the list that each row belongs to."""
        lists = _inverted_lists(self.index)
        assert lists is not None
        _, found = lists.quantizer.search(rows, 1)
        return found[:, 0]


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
        index = _faiss().index_factory(width, spec, _metric(is_l2))
    except RuntimeError as error:
        raise ValueError(
            f"Expected `index` to be auto, flat or a faiss factory string, but got {spec!r}: "
            f"{str(error).splitlines()[-1]}"
        ) from error
    return index


def _metric(is_l2: bool) -> int:
    return _faiss().METRIC_L2 if is_l2 else _faiss().METRIC_INNER_PRODUCT


def write_flat(path: Path, rows: Singles, ids: Ints, is_l2: bool) -> None:
    """Writes a flat index with ids, for users of faiss.

    Args:
        path: where to.
        rows: [N, D] normalised float32.
        ids: [N] int64.
        is_l2: squared distances instead of inner products.
    """
    width = rows.shape[1]
    flat = _faiss().IndexFlatL2(width) if is_l2 else _faiss().IndexFlatIP(width)
    index = _faiss().IndexIDMap2(flat)
    index.add_with_ids(rows, ids)
    _write(path, index)


def read_flat(trusted: TrustedIndex, ids: Ints, width: int) -> FaissFlat:
    """Reads what `write_flat` wrote for inner products: for trusted files only.

    Args:
        trusted: what `write_flat` wrote.
        ids: [N] int64, which it must hold in this order.
        width: D it must have.

    Raises:
        DatastoreError: for a file that faiss cannot read within the limits, or other rows.
    """
    index = _read(trusted, len(ids))
    wanted = _faiss().IndexIDMap2(_faiss().IndexFlatIP(width))
    _check_same_kind(trusted.record.name, index, wanted, len(ids))
    if not np.array_equal(_faiss().vector_to_array(index.id_map), ids):
        raise DatastoreError(
            f"Expected {trusted.record.name} to hold the ids of the rows; save it again."
        )
    return FaissFlat(np.empty((0, width), np.float32), index)


def _write(path: Path, index: Any) -> None:
    """Writes through a file of Python's, whose errors say that the disk is full."""
    with path.open("wb") as file:
        library = _faiss()
        writer = library.PyCallbackIOWriter(file.write)
        _faiss().write_index(index, writer)
        del writer  # what it still holds goes to the file now


def _read(source: IndexFile, count: int) -> Any:
    with _deserialization_limits(source.record.size, count):
        try:
            return source.read(_faiss())
        except RuntimeError as error:
            reason = str(error).splitlines()[-1]
            raise DatastoreError(
                f"Expected {source.record.name} to be an index: {reason}"
            ) from error


@contextmanager
def _deserialization_limits(size: int, count: int) -> Iterator[None]:
    """Lets faiss allocate what a file of that size, and that many rows, can need."""
    with _LIMITING:
        byte_limit = _faiss().get_deserialization_vector_byte_limit()
        loop_limit = _faiss().get_deserialization_loop_limit()
        _faiss().set_deserialization_vector_byte_limit(size)
        _faiss().set_deserialization_loop_limit(max(count, 2**16))
        try:
            yield
        finally:
            _faiss().set_deserialization_vector_byte_limit(byte_limit)
            _faiss().set_deserialization_loop_limit(loop_limit)


def _check_same_kind(name: str, index: Any, wanted: Any, count: int) -> None:
    """Refuses an index, or one inside it, of another class, width, metric or number of rows."""
    found: Any = _faiss().downcast_index(index)
    asked: Any = _faiss().downcast_index(wanted)
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
    if isinstance(found, _faiss().IndexIVF):
        _check_same_kind(name, found.quantizer, asked.quantizer, found.nlist)
    elif isinstance(found, _faiss().IndexHNSW):
        _check_same_kind(name, found.storage, asked.storage, count)
    elif hasattr(asked, "index"):  # IDMap, PreTransform, Refine
        _check_same_kind(name, found.index, asked.index, count)


def _class_of(index: Any) -> str:
    """Flat ones come back from a file as the class of their metric, which is compared anyway."""
    return "IndexFlat" if type(index).__name__.startswith("IndexFlat") else type(index).__name__


def _inverted_lists(index: Any) -> Any:
    try:
        return _faiss().extract_index_ivf(index)
    except RuntimeError:  # not an inverted file
        return None
