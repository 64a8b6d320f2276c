"""What can be read of a datastore whose rows lie in Milvus: facts, blocks of rows, all of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from .datastore import Datastore
from .indexing import FLAT
from .manifest import Binding, IndexInfo
from .milvus_changes import rows_with
from .milvus_collection import MilvusCollection
from .milvus_index import effort_name
from .milvus_load import check_content, space_of
from .milvus_rows import ROW_FIELDS, About, decode_rows, rows_per_call
from .row_fingerprint import StoredRows
from .rows import Values, as_whole_numbers

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
