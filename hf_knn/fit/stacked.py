"""Many heads as one stack of parameters: how they start, what they answer, how they step."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from .grids import Optimizer, ProbeConfig, ProbeSettings, generator_of


class Layer(NamedTuple):
    """A linear layer of M heads: weight [M, out, in] and bias [M, out]."""

    weight: Tensor
    bias: Tensor


def initial_layers(
    dim: int, num_labels: int, settings: ProbeSettings, device: torch.device
) -> list[Layer]:
    """The layers [1, out, in] of one head: hidden ones as `torch.nn.Linear` starts, then zeros."""
    generator = generator_of(settings.seed, 0)
    layers, width = [], dim
    for _ in range(settings.hidden_layers):
        out = settings.hidden_width or dim
        bound = width**-0.5
        weight = torch.empty(1, out, width).uniform_(-bound, bound, generator=generator)
        bias = torch.empty(1, out).uniform_(-bound, bound, generator=generator)
        layers.append(Layer(weight.to(device), bias.to(device)))
        width = out
    weight = torch.zeros(1, num_labels, width, device=device)
    return [*layers, Layer(weight, torch.zeros(1, num_labels, device=device))]


def repeated(layer: Layer, count: int) -> Layer:
    """A layer of one head for as many heads."""
    return Layer(layer.weight.repeat(count, 1, 1), layer.bias.repeat(count, 1))


def joined(parts: Sequence[Layer]) -> Layer:
    """The same layer of all heads, one after the other."""
    return Layer(torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts]))


def forward(layers: list[Layer], inputs: Tensor) -> Tensor:
    """[B, D] -> the logits [M, C, B] of all heads.

    Rows come last: a softmax over few classes is then several times faster than over a last axis.
    """
    weight, bias = layers[0]
    flat = torch.addmm(bias.flatten().unsqueeze(1), weight.flatten(0, 1), inputs.T)
    outputs = flat.view(*bias.shape, len(inputs))
    for weight, bias in layers[1:]:
        outputs = torch.baddbmm(bias.unsqueeze(2), weight, outputs.relu())
    return outputs


def loss_slopes(logits: Tensor, labels: Tensor, scales: Tensor, smoothing: float) -> Tensor:
    """[M, C, B]: the derivative of ``sum(scales * CE)`` by the logits: softmax minus target.

    By hand, since `cross_entropy` under autograd takes every exponential twice and a buffer more:
    1.5 times as long for 1000 classes.

    Args:
        logits: [M, C, B].
        labels: [B] int64.
        scales: [M, B].
        smoothing: share of each target that is spread evenly over the classes.
    """
    slopes = torch.softmax(logits, dim=1)
    columns = labels.expand(len(logits), 1, -1)
    slopes.scatter_add_(1, columns, slopes.new_full(columns.shape, smoothing - 1))
    if smoothing:
        slopes -= smoothing / logits.shape[1]
    return slopes.mul_(scales.unsqueeze(1))


class StackedOptimizer:
    """`torch.optim` for the parameters [M, ...] of many heads, with a rate and a decay each.

    The optimizer itself runs at a rate of 1 times the schedule of `transformers`. A step of SGD is
    linear in the gradients, so these are multiplied with each head's rate. AdamW's is not: there
    the step is.

    Args:
        layers: of the heads; changed in place by each step.
        configs: rate and decay of each head.
        settings: which optimizer, its momentum, and the batch that rates are for.
        batch_size: rows per step.
        warmup: steps in which the rate rises.
        steps: in all.
    """

    def __init__(
        self,
        layers: list[Layer],
        configs: list[ProbeConfig],
        settings: ProbeSettings,
        batch_size: int,
        warmup: int,
        steps: int,
    ) -> None:
        self.parameters = [part.requires_grad_() for layer in layers for part in layer]
        device = self.parameters[0].device
        scale = batch_size / settings.rate_batch if settings.rate_batch else 1.0
        self.rates = torch.tensor([c.learning_rate * scale for c in configs], device=device)
        self.decays = torch.tensor([c.weight_decay for c in configs], device=device)
        self.is_sgd = Optimizer(settings.optimizer) is Optimizer.SGD
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(self.parameters, 1.0, settings.momentum, fused=True)
            if self.is_sgd
            else torch.optim.AdamW(self.parameters, 1.0, weight_decay=0.0, fused=True)
        )
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, warmup, steps)

    def step(self, logits: Tensor, slopes: Tensor) -> None:
        """One step down the sum of the losses of the heads.

        Args:
            logits: [M, C, B], from the layers.
            slopes: [M, C, B], of the loss by the logits.
        """
        self.optimizer.zero_grad()
        logits.backward(slopes)
        with torch.no_grad():
            if self.is_sgd:
                self._step_sgd()
            else:
                self._step_adamw()
        self.schedule.step()

    def _step_sgd(self) -> None:
        for parameter in self.parameters:
            assert parameter.grad is not None
            rates, decays = (_per_head(v, parameter) for v in (self.rates, self.decays))
            parameter.grad.addcmul_(parameter, decays).mul_(rates)
        self.optimizer.step()

    def _step_adamw(self) -> None:
        (factor,) = self.schedule.get_last_lr()
        shrinking = 1 - factor * self.rates * self.decays
        for parameter in self.parameters:
            parameter.mul_(_per_head(shrinking, parameter))
        before = [parameter.clone() for parameter in self.parameters]
        self.optimizer.step()
        for parameter, start in zip(self.parameters, before, strict=True):
            parameter.copy_(start.lerp_(parameter, _per_head(self.rates, parameter)))


def _per_head(values: Tensor, parameter: Tensor) -> Tensor:
    """[M] -> [M, 1, ...] to go with a parameter [M, ...]."""
    return values.view(-1, *[1] * (parameter.ndim - 1))
