"""A linear head on cached features, as `KnnTrainer` trains it, without a trainer around it."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.backbone import KnnHead
from ..core.votes import ClassWeighting
from ..data.augmentation import seeded
from .weights import class_weights


class Recipe(NamedTuple):
    """How much a training trains, where nobody says otherwise."""

    num_train_epochs: float
    learning_rate: float
    per_device_train_batch_size: int
    weight_decay: float


HEAD = Recipe(60, 1e-3, 256, 0.1)
"""On features that were computed once: seconds."""

_LARGEST_GRADIENT = 1.0
_START_DEVIATION = 0.02
_ROWS = 4096


@dataclass(frozen=True)
class LinearFit:
    """A trained head.

    Attributes:
        head: on raw features.
    """

    head: KnnHead

    @torch.no_grad()
    def log_probs(self, features: Tensor) -> Tensor:
        """[B, D] raw features -> [B, C] float32, on the CPU."""
        device = self.head.mean.device
        parts = [self.head(rows.to(device)).float().cpu() for rows in features.split(_ROWS)]
        return functional.log_softmax(torch.cat(parts), dim=1)


def fit_linear(
    features: Tensor,
    labels: Tensor,
    num_labels: int,
    *,
    recipe: Recipe = HEAD,
    class_weighting: str = ClassWeighting.NONE,
    seed: int = 0,
    device: torch.device | None = None,
) -> LinearFit:
    """Trains a linear head: AdamW, a rate that falls to 0 in a line, gradients of norm 1 at most.

    These are the defaults of `transformers.Trainer`, with the same batches in the same order, so
    that the head is that of `KnnTrainer` but for rounding.

    Args:
        features: [N, D] raw features.
        labels: [N] int64 in [0, num_labels).
        num_labels: C.
        recipe: epochs, learning rate, rows of a batch and weight decay.
        class_weighting: `none`, `inverse` or `inverse_sqrt` of the class counts, in the loss.
        seed: of the first weights and of the batches.
        device: where it is trained; None is the CPU.

    Raises:
        ValueError: for no rows.
    """
    if not len(labels):
        raise ValueError("Expected rows to train a head on, but got none.")
    head = _new_head(features.shape[1], num_labels, seed)
    head.standardize(features)
    head.to(device)
    with torch.no_grad():
        rows = head.prepared(features.to(head.mean.device, torch.float32))
    targets = labels.to(rows.device)
    weights = class_weights(labels, num_labels, class_weighting).to(rows.device)[targets]  # [N]
    with torch.inference_mode(mode=False), torch.enable_grad():
        _descend(head.classifier, rows, targets, weights, recipe, seed)
    return LinearFit(head.eval())


def _new_head(width: int, num_labels: int, seed: int) -> KnnHead:
    """With the weights that a model of that seed starts with."""
    with seeded(seed):
        head = KnnHead(width, num_labels)
        nn.init.normal_(head.classifier.weight, std=_START_DEVIATION)
        nn.init.zeros_(head.classifier.bias)
    return head


def _descend(
    layer: nn.Linear, rows: Tensor, labels: Tensor, weights: Tensor, recipe: Recipe, seed: int
) -> None:
    """Trains a layer.

    Args:
        layer: is changed.
        rows: [N, D] as it sees them.
        labels: [N] int64.
        weights: [N] of the rows in the loss.
        recipe: of the training.
        seed: of the batches.
    """
    size, epochs = recipe.per_device_train_batch_size, round(recipe.num_train_epochs)
    steps = epochs * -(-len(labels) // size)
    groups = [
        {"params": [layer.weight], "weight_decay": recipe.weight_decay},
        {"params": [layer.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(seed + epoch)
        order = torch.randperm(len(labels), generator=generator).to(rows.device)
        for batch in order.split(size):
            losses = functional.cross_entropy(layer(rows[batch]), labels[batch], reduction="none")
            optimizer.zero_grad()
            (weights[batch] * losses).mean().backward()
            nn.utils.clip_grad_norm_(layer.parameters(), _LARGEST_GRADIENT)
            optimizer.step()
            schedule.step()
