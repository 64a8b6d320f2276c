"""What a model remembers beside its backbone, as one value: a change makes another one."""

import copy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from ..core.config import KnnConfig
from ..core.head import KnnHead
from ..store.backend import RowStore, as_row_store
from ..store.table import StoredRows
from .classes import Classes
from .receipts import Receipt
from .tally import Tally
from .thumbnails import Thumbnails


class Gone(NamedTuple):
    """What the last change took away, if it was `forget`, for `undo`; never saved.

    Attributes:
        rows: as they were stored.
        mean: [D], what centred rows when they were there.
        thumbnails: theirs.
        picture: the picture of neighbours that there was.
    """

    rows: StoredRows
    mean: Tensor
    thumbnails: Thumbnails | None
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
        measured: what was measured on pictures held out, or None.
        picture: a PNG with neighbours for the model card, or None.
        gone: what `undo` needs after `forget`, or None.
        tally: sums over the rows, if they were counted.
    """

    head: KnnHead
    classes: Classes
    rows: RowStore | None = None
    receipts: tuple[Receipt, ...] = ()
    thumbnails: Thumbnails | None = None
    measured: dict[str, Any] | None = None
    picture: bytes | None = None
    gone: Gone | None = None
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

    def remarked(self, note: str) -> "Memory":
        """With one more note in the last receipt."""
        last = self.receipts[-1]
        noted = replace(last, notes=[*last.notes, note])
        return replace(self, receipts=(*self.receipts[:-1], noted))

    def started_with(self, rows: RowStore | None) -> "Memory":
        """With other rows, of which nothing was changed yet, and no pictures are kept.

        Args:
            rows: the datastore.
        """
        return replace(self, rows=rows, receipts=(), thumbnails=None, gone=None, tally=None)
