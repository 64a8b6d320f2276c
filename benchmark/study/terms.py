"""Why a blend gains: the terms of the gain, beside what was measured.

With p = (1 - λ) p_head + λ p_knn, and e_y the vector of the true class:

- squared error (the ambiguity decomposition of Krogh and Vedelsby, NeurIPS 1994, for two voices):
  ``(1 - λ) E|p_head - e_y|² + λ E|p_knn - e_y|² - E|p - e_y|² = λ (1 - λ) E|p_knn - p_head|²``,
  so that the gain over the head is that ambiguity less the price
  ``λ (E|p_knn - e_y|² - E|p_head - e_y|²)`` of listening to the worse voice;
- log-likelihood: ``E log p(y) - E log p_head(y) = E log((1 - λ) + λ p_knn(y) / p_head(y))``.
"""

import torch
from torch import Tensor

from study.arms import FLOOR, Arm

_BLOCK = 4_096  # rows in float64 at once


def terms_of(arm: Arm, labels: Tensor) -> dict[str, float]:
    """The terms of a blend's gain on its test pictures, as means over them, in float64.

    Args:
        arm: a blend; T >= 1.
        labels: [T] int64.

    Returns:
        `weight` is λ, `disagreement` E|p_knn - p_head|², `ambiguity` the latter times λ (1 - λ).
        `error_first`, `error_second` and `error` are squared errors, `top1_first` and `top1_second`
        accuracies of the voices at the blend's own k and temperature. `log_gain` is the formula of
        the log-likelihood gain; `log_gain_measured` what the blend's answers say. Probabilities of
        the true class are floored at 1e-12, as in every NLL.
    """
    assert arm.mix is not None
    weight = arm.mix.weight
    sums: dict[str, float] = {}
    parts = (arm.mix.first, arm.mix.second, arm.test, labels)
    for first, second, blend, own in zip(*(part.split(_BLOCK) for part in parts), strict=True):
        for name, values in _rows(first, second, blend, own, weight).items():
            sums[name] = sums.get(name, 0.0) + float(values.double().sum())
    means = {name: total / len(labels) for name, total in sums.items()}
    means["ambiguity"] = weight * (1 - weight) * means["disagreement"]
    return {"weight": weight, **means}


def _rows(
    first: Tensor, second: Tensor, blend: Tensor, labels: Tensor, weight: float
) -> dict[str, Tensor]:
    """Each term of each row, [B]."""
    head, knn, both = (part.double().exp() for part in (first, second, blend))
    places = labels.unsqueeze(1)
    head_own, knn_own, both_own = (p.gather(1, places).squeeze(1) for p in (head, knn, both))
    floored = head_own.clamp_min(FLOOR)
    ratio = ((1 - weight) * head_own + weight * knn_own).clamp_min(FLOOR) / floored
    return {
        "disagreement": (knn - head).square().sum(1),
        "error_first": _squared_error(head, places),
        "error_second": _squared_error(knn, places),
        "error": _squared_error(both, places),
        "top1_first": head.argmax(1) == labels,
        "top1_second": knn.argmax(1) == labels,
        "log_gain": ratio.log(),
        "log_gain_measured": both_own.clamp_min(FLOOR).log() - floored.log(),
    }


def _squared_error(probabilities: Tensor, places: Tensor) -> Tensor:
    """[B] of probabilities [B, C] and true classes [B, 1]."""
    hits = torch.zeros_like(probabilities).scatter_(1, places, 1.0)
    return (probabilities - hits).square().sum(1)
