"""One datastore's collections in Milvus: its rows as Milvus holds them, and their record beside."""

import base64
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..core.learned import LearnedMap
from ..core.manifest import DatastoreError
from ..store.remote import check_name
from ..store.table import StoredRows
from .about import ABOUT_FIELDS, ABOUT_KEY, VECTOR, About
from .kinds import FLOAT16, LITE, Build, MilvusIndex
from .server import DatastoreRefusalError, MilvusServer

T = TypeVar("T")

ROW_FIELDS = ["id", "label", "split", "path", "features"]

LONGEST_TEXT = 65_535
LONGEST_PATH, LONGEST_SPLIT = 4096, 256

LARGEST_ANSWER = 16_384
"""Milvus returns at most so many rows per query of a search."""

_BYTES_PER_CALL = 16 * 2**20
_BYTES_PER_VALUE = 10  # four of the vector, and at most four in base64
_PAGE, _IDS_PER_CALL = 4096, 4096
_ABOUT_SUFFIX = "_about"


def check_rows(paths: Sequence[str] | None, splits: Collection[str], dim: int, dtype: str) -> None:
    """Refuses what does not fit into a row.

    Args:
        paths: of the rows, or None.
        splits: of the rows, each at least once.
        dim: width of a row.
        dtype: storage dtype.

    Raises:
        ValueError: naming what is too long, and the limit.
    """
    row_bytes = max(dim * np.dtype(dtype).itemsize, dim * np.dtype(np.float32).itemsize)
    if len(base64.b64encode(bytes(row_bytes))) > LONGEST_TEXT:
        raise ValueError(
            f"Expected rows of at most {LONGEST_TEXT // 16 * 3} values for Milvus, but got {dim}."
        )
    for split in splits:
        if len(split.encode()) > LONGEST_SPLIT:
            raise ValueError(
                f"Expected a split of at most {LONGEST_SPLIT} bytes, but got {split!r}."
            )
    for number, path in enumerate(paths or []):
        try:
            size = len(path.encode())
        except UnicodeEncodeError as error:
            raise ValueError(
                f"Expected paths that are Unicode for Milvus, but that of row {number} is not: "
                f"{path!r}; rename the file, or leave `paths` out."
            ) from error
        if size > LONGEST_PATH:
            raise ValueError(
                f"Expected paths of at most {LONGEST_PATH} bytes for Milvus, but that of row "
                f"{number} has {size}."
            )


def rows_per_call(dim: int, most: int) -> int:
    """How many rows go into one message, which servers limit.

    Args:
        dim: width of a row.
        most: at most so many.
    """
    return max(1, min(most, _BYTES_PER_CALL // (_BYTES_PER_VALUE * dim + 256)))


def encode_rows(rows: StoredRows, vectors: NDArray) -> list[dict[str, Any]]:
    """Rows as Milvus takes them.

    Args:
        rows: N rows.
        vectors: [N, D'], what Milvus searches, in the dtype that the record names.
    """
    values = rows.features.astype(rows.features.dtype.newbyteorder("<"), copy=False)
    numbers = zip(rows.ids.tolist(), rows.labels.tolist(), strict=True)
    return [
        {
            "id": row_id, "label": label, "split": rows.splits[i], "path": rows.paths[i],
            "features": base64.b64encode(values[i].tobytes()).decode(), VECTOR: vectors[i],
        }
        for i, (row_id, label) in enumerate(numbers)
    ]  # fmt: skip


def decode_rows(found: Sequence[Any], about: About) -> StoredRows:
    """Rows as Milvus returns them, checked.

    Args:
        found: N rows with all of `ROW_FIELDS`.
        about: the record about them.

    Raises:
        DatastoreError: for a row that is not what the record says, naming its id.
    """
    kind = np.dtype(about.dtype).newbyteorder("<")
    features = np.empty((len(found), about.dim), about.dtype)
    for i, row in enumerate(found):
        try:
            data = base64.b64decode(row["features"], validate=True)
        except ValueError:
            data = b""
        if len(data) != about.dim * kind.itemsize:
            raise DatastoreError(
                f"Expected row {row['id']} to hold {about.dim} {about.dtype} values, but it has "
                f"{len(data)} bytes; load the collection again."
            )
        features[i] = np.frombuffer(data, kind)
    if not np.isfinite(features).all():
        raise DatastoreError("Expected finite rows in Milvus; load the collection again.")
    return StoredRows(
        np.array([row["id"] for row in found], np.int64),
        np.array([row["label"] for row in found], np.int64),
        features,
        [row["path"] for row in found],
        [row["split"] for row in found],
    )


class MilvusCollection:
    """The collection of a datastore's rows, and a small one beside it with the record about them.

    Args:
        server: where they are.
        name: of the rows' collection; the other one is called `<name>_about`.

    Attributes:
        known_map: the learned map that was read or written last, or None.
    """

    def __init__(self, server: MilvusServer, name: str) -> None:
        self.server, self.name = server, check_name(name)
        self.about_name = name + _ABOUT_SUFFIX
        self.known_map: LearnedMap | None = None

    def __str__(self) -> str:
        return f"the collection {self.name} at {self.server.uri}"

    def read_about(self) -> About | None:
        """The record, or None if there is no such datastore.

        Raises:
            DatastoreError: if it is something else.
            DatastoreConnectionError: if the server does not answer.
        """
        if not self.server.call("has_collection", self.about_name):
            return None
        self.server.call("load_collection", self.about_name)
        found = self.server.call(
            "query", self.about_name, filter=f'key == "{ABOUT_KEY}"', output_fields=ABOUT_FIELDS
        )
        if not len(found):
            return None  # made a moment ago, and not written yet
        return About.from_row(dict(found[0]))

    def write_about(self, about: About) -> None:
        """Replaces the record, in one step."""
        self.server.call("upsert", self.about_name, [about.to_row()])

    def create_about(self) -> None:
        """Makes the small collection, if it is missing."""
        self._make(self.about_name, self._about_schema(), "L2", MilvusIndex.FLAT, {})

    def create(self, about: About, width: int, parameters: Build) -> None:
        """Makes what is missing of both collections, the record first.

        Args:
            about: the record.
            width: of the vectors that Milvus searches.
            parameters: that the index is built with, see `kinds.build_parameters`.
        """
        self.create_about()
        self.write_about(about)
        schema = self.row_schema(width, about.vectors)
        self._make(self.name, schema, "IP", about.index, parameters)

    def has_rows(self) -> bool:
        """Whether the collection of the rows is there."""
        return bool(self.server.call("has_collection", self.name))

    def load(self) -> None:
        """Gets the rows ready for searches."""
        self.server.call("load_collection", self.name)

    def flush(self) -> None:
        """Has the server write down what it was given."""
        self.server.call("flush", self.name)

    def drop(self) -> None:
        """Removes both collections, the rows first."""
        for name in (self.name, self.about_name):
            if self.server.call("has_collection", name):
                self.server.call("drop_collection", name)

    def count(self, where: str = "") -> int:
        """How many rows a filter lets through.

        Args:
            where: a Milvus expression; empty for all rows.
        """
        found = self._read("query", filter=where, output_fields=["count(*)"])
        return int(found[0]["count(*)"])

    def upsert(self, rows: list[dict[str, Any]]) -> None:
        """Writes rows; one with the same id is replaced, so that this can be repeated."""
        self.server.call("upsert", self.name, rows)

    def delete(self, ids: Sequence[int]) -> None:
        """Removes rows by id."""
        for start in range(0, len(ids), _IDS_PER_CALL):
            part = list(ids[start : start + _IDS_PER_CALL])
            self.server.call("delete", self.name, ids=part)

    def get(self, ids: Sequence[int], fields: Sequence[str] = ROW_FIELDS) -> list[Any]:
        """The rows with some ids, in any order; those that are not there are left out."""
        found: list[Any] = []
        for start in range(0, len(ids), _IDS_PER_CALL):
            part = list(ids[start : start + _IDS_PER_CALL])
            found += self._read("get", ids=part, output_fields=list(fields))
        return found

    def search(
        self,
        vectors: NDArray,
        count: int,
        where: str,
        fields: Sequence[str],
        parameters: dict[str, int],
    ) -> list[list[Any]]:
        """The rows with the largest inner products.

        Args:
            vectors: [B, D'] in the dtype that the record names.
            count: how many per vector, at most `LARGEST_ANSWER`.
            where: a Milvus expression; empty for all rows.
            fields: what to return of a row.
            parameters: of the index, see `kinds.search_parameters`.

        Returns:
            Per vector, hits with `distance` (the inner product) and `entity`, best first.
        """
        found = self._read(
            "search", data=list(vectors), anns_field=VECTOR, filter=where, limit=count,
            output_fields=list(fields),
            search_params={"metric_type": "IP", "params": parameters},
        )  # fmt: skip
        if len(found) != len(vectors):
            raise DatastoreError(
                f"Expected {len(vectors)} answers of {self}, but got {len(found)}."
            )
        return [list(hits) for hits in found]

    def pages(
        self, fields: Sequence[str], where: str = "", page: int = _PAGE
    ) -> Iterator[list[Any]]:
        """All rows, page by page, in the order of their ids.

        Args:
            fields: what to return of a row.
            where: a Milvus expression; empty for all rows.
            page: rows per page.
        """
        iterator = self._read(
            "query_iterator", batch_size=page, filter=where, output_fields=list(fields)
        )
        try:
            while rows := self._loaded(lambda: self.server.ask("query_iterator", iterator.next)):
                yield list(rows)
        finally:
            iterator.close()

    def _read(self, name: str, **options: Any) -> Any:
        return self._loaded(lambda: self.server.call(name, self.name, **options))

    def _loaded(self, read: Callable[[], T]) -> T:
        """Reads; once more where a server forgot, when it was restarted, what it had loaded."""
        try:
            return read()
        except DatastoreRefusalError:
            state = self.server.call("get_load_state", self.name)["state"]
            if state.name != "NotLoad":
                raise
            self.load()
            return read()

    def _make(self, name: str, schema: Any, metric: str, kind: str, parameters: Build) -> None:
        """Makes a collection with its index; goes on where a process was killed."""
        if not self.server.call("has_collection", name):
            # whoever wrote a row must find it
            self.server.call("create_collection", name, schema=schema, consistency_level="Strong")
        if not self.server.call("list_indexes", name):
            index = self.server.library.MilvusClient.prepare_index_params()
            # pymilvus sends each by itself, as servers read them; Lite reads one that holds all
            params = {"params": parameters} if LITE in self.server.version else parameters
            index.add_index(VECTOR, index_type=str(kind), metric_type=metric, params=params)
            # nothing is there yet to wait for, and loading asks for it again
            self.server.call("create_index", name, index, sync=False)
        self.server.call("load_collection", name)

    def row_schema(self, width: int, vectors: str) -> Any:
        """The fields of a row, as pymilvus describes them.

        Args:
            width: of the vectors that Milvus searches.
            vectors: what it keeps them in, `float16` or `float32`.
        """
        library = self.server.library
        kind, schema = library.DataType, library.MilvusClient.create_schema(auto_id=False)
        schema.add_field("id", kind.INT64, is_primary=True)
        schema.add_field("label", kind.INT64)
        schema.add_field("split", kind.VARCHAR, max_length=LONGEST_SPLIT)
        schema.add_field("path", kind.VARCHAR, max_length=LONGEST_PATH)
        schema.add_field("features", kind.VARCHAR, max_length=LONGEST_TEXT)
        half = vectors == FLOAT16
        schema.add_field(VECTOR, kind.FLOAT16_VECTOR if half else kind.FLOAT_VECTOR, dim=width)
        return schema

    def _about_schema(self) -> Any:
        library = self.server.library
        kind, schema = library.DataType, library.MilvusClient.create_schema(auto_id=False)
        schema.add_field("key", kind.VARCHAR, is_primary=True, max_length=64)
        schema.add_field("facts", kind.VARCHAR, max_length=LONGEST_TEXT)
        schema.add_field("mean", kind.VARCHAR, max_length=LONGEST_TEXT)
        schema.add_field(VECTOR, kind.FLOAT_VECTOR, dim=2)  # Milvus wants one in each collection
        return schema
