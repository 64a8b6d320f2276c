"""Heads on cached features, many at once: all combinations of a grid in one computation."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup
from transformers.utils import logging as transformers_logging

from ..core.votes import PROBABILITY_FLOOR
from .grids import Optimizer, ProbeConfig, ProbeGrid, ProbeSettings, check_configs, generator_of
from .weights import LossFactors, class_weights


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
            yield forward(self.layers, inputs).transpose(1, 2)


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
    weights = class_weights(labels, num_labels, settings.class_weighting)[labels]  # [N]
    factors = LossFactors.of(configs, weights, settings, knn_log_probs)
    rows = _Rows(features, labels, mean, scale, factors, settings)
    start = initial_layers(features.shape[1], num_labels, settings, features.device)
    chunks = _chunks(len(configs), start, rows.batch_size, settings)
    bar = transformers_logging.tqdm(
        total=settings.epochs * len(chunks), desc="Training heads", unit="epoch",
        disable=not progress,
    )  # fmt: skip
    with bar:
        parts = [_train_together(chunk, configs, start, rows, bar.update) for chunk in chunks]
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


class _Rows:
    """The rows in the order in which every head sees them, and what each weighs."""

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        mean: Tensor,
        scale: Tensor,
        factors: LossFactors,
        settings: ProbeSettings,
    ) -> None:
        self.features, self.labels, self.factors = features, labels, factors
        self.mean, self.scale = mean, scale
        self.settings = settings
        self.batch_size = min(settings.batch_size, len(labels))
        self.steps = math.ceil(len(labels) / self.batch_size)  # per epoch

    def inputs(self, batch: Tensor) -> Tensor:
        """[B, D] standardised rows of a minibatch of row numbers [B]."""
        return _standardized(self.features[batch], self.mean, self.scale)

    def batches(self, epoch: int) -> tuple[Tensor, ...]:
        """Row numbers [B], in an order that depends on nothing but the seed and the epoch."""
        generator = generator_of(self.settings.seed, 2 + epoch)
        order = torch.randperm(len(self.labels), generator=generator)
        return order.to(self.labels.device).split(self.batch_size)


def _train_together(
    chunk: range,
    configs: list[ProbeConfig],
    start: list[Layer],
    rows: _Rows,
    on_epoch: Callable[[], object],
) -> list[Layer]:
    """Some of the heads, trained, whatever mode the caller is in."""
    settings = rows.settings
    device = start[0].weight.device.type
    with (
        torch.inference_mode(mode=False),
        torch.enable_grad(),
        torch.autocast(device, enabled=False),
    ):
        layers = [repeated(layer, len(chunk)) for layer in start]
        optimizer = StackedOptimizer(
            layers, configs[chunk.start : chunk.stop], settings, rows.batch_size,
            round(settings.warmup_epochs * rows.steps), settings.epochs * rows.steps,
        )  # fmt: skip
        for epoch in range(settings.epochs):
            for batch in rows.batches(epoch):
                logits = forward(layers, rows.inputs(batch))
                scales = rows.factors.at(chunk, batch) / len(batch)
                slopes = loss_slopes(
                    logits.detach(), rows.labels[batch], scales, settings.label_smoothing
                )
                optimizer.step(logits, slopes)
            on_epoch()
    return [Layer(*(part.detach() for part in layer)) for layer in layers]


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
