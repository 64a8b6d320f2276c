"""One datastore's collections in Milvus: its rows, and the record about them."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from .first_pass import Singles
from .manifest import DatastoreError
from .milvus_client import DatastoreRefusalError, MilvusServer
from .milvus_index import MilvusIndex, build_parameters
from .milvus_rows import (
    ABOUT_FIELDS,
    ABOUT_KEY,
    LONGEST_PATH,
    LONGEST_SPLIT,
    LONGEST_TEXT,
    ROW_FIELDS,
    VECTOR,
    About,
)

T = TypeVar("T")

LARGEST_ANSWER = 16_384
"""Milvus returns at most so many rows per query of a search."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")
_ABOUT_SUFFIX = "_about"
_PAGE = 4096
_IDS_PER_CALL = 4096


def check_name(collection: str) -> str:
    """Checks the name of a collection.

    Raises:
        ValueError: for one that Milvus does not allow.
    """
    if not _NAME.fullmatch(collection):
        raise ValueError(
            "Expected `collection` to be letters, digits and underscores, not starting with a "
            f"digit, at most 200, but got {collection!r}."
        )
    return collection


class MilvusCollection:
    """The collection of a datastore's rows, and a small one beside it with the record about them.

    Args:
        server: where they are.
        name: of the rows' collection; the other one is called `<name>_about`.
    """

    def __init__(self, server: MilvusServer, name: str) -> None:
        self.server, self.name = server, check_name(name)
        self.about_name = name + _ABOUT_SUFFIX

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

    def create(self, about: About, width: int) -> None:
        """Makes what is missing of both collections, the record first.

        Args:
            about: the record.
            width: of the vectors that Milvus searches.
        """
        self._make(self.about_name, self._about_schema(), "L2", MilvusIndex.FLAT, {})
        self.write_about(about)
        parameters = build_parameters(about.index, about.count)
        self._make(self.name, self._row_schema(width), "IP", about.index, parameters)

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
        vectors: Singles,
        count: int,
        where: str,
        fields: Sequence[str],
        parameters: dict[str, int],
    ) -> list[list[Any]]:
        """The rows with the largest inner products.

        Args:
            vectors: [B, D'] float32.
            count: how many per vector, at most `LARGEST_ANSWER`.
            where: a Milvus expression; empty for all rows.
            fields: what to return of a row.
            parameters: of the index, see `milvus_index.search_parameters`.

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

    def _make(
        self, name: str, schema: Any, metric: str, kind: str, parameters: dict[str, int]
    ) -> None:
        """Makes a collection with its index; goes on where a process was killed."""
        if not self.server.call("has_collection", name):
            # whoever wrote a row must find it
            self.server.call("create_collection", name, schema=schema, consistency_level="Strong")
        if not self.server.call("list_indexes", name):
            index = self.server.library.MilvusClient.prepare_index_params()
            index.add_index(VECTOR, index_type=str(kind), metric_type=metric, params=parameters)
            # nothing is there yet to wait for, and loading asks for it again
            self.server.call("create_index", name, index, sync=False)
        self.server.call("load_collection", name)

    def _row_schema(self, width: int) -> Any:
        library = self.server.library
        kind, schema = library.DataType, library.MilvusClient.create_schema(auto_id=False)
        schema.add_field("id", kind.INT64, is_primary=True)
        schema.add_field("label", kind.INT64)
        schema.add_field("split", kind.VARCHAR, max_length=LONGEST_SPLIT)
        schema.add_field("path", kind.VARCHAR, max_length=LONGEST_PATH)
        schema.add_field("features", kind.VARCHAR, max_length=LONGEST_TEXT)
        schema.add_field(VECTOR, kind.FLOAT_VECTOR, dim=width)
        return schema

    def _about_schema(self) -> Any:
        library = self.server.library
        kind, schema = library.DataType, library.MilvusClient.create_schema(auto_id=False)
        schema.add_field("key", kind.VARCHAR, is_primary=True, max_length=64)
        schema.add_field("facts", kind.VARCHAR, max_length=LONGEST_TEXT)
        schema.add_field("mean", kind.VARCHAR, max_length=LONGEST_TEXT)
        schema.add_field(VECTOR, kind.FLOAT_VECTOR, dim=2)  # Milvus wants one in each collection
        return schema
