"""Optimizers of M heads at once: what differs per head, rate and decay, is a number per head."""

import math

import torch
from torch import Tensor

from .probe_layers import Layer
from .probe_settings import Optimizer, ProbeConfig, ProbeSettings

ADAMW_BETAS = (0.9, 0.999)
ADAMW_EPSILON = 1e-8


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """What the learning rate is multiplied with: linear from 0 to 1, then half a cosine to 0.

    The same as `transformers.get_cosine_schedule_with_warmup`.

    Args:
        step: from 0.
        steps: in all.
        warmup: steps of the linear part.
    """
    if step < warmup:
        return step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * done)))


class Sgd:
    """`torch.optim.SGD` with momentum, for parameters [M, ...] with a rate and a decay each."""

    def __init__(
        self, parameters: list[Tensor], rates: Tensor, decays: Tensor, momentum: float
    ) -> None:
        self.parameters, self.momentum = parameters, momentum
        self.rates = [_per_head(rates, p) for p in parameters]
        self.decays = [_per_head(decays, p) for p in parameters]
        self.buffers = [torch.zeros_like(p) for p in parameters]

    def step(self, gradients: list[Tensor], factor: float) -> None:
        """One step; the gradients are overwritten."""
        for parameter, gradient, buffer, rate, decay in zip(
            self.parameters, gradients, self.buffers, self.rates, self.decays, strict=True
        ):
            gradient.addcmul_(parameter, decay)
            buffer.mul_(self.momentum).add_(gradient)
            parameter.addcmul_(buffer, rate, value=-factor)


class AdamW:
    """`torch.optim.AdamW`, for parameters [M, ...] with a rate and a decay each."""

    def __init__(self, parameters: list[Tensor], rates: Tensor, decays: Tensor) -> None:
        self.parameters, self.steps = parameters, 0
        self.rates = [_per_head(rates, p) for p in parameters]
        self.decays = [_per_head(decays, p) for p in parameters]
        self.means = [torch.zeros_like(p) for p in parameters]
        self.squares = [torch.zeros_like(p) for p in parameters]

    def step(self, gradients: list[Tensor], factor: float) -> None:
        """One step; the gradients are overwritten."""
        self.steps += 1
        first, second = ADAMW_BETAS
        first_bias, second_bias = 1 - first**self.steps, 1 - second**self.steps
        for parameter, gradient, mean, square, rate, decay in zip(
            self.parameters, gradients, self.means, self.squares, self.rates, self.decays,
            strict=True,
        ):  # fmt: skip
            parameter.mul_(1 - factor * rate * decay)
            mean.lerp_(gradient, 1 - first)
            square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
            root = torch.sqrt(square, out=gradient)
            root.div_(math.sqrt(second_bias)).add_(ADAMW_EPSILON)
            parameter.addcmul_(mean / root, rate, value=-factor / first_bias)


def make_optimizer(
    layers: list[Layer], configs: list[ProbeConfig], settings: ProbeSettings, batch_size: int
) -> Sgd | AdamW:
    """The optimizer of some heads.

    Args:
        layers: of the heads; changed in place by each step.
        configs: rate and decay of each head.
        settings: which optimizer, its momentum, and the batch that rates are for.
        batch_size: rows per step.
    """
    parameters = [part for layer in layers for part in layer]
    device = parameters[0].device
    scale = batch_size / settings.rate_batch if settings.rate_batch else 1.0
    rates = torch.tensor([c.learning_rate * scale for c in configs], device=device)
    decays = torch.tensor([c.weight_decay for c in configs], device=device)
    if Optimizer(settings.optimizer) is Optimizer.ADAMW:
        return AdamW(parameters, rates, decays)
    return Sgd(parameters, rates, decays, settings.momentum)


def _per_head(values: Tensor, parameter: Tensor) -> Tensor:
    """[M] -> [M, 1, ...] to go with a parameter [M, ...]."""
    return values.view(-1, *[1] * (parameter.ndim - 1))
