"""Which pictures are for training, for choosing and for the test: one split per seed."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from hf_knn.data import few_rows, stratified_folds

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


def split_indices(
    labels: Sequence[int] | NDArray[np.integer],
    seed: int,
    fractions: tuple[float, float, float] = (0.5, 0.2, 0.3),
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Split rows at random into training, validation and test, class by class.

    scikit-learn's stratified splits may leave a small class out of a part; here each class is
    rounded by itself, by largest remainder.

    Args:
        labels: [N] integers.
        seed: The same seed gives the same split.
        fractions: The parts' shares, positive, 1 in sum.

    Returns:
        Three disjoint ascending int64 arrays that cover 0..N-1. Each class has a row in training,
        and from three rows on a row in each part.

    Raises:
        ValueError: Labels that are not [N] integers, or fractions that are no shares.
    """
    values = np.asarray(labels[:])  # a slice, since a `datasets` column is slow row by row
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(
            f"Expected labels to be [N] integers, but got {list(values.shape)} {values.dtype}; "
            "do pass the label column of one dataset."
        )
    if min(fractions) <= 0 or not np.isclose(sum(fractions), 1):
        raise ValueError(
            f"Expected fractions to be positive and 1 in sum, but got {fractions}; do scale them."
        )
    rng = np.random.default_rng(seed)
    parts: list[list[NDArray[np.int64]]] = [[], [], []]
    for label in np.unique(values):
        rows = rng.permutation(np.flatnonzero(values == label)).astype(np.int64)
        ends = np.cumsum(_part_sizes(len(rows), fractions))
        for part, chunk in zip(parts, np.split(rows, ends[:-1]), strict=True):
            part.append(chunk)
    empty = np.empty(0, np.int64)
    train, validation, test = (np.sort(np.concatenate([empty, *part])) for part in parts)
    return train, validation, test


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


def _part_sizes(count: int, fractions: Sequence[float]) -> NDArray[np.int64]:
    """Round `count` times `fractions` to integers of sum `count`, no part starved."""
    shares = count * np.asarray(fractions)
    sizes = np.floor(shares + 1e-9).astype(np.int64)  # 10 * 0.3 is a hair below 3
    sizes[np.argsort(sizes - shares, kind="stable")[: count - sizes.sum()]] += 1
    for part in range(len(sizes) if count >= len(sizes) else 1):
        if sizes[part] == 0:
            sizes[sizes.argmax()] -= 1
            sizes[part] += 1
    return sizes
