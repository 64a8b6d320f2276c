"""A classifier in closed form: ridge regression on one-hot labels, its regulariser chosen exactly.

The regulariser is chosen by exact leave-one-out: the prediction for a row by the model that has not
seen it is ``(yhat_i - h_i y_i) / (1 - h_i)`` with its leverage ``h_i`` (the PRESS identity, Allen,
*Technometrics* 16, 1974). What is minimised, and how rows come and go, is in `model.ridge`.
Everything is float64 on the CPU.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.votes import ClassWeighting
from ..model.ridge import (
    Moments,
    RidgeState,
    block_buffer,
    check_regularizer,
    shifted,
    to_float64,
)
from ..model.scatter import inverse, rounding
from .temperature import Margins, mean_loss, search_temperature

RELATIVE_REGULARIZERS = tuple(10 ** (power / 2) for power in range(-8, 5))
"""What is tried, times the mean eigenvalue of the centred Gram matrix: 1e-4 to 100."""

_KEPT_LOGITS = 2**26  # numbers, half a GB; more are computed again for every step


class RidgeCriterion(StrEnum):
    """What makes a regulariser the best on the rows left out."""

    ACCURACY = "accuracy"
    SQUARED_ERROR = "squared_error"
    LOG_LIKELIHOOD = "log_likelihood"


class RidgeScore(NamedTuple):
    """What a regulariser scored on the rows left out, weighted as the rows are in the fit.

    Attributes:
        regularizer: r.
        accuracy: top-1.
        squared_error: mean of ``||y_i - yhat_i||^2``, lower is better.
        temperature: with the best likelihood; NaN where `criterion` did not need it.
        log_likelihood: mean ``log p(label)`` at that temperature, p floored at 1e-12; NaN likewise.
    """

    regularizer: float
    accuracy: float
    squared_error: float
    temperature: float
    log_likelihood: float


@dataclass(frozen=True)
class RidgeFit:
    """A fitted classifier: ``log_softmax((x @ weight.T + bias) / temperature)``.

    Attributes:
        weight: [C, D] float64.
        bias: [C] float64; -inf for a class without rows.
        temperature: > 0.
        regularizer: the one chosen; `state.solve` takes it after an update.
        table: every regulariser tried; empty if no row could be left out.
        state: the sums over the rows, to be updated.
    """

    weight: Tensor
    bias: Tensor
    temperature: float
    regularizer: float
    table: list[RidgeScore]
    state: RidgeState

    def log_probs(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, C] float64 log-probabilities; -inf for a class without rows."""
        logits = torch.addmm(self.bias, to_float64(features), self.weight.T)
        return torch.log_softmax(logits / self.temperature, dim=1)


def default_regularizers(state: RidgeState) -> tuple[float, ...]:
    """`RELATIVE_REGULARIZERS` times the mean of the eigenvalues that can differ from 0."""
    scale = scale_of(state)
    return tuple(value * scale for value in RELATIVE_REGULARIZERS)


def scale_of(state: RidgeState) -> float:
    """The mean of the eigenvalues that can differ from 0; 1 where all rows are the same."""
    if len(state) == 0:
        return 1.0
    trace = state.trace()
    return trace / max(1, min(state.dim, len(state) - 1)) if trace > 0 else 1.0


def fit_ridge(
    features: Tensor,
    labels: Tensor,
    num_labels: int = 0,
    *,
    regularizers: Sequence[float] | None = None,
    criterion: str = RidgeCriterion.LOG_LIKELIHOOD,
    class_weighting: str = ClassWeighting.NONE,
) -> RidgeFit:
    """Fits the classifier; regulariser and temperature by exact leave-one-out.

    A row that is the only one of its class is not left out: nothing could answer it. While a row
    is left out, the class weights stay. Ties go to the smaller squared error, then to the larger
    regulariser.

    Args:
        features: [N, D], normalised by the caller.
        labels: [N] int64.
        num_labels: C; more if a label says so.
        regularizers: the grid, each > 0; None is `default_regularizers`.
        criterion: `accuracy`, `squared_error`, or `log_likelihood` at the best temperature.
        class_weighting: see `RidgeState`.

    Returns:
        The fit. If no row can be left out: the middle of the grid and temperature 1.

    Raises:
        ValueError: for no rows, an empty grid, a bad option; see also `RidgeState.from_rows`.
    """
    chosen_by = RidgeCriterion(criterion)
    state = RidgeState.from_rows(features, labels, num_labels, class_weighting)
    grid = sorted(default_regularizers(state) if regularizers is None else regularizers)
    if len(state) == 0 or not grid:
        raise ValueError(
            f"Expected rows to fit and regularisers to try, but got {len(state)} and {len(grid)}."
        )
    left_out = _LeaveOneOut(state, features, labels, grid)
    table: list[RidgeScore] = []
    best, temperature = len(grid) // 2, 1.0
    if left_out.scored:
        needs_likelihood = chosen_by is RidgeCriterion.LOG_LIKELIHOOD
        for i in range(len(grid)):
            guess = table[-1].temperature if table else math.nan
            table.append(left_out.score(i, with_likelihood=needs_likelihood, guess=guess))
        best = max(range(len(grid)), key=lambda i: _rank(table[i], chosen_by))
        if not needs_likelihood:
            table[best] = left_out.score(best, with_likelihood=True)
        temperature = table[best].temperature
    weight, bias = left_out.classifier(best)
    return RidgeFit(weight, bias, temperature, grid[best], table, state)


def leave_one_out_logits(
    state: RidgeState, features: Tensor, labels: Tensor, regularizer: float
) -> Tensor:
    """What the classifier would say to each row had it not seen the row.

    Args:
        state: of exactly these rows.
        features: [N, D].
        labels: [N] int64.
        regularizer: r > 0.

    Returns:
        [N, C] float64; -inf for a class without rows. The only row of its class gets 0 for it.

    Raises:
        ValueError: if the state has other rows per class, or for a bad regulariser.
    """
    if len(state) == 0 and len(labels) == 0:
        return torch.zeros(0, state.num_labels, dtype=torch.float64)
    left_out = _LeaveOneOut(state, features, labels, [regularizer])
    logits = torch.full((len(labels), state.num_labels), -math.inf, dtype=torch.float64)
    for start, block in left_out.logits(0):
        logits[start : start + len(block), left_out.present] = block
    return logits


def score_sample(
    state: RidgeState, gram: Tensor, features: Tensor, labels: Tensor, regularizer: float
) -> RidgeScore:
    """What a regulariser scores on some of the rows of a state, each left out.

    Args:
        state: with these rows.
        gram: its centred Gram matrix [D, D].
        features: [M, D] of the sample.
        labels: [M] int64; at least one of a class with two rows.
        regularizer: r, large enough for a Cholesky factor.
    """
    left_out = _LeaveOneOut(state, features, labels, [regularizer], gram)
    return left_out.score(0, with_likelihood=True)


class _LeaveOneOut:
    """Predictions for rows of a state by the models that have not seen them.

    Args:
        state: of these rows.
        features: [N, D].
        labels: [N] int64.
        regularizers: R numbers > 0.
        gram: centred, of the state, where the rows are a sample of its rows; else None.

    Attributes:
        present: [C'] the classes that have rows; logits have these columns.
        scored: how many rows are not the only one of their class.
    """

    solution: Callable[[int], Tensor]

    def __init__(
        self, state: RidgeState, features: Tensor, labels: Tensor, regularizers: Sequence[float],
        gram: Tensor | None = None,
    ) -> None:  # fmt: skip
        for regularizer in regularizers:
            check_regularizer(regularizer)
        state.check(features, labels)
        labels, held = labels.cpu(), state.counts
        here = torch.bincount(labels, minlength=state.num_labels)
        if gram is None and held.tolist() != here.tolist():
            raise ValueError(
                f"Expected the rows that the state was made from, {state.counts.tolist()[:10]} per "
                f"class, but got {here.tolist()[:10]}; pass the same rows."
            )
        moments = state.moments()
        self.features, self.regularizers = features, list(regularizers)
        self.center = state.shift + moments.mean
        self.present = held.nonzero().flatten()
        self.columns = (torch.cumsum(held > 0, 0) - 1)[labels]  # [N] the label among those present
        self.weights = moments.row_weights[labels]  # [N]
        self.held = held.double()
        self.is_scored = held[labels] > 1  # [N]
        self.scored = int(self.is_scored.sum())
        self.prior = moments.prior[self.present]
        if gram is not None:
            solutions, self.leverages = self._factorize(gram, moments)
            self.solution = lambda index: solutions[index]
            return
        values, vectors = self._eigen(state)
        inverses = torch.stack([inverse(values, r) for r in self.regularizers])  # [R, K]
        coordinates = moments.cross[self.present] @ vectors  # [C', K]
        self.solution = lambda index: (coordinates * inverses[index]) @ vectors.T  # [C', D]
        self.leverages = self._leverages(vectors, inverses)  # [N, R]

    def classifier(self, index: int) -> tuple[Tensor, Tensor]:
        """Weight [C, D] and bias [C] of all rows, for one of the regularisers."""
        solution = self.solution(index)
        weight = solution.new_zeros(len(self.held), solution.shape[1])
        bias = solution.new_full((len(weight),), -math.inf)
        weight[self.present] = solution
        bias[self.present] = self.prior - solution @ self.center
        return weight, bias

    def _factorize(self, gram: Tensor, moments: Moments) -> tuple[list[Tensor], Tensor]:
        """Solutions R x [C', D] and leverages [N, R] by a factor for each regulariser.

        Of wide rows an eigenvalue decomposition takes as long as twenty factors.
        """
        solutions, leverages = [], []
        total = self.weights.new_tensor(1 / float(moments.row_weights @ self.held))
        for regularizer in self.regularizers:
            raised = gram.clone()
            raised.diagonal().add_(regularizer)
            lower = torch.linalg.cholesky(raised)
            solutions.append(torch.cholesky_solve(moments.cross[self.present].T, lower).T)
            squares = [
                torch.linalg.solve_triangular(lower, rows.T, upper=False).square_().sum(dim=0)
                for _, rows in self._blocks()
            ]
            leverages.append((torch.cat(squares) + total) * self.weights)
        return solutions, torch.stack(leverages, dim=1)

    def _eigen(self, state: RidgeState) -> tuple[Tensor, Tensor]:
        """Eigenvalues [K] and vectors [D, K] of the centred Gram matrix, all that are not 0."""
        if len(self.columns) >= state.dim:
            values, vectors = torch.linalg.eigh(state.centered_gram())
            return values.clamp_min(0), vectors
        rows = to_float64(self.features) - self.center  # fewer rows than columns
        rows *= self.weights.sqrt().unsqueeze(1)
        values, sides = torch.linalg.eigh(rows @ rows.T)  # an SVD takes ten times as long
        is_real = values > rounding(float(values.max()), len(values))
        values = values[is_real]
        return values, rows.T @ (sides[:, is_real] / values.sqrt())

    def _leverages(self, vectors: Tensor, inverses: Tensor) -> Tensor:
        found = torch.empty(len(self.columns), len(inverses), dtype=torch.float64)
        products = torch.empty(0, vectors.shape[1], dtype=torch.float64)
        for start, rows in self._blocks():
            if len(products) < len(rows):
                products = rows.new_empty(len(rows), vectors.shape[1])
            squares = torch.mm(rows, vectors, out=products[: len(rows)]).square_()  # [B, K]
            torch.mm(squares, inverses.T, out=found[start : start + len(rows)])
        return found.add_(1 / self.weights.sum()).mul_(self.weights.unsqueeze(1))

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        buffer = block_buffer(self.features)
        for start in range(0, len(self.columns), len(buffer)):
            rows = self.features[start : start + len(buffer)]
            yield start, shifted(rows, self.center, buffer)

    def logits(self, index: int) -> Iterator[tuple[int, Tensor]]:
        """First row and [B, C'] predictions of each block, for one of the regularisers."""
        solution = self.solution(index)
        for start, rows in self._blocks():
            part = slice(start, start + len(rows))
            leverage = self.leverages[part, index].unsqueeze(1)
            fitted = torch.addmm(self.prior, rows, solution.T)  # [B, C']
            fitted.scatter_add_(1, self.columns[part].unsqueeze(1), -leverage)
            # the intercept alone keeps 1 - h above 0, except for rounding and for a lone row
            yield start, fitted / (1 - leverage).clamp_min(torch.finfo(torch.float64).eps)

    def score(self, index: int, *, with_likelihood: bool, guess: float = math.nan) -> RidgeScore:
        """Measures one of the regularisers; a guess of the temperature saves time."""
        weights = torch.where(self.is_scored, self.weights, 0.0)
        is_kept = with_likelihood and len(self.columns) * len(self.present) <= _KEPT_LOGITS
        kept: list[Margins] = []
        correct = error = 0.0
        for start, logits in self.logits(index):
            part = slice(start, start + len(logits))
            if is_kept:
                kept.append(self.margins(start, logits))
            right = logits.argmax(dim=1) == self.columns[part]
            correct += float(weights[part] @ right.double())
            logits[torch.arange(len(logits)), self.columns[part]] -= 1  # now residuals
            error += float(weights[part] @ logits.square().sum(dim=1))
        total = float(weights.sum())
        temperature = likelihood = math.nan
        if with_likelihood:
            margins: Iterable[Margins] = kept if is_kept else _MarginBlocks(self, index)
            temperature = search_temperature(margins, self.scored, guess)
            likelihood = -mean_loss(margins, temperature)
        regularizer = self.regularizers[index]
        return RidgeScore(regularizer, correct / total, error / total, temperature, likelihood)

    def margins(self, start: int, logits: Tensor) -> Margins:
        """Of the rows of a block that are scored."""
        part = slice(start, start + len(logits))
        kept = self.is_scored[part]
        return Margins.of(logits[kept], self.columns[part][kept], self.weights[part][kept])


class _MarginBlocks:
    """The scored rows of one regulariser, computed anew each time they are gone through."""

    def __init__(self, rows: _LeaveOneOut, index: int) -> None:
        self.rows, self.index = rows, index

    def __iter__(self) -> Iterator[Margins]:
        for start, logits in self.rows.logits(self.index):
            yield self.rows.margins(start, logits)


def _rank(score: RidgeScore, criterion: RidgeCriterion) -> tuple[float, float, float]:
    value = float(getattr(score, str(criterion)))
    sign = -1 if criterion is RidgeCriterion.SQUARED_ERROR else 1
    return sign * value, -score.squared_error, score.regularizer
