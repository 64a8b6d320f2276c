"""How far an answer can be trusted: is the picture like what is known, and how often is one wrong.

Both are statements about pictures of the same kind as the rows, and nothing else.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Doubles = NDArray[np.float64]

ERROR_RATES = (0.01, 0.02, 0.05, 0.1, 0.2)
"""For which `KnnTrainer.tune` looks for thresholds."""


def typicality(nearest: float, calibration: Doubles) -> float:
    """A conformal p-value: how many known rows are as far from the others as a picture is.

    Valid if pictures and rows are exchangeable (Vovk et al., *Algorithmic Learning in a Random
    World*): at level 0.05, 5 % of the pictures of the known kind are called unlike anything seen.

    Args:
        nearest: similarity of a picture to its nearest row.
        calibration: [M] ascending similarities of stored rows to their nearest other row.

    Returns:
        In (0, 1].
    """
    as_far = int(np.searchsorted(calibration, nearest, side="right"))
    return (1 + as_far) / (1 + len(calibration))


def thresholds(log_probs: Tensor, labels: Tensor, rates: Sequence[float]) -> dict[str, float]:
    """From which confidence on no more than a share of the answers was wrong.

    The smallest threshold such that the answers above it, of the rows given, were wrong at most at
    the rate, and 90 % sure so: by the upper Clopper-Pearson bound, as in Geifman & El-Yaniv,
    *Selective Classification for Deep Neural Networks* (2017).

    Args:
        log_probs: [N, C] of rows that nothing was fitted on.
        labels: [N] int64.
        rates: of errors, each in (0, 1).

    Returns:
        Rate, as text, to threshold in [0, 1]; rates that no threshold reaches are left out.
    """
    confidence, answer = log_probs.double().exp().max(1)
    order = confidence.argsort(descending=True)
    wrong = (answer != labels)[order].long().cumsum(0)
    counts = torch.arange(1, len(order) + 1)
    # answers of one confidence are given together
    ends = torch.cat([confidence[order].diff() < 0, torch.ones(1, dtype=torch.bool)])
    places = ends.nonzero().flatten() if len(order) else torch.empty(0, dtype=torch.int64)
    bounds = [upper_bound(int(wrong[i]), int(counts[i])) for i in places.tolist()]
    found = {}
    for rate in rates:
        fine = [i for i, bound in zip(places.tolist(), bounds, strict=True) if bound <= rate]
        if fine:
            found[f"{rate:g}"] = float(confidence[order[fine[-1]]])
    return found


def upper_bound(errors: int, count: int, sureness: float = 0.9) -> float:
    """The error rate that is exceeded with a chance of 1 - sureness only (Clopper-Pearson).

    Args:
        errors: of `count` answers.
        count: > 0.
        sureness: in (0, 1).
    """
    if errors >= count:
        return 1.0
    low, high = errors / count, 1.0
    for _ in range(50):  # bisection on the binomial tail, which falls with the rate
        middle = (low + high) / 2
        if _log_tail(errors, count, middle) > math.log(1 - sureness):
            low = middle
        else:
            high = middle
    return high


def _log_tail(errors: int, count: int, rate: float) -> float:
    """The log of the chance of at most so many errors at a rate."""
    if rate <= 0:
        return 0.0
    if rate >= 1:
        return -math.inf
    k = torch.arange(errors + 1, dtype=torch.float64)
    n = torch.tensor(float(count), dtype=torch.float64)
    terms = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    terms = terms + k * math.log(rate) + (n - k) * math.log1p(-rate)
    return float(torch.logsumexp(terms, 0))
