"""What a datastore is to those who use one, wherever its rows lie."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..core.manifest import Binding, IndexInfo
from ..core.rows import Values
from ..core.search import Floats, Ints, Neighbors, nearest_first
from .table import StoredRows


def check_split(split: str | None, source: dict[str, str]) -> None:
    """Refuses a split that a datastore of one split does not have.

    Args:
        split: the one asked for; None for whatever there is.
        source: where the rows came from.

    Raises:
        ValueError: naming the split that it has.
    """
    if split is not None and split != source.get("split"):
        known = source.get("split")
        has = f"its rows are of {known!r}" if known else "it does not know of which split they are"
        raise ValueError(
            f"Expected `split` to be one that the datastore has, but got {split!r} and {has}; "
            "leave `split` out, or set `source['split']`."
        )


@runtime_checkable
class SearchBackend(Protocol):
    """A datastore as the model and the tools around it use it.

    `Datastore` keeps its rows in this process, which is the default; `MilvusDatastore` keeps them
    in a vector database. Both answer alike, and neither stands in for the other by itself.

    Attributes:
        metric: `cosine` or `l2`.
        normalization: `l2_centered`, `l2` or `none`.
        mean: [D] float32, subtracted by `l2_centered`.
        digest: fingerprint of the in-memory backbone that made the features, if known.
        source: dataset id, revision and split of the rows, as far as known.
        home: a folder whose files the next save may reuse, or None.
    """

    metric: str
    normalization: str
    mean: Tensor
    digest: str | None
    source: dict[str, str]
    home: Path | None

    def __len__(self) -> int:
        """How many rows."""
        ...

    @property
    def dim(self) -> int:
        """Width of a row (D)."""
        ...

    @property
    def dtype(self) -> str:
        """Storage dtype, `float16` or `float32`."""
        ...

    @property
    def features(self) -> Tensor:
        """[N, D] the stored raw features."""
        ...

    @property
    def labels(self) -> Tensor:
        """[N] int64."""
        ...

    @property
    def ids(self) -> Tensor:
        """[N] int64."""
        ...

    @property
    def paths(self) -> list[str] | None:
        """Where each row's picture lies; None if nobody said."""
        ...

    @property
    def index(self) -> IndexInfo:
        """How it is searched."""
        ...

    @property
    def marks(self) -> tuple[Any, ...]:
        """Objects that are replaced when rows, labels or mean change."""
        ...

    @property
    def location(self) -> str | None:
        """Where the rows lie, in words, if not beside the model; else None."""
        ...

    @property
    def binding(self) -> Binding | None:
        """The checkpoint that the datastore was opened with, if any."""
        ...

    def search(
        self,
        queries: Tensor | NDArray,
        k: int = 20,
        exclude_ids: Values | None = None,
        *,
        labels: Values | None = None,
        split: str | None = None,
    ) -> Neighbors:
        """Finds the k nearest rows of each query, of some labels or one split if asked."""
        ...

    def leave_one_out(
        self, k: int = 20, batch_size: int = 4096, *, progress: bool = False
    ) -> Iterator[Neighbors]:
        """The neighbours of each stored row among the others, in row order, chunk by chunk."""
        ...

    def blocks(self) -> Iterator[StoredRows]:
        """All rows, block by block, so that they need not be in memory at once."""
        ...

    def rows_of(self, ids: Values) -> StoredRows:
        """Some of the rows, in the order wanted, with all that is stored about them."""
        ...

    def ids_labelled(self, label: int) -> Tensor:
        """The ids of the rows of one class."""
        ...

    def hash_sum(self) -> int:
        """The sum of the hashes of all rows, see `sum_of`."""
        ...

    def label_beyond(self, classes: int) -> int | None:
        """A label >= classes that a row has; None if there is none."""
        ...

    def add(
        self,
        features: Tensor | NDArray,
        labels: Values,
        ids: Values | None = None,
        paths: Sequence[str] | None = None,
    ) -> Tensor:
        """Adds rows, all or none, and returns their ids."""
        ...

    def remove(self, ids: Values) -> None:
        """Removes rows, all or none."""
        ...

    def relabel(self, ids: Values, labels: Values) -> None:
        """Gives rows other labels, all or none."""
        ...

    def path_of(self, row_id: int) -> str:
        """Where the picture of a row lies; empty if not known."""
        ...

    def paths_of(self, ids: Values) -> list[str]:
        """Where the pictures of some rows lie; empty if not known."""
        ...

    def save(
        self, folder: str | Path, *, binding: Binding | None = None, reuse: Path | None = None
    ) -> Any:
        """Writes what a checkpoint must hold to find the rows again."""
        ...


@runtime_checkable
class RowStore(SearchBackend, Protocol):
    """A datastore whose rows are read and changed, wherever they lie."""

    def changed(self) -> AbstractContextManager["RowStore"]:
        """The rows to be changed within a `with`; what fails in it takes the change back.

        Rows in memory are those of another datastore, and this one keeps its own; rows that lie in
        one place for all are changed there.
        """
        ...

    def add(
        self,
        features: Tensor | NDArray,
        labels: Values,
        ids: Values | None = None,
        paths: Sequence[str] | None = None,
        *,
        split: str | Sequence[str] | None = None,
    ) -> Tensor:
        """Adds rows, all or none, and returns their ids."""
        ...

    def subset(self, ids: Values) -> SearchBackend:
        """An embedded datastore of some of the rows, with the same mean."""
        ...

    def recenter(self, mean: Tensor | None = None) -> None:
        """Sets the mean that `l2_centered` subtracts; None takes that of the rows."""
        ...


def as_row_store(store: SearchBackend | None) -> RowStore:
    """A datastore whose rows can be read and changed.

    Args:
        store: the datastore of a model.

    Raises:
        ValueError: for none, or one that can only be searched.
    """
    if store is None:
        raise ValueError(
            "Expected a model with a datastore to change, but it has none; train it first."
        )
    # asked of the class: an instance would read all rows to say that it has `features`
    if not hasattr(type(store), "changed"):
        raise ValueError(
            f"Expected a datastore whose rows can be changed, but got {type(store).__name__}, "
            "which is only searched; give the model a `Datastore`."
        )
    return cast(RowStore, store)


def check_alike(one: Any, other: Any) -> None:
    """Refuses a datastore whose rows cannot lie among another's.

    Args:
        one: the datastore that takes the rows.
        other: the one that has them.

    Raises:
        ValueError: for another width, metric, normalisation or backbone.
    """
    for name in ("dim", "metric", "normalization"):
        mine, theirs = getattr(one, name), getattr(other, name)
        if mine != theirs:
            raise ValueError(f"Expected both to have {name} {mine!r}, but got {theirs!r}.")
    if one.digest and other.digest and one.digest != other.digest:
        raise ValueError("Expected rows of the same backbone, but the other's is another one.")


NOBODY = -1


class Hits(NamedTuple):
    """The nearest rows of a batch of queries.

    Attributes:
        similarities: [B, k] float64.
        labels: [B, k] int64.
        ids: [B, k] int64; -1, with a similarity of -inf, where there are fewer rows.
    """

    similarities: Floats
    labels: Ints
    ids: Ints

    @classmethod
    def none(cls, count: int, k: int) -> "Hits":
        """No row for any query."""
        numbers = np.full((count, k), NOBODY, np.int64)
        return cls(np.full((count, k), -np.inf), numbers, numbers.copy())

    def put(self, rows: Ints, hits: "Hits") -> None:
        """Sets the answers of some queries."""
        for mine, theirs in zip(self, hits, strict=True):
            mine[rows] = theirs

    def best_with(self, other: "Hits", k: int) -> "Hits":
        """The k nearest of two sets of rows that have none in common."""
        both = [np.concatenate(pair, axis=1) for pair in zip(self, other, strict=True)]
        order = nearest_first(both[0], both[2], k)
        return Hits(*(np.take_along_axis(values, order, axis=1) for values in both))
