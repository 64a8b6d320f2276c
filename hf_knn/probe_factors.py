"""What the cross-entropy of each row is multiplied with, per head.

The loss of a head is the mean over the minibatch of ``w_y * CE * factor`` (*Rethinking Nearest
Neighbors for Visual Classification*, arXiv 2112.08459): the k-NN surprise enters as
``1 + alpha * min(-log p_knn, clamp)``, in the focal form as ``(1 - p_knn) ** gamma``; both are
fixed numbers per row, from leave-one-out votes that were counted once.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .functional import LossNormalization, focal_loss_weights, knn_loss_weights
from .probe_settings import FactorControl, ProbeConfig, ProbeSettings, generator_of


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


class LossFactors:
    """Factors [N] of each configuration, those that are equal held once.

    Args:
        configs: M of them.
        weights: [N] class weight of each row.
        settings: see `loss_factors`.
        knn_log_probs: [N]; needed where a configuration has an alpha or a gamma.

    Raises:
        ValueError: for `knn_log_probs` that are missing, of another shape or above 0.
    """

    def __init__(
        self,
        configs: list[ProbeConfig],
        weights: Tensor,
        settings: ProbeSettings,
        knn_log_probs: Tensor | None,
    ) -> None:
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
            factors = loss_factors(knn_log_probs.to(weights.device), config, settings)
            rows.append(weights * factors)
        self.rows = torch.stack(rows)  # [U, N]
        self.which = torch.tensor([distinct.index(key) for key in keys], device=weights.device)

    def of(self, chunk: range) -> "ChunkFactors":
        """Those of some of the configurations."""
        return ChunkFactors(self.rows, self.which[chunk.start : chunk.stop])


class ChunkFactors(NamedTuple):
    """Factors of M heads, of which some are equal.

    Attributes:
        rows: [U, N] float32, each row different.
        which: [M] int64, the row of each head.
    """

    rows: Tensor
    which: Tensor

    def at(self, batch: Tensor) -> Tensor:
        """[B, M] the factors of a minibatch of row numbers [B]."""
        return self.rows[:, batch][self.which].T


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
