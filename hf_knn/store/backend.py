"""What a datastore is to those who use one, wherever its rows lie."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..core.learned import LearnedMap
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
    """What a model and its trainer ask of a datastore in order to answer.

    `Datastore` keeps its rows in this process, which is the default; `MilvusDatastore` keeps them
    in a vector database. Both answer alike, and neither stands in for the other by itself.

    Attributes:
        metric: `cosine` or `l2`.
        normalization: `l2_centered`, `l2` or `none`.
        mean: [D] float32, subtracted by `l2_centered`.
    """

    metric: str
    normalization: str
    mean: Tensor

    def __len__(self) -> int:
        """How many rows."""
        ...

    @property
    def dim(self) -> int:
        """Width of a row (D)."""
        ...

    def search(
        self, queries: Tensor | NDArray, k: int = 20, exclude_ids: Values | None = None
    ) -> Neighbors:
        """Finds the k nearest rows of each query."""
        ...

    def rows_of(self, ids: Values) -> StoredRows:
        """Some of the rows, in the order wanted, with all that is stored about them."""
        ...

    def save(
        self, folder: str | Path, *, binding: Binding | None = None, reuse: Path | None = None
    ) -> object:
        """Writes what a checkpoint must hold to find the rows again."""
        ...


def learned_map_of(store: SearchBackend) -> LearnedMap | None:
    """What rows and queries go through before they are compared; None in a back end without one."""
    return getattr(store, "learned_map", None)


class RowStore(SearchBackend, Protocol):
    """A datastore whose rows can be listed, explained and changed, wherever they lie.

    `as_row_store` asks whether a datastore is one. `isinstance` cannot: it would read each
    attribute, and some of them are all rows of a server.

    Attributes:
        digest: fingerprint of the in-memory backbone that made the features, if known.
        source: dataset id, revision and split of the rows, as far as known.
        home: a folder whose files the next save may reuse, or None.
        journal: a file that says, from before a change until somebody removes it, how the change
            is taken back; None writes none. Rows in this process need none.
    """

    digest: str | None
    source: dict[str, str]
    home: Path | None
    journal: Path | None

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
    def marks(self) -> tuple[object, ...]:
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

    def subset(self, ids: Values) -> "RowStore":
        """Some of the rows in this process, with the same mean."""
        ...

    def ids_labelled(self, label: int) -> Tensor:
        """The ids of the rows of one class."""
        ...

    def hash_sum(self) -> int:
        """The sum of the hashes of all rows, see `sum_of`."""
        ...

    def verify(self) -> None:
        """Reads all rows; a DatastoreError if they are not those that were stored."""
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

    def put_back(self, rows: StoredRows) -> Tensor:
        """Adds rows that were removed, with all that was stored about them; returns their ids."""
        ...

    def remove(self, ids: Values) -> None:
        """Removes rows, all or none."""
        ...

    def relabel(self, ids: Values, labels: Values) -> None:
        """Gives rows other labels, all or none."""
        ...

    def recenter(self, mean: Tensor | None = None) -> None:
        """Sets the mean that centres rows, where that needs no row to be written again."""
        ...

    def changed(self) -> AbstractContextManager["RowStore"]:
        """The rows to be changed within a `with`; what fails in it takes the change back.

        Rows in this process are those of another datastore, and this one keeps its own; rows that
        lie in one place for all are changed there.
        """
        ...

    def path_of(self, row_id: int) -> str:
        """Where the picture of a row lies; empty if not known."""
        ...

    def paths_of(self, ids: Values) -> list[str]:
        """Where the pictures of some rows lie; empty if not known."""
        ...


_ROW_METHODS = sorted(
    name
    for name, member in vars(RowStore).items()
    if not name.startswith("_") and (callable(member) or isinstance(member, property))
)


def as_row_store(store: SearchBackend) -> RowStore:
    """A datastore as one whose rows can be listed and changed.

    Args:
        store: the datastore of a model.

    Raises:
        ValueError: for one that only answers, naming what it lacks.
    """
    known = set(dir(store))  # which names all and reads none
    missing = [name for name in _ROW_METHODS if name not in known]
    if missing:
        raise ValueError(
            "Expected a datastore whose rows can be listed and changed, but "
            f"{type(store).__name__} only answers, without {', '.join(missing)}; use a Datastore "
            "or a MilvusDatastore."
        )
    return cast(RowStore, store)


def check_alike(one: RowStore, other: RowStore) -> None:
    """Refuses a datastore whose rows cannot lie among another's.

    Args:
        one: the datastore that takes the rows.
        other: the one that has them.

    Raises:
        ValueError: for another width, metric, normalisation, learned map or backbone.
    """
    maps = [learned and learned.sha256[:12] for learned in map(learned_map_of, (one, other))]
    for name, mine, theirs in (
        ("dim", one.dim, other.dim),
        ("metric", one.metric, other.metric),
        ("normalization", one.normalization, other.normalization),
        ("learned_map", *maps),
    ):
        if mine != theirs:
            raise ValueError(f"Expected both to have {name} {mine!r}, but got {theirs!r}.")
    if one.digest and other.digest and one.digest != other.digest:
        raise ValueError("Expected rows of the same backbone, but the other's is another one.")


def even_parts(count: int, parts: int) -> list[slice]:
    """Cuts some queries into parts of about one length.

    A last part of a few would be another kind of call to an index that has one for batches.

    Args:
        count: of the queries.
        parts: how many.
    """
    edges = [count * part // parts for part in range(parts + 1)] if parts else []
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


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
