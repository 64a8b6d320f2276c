"""What lies in Milvus: the rows of a datastore, and beside them a record about all of them.

A row keeps its features twice: as the bytes that the datastore stores (in base64, since not every
Milvus has float16 vectors), which answers are computed from, and as the normalised float32 vector
that Milvus searches.
"""

import base64
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .first_pass import Singles
from .manifest import SHA256_PATTERN, STORAGE_DTYPES, DatastoreError, Fields
from .milvus_index import MilvusIndex, check_parts
from .row_fingerprint import StoredRows, combine

ROW_FIELDS = ["id", "label", "split", "path", "features"]
VECTOR = "vector"
ABOUT_FIELDS = ["key", "facts", "mean"]
ABOUT_KEY = "datastore"

WHOLE, LOADING, CHANGING = "whole", "loading", "changing"
"""States of a collection: only a whole one is opened."""

LONGEST_TEXT = 65_535
LONGEST_PATH, LONGEST_SPLIT = 4096, 256
_BYTES_PER_CALL = 16 * 2**20
_BYTES_PER_VALUE = 10  # four of the vector, and at most four in base64
_FORMAT = 1
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
        effort: how hard it is searched, see `milvus_index.set_effort`.
        recall: at 20, measured when the rows were loaded; None for an exact one.
        source: where the rows came from.
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
    source: dict[str, str] = field(default_factory=dict)
    mean: Tensor = field(default_factory=lambda: torch.empty(0), compare=False)

    @property
    def fingerprint(self) -> str:
        """Of rows, mean and how they are compared."""
        facts = (str(self.dim), self.dtype, self.metric, self.normalization)
        return combine(self.total, self.count, self.mean, *facts)

    def to_row(self) -> dict[str, Any]:
        """The row of the record's own collection."""
        mean = base64.b64encode(self.mean.numpy().astype("<f4").tobytes()).decode()
        values = asdict(self) | {"total": f"{self.total:064x}", "format": _FORMAT}
        values["next_id"] = str(self.next_id)  # JSON numbers end at 2 ** 53
        values.pop("mean")
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
            values = json.loads(row["facts"])
            mean = np.frombuffer(base64.b64decode(row["mean"], validate=True), "<f4")
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            raise DatastoreError(f"Expected the record of a datastore, but got: {error}") from None
        fields = Fields(values, "about.")
        if fields.count("format") != _FORMAT:
            raise fields.wrong("format", f"{_FORMAT}; upgrade hf_knn")
        dim, largest = fields.count("dim"), fields.get("largest")
        # records of before there was a choice say nothing about it
        kind, effort, recall = (
            values.get(name, usual)
            for name, usual in (("index", MilvusIndex.FLAT), ("effort", 0), ("recall", None))
        )
        problem = check_parts(kind, effort, recall)
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
            source=fields.texts("source"),
            mean=torch.from_numpy(mean.astype(np.float32)),
        )


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
