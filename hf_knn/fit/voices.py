"""What two voices say about pictures that neither has seen: a ridge head and the neighbours.

Both are fitted on the same folds, so that they can be compared and blended. Regulariser and
temperature of the head are chosen once, by leave-one-out on the rows of the first fold: two numbers
that no single row can move, and to choose them takes ten times as long as to use them.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.config import Normalization
from ..core.search import normalize_rows
from ..core.votes import PROBABILITY_FLOOR, blend_log_probs, knn_log_probs
from ..data.splits import Fold
from ..model.ridge import RidgeState
from ..store.datastore import Datastore
from .ridge import RidgeFit, fit_ridge, scale_of

K, TEMPERATURE, WEIGHT = 20, 0.14, 0.5
"""The cell of the blend: the fixed one, since what is chosen here would be chosen on these rows."""


class HeadCell(NamedTuple):
    """What a ridge head is fitted with.

    Attributes:
        regularizer: relative to the mean eigenvalue, see `ridge.scale_of`.
        temperature: > 0.
    """

    regularizer: float
    temperature: float


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
    cell = None
    for fold in folds:
        fitted, held_out = torch.from_numpy(fold.fitted), torch.from_numpy(fold.held_out)
        rows, own = features[fitted], labels[fitted]
        cell = cell or choose_cell(rows, own, num_labels)
        head, knn = ask(rows, own, num_labels, features[held_out], cell)
        found.head[held_out], found.knn[held_out] = head, knn
        found.asked[held_out] = True
        on_progress(1)
    return found


def choose_cell(features: Tensor, labels: Tensor, num_labels: int) -> HeadCell:
    """The best regulariser and temperature by exact leave-one-out.

    Args:
        features: [N, D] raw features.
        labels: [N] int64 in [0, num_labels).
        num_labels: C.
    """
    fit = fit_ridge(_unit(features, features.mean(0)), labels, num_labels)
    return HeadCell(fit.regularizer / scale_of(fit.state), fit.temperature)


def ask(
    features: Tensor, labels: Tensor, num_labels: int, queries: Tensor, cell: HeadCell
) -> tuple[Tensor, Tensor]:
    """Fits both voices on some rows and asks them about others.

    Args:
        features: [N, D] raw features.
        labels: [N] int64 in [0, num_labels).
        num_labels: C.
        queries: [B, D].
        cell: of the head.

    Returns:
        [B, C] float32 log-probabilities of the head and of the neighbours, floored at log(1e-12).
    """
    mean = features.mean(0)
    state = RidgeState.from_rows(_unit(features, mean), labels, num_labels)
    regularizer = cell.regularizer * scale_of(state)
    fit = RidgeFit(*state.solve(regularizer), cell.temperature, regularizer, [], state)
    head = fit.log_probs(_unit(queries, mean))
    near = Datastore.from_features(features, labels).search(queries, K)
    knn = knn_log_probs(near.similarities, near.labels, num_labels, TEMPERATURE)
    floor = math.log(PROBABILITY_FLOOR)
    return head.float().clamp_min(floor), knn.float().clamp_min(floor)


def _unit(rows: Tensor, mean: Tensor) -> Tensor:
    """As the datastore sees them, also rows of untrained weights, of length 1e-20."""
    unit = normalize_rows(rows.numpy(), mean.double().numpy(), Normalization.L2_CENTERED)
    return torch.from_numpy(unit).float()
