"""The memory of the classifier: rows of (features, label, id) that are searched by similarity."""

import copy
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor
from transformers.utils import CONFIG_NAME
from transformers.utils.logging import tqdm

from ..core.config import Normalization, check_metric
from ..core.files import HubFiles
from ..core.frozen import Resolve
from ..core.manifest import (
    MANIFEST_NAME,
    STORAGE_DTYPES,
    Binding,
    DatastoreError,
    IndexInfo,
    Manifest,
)
from ..core.rows import (
    Values,
    as_features,
    as_whole_numbers,
    check_row_numbers,
    refuse_non_finite,
    shown,
)
from ..core.search import Ints, Neighbors, Singles, check_request
from ..core.votes import Metric
from .backend import check_alike, check_split
from .disk import (
    Contents,
    OpenedFiles,
    blobs_in,
    checked_centroids,
    open_files,
    verified_faiss_file,
    write_datastore,
)
from .faiss import FaissApproximate
from .folders import exclusive_lock, identity
from .hub import PushTarget
from .index import (
    AUTO,
    FLAT,
    MIN_RECALL,
    Placement,
    StoredLists,
    build_searcher,
    choose_index,
    is_rebuildable,
    parse_memory,
)
from .searcher import GrowingSearcher, IndexSpace
from .table import RowTable, StoredRows, check_paths, sum_of, to_storage

_BLOCK_ROWS = 8192


class DatastoreRows:
    """The parts of a `Datastore`, checked once, and how its rows are read.

    See `Datastore` for arguments and attributes.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        ids: Tensor,
        mean: Tensor,
        *,
        metric: str = Metric.COSINE,
        normalization: str = Normalization.L2_CENTERED,
        index: str = FLAT,
        paths: Sequence[str] | None = None,
        max_memory: str | int | None = None,
        min_recall: float = MIN_RECALL,
    ) -> None:
        check_metric(metric, normalization)
        if str(features.dtype).removeprefix("torch.") not in STORAGE_DTYPES or features.ndim != 2:
            raise ValueError(
                f"Expected `features` to be [N, D] float16 or float32, "
                f"but got {tuple(features.shape)} {features.dtype}."
            )
        if mean.shape != features.shape[1:]:
            raise ValueError(
                f"Expected `mean` to have shape {tuple(features.shape[1:])}, "
                f"but got {tuple(mean.shape)}."
            )
        if not len(features) == len(labels) == len(ids):
            raise ValueError(
                f"Expected one label and one id per row ({len(features)}), "
                f"but got {len(labels)} labels and {len(ids)} ids."
            )
        if not 0 < min_recall <= 1:
            raise ValueError(f"Expected `min_recall` to be in (0, 1], but got {min_recall}.")
        self.metric, self.normalization = str(metric), str(normalization)
        self.max_memory = None if max_memory is None else parse_memory(max_memory)
        self.min_recall = min_recall
        self.mean = mean.float()
        self.manifest: Manifest | None = None
        self.digest: str | None = None
        self.source: dict[str, str] = {}
        self._table = RowTable.of(features, labels, ids, check_paths(paths, len(features)))
        self._index = self._choose_index(index)
        self._centroids: Singles | None = None
        self._searcher: GrowingSearcher | None = None
        self._placement = Placement()
        self._unverified: OpenedFiles | None = None
        self._trusted: BinaryIO | None = None
        self.home: Path | None = None

    def __len__(self) -> int:
        return len(self._table)

    @property
    def dim(self) -> int:
        """Width of a row (D)."""
        return self._table.features.shape[1]

    @property
    def dtype(self) -> str:
        """Storage dtype, `float16` or `float32`."""
        return str(self._table.features.dtype).removeprefix("torch.")

    @property
    def features(self) -> Tensor:
        """[N, D] the stored raw features; joined, in memory, if they lie in several files."""
        self.verify()
        return self._table.features.joined()

    @property
    def labels(self) -> Tensor:
        """[N] int64."""
        self.verify()
        return self._table.labels

    @property
    def ids(self) -> Tensor:
        """[N] int64."""
        self.verify()
        return self._table.ids

    @property
    def paths(self) -> list[str] | None:
        """Where each row's picture lies, relative to its dataset; None if nobody said."""
        self.verify()
        return self._table.paths

    def rows(self, part: slice) -> StoredRows:
        """Some of the rows with all that is stored about them.

        Args:
            part: which, by position, with step 1.
        """
        self.verify()
        table = self._table
        ids = table.ids[part].numpy()
        paths = [""] * len(ids) if table.paths is None else table.paths[part]
        splits = [self.source.get("split", "")] * len(ids)
        return StoredRows(ids, table.labels[part].numpy(), table.features[part], paths, splits)

    @property
    def index(self) -> IndexInfo:
        """Which index is used, with its parameters and measured recall once it was built."""
        return self._index

    @property
    def location(self) -> str | None:
        """Where the rows lie if not beside the model: None, they do."""
        return None

    @property
    def binding(self) -> Binding | None:
        """The checkpoint that the datastore was opened with, if any."""
        return None if self.manifest is None else self.manifest.binding

    def __repr__(self) -> str:
        return (
            f"Datastore({len(self)} x {self.dim} {self.dtype}, metric={self.metric!r}, "
            f"normalization={self.normalization!r}, index={str(self._index)!r})"
        )

    def __copy__(self) -> Self:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._searcher = None  # an index is changed in place, so each store has its own
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return copy.copy(self)  # rows are replaced, never written in place, so they can be shared

    def subset(self, ids: Values) -> Self:
        """A datastore of some of the rows, with the same mean.

        Args:
            ids: [M] unique ids that the datastore has, in the order wanted.

        Raises:
            ValueError: for an id that it does not have.
        """
        rows = self._positions(ids)
        table = self._table
        paths = None if table.paths is None else [table.paths[row] for row in rows.tolist()]
        part = type(self)(
            torch.from_numpy(table.features[rows.numpy()]), table.labels[rows], table.ids[rows],
            self.mean,
            metric=self.metric, normalization=self.normalization, index=FLAT,
            paths=paths, max_memory=self.max_memory, min_recall=self.min_recall,
        )  # fmt: skip
        part._index = part._choose_index(self._index.requested, fall_back=True)
        part.digest, part.source = self.digest, dict(self.source)
        return part

    def blocks(self) -> Iterator[StoredRows]:
        """All rows with all that is stored about them, block by block.

        Yields:
            The next rows.
        """
        for start in range(0, len(self), _BLOCK_ROWS):
            yield self.rows(slice(start, start + _BLOCK_ROWS))

    def rows_of(self, ids: Values) -> StoredRows:
        """Some of the rows with all that is stored about them.

        Args:
            ids: [M] unique ids that the datastore has, in the order wanted.

        Raises:
            ValueError: for an id that it does not have.
        """
        rows, table = self._positions(ids), self._table
        paths = [""] * len(rows)
        if table.paths is not None:
            paths = [table.paths[row] for row in rows.tolist()]
        return StoredRows(
            table.ids[rows].numpy(), table.labels[rows].numpy(), table.features[rows.numpy()],
            paths, [self.source.get("split", "")] * len(rows),
        )  # fmt: skip

    def ids_labelled(self, label: int) -> Tensor:
        """[M] int64, the ids of the rows of one class.

        Args:
            label: of the class.
        """
        return self.ids[self.labels == label]

    def hash_sum(self) -> int:
        """The sum of the hashes of all rows, see `sum_of`; all are read."""
        return sum(sum_of(rows) for rows in self.blocks())

    @property
    def marks(self) -> tuple[Any, ...]:
        """Objects that are replaced when rows, labels or mean change."""
        return self.ids, self.labels, self.mean

    def label_beyond(self, classes: int) -> int | None:
        """The largest label, if it is >= classes; else None.

        Args:
            classes: how many classes there are.
        """
        largest = int(self.labels.max()) if len(self) else -1
        return largest if largest >= classes else None

    def path_of(self, row_id: int) -> str:
        """Where the picture of a row lies, relative to its dataset; empty if not known.

        Args:
            row_id: an id that the datastore has.

        Raises:
            ValueError: for an id that it does not have.
        """
        return self.paths_of([row_id])[0]

    def paths_of(self, ids: Values) -> list[str]:
        """Where the pictures of some rows lie; see `path_of`.

        Args:
            ids: [M] unique ids that the datastore has.

        Raises:
            ValueError: for an id that it does not have.
        """
        rows, paths = self._positions(ids).tolist(), self._table.paths
        return [""] * len(rows) if paths is None else [paths[row] for row in rows]

    def verify(self) -> None:
        """Hashes the files behind the rows and checks their content, once.

        Called by itself before the first search and before anything reads or changes rows.

        Raises:
            DatastoreError: naming the file that is damaged, or what is wrong with its rows.
        """
        if self._unverified is None:
            return
        self._unverified.verify()
        try:
            check_row_numbers(self._table.labels, self._table.ids, len(self))
            for part in self._table.features.parts:
                refuse_non_finite(part, "features")
            refuse_non_finite(self.mean.unsqueeze(0), "mean")
        except ValueError as error:
            raise DatastoreError(f"The datastore is not usable: {error}") from error
        self._table = dataclasses.replace(self._table, paths=self._unverified.read_paths())
        self._unverified = None

    def _choose_index(self, requested: str, *, fall_back: bool = False) -> IndexInfo:
        return choose_index(requested, len(self), self.dim, self.max_memory, fall_back=fall_back)

    def _positions(self, ids: Values) -> Tensor:
        wanted = as_whole_numbers(ids, "ids")
        if len(wanted.unique()) != len(wanted):
            raise ValueError("Expected `ids` to name each row once, but some are doubled.")
        self.verify()
        rows = self._table.positions(wanted)
        if (rows < 0).any():
            raise ValueError(
                f"Expected `ids` that the datastore has, but it does not have "
                f"{shown(wanted[rows < 0])}."
            )
        return rows


class _Filtered(NamedTuple):
    """The rows of some classes, and of what they were taken."""

    classes: Tensor
    ids: Tensor
    labels: Tensor
    mean: Tensor
    placement: Placement
    store: "DatastoreSearch"

    def is_of(self, store: "DatastoreSearch", classes: Tensor) -> bool:
        is_same = self.ids is store._table.ids and self.labels is store._table.labels
        is_same &= self.mean is store.mean and self.placement == store._placement
        return is_same and torch.equal(self.classes, classes)


class DatastoreSearch(DatastoreRows):
    """Searches the rows of a `Datastore`."""

    _filtered: _Filtered | None = None

    def search(
        self,
        queries: Tensor | NDArray,
        k: int = 20,
        exclude_ids: Values | None = None,
        *,
        labels: Values | None = None,
        split: str | None = None,
    ) -> Neighbors:
        """Finds the k nearest rows of each query.

        Args:
            queries: [B, D] finite raw features of any float dtype and device.
            k: how many, >= 1; fewer rows give fewer neighbours.
            exclude_ids: [B] int64; the row with that id is not a neighbour of that query (-1 =
                none): leave-one-out by id, whatever else lies at the same place.
            labels: only rows of these classes are neighbours, searched exactly; None for all. The
                rows of the classes asked for last are kept ready.
            split: the rows' split, if it must be a certain one; a datastore holds one.

        Returns:
            Neighbors [B, min(k, N)], or [B, min(k, N - 1)] with `exclude_ids`, on the device of the
            queries, ordered by similarity (compared in float64), then id; N counts the rows of
            `labels`. Exact for `flat`; other indexes may miss some, see `index.recall`.

        Raises:
            ValueError: for NaN or infinite queries (with the row numbers), another width, k < 1,
                exclude_ids of another length, or a split that the rows are not of.
            DatastoreError: if the files behind the rows turn out to be damaged.
        """
        check_split(split, self.source)
        store = self if labels is None else self._of_labels(labels)
        return store.nearest(queries, k, exclude_ids).rounded(queries)

    def nearest(
        self, queries: Tensor | NDArray, k: int, exclude_ids: Values | None = None
    ) -> Neighbors:
        """The answer of `search` before it is rounded, for those who merge several.

        Args:
            queries: see `search`.
            k: see `search`.
            exclude_ids: see `search`.

        Returns:
            Neighbors as `search` finds them, with similarities in float64, on the CPU.

        Raises:
            ValueError: see `search`.
            DatastoreError: see `search`.
        """
        wanted = check_request(queries, k, exclude_ids, self.dim)
        shape = (len(wanted.queries), wanted.width(len(self)))
        if 0 in shape:
            similarities, positions = np.zeros(shape), np.zeros(shape, np.int64)
        else:
            similarities, positions = self.build_index().search(
                wanted.queries, shape[1], wanted.excluded
            )
        rows = torch.from_numpy(positions)
        table = self._table
        return Neighbors(torch.from_numpy(similarities), table.labels[rows], table.ids[rows])

    def leave_one_out(
        self, k: int = 20, batch_size: int = 4096, *, progress: bool = False
    ) -> Iterator[Neighbors]:
        """The neighbours of each stored row among the others, in row order, chunk by chunk.

        Args:
            k: how many.
            batch_size: rows per chunk, which bounds the memory.
            progress: show a progress bar.

        Yields:
            Neighbors of the next rows.
        """
        self.verify()
        table = self._table  # the rows of now, whatever is changed between two chunks
        with tqdm(total=len(table), unit=" rows", desc="neighbours", disable=not progress) as bar:
            for start in range(0, len(table), batch_size):
                part = slice(start, start + batch_size)
                rows = table.features[part]
                yield self.search(rows, k, table.ids[part])
                bar.update(len(rows))

    def to(
        self, device: str | torch.device | Sequence[str | torch.device], *, float16: bool = False
    ) -> Self:
        """Chooses where searches run; the rows, the answers and their order stay the same.

        On a device an exact search is a blocked matrix product of torch, on several they share the
        rows; an inverted file goes to faiss-gpu where that is installed. Candidates are compared on
        the CPU in float64 in any case.

        Args:
            device: `cpu`, `cuda`, `cuda:1`, `mps`, …, or several of one kind.
            float16: keep half of the memory there; answers stay exact, by more candidates.

        Returns:
            This datastore.

        Raises:
            ValueError: for a device that is not here.
        """
        self._placement = Placement.of(device, float16)
        self._searcher = None
        return self

    def build_index(self) -> GrowingSearcher:
        """Builds the index now instead of at the first search.

        Returns:
            The searcher.

        Raises:
            ValueError: for an index that cannot be built from these rows.
            DatastoreError: if the files behind the rows turn out to be damaged.
        """
        self.verify()
        if self._searcher is None:
            table = self._table
            mean = self.mean.double().numpy()
            space = IndexSpace(mean, self.metric, self.normalization, table.features)
            self._searcher, self._index, lists = build_searcher(
                table.features, table.ids.numpy(), space, self._index, self._stored_lists(),
                self.min_recall, self._placement, self._trusted,
            )  # fmt: skip
            if lists is not None and table.lists is None:
                self._centroids, self._table = lists.centroids, table.with_lists(lists.lists)
        return self._searcher

    def _stored_lists(self) -> StoredLists | None:
        if self._centroids is None or self._table.lists is None:
            return None
        return StoredLists(self._centroids, self._table.lists)

    def _of_labels(self, labels: Values) -> "DatastoreSearch":
        """The rows of some classes, searched exactly."""
        classes = as_whole_numbers(labels, "labels").unique()
        self.verify()
        known = self._filtered
        if known is not None and known.is_of(self, classes):
            return known.store
        part = self.subset(self._table.ids[torch.isin(self._table.labels, classes)])
        part._index, part._placement = part._choose_index(FLAT), self._placement
        table = self._table
        self._filtered = _Filtered(
            classes, table.ids, table.labels, self.mean, self._placement, part
        )
        return part


class DatastoreChanges(DatastoreSearch):
    """Changes the rows of a `Datastore`, and its index where it can follow."""

    def add(
        self,
        features: Tensor | NDArray,
        labels: Values,
        ids: Values | None = None,
        paths: Sequence[str] | None = None,
        *,
        split: str | Sequence[str] | None = None,
    ) -> Tensor:
        """Adds rows, all or none. The mean does not move; `recenter` moves it.

        Args:
            features: [M, D] raw features.
            labels: [M] whole numbers >= 0.
            ids: [M] unique whole numbers that the datastore does not have; None continues after the
                largest id.
            paths: [M] where each row's picture lies.
            split: of these rows, one for all or M; a datastore holds rows of one.

        Returns:
            [M] the ids of the new rows.

        Raises:
            ValueError: for bad features, labels or ids, an id that exists, or rows of another
                split; nothing is changed.
        """
        for name in {split} if isinstance(split, str) else set(split or ()):
            if name != self.source.get("split", ""):
                check_split(name, self.source)
        added = as_features(features, "features", self.dim)
        first = int(self.ids.max()) + 1 if len(self) else 0
        if ids is None and first + len(added) > torch.iinfo(torch.int64).max:
            raise ValueError("Expected `ids`, since no larger ones are left; pass unused ones.")
        numbers = torch.arange(first, first + len(added))
        if ids is not None:
            numbers = as_whole_numbers(ids, "ids")
        known = numbers[self._table.positions(numbers) >= 0]
        if len(known):
            raise ValueError(
                f"Expected `ids` that the datastore does not have, but it has {shown(known)}; "
                "remove them first or leave `ids` out."
            )
        row_labels, row_ids = check_row_numbers(
            as_whole_numbers(labels, "labels"), numbers, len(added)
        )
        new_paths = check_paths(paths, len(added))
        stored = to_storage(added, self._table.features.dtype)
        table = self._table.append(stored, row_labels, row_ids, new_paths, None)
        follows = self._searcher is not None and self._searcher.add(
            table.features, table.ids.numpy()
        )
        if follows and self._table.lists is not None:
            lists = np.concatenate([self._table.lists, self._lists_of_last(len(added))])
            table = dataclasses.replace(table, lists=lists)
        self._table, self._trusted = table, None
        requested = self._index.requested
        outgrown = (
            self._index.spec == FLAT
            and requested != FLAT
            and (self._choose_index(requested, fall_back=True).spec != FLAT)
        )
        if outgrown or not follows:
            self._drop_index()
        return row_ids

    def remove(self, ids: Values) -> None:
        """Removes rows, all or none; the next save holds no byte of them.

        Args:
            ids: [M] unique ids that the datastore has.

        Raises:
            ValueError: for an id that it does not have; nothing is changed.
        """
        rows = self._positions(ids)
        keep = torch.ones(len(self), dtype=torch.bool)
        keep[rows] = False
        self._table, self._trusted = self._table.keep(keep), None
        if self._searcher is not None and not self._searcher.remove(
            self._table.features, self._table.ids.numpy(), keep.numpy()
        ):
            self._drop_index()

    def relabel(self, ids: Values, labels: Values) -> None:
        """Gives rows other labels, all or none.

        Args:
            ids: [M] unique ids that the datastore has.
            labels: [M] whole numbers >= 0.

        Raises:
            ValueError: for an id that it does not have, or bad labels; nothing is changed.
        """
        rows = self._positions(ids)
        wanted = as_whole_numbers(labels, "labels")
        if len(wanted) != len(rows):
            raise ValueError(
                f"Expected one of `labels` per id ({len(rows)}), but got {len(wanted)}."
            )
        self._table = self._table.relabel(rows, wanted)

    def merge(self, other: DatastoreRows, *, renumber: bool = False) -> Tensor:
        """Adds all rows of another datastore, all or none. The mean does not move.

        Args:
            other: made by the same backbone, with the same metric and normalisation.
            renumber: give the new rows new ids instead of refusing ids that exist in both.

        Returns:
            The ids of the new rows.

        Raises:
            ValueError: for another width, metric, normalisation or backbone, or ids in both.
        """
        check_alike(self, other)
        ids = None if renumber else other.ids
        return self.add(other.features, other.labels, ids, other.paths)

    def recenter(self, mean: Tensor | None = None) -> None:
        """Sets the mean that `l2_centered` subtracts.

        Args:
            mean: [D] to go back to; None takes the mean of the present rows.

        Raises:
            ValueError: for a mean of another shape, or one that is not finite.
        """
        if mean is not None and (mean.shape != (self.dim,) or not bool(mean.isfinite().all())):
            raise ValueError(
                f"Expected `mean` to be {self.dim} finite numbers, but got shape "
                f"{tuple(mean.shape)}; leave it out for the mean of the present rows."
            )
        new = self._mean_of_rows() if mean is None else mean.detach().cpu().float().clone()
        self.mean, self._table, self._trusted = new, self._table.with_new_mean(), None
        self._drop_index()

    @contextmanager
    def changed(self) -> Iterator[Self]:
        """Another datastore of the same rows, to be changed within a `with`.

        This one keeps its rows, but not its index: that follows the change, and is built again here
        if somebody searches these rows once more.

        Yields:
            The other one; it shares what it does not change.
        """
        other = copy.copy(self)
        other._searcher, self._searcher = self._searcher, None
        try:
            yield other
        except BaseException:
            if other._table.ids is self._table.ids and other.mean is self.mean:
                self._searcher = other._searcher  # it was not changed yet
            raise

    def _mean_of_rows(self) -> Tensor:
        if not len(self):
            return torch.zeros(self.dim)
        order = self.ids.argsort().numpy()  # the same sum whatever the order of insertion
        total = np.zeros(self.dim)
        for start in range(0, len(order), 65_536):
            rows = self._table.features[order[start : start + 65_536]]
            total += rows.sum(axis=0, dtype=np.float64)
        return torch.from_numpy(total / len(order)).float()

    def _lists_of_last(self, count: int) -> Ints:
        """The lists of rows that the index has just taken in."""
        assert self._searcher is not None
        index, features = self._searcher.first_pass, self._searcher.features
        assert isinstance(index, FaissApproximate)
        added = features[len(features) - count : len(features)]
        return index.lists_of(self._searcher.space.index_rows(added))

    def _drop_index(self) -> None:
        """Forgets the index, which is built again, for the present number of rows, when needed."""
        self._searcher, self._centroids = None, None
        self._table = self._table.with_lists(None)
        self._index = self._choose_index(self._index.requested, fall_back=True)


LARGEST_VERIFIED_AT_ONCE = 256 * 2**20


_LOAD_ATTEMPTS = 10


class DatastoreFiles(DatastoreChanges):
    """Saves and opens the files of a `Datastore`."""

    def save(
        self, folder: str | Path, *, binding: Binding | None = None, reuse: Path | None = None
    ) -> Manifest:
        """Writes the datastore into a folder; `datastore.json`, renamed last, is the commit point.

        Only files whose rows changed are written; the others stay or are hard-linked.

        Args:
            folder: where to; created if needed, other files in it are left alone.
            binding: the checkpoint that the datastore belongs to.
            reuse: a further folder in which unchanged files may lie.

        Returns:
            The manifest that was written.

        Raises:
            OSError: if something could not be written; the version that was there is intact.
        """
        target = Path(folder).absolute()
        self.verify()
        if self._index.spec != FLAT and len(self):
            if self._searcher is not None and self._searcher.has_removed_rows:
                self._searcher = None  # no byte of a removed row may reach the disk
            self.build_index()  # its lists, or the index itself, are part of what is saved
        try:
            with exclusive_lock(target):
                target.mkdir(parents=True, exist_ok=True)
                places = [place for place in (reuse, self.home) if place is not None]
                manifest = write_datastore(target, self._contents(binding), places)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"Could not save the datastore to {folder}: {error}. The version that was there is "
                "intact; free space or choose another folder."
            ) from error
        pairs = zip(self._table.shards, manifest.blobs, strict=True)
        shards = [shard._replace(record=record) for shard, record in pairs]
        self._table = dataclasses.replace(self._table, shards=shards)
        return manifest

    @classmethod
    def load(
        cls, folder: str | Path, *, verify: str = "auto", trust_faiss_index: bool = False
    ) -> Self:
        """Opens a datastore; large ones are mapped into memory, not read.

        Args:
            folder: a folder written by `save`.
            verify: `full` checks every byte now; `auto` does so below 256 MB, and else before the
                first search.
            trust_faiss_index: read `datastore.faiss` instead of building the index again, which
                saves the time that a graph needs. Native code parses that file: say so only for
                files of your own.

        Raises:
            FileNotFoundError: if there is no datastore in the folder.
            DatastoreError: if a file is missing, damaged, or disagrees with the manifest.
            ValueError: for another `verify`.
        """

        def resolve(name: str) -> Path | None:
            path = Path(folder) / name
            return path if path.is_file() else None

        manifest_path = resolve(MANIFEST_NAME)
        if manifest_path is None:
            raise FileNotFoundError(
                f"Expected {folder} to hold a datastore, but it has no {MANIFEST_NAME}."
            )
        for attempt in range(_LOAD_ATTEMPTS):
            before = identity(manifest_path)
            try:
                store = cls.from_manifest(
                    Manifest.read(manifest_path), resolve, verify=verify,
                    trust_faiss_index=trust_faiss_index,
                )  # fmt: skip
            except (DatastoreError, FileNotFoundError):
                # a writer may have replaced the version that was being read
                if identity(manifest_path) == before or attempt + 1 == _LOAD_ATTEMPTS:
                    raise
            else:
                store.home = Path(folder).absolute()
                return store
        raise AssertionError("unreachable: the last attempt returns or raises")

    @classmethod
    def from_manifest(
        cls,
        manifest: Manifest,
        resolve: Resolve,
        *,
        verify: str = "auto",
        trust_faiss_index: bool = False,
    ) -> Self:
        """Opens the files that a manifest names.

        Args:
            manifest: the checked manifest.
            resolve: finds a file by name (in a folder, or in the Hub's cache); None if missing.
            verify: see `load`.
            trust_faiss_index: see `load`.

        Raises:
            DatastoreError: if a file is missing, damaged, or disagrees with the manifest.
        """
        if verify not in ("auto", "full"):
            raise ValueError(f"Expected `verify` to be 'auto' or 'full', but got {verify!r}.")
        size = sum(record.size for record in manifest.blobs)
        at_once = verify == "full" or size < LARGEST_VERIFIED_AT_ONCE
        opened = open_files(manifest, resolve)
        table = opened.table
        try:
            store = cls(
                table.features.parts[0][:0],
                table.labels[:0],
                table.ids[:0],
                opened.shared["mean"],
                metric=manifest.metric,
                normalization=manifest.normalization,
            )
        except ValueError as error:
            raise DatastoreError(f"The datastore is not usable: {error}") from error
        store.manifest, store.source = manifest, dict(manifest.source)
        store._index, store._table = manifest.index, table
        if is_rebuildable(manifest.index.spec):
            try:
                store._centroids = checked_centroids(opened, manifest)
            except DatastoreError:
                opened.verify()  # a damaged file is named before what it seems to say
                raise
        else:
            store._table = dataclasses.replace(table, lists=None)
        store._unverified = opened
        if trust_faiss_index:
            store._trusted = verified_faiss_file(manifest, resolve)
        if at_once:
            store.verify()
        return store

    def __getstate__(self) -> dict[str, Any]:
        """Rows that lie on disk as they are go to another process by their place, not by value."""
        state = self.__dict__ | {"_searcher": None, "_trusted": None, "_unverified": None}
        records = [shard.record for shard in self._table.shards]
        if self.home is None or None in records or records != blobs_in(self.home):
            self.verify()
            return state | {"_table": self._table}
        return state | {"_table": None, "_blobs": records}

    def __setstate__(self, state: dict[str, Any]) -> None:
        records = state.pop("_blobs", None)
        self.__dict__.update(state)
        if records is None:
            return
        if records != blobs_in(state["home"]):
            raise DatastoreError(
                f"Expected the datastore in {state['home']} to be the one that was pickled, but it "
                "is gone or was changed; pickle it again."
            )
        found = type(self).load(state["home"])
        self._table, self._unverified = found._table, found._unverified

    def _contents(self, binding: Binding | None) -> Contents:
        index = None if self._searcher is None else self._searcher.first_pass
        return Contents(
            self._table, self.mean, self._centroids, self.metric, self.normalization, self._index,
            index if isinstance(index, FaissApproximate) else None, binding, self.source,
        )  # fmt: skip


class Datastore(DatastoreFiles):
    """Rows of (features, label, id) that are searched by similarity.

    Rows are raw features, cast once on entry to the storage dtype; normalisation is applied to
    stored rows and queries alike when they are compared. The constructor takes checked parts: build
    with `from_features` or `load`.

    Args:
        features: [N, D] float16 or float32, CPU.
        labels: [N] int64, >= 0.
        ids: [N] int64, unique, >= 0.
        mean: [D] float32, subtracted by `l2_centered`.
        metric: `cosine` or `l2`.
        normalization: `l2_centered`, `l2` or `none`.
        index: `auto`, `flat` or a faiss factory string.
        paths: where each row's picture lies, relative to its dataset, if known.
        max_memory: what the index may take, such as `"2GB"`; None for no limit.
        min_recall: recall at 20 that an approximate index is set to reach.

    Attributes:
        mean: [D] float32.
        manifest: what was read from disk; None for a datastore built in memory.
        digest: fingerprint of the in-memory backbone that made the features, if known.
        source: dataset id, revision and split of the rows, as far as known.
        home: a folder whose files the next save hard-links where they did not change; None if there
            is none.

    Raises:
        ValueError: for parts that do not fit, with both numbers.
    """

    @classmethod
    def from_features(
        cls,
        features: Tensor | NDArray,
        labels: Values,
        ids: Values | None = None,
        metric: str = "cosine",
        normalization: str = "l2_centered",
        index: str = AUTO,
        paths: Sequence[str] | None = None,
        max_memory: str | int | None = None,
        min_recall: float = MIN_RECALL,
    ) -> Self:
        """Builds a datastore; fixes the mean that centring uses.

        Args:
            features: [N, D] raw features of any float dtype and device; stored as float16, or as
                float32 where float16 would lose too much (a message says so).
            labels: [N] whole numbers >= 0.
            ids: [N] unique whole numbers >= 0; None numbers the rows.
            metric: `cosine` (inner product of unit vectors) or `l2` (negative squared distance).
            normalization: `l2_centered` (subtract the mean of these rows, then length 1), `l2`
                (length 1) or `none`.
            index: `flat` searches exactly, `auto` does up to 100,000 rows and uses an inverted
                file above; or any faiss factory string.
            paths: [N] where each row's picture lies, relative to its dataset.
            max_memory: what the index may take, such as `"2GB"`; `auto` quantises to keep to it.
            min_recall: recall at 20 that an approximate index is set to reach, by measurement.

        Raises:
            ValueError: for NaN or infinite features (with the row numbers), shapes that disagree,
                negative, float or doubled ids or labels, or a bad option.
            ImportError: for a faiss index without faiss.
        """
        stored = to_storage(as_features(features, "features"), torch.float16)
        numbers = torch.arange(len(stored)) if ids is None else as_whole_numbers(ids, "ids")
        wanted, numbers = check_row_numbers(
            as_whole_numbers(labels, "labels"), numbers, len(stored)
        )
        store = cls(
            stored, wanted, numbers, torch.zeros(stored.shape[1]), metric=metric,
            normalization=normalization, index=index, paths=paths, max_memory=max_memory,
            min_recall=min_recall,
        )  # fmt: skip
        store.recenter()
        return store

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload datastore",
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        parent_commit: str | None = None,
    ) -> Any:
        """Pushes the datastore in one commit; files that did not change are not sent again.

        Args:
            repo_id: `org/name` of a repository of its own; made if it is not there. A datastore
                that belongs to a model goes with `model.push_to_hub`.
            commit_message: of the commit.
            private: whether a repository that is made is private.
            token: a token, or True for the one that is logged in.
            revision: a branch, made if it is not there.
            create_pr: open a pull request instead.
            parent_commit: the commit that the branch must be at; None is where it is now.

        Returns:
            `huggingface_hub.CommitInfo`.

        Raises:
            PushConflictError: if the branch moved on meanwhile; nothing was overwritten.
            ValueError: for the repository of a model.
        """
        target = PushTarget(repo_id, private, token, revision, create_pr, parent_commit).open()
        if target.holds(CONFIG_NAME):
            raise ValueError(
                f"Expected {target.repo_id} to be a repository of its own, but it holds a model; "
                "push the model with model.push_to_hub."
            )
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "store"
            self.save(folder)
            return target.push(folder, commit_message)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        token: bool | str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        subfolder: str = "",
        trust_faiss_index: bool = False,
    ) -> Self:
        """Opens the datastore of a folder or of a repository on the Hub, all of one revision.

        Args:
            name: a folder, or the Hub id of a datastore or of a model that has one.
            revision: a branch, tag or commit.
            token: a token, or True for the one that is logged in.
            cache_dir: where downloads are kept; None is the Hub's own cache.
            local_files_only: ask nobody, use what was downloaded.
            force_download: download again.
            subfolder: of the repository or folder.
            trust_faiss_index: see `load`.

        Raises:
            FileNotFoundError: if there is no datastore.
            DatastoreError: if a file is missing, damaged, or disagrees with the manifest.
            OSError: if there is no such repository or revision, or the download failed.
        """
        if Path(name).is_dir():
            return cls.load(Path(name) / subfolder, trust_faiss_index=trust_faiss_index)
        options = {
            "revision": revision, "token": token, "cache_dir": cache_dir, "subfolder": subfolder,
            "local_files_only": local_files_only, "force_download": force_download,
        }  # fmt: skip
        files = HubFiles(name, options)
        manifest = files.resolve(MANIFEST_NAME)
        if manifest is None:
            raise FileNotFoundError(
                f"Expected {name} to hold a datastore, but it has no {MANIFEST_NAME}."
            )
        return cls.from_manifest(
            Manifest.read(manifest), files.resolve, verify="full",
            trust_faiss_index=trust_faiss_index,
        )  # fmt: skip
