"""The temperature that makes the labels most likely under ``softmax(logits / T)``.

With margins ``m_c = z_c - z_y`` and the sharpness ``b = 1 / T``, a row loses
``log sum_c exp(b m_c)``. Its first derivative by b is the mean of the margins under the softmax,
its second their variance, never negative: the search is Newton's on b. Everything is float64 on the
CPU.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ..core.votes import PROBABILITY_FLOOR

LARGEST_TEMPERATURE = 1e3
"""Times the spread of the logits: where the temperature of worthless logits stops."""

_NEWTON_STEPS = 100
_NEWTON_PRECISION = 1e-10
_ALMOST_ZERO = 1e-200  # a sharpness at which all classes are alike, except for impossible ones
_IMPOSSIBLE = -1e300  # a margin whose exponential is 0, as is its product with that 0


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
    logits = logits.detach().to("cpu", torch.float64)
    weights = weights.detach().to("cpu", torch.float64)
    block = Margins.of(logits, labels.cpu(), weights)
    return search_temperature([block], len(labels))


class Margins(NamedTuple):
    """Logits of a block of rows relative to the label's own.

    Attributes:
        margins: [B, C] float64, 0 at the label.
        labels: [B, 1] int64.
        weights: [B] float64.
    """

    margins: Tensor
    labels: Tensor
    weights: Tensor

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, weights: Tensor) -> Self:
        """From logits [B, C], labels [B] and weights [B], all on the CPU."""
        columns = labels.unsqueeze(1)
        margins = logits - logits.gather(1, columns)
        return cls(margins.clamp_min_(_IMPOSSIBLE), columns, weights)


def search_temperature(blocks: Iterable[Margins], count: int, guess: float = math.nan) -> float:
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


def mean_loss(blocks: Iterable[Margins], temperature: float) -> float:
    """Mean negative log-likelihood, probabilities floored at 1e-12."""
    loss = total = 0.0
    floor = -math.log(PROBABILITY_FLOOR)
    for margins, labels, weights in blocks:
        log_probs = torch.log_softmax(margins / temperature, dim=1)
        losses = -log_probs.gather(1, labels).squeeze(1)
        loss += float(weights @ losses.clamp_max(floor))
        total += float(weights.sum())
    return loss / total


class _Likelihood(NamedTuple):
    """Mean negative log-likelihood at an inverse temperature, and its two derivatives."""

    loss: float
    slope: float
    curvature: float


def _likelihood(blocks: Iterable[Margins], sharpness: float) -> _Likelihood:
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


def _newton(here: _Likelihood, sharpness: float, surest: float) -> float:
    """Where the slope, or the loss above `surest`, would be 0; whichever comes first."""
    steps = []
    if here.curvature > 0:
        steps.append(-here.slope / here.curvature)
    if here.slope < 0:
        steps.append((surest - here.loss) / here.slope)
    return sharpness + min(steps, default=math.inf)
