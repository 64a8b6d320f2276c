"""Indexes of faiss that may miss rows: they propose, and how often they miss is measured.

An inverted file is made in two steps, k-means and filling, of which only the second is repeated
from stored centroids and lists: it comes out the same, bit by bit.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..core.lazy import Lock
from ..core.search import Floats, Ints, Singles, float32_rounding
from .faiss import (
    check_same_kind,
    empty_index,
    inverted_lists,
    library,
    limits,
    metric_of,
    read_index,
    write_index,
)
from .kept import IndexFile, MappedIndex
from .kinds import (
    CODES,
    CODES_ALONE,
    LARGEST_EF,
    LARGEST_K_FACTOR,
    has_codes,
    is_rebuildable,
    rounding_of,
)
from .searcher import IndexRows

_TRAINING_ROWS_PER_LIST, _KMEANS_ROUNDS = 40, 5
"""More of either takes longer and hardly finds better lists."""

_BUILD_WIDTH = 100
"""Rows of a graph that are kept in mind while one more is linked."""

_ADD_ROWS = 131_072
_ASSIGNED_ROWS = 1024

_CANDIDATES_IN_REACH = 4
"""The lists that are searched hold this many times the candidates wanted, on average."""

_LARGEST_ON_GPU = 2048
"""faiss-gpu returns at most so many neighbours."""

LEAST = {"nprobe": 1, "efSearch": 1, "k_factor": 4}
"""What the parameters are where nobody chose them."""

MadeRows = Singles | IndexRows
"""[N, D'] float32, which may be made as they are read."""


class FaissApproximate:
    """Any faiss index that a factory string names.

    Args:
        index: a trained faiss index, which holds the rows.
        spec: its factory string.
        source: the file that it looks into, so that it cannot grow; None for one in memory.
    """

    extra = 44  # some of which may be rows that were removed since

    def __init__(self, index: Any, spec: str, source: MappedIndex | None = None) -> None:
        self.index, self.spec, self.source = index, spec, source
        rounding, is_l2 = rounding_of(spec), index.metric_type == metric_of(is_l2=True)
        self.rounding = np.inf
        if rounding is not None and not is_l2:  # distances are not on the scale of similarities
            self.rounding = rounding + float32_rounding(index.d)
        self.on_gpus: Any = None
        self._lock = Lock()
        self.parameters: dict[str, int] = {}
        self._enough: dict[int, tuple[Any, int | None]] = {}  # what `_wide_enough` found

    @classmethod
    def from_rows(cls, spec: str, rows: MadeRows, is_l2: bool) -> "FaissApproximate":
        """Trains and fills the index that a factory string names.

        Args:
            spec: `IVF4096,Flat`, `HNSW32`, ….
            rows: [N, D] float32.
            is_l2: compare by distance instead of inner product.

        Raises:
            ValueError: for a string that faiss does not understand, or too few rows to train on.
        """
        index = empty_index(spec, rows.shape[1], len(rows), is_l2)
        lists = inverted_lists(index)
        if lists is not None:
            _set_kmeans(lists)
        if isinstance(index, library().IndexHNSW):
            index.hnsw.efConstruction = _BUILD_WIDTH
        try:
            if not index.is_trained:
                index.train(rows[:])
            approximate = cls(index, spec)
            approximate._append(rows)
        except RuntimeError as error:
            raise ValueError(
                f"Expected `index` {spec!r} to be one that {len(rows)} rows can be put into, but "
                f"faiss says: {str(error).splitlines()[-1]}"
            ) from error
        return approximate

    @classmethod
    def from_lists(
        cls, spec: str, rows: MadeRows, centroids: Singles, lists: Ints, is_l2: bool
    ) -> "FaissApproximate":
        """Fills an inverted file from its centroids and lists, without k-means.

        Args:
            spec: one that `is_rebuildable`.
            rows: [N, D'] float32.
            centroids: [n, D'] float32.
            lists: [N] int64, the list of each row.
            is_l2: compare by distance instead of inner product.
        """
        index = library().index_factory(rows.shape[1], spec, metric_of(is_l2))
        inverted = inverted_lists(index)
        inverted.quantizer.reset()
        inverted.quantizer.add(np.ascontiguousarray(centroids))
        # the ranges of SQ8 come from the same rows, so they come out the same
        inverted.train(rows[:] if spec.endswith("SQ8") else centroids)
        index.is_trained = True
        approximate = cls(index, spec)
        approximate._fill(rows, lists)
        return approximate

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
        index = read_index(file, count)
        wanted = empty_index(spec, width, count, is_l2)
        check_same_kind(file.record.name, index, wanted, count)
        return cls(index, spec, file if isinstance(file, MappedIndex) else None)

    @property
    def per_neighbour(self) -> int:
        """See `GrowingIndex`."""
        if not self.spec.endswith(CODES_ALONE):
            return 1
        return self.parameters.get("k_factor", LEAST["k_factor"])

    def write(self, path: Path) -> None:
        """Writes the index for users of faiss; rows are numbered in the order of the files."""
        write_index(path, self.index)

    def add(self, rows: MadeRows) -> None:
        """See `GrowingIndex.add`.

        Raises:
            NotImplementedError: for a kind that takes no rows in once it was built.
        """
        self._own()
        self._enough = {}
        try:
            if is_rebuildable(self.spec):
                self._fill(rows, self.lists_of(rows))
            else:
                self._append(rows)
        except RuntimeError as error:
            raise NotImplementedError(str(error).splitlines()[-1]) from error

    def _own(self) -> None:
        """Copies what lies in a file: faiss would abort the process where that shall grow."""
        if self.source is not None:
            serialized = library().serialize_index(self.index)
            self.index, self.source = library().deserialize_index(serialized), None
            self.set_parameters(self.parameters)

    def _append(self, rows: MadeRows) -> None:
        for start in range(0, len(rows), _ADD_ROWS):
            self.index.add(rows[start : start + _ADD_ROWS])
        self._append_on_gpus(rows)

    def _append_on_gpus(self, rows: MadeRows) -> None:
        for start in range(0, len(rows) if self.on_gpus is not None else 0, _ADD_ROWS):
            self.on_gpus.add(rows[start : start + _ADD_ROWS])

    def _fill(self, rows: MadeRows, lists: Ints) -> None:
        """Appends rows, each to the list that is its own."""
        inverted, before = inverted_lists(self.index), self.index.ntotal
        ids = np.arange(before, before + len(rows), dtype=np.int64)
        for start in range(0, len(rows), _ADD_ROWS):
            part = slice(start, start + _ADD_ROWS)
            block, wanted = np.ascontiguousarray(rows[part]), np.ascontiguousarray(lists[part])
            if has_codes(self.spec):
                _add_codes(inverted, block, ids[part], wanted)
                if self.spec.endswith(CODES):
                    self.index.refine_index.add(block)
                    self.index.ntotal = inverted.ntotal
            else:
                inverted.add_core(len(block), *map(library().swig_ptr, (block, ids[part], wanted)))
        self._append_on_gpus(rows)

    def candidates(self, queries: Singles, count: int) -> tuple[Ints, Floats]:
        """See `FirstPass.candidates`."""
        if self.on_gpus is not None and count > _LARGEST_ON_GPU:
            raise ValueError(
                f"Expected `k` to be at most {_LARGEST_ON_GPU - self.extra} with an index on a "
                f"GPU, but {count} candidates are needed; do store.to('cpu') or index='flat'."
            )
        index = self.index if self.on_gpus is None else self.on_gpus
        if count not in (known := self._enough):
            known[count] = self._wide_enough(count)
        parameters, nprobe = known[count]
        if nprobe is None:
            scores, positions = index.search(queries, count, params=parameters)
        else:  # a wrapper that takes no parameters of what is inside: they are those of this search
            with self._lock:
                library().ParameterSpace().set_index_parameter(self.index, "nprobe", nprobe)
                scores, positions = index.search(queries, count)
        # on a GPU also the products are rounded
        rounding = self.rounding if self.on_gpus is None else np.inf
        return positions, limits(scores, rounding)

    def to_gpus(self, gpus: Sequence[int], float16: bool) -> bool:
        """Searches on GPUs from now on, each of which holds a part of the rows.

        Args:
            gpus: their numbers.
            float16: halve the memory there.

        Returns:
            False where this faiss has no GPUs, or none that can search this kind of index.
        """
        if not hasattr(library(), "StandardGpuResources") or library().get_num_gpus() == 0:
            return False
        options = library().GpuMultipleClonerOptions()
        options.shard, options.useFloat16 = len(gpus) > 1, float16
        resources = [library().StandardGpuResources() for _ in gpus]
        try:
            self.on_gpus = library().index_cpu_to_gpu_multiple_py(
                resources, self.index, options, list(gpus)
            )
        except RuntimeError:  # HNSW, for one
            return False
        return True

    def set_parameters(self, parameters: Mapping[str, int]) -> None:
        """Sets search parameters.

        Args:
            parameters: `nprobe`, `efSearch` or `k_factor`, >= 1.
        """
        self.parameters |= parameters
        self._enough = {}
        for name, value in parameters.items():
            if name == "k_factor":  # given with each search
                continue
            library().ParameterSpace().set_index_parameter(self.index, name, value)
            if self.on_gpus is not None:
                library().GpuParameterSpace().set_index_parameter(self.on_gpus, name, value)

    def _wide_enough(self, count: int) -> tuple[Any, int | None]:
        """Enough lists to hold that many candidates a few times over.

        Returns:
            Parameters of one search, and the number of lists if it must be set before instead.
        """
        lists = inverted_lists(self.index)
        if lists is None:
            return None, None
        needed = -(-_CANDIDATES_IN_REACH * count * lists.nlist // max(1, self.index.ntotal))
        nprobe = min(lists.nlist, max(self.parameters.get("nprobe", 1), needed))
        parameters = library().SearchParametersIVF(nprobe=nprobe)
        kind = library().downcast_index(self.index)
        if isinstance(kind, library().IndexIVF):
            return parameters, None
        if isinstance(kind, library().IndexPreTransform):
            return library().SearchParametersPreTransform(index_params=parameters), None
        if self.spec.endswith(CODES):
            factor = self.parameters.get("k_factor", LEAST["k_factor"])
            return library().IndexRefineSearchParameters(
                k_factor=factor, base_index_params=parameters
            ), None
        return None, nprobe

    def tunable(self) -> dict[str, int]:
        """The parameters that trade time for recall, and the largest sensible value of each."""
        lists = inverted_lists(self.index)
        if has_codes(self.spec):
            return {"nprobe": lists.nlist, "k_factor": LARGEST_K_FACTOR}
        if lists is not None:
            return {"nprobe": lists.nlist}
        if isinstance(library().downcast_index(self.index), library().IndexHNSW):
            return {"efSearch": LARGEST_EF}
        return {}

    def lists_of(self, rows: MadeRows) -> Ints:
        """[M] int64: the list that each row belongs to."""
        return _nearest(inverted_lists(self.index).quantizer, rows)


def new_lists(spec: str, rows: MadeRows, is_l2: bool) -> tuple[Singles, Ints]:
    """Finds centroids by k-means on a sample, and the list of each row.

    Args:
        spec: one that `is_rebuildable`.
        rows: [N, D'] float32.
        is_l2: compare by distance instead of inner product.

    Returns:
        [n, D'] float32 and [N] int64.

    Raises:
        ValueError: for fewer rows than lists.
    """
    empty_index(spec, rows.shape[1], len(rows), is_l2)
    index = library().index_factory(rows.shape[1], f"{spec.split(',')[0]},Flat", metric_of(is_l2))
    _set_kmeans(index)
    most = index.nlist * _TRAINING_ROWS_PER_LIST
    sample = np.sort(np.random.default_rng(0).permutation(len(rows))[:most])
    index.train(rows[sample] if most < len(rows) else rows[:])
    return index.quantizer.reconstruct_n(0, index.nlist), _nearest(index.quantizer, rows)


def _set_kmeans(inverted: Any) -> None:
    inverted.cp.niter = _KMEANS_ROUNDS
    inverted.cp.max_points_per_centroid = _TRAINING_ROWS_PER_LIST
    inverted.cp.seed = 1234


def _nearest(quantizer: Any, rows: MadeRows) -> Ints:
    """The list whose centroid is nearest to each row; torch finds it in a quarter of the time."""
    centroids = torch.from_numpy(quantizer.reconstruct_n(0, quantizer.ntotal))
    is_l2 = quantizer.metric_type == metric_of(is_l2=True)
    farther = centroids.square().sum(dim=1) / 2 if is_l2 else torch.zeros(len(centroids))
    columns, nearest = centroids.T.contiguous(), torch.empty(len(rows), dtype=torch.int64)
    for start in range(0, len(rows), _ADD_ROWS):
        block = torch.from_numpy(rows[start : start + _ADD_ROWS])
        for place, part in enumerate(block.split(_ASSIGNED_ROWS)):
            with torch.autocast("cpu", enabled=False):
                best = (part @ columns - farther).max(dim=1).indices
            first = start + place * _ASSIGNED_ROWS
            nearest[first : first + len(part)] = best
    return nearest.numpy()


def _add_codes(inverted: Any, rows: Singles, ids: Ints, lists: Ints) -> None:
    """Adds rows to lists of fast-scan codes, which faiss would choose anew for each row.

    Meanwhile the index has a quantizer that knows one list only, so that all rows go there.
    """
    quantizer, order = inverted.quantizer, np.argsort(lists, kind="stable")
    known = library().IndexIDMap2(library().index_factory(inverted.d, "Flat", inverted.metric_type))
    used, starts = np.unique(lists[order], return_index=True)
    inverted.quantizer = known
    threads = library().omp_get_max_threads()
    library().omp_set_num_threads(1)  # of this thread: to start others takes longer than a list
    try:
        for wanted, places in zip(used, np.split(order, starts[1:]), strict=True):
            known.reset()
            centroid = quantizer.reconstruct(int(wanted))[None]
            known.add_with_ids(centroid, np.array([wanted], np.int64))
            inverted.add_with_ids(rows[places], ids[places])
    finally:
        library().omp_set_num_threads(threads)
        inverted.quantizer = quantizer
