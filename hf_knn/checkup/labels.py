"""Labels that are likely wrong, pictures unlike all others, and classes too small or alike."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import median_abs_deviation, rankdata
from torch import Tensor

from ..fit.voices import Voices
from .findings import Finding, Floats, Ints, Kind, Pictures

NEIGHBOR = 5
"""The distance to this neighbour is what counts; a lone pair of strangers is still far."""

LARGEST_DEVIATION = 4.0
"""In robust standard deviations of log distance; a normal tail beyond it holds 3 in 100,000."""

FEWEST = 5
"""Fewer pictures of a class for training are named."""

LARGEST_RATIO = 20.0
"""A class with fewer than one picture for so many of the largest class is named."""

LARGEST_OWN_SHARE = 0.1
"""A picture is named where p(label) is below this share of what its class has on average."""


def _is_seen(character: str) -> bool:
    is_variant = "\ufe00" <= character <= "\ufe0f"  # of an emoji, in colour or not
    return not is_variant and unicodedata.category(character) not in ("Cf", "Cc")


_ALIKE = str.maketrans("авекмнорстухіјѕԁһӏıαβεικνορτυχζ", "abekmhopctyxijsdhliabeikvoptuxz")
"""Cyrillic and Greek letters, and what Latin ones they look like, also as capitals."""

_DIFFERENCES: dict[str, Callable[[str], str]] = {
    "spaces": lambda name: " ".join(name.split()),
    "invisible characters": lambda name: "".join(filter(_is_seen, name)),
    "the width of letters": lambda name: unicodedata.normalize("NFKC", name),
    "capital letters": str.casefold,
    "letters of several alphabets": lambda name: name.translate(_ALIKE),
    "spaces, dashes and underscores": lambda name: re.sub(
        r"(?<=[^\W\d_])[\s_\u2010-\u2015-]+(?=[^\W\d_])", "", name
    ),
    "an s at the end": lambda name: re.sub(r"(?<=[^\W\d_]{3})s$", "", name),
}
"""What two names of one class may differ in, and what takes the difference away."""

_FEWEST_OF_A_CLASS = 20
_SMALLEST_SPREAD = 0.02  # of log distance: where all distances are equal none is far


def deviations(distances: Floats, labels: Ints) -> Floats:
    """How far each row is from all others, compared with other rows.

    The smaller of two comparisons: with all rows, and with its class, which may be a scattered one.

    Args:
        distances: [N] > 0 to the k-th neighbour of any class, itself left out.
        labels: [N]; a class with fewer than 20 rows is compared with all rows only.

    Returns:
        [N] robust standard deviations of log distance above the median.
    """
    logs = np.log(np.maximum(distances, 1e-12))
    found = _robust(logs)
    for label in np.unique(labels):
        rows = labels == label
        if rows.sum() >= _FEWEST_OF_A_CLASS:
            found[rows] = np.minimum(found[rows], _robust(logs[rows]))
    return found


def conformal_p_values(distances: Floats, labels: Ints) -> Floats:
    """The share of the other rows of its class that are as far, with the row itself counted.

    Args:
        distances: [N].
        labels: [N].

    Returns:
        [N] in (0, 1]: 1 / n of the class for its farthest row. Uniform where nothing is wrong, so
        it tells how rare a row is among its like and is no alarm by itself.
    """
    found = np.ones(len(distances))
    for label in np.unique(labels):
        rows = labels == label
        found[rows] = rankdata(-distances[rows], "max") / rows.sum()
    return found


def outlier_findings(distances: Floats, pictures: Pictures) -> list[Finding]:
    """The pictures that are far from all others.

    Args:
        distances: [N] to the k-th neighbour.
        pictures: the same N.
    """
    labels = pictures.labels
    far, rare = deviations(distances, labels), conformal_p_values(distances, labels)
    found = []
    for row in np.flatnonzero(far > LARGEST_DEVIATION).tolist():
        detail = (
            f"Far from all others: {far[row]:.1f} robust standard deviations, farther than "
            f"{1 - rare[row]:.0%} of {pictures.label_of(row) or 'the pictures'}. Does it belong?"
        )
        score = float(1 - LARGEST_DEVIATION / (2 * far[row]))
        found.append(Finding(Kind.OUTLIER, row, score, detail))
    return found


def _robust(values: Floats) -> Floats:
    spread = max(float(median_abs_deviation(values, scale="normal")), _SMALLEST_SPREAD)
    return np.asarray((values - np.median(values)) / spread)


def counts_by_split(pictures: Pictures) -> dict[str, Ints]:
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
        reason = _why_small(label, count, split, counts)
        if reason:
            score = 1 - count / max(1, int(counts[split].max()))
            found.append(Finding(Kind.IMBALANCE, -1, score, reason, label=label, split=split))
    return found


def _why_small(label: int, count: int, split: str, counts: dict[str, Ints]) -> str:
    elsewhere = [name for name, of in counts.items() if name != split and of[label]]
    if not count:
        where = f", but {' and '.join(elsewhere)} has some: it cannot be learnt"
        return f"No picture in {split}{where if elsewhere else ''}."
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


def look_alike_findings(pictures: Pictures) -> list[Finding]:
    """Classes whose names differ in what is easily mistyped or not seen.

    Args:
        pictures: all.
    """
    alike: dict[str, list[int]] = defaultdict(list)
    for label, name in enumerate(pictures.label_names):
        alike[_spelled(name)[-1]].append(label)
    counts = sum(counts_by_split(pictures).values(), np.zeros(len(pictures.label_names), np.int64))
    found = []
    for labels in alike.values():
        largest = max(labels, key=lambda label: int(counts[label]))
        for label in labels:
            if label != largest:
                detail = _difference(pictures, label, largest, counts)
                found.append(
                    Finding(Kind.LOOK_ALIKE, -1, 1.0, detail, suggested=largest, label=label)
                )
    return found


def _difference(pictures: Pictures, label: int, other: int, counts: Ints) -> str:
    names = [str(pictures.label_names[one]) for one in (label, other)]
    steps = zip(_DIFFERENCES, *map(_spelled, names), strict=True)
    what = next(difference for difference, one, two in steps if one == two)
    said = [
        f"{ascii(name) if what.startswith(('inv', 'let')) else repr(name)} ({count} pictures)"
        for name, count in zip(names, counts[[label, other]].tolist(), strict=True)
    ]
    return f"{said[0]} and {said[1]} differ in {what} only."


def _spelled(name: str) -> list[str]:
    """A name after each of the differences is taken away."""
    made = []
    for take_away in _DIFFERENCES.values():
        name = take_away(name)
        made.append(name)
    return made


class LabelScores(NamedTuple):
    """How likely each label is wrong.

    Attributes:
        score: [N] float64 in [0, 1]; NaN for a row that no voice was asked about.
        suggested: [N] int64, the likeliest other class.
        is_named: [N] bool, sure enough to be named.
    """

    score: Floats
    suggested: Ints
    is_named: NDArray[np.bool_]


def score_labels(voices: Voices, labels: Tensor) -> LabelScores:
    """Scores labels by what voices say that have not seen the rows.

    Args:
        voices: [N, C] of both, C >= 2.
        labels: [N] int64.

    Raises:
        ValueError: for fewer than two classes.
    """
    blend = voices.blend.double()
    if blend.shape[1] < 2:
        raise ValueError(f"Expected at least two classes, but got {blend.shape[1]}.")
    own = blend.gather(1, labels[:, None])[:, 0]
    others = blend.scatter(1, labels[:, None], -torch.inf)
    best, suggested = others.max(dim=1)
    score = torch.sigmoid(best - own)
    usual = _usual_confidence(own.exp(), labels, voices.asked, blend.shape[1])
    agree = (voices.head.argmax(1) == suggested) & (voices.knn.argmax(1) == suggested)
    is_sure = best.exp() >= usual[suggested]
    is_unlike = own.exp() < LARGEST_OWN_SHARE * usual[labels]
    named = voices.asked & agree & is_sure & is_unlike
    return LabelScores(score.numpy(), suggested.numpy(), named.numpy())


def label_findings(scores: LabelScores, voices: Voices, pictures: Pictures) -> list[Finding]:
    """The labels that are likely wrong.

    Args:
        scores: of N rows.
        voices: of the same rows.
        pictures: the same N.
    """
    blend = voices.blend.exp()
    found = []
    for row in np.flatnonzero(scores.is_named).tolist():
        label, other = int(pictures.labels[row]), int(scores.suggested[row])
        detail = (
            f"Head and neighbours that have not seen it say {pictures.label_names[other]} "
            f"({float(blend[row, other]):.0%}), not {pictures.label_names[label]} "
            f"({float(blend[row, label]):.1%})."
        )
        score = float(scores.score[row])
        found.append(Finding(Kind.LABEL_ERROR, row, score, detail, suggested=other))
    return found


def _usual_confidence(own: Tensor, labels: Tensor, asked: Tensor, classes: int) -> Tensor:
    """[C] the mean probability of their own label over the rows of a class; 1 without rows."""
    counts = torch.bincount(labels[asked], minlength=classes)
    sums = torch.bincount(labels[asked], own[asked], minlength=classes)
    return torch.where(counts > 0, sums / counts.clamp_min(1), 1.0)
