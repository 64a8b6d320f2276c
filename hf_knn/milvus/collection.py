"""One datastore's collections in Milvus: its rows as Milvus holds them, and their record."""

import base64
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..core.learned import LearnedMap
from ..core.manifest import (
    MEASURED_ON,
    SHA256_PATTERN,
    STORAGE_DTYPES,
    DatastoreError,
    Fields,
)
from ..core.plain_json import parse_json
from ..core.search import Singles
from ..store.remote import check_name
from ..store.table import StoredRows, combine
from .server import DatastoreRefusalError, MilvusServer

T = TypeVar("T")


class MilvusIndex(StrEnum):
    """An index of Milvus, by its name there."""

    FLAT = "FLAT"
    IVF_FLAT = "IVF_FLAT"
    HNSW = "HNSW"
    AUTOINDEX = "AUTOINDEX"


def index_of(name: str) -> MilvusIndex:
    """The index that a name means, in capitals or not.

    Raises:
        ValueError: for another name.
    """
    try:
        return MilvusIndex(name.upper())
    except ValueError:
        known = [str(kind).lower() for kind in MilvusIndex]
        raise ValueError(f"Expected `index` to be one of {known}, but got {name!r}.") from None


ROW_FIELDS = ["id", "label", "split", "path", "features"]
VECTOR = "vector"
ABOUT_FIELDS = ["key", "facts", "mean"]
ABOUT_KEY = "datastore"

WHOLE, LOADING, CHANGING = "whole", "loading", "changing"
"""States of a collection: only a whole one is opened."""

LONGEST_TEXT = 65_535
LONGEST_PATH, LONGEST_SPLIT = 4096, 256

LARGEST_ANSWER = 16_384
"""Milvus returns at most so many rows per query of a search."""

_BYTES_PER_CALL = 16 * 2**20
_BYTES_PER_VALUE = 10  # four of the vector, and at most four in base64
_PAGE, _IDS_PER_CALL = 4096, 4096
_ABOUT_SUFFIX = "_about"
_FORMAT, _MAPPED_FORMAT = 1, 2  # the second, of rows that go through a learned map
_NUMBER = re.compile(r"[0-9]{1,19}")


@dataclass(frozen=True)
class About:
    """The record about a collection.

    Attributes:
        state: `whole`, or what was interrupted: `loading` or `changing`.
        count: how many rows it holds; while it is loaded, how many it shall hold.
        total: the sum of their hashes, see `sum_of`.
        dim: width of a row.
        dtype: `float16` or `float32`.
        metric: `cosine` or `l2`.
        normalization: `l2_centered`, `l2` or `none`.
        largest: of the lengths of the normalised rows, which fixes the scale of `l2`.
        next_id: larger than any id that was ever given.
        has_paths: whether rows know where their picture lies.
        index: of a `MilvusIndex`; all but `FLAT` are approximate.
        effort: how hard it is searched, see `search.set_effort`.
        recall: at 20, measured when the rows were loaded; None for an exact one.
        measured_on: rows, or queries unlike them, whichever was worse; None if nobody said.
        source: where the rows came from.
        learned_map: sha256 of the map that rows go through; empty without one.
        map_width: E, how wide it makes them.
        mean: [dim] float32.
    """

    state: str
    count: int
    total: int
    dim: int
    dtype: str
    metric: str
    normalization: str
    largest: float
    next_id: int
    has_paths: bool
    index: str = MilvusIndex.FLAT
    effort: int = 0
    recall: float | None = None
    measured_on: str | None = None
    source: dict[str, str] = field(default_factory=dict)
    learned_map: str = ""
    map_width: int = 0
    mean: Tensor = field(default_factory=lambda: torch.empty(0), compare=False)

    @property
    def fingerprint(self) -> str:
        """Of rows, mean and how they are compared."""
        facts = [str(self.dim), self.dtype, self.metric, self.normalization]
        facts += [self.learned_map] if self.learned_map else []
        return combine(self.total, self.count, self.mean, *facts)

    def to_row(self) -> dict[str, Any]:
        """The row of the record's own collection."""
        mean = base64.b64encode(self.mean.numpy().astype("<f4").tobytes()).decode()
        version = _MAPPED_FORMAT if self.learned_map else _FORMAT
        values = asdict(self) | {"total": f"{self.total:064x}", "format": version}
        values["next_id"] = str(self.next_id)  # JSON numbers end at 2 ** 53
        for name in ("mean",) if self.learned_map else ("mean", "learned_map", "map_width"):
            values.pop(name)  # without a map as every version wrote it
        return {
            "key": ABOUT_KEY, "facts": json.dumps(values), "mean": mean, VECTOR: [0.0, 0.0],
        }  # fmt: skip

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "About":
        """Checks what the server says, field by field.

        Args:
            row: of the record's collection.

        Raises:
            DatastoreError: naming the field, what was wanted and what was found.
        """
        try:
            values = parse_json(row["facts"], "its facts")
            mean = np.frombuffer(base64.b64decode(row["mean"], validate=True), "<f4")
        except (KeyError, ValueError, TypeError) as error:
            raise DatastoreError(f"Expected the record of a datastore, but got: {error}") from None
        fields = Fields(values, "about.")
        learned_map = fields.sha256_or_none("learned_map") or ""
        if fields.count("format") != (wanted := _MAPPED_FORMAT if learned_map else _FORMAT):
            raise fields.wrong("format", f"{wanted}; upgrade hf_knn")
        dim, largest = fields.count("dim"), fields.get("largest")
        # records of before there was a choice say nothing about it
        known = {"index": MilvusIndex.FLAT, "effort": 0, "recall": None, "measured_on": None}
        kind, effort, recall, measured_on = (values.get(n, usual) for n, usual in known.items())
        problem = _wrong_index(kind, effort, recall, measured_on)
        if problem:
            raise DatastoreError(f"Expected the record of a datastore to have an {problem}.")
        if len(mean) != dim or not np.isfinite(mean).all():
            raise fields.wrong("dim", f"the {len(mean)} finite values of the mean")
        if not isinstance(largest, float) or not 0 < largest < float("inf"):
            raise fields.wrong("largest", "a number above 0")
        return cls(
            state=fields.choice("state", (WHOLE, LOADING, CHANGING)),
            count=fields.count("count"),
            total=int(fields.matching("total", SHA256_PATTERN), 16),
            dim=dim,
            dtype=fields.choice("dtype", STORAGE_DTYPES),
            metric=fields.choice("metric", ("cosine", "l2")),
            normalization=fields.choice("normalization", ("l2_centered", "l2", "none")),
            largest=largest,
            next_id=int(fields.matching("next_id", _NUMBER)),
            has_paths=bool(fields.get("has_paths")),
            index=kind,
            effort=effort,
            recall=recall,
            measured_on=measured_on,
            source=fields.texts("source"),
            learned_map=learned_map,
            map_width=fields.count("map_width") if learned_map else 0,
            mean=torch.from_numpy(mean.astype(np.float32)),
        )


def _wrong_index(kind: object, effort: object, recall: object, measured_on: object) -> str:
    """What is wrong with a record's facts about its index; empty if nothing."""
    if kind not in list(MilvusIndex):
        return f"index among {[str(one) for one in MilvusIndex]}"
    if not isinstance(effort, int) or isinstance(effort, bool) or effort < 0:
        return "effort a whole number >= 0"
    if recall is not None and not (isinstance(recall, float) and 0 <= recall <= 1):
        return "recall between 0 and 1"
    if measured_on not in (None, *MEASURED_ON):
        return f"recall measured on one of {MEASURED_ON}"
    return ""


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


def encode_rows(rows: StoredRows, vectors: Singles) -> list[dict[str, Any]]:
    """Rows as Milvus takes them.

    Args:
        rows: N rows.
        vectors: [N, D'] float32, what Milvus searches.
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

    def create(self, about: About, width: int, parameters: dict[str, int]) -> None:
        """Makes what is missing of both collections, the record first.

        Args:
            about: the record.
            width: of the vectors that Milvus searches.
            parameters: that the index is built with, see `search.build_parameters`.
        """
        self.create_about()
        self.write_about(about)
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
            parameters: of the index, see `search.search_parameters`.

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
