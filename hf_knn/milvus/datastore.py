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

from ..core.manifest import (
    BLOB_PATTERN,
    FAISS_NAME,
    MANIFEST_NAME,
    Binding,
    DatastoreError,
    IndexInfo,
)
from ..core.rows import Values, as_whole_numbers
from ..core.search import Neighbors, check_request
from ..store.backend import Hits
from ..store.datastore import Datastore
from ..store.folders import exclusive_lock, write_durably
from ..store.index import FLAT, MIN_RECALL
from ..store.remote import DatastoreReference, RemoteConsent, check_uri, read_manifest, token_of
from ..store.table import StoredRows
from .changes import (
    Reversal,
    RowChange,
    check_unchanged,
    make_change,
    rows_to_add,
    rows_to_relabel,
    rows_to_remove,
    rows_with,
    take_back,
)
from .collection import (
    ROW_FIELDS,
    About,
    MilvusCollection,
    decode_rows,
    effort_name,
    index_of,
    rows_per_call,
)
from .load import BATCH_ROWS, check_content, load_rows, open_whole, space_of
from .pending import write_pending
from .search import search_collection
from .server import PATIENCE, TIMEOUT, MilvusServer, check_exists

_PAGE = 16_384


class MilvusReading:
    """The rows of a collection and the record about them, see `MilvusDatastore`.

    Args:
        collection: a whole one.
        about: the record about it.
    """

    def __init__(self, collection: MilvusCollection, about: About) -> None:
        self.collection, self._about = collection, about
        self._space = space_of(about)
        self._counts: dict[str, int] = {"": about.count}
        self.metric, self.normalization = about.metric, about.normalization
        self.mean, self.source = about.mean, dict(about.source)
        self.digest: str | None = None
        self.home: Path | None = None
        self.binding: Binding | None = None

    def __len__(self) -> int:
        return self._about.count

    def __repr__(self) -> str:
        return (
            f"MilvusDatastore({len(self)} x {self.dim} {self.dtype}, metric={self.metric!r}, "
            f"normalization={self.normalization!r}, {self.collection})"
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
        effort = effort_name(about.index)
        return IndexInfo(name, name, {effort: about.effort} if effort else {}, about.recall)

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
        """All rows in the order of their ids, block by block.

        Args:
            split: only rows of this one; None for all.

        Yields:
            The next rows, as many as fit into one message.
        """
        where = rows_where(None, split)
        for page in self.collection.pages(ROW_FIELDS, where, rows_per_call(self.dim, 4096)):
            yield decode_rows(page, self._about)

    def rows_of(self, ids: Values) -> StoredRows:
        """Some of the rows, in the order wanted.

        Args:
            ids: [M] unique ids that the datastore has.

        Raises:
            ValueError: for an id that it does not have.
        """
        return decode_rows(rows_with(self.collection, ids), self._about)

    def subset(self, ids: Values) -> Datastore:
        """An embedded datastore of some of the rows, with the same mean.

        Args:
            ids: [M] unique ids that the datastore has, in the order wanted.

        Raises:
            ValueError: for an id that it does not have.
        """
        return self._embedded([self.rows_of(ids)], FLAT)

    def ids_labelled(self, label: int) -> Tensor:
        """[M] int64, the ids of the rows of one class, ascending.

        Args:
            label: of the class.
        """
        return torch.tensor(self._column("id", f"label == {int(label)}"), dtype=torch.int64)

    def hash_sum(self) -> int:
        """The sum of the hashes of all rows, see `sum_of`, as the record says it."""
        return self._about.total

    @property
    def marks(self) -> tuple[Any, ...]:
        """Objects that are replaced when rows, labels or mean change."""
        return (self._about,)

    def label_beyond(self, classes: int) -> int | None:
        """A label >= classes that a row has; None if there is none.

        Args:
            classes: how many classes there are.
        """
        for page in self.collection.pages(["label"], f"label >= {int(classes)}"):
            return int(page[0]["label"])
        return None

    def path_of(self, row_id: int) -> str:
        """Where the picture of a row lies, relative to its dataset; empty if not known.

        Args:
            row_id: an id that the datastore has.

        Raises:
            ValueError: for an id that it does not have.
        """
        return self.paths_of([row_id])[0]

    def paths_of(self, ids: Values) -> list[str]:
        """Where the pictures of some rows lie, asked for at once; see `path_of`.

        Args:
            ids: [M] unique ids that the datastore has.

        Raises:
            ValueError: for an id that it does not have.
        """
        return [str(row["path"]) for row in rows_with(self.collection, ids, ["id", "path"])]

    def verify(self) -> None:
        """Reads all rows and compares them with the fingerprint.

        Raises:
            DatastoreError: with both numbers, if rows were lost, doubled or changed.
            DatastoreConnectionError: if the server does not answer.
        """
        check_content(self.collection, self._about)

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

    def _embedded(self, parts: list[StoredRows], index: str) -> Datastore:
        parts = parts or [decode_rows([], self._about)]
        ids, labels, features = (
            torch.from_numpy(np.concatenate([part[i] for part in parts])) for i in range(3)
        )
        paths = [path for part in parts for path in part.paths] if self._about.has_paths else None
        store = Datastore(
            features, labels, ids, self.mean, metric=self.metric,
            normalization=self.normalization, index=index, paths=paths,
        )  # fmt: skip
        store.digest, store.source = self.digest, dict(self.source)
        return store

    def _column(self, name: str, where: str = "") -> list[Any]:
        pages = self.collection.pages(["id", name], where, _PAGE)
        return [row[name] for page in pages for row in page]

    def _count(self, where: str) -> int:
        if where not in self._counts:
            self._counts[where] = self.collection.count(where)
        return self._counts[where]

    def _take(self, after: About) -> None:
        self._about, self._counts = after, {"": after.count}


def rows_where(labels: Values | None, split: str | None) -> str:
    """The Milvus expression for rows of some classes and one split.

    Args:
        labels: the classes; None for all.
        split: None for all.
    """
    parts = []
    if labels is not None:
        classes = as_whole_numbers(labels, "labels").unique().tolist()
        parts.append(f"label in {classes}")
    if split is not None:
        text = split.replace("\\", "\\\\").replace('"', '\\"')
        parts.append(f'split == "{text}"')
    return " and ".join(parts)


class MilvusDatastore(MilvusReading):
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
        digest: fingerprint of the in-memory backbone that made the features, if known.
        source: dataset id, revision and split of the rows that were loaded, as far as known.
        home: a folder; nothing in it is reused.
        binding: the checkpoint that it was opened with, if any.
        journal: a file that says, from before a change until somebody removes it, how it is taken
            back; None writes none.
    """

    journal: Path | None = None
    _reversal: Reversal | None = None

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
        batch_size: int = BATCH_ROWS,
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
            index: `flat` (exact), `ivf_flat`, `hnsw` or `autoindex` (what the server chooses).
            min_recall: an approximate index is searched as hard as this recall at 20 takes,
                measured on a sample of the rows; in (0, 1].

        Raises:
            ImportError: without pymilvus (`pip install hf-knn[milvus]`).
            ValueError: for a bad argument, a collection that holds other rows, or an index that
                does not reach `min_recall`; then the collection is not whole.
            DatastoreError: if what was read back is not what was written.
            DatastoreConnectionError: if the server does not answer; call again to go on.
        """
        if batch_size < 1:
            raise ValueError(f"Expected `batch_size` to be >= 1, but got {batch_size}.")
        if not 0 < min_recall <= 1:
            raise ValueError(f"Expected `min_recall` to be in (0, 1], but got {min_recall}.")
        kind = index_of(index)
        place = MilvusCollection(MilvusServer(uri, token_of(token), timeout, patience), collection)
        load_rows(store, place, batch_size, progress, kind, min_recall)
        loaded = cls(place, open_whole(place))
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
        place = MilvusCollection(
            MilvusServer(check_exists(check_uri(uri)), token_of(token), timeout, patience),
            collection,
        )
        return cls(place, open_whole(place, recover))

    @classmethod
    def open(
        cls,
        reference: DatastoreReference | str | Path,
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
            trust_remote_datastore: ask the server that the reference names, whatever it is.
            uri: ask this one instead; None takes `HF_KNN_MILVUS_URI`, if that is set.
            token: of the server; that of `MILVUS_TOKEN` goes only where the user said.
            timeout: see `from_datastore`.
            patience: see `from_datastore`.

        Raises:
            ImportError: without pymilvus.
            ValueError: without consent.
            DatastoreError: for other rows than the reference names, with both numbers.
            DatastoreConnectionError: if the server does not answer.
        """
        if not isinstance(reference, DatastoreReference):
            found = read_manifest(Path(reference) / MANIFEST_NAME)
            if not isinstance(found, DatastoreReference):
                raise DatastoreError(
                    f"Expected {reference} to refer to Milvus, but it holds the rows itself; open "
                    "it with Datastore.load."
                )
            reference = found
        address, secret = RemoteConsent(trust_remote_datastore, uri, token).place_of(reference)
        server = MilvusServer(check_exists(address), secret, timeout, patience)
        place = MilvusCollection(server, reference.collection)
        store = cls(place, open_whole(place))
        store.binding = reference.binding
        about = store._about
        if (about.count, about.fingerprint) != (reference.num_rows, reference.fingerprint):
            raise DatastoreError(
                f"Expected {store.collection} to hold {reference.num_rows} rows, fingerprint "
                f"{reference.fingerprint[:12]}…, but it holds {about.count}, "
                f"{about.fingerprint[:12]}…; it was changed since the checkpoint was saved; "
                "if that is wanted, give the model MilvusDatastore.connect(…) and save it again."
            )
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
        """Finds the k nearest rows of each query, exactly with a `flat` index.

        Args:
            queries: [B, D] finite raw features of any float dtype and device.
            k: how many, >= 1; fewer rows give fewer neighbours.
            exclude_ids: [B] int64; the row with that id is no neighbour of that query (-1 = none).
            labels: only rows of these classes are neighbours; None for all.
            split: only rows of this split; None for all.

        Returns:
            Neighbors as `Datastore.search` returns them.

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
        width = wanted.width(self._count(where))
        if width == 0 or len(wanted.queries) == 0:
            found = Hits.none(len(wanted.queries), width)
        else:
            normalized = self._space.normalize(wanted.queries)
            found = search_collection(
                self.collection, self._about, self._space, normalized, width, wanted.excluded, where
            )
        if (found.ids < 0).any():
            raise DatastoreError(
                f"Expected {self.collection} to hold {len(self)} rows, but it has fewer now; "
                "somebody else changed it, connect again."
            )
        return Neighbors(*(torch.from_numpy(values) for values in found)).rounded(queries)

    def leave_one_out(
        self, k: int = 20, batch_size: int = 4096, *, progress: bool = False
    ) -> Iterator[Neighbors]:
        """The neighbours of each stored row among the others, in the order of the ids.

        Args:
            k: how many.
            batch_size: rows per chunk, at most.
            progress: show a progress bar.

        Yields:
            Neighbors of the next rows.
        """
        with tqdm(total=len(self), unit=" rows", desc="neighbours", disable=not progress) as bar:
            for rows in self.blocks():
                for start in range(0, len(rows.ids), batch_size):
                    part = slice(start, start + batch_size)
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
        """Adds rows. The mean does not move.

        Args:
            features: [M, D] raw features.
            labels: [M] whole numbers >= 0.
            ids: [M] unique whole numbers that the datastore does not have; None takes numbers that
                no row ever had.
            paths: [M] where each row's picture lies.
            split: of these rows, one for all or M; None is that of the rows that were loaded.

        Returns:
            [M] the ids of the new rows.

        Raises:
            ValueError: for bad features, labels or ids, an id that exists, or rows that do not fit
                the collection; nothing is changed.
            DatastoreConnectionError: if the server does not answer; see the class about a change
                that was interrupted.
        """
        own = self.source.get("split", "") if split is None else split
        change = rows_to_add(self.collection, self._about, features, labels, ids, paths, own)
        self._make(change)
        return torch.from_numpy(change.new.ids)

    def remove(self, ids: Values) -> None:
        """Removes rows. Milvus clears their bytes when it next compacts the collection.

        Args:
            ids: [M] unique ids that the datastore has.

        Raises:
            ValueError: for an id that it does not have; nothing is changed.
            DatastoreConnectionError: see `add`.
        """
        self._make(rows_to_remove(self.collection, self._about, ids))

    def relabel(self, ids: Values, labels: Values) -> None:
        """Gives rows other labels.

        Args:
            ids: [M] unique ids that the datastore has.
            labels: [M] whole numbers >= 0.

        Raises:
            ValueError: for an id that it does not have, or bad labels; nothing is changed.
            DatastoreConnectionError: see `add`.
        """
        self._make(rows_to_relabel(self.collection, self._about, ids, labels))

    def _make(self, change: RowChange) -> None:
        check_unchanged(self.collection, change.before)
        if self.journal is not None:
            write_pending(self.journal, self.collection.server.uri, change.reversal)
        make_change(self.collection, change)
        self._take(change.after)
        self._reversal = change.reversal

    @contextmanager
    def changed(self) -> Iterator[Self]:
        """This datastore, to be changed within a `with`; if that fails, the change is taken back.

        One that a journal speaks of is left to whoever keeps that.

        Yields:
            This datastore: its rows are in one place for all.

        Raises:
            DatastoreError: if it is to be taken back, and somebody else changed the collection.
            DatastoreConnectionError: if the server does not answer then.
        """
        before = self._about
        try:
            yield self
        except BaseException:
            if self._about is not before and self.journal is None and self._reversal is not None:
                take_back(self.collection, self._reversal)
                self._take(before)
                self._reversal = None
            raise

    def recenter(self, mean: Tensor | None = None) -> None:
        """Refused: every row would be written again.

        Args:
            mean: [D], or None for that of the rows.

        Raises:
            ValueError: saying what to do instead.
        """
        raise ValueError(
            f"Expected the mean to stay for rows in {self.location}, of which every one would be "
            "written again; bring them home (model.datastore.to_datastore()) and load a new "
            "collection."
        )

    def reference(self, binding: Binding | None = None) -> DatastoreReference:
        """What a checkpoint keeps instead of the rows.

        Args:
            binding: the checkpoint, or None.
        """
        about = self._about
        return DatastoreReference(
            self.collection.server.uri, self.collection.name, about.count, about.fingerprint,
            about.dim, about.dtype, about.metric, about.normalization, binding, dict(self.source),
        )  # fmt: skip

    def save(
        self, folder: str | Path, *, binding: Binding | None = None, reuse: Path | None = None
    ) -> DatastoreReference:
        """Writes a reference to the collection: address and name, never a token, never rows.

        Args:
            folder: where to; created if needed.
            binding: the checkpoint that the datastore belongs to.
            reuse: not needed, since there are no files.

        Returns:
            The reference that was written.

        Raises:
            OSError: if it could not be written; the version that was there is intact.
        """
        target = Path(folder).absolute()
        reference = self.reference(binding)
        text = reference.to_json().encode()
        with exclusive_lock(target):
            target.mkdir(parents=True, exist_ok=True)
            write_durably(target / MANIFEST_NAME, lambda path: _write_bytes(path, text))
            for entry in target.iterdir():  # rows of an embedded version before
                if BLOB_PATTERN.fullmatch(entry.name) or entry.name == FAISS_NAME:
                    entry.unlink()
        return reference

    def drop(self) -> None:
        """Removes the rows and their record from the server, for good."""
        self.collection.drop()

    def close(self) -> None:
        """Closes the connection; the rows stay where they are."""
        self.collection.server.close()


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)
