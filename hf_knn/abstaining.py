"""From which confidence on answers are wrong no more often than asked."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import beta  # type: ignore[import-untyped]
from torch import Tensor

ERROR_RATES = (0.01, 0.02, 0.05, 0.1, 0.2)
"""For which `KnnTrainer.tune` looks for thresholds."""


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
    bounds = upper_bounds(wrong[places].numpy(), counts[places].numpy())
    found = {}
    for rate in rates:
        fine = places[torch.from_numpy(bounds <= rate)]
        if len(fine):
            found[f"{rate:g}"] = float(confidence[order[fine[-1]]])
    return found


def upper_bounds(
    errors: NDArray[np.int64], counts: NDArray[np.int64], sureness: float = 0.9
) -> NDArray[np.float64]:
    """The error rates that are exceeded with a chance of 1 - sureness only (Clopper-Pearson).

    Args:
        errors: [M] of so many answers.
        counts: [M], > 0.
        sureness: in (0, 1).
    """
    is_all = errors >= counts
    bounds = beta.ppf(sureness, errors + 1, np.where(is_all, 1, counts - errors))
    return np.where(is_all, 1.0, bounds)
