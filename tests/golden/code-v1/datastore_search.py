"""How a datastore is searched: all rows, the rows of some classes, or each without itself."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.utils.logging import tqdm

from .datastore_rows import DatastoreRows
from .indexing import FLAT, Placement, StoredLists, build_searcher
from .rows import Values, as_whole_numbers
from .search import RowSpace, Searcher
from .search_backend import Neighbors, check_request, check_split


class _Filtered(NamedTuple):
    """The rows of some classes, and of what they were taken."""

    classes: Tensor
    ids: Tensor
    labels: Tensor
    mean: Tensor
    placement: Placement
    store: "DatastoreSearch"

    def is_of(self, store: "DatastoreSearch", classes: Tensor) -> bool:
        is_same = self.ids is store._table.ids and self.labels is store._table.labels
        is_same &= self.mean is store.mean and self.placement == store._placement
        return is_same and torch.equal(self.classes, classes)


class DatastoreSearch(DatastoreRows):
    """Searches the rows of a `Datastore`."""

    _filtered: _Filtered | None = None

    def search(
        self,
        queries: Tensor | NDArray,
        k: int = 20,
        exclude_ids: Values | None = None,
        *,
        labels: Values | None = None,
        split: str | None = None,
    ) -> Neighbors:
        """Finds the k nearest rows of each query.

        Args:
            queries: [B, D] finite raw features of any float dtype and device.
            k: how many, >= 1; fewer rows give fewer neighbours.
            exclude_ids: [B] int64; the row with that id is not a neighbour of that query (-1 =
                none): leave-one-out by id, whatever else lies at the same place.
            labels: only rows of these classes are neighbours, searched exactly; None for all. The
                rows of the classes asked for last are kept ready.
            split: the rows' split, if it must be a certain one; a datastore holds one.

        Returns:
            Neighbors [B, min(k, N)], or [B, min(k, N - 1)] with `exclude_ids`, on the device of the
            queries, ordered by similarity (compared in float64), then id; N counts the rows of
            `labels`. Exact for `flat`; other indexes may miss some, see `index.recall`.

        Raises:
            ValueError: for NaN or infinite queries (with the row numbers), another width, k < 1,
                exclude_ids of another length, or a split that the rows are not of.
            DatastoreError: if the files behind the rows turn out to be damaged.
        """
        check_split(split, self.source)
        store = self if labels is None else self._of_labels(labels)
        return store.nearest(queries, k, exclude_ids).rounded(queries)

    def nearest(
        self, queries: Tensor | NDArray, k: int, exclude_ids: Values | None = None
    ) -> Neighbors:
        """The answer of `search` before it is rounded, for those who merge several.

        Args:
            queries: see `search`.
            k: see `search`.
            exclude_ids: see `search`.

        Returns:
            Neighbors as `search` finds them, with similarities in float64, on the CPU.

        Raises:
            ValueError: see `search`.
            DatastoreError: see `search`.
        """
        wanted = check_request(queries, k, exclude_ids, self.dim)
        shape = (len(wanted.queries), wanted.width(len(self)))
        if 0 in shape:
            similarities, positions = np.zeros(shape), np.zeros(shape, np.int64)
        else:
            similarities, positions = self.build_index().search(
                wanted.queries, shape[1], wanted.excluded
            )
        rows = torch.from_numpy(positions)
        table = self._table
        return Neighbors(torch.from_numpy(similarities), table.labels[rows], table.ids[rows])

    def leave_one_out(
        self, k: int = 20, batch_size: int = 4096, *, progress: bool = False
    ) -> Iterator[Neighbors]:
        """The neighbours of each stored row among the others, in row order, chunk by chunk.

        Args:
            k: how many.
            batch_size: rows per chunk, which bounds the memory.
            progress: show a progress bar.

        Yields:
            Neighbors of the next rows.
        """
        self.verify()
        table = self._table  # the rows of now, whatever is changed between two chunks
        with tqdm(total=len(table), unit=" rows", desc="neighbours", disable=not progress) as bar:
            for start in range(0, len(table), batch_size):
                part = slice(start, start + batch_size)
                rows = table.features[part]
                yield self.search(rows, k, table.ids[part])
                bar.update(len(rows))

    def to(
        self, device: str | torch.device | Sequence[str | torch.device], *, float16: bool = False
    ) -> Self:
        """Chooses where searches run; the rows, the answers and their order stay the same.

        On a device an exact search is a blocked matrix product of torch, on several they share the
        rows; an inverted file goes to faiss-gpu where that is installed. Candidates are compared on
        the CPU in float64 in any case.

        Args:
            device: `cpu`, `cuda`, `cuda:1`, `mps`, …, or several of one kind.
            float16: keep half of the memory there; answers stay exact, by more candidates.

        Returns:
            This datastore.

        Raises:
            ValueError: for a device that is not here.
        """
        self._placement = Placement.of(device, float16)
        self._searcher = None
        return self

    def build_index(self) -> Searcher:
        """Builds the index now instead of at the first search.

        Returns:
            The searcher.

        Raises:
            ValueError: for an index that cannot be built from these rows.
            DatastoreError: if the files behind the rows turn out to be damaged.
        """
        self.verify()
        if self._searcher is None:
            table = self._table
            mean = self.mean.double().numpy()
            space = RowSpace(mean, self.metric, self.normalization, table.features)
            self._searcher, self._index, lists = build_searcher(
                table.features, table.ids.numpy(), space, self._index, self._stored_lists(),
                self.min_recall, self._placement, self._trusted,
            )  # fmt: skip
            if lists is not None and table.lists is None:
                self._centroids, self._table = lists.centroids, table.with_lists(lists.lists)
        return self._searcher

    def _stored_lists(self) -> StoredLists | None:
        if self._centroids is None or self._table.lists is None:
            return None
        return StoredLists(self._centroids, self._table.lists)

    def _of_labels(self, labels: Values) -> "DatastoreSearch":
        """The rows of some classes, searched exactly."""
        classes = as_whole_numbers(labels, "labels").unique()
        self.verify()
        known = self._filtered
        if known is not None and known.is_of(self, classes):
            return known.store
        part = self.subset(self._table.ids[torch.isin(self._table.labels, classes)])
        part._index, part._placement = part._choose_index(FLAT), self._placement
        table = self._table
        self._filtered = _Filtered(
            classes, table.ids, table.labels, self.mean, self._placement, part
        )
        return part
