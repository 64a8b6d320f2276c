"""What a model remembers beside its backbone, as one value: a change makes another one."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.backbone import KnnHead
from ..core.config import KnnConfig
from ..store.backend import RowStore, as_row_store, learned_map_of
from ..store.table import StoredRows, combine, sum_of
from .classes import Classes
from .closed_form import follows_rows, prepare_rows, sum_rows
from .contents import Contents
from .pictures import Thumbnails
from .receipts import Receipt
from .ridge import RidgeState


@dataclass(frozen=True)
class Tally:
    """Sums over all rows of a datastore, which spare reading the rows again; never changed.

    Attributes:
        total: sum of the rows' hashes, see `sum_of`.
        count: how many rows.
        fingerprint: of all rows, mean and learned map, whatever the order of the rows.
        state: sums behind a head in closed form; None if the head does not follow the rows.
        marks: of the datastore when it was counted.
        dtype: that the rows were stored in, which their hashes are of.
    """

    total: int
    count: int
    fingerprint: str
    state: RidgeState | None
    marks: tuple[Any, ...]
    dtype: str

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
        state = sum_rows(store, head, config) if follows_rows(config) else None
        return _tally(store, store.hash_sum(), state)

    def is_of(self, store: RowStore, config: KnnConfig) -> bool:
        """Whether the rows are those that were counted, for a head of that kind."""
        is_same = all(map(is_, store.marks, self.marks))
        return is_same and (self.state is not None) == follows_rows(config)

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
            head: as which a head in closed form sees them now.
            config: of the same model.
            gone: rows that are gone, or have other labels now.
            come: rows that came, or those of `gone` with their new labels.
            is_recentered: whether the mean moved, which changes all that was summed up.
        """
        total, state = self.total, self.state
        if store.dtype != self.dtype:  # rows came that only float32 could hold
            total = store.hash_sum()
        else:
            total += sum_of(come) if come is not None else 0
            total -= sum_of(gone) if gone is not None else 0
        if state is not None:
            if is_recentered:
                state = sum_rows(store, head, config)
            else:
                state = _updated(state.copy(), head, gone, come)
        return _tally(store, total, state)


def fingerprint_of(store: RowStore) -> str:
    """A hash of all rows and their mean, whatever their order, as in a receipt; all are read."""
    return _tally(store, store.hash_sum(), None).fingerprint


def _tally(store: RowStore, total: int, state: RidgeState | None) -> Tally:
    count = len(store)
    facts, learned = [store.metric, store.normalization], learned_map_of(store)
    facts += [] if learned is None else [learned.sha256]
    fingerprint = combine(total, count, store.mean, *facts)
    return Tally(total, count, fingerprint, state, store.marks, store.dtype)


def _updated(
    state: RidgeState, head: KnnHead, gone: StoredRows | None, come: StoredRows | None
) -> RidgeState:
    rows = come if gone is None else gone
    assert rows is not None
    features = prepare_rows(head, torch.from_numpy(rows.features))
    labels = torch.from_numpy(rows.labels)
    if gone is None:
        state.add(features, labels)
    elif come is None:
        state.remove(features, labels)
    else:
        state.relabel(features, labels, torch.from_numpy(come.labels))
    return state


class Gone(NamedTuple):
    """What a `forget` took away, for `undo` and to be erased in a version before; never saved.

    Attributes:
        rows: as they were stored.
        mean: [D], what centred rows when they were there.
        thumbnails: theirs.
        contents: prints of their pictures.
        picture: the picture of neighbours that there was.
    """

    rows: StoredRows
    mean: Tensor
    thumbnails: Thumbnails | None
    contents: Contents | None
    picture: bytes | None


@dataclass(frozen=True)
class Memory:
    """What a model remembers.

    `model.memory = memory` gives it to a model at once. So a change that fails on its way to the
    new value has changed nothing, but for rows in a vector database, see `RowStore.changed`.

    Attributes:
        head: the classifier beside the datastore.
        classes: their names, and what of them head and blend know.
        rows: the datastore, or None.
        receipts: of what was taught and forgotten since the training, oldest first.
        thumbnails: small pictures of stored rows, or None.
        contents: prints of the pictures of stored rows, where they are known, or None.
        measured: what was measured on pictures held out, or None.
        picture: a PNG with neighbours for the model card, or None.
        gone: what was forgotten since the model was opened and not brought back, oldest first.
        tally: sums over the rows, if they were counted.
    """

    head: KnnHead
    classes: Classes
    rows: RowStore | None = None
    receipts: tuple[Receipt, ...] = ()
    thumbnails: Thumbnails | None = None
    contents: Contents | None = None
    measured: dict[str, Any] | None = None
    picture: bytes | None = None
    gone: tuple[Gone, ...] = ()
    tally: Tally | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Memory":
        return replace(  # the rest is never changed, so that it can be shared
            self,
            head=copy.deepcopy(self.head, memo),
            rows=copy.deepcopy(self.rows, memo),
            measured=copy.deepcopy(self.measured, memo),
        )

    def counted(self, config: KnnConfig) -> "Memory":
        """With a tally of the rows as they are; rows changed behind its back are counted again.

        Args:
            config: of the model.

        Raises:
            ValueError: without rows, or for a datastore that can only be searched.
        """
        if self.rows is None:
            raise ValueError(
                "Expected a model with a datastore to change, but it has none; train it first."
            )
        store = as_row_store(self.rows)
        if self.tally is not None and self.tally.is_of(store, config):
            return self
        return replace(self, tally=Tally.of(store, self.head, config))

    @property
    def fingerprint(self) -> str:
        """Of rows that were counted."""
        assert self.tally is not None
        return self.tally.fingerprint

    def remarked(self, note: str) -> "Memory":
        """With one more note in the last receipt; with the same ones if it says nothing."""
        if not note:
            return self
        last = self.receipts[-1]
        noted = replace(last, notes=[*last.notes, note])
        return replace(self, receipts=(*self.receipts[:-1], noted))

    def without_pictures(self, ids: Sequence[int]) -> "Memory":
        """Without what is known of the pictures of some rows.

        Args:
            ids: of the rows.
        """
        small, contents = self.thumbnails, self.contents
        return replace(
            self,
            thumbnails=None if small is None else small.without(ids),
            contents=None if contents is None else contents.without(ids),
        )

    def with_contents(self, contents: Contents | None) -> "Memory":
        """With more prints of pictures.

        Args:
            contents: of rows that came; None if nobody knows.
        """
        if contents is None or self.contents is None:
            return self if contents is None else replace(self, contents=contents)
        return replace(self, contents=self.contents.joined(contents))

    def started_with(
        self, rows: RowStore | None, ids: Tensor | None = None, prints: Tensor | None = None
    ) -> "Memory":
        """With other rows, of which nothing was changed yet, and no small pictures are kept.

        Args:
            rows: the datastore.
            ids: [N] int64 of the rows whose pictures are known.
            prints: [N, 16] uint8 of these; None if nobody knows.
        """
        contents = None
        if rows is not None and ids is not None:
            contents = Contents.of(rows.blocks(), ids, prints)
        return replace(self, rows=rows, receipts=(), thumbnails=None, contents=contents, tally=None)
