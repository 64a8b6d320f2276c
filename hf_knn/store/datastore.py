"""The memory of the classifier: rows of (features, label, id) that are searched by similarity."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.utils.logging import tqdm

from ..core.config import Normalization, check_metric
from ..core.frozen import Resolve
from ..core.lazy import Lock
from ..core.learned import LearnedMap, width_of
from ..core.manifest import Binding, IndexInfo, Manifest
from ..core.rows import Values, as_whole_numbers
from ..core.search import Neighbors, check_request
from ..core.votes import Metric
from . import changes, disk, row_files
from .backend import check_alike, check_split, even_parts
from .blocks import Block, Options, write_blocks
from .disk import Contents, OpenedFiles
from .hub import PushedAlone, find_manifest
from .index import MIN_RECALL, Placement, RowIndex
from .kinds import AUTO, FLAT
from .searcher import GrowingSearcher
from .table import RowTable, StoredRows, sum_of


class Datastore(PushedAlone):
    """Rows of (features, label, id) that are searched by similarity.

    Rows are raw features, cast once on entry to the storage dtype; normalisation (and a learned
    map, see `remap`) is applied to rows and queries alike when they are compared. The constructor
    takes checked parts: build with `from_features` or `load`.

    Where a method takes `ids`, they are [M] unique ids that it has, of any integer dtype; else a
    ValueError names them. A change is made whole or, with an error, not at all. Threads may search
    at once; a change needs the datastore for itself. Rows of files are hashed before they are first
    read; then a DatastoreError names the file that is damaged. Files of 256 MB and more are mapped,
    not read: they are hashed again before their rows go into other files.

    Args:
        features: [N, D] float16 or float32, CPU.
        labels: [N] int64, >= 0.
        ids: [N] int64, unique, >= 0.
        mean: [D] float32, subtracted by `l2_centered`.
        metric: `cosine` (inner product of unit vectors) or `l2` (negative squared distance).
        normalization: `l2_centered` (subtract the mean, then length 1), `l2` (length 1) or `none`.
        learned_map: that rows go through after centring and before scaling, or None.
        index: `flat` searches exactly; `auto` where that is as quick, else in an inverted file;
            `auto:latency` in a graph; or any faiss factory string (needs faiss: ImportError).
        paths: where each row's picture lies, relative to its dataset, if known.
        max_memory: what the index may take, such as `"2GB"`; `auto` quantises to keep to it.
        min_recall: recall at 20 that an approximate index is set to reach on rows and rows that
            were moved a little, by measurement; `index.recalls` says what others get.

    Attributes:
        mean: [D] float32.
        learned_map: as above.
        manifest: what was read from disk; None for a datastore built in memory.
        digest: fingerprint of the in-memory backbone that made the features, if known.
        source: dataset id, revision and split of the rows, as far as known.
        home: a folder whose files the next save hard-links where they did not change, or None.
        journal: None, see `RowStore`.

    Raises:
        ValueError: for parts that do not fit, with both numbers, or a bad option.
    """

    def __init__(
        self, features: Tensor, labels: Tensor, ids: Tensor, mean: Tensor, *,
        metric: str = Metric.COSINE, normalization: str = Normalization.L2_CENTERED,
        index: str = FLAT, paths: Sequence[str] | None = None,
        max_memory: str | int | None = None, min_recall: float = MIN_RECALL,
        learned_map: LearnedMap | None = None,
    ) -> None:  # fmt: skip
        check_metric(metric, normalization)
        self.metric, self.normalization, self.mean = str(metric), str(normalization), mean.float()
        self.manifest: Manifest | None = None
        self.digest: str | None = None
        self.source: dict[str, str] = {}
        self.home: Path | None = None
        self.journal: Path | None = None
        self._table: RowTable = changes.new_table(features, labels, ids, mean, paths)
        self.learned_map = changes.fitting_map(self._table, learned_map)
        width = width_of(learned_map, self.dim)
        self._index = RowIndex.chosen(index, len(self), width, max_memory, min_recall)
        self._lock = Lock()  # of what is done once: verifying, building, filtering
        self._unverified: OpenedFiles | None = None
        self._filtered: tuple[tuple[object, ...], tuple[object, ...], Datastore] | None = None

    @classmethod
    def from_features(
        cls, features: Tensor | NDArray, labels: Values, ids: Values | None = None,
        metric: str = "cosine", normalization: str = "l2_centered", index: str = AUTO,
        paths: Sequence[str] | None = None, max_memory: str | int | None = None,
        min_recall: float = MIN_RECALL,
    ) -> Self:  # fmt: skip
        """Builds a datastore; fixes the mean that centring uses. Options are those of the class.

        Features [N, D] of any float dtype and device are stored as float16, or as float32 where
        that would lose too much (a message says so). Labels, and ids if there are any, are [N]
        whole numbers >= 0. A ValueError says where they are not, with the row numbers.
        """
        parts = changes.stored_rows(features, labels, ids)
        store = cls(
            *parts, torch.zeros(parts[0].shape[1]), metric=metric, normalization=normalization,
            index=index, paths=paths, max_memory=max_memory, min_recall=min_recall,
        )  # fmt: skip
        store.mean = changes.mean_for(store._table, None)
        return store

    @classmethod
    def from_blocks(
        cls, blocks: Iterable[Block], folder: str | Path, **options: Unpack[Options]
    ) -> Self:
        """Builds a datastore in a folder, of rows that need not fit into memory.

        Each block is what `add` takes, and the options are those of `from_features`. The disk needs
        room for the rows twice. Rows of one list of the index lie beside each other: `ids` tells.
        """
        index = write_blocks(blocks, Path(folder), options)
        store = cls.load(folder)
        store._index = index
        store.save(folder)
        return store

    def __len__(self) -> int:
        return len(self._table.ids)

    def __repr__(self) -> str:
        return (
            f"Datastore({len(self)} x {self.dim} {self.dtype}, metric={self.metric!r}, "
            f"normalization={self.normalization!r}, index={str(self.index)!r}"
            + (f", learned_map={self.learned_map})" if self.learned_map else ")")
        )

    def __copy__(self) -> Self:
        other = object.__new__(type(self))  # with a searcher of its own: it is changed in place
        other.__dict__.update(self.__dict__)
        other._index, other._lock = other._index.unbuilt(), Lock()
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return copy.copy(self)  # rows are replaced, never written in place, so they can be shared

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
        return self._rows().features.joined()

    @property
    def labels(self) -> Tensor:
        """[N] int64."""
        return self._rows(searched=True).labels

    @property
    def ids(self) -> Tensor:
        """[N] int64."""
        return self._rows(searched=True).ids

    @property
    def paths(self) -> list[str] | None:
        """Where each row's picture lies, relative to its dataset; None if nobody said."""
        return self._rows().paths

    @property
    def index(self) -> IndexInfo:
        """Which index is used, with its parameters and measured recall once it was built."""
        return self._index.info

    @property
    def location(self) -> str | None:
        """Where the rows lie if not beside the model: None, they do."""
        return None

    @property
    def binding(self) -> Binding | None:
        """The checkpoint that the datastore was opened with, if any."""
        return None if self.manifest is None else self.manifest.binding

    @property
    def marks(self) -> tuple[object, ...]:
        """Objects that are replaced when rows, labels, mean or learned map change."""
        return self.ids, self.labels, self.mean, self.learned_map

    def rows(self, part: slice) -> StoredRows:
        """Some of the rows with all that is stored about them, by position, with step 1."""
        return changes.rows_at(self._rows(), part, self.source.get("split", ""))

    def blocks(self) -> Iterator[StoredRows]:
        """All rows with all that is stored about them, block by block; then a check of files."""
        for start in range(0, len(self), 8192):
            yield self.rows(slice(start, start + 8192))
        self._table.verify()  # afterwards: whoever read all rows has read those that were stored

    def rows_of(self, ids: Values) -> StoredRows:
        """Some of the rows, in the order of `ids`, with all that is stored about them."""
        table, split = self._rows(), self.source.get("split", "")
        return changes.rows_at(table, changes.find_rows(table, ids), split)

    def subset(self, ids: Values) -> Self:
        """A datastore of some of the rows, in the order of `ids`, with the same mean."""
        part = self._part(ids)
        self._table.verify()  # afterwards: what was copied is what was stored
        return part

    def _part(self, ids: Values) -> Self:
        rows = self.rows_of(ids)
        part = type(self)(
            *rows.tensors, self.mean, metric=self.metric, normalization=self.normalization,
            paths=None if self.paths is None else rows.paths, learned_map=self.learned_map,
        )  # fmt: skip
        part._index = self._index.on(Placement()).chosen_again(part._table)
        part.digest, part.source = self.digest, dict(self.source)
        return part

    def ids_labelled(self, label: int) -> Tensor:
        """[M] int64, the ids of the rows of one class."""
        return self.ids[self.labels == label]

    def label_beyond(self, classes: int) -> int | None:
        """The largest label, if it is >= classes; else None."""
        largest = int(self.labels.max()) if len(self) else -1
        return largest if largest >= classes else None

    def hash_sum(self) -> int:
        """The sum of the hashes of all rows, see `sum_of`; all are read."""
        return sum(sum_of(rows) for rows in self.blocks())

    def path_of(self, row_id: int) -> str:
        """Where the picture of a row lies; see `paths_of`."""
        return self.paths_of([row_id])[0]

    def paths_of(self, ids: Values) -> list[str]:
        """Where pictures lie, relative to their dataset; empty where nobody said."""
        return changes.paths_at(table := self._rows(), changes.find_rows(table, ids))

    def verify(self) -> None:
        """Hashes the files behind the rows and checks their content; mapped ones each time."""
        if self._unverified is None:
            self._table.verify()
        self._rows()

    def _rows(self, *, searched: bool = False) -> RowTable:
        """What is stored; if it is just searched, without paths, and hashed where it is read."""
        with self._lock:
            if self._unverified is not None and searched:
                self._unverified.read_searched()
            elif self._unverified is not None:
                self._table = self._table.with_paths(self._unverified.read_whole().paths)
                self._unverified = None
            return self._table.not_cut_off()

    def search(
        self, queries: Tensor | NDArray, k: int = 20, exclude_ids: Values | None = None, *,
        labels: Values | None = None, split: str | None = None,
    ) -> Neighbors:  # fmt: skip
        """Finds the k nearest rows of each query.

        Args:
            queries: [B, D] finite raw features of any float dtype and device.
            k: how many, >= 1; fewer rows give fewer neighbours.
            exclude_ids: [B] int64; the row with that id is not a neighbour of that query (-1 =
                none): leave-one-out by id, whatever else lies at the same place.
            labels: only rows of these classes are neighbours, searched exactly; None for all.
            split: the rows' split, if it must be a certain one; a datastore holds one.

        Returns:
            Neighbors [B, min(k, N)], or [B, min(k, N - 1)] with `exclude_ids`, where the queries
            are, by similarity (compared in float64), then id; N counts the rows of `labels`. Exact
            for `flat`; other indexes may miss some, see `index.recall`.

        Raises:
            ValueError: for NaN or infinite queries (with the row numbers), another width, k < 1,
                exclude_ids of another length, or a split that the rows are not of.
        """
        check_split(split, self.source)
        store = self if labels is None else self._of_labels(labels)
        return store.nearest(queries, k, exclude_ids).rounded(queries)

    def nearest(
        self, queries: Tensor | NDArray, k: int, exclude_ids: Values | None = None
    ) -> Neighbors:
        """The answer of `search` in float64, on the CPU, for those who merge several."""
        wanted = check_request(queries, k, exclude_ids, self.dim)
        shape = (len(wanted.queries), wanted.width(len(self)))
        similarities, positions = np.zeros(shape), np.zeros(shape, np.int64)
        if 0 not in shape:
            searcher = self.build_index()
            similarities, positions = searcher.search(wanted.queries, shape[1], wanted.excluded)
        rows, table = torch.from_numpy(positions), self._rows(searched=True)
        return Neighbors(torch.from_numpy(similarities), table.labels[rows], table.ids[rows])

    def leave_one_out(
        self, k: int = 20, batch_size: int = 4096, *, progress: bool = False
    ) -> Iterator[Neighbors]:
        """The neighbours of each row among the others, in row order, chunk by chunk."""
        table = self._rows(searched=True)  # the rows of now, whatever is changed between two chunks
        with tqdm(total=len(table), unit=" rows", desc="neighbours", disable=not progress) as bar:
            for part in even_parts(len(table), -(-len(table) // batch_size)):
                yield self.search(table.features[part], k, table.ids[part])
                bar.update(len(table.ids[part]))

    def to(
        self, device: str | torch.device | Sequence[str | torch.device], *, float16: bool = False
    ) -> Self:
        """Chooses where searches run: `cpu`, `cuda`, `cuda:1`, `mps`, …, or several of one kind.

        Answers stay the same: candidates are compared on the CPU in float64. Several devices share
        the rows; an inverted file goes to faiss-gpu where that is installed. `float16` keeps half
        of the memory there. A device that is not here is a ValueError.
        """
        self._index = self._index.on(Placement.of(device, float16))
        return self

    def build_index(self) -> GrowingSearcher:
        """Builds the index now, not at the first search; a ValueError if these rows allow none."""
        with self._lock:
            table = self._rows(searched=True)
            if self._index.searcher is None:
                facts = (self.mean.double().numpy(), self.metric, self.normalization)
                self._index, self._table = self._index.built(table, (*facts, self.learned_map))
            assert self._index.searcher is not None
            return self._index.searcher

    def _of_labels(self, labels: Values) -> "Datastore":
        """The rows of some classes, searched exactly."""
        classes = as_whole_numbers(labels, "labels").unique()
        with self._lock:
            table, marks = self._rows(), self.marks
            key = (*map(id, marks), self._index.placement, *classes.tolist())
            if self._filtered is None or self._filtered[0] != key:
                part = self._part(table.ids[torch.isin(table.labels, classes)])
                part._index = self._index.exact()
                self._filtered = (key, marks, part)  # as long as a mark is kept, nobody has its id
            return self._filtered[2]

    def add(
        self, features: Tensor | NDArray, labels: Values, ids: Values | None = None,
        paths: Sequence[str] | None = None,
    ) -> Tensor:  # fmt: skip
        """Adds rows; returns their ids [M]. The mean does not move; `recenter` moves it.

        Features are raw [M, D]; all rows become float32, with a message, where float16 would lose
        too much of these. Labels are [M] whole numbers >= 0, ids [M] unused ones (None continues
        after the largest), paths say where each of M pictures lies.
        """
        before, new = self._rows(), (features, labels, ids, paths)
        table = changes.add_rows(before, *new, self.mean, self.learned_map)
        self._index, self._table = self._index.after_adding(before, table)
        return table.ids[len(before) :]

    def put_back(self, rows: StoredRows) -> Tensor:
        """Adds rows that were removed, as `rows_of` found them before; returns their ids."""
        return self.add(*rows.tensors, rows.paths if any(rows.paths) else None)

    def merge(self, other: "Datastore", *, renumber: bool = False) -> Tensor:
        """Adds all rows of another one; a ValueError names what is not alike, or ids of both."""
        check_alike(self, other)
        new = other._rows().in_memory()
        return self.add(new.features.joined(), new.labels, None if renumber else new.ids, new.paths)

    def remove(self, ids: Values) -> None:
        """Removes rows; the next save holds no byte of them, nor the cache of this user then."""
        kept = changes.all_but(self._rows(), ids)
        table = self._table.keep(kept)
        self._index, self._table = self._index.after_removing(table, kept.numpy())

    def relabel(self, ids: Values, labels: Values) -> None:
        """Gives rows other labels, [M] whole numbers >= 0, else a ValueError."""
        self._table = changes.relabel_rows(self._rows(), ids, labels)

    def recenter(self, mean: Tensor | None = None) -> None:
        """Sets the mean [D] that `l2_centered` subtracts; None takes that of the present rows."""
        self.mean = changes.moved_mean(self._rows(), mean, self.learned_map)
        self._index, self._table = self._index.forgotten(self._table.with_new_first_file())

    def remap(self, weight: Tensor | None) -> None:
        """Sets the learned map [E, D] that rows go through, see `LearnedMap`; None removes it."""
        self.learned_map = changes.new_map(self._rows(), self.mean, weight)
        self._index = self._index.of_width(width_of(self.learned_map, self.dim))
        self._index, self._table = self._index.forgotten(self._table.with_new_first_file())

    @contextmanager
    def changed(self) -> Iterator[Self]:
        """Another one of the same rows, to be changed: an index that stands moves there."""
        other, index = copy.copy(self), self._index
        other._index, self._index = index, other._index
        try:
            yield other
        except BaseException:
            if other._index is index:  # it was not changed yet
                self._index = index
            raise

    def save(
        self, folder: str | Path, *, binding: Binding | None = None, reuse: Path | None = None
    ) -> Manifest:
        """Writes the datastore into a folder; returns the manifest, which is renamed last.

        The folder is created if needed, and other files in it are left alone. Only files whose rows
        changed are written; the others stay, or are hard-linked from there or from `reuse`. An
        OSError says that something could not be written, a DatastoreError that a mapped file
        changed on disk; then the version that was there is intact.
        """
        if len(self._rows()) and disk.needs_index(self._table, self._index):
            self._index = self._index.ready_to_save()
            self.build_index()  # its lists, or the index itself, are part of what is saved
        compared = (self.mean, self.metric, self.normalization, self.learned_map)
        contents = Contents(self._table, *compared, self._index, binding, self.source)
        manifest = disk.write_datastore(Path(folder), contents, [reuse, self.home])
        self._table = self._table.with_records(manifest.blobs)
        return manifest

    @classmethod
    def load(
        cls, folder: str | Path, *, verify: str = "auto", trust_faiss_index: bool = False
    ) -> Self:
        """Opens the datastore of a folder; large ones are mapped into memory, not read.

        `verify="full"` checks every byte now; `auto` does so below 256 MB, and else before the
        first search. `trust_faiss_index` reads `datastore.faiss`, and builds any index that the
        folder names: native code parses that file, so say so only for files of your own. A
        FileNotFoundError says that there is no datastore, a DatastoreError that a file is missing,
        damaged, or disagrees with the manifest.
        """
        opened = partial(cls.from_manifest, verify=verify, trust_faiss_index=trust_faiss_index)
        store = disk.open_newest(Path(folder), opened)
        store.home = Path(folder).absolute()
        return store

    @classmethod
    def from_manifest(
        cls, manifest: Manifest, resolve: Resolve, *, verify: str = "auto",
        trust_faiss_index: bool = False,
    ) -> Self:  # fmt: skip
        """Opens the files that a checked manifest names, found by `resolve`; see `load`."""
        at_once = disk.is_hashed_at_once(manifest, verify)
        opened = disk.open_files(manifest, resolve, trust_faiss_index=trust_faiss_index)
        store = cls(
            *opened.no_rows, torch.zeros(manifest.dim), metric=manifest.metric,
            normalization=manifest.normalization, learned_map=opened.learned_map,
        )  # fmt: skip
        store.manifest, store.source, store.mean = manifest, dict(manifest.source), opened.mean
        store._table, store._unverified = opened.table, opened
        store._index = store._index.read(*opened.of_index)
        if at_once:
            store.verify()
        return store

    def __getstate__(self) -> dict[str, Any]:
        """Rows that lie on disk as they are go to another process by their place, not by value."""
        state = {"_index": self._index.unopened(), "_unverified": None, "_filtered": None}
        if row_files.lies_in(self.home, records := [shard.record for shard in self._table.shards]):
            return self.__dict__ | state | {"_table": None, "_records": records}
        return self.__dict__ | state | {"_table": self._rows().in_memory()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        records = state.pop("_records", None)
        self.__dict__.update(state)
        if records is not None:
            found = type(self).load(row_files.place_of(self.home, records))
            self._table, self._unverified = found._table, found._unverified

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, revision: str | None = None, token: bool | str | None = None,
        cache_dir: str | Path | None = None, local_files_only: bool = False,
        force_download: bool = False, subfolder: str = "", trust_faiss_index: bool = False,
    ) -> Self:  # fmt: skip
        """Opens the datastore of a folder or of a repository on the Hub, all of one revision.

        The name is a folder, or the Hub id of a datastore or of a model that has one; the options
        are those of `from_pretrained` of transformers, and `trust_faiss_index` that of `load`. An
        OSError says that there is no such repository or revision, or that the download failed.
        """
        if Path(name).is_dir():
            return cls.load(Path(name) / subfolder, trust_faiss_index=trust_faiss_index)
        found = find_manifest(name, {
            "revision": revision, "token": token, "cache_dir": cache_dir, "subfolder": subfolder,
            "local_files_only": local_files_only, "force_download": force_download,
        })  # fmt: skip
        return cls.from_manifest(*found, verify="full", trust_faiss_index=trust_faiss_index)
