"""A datastore whose rows lie in Milvus: the same rows, ids and answers as an embedded one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.utils.logging import tqdm

from ..core.manifest import Binding, IndexInfo
from ..core.rows import Values
from ..core.search import Neighbors, check_request
from ..store.backend import even_parts
from ..store.datastore import Datastore
from ..store.index import MIN_RECALL
from ..store.kinds import FLAT
from ..store.remote import (
    DatastoreReference,
    RemoteConsent,
    check_uri,
    read_reference,
    token_of,
    write_reference,
)
from ..store.table import StoredRows
from . import changes, load
from .about import About
from .collection import ROW_FIELDS, MilvusCollection, decode_rows, rows_per_call
from .kinds import tuned
from .pending import write_pending
from .search import rows_where, search_collection
from .server import PATIENCE, TIMEOUT, MilvusServer, check_exists

_PAGE = 16_384


class MilvusDatastore:
    """Rows of (features, label, id) in a collection of Milvus, searched exactly by default.

    Milvus (Lite, Standalone or Distributed, by the address) proposes candidates, which are compared
    here in float64: with `index="flat"` the answers are those of `Datastore` with the same rows; an
    approximate index may miss some, see `index.recall`. The constructor takes ready parts: build
    with `from_datastore`, open with `connect` or `open`.

    There should be one writer at a time: a change that finds another one's is refused. A change
    that a kill or a lost connection interrupts leaves the collection marked, and it is not opened
    until `recover=True` accepts the rows that are there.

    Args:
        collection: a whole one.
        about: the record about it.

    Attributes:
        metric: `cosine` or `l2`.
        normalization: `l2_centered`, `l2` or `none`.
        mean: [D] float32, subtracted by `l2_centered`.
        learned_map: that rows and queries go through, or None.
        digest: fingerprint of the in-memory backbone that made the features, if known.
        source: dataset id, revision and split of the rows that were loaded, as far as known.
        home: a folder; nothing in it is reused.
        binding: the checkpoint that it was opened with, if any.
        journal: a file that says, from before a change until somebody removes it, how it is taken
            back; None writes none.
    """

    def __init__(self, collection: MilvusCollection, about: About) -> None:
        self.collection, self._about = collection, about
        self._space = load.space_of(collection, about)
        self._counts: dict[str, int] = {"": about.count}
        self.metric, self.normalization = about.metric, about.normalization
        self.mean, self.source = about.mean, dict(about.source)
        self.learned_map = self._space.learned
        self.digest: str | None = None
        self.home: Path | None = None
        self.binding: Binding | None = None
        self.journal: Path | None = None
        self._reversal: changes.Reversal | None = None

    @classmethod
    def from_datastore(
        cls,
        store: Datastore,
        uri: str,
        collection: str,
        *,
        token: str | None = None,
        timeout: float = TIMEOUT,
        patience: float = PATIENCE,
        batch_size: int = load.BATCH_ROWS,
        progress: bool = True,
        index: str = FLAT,
        min_recall: float = MIN_RECALL,
    ) -> Self:
        """Loads the rows of an embedded datastore; called again, it goes on where it was stopped.

        Args:
            store: the datastore; it stays as it is.
            uri: `http://host:19530` (Standalone and Distributed), or a path that ends in `.db`,
                which Milvus Lite serves in this process.
            collection: name for the rows; a second one, `<name>_about`, holds the record of them.
            token: of the server, `user:password` or an API key; None takes `MILVUS_TOKEN`.
            timeout: seconds that one try of a call may take.
            patience: seconds for which a call is tried again.
            batch_size: rows per call, >= 1; fewer where rows are wide.
            progress: show a progress bar.
            index: `flat` (exact), `ivf_flat`, `ivf_sq8`, `hnsw`, `hnsw_sq` or `autoindex` (what
                the server chooses); on a server, which Milvus Lite is not, also `scann`,
                `ivf_rabitq` (Milvus 2.6) and `ivf_rabitq_fastscan` (3.0).
            min_recall: an approximate index is searched as hard as this recall at 20 takes,
                measured on some rows and on rows moved a little; in (0, 1].

        Raises:
            ImportError: without pymilvus (`pip install hf-knn[milvus]`).
            ValueError: for a bad argument, a collection that holds other rows, or an index that
                does not reach `min_recall`; then the collection is not whole.
            DatastoreError: if what was read back is not what was written.
            DatastoreConnectionError: if the server does not answer; call again to go on.
        """
        plan = load.LoadPlan(index, min_recall, batch_size, progress)
        place = MilvusCollection(MilvusServer(uri, token_of(token), timeout, patience), collection)
        load.load_rows(store, place, plan)
        loaded = cls(place, load.open_whole(place))
        loaded.digest, loaded.binding = store.digest, store.binding
        return loaded

    @classmethod
    def connect(
        cls,
        uri: str,
        collection: str,
        *,
        token: str | None = None,
        timeout: float = TIMEOUT,
        patience: float = PATIENCE,
        recover: bool = False,
    ) -> Self:
        """Opens a collection that `from_datastore` made.

        Args:
            uri: see `from_datastore`.
            collection: see `from_datastore`.
            token: see `from_datastore`.
            timeout: see `from_datastore`.
            patience: see `from_datastore`.
            recover: True counts the rows of a collection anew whose change was interrupted, and
                takes what is there.

        Raises:
            ImportError: without pymilvus.
            DatastoreError: if there is no such datastore, or it is not whole, with the numbers.
            DatastoreConnectionError: if the server does not answer.
            FileNotFoundError: for a local file that is not there.
        """
        address = check_exists(check_uri(uri))
        server = MilvusServer(address, token_of(token), timeout, patience)
        place = MilvusCollection(server, collection)
        return cls(place, load.open_whole(place, recover))

    @classmethod
    def open(
        cls,
        reference: DatastoreReference | str | Path,
        consent: RemoteConsent | None = None,
        *,
        trust_remote_datastore: bool = False,
        uri: str | None = None,
        token: str | None = None,
        timeout: float = TIMEOUT,
        patience: float = PATIENCE,
    ) -> Self:
        """Opens what the `datastore.json` of a checkpoint refers to, if it is still that.

        Args:
            reference: the reference, or the folder with it.
            consent: what the next three say, as one; instead of them.
            trust_remote_datastore: ask the server that the reference names, whatever it is.
            uri: ask this one instead; None takes `HF_KNN_MILVUS_URI`, if that is set.
            token: of the server; that of `MILVUS_TOKEN` goes only where the user said.
            timeout: see `from_datastore`.
            patience: see `from_datastore`.

        Raises:
            ImportError: without pymilvus.
            ValueError: without consent, or with two.
            DatastoreError: for other rows than the reference names, with both numbers.
            DatastoreConnectionError: if the server does not answer.
        """
        own = RemoteConsent(trust_remote_datastore, uri, token)
        if consent is not None and own != RemoteConsent():
            raise ValueError(
                "Expected `consent` alone, but got trust_remote_datastore, uri or token beside it."
            )
        if not isinstance(reference, DatastoreReference):
            reference = read_reference(Path(reference))
        address, secret = (consent or own).place_of(reference)
        server = MilvusServer(check_exists(address), secret, timeout, patience)
        place = MilvusCollection(server, reference.collection)
        store = cls(place, load.open_named(place, reference))
        store.binding = reference.binding
        return store

    def __len__(self) -> int:
        return self._about.count

    def __repr__(self) -> str:
        return (
            f"MilvusDatastore({len(self)} x {self.dim} {self.dtype}, metric={self.metric!r}, "
            f"normalization={self.normalization!r}, {self.collection}"
            + (f", learned_map={self.learned_map})" if self.learned_map else ")")
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # the rows are in one place, whoever asks

    @property
    def dim(self) -> int:
        """Width of a row (D)."""
        return self._about.dim

    @property
    def dtype(self) -> str:
        """Storage dtype, `float16` or `float32`."""
        return self._about.dtype

    @property
    def index(self) -> IndexInfo:
        """How it is searched, with the recall that was measured when the rows were loaded."""
        about, name = self._about, self._about.index.lower()
        parameters = tuned(about.index, about.effort)
        return IndexInfo(name, name, parameters, about.recall, about.measured_on, about.recalls)

    @property
    def location(self) -> str | None:
        """Where the rows lie, in words."""
        return f"{self.collection} (Milvus)"

    @property
    def fingerprint(self) -> str:
        """Of all rows, the mean, and how they are compared; 64 hexadecimal digits."""
        return self._about.fingerprint

    @property
    def features(self) -> Tensor:
        """[N, D] the stored raw features, in the order of the ids; all rows are read."""
        parts = [rows.features for rows in self.blocks()]
        return torch.from_numpy(np.concatenate([np.empty((0, self.dim), self.dtype), *parts]))

    @property
    def labels(self) -> Tensor:
        """[N] int64, in the order of the ids; read from the server."""
        return torch.tensor(self._column("label"), dtype=torch.int64)

    @property
    def ids(self) -> Tensor:
        """[N] int64, ascending; read from the server."""
        return torch.tensor(self._column("id"), dtype=torch.int64)

    @property
    def paths(self) -> list[str] | None:
        """Where each row's picture lies, in the order of the ids; None if nobody said."""
        return self._column("path") if self._about.has_paths else None

    def blocks(self, split: str | None = None) -> Iterator[StoredRows]:
        """All rows, or those of one split, in the order of their ids, message by message."""
        where = rows_where(None, split)
        for page in self.collection.pages(ROW_FIELDS, where, rows_per_call(self.dim, 4096)):
            yield decode_rows(page, self._about)

    def rows_of(self, ids: Values) -> StoredRows:
        """Some of the rows, in the order wanted.

        Args:
            ids: [M] unique ids that the datastore has; another one is a ValueError.
        """
        return decode_rows(changes.rows_with(self.collection, ids), self._about)

    def subset(self, ids: Values) -> Datastore:
        """An embedded datastore of some of the rows, with the same mean.

        Args:
            ids: see `rows_of`.
        """
        return self._embedded([self.rows_of(ids)])

    def ids_labelled(self, label: int) -> Tensor:
        """[M] int64, the ids of the rows of one class, ascending."""
        return torch.tensor(self._column("id", f"label == {int(label)}"), dtype=torch.int64)

    def hash_sum(self) -> int:
        """The sum of the hashes of all rows, see `sum_of`, as the record says it."""
        return self._about.total

    @property
    def marks(self) -> tuple[About, ...]:
        """Objects that are replaced when rows, labels or mean change."""
        return (self._about,)

    def label_beyond(self, classes: int) -> int | None:
        """A label >= the number of classes that a row has; None if there is none."""
        for page in self.collection.pages(["label"], f"label >= {int(classes)}"):
            return int(page[0]["label"])
        return None

    def path_of(self, row_id: int) -> str:
        """Where the picture of a row lies, relative to its dataset; empty if not known."""
        return self.paths_of([row_id])[0]

    def paths_of(self, ids: Values) -> list[str]:
        """Where the pictures of some rows lie, asked for at once.

        Args:
            ids: see `rows_of`.
        """
        return [str(row["path"]) for row in changes.rows_with(self.collection, ids, ["id", "path"])]

    def verify(self) -> None:
        """Reads all rows; a DatastoreError, with both numbers, if some were lost or changed."""
        load.check_content(self.collection, self._about)

    def to_datastore(self, *, split: str | None = None, index: str = FLAT) -> Datastore:
        """An embedded datastore of the rows, in the order of their ids, with the same mean.

        Args:
            split: only rows of this one; None for all.
            index: of the embedded one, see `Datastore.from_features`.
        """
        store = self._embedded(list(self.blocks(split)), index)
        if split is not None:
            store.source["split"] = split
        return store

    def search(
        self,
        queries: Tensor | NDArray,
        k: int = 20,
        exclude_ids: Values | None = None,
        *,
        labels: Values | None = None,
        split: str | None = None,
    ) -> Neighbors:
        """Finds the k nearest rows of each query, as `Datastore.search` does.

        Raises:
            ValueError: see `Datastore.search`.
            DatastoreError: if rows went missing meanwhile, or are not what the record says.
            DatastoreConnectionError: if the server does not answer.
        """
        wanted = check_request(queries, k, exclude_ids, self.dim)
        if split is not None and not self._count(rows_where(None, split)):
            raise ValueError(
                f"Expected `split` to be one that the datastore has, but no row of "
                f"{self.collection} is of {split!r}."
            )
        where = rows_where(labels, split)
        width, normalized = wanted.width(self._count(where)), self._space.normalize(wanted.queries)
        found = search_collection(
            self.collection, self._about, self._space, normalized, width, wanted.excluded, where
        )
        return Neighbors(*(torch.from_numpy(values) for values in found)).rounded(queries)

    def leave_one_out(
        self, k: int = 20, batch_size: int = 4096, *, progress: bool = False
    ) -> Iterator[Neighbors]:
        """The neighbours of each stored row among the others, in the order of the ids."""
        with tqdm(total=len(self), unit=" rows", desc="neighbours", disable=not progress) as bar:
            for rows in self.blocks():
                for part in even_parts(len(rows.ids), -(-len(rows.ids) // batch_size)):
                    yield self.search(rows.features[part], k, rows.ids[part])
                bar.update(len(rows.ids))

    def add(
        self,
        features: Tensor | NDArray,
        labels: Values,
        ids: Values | None = None,
        paths: Sequence[str] | None = None,
        *,
        split: str | Sequence[str] | None = None,
    ) -> Tensor:
        """Adds rows, as `Datastore.add` does; the mean does not move.

        Without `ids` rows take numbers that no row ever had. A split may be one for all or M;
        without, it is that of the rows that were loaded.

        Raises:
            ValueError: for bad features, labels or ids, an id that exists, or rows that do not fit
                the collection; nothing is changed.
            DatastoreConnectionError: if the server does not answer; see the class about a change
                that was interrupted.
        """
        own = self.source.get("split", "") if split is None else split
        change = changes.rows_to_add(
            self.collection, self._about, features, labels, ids, paths, own
        )
        self._make(change)
        return torch.from_numpy(change.new.ids)

    def remove(self, ids: Values) -> None:
        """Removes rows, as `Datastore.remove` does; their bytes go when Milvus next compacts."""
        self._make(changes.rows_to_remove(self.collection, self._about, ids))

    def relabel(self, ids: Values, labels: Values) -> None:
        """Gives rows other labels, as `Datastore.relabel` does."""
        self._make(changes.rows_to_relabel(self.collection, self._about, ids, labels))

    def put_back(self, rows: StoredRows) -> Tensor:
        """Adds rows that were removed, with paths and splits; [M] their ids."""
        paths = rows.paths if any(rows.paths) else None
        return self.add(rows.features, rows.labels, rows.ids, paths, split=rows.splits)

    def recenter(self, mean: Tensor | None = None) -> None:
        """A ValueError that says what to do: every row would have to be written again."""
        raise ValueError(
            f"Expected the mean of the rows in {self.location} to stay, since every one would be "
            "written again; bring them home (model.datastore.to_datastore()) and load a new "
            "collection."
        )

    @contextmanager
    def changed(self) -> Iterator[Self]:
        """This datastore, to be changed; a failure takes its change back, unless a journal has it.

        Rows lie in one place for all. A DatastoreError says that somebody else changed them since,
        a DatastoreConnectionError that the server does not answer.
        """
        before = self._about
        try:
            yield self
        except BaseException:
            if self._about is not before and self.journal is None and self._reversal is not None:
                changes.take_back(self.collection, self._reversal)
                self._take(before)
                self._reversal = None
            raise

    def reference(self, binding: Binding | None = None) -> DatastoreReference:
        """What a checkpoint, whose binding is given, keeps instead of the rows."""
        about = self._about
        return DatastoreReference(
            self.collection.server.uri, self.collection.name, about.count, about.fingerprint,
            about.dim, about.dtype, about.metric, about.normalization, binding, dict(self.source),
            learned_map=about.learned_map or None,
        )  # fmt: skip

    def save(
        self, folder: str | Path, *, binding: Binding | None = None, reuse: Path | None = None
    ) -> DatastoreReference:
        """Writes a reference to the collection: address and name, never a token, never rows.

        Args:
            folder: where to; created if needed.
            binding: the checkpoint that the datastore belongs to.
            reuse: not needed, since there are no files.

        Raises:
            OSError: if it could not be written; the version that was there is intact.
        """
        reference = self.reference(binding)
        write_reference(Path(folder).absolute(), reference)
        return reference

    def drop(self) -> None:
        """Removes the rows and their record from the server, for good."""
        self.collection.drop()

    def close(self) -> None:
        """Closes the connection; the rows stay where they are."""
        self.collection.server.close()

    def _embedded(self, parts: list[StoredRows], index: str = FLAT) -> Datastore:
        store = load.bring_home(parts, self._about, self.learned_map, index)
        store.digest, store.source = self.digest, dict(self.source)
        return store

    def _make(self, change: changes.RowChange) -> None:
        changes.check_unchanged(self.collection, change.before)
        if self.journal is not None:
            write_pending(self.journal, self.collection.server.uri, change.reversal)
        changes.make_change(self.collection, change)
        self._take(change.after)
        self._reversal = change.reversal

    def _column(self, name: str, where: str = "") -> list[Any]:
        pages = self.collection.pages(["id", name], where, _PAGE)
        return [row[name] for page in pages for row in page]

    def _count(self, where: str) -> int:
        if where not in self._counts:
            self._counts[where] = self.collection.count(where)
        return self._counts[where]

    def _take(self, after: About) -> None:
        self._about, self._counts = after, {"": after.count}
