"""Which labels are likely wrong: where two voices that have not seen a picture say another class.

The score ranks all pictures: ``p(other) / (p(other) + p(label))`` with the likeliest other class, p
the blend of a ridge head and the neighbours. A picture is *named* only where both voices agree on
the other class, its probability is as high as that class's own pictures have on average (the
threshold of confident learning, Northcutt et al., JAIR 70, 2021), and that of its label is below a
tenth of its own class's. What is hard to tell is ranked high by the score, but rarely named.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .findings import Finding, Ints, Kind, Pictures
from .voices import Voices

LARGEST_OWN_SHARE = 0.1
"""A picture is named where p(label) is below this share of what its class has on average."""


class LabelScores(NamedTuple):
    """How likely each label is wrong.

    Attributes:
        score: [N] float64 in [0, 1]; NaN for a row that no voice was asked about.
        suggested: [N] int64, the likeliest other class.
        is_named: [N] bool, sure enough to be named.
    """

    score: NDArray[np.float64]
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
    usual = _usual_confidence(blend.exp(), labels, voices.asked)
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


def _usual_confidence(probabilities: Tensor, labels: Tensor, asked: Tensor) -> Tensor:
    """[C] the mean of p(c) over the rows labelled c; 1 for a class without rows."""
    classes = probabilities.shape[1]
    own = probabilities.gather(1, labels[:, None])[:, 0][asked]
    counts = torch.bincount(labels[asked], minlength=classes).double()
    sums = torch.zeros(classes, dtype=torch.float64).scatter_add(0, labels[asked], own.double())
    return torch.where(counts > 0, sums / counts.clamp_min(1), 1.0)
