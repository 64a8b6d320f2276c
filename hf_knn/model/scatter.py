"""The Gram matrix of rows that come and go, and systems of equations with it.

A row changes all of the F^2 numbers of a Gram matrix, and those of a factor of it, of which a
kernel head has twenty million. So rows that came or went since the factor was made stand beside it:
with ``A`` the matrix then, ``U`` these rows and ``S`` their signs,

    (A + U S U')^-1 = A^-1 - A^-1 U (S + U' A^-1 U)^-1 U' A^-1

(Sherman, Morrison and Woodbury; S is its own inverse). Fewer rows than F need no matrix at all:
then ``A`` is the regulariser times the identity. Everything is float64 on the CPU.
"""

from typing import NamedTuple, Self

import torch
from scipy.linalg import cho_solve
from torch import Tensor

_MOST_ROWS = 128
"""Beside a factor; more go into the matrix, and the factor is made again when it is needed."""

_BLOCK = 512

_LEAST = 1e-5
"""Eigenvalue of ``S + U' A^-1 U``, of which each power of ten below 1 costs a digit."""


class Factor(NamedTuple):
    """A Cholesky factor, and what was solved with it.

    Attributes:
        regularizer: on the diagonal.
        lower: [F, F].
        solved: [M, F] of the first rows beside the matrix: ``(A^-1 U)'``.
        asked: [F, Q] right sides that were solved before.
        answers: [F, Q] what they came to.
    """

    regularizer: float
    lower: Tensor
    solved: Tensor
    asked: Tensor
    answers: Tensor


class Scatter:
    """Sums of outer products of rows, kept while rows come and go.

    Args:
        width: F, of a row.

    Attributes:
        width: as given.
        matrix: [F, F], without the rows beside it; None while there are none but those.
        signs: [M] of the rows beside it: 1 for one that came, -1 for one that went.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.matrix: Tensor | None = None
        self._parts = [torch.zeros(0, width, dtype=torch.float64)]  # joined when they are needed
        self.signs = torch.zeros(0, dtype=torch.float64)
        self._factor: Factor | None = None
        self._is_own = True  # else a copy shares the matrix, which is not written in place then

    def copy(self) -> Self:
        """Another one with the same rows, changed independently; nothing large is copied."""
        other = type(self)(self.width)
        other.matrix, other._parts, other.signs = self.matrix, [self.rows], self.signs
        other._factor = self._factor
        self._is_own = other._is_own = False
        return other

    def add(self, rows: Tensor, sign: int) -> None:
        """Adds rows or takes them away.

        Args:
            rows: [B, F].
            sign: 1 or -1.
        """
        most = self.width - 1 if self.matrix is None else _MOST_ROWS * (self._factor is not None)
        if len(self.signs) + len(rows) <= most:
            self._parts.append(rows.clone())
            self.signs = torch.cat([self.signs, self.signs.new_full((len(rows),), sign)])
            return
        self._written().addmm_(rows.T, rows, alpha=sign)

    @property
    def rows(self) -> Tensor:
        """[M, F] that stand beside the matrix."""
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts)]
        return self._parts[0]

    def gram(self) -> Tensor:
        """[F, F] of all rows, a new tensor."""
        weighted = self.rows.T * self.signs
        if self.matrix is None:
            return weighted @ self.rows
        return torch.addmm(self.matrix, weighted, self.rows)

    def trace(self) -> float:
        """The sum of the squared lengths of all rows."""
        beside = float(self.rows.square().sum(dim=1) @ self.signs)
        return beside + (0.0 if self.matrix is None else float(self.matrix.trace()))

    def move(self, shift: Tensor, sums: Tensor, count: int) -> None:
        """Makes it that of the same rows minus a shift.

        Args:
            shift: [F].
            sums: [F] of the rows as they were.
            count: how many there are.
        """
        matrix = self._written()
        matrix.addr_(sums, shift, alpha=-1).addr_(shift, sums, alpha=-1)
        matrix.addr_(shift, shift, alpha=count)

    @property
    def is_wide(self) -> bool:
        """Whether there are fewer rows than numbers in one, and no matrix."""
        return self.matrix is None

    def has_factor(self, regularizer: float) -> bool:
        """Whether a system with this on the diagonal is solved without a new factor."""
        return self._factor is not None and self._factor.regularizer == regularizer

    def drop_factor(self) -> None:
        """Forgets the factor, which is made again when it is needed."""
        self._written()

    def factorize(self, regularizer: float) -> bool:
        """Makes a factor of all rows; False where the matrix is not positive definite enough.

        Args:
            regularizer: > 0, added to the diagonal.
        """
        raised = self._written().clone()
        raised.diagonal().add_(regularizer)
        lower, failed = torch.linalg.cholesky_ex(raised)
        if failed:
            return False
        nothing = self.rows.T[:, :0]
        self._factor = Factor(regularizer, lower, self.rows[:0], nothing, nothing)
        return True

    def solve(self, sides: Tensor) -> Tensor | None:
        """Solves with all rows and the diagonal of `factorize`.

        Only sides that are not those of the last call take time.

        Args:
            sides: [F, Q], kept.

        Returns:
            [F, Q]; None where rows went without which so little is left in a direction that the
            factor has to be made again.
        """
        known = self._factor
        assert known is not None
        new_rows = self.rows[len(known.solved) :]
        width = min(sides.shape[1], known.asked.shape[1])
        is_new = torch.ones(sides.shape[1], dtype=torch.bool)
        is_new[:width] = (sides[:, :width] != known.asked[:, :width]).any(dim=0)
        asked = torch.cat([new_rows.T, sides[:, is_new]], dim=1)
        # torch copies the factor for each call, which takes longer than to solve with it
        solution = cho_solve((known.lower.numpy(), True), asked.numpy(), check_finite=False)
        found = torch.from_numpy(solution)
        answers = torch.empty_like(sides)
        answers[:, :width] = known.answers[:, :width]
        answers[:, is_new] = found[:, len(new_rows) :]
        solved = torch.cat([known.solved, found[:, : len(new_rows)].T])
        self._factor = known._replace(solved=solved, asked=sides, answers=answers)
        if not len(self.signs):
            return answers
        small = torch.addmm(self.signs.diag(), self.rows, solved.T)  # [M, M]
        if float(torch.linalg.eigvalsh(small).abs().min()) < _LEAST:
            return None
        return answers - solved.T @ torch.linalg.solve(small, self.rows @ answers)

    def solve_wide(self, sides: Tensor, regularizer: float) -> Tensor | None:
        """Solves with rows alone, of which there are few.

        Args:
            sides: [F, Q].
            regularizer: > 0, on the diagonal.

        Returns:
            [F, Q]; None where rows went without which too little is left.
        """
        small = products(self.rows)
        small.diagonal().add_(self.signs * regularizer)
        through = self.rows @ sides
        if bool((self.signs > 0).all()):
            lower, failed = torch.linalg.cholesky_ex(small)
            if failed:
                return None
            inner = torch.cholesky_solve(through, lower)
        else:
            least = float(torch.linalg.eigvalsh(small).abs().min())
            if least < _LEAST * regularizer:
                return None
            inner = torch.linalg.solve(small, through)
        return (sides - self.rows.T @ inner) / regularizer

    def _written(self) -> Tensor:
        """The matrix of all rows, to be written in place; without a factor."""
        if self.matrix is None or len(self.signs):
            self.matrix, self._is_own = self.gram(), True
            self._parts, self.signs = [self.rows[:0]], self.signs[:0]
        elif not self._is_own:
            self.matrix, self._is_own = self.matrix.clone(), True
        self._factor = None
        return self.matrix


def products(rows: Tensor) -> Tensor:
    """``rows @ rows.T``, of which half is computed.

    Args:
        rows: [N, F].
    """
    found = rows.new_empty(len(rows), len(rows))
    for start in range(0, len(rows), _BLOCK):
        block = slice(start, start + _BLOCK)
        found[block, : block.stop] = rows[block] @ rows[: block.stop].T
        found[:start, block] = found[block, :start].T
    return found


def solve_gram(gram: Tensor, cross: Tensor, regularizer: float) -> Tensor:
    """[C, D]: ``cross (gram + r I)^-1``."""
    matrix = gram.clone()
    matrix.diagonal().add_(regularizer)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if regularizer > rounding(float(gram.trace()), len(gram)) and not failed:
        return torch.cholesky_solve(cross.T, factor).T
    values, vectors = torch.linalg.eigh(gram)
    return (cross @ vectors * inverse(values.clamp_min(0), regularizer)) @ vectors.T


def inverse(values: Tensor, regularizer: float) -> Tensor:
    """``1 / (values + r)``, and 0 where both are rounding errors of the largest value."""
    raised = values + regularizer
    is_real = raised > rounding(float(values.max()), len(values)) if len(values) else raised > 0
    return torch.where(is_real, 1 / raised, 0.0)


def rounding(largest: float, width: int) -> float:
    """Below it an eigenvalue of a Gram matrix of this width may be an error.

    Args:
        largest: of its eigenvalues.
        width: K.
    """
    return largest * width * torch.finfo(torch.float64).eps
