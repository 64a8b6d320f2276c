"""Changes of a collection in Milvus: checked whole before the first row is written."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .manifest import DatastoreError
from .milvus_collection import MilvusCollection
from .milvus_load import BATCH_ROWS, space_of
from .milvus_rows import (
    CHANGING,
    ROW_FIELDS,
    About,
    check_rows,
    decode_rows,
    encode_rows,
    rows_per_call,
)
from .row_fingerprint import StoredRows, sum_of
from .rows import (
    Values,
    as_features,
    as_whole_numbers,
    check_paths,
    check_row_numbers,
    shown,
    to_storage,
)


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


def add_rows(
    collection: MilvusCollection,
    about: About,
    features: Tensor | NDArray,
    labels: Values,
    ids: Values | None,
    paths: Sequence[str] | None,
    split: str,
) -> tuple[About, Tensor]:
    """Adds rows; see `MilvusDatastore.add`.

    Args:
        collection: where to.
        about: the record as it was.
        features: [M, D] raw features.
        labels: [M] whole numbers >= 0.
        ids: [M] that are not there; None takes numbers that no row ever had.
        paths: M strings, or None.
        split: of these rows.

    Returns:
        The record as it is now, and the ids [M].
    """
    added = as_features(features, "features", about.dim)
    first = about.next_id
    numbers = torch.arange(first, first + len(added))
    if ids is not None:
        numbers = as_whole_numbers(ids, "ids")
    row_labels, row_ids = check_row_numbers(as_whole_numbers(labels, "labels"), numbers, len(added))
    known = sorted(row["id"] for row in collection.get(row_ids.tolist(), ["id"]))
    if known:
        raise ValueError(
            f"Expected `ids` that the datastore does not have, but it has "
            f"{shown(torch.tensor(known))}; remove them first or leave `ids` out."
        )
    new_paths = check_paths(paths, len(added))
    check_rows(new_paths, split, about.dim, about.dtype)
    rows = StoredRows(
        row_ids.numpy(), row_labels.numpy(), _to_storage(added, collection, about),
        new_paths or [""] * len(added), [split] * len(added),
    )  # fmt: skip
    after = dataclasses.replace(
        about,
        count=about.count + len(added),
        total=(about.total + sum_of(rows)) % 2**256,
        next_id=max([first, *(row_ids + 1).tolist()]),
        has_paths=about.has_paths or new_paths is not None,
    )
    _change(collection, about, after, lambda: _upsert(collection, about, rows))
    return after, row_ids


def remove_rows(collection: MilvusCollection, about: About, ids: Values) -> About:
    """Removes rows; see `MilvusDatastore.remove`.

    Args:
        collection: where from.
        about: the record as it was.
        ids: [M] unique ids that are there.

    Returns:
        The record as it is now.
    """
    rows = decode_rows(rows_with(collection, ids), about)
    after = dataclasses.replace(
        about,
        count=about.count - len(rows.ids),
        total=(about.total - sum_of(rows)) % 2**256,
    )
    _change(collection, about, after, lambda: collection.delete(rows.ids.tolist()))
    return after


def relabel_rows(collection: MilvusCollection, about: About, ids: Values, labels: Values) -> About:
    """Gives rows other labels; see `MilvusDatastore.relabel`.

    Args:
        collection: where they are.
        about: the record as it was.
        ids: [M] unique ids that are there.
        labels: [M] whole numbers >= 0.

    Returns:
        The record as it is now.
    """
    before = decode_rows(rows_with(collection, ids), about)
    wanted = as_whole_numbers(labels, "labels")
    if len(wanted) != len(before.ids):
        raise ValueError(
            f"Expected one of `labels` per id ({len(before.ids)}), but got {len(wanted)}."
        )
    rows = before._replace(labels=wanted.numpy())
    total = (about.total - sum_of(before) + sum_of(rows)) % 2**256
    after = dataclasses.replace(about, total=total)
    _change(collection, about, after, lambda: _upsert(collection, about, rows))
    return after


def _change(
    collection: MilvusCollection, before: About, after: About, action: Callable[[], None]
) -> None:
    """Marks the collection while it is neither what it was nor what it will be."""
    found = collection.read_about()
    if found != before:
        state = "gone" if found is None else f"{found.state}, {found.count} rows"
        raise DatastoreError(
            f"Expected {collection} as it was ({before.count} rows), but it is {state}; "
            "somebody else changed it, connect again."
        )
    collection.write_about(dataclasses.replace(before, state=CHANGING))
    action()
    collection.write_about(after)


def _upsert(collection: MilvusCollection, about: About, rows: StoredRows) -> None:
    step = rows_per_call(about.dim, BATCH_ROWS)
    encoded = encode_rows(rows, space_of(about).first_pass_rows(rows.features))
    for start in range(0, len(encoded), step):
        collection.upsert(encoded[start : start + step])


def _to_storage(added: Tensor, collection: MilvusCollection, about: About) -> NDArray:
    stored = to_storage(added, getattr(torch, about.dtype)).numpy()
    space, problem = space_of(about), ""
    if str(stored.dtype) != about.dtype:
        problem = f"that {about.dtype} can hold"
    elif not space.holds(np.asarray(stored)):
        problem = f"no longer than {space.largest:g} once normalised"
    if problem:
        raise ValueError(
            f"Expected `features` {problem}, as {collection} was made for; take the rows out with "
            "to_datastore(), add them there, and load a new collection."
        )
    return stored
