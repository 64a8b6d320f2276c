"""A classifier in closed form: ridge regression on one-hot labels, exact under every update.

The head minimises ``sum_i s_i ||y_i - W x_i - b||^2 + r ||W||^2`` over rows ``x_i`` (features that
the caller has normalised, as a datastore does) with one-hot targets ``y_i``, a weight ``s_i`` per
class and an intercept that is not penalised: the intercept is what centres rows and targets, at
their weighted means. The solution depends on sums over the rows alone (*The Elements of Statistical
Learning*, 3.4.1), so a row that is added or removed changes it as a full refit would.

The regulariser is chosen by exact leave-one-out: the prediction for a row by the model that has not
seen it is ``(yhat_i - h_i y_i) / (1 - h_i)`` with its leverage ``h_i`` (the PRESS identity, Allen,
*Technometrics* 16, 1974). Everything is float64 on the CPU.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Self

import torch
from torch import Tensor

from .functional import PROBABILITY_FLOOR, ClassWeighting

RELATIVE_REGULARIZERS = tuple(10 ** (power / 2) for power in range(-8, 5))
"""What is tried, times the mean eigenvalue of the centred Gram matrix: 1e-4 to 100."""

LARGEST_TEMPERATURE = 1e3
"""Times the spread of the logits: where the temperature of worthless logits stops."""

_LARGEST_FEATURE = 1e100  # squares and their sums stay finite
_BLOCK_NUMBERS = 2**20  # of a block of rows: small enough for memory to be used again
_KEPT_LOGITS = 2**27  # numbers, a GB; more are computed again for every step
_NEWTON_STEPS = 100
_NEWTON_PRECISION = 1e-10
_ALMOST_ZERO = 1e-200  # a sharpness at which all classes are alike, except for impossible ones
_IMPOSSIBLE = -1e300  # a margin whose exponential is 0, as is its product with that 0


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
    state: "RidgeState"

    def log_probs(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, C] float64 log-probabilities; -inf for a class without rows."""
        logits = torch.addmm(self.bias, _to_float64(features), self.weight.T)
        return torch.log_softmax(logits / self.temperature, dim=1)


class _Moments(NamedTuple):
    """Weighted sums about the weighted mean, and the weight of a row of each class."""

    row_weights: Tensor  # [C]
    mean: Tensor  # [D], relative to the shift
    gram: Tensor  # [D, D]
    cross: Tensor  # [C, D]
    prior: Tensor  # [C], the weighted mean of the one-hot targets


class RidgeState:
    """The sums over the rows that a ridge classifier depends on, kept while rows come and go.

    A change either succeeds or leaves everything as it was. Each change rounds the sums once, so a
    solution drifts by about ``1e-16 * (largest squared row length ever held) / regularizer``.

    With class weights there is one Gram matrix per class, since weights change with the counts:
    ``8 C D^2`` bytes.

    Args:
        dim: D, width of a row.
        num_labels: C, may grow.
        class_weighting: `none`, `inverse` (a row of a class of n rows weighs in proportion to 1/n)
            or `inverse_sqrt`; the mean weight of a row is 1.

    Attributes:
        shift: [D] what is subtracted from every row so that large means cancel nothing: the mean of
            the first rows.
        counts: [C] int64, rows per class.
        sums: [C, D] sums of the shifted rows of each class.
        grams: [1, D, D], with class weights [C, D, D]: sums of their outer products.
        class_weighting: as given.
    """

    def __init__(
        self, dim: int, num_labels: int = 0, class_weighting: str = ClassWeighting.NONE
    ) -> None:
        self.class_weighting = ClassWeighting(class_weighting)
        slots = 1 if self.class_weighting is ClassWeighting.NONE else num_labels
        self.shift = torch.zeros(dim, dtype=torch.float64)
        self.counts = torch.zeros(num_labels, dtype=torch.int64)
        self.sums = torch.zeros(num_labels, dim, dtype=torch.float64)
        self.grams = torch.zeros(slots, dim, dim, dtype=torch.float64)

    @classmethod
    def from_rows(
        cls,
        features: Tensor,
        labels: Tensor,
        num_labels: int = 0,
        class_weighting: str = ClassWeighting.NONE,
    ) -> Self:
        """Sums over rows, in blocks.

        Args:
            features: [N, D], normalised by the caller.
            labels: [N] int64.
            num_labels: C; more if a label says so.
            class_weighting: see the class.

        Raises:
            ValueError: for shapes that disagree, negative labels, or features that are not finite
                or above 1e100.
        """
        if features.ndim != 2:
            raise ValueError(
                f"Expected `features` to be [N, D], but got shape {tuple(features.shape)}."
            )
        state = cls(features.shape[1], num_labels, class_weighting)
        state.add(features, labels)
        return state

    def __len__(self) -> int:
        return int(self.counts.sum())

    @property
    def dim(self) -> int:
        """D."""
        return self.sums.shape[1]

    @property
    def num_labels(self) -> int:
        """C."""
        return len(self.counts)

    @property
    def row_weights(self) -> Tensor:
        """[C] float64: the weight of one row of each class; mean 1 over the rows."""
        counts = self.counts.double()
        if self.class_weighting is ClassWeighting.NONE:
            return torch.ones_like(counts)
        power = -1.0 if self.class_weighting is ClassWeighting.INVERSE else -0.5
        weights = torch.where(counts > 0, counts.clamp_min(1) ** power, 0.0)
        return weights * counts.sum() / (weights @ counts).clamp_min(1)

    def copy(self) -> Self:
        """Another state with the same sums, changed independently."""
        other = type(self)(0, 0, self.class_weighting)
        other.shift, other.counts = self.shift.clone(), self.counts.clone()
        other.sums, other.grams = self.sums.clone(), self.grams.clone()
        return other

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Adds rows; a label from C on makes the classes up to it.

        Args:
            features: [M, D], normalised as the others.
            labels: [M] int64, >= 0.

        Raises:
            ValueError: see `from_rows`.
        """
        self._check(features, labels)
        if len(labels) == 0:
            return
        self._grow(int(labels.max()) + 1)
        if len(self) == 0:
            sums = [
                _to_float64(block).sum(dim=0) for block in features.split(_block_rows(features))
            ]
            self.shift = torch.stack(sums).sum(dim=0) / len(labels)
        self.counts += torch.bincount(labels.cpu(), minlength=self.num_labels)
        self._accumulate(features, labels.cpu(), 1)

    def remove(self, features: Tensor, labels: Tensor) -> None:
        """Removes rows that were added before; whether they were cannot be checked.

        Args:
            features: [M, D], the values they were added with.
            labels: [M] int64, likewise.

        Raises:
            ValueError: see `from_rows`; also if a class has fewer rows than are removed.
        """
        self._check(features, labels)
        removed = self._count(labels, "remove")
        self.counts -= removed
        self._accumulate(features, labels.cpu(), -1)
        self._clear()

    def relabel(self, features: Tensor, labels: Tensor, new_labels: Tensor) -> None:
        """Gives rows other labels.

        Args:
            features: [M, D], the values they were added with.
            labels: [M] int64, the labels they have.
            new_labels: [M] int64, the labels they get; may be new classes.

        Raises:
            ValueError: see `remove`.
        """
        self._check(features, labels)
        self._check(features, new_labels)
        moved = self._count(labels, "relabel")
        if len(new_labels) == 0:
            return
        self._grow(int(new_labels.max()) + 1)
        self.counts[: len(moved)] -= moved
        self.counts += torch.bincount(new_labels.cpu(), minlength=self.num_labels)
        with_grams = self.class_weighting is not ClassWeighting.NONE  # else their sum is the same
        self._accumulate(features, labels.cpu(), -1, with_grams=with_grams)
        self._accumulate(features, new_labels.cpu(), 1, with_grams=with_grams)
        self._clear()

    def solve(self, regularizer: float) -> tuple[Tensor, Tensor]:
        """The classifier of the rows as they are.

        Args:
            regularizer: r > 0, in squared units of the rows. Below about ``1e-13`` of the largest
                eigenvalue of the Gram matrix it counts as the limit 0: the shortest W.

        Returns:
            weight [C, D] and bias [C] float64: logits are ``x @ weight.T + bias``. A class without
            rows has weight 0 and bias -inf; if no class has rows, every bias is 0.

        Raises:
            ValueError: for a regulariser that is not a number > 0.
        """
        _check_regularizer(regularizer)
        if len(self) == 0:
            return torch.zeros_like(self.sums), torch.zeros(self.num_labels, dtype=torch.float64)
        moments = self._moments()
        weight = _solve(moments.gram, moments.cross, regularizer)  # [C, D]
        bias = moments.prior - weight @ (self.shift + moments.mean)
        return weight, bias.masked_fill(self.counts == 0, -math.inf)

    def _moments(self) -> _Moments:
        row_weights = self.row_weights
        class_weights = row_weights * self.counts  # [C]
        total = class_weights.sum()
        mean = row_weights @ self.sums / total
        if self.class_weighting is ClassWeighting.NONE:
            gram = self.grams[0].clone()
        else:
            gram = torch.einsum("c,cij->ij", row_weights, self.grams)
        gram.addr_(mean, mean, alpha=-float(total))
        cross = row_weights[:, None] * (self.sums - self.counts[:, None] * mean)  # [C, D]
        return _Moments(row_weights, mean, gram, cross, class_weights / total)

    def _accumulate(
        self, features: Tensor, labels: Tensor, sign: int, *, with_grams: bool = True
    ) -> None:
        for rows in labels.argsort(stable=True).split(_block_rows(features)):
            block = _to_float64(features[rows.to(features.device)]) - self.shift  # [B, D]
            self.sums.index_add_(0, labels[rows], block, alpha=sign)
            if not with_grams:
                continue
            if self.class_weighting is ClassWeighting.NONE:
                self.grams[0].addmm_(block.T, block, alpha=sign)
                continue
            present, counts = labels[rows].unique_consecutive(return_counts=True)
            for label, part in zip(present.tolist(), block.split(counts.tolist()), strict=True):
                self.grams[label].addmm_(part.T, part, alpha=sign)

    def _grow(self, num_labels: int) -> None:
        missing = num_labels - self.num_labels
        if missing <= 0:
            return
        self.counts = torch.cat([self.counts, self.counts.new_zeros(missing)])
        self.sums = torch.cat([self.sums, self.sums.new_zeros(missing, self.dim)])
        if self.class_weighting is not ClassWeighting.NONE:
            added = self.grams.new_zeros(missing, self.dim, self.dim)
            self.grams = torch.cat([self.grams, added])

    def _clear(self) -> None:
        """What no row is left of is zero, not a rounding error."""
        self.sums[self.counts == 0] = 0
        if self.class_weighting is not ClassWeighting.NONE:
            self.grams[self.counts == 0] = 0
        elif len(self) == 0:
            self.grams.zero_()

    def _count(self, labels: Tensor, change: str) -> Tensor:
        """[C] rows per class, which the state must have."""
        counts = torch.bincount(labels.cpu(), minlength=self.num_labels)
        held = torch.zeros_like(counts)
        held[: self.num_labels] = self.counts
        short = (counts > held).nonzero().flatten().tolist()
        if short:
            raise ValueError(
                f"Expected at least {int(counts[short[0]])} rows of class {short[0]} to {change}, "
                f"but got {int(held[short[0]])}; {change} only rows that were added."
            )
        return counts

    def _check(self, features: Tensor, labels: Tensor) -> None:
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(
                f"Expected `features` to be [N, {self.dim}], but got {tuple(features.shape)}."
            )
        if labels.shape != features.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(
                f"Expected `labels` to be int64 [{len(features)}], one per row, but got "
                f"{labels.dtype} {tuple(labels.shape)}."
            )
        if labels.numel() and int(labels.min()) < 0:
            raise ValueError(f"Expected `labels` to be >= 0, but got {int(labels.min())}.")
        for block in features.split(_block_rows(features)):
            largest = float(block.detach().abs().max()) if block.numel() else 0.0
            if not largest <= _LARGEST_FEATURE:  # also NaN
                raise ValueError(
                    f"Expected `features` to be finite and at most {_LARGEST_FEATURE:g}, but got "
                    f"{largest}; leave those rows out or rescale them."
                )


def default_regularizers(state: RidgeState) -> tuple[float, ...]:
    """`RELATIVE_REGULARIZERS` times the mean of the eigenvalues that can differ from 0."""
    if len(state) == 0:
        return RELATIVE_REGULARIZERS
    trace = float(state._moments().gram.trace())
    scale = trace / max(1, min(state.dim, len(state) - 1))
    # rows that are all the same have no scale
    return tuple(value * (scale if scale > 0 else 1.0) for value in RELATIVE_REGULARIZERS)


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
    regularizer, temperature = grid[len(grid) // 2], 1.0
    if left_out.scored:
        needs_likelihood = chosen_by is RidgeCriterion.LOG_LIKELIHOOD
        for i in range(len(grid)):
            guess = table[-1].temperature if table else math.nan
            table.append(left_out.score(i, with_likelihood=needs_likelihood, guess=guess))
        best = max(range(len(grid)), key=lambda i: _rank(table[i], chosen_by))
        if not needs_likelihood:
            table[best] = left_out.score(best, with_likelihood=True)
        regularizer, temperature = grid[best], table[best].temperature
    weight, bias = state.solve(regularizer)
    return RidgeFit(weight, bias, temperature, regularizer, table, state)


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


def fit_temperature(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> float:
    """The temperature T that makes the labels most likely under ``softmax(logits / T)``.

    The mean log-likelihood is concave in 1 / T, so the maximum is unique. Logits that are right on
    every row have none: the sharper the better. T stops where the mean negative log-likelihood is
    that of a chance of ``0.5 / (N + 1)`` to fail, Jeffreys' estimate after N successes in N trials
    (no row that is wrong allows a mean that low). Logits that are worse than nothing have
    `LARGEST_TEMPERATURE` times their spread, logits that are all the same have 1.

    Args:
        logits: [N, C]; -inf is probability 0, never at the label.
        labels: [N] int64 in [0, C).
        weights: [N] >= 0 of the rows; None is 1 each.

    Raises:
        ValueError: for no rows, shapes that disagree, NaN, a label with logit -inf, or weights that
            are negative or all 0.
    """
    if logits.ndim != 2 or len(logits) == 0 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"Expected `logits` [N, C] and `labels` [N] with N > 0, but got {tuple(logits.shape)} "
            f"and {tuple(labels.shape)}."
        )
    own = logits.gather(1, labels.unsqueeze(1))
    if not own.isfinite().all() or (logits.isnan() | (logits == math.inf)).any():
        raise ValueError(
            "Expected `logits` to be finite at the labels and below infinity elsewhere, but got "
            "others; leave out rows whose class has no logit."
        )
    weights = torch.ones(len(labels)) if weights is None else weights
    if weights.shape != labels.shape or not (weights >= 0).all() or not weights.sum() > 0:
        raise ValueError(
            f"Expected `weights` to be [{len(labels)}] numbers >= 0 that are not all 0, but got "
            f"others {tuple(weights.shape)}; pass None to count every row once."
        )
    block = _Margins.of(_to_float64(logits), labels.cpu(), _to_float64(weights))
    return _search_temperature([block], len(labels))


class _Margins(NamedTuple):
    """Logits of a block of rows relative to the label's own."""

    margins: Tensor  # [B, C], 0 at the label
    labels: Tensor  # [B, 1]
    weights: Tensor  # [B]

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, weights: Tensor) -> Self:
        columns = labels.unsqueeze(1)
        margins = logits - logits.gather(1, columns)
        return cls(margins.clamp_min_(_IMPOSSIBLE), columns, weights)


class _LeaveOneOut:
    """Predictions for the rows of a state by the models that have not seen them.

    Args:
        state: of exactly these rows.
        features: [N, D].
        labels: [N] int64.
        regularizers: R numbers > 0.

    Attributes:
        present: [C'] the classes that have rows; logits have these columns.
        scored: how many rows are not the only one of their class.
    """

    def __init__(
        self, state: RidgeState, features: Tensor, labels: Tensor, regularizers: Sequence[float]
    ) -> None:
        for regularizer in regularizers:
            _check_regularizer(regularizer)
        state._check(features, labels)
        labels = labels.cpu()
        held = torch.bincount(labels, minlength=state.num_labels)
        if held.tolist() != state.counts.tolist():
            raise ValueError(
                f"Expected the rows that the state was made from, {state.counts.tolist()[:10]} per "
                f"class, but got {held.tolist()[:10]}; pass the same rows."
            )
        moments = state._moments()
        self.features, self.regularizers = features, list(regularizers)
        self.center = state.shift + moments.mean
        self.present = held.nonzero().flatten()
        self.columns = (torch.cumsum(held > 0, 0) - 1)[labels]  # [N] the label among those present
        self.weights = moments.row_weights[labels]  # [N]
        self.is_scored = held[labels] > 1  # [N]
        self.scored = int(self.is_scored.sum())
        self.prior = moments.prior[self.present]
        values, vectors = self._eigen(moments.gram)
        inverse = torch.stack([_inverse(values, r) for r in self.regularizers])  # [R, K]
        coordinates = moments.cross[self.present] @ vectors  # [C', K]
        self.solutions = [(coordinates * row) @ vectors.T for row in inverse]  # R x [C', D]
        self.leverages = self._leverages(vectors, inverse)  # [N, R]

    def _eigen(self, gram: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues [K] and vectors [D, K] of the centred Gram matrix, all that are not 0."""
        if len(self.columns) >= len(gram):
            values, vectors = torch.linalg.eigh(gram)
            return values.clamp_min(0), vectors
        rows = _to_float64(self.features) - self.center  # fewer rows than columns
        rows *= self.weights.sqrt().unsqueeze(1)
        _, singular, vectors = torch.linalg.svd(rows, full_matrices=False)
        return singular.square(), vectors.T

    def _leverages(self, vectors: Tensor, inverse: Tensor) -> Tensor:
        parts = [
            (rows @ vectors).square_() @ inverse.T + 1 / self.weights.sum()  # [B, R]
            for _, rows in self._blocks()
        ]
        return torch.cat(parts) * self.weights.unsqueeze(1)

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        count = _block_rows(self.features)
        for start in range(0, len(self.columns), count):
            yield start, _to_float64(self.features[start : start + count]) - self.center

    def logits(self, index: int) -> Iterator[tuple[int, Tensor]]:
        """First row and [B, C'] predictions of each block, for one of the regularisers."""
        for start, rows in self._blocks():
            part = slice(start, start + len(rows))
            leverage = self.leverages[part, index].unsqueeze(1)
            fitted = torch.addmm(self.prior, rows, self.solutions[index].T)  # [B, C']
            fitted.scatter_add_(1, self.columns[part].unsqueeze(1), -leverage)
            # the intercept alone keeps 1 - h above 0, except for rounding and for a lone row
            yield start, fitted / (1 - leverage).clamp_min(torch.finfo(torch.float64).eps)

    def score(self, index: int, *, with_likelihood: bool, guess: float = math.nan) -> RidgeScore:
        """Measures one of the regularisers; a guess of the temperature saves time."""
        weights = torch.where(self.is_scored, self.weights, 0.0)
        correct = error = 0.0
        for start, logits in self.logits(index):
            part = slice(start, start + len(logits))
            right = logits.argmax(dim=1) == self.columns[part]
            correct += float(weights[part] @ right.double())
            logits[torch.arange(len(logits)), self.columns[part]] -= 1  # now residuals
            error += float(weights[part] @ logits.square().sum(dim=1))
        total = float(weights.sum())
        temperature = likelihood = math.nan
        if with_likelihood:
            margins: Iterable[_Margins] = _MarginBlocks(self, index)
            if len(self.columns) * len(self.present) <= _KEPT_LOGITS:
                margins = list(margins)
            temperature = _search_temperature(margins, self.scored, guess)
            likelihood = -_mean_loss(margins, temperature)
        regularizer = self.regularizers[index]
        return RidgeScore(regularizer, correct / total, error / total, temperature, likelihood)


class _MarginBlocks:
    """The scored rows of one regulariser, computed anew each time they are gone through."""

    def __init__(self, rows: _LeaveOneOut, index: int) -> None:
        self.rows, self.index = rows, index

    def __iter__(self) -> Iterator[_Margins]:
        rows = self.rows
        for start, logits in rows.logits(self.index):
            part = slice(start, start + len(logits))
            kept = rows.is_scored[part]
            yield _Margins.of(logits[kept], rows.columns[part][kept], rows.weights[part][kept])


class _Likelihood(NamedTuple):
    """Mean negative log-likelihood at an inverse temperature, and its two derivatives."""

    loss: float
    slope: float
    curvature: float


def _likelihood(blocks: Iterable[_Margins], sharpness: float) -> _Likelihood:
    sums = torch.zeros(4, dtype=torch.float64)
    for margins, labels, weights in blocks:
        log_probs = torch.log_softmax(sharpness * margins, dim=1)
        losses = -log_probs.gather(1, labels).squeeze(1)
        moved = log_probs.exp_() * margins  # [B, C]
        means = moved.sum(dim=1)
        variances = (moved * margins).sum(dim=1) - means.square()
        sums += torch.stack([losses, means, variances, torch.ones_like(means)]) @ weights
    loss, slope, curvature, total = sums.tolist()
    return _Likelihood(loss / total, slope / total, curvature / total)


def _search_temperature(blocks: Iterable[_Margins], count: int, guess: float = math.nan) -> float:
    """Safeguarded Newton steps on 1 / T, from a guess of T; see `fit_temperature` for the end."""
    at_zero = _likelihood(blocks, _ALMOST_ZERO)
    if at_zero.curvature <= 0:
        return 1.0
    low, high = 1 / (LARGEST_TEMPERATURE * math.sqrt(at_zero.curvature)), math.inf
    if at_zero.slope >= 0:
        return 1 / low
    surest = -math.log1p(-0.5 / (count + 1))
    sharpness = 1 / guess
    if not sharpness > low:
        sharpness = max(2 * low, -at_zero.slope / at_zero.curvature)
    for _ in range(_NEWTON_STEPS):
        here = _likelihood(blocks, sharpness)
        if here.slope >= 0 or here.loss <= surest:
            high = sharpness
        else:
            low = sharpness
        wanted = _newton(here, sharpness, surest)
        if abs(wanted - sharpness) <= _NEWTON_PRECISION * sharpness:
            return 1 / wanted
        if not low < wanted < high:
            wanted = 2 * low if high == math.inf else (low + high) / 2
        sharpness = wanted
    return 1 / sharpness


def _newton(here: _Likelihood, sharpness: float, surest: float) -> float:
    """Where the slope, or the loss above `surest`, would be 0; whichever comes first."""
    steps = []
    if here.curvature > 0:
        steps.append(-here.slope / here.curvature)
    if here.slope < 0:
        steps.append((surest - here.loss) / here.slope)
    return sharpness + min(steps, default=math.inf)


def _mean_loss(blocks: Iterable[_Margins], temperature: float) -> float:
    loss = total = 0.0
    floor = -math.log(PROBABILITY_FLOOR)
    for margins, labels, weights in blocks:
        log_probs = torch.log_softmax(margins / temperature, dim=1)
        losses = -log_probs.gather(1, labels).squeeze(1)
        loss += float(weights @ losses.clamp_max(floor))
        total += float(weights.sum())
    return loss / total


def _rank(score: RidgeScore, criterion: RidgeCriterion) -> tuple[float, float, float]:
    value = float(getattr(score, str(criterion)))
    sign = -1 if criterion is RidgeCriterion.SQUARED_ERROR else 1
    return sign * value, -score.squared_error, score.regularizer


def _solve(gram: Tensor, cross: Tensor, regularizer: float) -> Tensor:
    """[C, D]: ``cross (gram + r I)^-1``."""
    matrix = gram.clone()
    matrix.diagonal().add_(regularizer)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if regularizer > _rounding(float(gram.trace()), len(gram)) and not failed:
        return torch.cholesky_solve(cross.T, factor).T
    values, vectors = torch.linalg.eigh(gram)
    return (cross @ vectors * _inverse(values.clamp_min(0), regularizer)) @ vectors.T


def _inverse(values: Tensor, regularizer: float) -> Tensor:
    """``1 / (values + r)``, and 0 where both are rounding errors of the largest value."""
    raised = values + regularizer
    is_real = raised > _rounding(float(values.max()), len(values)) if len(values) else raised > 0
    return torch.where(is_real, 1 / raised, 0.0)


def _rounding(largest: float, width: int) -> float:
    return largest * width * torch.finfo(torch.float64).eps


def _check_regularizer(regularizer: float) -> None:
    if not (regularizer > 0 and math.isfinite(regularizer)):
        raise ValueError(f"Expected `regularizer` to be a number > 0, but got {regularizer}.")


def _block_rows(features: Tensor) -> int:
    return max(1, _BLOCK_NUMBERS // max(1, features.shape[1]))


def _to_float64(values: Tensor) -> Tensor:
    return values.detach().to("cpu", torch.float64)
