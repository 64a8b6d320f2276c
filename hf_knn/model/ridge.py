"""Classifiers in closed form, from sums over rows that come and go.

Ridge regression on one-hot targets minimises ``sum_i w_i ||y_i - W x_i - b||^2 + r ||W||^2``; the
discriminants of normal classes come from the same sums.
"""

import math
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ..core.votes import ClassWeighting
from .scatter import Scatter, rounding, solve_gram

_LARGEST_FEATURE = 1e100  # squares and their sums stay finite
_BLOCK_NUMBERS = 2**20  # of a block of rows: small enough for memory to be used again


class Moments(NamedTuple):
    """Weighted sums about the weighted mean, and the weight of a row of each class; float64.

    Attributes:
        row_weights: [C].
        mean: [D], relative to the shift.
        cross: [C, D].
        prior: [C], the weighted mean of the one-hot targets.
    """

    row_weights: Tensor
    mean: Tensor
    cross: Tensor
    prior: Tensor


class RidgeState:
    """The sums over the rows that a ridge classifier depends on, kept while rows come and go.

    A change either succeeds or leaves everything as it was. Each change rounds the sums once, so a
    solution drifts by about ``1e-16 * (largest squared row length ever held) / regularizer``.

    The sums take ``8 D^2`` bytes, and as much again for the factor that solutions come from. With
    class weights there is one Gram matrix per class, since weights change with the counts:
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
        self._scatters = [Scatter(dim) for _ in range(slots)]

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
    def grams(self) -> Tensor:
        """[1, D, D], with class weights [C, D, D]: sums of outer products of the shifted rows."""
        return torch.stack([part.gram() for part in self._scatters])

    @property
    def row_weights(self) -> Tensor:
        """[C] float64: the weight of one row of each class; mean 1 over the rows."""
        return _row_weights(self.counts.double(), self.class_weighting)

    def copy(self) -> Self:
        """Another state with the same sums, changed independently.

        Gram matrices are shared until one of the two changes them.
        """
        other = type(self)(0, 0, self.class_weighting)
        other.shift, other.counts = self.shift.clone(), self.counts.clone()
        other.sums, other._scatters = self.sums.clone(), [s.copy() for s in self._scatters]
        return other

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Adds rows; a label from C on makes the classes up to it.

        Args:
            features: [M, D], normalised as the others.
            labels: [M] int64, >= 0.

        Raises:
            ValueError: see `from_rows`.
        """
        self.check(features, labels)
        if len(labels) == 0:
            return
        self._grow(int(labels.max()) + 1)
        if len(self) == 0:
            sums = [to_float64(block).sum(dim=0) for block in features.split(block_rows(features))]
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
        self.check(features, labels)
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
        self.check(features, labels)
        self.check(features, new_labels)
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

    def truncate(self, num_labels: int) -> None:
        """Forgets the last classes, which have no rows.

        Args:
            num_labels: how many classes stay.

        Raises:
            ValueError: if one of the others has rows.
        """
        if self.counts[num_labels:].any():
            raise ValueError(
                f"Expected no rows of classes from {num_labels} on, but there are "
                f"{int(self.counts[num_labels:].sum())}; remove them first."
            )
        self.counts, self.sums = self.counts[:num_labels], self.sums[:num_labels]
        if self.class_weighting is not ClassWeighting.NONE:
            self._scatters = self._scatters[:num_labels]

    def prepare(self, regularizer: float) -> None:
        """Makes a factor now, which copies share: a change of few rows then takes milliseconds.

        Args:
            regularizer: r > 0 of the solutions that will be asked for.
        """
        if self.class_weighting is ClassWeighting.NONE and len(self):
            self._scatters[0].drop_factor()  # and rows that stand alone become a matrix
            self._factorize(regularizer)

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
        check_regularizer(regularizer)
        if len(self) == 0:
            return torch.zeros_like(self.sums), torch.zeros(self.num_labels, dtype=torch.float64)
        solved = self._solve_sums(regularizer)
        if solved is not None:
            return self._center(solved)
        moments = self.moments()
        weight = solve_gram(self.centered_gram(), moments.cross, regularizer)  # [C, D]
        bias = moments.prior - weight @ (self.shift + moments.mean)
        return weight, bias.masked_fill(self.counts == 0, -math.inf)

    def solve_discriminants(
        self, regularizer: float, weighting: str = ClassWeighting.NONE
    ) -> tuple[Tensor, Tensor]:
        """Linear discriminants of normal classes with one covariance, which is shrunk.

        With the scatter within classes ``W``, the covariance is ``(W + r I) / (N - C)``, and
        logits are ``x' cov^-1 mu_c - mu_c' cov^-1 mu_c / 2 + log prior_c`` (Friedman, JASA 84,
        1989).

        Args:
            regularizer: r > 0, in squared units of the rows.
            weighting: of classes in the prior: `none` is their share of the rows, `inverse` the
                same for all.

        Returns:
            weight [C, D] and bias [C] float64, as from `solve`.

        Raises:
            ValueError: for a regulariser that is not a number > 0, or a state with class weights.
        """
        check_regularizer(regularizer)
        if self.class_weighting is not ClassWeighting.NONE:
            raise ValueError("Expected a state without class weights for discriminants.")
        weight, bias = torch.zeros_like(self.sums), torch.zeros(self.num_labels).double()
        if len(self) == 0:
            return weight, bias
        solved = self._solve_sums(regularizer)
        present = self.counts > 0
        counts, sums = self.counts[present].double(), self.sums[present]  # [C'], [C', D]
        roots = counts.sqrt()
        if (
            solved is not None
        ):  # the scatter within is what the factor is of, less C' rank-one parts
            scaled = solved[:, present] / roots  # [D, C']
            small = torch.eye(len(counts)).double() - (sums / roots[:, None]) @ scaled
            directions = torch.linalg.solve(small, scaled, left=False) / roots  # [D, C']
        else:
            within = self._scatters[0].gram() - (sums / counts[:, None]).T @ sums
            directions = solve_gram(within, sums / counts[:, None], regularizer).T
        mean = sums.sum(dim=0) / len(self)
        directions -= (directions @ counts / len(self))[:, None]  # means about that of all
        directions *= max(1, len(self) - len(counts))
        means = sums / counts[:, None] - mean
        weight[present] = directions.T
        prior = (counts * _row_weights(counts, ClassWeighting(weighting))).log()
        half = (means * directions.T).sum(dim=1) / 2
        bias[present] = prior - prior.logsumexp(0) - half - directions.T @ (self.shift + mean)
        return weight, bias.masked_fill(~present, -math.inf)

    def moments(self) -> Moments:
        """What a solution depends on; needs a row."""
        row_weights = self.row_weights
        class_weights = row_weights * self.counts  # [C]
        total = class_weights.sum()
        mean = row_weights @ self.sums / total
        cross = row_weights[:, None] * (self.sums - self.counts[:, None] * mean)  # [C, D]
        return Moments(row_weights, mean, cross, class_weights / total)

    def centered_gram(self) -> Tensor:
        """[D, D] weighted sums of outer products of rows minus the weighted mean; needs a row."""
        mean, total = self._mean()
        gram = torch.zeros(self.dim, self.dim, dtype=torch.float64)
        for weight, part in self._weighted():
            gram.add_(part.gram(), alpha=weight)
        return gram.addr_(mean, mean, alpha=-total)

    def trace(self) -> float:
        """Of `centered_gram`, which is not made for it; needs a row."""
        mean, total = self._mean()
        parts = sum(weight * part.trace() for weight, part in self._weighted())
        return max(0.0, parts - total * float(mean @ mean))

    def _mean(self) -> tuple[Tensor, float]:
        """The weighted mean [D], relative to the shift, and the weight of all rows."""
        weights = self.row_weights
        total = float(weights @ self.counts.double())
        return weights @ self.sums / total, total

    def _weighted(self) -> list[tuple[float, Scatter]]:
        """Sums of outer products, and how much each counts."""
        if self.class_weighting is ClassWeighting.NONE:
            return [(1.0, self._scatters[0])]
        pairs = zip(self.row_weights.tolist(), self._scatters, strict=True)
        return [pair for pair in pairs if pair[0]]

    def _factorize(self, regularizer: float) -> bool:
        """Sees to a factor of all rows, about their mean; False if they are too flat for one."""
        scatter = self._scatters[0]
        if scatter.has_factor(regularizer):
            return True
        mean = self.sums.sum(dim=0) / len(self)
        scatter.move(mean, mean * len(self), len(self))
        self.sums -= self.counts[:, None] * mean
        self.shift = self.shift + mean
        return scatter.factorize(regularizer)

    def _solve_sums(self, regularizer: float) -> Tensor | None:
        """[D, C] the sums of the classes through the inverse; None where that needs other means."""
        is_flat = regularizer <= rounding(self.trace(), self.dim)
        if is_flat or self.class_weighting is not ClassWeighting.NONE:
            return None
        scatter = self._scatters[0]
        if scatter.is_wide:
            return scatter.solve_wide(self.sums.T, regularizer)
        for _ in range(2):
            if not self._factorize(regularizer):
                return None
            solved = scatter.solve(self.sums.T.clone())
            if solved is not None:
                return solved
            scatter.drop_factor()  # too much is gone since it was made
        return None

    def _center(self, solved: Tensor) -> tuple[Tensor, Tensor]:
        """A ridge solution from the sums through the inverse [D, C]: centring is of rank one."""
        total, counts = len(self), self.counts.double()
        mean, through = self.sums.sum(dim=0) / total, solved.sum(dim=1) / total  # [D] each
        cross = solved - through[:, None] * counts  # [D, C]
        cross += torch.outer(through, (mean @ cross) * (total / (1 - total * (mean @ through))))
        bias = counts / total - (self.shift + mean) @ cross
        return cross.T.contiguous(), bias.masked_fill(self.counts == 0, -math.inf)

    def _accumulate(
        self, features: Tensor, labels: Tensor, sign: int, *, with_grams: bool = True
    ) -> None:
        features, buffer = features.detach(), block_buffer(features)
        gathered = features.new_empty(buffer.shape)
        for rows in labels.argsort(stable=True).split(len(buffer)):
            places, here = rows.to(features.device), gathered[: len(rows)]
            torch.index_select(features, 0, places, out=here)
            block = shifted(here, self.shift, buffer)  # [B, D]
            self.sums.index_add_(0, labels[rows], block, alpha=sign)
            if not with_grams:
                continue
            if self.class_weighting is ClassWeighting.NONE:
                self._scatters[0].add(block, sign)
                continue
            present, counts = labels[rows].unique_consecutive(return_counts=True)
            for label, part in zip(present.tolist(), block.split(counts.tolist()), strict=True):
                self._scatters[label].add(part, sign)

    def _grow(self, num_labels: int) -> None:
        missing = num_labels - self.num_labels
        if missing <= 0:
            return
        self.counts = torch.cat([self.counts, self.counts.new_zeros(missing)])
        self.sums = torch.cat([self.sums, self.sums.new_zeros(missing, self.dim)])
        if self.class_weighting is not ClassWeighting.NONE:
            self._scatters += [Scatter(self.dim) for _ in range(missing)]

    def _clear(self) -> None:
        """What no row is left of is zero, not a rounding error."""
        self.sums[self.counts == 0] = 0
        if self.class_weighting is not ClassWeighting.NONE:
            for label in (self.counts == 0).nonzero().flatten().tolist():
                self._scatters[label] = Scatter(self.dim)
        elif len(self) == 0:
            self._scatters = [Scatter(self.dim)]

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

    def check(self, features: Tensor, labels: Tensor) -> None:
        """Raises ValueError for rows that could not be added; see `from_rows`."""
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
        for block in features.split(block_rows(features)):
            largest = float(block.detach().abs().max()) if block.numel() else 0.0
            if not largest <= _LARGEST_FEATURE:  # also NaN
                raise ValueError(
                    f"Expected `features` to be finite and at most {_LARGEST_FEATURE:g}, but got "
                    f"{largest}; leave those rows out or rescale them."
                )


def _row_weights(counts: Tensor, weighting: ClassWeighting) -> Tensor:
    """[C] float64 of [C] rows per class; see `RidgeState.row_weights`."""
    if weighting is ClassWeighting.NONE:
        return torch.ones_like(counts)
    power = -1.0 if weighting is ClassWeighting.INVERSE else -0.5
    weights = torch.where(counts > 0, counts.clamp_min(1) ** power, 0.0)
    return weights * counts.sum() / (weights @ counts).clamp_min(1)


def check_regularizer(regularizer: float) -> None:
    """Raises ValueError for what is not a number > 0."""
    if not (regularizer > 0 and math.isfinite(regularizer)):
        raise ValueError(f"Expected `regularizer` to be a number > 0, but got {regularizer}.")


def block_rows(features: Tensor) -> int:
    """How many rows of features are worked on at once."""
    return max(1, _BLOCK_NUMBERS // max(1, features.shape[1]))


def block_buffer(features: Tensor) -> Tensor:
    """Memory for a block of rows, used again for each: the allocator keeps what many blocks leave.

    Args:
        features: [N, D].
    """
    count = min(block_rows(features), max(1, len(features)))
    return torch.empty(count, features.shape[1], dtype=torch.float64)


def shifted(rows: Tensor, shift: Tensor, buffer: Tensor) -> Tensor:
    """Rows minus a shift, in the memory of the buffer.

    Args:
        rows: [B, D].
        shift: [D] float64.
        buffer: see `block_buffer`.

    Returns:
        [B, D] float64, until the buffer is used again.
    """
    return buffer[: len(rows)].copy_(rows.detach()).sub_(shift)


def to_float64(values: Tensor) -> Tensor:
    """On the CPU, without gradients."""
    return values.detach().to("cpu", torch.float64)
