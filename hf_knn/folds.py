"""Splits of labelled rows: stratified, seeded, disjoint."""

import warnings
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

Rows = NDArray[np.int64]


class Fold(NamedTuple):
    """Row numbers of one fold: what is fitted and what is held out."""

    fitted: Rows
    held_out: Rows


def stratified_folds(labels: Tensor, count: int, seed: int) -> list[Fold]:
    """Deals the rows of each class over folds; each row is held out once.

    A class with a single row is never held out: nothing could answer it.

    Args:
        labels: [N] int64.
        count: how many folds, >= 2; fewer where no class has that many rows.
        seed: of the shuffle.

    Raises:
        ValueError: if no class has two rows.
    """
    values = labels.numpy()
    sizes = np.bincount(values)[values]  # [N] how many rows the class of each row has
    if sizes.max(initial=0) < 2:
        raise ValueError(
            "Expected a class with at least two pictures to hold some out, but every class has "
            "one; add pictures or pass a validation set."
        )
    splitter = StratifiedKFold(min(count, int(sizes.max())), shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # some classes have fewer rows than folds
        held = [rows for _, rows in splitter.split(values, values)]
    held = [rows[sizes[rows] > 1] for rows in held]
    everyone = np.arange(len(values))
    return [Fold(np.setdiff1d(everyone, rows), rows) for rows in held if len(rows)]


def split_rows(labels: Tensor, share: float, seed: int) -> Fold:
    """Holds out a share of each class, at least one row of each class that has two.

    Args:
        labels: [N] int64.
        share: in (0, 1).
        seed: of the shuffle.

    Returns:
        The kept rows and the held-out rows; a class with a single row is kept.
    """
    values = labels.numpy()
    generator = np.random.default_rng(seed)
    held = []
    for label in np.unique(values):
        rows = generator.permutation(np.flatnonzero(values == label))
        wanted = min(max(1, round(len(rows) * share)), len(rows) - 1)
        held.append(rows[:wanted])
    out = np.sort(np.concatenate(held)) if held else np.empty(0, np.int64)
    return Fold(np.setdiff1d(np.arange(len(values)), out), out)
