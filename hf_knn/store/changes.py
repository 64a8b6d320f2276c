"""What a change makes of a table of rows: all is checked, then another table is the answer."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.learned import LearnedMap
from ..core.manifest import STORAGE_DTYPES
from ..core.rows import Values, as_features, as_whole_numbers, check_row_numbers, shown
from .casting import Centers, to_storage, warn_if_coarse
from .table import RowTable, StoredRows, check_paths

_SUMMED_AT_ONCE = 65_536


def new_table(
    features: Tensor, labels: Tensor, ids: Tensor, mean: Tensor, paths: Sequence[str] | None
) -> RowTable:
    """A table of checked parts that no file holds yet.

    Args:
        features: [N, D] float16 or float32.
        labels: [N] int64.
        ids: [N] int64, unique.
        mean: [D] float32, which must fit.
        paths: N strings, or None.

    Raises:
        ValueError: for parts that do not fit, with both numbers.
    """
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
    return RowTable.of(features, labels, ids, check_paths(paths, len(features)))


def checked_rows(
    features: Tensor | NDArray, labels: Values, ids: Values | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Features, labels and ids, of which all is right but the dtype that they are stored in.

    Args:
        features: [N, D] raw features of any float dtype and device.
        labels: [N] whole numbers >= 0.
        ids: [N] unique whole numbers >= 0; None numbers the rows.

    Returns:
        [N, D] float32 or float64, [N] int64 and [N] int64.

    Raises:
        ValueError: for NaN or infinite features (with the row numbers), shapes that disagree,
            negative, float or doubled ids or labels.
    """
    rows = as_features(features, "features")
    numbers = torch.arange(len(rows)) if ids is None else as_whole_numbers(ids, "ids")
    wanted = as_whole_numbers(labels, "labels")
    return rows, *check_row_numbers(wanted, numbers, len(rows))


def stored_rows(
    features: Tensor | NDArray, labels: Values, ids: Values | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same as `checked_rows`, with features [N, D] as they are stored, float16 or float32."""
    rows, numbers, row_ids = checked_rows(features, labels, ids)
    return to_storage(rows, torch.float16, Centers.of(rows)), numbers, row_ids


def find_rows(table: RowTable, ids: Values) -> Tensor:
    """Where rows lie.

    Args:
        table: N rows.
        ids: [M] unique ids.

    Returns:
        [M] int64 positions.

    Raises:
        ValueError: for an id that the table does not have, or one named twice.
    """
    wanted = as_whole_numbers(ids, "ids")
    if len(wanted.unique()) != len(wanted):
        raise ValueError("Expected `ids` to name each row once, but some are doubled.")
    rows = table.positions(wanted)
    if (rows < 0).any():
        raise ValueError(
            f"Expected `ids` that the datastore has, but it does not have "
            f"{shown(wanted[rows < 0])}."
        )
    return rows


def all_but(table: RowTable, ids: Values) -> Tensor:
    """Which rows stay when others, named as in `find_rows`, are removed: [N] bool."""
    stays = torch.ones(len(table), dtype=torch.bool)
    stays[find_rows(table, ids)] = False
    return stays


def paths_at(table: RowTable, rows: slice | Tensor) -> list[str]:
    """Where the pictures of some rows lie; empty where nobody said.

    Args:
        table: N rows.
        rows: which, by position: a slice, or [M] int64.
    """
    places = range(len(table))[rows] if isinstance(rows, slice) else rows.tolist()
    return [""] * len(places) if table.paths is None else [table.paths[row] for row in places]


def rows_at(table: RowTable, rows: slice | Tensor, split: str) -> StoredRows:
    """Some rows with all that is stored about them.

    Args:
        table: N rows.
        rows: which, by position: a slice of step 1, or [M] int64.
        split: of all rows.
    """
    features = table.features[rows if isinstance(rows, slice) else rows.numpy()]
    paths = paths_at(table, rows)
    ids, labels = table.ids[rows].numpy(), table.labels[rows].numpy()
    return StoredRows(ids, labels, features, paths, [split] * len(paths))


def add_rows(
    table: RowTable,
    features: Tensor | NDArray,
    labels: Values,
    ids: Values | None,
    paths: Sequence[str] | None,
    mean: Tensor,
    learned: LearnedMap | None,
) -> RowTable:
    """With more rows at the end, cast to the storage dtype; lists of an index are forgotten.

    All rows become float32 where float16 would lose too much of the new ones.

    Args:
        table: N rows of width D.
        features: [M, D] raw features.
        labels: [M] whole numbers >= 0.
        ids: [M] unique ids that the table does not have; None continues after the largest.
        paths: [M] where each row's picture lies.
        mean: [D] that centres the rows.
        learned: that they go through, or None.

    Raises:
        ValueError: for bad features, labels or ids, or an id that exists.
    """
    added = as_features(features, "features", table.features.shape[1])
    if ids is None:
        first = int(table.ids.max()) + 1 if len(table) else 0
        if first + len(added) > torch.iinfo(torch.int64).max:
            raise ValueError("Expected `ids`, since no larger ones are left; pass unused ones.")
        numbers = torch.arange(first, first + len(added))
    else:
        numbers = as_whole_numbers(ids, "ids")
    known = numbers[table.positions(numbers) >= 0]
    if len(known):
        raise ValueError(
            f"Expected `ids` that the datastore does not have, but it has {shown(known)}; "
            "remove them first or leave `ids` out."
        )
    wanted, numbers = check_row_numbers(as_whole_numbers(labels, "labels"), numbers, len(added))
    new_paths = check_paths(paths, len(added))
    centers = Centers.of_added(added, mean)
    stored = to_storage(added, table.features.dtype, *centers, learned=learned)
    return table.append(stored, wanted, numbers, new_paths, None)


def relabel_rows(table: RowTable, ids: Values, labels: Values) -> RowTable:
    """With other labels for some rows.

    Args:
        table: N rows.
        ids: [M] unique ids that the table has.
        labels: [M] whole numbers >= 0.

    Raises:
        ValueError: for an id that it does not have, or bad labels.
    """
    rows, wanted = find_rows(table, ids), as_whole_numbers(labels, "labels")
    if len(wanted) != len(rows):
        raise ValueError(f"Expected one of `labels` per id ({len(rows)}), but got {len(wanted)}.")
    return table.relabel(rows, wanted)


def mean_for(table: RowTable, mean: Tensor | None) -> Tensor:
    """A mean that centres rows.

    Args:
        table: N rows of width D.
        mean: [D] the one wanted; None takes that of the rows.

    Returns:
        [D] float32.

    Raises:
        ValueError: for a mean of another shape, or one that is not finite.
    """
    width = table.features.shape[1]
    if mean is None:
        found = _mean_of(table, width)
        table.verify()  # afterwards: it is the mean of the rows that were stored
        return found
    if mean.shape != (width,) or not bool(mean.isfinite().all()):
        raise ValueError(
            f"Expected `mean` to be {width} finite numbers, but got shape {tuple(mean.shape)}; "
            "leave it out for the mean of the present rows."
        )
    return mean.detach().cpu().float().clone()


def moved_mean(table: RowTable, mean: Tensor | None, learned: LearnedMap | None) -> Tensor:
    """See `mean_for`; it says so if the rows were stored too coarsely for it."""
    found = mean_for(table, mean)
    warn_if_coarse(table.features, found, learned)
    return found


def new_map(table: RowTable, mean: Tensor, weight: Tensor | None) -> LearnedMap | None:
    """A learned map for rows; it says so if they were stored too coarsely for it."""
    learned = fitting_map(table, None if weight is None else LearnedMap(weight))
    warn_if_coarse(table.features, mean, learned)
    return learned


def fitting_map(table: RowTable, learned: LearnedMap | None) -> LearnedMap | None:
    """A learned map, if it takes rows as wide as those of a table; else a ValueError."""
    if learned is not None and learned.dim != table.features.shape[1]:
        raise ValueError(
            f"Expected a learned map of rows of width {table.features.shape[1]}, as the datastore "
            f"has, but got one of {learned.dim}."
        )
    return learned


def _mean_of(table: RowTable, width: int) -> Tensor:
    if not len(table):
        return torch.zeros(width)
    order = table.ids.argsort().numpy()  # the same sum whatever the order of insertion
    total = np.zeros(width)
    for start in range(0, len(order), _SUMMED_AT_ONCE):
        rows = table.features[order[start : start + _SUMMED_AT_ONCE]]
        total += rows.sum(axis=0, dtype=np.float64)
    return torch.from_numpy(total / len(order)).float()
