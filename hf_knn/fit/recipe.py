"""A head trained on cached features as `transformers.Trainer` would, without its loop.

A step on features takes a millisecond, and what `Trainer` does around it several. That is nothing
for the one head that stays; for the heads of folds, which only choose, it is most of the time.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import get_linear_schedule_with_warmup

from ..core.backbone import KnnHead
from ..core.votes import check_labels


@dataclass(frozen=True)
class HeadRecipe:
    """How a head is trained: AdamW with a rate that falls linearly to 0, as `Trainer` does.

    Attributes:
        epochs: passes over the rows, >= 0; the last one may be a part.
        learning_rate: at the first step.
        weight_decay: of weights; biases do not decay.
        batch_size: rows per step; the last step of an epoch has what is left.
        max_grad_norm: a longer gradient is scaled down to this length; 0 leaves it.
        label_smoothing: share of each target that is spread evenly over the classes.
        seed: of the order of the rows.
    """

    epochs: float = 60
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    batch_size: int = 256
    max_grad_norm: float = 1.0
    label_smoothing: float = 0.0
    seed: int = 0


def train_head(
    head: KnnHead,
    features: Tensor,
    labels: Tensor,
    recipe: HeadRecipe,
    factors: Tensor | None = None,
) -> None:
    """Standardises a head for some rows and trains it on them, from the weights that it has.

    The numbers are those of `KnnTrainer` with the same arguments, up to rounding: the same order of
    rows (`SeedableRandomSampler` of accelerate), the same loss, the same steps.

    Args:
        head: `linear` or `mlp`; changed in place.
        features: [N, D] float32.
        labels: [N] int64; a class that the head does not have counts nothing.
        recipe: how.
        factors: [N] what the loss of each row is multiplied with; None is 1.

    Raises:
        ValueError: for no rows, or labels that are no class numbers.
        FloatingPointError: at a loss that is not finite, before it is in the weights.
    """
    if not len(features):
        raise ValueError("Expected rows to train a head on, but got none.")
    check_labels(labels, int(labels.max()) + 1, "labels")
    head.standardize(features)
    device = head.mean.device
    with (
        torch.inference_mode(mode=False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        rows = head.prepared(features.detach().to(device))
        is_known = labels < head.classifier.out_features
        weights = is_known.float() if factors is None else factors * is_known
        loss = _Loss(head, rows, labels.to(device), weights.to(device), recipe.label_smoothing)
        _train(head, loss, recipe)


class _Loss:
    """The mean loss of a head over some of the rows.

    Args:
        head: that is trained.
        rows: [N, D] as its first layer sees them.
        labels: [N].
        weights: [N] of the rows; 0 of a class that the head does not have.
        smoothing: of the labels.
    """

    def __init__(
        self, head: KnnHead, rows: Tensor, labels: Tensor, weights: Tensor, smoothing: float
    ) -> None:
        self.head, self.rows, self.weights = head, rows, weights
        self.is_known = labels < head.classifier.out_features
        self.labels = labels.where(self.is_known, 0)
        self.smoothing = smoothing

    def of(self, batch: Tensor) -> Tensor:
        """[] of the rows with the numbers `batch` [B]."""
        outputs = self.rows[batch]
        for layer in self.head.hidden:
            outputs = functional.relu(layer(outputs))
        losses = functional.cross_entropy(
            self.head.classifier(outputs), self.labels[batch],
            reduction="none", label_smoothing=self.smoothing,
        )  # fmt: skip
        count = self.is_known[batch].sum().clamp_min(1)
        return torch.dot(self.weights[batch], losses) / count


def _train(head: KnnHead, loss: _Loss, recipe: HeadRecipe) -> None:
    layers = [*head.hidden, head.classifier]
    groups = [
        {"params": [layer.weight for layer in layers], "weight_decay": recipe.weight_decay},
        {"params": [layer.bias for layer in layers], "weight_decay": 0.0},
    ]
    parameters = [part for group in groups for part in group["params"]]
    optimizer = torch.optim.AdamW(groups, recipe.learning_rate, fused=True)
    per_epoch = math.ceil(len(loss.rows) / recipe.batch_size)
    steps = math.ceil(recipe.epochs * per_epoch)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)
    for step in range(steps):
        if step % per_epoch == 0:
            generator = torch.Generator().manual_seed(recipe.seed + step // per_epoch)
            order = torch.randperm(len(loss.rows), generator=generator).to(loss.rows.device)
            batches = order.split(recipe.batch_size)
        mean = loss.of(batches[step % per_epoch])
        if not mean.isfinite():
            raise FloatingPointError(
                f"Expected a finite loss, but got {float(mean.detach())} at step {step + 1} of a "
                "head on features; lower the learning rate."
            )
        optimizer.zero_grad()
        mean.backward()
        if recipe.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        optimizer.step()
        schedule.step()
