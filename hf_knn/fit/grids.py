"""What heads are trained with: one configuration each, settings that all share, the paper's grids.

The grids and the schedule are those of *Rethinking Nearest Neighbors for Visual Classification*,
arXiv 2112.08459.
"""

import itertools
import math
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import torch

from ..core.votes import Choice, ClassWeighting


class Optimizer(StrEnum):
    """How gradients become steps; both as in `torch.optim`."""

    SGD = "sgd"
    ADAMW = "adamw"


class FactorControl(StrEnum):
    """What is done to the factors of the loss before training, to tell what they are good for.

    `shuffled` gives each row another row's factor, `constant` gives every row the mean factor.
    """

    NONE = "none"
    SHUFFLED = "shuffled"
    CONSTANT = "constant"


class ProbeConfig(NamedTuple):
    """What one head is trained with.

    Attributes:
        learning_rate: the largest of the schedule, before `ProbeSettings.rate_batch`.
        weight_decay: of all weights and biases, as `torch.optim` does by itself.
        alpha: of the k-NN-reweighted loss; 0 is the plain loss.
        gamma: of the focal form; 0 is the plain loss.
        control: see `FactorControl`.
    """

    learning_rate: float
    weight_decay: float = 0.0
    alpha: float = 0.0
    gamma: float = 0.0
    control: str = FactorControl.NONE


class ProbeGrid(NamedTuple):
    """The heads that are trained: every combination; see `ProbeConfig`."""

    learning_rates: tuple[float, ...]
    weight_decays: tuple[float, ...] = (0.0,)
    alphas: tuple[float, ...] = (0.0,)
    gammas: tuple[float, ...] = (0.0,)
    controls: tuple[str, ...] = (FactorControl.NONE,)

    def configs(self) -> list[ProbeConfig]:
        """Every combination once; factors that are all 1 have no control."""
        product = itertools.product(*self)
        found = [ProbeConfig(*values) for values in product]
        plain = [c._replace(control=FactorControl.NONE) for c in found]
        return list(
            dict.fromkeys(c if c.alpha or c.gamma else p for c, p in zip(found, plain, strict=True))
        )


def _check_at_least(name: str, value: float, lowest: float) -> None:
    if not (value >= lowest and math.isfinite(value)):
        raise ValueError(f"Expected `{name}` to be a number >= {lowest}, but got {value}.")


class LossNormalization(Choice):
    """Whether the k-NN loss factors are divided by their mean over the batch."""

    NONE = "none"
    MEAN = "mean"


@dataclass(frozen=True)
class ProbeSettings:
    """What all heads of a grid share.

    Attributes:
        epochs: passes over the rows; 0 leaves the heads as they start.
        batch_size: rows per step, at most all; the last step of an epoch has what is left.
        warmup_epochs: in which the rate rises linearly from 0; a cosine takes it back to 0.
        optimizer: `sgd` or `adamw`.
        momentum: of `sgd`.
        rate_batch: learning rates are for that many rows per step and grow in proportion to the
            rows there are; None takes them as they are.
        label_smoothing: share of each target that is spread evenly over the classes.
        class_weighting: `none`, `inverse` or `inverse_sqrt`, see `functional.class_weights`.
        knn_loss_clamp: the largest surprise counted.
        knn_loss_normalize: `mean` divides the factors by their mean over all rows.
        hidden_layers: 0 is a linear head; each hidden layer ends in a ReLU.
        hidden_width: of each hidden layer; None is the width of a feature.
        seed: of the order of the rows, the first hidden weights and the shuffled factors.
    """

    epochs: int = 100
    batch_size: int = 128
    warmup_epochs: float = 10.0
    optimizer: str = Optimizer.SGD
    momentum: float = 0.9
    rate_batch: int | None = None
    label_smoothing: float = 0.0
    class_weighting: str = ClassWeighting.NONE
    knn_loss_clamp: float = 100.0
    knn_loss_normalize: str = LossNormalization.NONE
    hidden_layers: int = 0
    hidden_width: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        Optimizer(self.optimizer)
        LossNormalization(self.knn_loss_normalize)
        ClassWeighting(self.class_weighting)
        for name, lowest in {"epochs": 0, "batch_size": 1, "hidden_layers": 0}.items():
            _check_at_least(name, getattr(self, name), lowest)
        for name in ("rate_batch", "hidden_width"):
            if getattr(self, name) is not None:
                _check_at_least(name, getattr(self, name), 1)
        if self.hidden_width is not None and not self.hidden_layers:
            raise ValueError("Expected `hidden_layers` > 0 with `hidden_width`, but got 0.")
        for name in ("warmup_epochs", "momentum", "label_smoothing"):
            _check_at_least(name, getattr(self, name), 0)
        for name in ("momentum", "label_smoothing"):
            if not getattr(self, name) < 1:
                raise ValueError(f"Expected `{name}` to be below 1, but got {getattr(self, name)}.")


PAPER_ALPHAS = (0.1, 0.01, 1e-3, 1e-4)

PAPER_SUPERVISED = ProbeGrid(
    (0.5, 0.25, 0.1, 0.05, 0.025, 0.01, 0.0025, 0.001), (0.01, 1e-3, 1e-4, 0.0), PAPER_ALPHAS
)
"""The paper's grid for supervised backbones; its plain arm is `_replace(alphas=(0.0,))`."""

PAPER_SELF_SUPERVISED = PAPER_SUPERVISED._replace(
    learning_rates=(40.0, 20.0, 10.0, 5.0, 2.5, 1.0, 0.5, 0.1, 0.05)
)
"""The paper's grid for self-supervised backbones."""

PAPER_SETTINGS = ProbeSettings(batch_size=2048, rate_batch=256)
"""SGD 0.9, batches of 2048, 100 epochs, 10 of them warm-up, cosine, rates times batch / 256."""


def check_configs(configs: list[ProbeConfig]) -> None:
    """Raises ValueError for none, an unknown control, or a number that is not finite and >= 0."""
    if not configs:
        raise ValueError("Expected at least one configuration to train, but got none.")
    for config in configs:
        FactorControl(config.control)
        for name in ("learning_rate", "weight_decay", "alpha", "gamma"):
            _check_at_least(name, getattr(config, name), 0)


def generator_of(seed: int, stream: int) -> torch.Generator:
    """One stream for the first weights, one for shuffled factors, one for each epoch."""
    return torch.Generator().manual_seed(seed * 2**20 + stream)
