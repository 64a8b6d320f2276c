"""Ridge regression on fewer rows than columns, from the products of all pairs of rows.

The rows of a kernel head have thousands of columns. With Z the N centred rows, ``(Z' Z + r I)^-1
Z' = Z' (Z Z' + r I)^-1``, of which the left inverse is [F, F] and the right one only [N, N]. What
is minimised is as in `ridge`. With ``M = (Z Z' + r I)^-1`` and the centred one-hot targets Y, the
answer for row i by the other rows misses its target by ``r (M Y)_i / (r M_ii - 1 / N)``.
"""

import math

import torch
from torch import Tensor

from ..model.scatter import products
from .ridge import RidgeScore
from .temperature import Margins, mean_loss, search_temperature


class DualRidge:
    """Ridge regression of a set of rows, for any regulariser.

    Args:
        rows: [N, F] float64 on the CPU, as the classifier sees them; they are centred in place.
        labels: [N] int64 in [0, num_labels).
        num_labels: C.

    Attributes:
        scale: the mean of the eigenvalues that can differ from 0, see `ridge.scale_of`.
    """

    def __init__(self, rows: Tensor, labels: Tensor, num_labels: int) -> None:
        self.center = rows.mean(dim=0)
        self.rows = rows.sub_(self.center)
        self.products = products(rows)  # [N, N]
        trace = float(self.products.trace())
        self.scale = trace / max(1, min(rows.shape[1], len(rows) - 1)) if trace > 0 else 1.0
        counts = torch.bincount(labels, minlength=num_labels)
        self.is_present = counts > 0
        self.columns = (self.is_present.cumsum(dim=0) - 1)[labels]  # [N] among those present
        self.prior = counts[self.is_present].double() / len(labels)
        self.targets = -self.prior.repeat(len(labels), 1)  # [N, C'] about their mean
        self.targets[torch.arange(len(labels)), self.columns] += 1
        self.is_scored = counts[labels] > 1  # else nothing could answer the row

    def solve(self, regularizer: float) -> tuple[Tensor, Tensor]:
        """Weight [C, F] and bias [C] float64, as from `RidgeState.solve`.

        Args:
            regularizer: r > 0.
        """
        answers = torch.cholesky_solve(self.targets, self._factor(regularizer))  # [N, C']
        weight = self.rows.new_zeros(len(self.is_present), self.rows.shape[1])
        bias = self.rows.new_full((len(self.is_present),), -math.inf)
        weight[self.is_present] = answers.T @ self.rows
        bias[self.is_present] = self.prior - weight[self.is_present] @ self.center
        return weight, bias

    def score(self, regularizer: float) -> RidgeScore:
        """What a regulariser scores on the rows, each left out; at least one must be scored.

        Args:
            regularizer: r > 0.
        """
        inverse = torch.cholesky_inverse(self._factor(regularizer))
        diagonal, labels = inverse.diagonal()[:, None], self.columns[self.is_scored]
        rest = (regularizer * diagonal - 1 / len(inverse)).clamp_min(torch.finfo(torch.float64).eps)
        missed = (regularizer * (inverse @ self.targets) / rest)[self.is_scored]
        logits = -missed
        logits[torch.arange(len(labels)), labels] += 1
        margins = [Margins.of(logits, labels, logits.new_ones(len(labels)))]
        temperature = search_temperature(margins, len(labels))
        return RidgeScore(
            regularizer,
            float((logits.argmax(dim=1) == labels).double().mean()),
            float(missed.square().sum(dim=1).mean()),
            temperature,
            -mean_loss(margins, temperature),
        )

    def _factor(self, regularizer: float) -> Tensor:
        raised = self.products.clone()
        raised.diagonal().add_(regularizer)
        return torch.linalg.cholesky(raised)
