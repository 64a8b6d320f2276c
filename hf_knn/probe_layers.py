"""The layers of M heads and their gradients, computed for all heads at once.

All heads see the same inputs, so their first layers are one matrix product
``[B, D] x [D, M out]``; the layers above are a batch of M products.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .probe_settings import ProbeSettings, generator_of


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


def forward(layers: list[Layer], inputs: Tensor) -> list[Tensor]:
    """[B, D] -> the output [B, M, out] of each layer, ReLU applied to all but the last."""
    weight, bias = layers[0]
    shape = (len(inputs), *bias.shape)
    outputs = [torch.addmm(bias.flatten(), inputs, weight.flatten(0, 1).T).view(shape)]
    for weight, bias in layers[1:]:
        hidden = outputs[-1].relu_().transpose(0, 1)  # [M, B, H]
        outputs.append(torch.baddbmm(bias.unsqueeze(1), hidden, weight.mT).transpose(0, 1))
    return outputs


def loss_slopes(logits: Tensor, labels: Tensor, scales: Tensor, smoothing: float) -> Tensor:
    """[B, M, C]: the derivative of ``sum(scales * CE)`` by the logits: softmax minus target."""
    slopes = torch.softmax(logits, dim=2)
    columns = labels.view(-1, 1, 1).expand(-1, logits.shape[1], 1)  # [B, M, 1]
    slopes.scatter_add_(2, columns, slopes.new_full(columns.shape, smoothing - 1))
    if smoothing:
        slopes -= smoothing / logits.shape[2]
    return slopes.mul_(scales.unsqueeze(2))


def backward(
    layers: list[Layer],
    inputs: Tensor,
    outputs: list[Tensor],
    slopes: Tensor,
    gradients: list[Layer],
) -> None:
    """Writes the gradients of all layers, from the slopes [B, M, C] of the last one's output."""
    for i in range(len(layers) - 1, 0, -1):
        hidden, above = outputs[i - 1].transpose(0, 1), slopes.transpose(0, 1)  # [M, B, ...]
        torch.bmm(above.mT, hidden, out=gradients[i].weight)
        torch.sum(above, dim=1, out=gradients[i].bias)
        below = torch.bmm(above, layers[i].weight).mul_(hidden > 0)  # [M, B, H]
        slopes = below.transpose(0, 1)
    flat = slopes.reshape(len(inputs), -1)  # [B, M out]
    torch.mm(flat.T, inputs, out=gradients[0].weight.flatten(0, 1))
    torch.sum(flat, dim=0, out=gradients[0].bias.flatten())
