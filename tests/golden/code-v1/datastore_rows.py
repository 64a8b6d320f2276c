"""The rows of a datastore and what is known of them; nothing here searches, changes or saves."""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from .blobs import OpenedFiles
from .configuration_knn import Normalization, check_metric
from .first_pass import Singles
from .functional import Metric
from .indexing import FLAT, MIN_RECALL, Placement, choose_index, parse_memory
from .manifest import STORAGE_DTYPES, Binding, DatastoreError, IndexInfo, Manifest
from .row_fingerprint import StoredRows, sum_of
from .row_table import RowTable
from .rows import (
    Values,
    as_whole_numbers,
    check_paths,
    check_row_numbers,
    refuse_non_finite,
    shown,
)
from .search import Searcher

_BLOCK_ROWS = 8192


class DatastoreRows:
    """The parts of a `Datastore`, checked once, and how its rows are read.

    See `Datastore` for arguments and attributes.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        ids: Tensor,
        mean: Tensor,
        *,
        metric: str = Metric.COSINE,
        normalization: str = Normalization.L2_CENTERED,
        index: str = FLAT,
        paths: Sequence[str] | None = None,
        max_memory: str | int | None = None,
        min_recall: float = MIN_RECALL,
    ) -> None:
        check_metric(metric, normalization)
        if str(features.dtype).removeprefix("torch.") not in STORAGE_DTYPES or features.ndim != 2:
            raise ValueError(
                f"Expected `features` to be [N, D] float16 or float32, "
                f"but got {tuple(features.shape)} {features.dtype}."
            )
        if mean.shape != features.shape[1:]:
            raise ValueError(
                f"Expected `mean` to have shape {tuple(features.shape[1:])}, "
                f"but got {tuple(mean.shape)}."
            )
        if not len(features) == len(labels) == len(ids):
            raise ValueError(
                f"Expected one label and one id per row ({len(features)}), "
                f"but got {len(labels)} labels and {len(ids)} ids."
            )
        if not 0 < min_recall <= 1:
            raise ValueError(f"Expected `min_recall` to be in (0, 1], but got {min_recall}.")
        self.metric, self.normalization = str(metric), str(normalization)
        self.max_memory = None if max_memory is None else parse_memory(max_memory)
        self.min_recall = min_recall
        self.mean = mean.float()
        self.manifest: Manifest | None = None
        self.digest: str | None = None
        self.source: dict[str, str] = {}
        self._table = RowTable.of(features, labels, ids, check_paths(paths, len(features)))
        self._index = self._choose_index(index)
        self._centroids: Singles | None = None
        self._searcher: Searcher | None = None
        self._placement = Placement()
        self._unverified: OpenedFiles | None = None
        self._trusted: BinaryIO | None = None
        self.home: Path | None = None

    def __len__(self) -> int:
        return len(self._table)

    @property
    def dim(self) -> int:
        """Width of a row (D)."""
        return self._table.features.shape[1]

    @property
    def dtype(self) -> str:
        """Storage dtype, `float16` or `float32`."""
        return str(self._table.features.dtype).removeprefix("torch.")

    @property
    def features(self) -> Tensor:
        """[N, D] the stored raw features; joined, in memory, if they lie in several files."""
        self.verify()
        return self._table.features.joined()

    @property
    def labels(self) -> Tensor:
        """[N] int64."""
        self.verify()
        return self._table.labels

    @property
    def ids(self) -> Tensor:
        """[N] int64."""
        self.verify()
        return self._table.ids

    @property
    def paths(self) -> list[str] | None:
        """Where each row's picture lies, relative to its dataset; None if nobody said."""
        self.verify()
        return self._table.paths

    def rows(self, part: slice) -> StoredRows:
        """Some of the rows with all that is stored about them.

        Args:
            part: which, by position, with step 1.
        """
        self.verify()
        table = self._table
        ids = table.ids[part].numpy()
        paths = [""] * len(ids) if table.paths is None else table.paths[part]
        splits = [self.source.get("split", "")] * len(ids)
        return StoredRows(ids, table.labels[part].numpy(), table.features[part], paths, splits)

    @property
    def index(self) -> IndexInfo:
        """Which index is used, with its parameters and measured recall once it was built."""
        return self._index

    @property
    def location(self) -> str | None:
        """Where the rows lie if not beside the model: None, they do."""
        return None

    @property
    def binding(self) -> Binding | None:
        """The checkpoint that the datastore was opened with, if any."""
        return None if self.manifest is None else self.manifest.binding

    def __repr__(self) -> str:
        return (
            f"Datastore({len(self)} x {self.dim} {self.dtype}, metric={self.metric!r}, "
            f"normalization={self.normalization!r}, index={str(self._index)!r})"
        )

    def __copy__(self) -> Self:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._searcher = None  # an index is changed in place, so each store has its own
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return copy.copy(self)  # rows are replaced, never written in place, so they can be shared

    def subset(self, ids: Values) -> Self:
        """A datastore of some of the rows, with the same mean.

        Args:
            ids: [M] unique ids that the datastore has, in the order wanted.

        Raises:
            ValueError: for an id that it does not have.
        """
        rows = self._positions(ids)
        table = self._table
        paths = None if table.paths is None else [table.paths[row] for row in rows.tolist()]
        part = type(self)(
            torch.from_numpy(table.features[rows.numpy()]), table.labels[rows], table.ids[rows],
            self.mean,
            metric=self.metric, normalization=self.normalization, index=FLAT,
            paths=paths, max_memory=self.max_memory, min_recall=self.min_recall,
        )  # fmt: skip
        part._index = part._choose_index(self._index.requested, fall_back=True)
        part.digest, part.source = self.digest, dict(self.source)
        return part

    def blocks(self) -> Iterator[StoredRows]:
        """All rows with all that is stored about them, block by block.

        Yields:
            The next rows.
        """
        for start in range(0, len(self), _BLOCK_ROWS):
            yield self.rows(slice(start, start + _BLOCK_ROWS))

    def rows_of(self, ids: Values) -> StoredRows:
        """Some of the rows with all that is stored about them.

        Args:
            ids: [M] unique ids that the datastore has, in the order wanted.

        Raises:
            ValueError: for an id that it does not have.
        """
        rows, table = self._positions(ids), self._table
        return StoredRows(
            table.ids[rows].numpy(), table.labels[rows].numpy(), table.features[rows.numpy()],
            self.paths_of(ids), [self.source.get("split", "")] * len(rows),
        )  # fmt: skip

    def ids_labelled(self, label: int) -> Tensor:
        """[M] int64, the ids of the rows of one class.

        Args:
            label: of the class.
        """
        return self.ids[self.labels == label]

    def hash_sum(self) -> int:
        """The sum of the hashes of all rows, see `sum_of`; all are read."""
        return sum(sum_of(rows) for rows in self.blocks())

    @property
    def marks(self) -> tuple[Any, ...]:
        """Objects that are replaced when rows, labels or mean change."""
        return self.ids, self.labels, self.mean

    def label_beyond(self, classes: int) -> int | None:
        """The largest label, if it is >= classes; else None.

        Args:
            classes: how many classes there are.
        """
        largest = int(self.labels.max()) if len(self) else -1
        return largest if largest >= classes else None

    def path_of(self, row_id: int) -> str:
        """Where the picture of a row lies, relative to its dataset; empty if not known.

        Args:
            row_id: an id that the datastore has.

        Raises:
            ValueError: for an id that it does not have.
        """
        return self.paths_of([row_id])[0]

    def paths_of(self, ids: Values) -> list[str]:
        """Where the pictures of some rows lie; see `path_of`.

        Args:
            ids: [M] unique ids that the datastore has.

        Raises:
            ValueError: for an id that it does not have.
        """
        rows, paths = self._positions(ids).tolist(), self._table.paths
        return [""] * len(rows) if paths is None else [paths[row] for row in rows]

    def verify(self) -> None:
        """Hashes the files behind the rows and checks their content, once.

        Called by itself before the first search and before anything reads or changes rows.

        Raises:
            DatastoreError: naming the file that is damaged, or what is wrong with its rows.
        """
        if self._unverified is None:
            return
        self._unverified.verify()
        try:
            check_row_numbers(self._table.labels, self._table.ids, len(self))
            for part in self._table.features.parts:
                refuse_non_finite(part, "features")
            refuse_non_finite(self.mean.unsqueeze(0), "mean")
        except ValueError as error:
            raise DatastoreError(f"The datastore is not usable: {error}") from error
        self._table = dataclasses.replace(self._table, paths=self._unverified.read_paths())
        self._unverified = None

    def _choose_index(self, requested: str, *, fall_back: bool = False) -> IndexInfo:
        return choose_index(requested, len(self), self.dim, self.max_memory, fall_back=fall_back)

    def _positions(self, ids: Values) -> Tensor:
        wanted = as_whole_numbers(ids, "ids")
        if len(wanted.unique()) != len(wanted):
            raise ValueError("Expected `ids` to name each row once, but some are doubled.")
        self.verify()
        rows = self._table.positions(wanted)
        if (rows < 0).any():
            raise ValueError(
                f"Expected `ids` that the datastore has, but it does not have "
                f"{shown(wanted[rows < 0])}."
            )
        return rows
