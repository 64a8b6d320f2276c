"""The record about a collection: what its rows are, and how they are searched."""

import base64
import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.manifest import (
    MEASURED_ON,
    SHA256_PATTERN,
    STORAGE_DTYPES,
    DatastoreError,
)
from ..core.plain_json import Fields, parse_json
from ..store.table import combine
from .kinds import FLOAT32, VECTOR_DTYPES, MilvusIndex

VECTOR = "vector"
ABOUT_FIELDS = ["key", "facts", "mean"]
ABOUT_KEY = "datastore"

WHOLE, LOADING, CHANGING = "whole", "loading", "changing"
"""States of a collection: only a whole one is opened."""

_FORMAT, _MAPPED_FORMAT = 1, 2  # the second, of rows that go through a learned map
_HALF_FORMAT = 3  # vectors in float16, with a map or without
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
        vectors: `float16` or `float32`, what Milvus keeps the vectors in that it searches.
        effort: how hard it is searched, see `kinds.set_effort`.
        recall: at 20, measured when the rows were loaded; None for an exact one.
        measured_on: which kind of queries was the worst; None if nobody said.
        recalls: by kind of queries; empty if nobody said.
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
    vectors: str = FLOAT32
    effort: int = 0
    recall: float | None = None
    measured_on: str | None = None
    recalls: dict[str, float] = field(default_factory=dict)
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
        version = _format_of(self.learned_map, self.vectors)
        values = asdict(self) | {"total": f"{self.total:064x}", "format": version}
        values["next_id"] = str(self.next_id)  # JSON numbers end at 2 ** 53
        for name in ("mean",) if self.learned_map else ("mean", "learned_map", "map_width"):
            values.pop(name)  # without a map as every version wrote it
        if self.vectors == FLOAT32:
            values.pop("vectors")
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
        vectors = fields.choice("vectors", VECTOR_DTYPES) if "vectors" in values else FLOAT32
        if fields.count("format") != (wanted := _format_of(learned_map, vectors)):
            raise fields.wrong("format", f"{wanted}; upgrade hf_knn")
        dim, largest = fields.count("dim"), fields.get("largest")
        # records of before there was a choice say nothing about it
        known = {"index": MilvusIndex.FLAT, "effort": 0, "recall": None, "measured_on": None}
        kind, effort, recall, measured_on = (values.get(n, usual) for n, usual in known.items())
        recalls = Fields(values.get("recalls", {}), "about.recalls.")
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
            vectors=vectors,
            effort=effort,
            recall=recall,
            measured_on=measured_on,
            recalls={name: recalls.share(name) for name in MEASURED_ON if name in recalls.values},
            source=fields.texts("source"),
            learned_map=learned_map,
            map_width=fields.count("map_width") if learned_map else 0,
            mean=torch.from_numpy(mean.astype(np.float32)),
        )


def _format_of(learned_map: str, vectors: str) -> int:
    """The format of a record: an older version must not open what it does not know."""
    if vectors != FLOAT32:
        return _HALF_FORMAT
    return _MAPPED_FORMAT if learned_map else _FORMAT


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
