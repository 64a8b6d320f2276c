"""Whether every class has pictures enough, in every split."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .findings import Finding, Kind, Pictures

FEWEST = 5
"""Fewer pictures of a class for training are named."""

LARGEST_RATIO = 20.0
"""A class with fewer than one picture for so many of the largest class is named."""


def counts_by_split(pictures: Pictures) -> dict[str, NDArray[np.int64]]:
    """[C] pictures per class of each split, in the order in which the splits come."""
    classes = len(pictures.label_names)
    splits = np.array(pictures.splits, dtype=object)
    counts = {}
    for split in dict.fromkeys(pictures.splits):
        labels = pictures.labels[(splits == split) & (pictures.labels >= 0)]
        counts[split] = np.bincount(labels, minlength=classes).astype(np.int64)
    return counts


def balance_findings(pictures: Pictures) -> list[Finding]:
    """Classes that are empty, small, or small beside the largest one.

    Args:
        pictures: those that can be used.
    """
    counts = counts_by_split(pictures)
    if not counts:
        return []
    split = "train" if "train" in counts else next(iter(counts))
    found = []
    for label, count in enumerate(counts[split].tolist()):
        reason = _reason(label, count, split, counts)
        if reason:
            score = 1 - count / max(1, int(counts[split].max()))
            found.append(Finding(Kind.IMBALANCE, -1, score, reason, label=label, split=split))
    return found


def _reason(label: int, count: int, split: str, counts: dict[str, NDArray[np.int64]]) -> str:
    elsewhere = [name for name, of in counts.items() if name != split and of[label]]
    if not count:
        where = f", but {_listed(elsewhere)} has some: it cannot be learnt" if elsewhere else ""
        return f"No picture in {split}{where}."
    if count < FEWEST:
        few = "1 picture" if count == 1 else f"{count} pictures"
        return f"{few} in {split}: too few to learn from and to measure."
    largest = int(counts[split].max())
    if largest > LARGEST_RATIO * count:
        return (
            f"{count} pictures in {split}, the largest class has {largest}: add some, or pass "
            "--class-weights inverse_sqrt to train."
        )
    return ""


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names)
