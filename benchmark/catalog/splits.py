"""Which pictures are for training, for choosing and for the test: one split per seed."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from catalog.offline_tasks import split_indices
from hf_knn import few_rows, stratified_folds

Rows = NDArray[np.int64]

ANY, TRAIN, VALIDATION, TEST = -1, 0, 1, 2
"""What the source of a picture says it is for; ANY leaves it to the seed."""

FRACTIONS = (0.5, 0.2, 0.3)
"""Train, validation and test, where the source has no test split."""

VALIDATION_SHARE = 0.2
"""Of the official training pictures, where there is no official validation split."""

_GROUP_FOLDS = (3, 4)  # test: one fold of 3; validation: one of 4 of what is left


class Parts(NamedTuple):
    """Row numbers, ascending and disjoint."""

    train: Rows
    validation: Rows
    test: Rows


def split_pool(
    labels: NDArray[np.int64], groups: NDArray[np.int64] | None, roles: NDArray[np.int8], seed: int
) -> Parts:
    """The split of a seed.

    An official test split is the test set of every seed. An official validation split is that of
    seed 0; other seeds draw one of that size out of both, so that a seed is a split and not only
    an initialisation.

    Args:
        labels: [N] from 0.
        groups: [N] rows of one group stay on one side; None: each row is one.
        roles: [N] what the source says each row is for.
        seed: of the draw.

    Raises:
        ValueError: if a part is empty.
    """
    official = np.flatnonzero(roles == TEST)
    if len(official) == 0:
        parts = _split_all(labels, groups, seed)
    else:
        parts = _split_rest(labels, groups, roles, seed, official)
    empty = [name for name, rows in parts._asdict().items() if len(rows) == 0]
    if empty:
        raise ValueError(
            f"Expected pictures for training, validation and test, but {', '.join(empty)} got none "
            f"of {len(labels)}; do take more pictures or fewer groups."
        )
    return parts


def _split_all(labels: NDArray, groups: NDArray | None, seed: int) -> Parts:
    if groups is None:
        return Parts(*split_indices(labels, seed, FRACTIONS))
    everyone = np.arange(len(labels))
    rest, test = _hold_out(labels, groups, everyone, _GROUP_FOLDS[0], seed)
    train, validation = _hold_out(labels, groups, rest, _GROUP_FOLDS[1], seed)
    return Parts(train, validation, test)


def _split_rest(
    labels: NDArray, groups: NDArray | None, roles: NDArray, seed: int, test: Rows
) -> Parts:
    train, validation = np.flatnonzero(roles == TRAIN), np.flatnonzero(roles == VALIDATION)
    if len(validation) and seed == 0:
        return Parts(train, validation, test)
    rest = np.sort(np.concatenate([train, validation]))
    share = len(validation) / len(rest) if len(validation) else VALIDATION_SHARE
    if groups is None:
        values = labels[rest]
        held = few_rows(torch.from_numpy(values), share, seed)
        held = held[np.bincount(values)[values[held]] > 1]  # a lone picture is for training
        return Parts(np.delete(rest, held), rest[held], test)
    train, validation = _hold_out(labels, groups, rest, max(2, round(1 / share)), seed)
    return Parts(train, validation, test)


def _hold_out(
    labels: NDArray, groups: NDArray, rows: Rows, count: int, seed: int
) -> tuple[Rows, Rows]:
    """What is left and one fold of whole groups."""
    fold = stratified_folds(
        torch.from_numpy(labels[rows]), count, seed, torch.from_numpy(groups[rows])
    )[0]
    gone = np.isin(groups[rows], groups[rows[fold.held_out]])
    return rows[~gone], rows[fold.held_out]
