"""What two voices say about pictures that neither has seen: a ridge head and the neighbours.

Both are fitted on the same folds, so that they can be compared and blended.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .datastore import Datastore
from .folds import Fold
from .functional import PROBABILITY_FLOOR, blend_log_probs, knn_log_probs
from .ridge import fit_ridge

K, TEMPERATURE, WEIGHT = 20, 0.14, 0.5
"""The cell of the blend: the fixed one, since what is chosen here would be chosen on these rows."""


class Voices(NamedTuple):
    """Log-probabilities of rows by voices that have not seen them.

    Attributes:
        head: [N, C] float32 of a ridge head, floored at log(1e-12); NaN for a row never held out.
        knn: [N, C] float32 of the neighbours, likewise.
        asked: [N] bool, which rows were held out.
    """

    head: Tensor
    knn: Tensor
    asked: Tensor

    @property
    def blend(self) -> Tensor:
        """[N, C] of both together."""
        return blend_log_probs(self.head, self.knn, WEIGHT)


def out_of_fold(
    features: Tensor,
    labels: Tensor,
    num_labels: int,
    folds: Sequence[Fold],
    on_progress: Callable[[int], object] = lambda done: None,
) -> Voices:
    """Asks both voices about the held-out rows of each fold.

    Args:
        features: [N, D] raw features.
        labels: [N] int64 in [0, num_labels).
        num_labels: C.
        folds: from `stratified_folds`.
        on_progress: called with 1 after each fold.
    """
    empty = torch.full((len(labels), num_labels), math.nan)
    found = Voices(empty, empty.clone(), torch.zeros(len(labels), dtype=torch.bool))
    for fold in folds:
        fitted, held_out = torch.from_numpy(fold.fitted), torch.from_numpy(fold.held_out)
        head, knn = ask(features[fitted], labels[fitted], num_labels, features[held_out])
        found.head[held_out], found.knn[held_out] = head, knn
        found.asked[held_out] = True
        on_progress(1)
    return found


def ask(
    features: Tensor, labels: Tensor, num_labels: int, queries: Tensor
) -> tuple[Tensor, Tensor]:
    """Fits both voices on some rows and asks them about others.

    Args:
        features: [N, D] raw features.
        labels: [N] int64 in [0, num_labels).
        num_labels: C.
        queries: [B, D].

    Returns:
        [B, C] float32 log-probabilities of the head and of the neighbours, floored at log(1e-12).
    """
    mean = features.mean(0)
    unit, asked = (functional.normalize(rows - mean, dim=1) for rows in (features, queries))
    head = fit_ridge(unit, labels, num_labels).log_probs(asked)
    near = Datastore.from_features(features, labels).search(queries, K)
    knn = knn_log_probs(near.similarities, near.labels, num_labels, TEMPERATURE)
    floor = math.log(PROBABILITY_FLOOR)
    return head.float().clamp_min(floor), knn.float().clamp_min(floor)
