"""Splits of labelled rows: stratified, seeded, disjoint, and whole groups where there are any."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from torch import Tensor

Rows = NDArray[np.int64]

_MOST_PARTS = 100


class Fold(NamedTuple):
    """Row numbers of one fold: what is fitted and what is held out."""

    fitted: Rows
    held_out: Rows


def stratified_folds(
    labels: Tensor, count: int, seed: int, groups: Tensor | None = None
) -> list[Fold]:
    """Deals the rows of each class over folds; each row is held out once.

    A class with a single row (or a single group) is never held out: nothing could answer it.

    Args:
        labels: [N] int64.
        count: how many folds, >= 2; fewer where no class has that many rows.
        seed: of the shuffle.
        groups: [N] int64; rows of one group are always on the same side. None: each row is one.

    Raises:
        ValueError: if no class has two rows, or two groups.
    """
    values = labels.numpy()
    owners = np.arange(len(values)) if groups is None else groups.numpy()
    sizes = _owners_per_class(values, owners)[values]  # [N]
    if sizes.max(initial=0) < 2:
        what = "picture" if groups is None else "group"
        raise ValueError(
            f"Expected a class with at least two {what}s to hold some out, but every class has "
            "one; add pictures or pass a validation set."
        )
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    splitter = kind(min(count, int(sizes.max())), shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # some classes have fewer rows than folds
        held = [rows for _, rows in splitter.split(values, values, owners)]
    everyone = np.arange(len(values))
    folds = []
    for dealt in held:
        fitted = np.setdiff1d(everyone, dealt)
        # a class with one row, or with all its groups in this fold, cannot be answered
        rows = dealt[np.isin(values[dealt], values[fitted])]
        if groups is None:
            fitted = np.setdiff1d(everyone, rows)
        if len(rows):
            folds.append(Fold(fitted, rows))
    return folds


def split_rows(labels: Tensor, share: float, seed: int, groups: Tensor | None = None) -> Fold:
    """Holds out a share of each class, at least one row of each class that has two.

    Args:
        labels: [N] int64.
        share: in (0, 1).
        seed: of the shuffle.
        groups: [N] int64; rows of one group are always on the same side, so that the share is met
            about only. None: each row is one.

    Returns:
        The kept rows and the held-out rows; a class with a single row is kept.
    """
    if groups is not None:
        return _split_groups(labels, share, seed, groups)
    values = labels.numpy()

    def wanted(rows: Rows) -> int:
        return min(max(1, round(len(rows) * share)), len(rows) - 1)

    out = _first_of_each_class(values, seed, wanted)
    return Fold(np.setdiff1d(np.arange(len(values)), out), out)


def few_shots(labels: Tensor, shots: int, seed: int) -> Rows:
    """Rows with so many pictures per class; a class with fewer gives all it has.

    For one seed they are nested: the rows for 4 shots are among those for 8.

    Args:
        labels: [N] int64.
        shots: pictures per class, >= 1.
        seed: of the choice.

    Raises:
        ValueError: for less than one shot.
    """
    if shots < 1:
        raise ValueError(f"Expected `shots` to be >= 1, but got {shots}.")
    return _first_of_each_class(labels.numpy(), seed, lambda rows: shots)


def few_rows(labels: Tensor, fraction: float, seed: int) -> Rows:
    """Rows with a fraction of each class, at least one picture each.

    For one seed they are nested: the rows for 0.1 are among those for 0.2.

    Args:
        labels: [N] int64.
        fraction: in (0, 1].
        seed: of the choice.

    Raises:
        ValueError: for a fraction out of range.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"Expected `fraction` to be in (0, 1], but got {fraction}.")
    return _first_of_each_class(
        labels.numpy(), seed, lambda rows: max(1, round(len(rows) * fraction))
    )


def _first_of_each_class(values: NDArray, seed: int, wanted: Callable[[Rows], int]) -> Rows:
    """The first so many rows of each class in an order that depends on the seed alone."""
    generator = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(values):
        rows = generator.permutation(np.flatnonzero(values == label))
        chosen.append(rows[: wanted(rows)])
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, np.int64)


def _split_groups(labels: Tensor, share: float, seed: int, groups: Tensor) -> Fold:
    """Holds out folds of a finer split until the share is reached."""
    parts = max(2, min(_MOST_PARTS, round(1 / min(share, 1 - share))))
    held = [fold.held_out for fold in stratified_folds(labels, parts, seed, groups)]
    taken = max(1, min(len(held) - 1, round(share * len(held)))) if len(held) > 1 else len(held)
    out = np.sort(np.concatenate(held[:taken])) if taken else np.empty(0, np.int64)
    everyone = np.arange(len(labels))
    # what was never held out alone stays, unless a part of its group went
    gone = np.isin(groups.numpy(), groups.numpy()[out])
    return Fold(everyone[~gone], out)


def _owners_per_class(values: NDArray, owners: NDArray) -> NDArray:
    """[C] how many rows, or groups, each class has."""
    pairs = np.unique(np.stack([values, owners], axis=1), axis=0)
    return np.bincount(pairs[:, 0].astype(np.int64))
