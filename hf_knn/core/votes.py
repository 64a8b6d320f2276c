"""The method as pure functions on tensors, in log space.

Everything here is a formula of *Rethinking Nearest Neighbors for Visual Classification*
(arXiv 2112.08459) or a stated variation of it. Nothing here knows about models, files or faiss.

Conventions: a *similarity* is higher for closer rows; for `metric="cosine"` it is the inner product
of unit vectors (squared distance ``d = 2 - 2 s``), for `metric="l2"` it is the negative squared
Euclidean distance (``d = -s``).
"""

import math
import re
from enum import StrEnum

import torch
from torch import Tensor

PROBABILITY_FLOOR = 1e-12
"""Where `logits` and every NLL stop: a class of probability 0 has ``log(1e-12)``, never -inf."""


class Choice(StrEnum):
    """Names to choose from; another one is refused with what there is."""

    @classmethod
    def _missing_(cls, value: object) -> None:
        option = re.sub(r"\B([A-Z])", r"_\1", cls.__name__).lower()
        raise ValueError(
            f"Expected `{option}` to be one of {[str(choice) for choice in cls]}, "
            f"but got {value!r}."
        )


class Metric(Choice):
    """How two feature vectors are compared."""

    COSINE = "cosine"
    L2 = "l2"


class Weighting(Choice):
    """How the vote of a neighbour depends on its distance or rank."""

    SOFTMAX = "softmax"
    UNIFORM = "uniform"
    INVERSE_DISTANCE = "inverse_distance"
    RANK = "rank"


class ClassWeighting(Choice):
    """How the loss of an example depends on how frequent its class is."""

    NONE = "none"
    INVERSE = "inverse"
    INVERSE_SQRT = "inverse_sqrt"


def squared_distances(similarities: Tensor, metric: str = Metric.COSINE) -> Tensor:
    """Turns similarities into squared distances, never negative.

    Args:
        similarities: any shape; cosine similarities in [-1, 1], or negative squared distances.
        metric: `"cosine"` (``d = 2 - 2 s``) or `"l2"` (``d = -s``).

    Returns:
        Squared distances >= 0, same shape and dtype.

    Raises:
        ValueError: for another metric.
    """
    if Metric(metric) is Metric.L2:
        return (-similarities).clamp_min(0)
    return (2 - 2 * similarities).clamp_min(0)


def neighbor_log_weights(
    similarities: Tensor,
    temperature: float,
    *,
    metric: str = Metric.COSINE,
    weighting: str = Weighting.SOFTMAX,
    reliability: Tensor | None = None,
) -> Tensor:
    """The log of each neighbour's share of the vote.

    Args:
        similarities: [B, k], best first.
        temperature: divides the squared distance (`softmax` only), > 0.
        metric: what the similarities are, see `squared_distances`.
        weighting: `softmax` of ``-d / temperature`` (the paper), `uniform`, `inverse_distance`
            (``1 / sqrt(d)``; zero distances take all the weight, as in scikit-learn) or `rank`
            (``1 / (2 + rank)``, nearest = 0, *visual memory*, arXiv 2408.08172).
        reliability: optional [B, k] in [0, 1], multiplied into the votes before normalising.

    Returns:
        [B, k] float64 (float32 on devices without float64); exp sums to 1 in each row.

    Raises:
        ValueError: for a wrong shape, NaN, temperature, metric or weighting.
    """
    if similarities.ndim != 2:
        raise ValueError(
            f"Expected `similarities` to be [B, k], but got shape {tuple(similarities.shape)}."
        )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"Expected `temperature` to be a number > 0, but got {temperature}.")
    values = _widen(similarities)
    if values.isnan().any():
        rows = values.isnan().any(dim=1).nonzero().flatten().tolist()
        raise ValueError(f"Expected `similarities` without NaN, but rows {rows[:10]} have some.")
    distances = squared_distances(values, metric)  # [B, k]
    match Weighting(weighting):
        case Weighting.SOFTMAX:
            scores = -distances / temperature
        case Weighting.UNIFORM:
            scores = torch.zeros_like(distances)
        case Weighting.INVERSE_DISTANCE:
            # 2 - 2 s cannot tell an identical row from one a rounding error away
            rounding = 4 * torch.finfo(similarities.dtype).eps if metric == Metric.COSINE else 0
            is_zero = distances <= rounding
            at_zero = torch.where(is_zero, 0.0, -torch.inf)
            scores = torch.where(is_zero.any(1, keepdim=True), at_zero, -0.5 * distances.log())
        case Weighting.RANK:
            ranks = torch.arange(values.shape[1], dtype=values.dtype, device=values.device)
            scores = -(2 + ranks).log().expand_as(values)
    if reliability is not None:
        if reliability.shape != similarities.shape:
            raise ValueError(
                f"Expected `reliability` to have the shape of `similarities` "
                f"{tuple(similarities.shape)}, but got {tuple(reliability.shape)}."
            )
        if not ((reliability >= 0) & (reliability <= 1)).all():
            raise ValueError("Expected `reliability` to be in [0, 1], but got values outside.")
        scores = scores + reliability.to(scores.dtype).log()
    return _log_normalize(scores)


def knn_log_probs(
    similarities: Tensor,
    labels: Tensor,
    num_labels: int,
    temperature: float,
    *,
    metric: str = Metric.COSINE,
    weighting: str = Weighting.SOFTMAX,
    reliability: Tensor | None = None,
) -> Tensor:
    """Log-probability of each class by the votes of the neighbours (the paper's p_kNN).

    ``p(c | x)`` is the sum over the k neighbours with label c of ``softmax(-d / temperature)``,
    computed as a log-sum-exp per class, so `temperature=1e-4` gives finite numbers.

    Args:
        similarities: [B, k], best first; k may be 0.
        labels: [B, k] int64, the neighbours' labels in [0, num_labels).
        num_labels: C, the number of classes.
        temperature: see `neighbor_log_weights`.
        metric: see `squared_distances`.
        weighting: see `neighbor_log_weights`.
        reliability: see `neighbor_log_weights`.

    Returns:
        [B, C] float32 (float64 for float64 input); -inf for a class without neighbours.

    Raises:
        ValueError: for shapes that disagree, labels out of range, or a bad option.
    """
    if labels.shape != similarities.shape:
        raise ValueError(
            f"Expected `labels` to have the shape of `similarities` {tuple(similarities.shape)}, "
            f"but got {tuple(labels.shape)}."
        )
    check_labels(labels, num_labels, "labels")
    weights = neighbor_log_weights(
        similarities, temperature, metric=metric, weighting=weighting, reliability=reliability
    )
    log_probs = _log_scatter_sum(weights, labels, num_labels)  # [B, C]
    return log_probs.to(_result_dtype(similarities))


def blend_log_probs(
    head_log_probs: Tensor,
    knn_log_probs: Tensor,
    knn_weight: float,
    num_tuned: int | None = None,
) -> Tensor:
    """Blends head and neighbours: ``p = λ p_knn + (1 - λ) p_head``, in log space.

    Classes that were taught since λ was chosen keep their full k-NN probability, in all ``q = sum
    of p_knn over them``, and the blend shares what is left: ``p(c) = p_knn(c) + (1 - q) (1 - λ)
    p_head(c)`` for those, of which only a head that was taught too (ridge) knows anything, and
    ``p(c) = (1 - q) [λ p_knn(c | others) + (1 - λ) p_head(c)]`` for the others. With no such class
    this is the paper's blend. A row without any neighbour is its head alone.

    Args:
        head_log_probs: [B, C_head] log-softmax of the head, C_head <= C.
        knn_log_probs: [B, C] from `knn_log_probs`, may hold -inf.
        knn_weight: λ in [0, 1].
        num_tuned: how many classes, the first ones, λ was chosen with; None is C_head.

    Returns:
        [B, C] log-probabilities; -inf where both voices say 0.

    Raises:
        ValueError: for shapes that disagree or a weight outside [0, 1].
    """
    if not 0 <= knn_weight <= 1:
        raise ValueError(f"Expected `knn_weight` to be in [0, 1], but got {knn_weight}.")
    if head_log_probs.ndim != 2 or knn_log_probs.ndim != 2:
        raise ValueError(
            "Expected `head_log_probs` and `knn_log_probs` to be [B, C_head] and [B, C], but got "
            f"{tuple(head_log_probs.shape)} and {tuple(knn_log_probs.shape)}."
        )
    rows, head_width = head_log_probs.shape
    if knn_log_probs.shape[0] != rows or knn_log_probs.shape[1] < head_width:
        raise ValueError(
            f"Expected `knn_log_probs` to be [{rows}, at least {head_width}], "
            f"but got {tuple(knn_log_probs.shape)}."
        )
    has_neighbors = (knn_log_probs > -torch.inf).any(dim=1, keepdim=True)  # [B, 1]
    tuned = head_width if num_tuned is None else min(num_tuned, head_width)
    known, taught = knn_log_probs[:, :tuned], knn_log_probs[:, tuned:]
    missing = knn_log_probs.shape[1] - head_width
    head = torch.nn.functional.pad(head_log_probs, (0, missing), value=-torch.inf)  # [B, C]
    head_share = _log(1 - knn_weight) + head
    if taught.shape[1]:
        head_share = head_share + torch.logsumexp(known, dim=1, keepdim=True)  # log(1 - q)
    votes = torch.cat([_log(knn_weight) + known, taught], dim=1)
    return torch.where(has_neighbors, torch.logaddexp(votes, head_share), head)


def floor_log_probs(log_probs: Tensor) -> Tensor:
    """Clamps log-probabilities at ``log(1e-12)``, as `logits` and every NLL are."""
    return log_probs.clamp_min(math.log(PROBABILITY_FLOOR))


def soften(log_probs: Tensor, temperature: float) -> Tensor:
    """Temperature scaling (Guo et al., 2017): ``log_softmax(log p / T)``.

    Args:
        log_probs: [B, C]; floored at log(1e-12) first.
        temperature: T > 0; 1 changes nothing, more is less sure.

    Returns:
        [B, C] log-probabilities.

    Raises:
        ValueError: for a temperature that is not > 0.
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"Expected `temperature` to be > 0, but got {temperature}.")
    if temperature == 1:
        return log_probs
    return torch.log_softmax(floor_log_probs(log_probs) / temperature, dim=-1)


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def _widen(values: Tensor) -> Tensor:
    """float64 where the device has it: ``d / 1e-4`` in float32 is off by a part in a thousand."""
    return values.float() if values.device.type == "mps" else values.double()


def _result_dtype(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _log_normalize(scores: Tensor) -> Tensor:
    """Log-softmax over the last dimension; rows without any vote stay -inf instead of NaN."""
    total = torch.logsumexp(scores, dim=-1, keepdim=True) if scores.shape[-1] else 0.0
    normalized = scores - total
    return torch.where(normalized.isnan(), -torch.inf, normalized)


def _log_scatter_sum(log_weights: Tensor, labels: Tensor, num_labels: int) -> Tensor:
    """[B, k], [B, k] -> [B, C]: log of the sum of exp per class, the class maximum subtracted."""
    empty = log_weights.new_full((log_weights.shape[0], num_labels), -torch.inf)
    largest = empty.scatter_reduce(1, labels, log_weights, "amax")  # [B, C]
    offset = torch.where(largest == -torch.inf, 0.0, largest)
    scaled = (log_weights - offset.gather(1, labels)).exp()  # [B, k]
    return torch.zeros_like(empty).scatter_add(1, labels, scaled).log() + offset


def check_labels(labels: Tensor, num_labels: int, name: str) -> None:
    """Refuses what is no class number.

    Args:
        labels: int64 in [0, num_labels), any shape.
        num_labels: C.
        name: of the argument, for the message.

    Raises:
        ValueError: with the dtype or the values that were found.
    """
    if labels.dtype != torch.int64:
        raise ValueError(f"Expected `{name}` to be int64, but got {labels.dtype}.")
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= num_labels):
        raise ValueError(
            f"Expected `{name}` to be in [0, {num_labels}), "
            f"but got values from {int(labels.min())} to {int(labels.max())}."
        )
