"""Changes of a collection in Milvus: made up and checked whole before the first row is written."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.manifest import DatastoreError
from ..core.rows import Values, as_features, as_whole_numbers, check_row_numbers, shown
from ..store.casting import TOO_COARSE, Centers, fits_float16
from ..store.table import StoredRows, check_paths, sum_of
from .about import CHANGING, About
from .collection import (
    ROW_FIELDS,
    MilvusCollection,
    check_rows,
    decode_rows,
    encode_rows,
    rows_per_call,
)
from .load import BATCH_ROWS, space_of


class Reversal(NamedTuple):
    """What it takes to make a collection what it was before a change.

    Attributes:
        before: the record before the change.
        after: the record after it.
        old: the rows that it removes or replaces.
        added: ids that were not there before.
    """

    before: About
    after: About
    old: StoredRows
    added: list[int]


class RowChange(NamedTuple):
    """A change of a collection, checked and ready to be made.

    Attributes:
        before: the record as it is.
        after: the record as it will be.
        old: the rows that go, or are replaced.
        new: the rows that come, or replace them.
    """

    before: About
    after: About
    old: StoredRows
    new: StoredRows

    @property
    def reversal(self) -> Reversal:
        """How to take it back."""
        known = set(self.old.ids.tolist())
        added = [row_id for row_id in self.new.ids.tolist() if row_id not in known]
        return Reversal(self.before, self.after, self.old, added)


def rows_with(
    collection: MilvusCollection, ids: Values, fields: Sequence[str] = ROW_FIELDS
) -> list[Any]:
    """The rows with some ids, in their order.

    Args:
        collection: where to look.
        ids: [M] unique ids.
        fields: what to return of a row, the id among it.

    Raises:
        ValueError: for an id that is not there, or one that is named twice.
    """
    wanted = as_whole_numbers(ids, "ids")
    if len(wanted.unique()) != len(wanted):
        raise ValueError("Expected `ids` to name each row once, but some are doubled.")
    found = {row["id"]: row for row in collection.get(wanted.tolist(), fields)}
    missing = [row_id for row_id in wanted.tolist() if row_id not in found]
    if missing:
        raise ValueError(
            f"Expected `ids` that the datastore has, but it does not have "
            f"{shown(torch.tensor(missing))}."
        )
    return [found[row_id] for row_id in wanted.tolist()]


def rows_to_add(
    collection: MilvusCollection,
    about: About,
    features: Tensor | NDArray,
    labels: Values,
    ids: Values | None,
    paths: Sequence[str] | None,
    splits: str | Sequence[str],
) -> RowChange:
    """The change that adds rows; see `MilvusDatastore.add`.

    Args:
        collection: where to.
        about: the record as it is.
        features: [M, D] raw features.
        labels: [M] whole numbers >= 0.
        ids: [M] that are not there; None takes numbers that no row ever had.
        paths: M strings, or None.
        splits: of these rows, one for all or M.
    """
    added = as_features(features, "features", about.dim)
    first = about.next_id
    if ids is None and first + len(added) > torch.iinfo(torch.int64).max:
        raise ValueError("Expected `ids`, since no larger ones are left; pass unused ones.")
    numbers = (
        torch.arange(first, first + len(added)) if ids is None else as_whole_numbers(ids, "ids")
    )
    row_labels, row_ids = check_row_numbers(as_whole_numbers(labels, "labels"), numbers, len(added))
    known = sorted(row["id"] for row in collection.get(row_ids.tolist(), ["id"]))
    if known:
        raise ValueError(
            f"Expected `ids` that the datastore does not have, but it has "
            f"{shown(torch.tensor(known))}; remove them first or leave `ids` out."
        )
    new_paths = check_paths(paths, len(added))
    own_splits = [splits] * len(added) if isinstance(splits, str) else list(splits)
    if len(own_splits) != len(added):
        raise ValueError(f"Expected one split per row ({len(added)}), but got {len(own_splits)}.")
    check_rows(new_paths, set(own_splits), about.dim, about.dtype)
    new = StoredRows(
        row_ids.numpy(), row_labels.numpy(), _to_storage(added, collection, about),
        new_paths or [""] * len(added), own_splits,
    )  # fmt: skip
    after = dataclasses.replace(
        about,
        count=about.count + len(added),
        total=(about.total + sum_of(new)) % 2**256,
        next_id=max([first, *(row_id + 1 for row_id in row_ids.tolist())]),
        has_paths=about.has_paths or new_paths is not None,
    )
    return RowChange(about, after, decode_rows([], about), new)


def rows_to_remove(collection: MilvusCollection, about: About, ids: Values) -> RowChange:
    """The change that removes rows; see `MilvusDatastore.remove`.

    Args:
        collection: where from.
        about: the record as it is.
        ids: [M] unique ids that are there.
    """
    old = decode_rows(rows_with(collection, ids), about)
    after = dataclasses.replace(
        about,
        count=about.count - len(old.ids),
        total=(about.total - sum_of(old)) % 2**256,
    )
    return RowChange(about, after, old, decode_rows([], about))


def rows_to_relabel(
    collection: MilvusCollection, about: About, ids: Values, labels: Values
) -> RowChange:
    """The change that gives rows other labels; see `MilvusDatastore.relabel`.

    Args:
        collection: where they are.
        about: the record as it is.
        ids: [M] unique ids that are there.
        labels: [M] whole numbers >= 0.
    """
    old = decode_rows(rows_with(collection, ids), about)
    wanted = as_whole_numbers(labels, "labels")
    if len(wanted) != len(old.ids):
        raise ValueError(
            f"Expected one of `labels` per id ({len(old.ids)}), but got {len(wanted)}."
        )
    new = old._replace(labels=wanted.numpy())
    total = (about.total - sum_of(old) + sum_of(new)) % 2**256
    return RowChange(about, dataclasses.replace(about, total=total), old, new)


def check_unchanged(collection: MilvusCollection, about: About) -> None:
    """Refuses a collection that somebody else changed.

    Args:
        collection: the collection.
        about: the record as we know it.

    Raises:
        DatastoreError: with both numbers of rows.
    """
    found = collection.read_about()
    if found != about:
        raise DatastoreError(
            f"Expected {collection} as it was ({about.count} rows), but it is {_said(found)}; "
            "somebody else changed it, connect again."
        )


def make_change(collection: MilvusCollection, change: RowChange) -> None:
    """Changes the rows; the collection is marked while it is neither what it was nor will be.

    Args:
        collection: whose record is `change.before`.
        change: what to do.

    Raises:
        DatastoreConnectionError: if the server does not answer; the collection stays marked.
    """
    before, after, old, new = change
    kept = set(new.ids.tolist())
    collection.write_about(_marked(before))
    collection.delete([row_id for row_id in old.ids.tolist() if row_id not in kept])
    _upsert(collection, before, new)
    collection.write_about(after)


def take_back(collection: MilvusCollection, reversal: Reversal) -> None:
    """Makes a collection what it was, however far a change of it came; can be repeated.

    Args:
        collection: the collection.
        reversal: of the change.

    Raises:
        DatastoreError: if somebody else changed it since.
        DatastoreConnectionError: if the server does not answer.
    """
    before, after, old, added = reversal
    found = collection.read_about()
    if found == before:
        return
    if found not in (_marked(before), after):
        raise DatastoreError(
            f"Expected {collection} as an interrupted change left it ({before.count} or "
            f"{after.count} rows), but it is {_said(found)}; somebody else changed it since."
        )
    collection.write_about(_marked(before))
    collection.delete(added)
    _upsert(collection, before, old)
    count = collection.count()
    if count != before.count:
        raise DatastoreError(
            f"Expected {collection} to hold {before.count} rows again, but it holds {count}; "
            "somebody else changed it since."
        )
    collection.write_about(before)


def _marked(about: About) -> About:
    return dataclasses.replace(about, state=CHANGING)


def _said(found: About | None) -> str:
    return "gone" if found is None else f"{found.state}, {found.count} rows"


def _upsert(collection: MilvusCollection, about: About, rows: StoredRows) -> None:
    step, space = rows_per_call(about.dim, BATCH_ROWS), space_of(collection, about)
    for start in range(0, len(rows.ids), step):
        part = rows.part(slice(start, start + step))
        vectors = space.first_pass_rows(part.features).astype(about.vectors)
        collection.upsert(encode_rows(part, vectors))


def _to_storage(added: Tensor, collection: MilvusCollection, about: About) -> NDArray:
    centers, problem, space = Centers.of_added(added, about.mean), "", space_of(collection, about)
    if about.dtype == "float16" and not fits_float16(added, *centers, learned=space.learned):
        problem = f"that float16 can hold (one is {TOO_COARSE})"
    stored = added.to(getattr(torch, about.dtype)).numpy()
    if not problem and not space.holds(np.asarray(stored)):
        problem = f"no longer than {space.largest:g} once normalised"
    if problem:
        raise ValueError(
            f"Expected `features` {problem}, as {collection} was made for; take the rows out with "
            "to_datastore(), add them there, and load a new collection."
        )
    return stored
