"""What keeps in step with rows while they come and go: their hash, and sums for a ridge head."""

from dataclasses import dataclass
from operator import is_
from typing import Any

import torch

from ..core.config import KnnConfig
from ..core.head import KnnHead
from ..store.backend import RowStore
from ..store.table import StoredRows, combine, sum_of
from .ridge import RidgeState, follows_rows, prepare_rows, sum_rows


@dataclass(frozen=True)
class Tally:
    """Sums over all rows of a datastore, which spare reading the rows again; never changed.

    Attributes:
        total: sum of the rows' hashes, see `sum_of`.
        count: how many rows.
        fingerprint: of all rows and the mean, whatever the order of the rows.
        ridge: sums behind a ridge head; None if the head does not follow the rows.
        marks: of the datastore when it was counted.
    """

    total: int
    count: int
    fingerprint: str
    ridge: RidgeState | None
    marks: tuple[Any, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tally":
        return self  # the copy of a datastore shares its rows until they change

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # pickles of a model count again when they need to

    @classmethod
    def of(cls, store: RowStore, head: KnnHead, config: KnnConfig) -> "Tally":
        """Counts the rows; all are read.

        Args:
            store: the rows.
            head: of the same model.
            config: likewise.
        """
        ridge = sum_rows(store, head, config) if follows_rows(config) else None
        return _tally(store, store.hash_sum(), ridge)

    def is_of(self, store: RowStore, config: KnnConfig) -> bool:
        """Whether the rows are those that were counted, for a head of that kind."""
        is_same = all(map(is_, store.marks, self.marks))
        return is_same and (self.ridge is not None) == follows_rows(config)

    def follow(
        self,
        store: RowStore,
        head: KnnHead,
        config: KnnConfig,
        gone: StoredRows | None,
        come: StoredRows | None,
        is_recentered: bool,
    ) -> "Tally":
        """Of the rows after a change.

        Args:
            store: the rows as they are now.
            head: as which a ridge head sees them now.
            config: of the same model.
            gone: rows that are gone, or have other labels now.
            come: rows that came, or those of `gone` with their new labels.
            is_recentered: whether the mean moved, which changes all that was summed up.
        """
        total, ridge = self.total, self.ridge
        total += sum_of(come) if come is not None else 0
        total -= sum_of(gone) if gone is not None else 0
        if ridge is not None:
            if is_recentered:
                ridge = sum_rows(store, head, config)
            else:
                ridge = _updated(ridge.copy(), head, gone, come)
        return _tally(store, total, ridge)


def _tally(store: RowStore, total: int, ridge: RidgeState | None) -> Tally:
    count = len(store)
    fingerprint = combine(total, count, store.mean, store.metric, store.normalization)
    return Tally(total, count, fingerprint, ridge, store.marks)


def _updated(
    ridge: RidgeState, head: KnnHead, gone: StoredRows | None, come: StoredRows | None
) -> RidgeState:
    rows = come if gone is None else gone
    assert rows is not None
    features = prepare_rows(head, torch.from_numpy(rows.features))
    labels = torch.from_numpy(rows.labels)
    if gone is None:
        ridge.add(features, labels)
    elif come is None:
        ridge.remove(features, labels)
    else:
        ridge.relabel(features, labels, torch.from_numpy(come.labels))
    return ridge
