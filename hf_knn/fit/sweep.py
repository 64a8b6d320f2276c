"""Heads on cached features, many at once: all combinations of a grid in one computation."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from ..core.votes import PROBABILITY_FLOOR
from .grids import Optimizer, ProbeConfig, ProbeGrid, ProbeSettings, check_configs, generator_of
from .weights import ChunkFactors, LossFactors, class_weights


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


_ROW_BLOCK = 2048
_LARGEST_CHUNK = 2**27  # numbers held while some of the heads train: half a GB
_LARGEST_BLOCK = 2**24  # numbers in the logits of a block of rows


@dataclass(frozen=True)
class ProbeHeads:
    """Trained heads.

    Attributes:
        configs: M of them, one per head.
        mean: [D] float32, subtracted from a feature.
        scale: [] float32, divides what is left.
        layers: hidden ones, each followed by a ReLU, and the classifier; float32.
    """

    configs: list[ProbeConfig]
    mean: Tensor
    scale: Tensor
    layers: list[Layer]

    def __len__(self) -> int:
        return len(self.configs)

    def select(self, index: int) -> Self:
        """One of the heads, as a collection of one."""
        layers = [Layer(*(part[index, None] for part in layer)) for layer in self.layers]
        return type(self)([self.configs[index]], self.mean, self.scale, layers)

    def logits(self, features: Tensor) -> Tensor:
        """[N, D] -> [M, N, C] float32."""
        blocks = list(self.blocks(features))
        if blocks:
            return torch.cat(blocks, dim=1)
        return self.mean.new_zeros(len(self), 0, self.layers[-1].bias.shape[1])

    def blocks(self, features: Tensor) -> Iterator[Tensor]:
        """[M, B, C] logits of some rows after the others, so that not all are held at once."""
        widest = sum(layer.bias.shape[1] for layer in self.layers)
        rows = max(1, _LARGEST_BLOCK // (len(self) * widest))
        for start in range(0, len(features), rows):
            inputs = _standardized(features[start : start + rows], self.mean, self.scale)
            yield forward(self.layers, inputs)[-1].transpose(0, 1)


class ProbeScore(NamedTuple):
    """What a head scored on the rows that it was chosen on.

    Attributes:
        config: of the head.
        accuracy: top-1; NaN if the head diverged.
        log_likelihood: mean ``log p(label)``, p floored at 1e-12; NaN if the head diverged.
        diverged: whether a weight or a logit is infinite or NaN.
    """

    config: ProbeConfig
    accuracy: float
    log_likelihood: float
    diverged: bool


class ProbeChoice(NamedTuple):
    """Which head is best.

    Attributes:
        best: the number of the head.
        score: what it scored.
        table: the scores of all, in their order.
    """

    best: int
    score: ProbeScore
    table: list[ProbeScore]


def train_probes(
    features: Tensor,
    labels: Tensor,
    num_labels: int,
    grid: ProbeGrid | Sequence[ProbeConfig],
    settings: ProbeSettings | None = None,
    knn_log_probs: Tensor | None = None,
    *,
    progress: bool = False,
) -> ProbeHeads:
    """Trains a head per configuration, on the device of the features.

    Features are standardised as in `KnnHead`: minus their mean, over the root mean square of what
    is left. Classifiers start at 0, hidden layers as `torch.nn.Linear` does. The same call gives
    the same heads.

    Args:
        features: [N, D].
        labels: [N] int64 in [0, num_labels).
        num_labels: C.
        grid: what the heads are trained with.
        settings: what they share; None is `ProbeSettings()`.
        knn_log_probs: [N] leave-one-out ``log p_knn`` of each row's own label; needed where a
            configuration has an alpha or a gamma.
        progress: show a progress bar.

    Returns:
        M heads, in the order of the configurations. A head that diverged is kept as it is.

    Raises:
        ValueError: for no rows or configurations, shapes that disagree, features that are not
            finite, labels out of range, or a bad configuration.
    """
    settings = settings or ProbeSettings()
    configs = grid.configs() if isinstance(grid, ProbeGrid) else list(grid)
    check_configs(configs)
    _check_rows(features, labels)
    mean, scale = _standardization(features)
    data = _Data(features, labels, mean, scale, settings)
    weights = class_weights(labels, num_labels, settings.class_weighting)[labels]  # [N]
    factors = LossFactors(configs, weights, settings, knn_log_probs)
    start = initial_layers(features.shape[1], num_labels, settings, features.device)
    chunks = _chunks(len(configs), start, data.batch_size, settings)
    parts = []
    bar = transformers_logging.tqdm(
        total=settings.epochs * len(chunks), desc="Training heads", unit="epoch",
        disable=not progress,
    )  # fmt: skip
    with bar, torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        for chunk in chunks:
            layers = [repeated(layer, len(chunk)) for layer in start]
            chosen = configs[chunk.start : chunk.stop]
            optimizer = make_optimizer(layers, chosen, settings, data.batch_size)
            for epoch in range(settings.epochs):
                data.run_epoch(epoch, layers, optimizer, factors.of(chunk))
                bar.update()
            parts.append(layers)
    return ProbeHeads(configs, mean, scale, [joined(same) for same in zip(*parts, strict=True)])


def score_probes(heads: ProbeHeads, features: Tensor, labels: Tensor) -> list[ProbeScore]:
    """Accuracy and log-likelihood of each head on rows that none was trained on.

    Args:
        heads: M trained heads.
        features: [N, D].
        labels: [N] int64.

    Returns:
        M scores; of a head that diverged NaN.

    Raises:
        ValueError: for no rows, or labels out of range.
    """
    _check_rows(features, labels, heads.layers[-1].bias.shape[1])
    correct = labels.new_zeros(len(heads))
    likelihood = torch.zeros(len(heads), dtype=torch.float64)
    is_finite = torch.ones(len(heads), dtype=torch.bool)
    for layer in heads.layers:
        for part in layer:
            is_finite &= part.flatten(1).isfinite().all(dim=1).cpu()
    start = 0
    for logits in heads.blocks(features):  # [M, B, C]
        own = labels[start : start + logits.shape[1]]
        start += len(own)
        correct += (logits.argmax(dim=2) == own).sum(dim=1)
        log_probs = torch.log_softmax(logits, dim=2)
        index = own.expand(len(heads), -1).unsqueeze(2)
        own_log_probs = log_probs.gather(2, index).squeeze(2).cpu().double()  # [M, B]
        is_finite &= logits.flatten(1).isfinite().all(dim=1).cpu()
        likelihood += own_log_probs.clamp_min(math.log(PROBABILITY_FLOOR)).sum(dim=1)
    return [
        ProbeScore(config, hits / len(labels), total / len(labels), diverged=False)
        if healthy
        else ProbeScore(config, math.nan, math.nan, diverged=True)
        for config, hits, total, healthy in zip(
            heads.configs, correct.tolist(), likelihood.tolist(), is_finite.tolist(), strict=True
        )
    ]


def choose_probe(table: list[ProbeScore], count: int) -> ProbeChoice:
    """The head to take, by the rule of `hf_knn.tune`.

    Args:
        table: what `score_probes` found.
        count: rows that it was found on.

    Returns:
        Of the heads within one standard error of the best accuracy, the one with the best
        log-likelihood; of equal ones that with the smaller learning rate, then the first. A head
        that diverged is in the table and never chosen.

    Raises:
        ValueError: if every head diverged.
    """
    healthy = [i for i, row in enumerate(table) if not row.diverged]
    if not healthy:
        smallest = min(row.config.learning_rate for row in table)
        raise ValueError(
            f"Expected a head that did not diverge, but got {len(table)} that all did; train with "
            f"learning rates below {smallest:g}."
        )
    highest = max(table[i].accuracy for i in healthy)
    margin = math.sqrt(highest * (1 - highest) / count)
    best = max(
        (i for i in healthy if table[i].accuracy >= highest - margin),
        key=lambda i: (table[i].log_likelihood, -table[i].config.learning_rate, -i),
    )
    return ProbeChoice(best, table[best], table)


class _Data:
    """The rows in the order in which every head sees them."""

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        mean: Tensor,
        scale: Tensor,
        settings: ProbeSettings,
    ) -> None:
        self.features, self.labels = features, labels
        self.mean, self.scale = mean, scale
        self.settings = settings
        self.batch_size = min(settings.batch_size, len(labels))
        self.steps = math.ceil(len(labels) / self.batch_size)  # per epoch
        self.warmup = round(settings.warmup_epochs * self.steps)

    def order(self, epoch: int) -> Tensor:
        """[N] a permutation of the rows that depends on nothing but the seed and the epoch."""
        generator = generator_of(self.settings.seed, 2 + epoch)
        return torch.randperm(len(self.labels), generator=generator).to(self.labels.device)

    def run_epoch(
        self,
        epoch: int,
        layers: list[Layer],
        optimizer: Sgd | AdamW,
        factors: ChunkFactors,
    ) -> None:
        """Takes all steps of an epoch, in place."""
        gradients = [Layer(*map(torch.empty_like, layer)) for layer in layers]
        flat = [part for layer in gradients for part in layer]
        steps = self.settings.epochs * self.steps
        for i, batch in enumerate(self.order(epoch).split(self.batch_size)):
            inputs = _standardized(self.features[batch], self.mean, self.scale)
            outputs = forward(layers, inputs)
            scales = factors.at(batch) / len(batch)  # [B, M]
            slopes = loss_slopes(
                outputs[-1], self.labels[batch], scales, self.settings.label_smoothing
            )
            backward(layers, inputs, outputs, slopes, gradients)
            step = epoch * self.steps + i
            optimizer.step(flat, learning_rate_factor(step, steps, self.warmup))


def _chunks(count: int, head: list[Layer], batch_size: int, settings: ProbeSettings) -> list[range]:
    """Which heads train together: as many as fit into memory."""
    states = 3 if Optimizer(settings.optimizer) is Optimizer.SGD else 5
    parameters = sum(part.numel() for layer in head for part in layer)
    outputs = sum(layer.bias.numel() for layer in head)
    size = states * parameters + 3 * batch_size * outputs
    together = max(1, _LARGEST_CHUNK // size)
    return [range(start, min(start + together, count)) for start in range(0, count, together)]


def _standardization(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and scale [] float32, summed in float64; a scale of 0 becomes 1."""
    blocks = features.split(_ROW_BLOCK)
    sums = [block.detach().to("cpu", torch.float64).sum(dim=0) for block in blocks]
    mean = torch.stack(sums).sum(dim=0) / len(features)
    if not mean.isfinite().all():
        raise ValueError("Expected `features` to be finite, but got NaN or infinity in some row.")
    squares = [(block.detach().to("cpu", torch.float64) - mean).square().sum() for block in blocks]
    scale = (torch.stack(squares).sum() / features.numel()).sqrt()
    scale = scale if scale > 0 else torch.ones(())
    return mean.float().to(features.device), scale.float().to(features.device)


def _standardized(features: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    return (features.detach().float() - mean) / scale


def _check_rows(features: Tensor, labels: Tensor, num_labels: int | None = None) -> None:
    if features.ndim != 2 or features.numel() == 0:
        raise ValueError(
            f"Expected `features` to be [N, D] with N and D > 0, but got {tuple(features.shape)}."
        )
    if labels.shape != features.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"Expected `labels` to be int64 [{len(features)}], one per row, but got "
            f"{labels.dtype} {tuple(labels.shape)}."
        )
    if num_labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < num_labels:
        raise ValueError(
            f"Expected `labels` to be in [0, {num_labels}), "
            f"but got values from {int(labels.min())} to {int(labels.max())}."
        )
