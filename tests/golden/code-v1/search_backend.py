"""What a datastore is to those who use one, wherever its rows lie."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .first_pass import Ints
from .manifest import Binding, IndexInfo
from .row_fingerprint import StoredRows
from .rows import Values, as_features, as_whole_numbers


class Neighbors(NamedTuple):
    """The nearest rows of a batch of queries, by (similarity, id).

    Attributes:
        similarities: [B, k'] float32, higher is closer: inner products of unit vectors (`cosine`)
            or negative squared distances (`l2`).
        labels: [B, k'] int64.
        ids: [B, k'] int64.
    """

    similarities: Tensor
    labels: Tensor
    ids: Tensor

    def rounded(self, like: Tensor | NDArray) -> "Neighbors":
        """The answer to a caller: similarities in float32, on the device of the queries.

        Args:
            like: the queries.
        """
        largest = torch.finfo(torch.float32).max
        device = like.device if isinstance(like, Tensor) else torch.device("cpu")
        return Neighbors(
            self.similarities.clamp(-largest, largest).float().to(device),
            self.labels.to(device),
            self.ids.to(device),
        )


class Request(NamedTuple):
    """A search whose arguments were checked.

    Attributes:
        queries: [B, D] float32 or float64.
        k: >= 1.
        excluded: [B] int64, or None.
    """

    queries: NDArray
    k: int
    excluded: Ints | None

    def width(self, rows: int) -> int:
        """How many neighbours there are among so many rows."""
        return max(0, min(self.k, rows - (self.excluded is not None)))


def check_request(
    queries: Tensor | NDArray, k: int, exclude_ids: Values | None, dim: int
) -> Request:
    """Checks the arguments of a search, the same for every kind of datastore.

    Args:
        queries: [B, dim] finite raw features.
        k: how many.
        exclude_ids: [B] int64, -1 for none; or None.
        dim: width of a row.

    Raises:
        ValueError: for NaN or infinite queries, another width, k < 1, or exclude_ids of another
            length.
    """
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"Expected `k` to be a whole number >= 1, but got {k!r}.")
    wanted = as_features(queries, "queries", dim).numpy()
    excluded: Ints | None = None
    if exclude_ids is not None:
        excluded = as_whole_numbers(exclude_ids, "exclude_ids", lowest=-1).numpy()
        if len(excluded) != len(wanted):
            raise ValueError(
                f"Expected `exclude_ids` to have one id per query ({len(wanted)}), "
                f"but got {len(excluded)}."
            )
    return Request(wanted, int(k), excluded)


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
