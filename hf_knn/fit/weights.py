"""What each row weighs in the loss: more where k-NN finds it hard, or its class is small."""

import math
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ..core.votes import ClassWeighting, check_labels
from .grids import FactorControl, LossNormalization, ProbeConfig, ProbeSettings, generator_of


def knn_loss_weights(
    knn_log_probs: Tensor,
    labels: Tensor,
    alpha: float,
    clamp: float = 100.0,
    *,
    normalize: str = LossNormalization.NONE,
) -> Tensor:
    """How much harder the loss looks at each example: ``1 + alpha * min(-log p_knn(y), clamp)``.

    Args:
        knn_log_probs: [B, C], leave-one-out: the example itself is not among its neighbours.
        labels: [B] int64 in [0, C).
        alpha: >= 0; 0 gives exactly 1 everywhere.
        clamp: > 0, the largest surprise counted (100 as published).
        normalize: `none` (published) or `mean`: divided by their mean, so that the reweighting does
            not act as a larger learning rate.

    Returns:
        [B] factors >= 0, without gradient.

    Raises:
        ValueError: for a negative alpha, a clamp that is not positive, or labels out of range.
    """
    if not (alpha >= 0 and math.isfinite(alpha)):
        raise ValueError(f"Expected `alpha` to be a number >= 0, but got {alpha}.")
    if not clamp > 0:
        raise ValueError(f"Expected `clamp` to be > 0, but got {clamp}.")
    surprise = (-_at_labels(knn_log_probs, labels)).clamp(max=clamp)  # [B]
    factors = 1 + alpha * surprise if alpha else torch.ones_like(surprise)
    if LossNormalization(normalize) is LossNormalization.MEAN:
        factors = factors / factors.mean()
    return factors


def focal_loss_weights(knn_log_probs: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """The focal form of the reweighting: ``(1 - p_knn(y | x)) ** gamma``.

    Args:
        knn_log_probs: [B, C], leave-one-out.
        labels: [B] int64 in [0, C).
        gamma: >= 0; 0 gives exactly 1 everywhere.

    Returns:
        [B] factors in [0, 1], without gradient.

    Raises:
        ValueError: for a negative gamma or labels out of range.
    """
    if not (gamma >= 0 and math.isfinite(gamma)):
        raise ValueError(f"Expected `gamma` to be a number >= 0, but got {gamma}.")
    return (-torch.expm1(_at_labels(knn_log_probs, labels))).clamp(0, 1) ** gamma


def class_weights(labels: Tensor, num_labels: int, mode: str = ClassWeighting.INVERSE) -> Tensor:
    """Weights per class for long-tailed data, with mean 1 over the examples.

    Args:
        labels: [N] int64 in [0, num_labels), the training labels.
        num_labels: C.
        mode: `none` (all 1), `inverse` (1 / count) or `inverse_sqrt` (1 / sqrt(count)).

    Returns:
        [C] float32; 0 for a class without examples, except for `none`.

    Raises:
        ValueError: for labels out of range or another mode.
    """
    check_labels(labels, num_labels, "labels")
    if ClassWeighting(mode) is ClassWeighting.NONE:
        return torch.ones(num_labels, device=labels.device)
    counts = torch.bincount(labels, minlength=num_labels).double()
    power = -1.0 if ClassWeighting(mode) is ClassWeighting.INVERSE else -0.5
    weights = torch.where(counts > 0, counts.clamp_min(1) ** power, 0.0)
    return (weights * counts.sum() / (weights * counts).sum().clamp_min(1e-300)).float()


def loss_factors(knn_log_probs: Tensor, config: ProbeConfig, settings: ProbeSettings) -> Tensor:
    """What the cross-entropy of each row is multiplied with, without class weights.

    Args:
        knn_log_probs: [N] leave-one-out ``log p_knn`` of each row's own label.
        config: alpha, gamma and control; with both, alpha's and gamma's factors are multiplied.
        settings: clamp, normalisation (over all N rows) and the seed of shuffled factors.

    Returns:
        [N] float32 >= 0.
    """
    column = knn_log_probs.float().unsqueeze(1)
    only = torch.zeros(len(column), dtype=torch.int64, device=column.device)
    factors = knn_loss_weights(column, only, config.alpha, settings.knn_loss_clamp)
    if config.gamma:
        factors = factors * focal_loss_weights(column, only, config.gamma)
    if LossNormalization(settings.knn_loss_normalize) is LossNormalization.MEAN:
        mean = factors.mean()
        factors = factors / mean if mean > 0 else torch.ones_like(factors)
    match FactorControl(config.control):
        case FactorControl.SHUFFLED:
            generator = generator_of(settings.seed, 1)
            order = torch.randperm(len(factors), generator=generator)
            return factors[order.to(factors.device)]
        case FactorControl.CONSTANT:
            return factors.mean().expand_as(factors)
    return factors


class LossFactors(NamedTuple):
    """What each row weighs to each of M heads, those that are equal held once.

    Attributes:
        rows: [U, N] float32, each row different.
        which: [M] int64, the row of each head.
    """

    rows: Tensor
    which: Tensor

    @classmethod
    def of(
        cls,
        configs: list[ProbeConfig],
        weights: Tensor,
        settings: ProbeSettings,
        knn_log_probs: Tensor | None,
    ) -> Self:
        """Class weights times the factors of each configuration.

        Args:
            configs: M of them.
            weights: [N] class weight of each row.
            settings: see `loss_factors`.
            knn_log_probs: [N]; needed where a configuration has an alpha or a gamma.

        Raises:
            ValueError: for `knn_log_probs` that are missing, of another shape or above 0.
        """
        keys = [config._replace(learning_rate=1.0, weight_decay=0.0) for config in configs]
        distinct = list(dict.fromkeys(keys))
        rows = []
        for config in distinct:
            if not (config.alpha or config.gamma):
                rows.append(weights)
                continue
            if knn_log_probs is None:
                raise ValueError(
                    f"Expected `knn_log_probs` for alpha {config.alpha} and gamma {config.gamma}, "
                    "but got None; pass the leave-one-out log p_knn of each row's label."
                )
            _check_knn_log_probs(knn_log_probs, weights)
            rows.append(weights * loss_factors(knn_log_probs.to(weights.device), config, settings))
        which = torch.tensor([distinct.index(key) for key in keys], device=weights.device)
        return cls(torch.stack(rows), which)

    def at(self, heads: range, batch: Tensor) -> Tensor:
        """[M, B] the factors of some heads for a minibatch of row numbers [B]."""
        return self.rows[:, batch][self.which[heads.start : heads.stop]]


def _check_knn_log_probs(knn_log_probs: Tensor, rows: Tensor) -> None:
    if knn_log_probs.shape != rows.shape:
        raise ValueError(
            f"Expected `knn_log_probs` to be [{len(rows)}], one per row, "
            f"but got {tuple(knn_log_probs.shape)}."
        )
    if not (knn_log_probs <= 1e-6).all():  # also NaN; float32 may round log 1 up
        raise ValueError(
            "Expected `knn_log_probs` to be log-probabilities, at most 0, but got larger or NaN."
        )


def _at_labels(log_probs: Tensor, labels: Tensor) -> Tensor:
    if log_probs.ndim != 2 or labels.shape != log_probs.shape[:1]:
        raise ValueError(
            f"Expected `labels` to be [B] for log-probabilities [B, C], "
            f"but got {tuple(labels.shape)} for {tuple(log_probs.shape)}."
        )
    check_labels(labels, log_probs.shape[1], "labels")
    return log_probs.detach().gather(1, labels.unsqueeze(1)).squeeze(1)  # [B]
