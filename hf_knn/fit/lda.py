"""Linear discriminants with a shrunk covariance, their regulariser by exact leave-one-out.

What is solved, and how rows come and go, is in `model.ridge`. With the scatter within classes S,
``A = (S + r I)^-1`` and a row x of class c, whose n rows have the mean m_c: without it the scatter
is ``S - n / (n - 1) d d'`` with ``d = x - m_c``, and the mean ``m_c - d / (n - 1)``, so that every
product with the inverse follows from those with A (Sherman and Morrison).
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..core.votes import ClassWeighting
from ..model.ridge import RidgeState, check_regularizer, to_float64
from ..model.scatter import rounding
from .ridge import RELATIVE_REGULARIZERS, RidgeFit, RidgeScore
from .temperature import Margins, mean_loss, search_temperature

_MOST_SCORED = 8192
"""Rows that are left out, of many: they choose two numbers, which no single row moves."""

_BLOCK = 1024


def fit_lda(
    features: Tensor,
    labels: Tensor,
    num_labels: int = 0,
    *,
    regularizers: Sequence[float] | None = None,
    class_weighting: str = ClassWeighting.NONE,
) -> RidgeFit:
    """Fits the discriminants; regulariser and temperature by exact leave-one-out log-likelihood.

    A row that is the only one of its class is not left out. Ties go to the larger regulariser.

    Args:
        features: [N, D], normalised by the caller.
        labels: [N] int64.
        num_labels: C; more if a label says so.
        regularizers: the grid, each > 0; None is `RELATIVE_REGULARIZERS` times `within_scale`.
        class_weighting: of the classes' prior, see `RidgeState.solve_discriminants`.

    Returns:
        The fit; the squared errors of its table are NaN. If no row can be left out: the middle of
        the grid and temperature 1.

    Raises:
        ValueError: for no rows, an empty grid, a bad option; see also `RidgeState.from_rows`.
    """
    weighting = ClassWeighting(class_weighting)
    state = RidgeState.from_rows(features, labels, num_labels)
    if regularizers is None:
        scale = within_scale(state)
        regularizers = [value * scale for value in RELATIVE_REGULARIZERS]
    grid = sorted(regularizers)
    if len(state) == 0 or not grid:
        raise ValueError(
            f"Expected rows to fit and regularisers to try, but got {len(state)} and {len(grid)}."
        )
    for regularizer in grid:
        check_regularizer(regularizer)
    table = list(_LeaveOneOut(state, features, labels, weighting).scores(grid))
    regularizer, temperature = grid[len(grid) // 2], 1.0
    if table:
        best = max(table, key=lambda score: (score.log_likelihood, score.regularizer))
        regularizer, temperature = best.regularizer, best.temperature
    weight, bias = state.solve_discriminants(regularizer, weighting)
    return RidgeFit(weight, bias, temperature, regularizer, table, state)


def within_scale(state: RidgeState) -> float:
    """The mean of the eigenvalues of the scatter within classes that can differ from 0; else 1."""
    within, present = within_scatter(state), int((state.counts > 0).sum())
    trace = float(within.trace())
    spread = max(1, min(state.dim, len(state) - present))
    largest = float(state.grams[0].trace())
    return trace / spread if trace > rounding(largest, state.dim) else 1.0


def within_scatter(state: RidgeState) -> Tensor:
    """[D, D] sums of outer products of rows minus the mean of their class."""
    present = state.counts > 0
    means = state.sums[present] / state.counts[present, None]
    return state.grams[0] - state.sums[present].T @ means


class _LeaveOneOut:
    """Discriminants of rows by the fits that have not seen them.

    Args:
        state: of exactly these rows.
        features: [N, D].
        labels: [N] int64.
        weighting: of the prior.
    """

    def __init__(
        self, state: RidgeState, features: Tensor, labels: Tensor, weighting: ClassWeighting
    ) -> None:
        present = (state.counts > 0).nonzero().flatten()
        labels = labels.cpu()
        self.counts = state.counts[present].double()  # [C']
        columns = (torch.cumsum(state.counts > 0, 0) - 1)[labels]
        scored = (state.counts[labels] > 1).nonzero().flatten()
        if len(scored) > _MOST_SCORED:
            order = torch.randperm(len(scored), generator=torch.Generator().manual_seed(0))
            scored = scored[order[:_MOST_SCORED].sort().values]
        self.columns = columns[scored]  # [M] the class among those present
        self.prior = (self.counts * _weights(self.counts, weighting)).log()
        self.freedom = max(1, len(state) - 1 - len(present))
        means = state.sums[present] / self.counts[:, None]
        within, rows = within_scatter(state), to_float64(features[scored]) - state.shift
        if len(labels) < state.dim:  # in the basis of all rows, which is smaller
            everything = to_float64(features) - state.shift
            values, sides = torch.linalg.eigh(everything @ everything.T)
            is_real = values > rounding(float(values.max()), len(values))
            basis = everything.T @ (sides[:, is_real] / values[is_real].sqrt())  # [D, K]
            means, rows, within = means @ basis, rows @ basis, basis.T @ within @ basis
        values, vectors = torch.linalg.eigh(within)
        self.values = values.clamp_min(0)
        self.rows, self.means = rows @ vectors, means @ vectors  # [M, K], [C', K]

    def scores(self, grid: Sequence[float]) -> Iterator[RidgeScore]:
        """What each regulariser scores, in the order of the grid; nothing without rows."""
        if not len(self.columns):
            return
        guess = math.nan
        for regularizer in grid:
            kept, correct = [], 0
            for start in range(0, len(self.columns), _BLOCK):
                part = slice(start, start + _BLOCK)
                logits, labels = self.logits(part, regularizer), self.columns[part]
                correct += int((logits.argmax(dim=1) == labels).sum())
                kept.append(Margins.of(logits, labels, torch.ones(len(labels)).double()))
            guess = search_temperature(kept, len(self.columns), guess)
            accuracy = correct / len(self.columns)
            loss = mean_loss(kept, guess)
            yield RidgeScore(regularizer, accuracy, math.nan, guess, -loss)

    def logits(self, part: slice, regularizer: float) -> Tensor:
        """[B, C'] of some of the rows that are left out."""
        rows, own = self.rows[part], self.columns[part].unsqueeze(1)
        inverse = 1 / (self.values + regularizer)
        counts = self.counts[own]  # [B, 1]
        through = self.means * inverse  # [C', K]
        gaps = rows - self.means[own.squeeze(1)]  # [B, K] d
        at_rows, at_gaps = rows @ through.T, gaps @ through.T  # u = x'A m, v = d'A m
        squares = (self.means * through).sum(dim=1).expand(len(rows), -1).clone()  # w = m'A m
        spread = (gaps.square() @ inverse).unsqueeze(1)  # q = d'A d
        along = ((rows * gaps) @ inverse).unsqueeze(1)  # p = x'A d
        shift = 1 / (counts - 1)
        old = at_gaps.gather(1, own)
        at_rows.scatter_add_(1, own, -along * shift)
        squares.scatter_add_(1, own, spread * shift.square() - 2 * old * shift)
        at_gaps.scatter_add_(1, own, -spread * shift)
        factor = counts * shift
        least = torch.finfo(torch.float64).eps
        factor = factor / (1 - factor * spread).clamp_min(least)
        scores = at_rows + factor * along * at_gaps - (squares + factor * at_gaps.square()) / 2
        prior = self.prior.expand(len(rows), -1).clone()
        prior.scatter_add_(1, own, ((counts - 1) / counts).log())
        return scores * self.freedom + prior


def _weights(counts: Tensor, weighting: ClassWeighting) -> Tensor:
    power = {"none": 0.0, "inverse": -1.0, "inverse_sqrt": -0.5}[str(weighting)]
    return counts**power
