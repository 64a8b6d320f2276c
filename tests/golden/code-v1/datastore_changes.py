"""How the rows of a datastore are changed: all rows of a call, or none."""

import dataclasses
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .datastore_rows import DatastoreRows
from .datastore_search import DatastoreSearch
from .faiss_index import FaissApproximate
from .first_pass import Ints
from .indexing import FLAT
from .rows import (
    Values,
    as_features,
    as_whole_numbers,
    check_paths,
    check_row_numbers,
    shown,
    to_storage,
)
from .search_backend import check_alike


class DatastoreChanges(DatastoreSearch):
    """Changes the rows of a `Datastore`, and its index where it can follow."""

    def add(
        self,
        features: Tensor | NDArray,
        labels: Values,
        ids: Values | None = None,
        paths: Sequence[str] | None = None,
    ) -> Tensor:
        """Adds rows, all or none. The mean does not move; `recenter` moves it.

        Args:
            features: [M, D] raw features.
            labels: [M] whole numbers >= 0.
            ids: [M] unique whole numbers that the datastore does not have; None continues after the
                largest id.
            paths: [M] where each row's picture lies.

        Returns:
            [M] the ids of the new rows.

        Raises:
            ValueError: for bad features, labels or ids, or an id that exists; nothing is changed.
        """
        added = as_features(features, "features", self.dim)
        first = int(self.ids.max()) + 1 if len(self) else 0
        if ids is None and first + len(added) > torch.iinfo(torch.int64).max:
            raise ValueError("Expected `ids`, since no larger ones are left; pass unused ones.")
        numbers = torch.arange(first, first + len(added))
        if ids is not None:
            numbers = as_whole_numbers(ids, "ids")
        known = numbers[self._table.positions(numbers) >= 0]
        if len(known):
            raise ValueError(
                f"Expected `ids` that the datastore does not have, but it has {shown(known)}; "
                "remove them first or leave `ids` out."
            )
        row_labels, row_ids = check_row_numbers(
            as_whole_numbers(labels, "labels"), numbers, len(added)
        )
        new_paths = check_paths(paths, len(added))
        stored = to_storage(added, self._table.features.dtype)
        table = self._table.append(stored, row_labels, row_ids, new_paths, None)
        follows = self._searcher is not None and self._searcher.add(
            table.features, table.ids.numpy()
        )
        if follows and self._table.lists is not None:
            lists = np.concatenate([self._table.lists, self._lists_of_last(len(added))])
            table = dataclasses.replace(table, lists=lists)
        self._table, self._trusted = table, None
        requested = self._index.requested
        outgrown = (
            self._index.spec == FLAT
            and requested != FLAT
            and (self._choose_index(requested, fall_back=True).spec != FLAT)
        )
        if outgrown or not follows:
            self._drop_index()
        return row_ids

    def remove(self, ids: Values) -> None:
        """Removes rows, all or none; the next save holds no byte of them.

        Args:
            ids: [M] unique ids that the datastore has.

        Raises:
            ValueError: for an id that it does not have; nothing is changed.
        """
        rows = self._positions(ids)
        keep = torch.ones(len(self), dtype=torch.bool)
        keep[rows] = False
        self._table, self._trusted = self._table.keep(keep), None
        if self._searcher is not None and not self._searcher.remove(
            self._table.features, self._table.ids.numpy(), keep.numpy()
        ):
            self._drop_index()

    def relabel(self, ids: Values, labels: Values) -> None:
        """Gives rows other labels, all or none.

        Args:
            ids: [M] unique ids that the datastore has.
            labels: [M] whole numbers >= 0.

        Raises:
            ValueError: for an id that it does not have, or bad labels; nothing is changed.
        """
        rows = self._positions(ids)
        wanted = as_whole_numbers(labels, "labels")
        if len(wanted) != len(rows):
            raise ValueError(
                f"Expected one of `labels` per id ({len(rows)}), but got {len(wanted)}."
            )
        self._table = self._table.relabel(rows, wanted)

    def merge(self, other: DatastoreRows, *, renumber: bool = False) -> Tensor:
        """Adds all rows of another datastore, all or none. The mean does not move.

        Args:
            other: made by the same backbone, with the same metric and normalisation.
            renumber: give the new rows new ids instead of refusing ids that exist in both.

        Returns:
            The ids of the new rows.

        Raises:
            ValueError: for another width, metric, normalisation or backbone, or ids in both.
        """
        check_alike(self, other)
        ids = None if renumber else other.ids
        return self.add(other.features, other.labels, ids, other.paths)

    def recenter(self, mean: Tensor | None = None) -> None:
        """Sets the mean that `l2_centered` subtracts.

        Args:
            mean: [D] to go back to; None takes the mean of the present rows.

        Raises:
            ValueError: for a mean of another shape, or one that is not finite.
        """
        if mean is not None and (mean.shape != (self.dim,) or not bool(mean.isfinite().all())):
            raise ValueError(
                f"Expected `mean` to be {self.dim} finite numbers, but got shape "
                f"{tuple(mean.shape)}; leave it out for the mean of the present rows."
            )
        new = self._mean_of_rows() if mean is None else mean.detach().cpu().float().clone()
        self.mean, self._table, self._trusted = new, self._table.with_new_mean(), None
        self._drop_index()

    def restore(self, earlier: Self) -> None:
        """Takes everything back since a copy was made; free, since rows are never written in place.

        Args:
            earlier: `copy.copy` of this datastore.
        """
        self.__dict__.update(earlier.__dict__)

    def _mean_of_rows(self) -> Tensor:
        if not len(self):
            return torch.zeros(self.dim)
        order = self.ids.argsort().numpy()  # the same sum whatever the order of insertion
        total = np.zeros(self.dim)
        for start in range(0, len(order), 65_536):
            rows = self._table.features[order[start : start + 65_536]]
            total += rows.sum(axis=0, dtype=np.float64)
        return torch.from_numpy(total / len(order)).float()

    def _lists_of_last(self, count: int) -> Ints:
        """The lists of rows that the index has just taken in."""
        assert self._searcher is not None
        index, features = self._searcher.first_pass, self._searcher.features
        assert isinstance(index, FaissApproximate)
        added = features[len(features) - count : len(features)]
        return index.lists_of(self._searcher.space.index_rows(added))

    def _drop_index(self) -> None:
        """Forgets the index, which is built again, for the present number of rows, when needed."""
        self._searcher, self._centroids = None, None
        self._table = self._table.with_lists(None)
        self._index = self._choose_index(self._index.requested, fall_back=True)
