"""The Gram matrix of rows that come and go, and systems of equations with it.

A row changes all of the F^2 numbers of a Gram matrix, and those of a factor of it, of which a
kernel head has twenty million. So rows that came or went since the factor was made stand beside it:
with ``A`` the matrix then, ``U`` these rows and ``S`` their signs,

    (A + U S U')^-1 = A^-1 - A^-1 U (S + U' A^-1 U)^-1 U' A^-1

(Sherman, Morrison and Woodbury; S is its own inverse). Everything is float64 on the CPU.
"""

from typing import NamedTuple, Self

import torch
from scipy.linalg import cho_solve
from torch import Tensor

_MOST_ROWS = 128
"""Beside a factor; more go into the matrix, and the factor is made again when it is needed."""


_LEAST = 1e-5
"""Eigenvalue of ``S + U' A^-1 U``, of which each power of ten below 1 costs a digit."""


class Factor(NamedTuple):
    """A Cholesky factor, and what was solved with it.

    Attributes:
        regularizer: on the diagonal.
        lower: [F, F].
        solved: [F, M] of the first rows beside the matrix: ``A^-1 U``.
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
        matrix: [F, F], without the rows beside it.
        rows: [F, M] that came or went since.
        signs: [M] 1 for a row that came, -1 for one that went.
    """

    def __init__(self, width: int) -> None:
        self.matrix = torch.zeros(width, width, dtype=torch.float64)
        self.rows = torch.zeros(width, 0, dtype=torch.float64)
        self.signs = torch.zeros(0, dtype=torch.float64)
        self._factor: Factor | None = None
        self._is_own = True  # else a copy shares the matrix, which is not written in place then

    def copy(self) -> Self:
        """Another one with the same rows, changed independently; nothing large is copied."""
        other = type(self)(0)
        other.matrix, other.rows, other.signs = self.matrix, self.rows, self.signs
        other._factor = self._factor
        self._is_own = other._is_own = False
        return other

    def add(self, rows: Tensor, sign: int) -> None:
        """Adds rows or takes them away.

        Args:
            rows: [B, F].
            sign: 1 or -1.
        """
        if self._factor is not None and self.rows.shape[1] + len(rows) <= _MOST_ROWS:
            self.rows = torch.cat([self.rows, rows.T], dim=1)
            self.signs = torch.cat([self.signs, self.signs.new_full((len(rows),), sign)])
            return
        self._flush()
        if not self._is_own:
            self.matrix, self._is_own = self.matrix.clone(), True
        self.matrix.addmm_(rows.T, rows, alpha=sign)

    def gram(self) -> Tensor:
        """[F, F] of all rows, a new tensor."""
        return torch.addmm(self.matrix, self.rows * self.signs, self.rows.T)

    def move(self, shift: Tensor, sums: Tensor, count: int) -> None:
        """Makes it that of the same rows minus a shift.

        Args:
            shift: [F].
            sums: [F] of the rows as they were.
            count: how many there are.
        """
        matrix = self.gram().addr_(sums, shift, alpha=-1).addr_(shift, sums, alpha=-1)
        self._flush()
        self.matrix, self._is_own = matrix.addr_(shift, shift, alpha=count), True

    def has_factor(self, regularizer: float) -> bool:
        """Whether a system with this on the diagonal is solved without a new factor."""
        return self._factor is not None and self._factor.regularizer == regularizer

    def drop_factor(self) -> None:
        """Forgets the factor, which is made again when it is needed."""
        self._flush()

    def factorize(self, regularizer: float) -> bool:
        """Makes a factor of all rows; False where the matrix is not positive definite enough.

        Args:
            regularizer: > 0, added to the diagonal.
        """
        matrix = self.gram()
        self._flush()
        self.matrix, self._is_own = matrix, True
        raised = matrix.clone()
        raised.diagonal().add_(regularizer)
        lower, failed = torch.linalg.cholesky_ex(raised)
        if failed:
            return False
        nothing = self.rows[:, :0]
        self._factor = Factor(regularizer, lower, nothing, nothing, nothing)
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
        new_rows = self.rows[:, known.solved.shape[1] :]
        width = min(sides.shape[1], known.asked.shape[1])
        is_new = torch.ones(sides.shape[1], dtype=torch.bool)
        is_new[:width] = (sides[:, :width] != known.asked[:, :width]).any(dim=0)
        asked = torch.cat([new_rows, sides[:, is_new]], dim=1)
        # torch copies the factor for each call, which takes longer than to solve with it
        solution = cho_solve((known.lower.numpy(), True), asked.numpy(), check_finite=False)
        found = torch.from_numpy(solution)
        answers = torch.empty_like(sides)
        answers[:, :width] = known.answers[:, :width]
        answers[:, is_new] = found[:, new_rows.shape[1] :]
        solved = torch.cat([known.solved, found[:, : new_rows.shape[1]]], dim=1)
        self._factor = known._replace(solved=solved, asked=sides, answers=answers)
        if not len(self.signs):
            return answers
        small = torch.addmm(self.signs.diag(), self.rows.T, solved)  # [M, M]
        if float(torch.linalg.eigvalsh(small).abs().min()) < _LEAST:
            return None
        return answers - solved @ torch.linalg.solve(small, self.rows.T @ answers)

    def _flush(self) -> None:
        """Takes the rows beside the matrix into it."""
        if len(self.signs):
            self.matrix, self._is_own = self.gram(), True
            self.rows, self.signs = self.rows[:, :0], self.signs[:0]
        self._factor = None
