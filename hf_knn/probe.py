"""Heads on cached features, many at once: every combination of a grid in one batched computation.

All heads see the same minibatches in the same order, so the first layers of M heads are one matrix
product ``[B, D] x [D, M C]``; what differs per head (learning rate, weight decay, factors of the
loss) is a number per head. A head comes out as it would alone.

The loss of a head is the mean over the minibatch of ``w_y * CE * factor`` (*Rethinking Nearest
Neighbors for Visual Classification*, arXiv 2112.08459): the k-NN surprise enters as
``1 + alpha * min(-log p_knn, clamp)``, in the focal form as ``(1 - p_knn) ** gamma``; both are
fixed numbers per row, from leave-one-out votes that were counted once.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Self

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from .functional import (
    PROBABILITY_FLOOR,
    ClassWeighting,
    LossNormalization,
    class_weights,
    focal_loss_weights,
    knn_loss_weights,
)

ADAMW_BETAS = (0.9, 0.999)
ADAMW_EPSILON = 1e-8

_ROW_BLOCK = 2048
_LARGEST_CHUNK = 2**27  # numbers held while some of the heads train: half a GB
_LARGEST_BLOCK = 2**24  # numbers in the logits of a block of rows


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


class Layer(NamedTuple):
    """A linear layer of M heads: weight [M, out, in] and bias [M, out]."""

    weight: Tensor
    bias: Tensor


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
            yield _forward(self.layers, inputs)[-1].transpose(0, 1)


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
    _check_configs(configs)
    _check_rows(features, labels)
    mean, scale = _standardization(features)
    data = _Data(features, labels, mean, scale, settings)
    weights = class_weights(labels, num_labels, settings.class_weighting)[labels]  # [N]
    factors = _LossFactors(configs, weights, settings, knn_log_probs)
    start = _initial_layers(features.shape[1], num_labels, settings, features.device)
    chunks = _chunks(len(configs), start, data.batch_size, settings)
    parts = []
    bar = transformers_logging.tqdm(
        total=settings.epochs * len(chunks), desc="Training heads", unit="epoch",
        disable=not progress,
    )  # fmt: skip
    with bar, torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        for chunk in chunks:
            layers = [_repeated(layer, len(chunk)) for layer in start]
            chosen = configs[chunk.start : chunk.stop]
            optimizer = _make_optimizer(layers, chosen, settings, data.batch_size)
            for epoch in range(settings.epochs):
                data.run_epoch(epoch, layers, optimizer, factors.of(chunk))
                bar.update()
            parts.append(layers)
    return ProbeHeads(configs, mean, scale, [_joined(same) for same in zip(*parts, strict=True)])


def choose(heads: ProbeHeads, features: Tensor, labels: Tensor) -> ProbeChoice:
    """The head with the best accuracy on rows that none was trained on.

    Ties go to the better log-likelihood, then to the smaller learning rate, then to the first. A
    head that diverged is in the table and never chosen.

    Args:
        heads: M trained heads.
        features: [N, D].
        labels: [N] int64.

    Raises:
        ValueError: for no rows, labels out of range, or if every head diverged.
    """
    _check_rows(features, labels, heads.layers[-1].bias.shape[1])
    table = score(heads, features, labels)
    healthy = [i for i, row in enumerate(table) if not row.diverged]
    if not healthy:
        smallest = min(config.learning_rate for config in heads.configs)
        raise ValueError(
            f"Expected a head that did not diverge, but got {len(table)} that all did; train with "
            f"learning rates below {smallest:g}."
        )
    best = max(
        healthy,
        key=lambda i: (
            table[i].accuracy, table[i].log_likelihood, -table[i].config.learning_rate, -i,
        ),
    )  # fmt: skip
    return ProbeChoice(best, table[best], table)


def score(heads: ProbeHeads, features: Tensor, labels: Tensor) -> list[ProbeScore]:
    """The table of `choose`: accuracy and log-likelihood of each head on some rows."""
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
            generator = _generator(settings.seed, 1)
            order = torch.randperm(len(factors), generator=generator)
            return factors[order.to(factors.device)]
        case FactorControl.CONSTANT:
            return factors.mean().expand_as(factors)
    return factors


class _LossFactors:
    """Factors [N] of each configuration, those that are equal held once."""

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

    def of(self, chunk: range) -> "_ChunkFactors":
        return _ChunkFactors(self.rows, self.which[chunk.start : chunk.stop])


class _ChunkFactors(NamedTuple):
    rows: Tensor  # [U, N]
    which: Tensor  # [M]

    def at(self, batch: Tensor) -> Tensor:
        """[B, M]."""
        return self.rows[:, batch][self.which].T


class _Sgd:
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


class _AdamW:
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
        generator = _generator(self.settings.seed, 2 + epoch)
        return torch.randperm(len(self.labels), generator=generator).to(self.labels.device)

    def run_epoch(
        self,
        epoch: int,
        layers: list[Layer],
        optimizer: _Sgd | _AdamW,
        factors: _ChunkFactors,
    ) -> None:
        """Takes all steps of an epoch, in place."""
        gradients = [Layer(*map(torch.empty_like, layer)) for layer in layers]
        flat = [part for layer in gradients for part in layer]
        steps = self.settings.epochs * self.steps
        for i, batch in enumerate(self.order(epoch).split(self.batch_size)):
            inputs = _standardized(self.features[batch], self.mean, self.scale)
            outputs = _forward(layers, inputs)
            scales = factors.at(batch) / len(batch)  # [B, M]
            slopes = _loss_slopes(
                outputs[-1], self.labels[batch], scales, self.settings.label_smoothing
            )
            _backward(layers, inputs, outputs, slopes, gradients)
            step = epoch * self.steps + i
            optimizer.step(flat, learning_rate_factor(step, steps, self.warmup))


def _forward(layers: list[Layer], inputs: Tensor) -> list[Tensor]:
    """[B, D] -> the output [B, M, out] of each layer, ReLU applied to all but the last."""
    weight, bias = layers[0]
    shape = (len(inputs), *bias.shape)
    outputs = [torch.addmm(bias.flatten(), inputs, weight.flatten(0, 1).T).view(shape)]
    for weight, bias in layers[1:]:
        hidden = outputs[-1].relu_().transpose(0, 1)  # [M, B, H]
        outputs.append(torch.baddbmm(bias.unsqueeze(1), hidden, weight.mT).transpose(0, 1))
    return outputs


def _loss_slopes(logits: Tensor, labels: Tensor, scales: Tensor, smoothing: float) -> Tensor:
    """[B, M, C]: the derivative of ``sum(scales * CE)`` by the logits: softmax minus target."""
    slopes = torch.softmax(logits, dim=2)
    columns = labels.view(-1, 1, 1).expand(-1, logits.shape[1], 1)  # [B, M, 1]
    slopes.scatter_add_(2, columns, slopes.new_full(columns.shape, smoothing - 1))
    if smoothing:
        slopes -= smoothing / logits.shape[2]
    return slopes.mul_(scales.unsqueeze(2))


def _backward(
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


def _initial_layers(
    dim: int, num_labels: int, settings: ProbeSettings, device: torch.device
) -> list[Layer]:
    """The layers [1, out, in] of one head: hidden ones as `torch.nn.Linear` starts, then zeros."""
    generator = _generator(settings.seed, 0)
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


def _repeated(layer: Layer, count: int) -> Layer:
    return Layer(layer.weight.repeat(count, 1, 1), layer.bias.repeat(count, 1))


def _joined(parts: Sequence[Layer]) -> Layer:
    return Layer(torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts]))


def _make_optimizer(
    layers: list[Layer], configs: list[ProbeConfig], settings: ProbeSettings, batch_size: int
) -> _Sgd | _AdamW:
    parameters = [part for layer in layers for part in layer]
    device = parameters[0].device
    scale = batch_size / settings.rate_batch if settings.rate_batch else 1.0
    rates = torch.tensor([c.learning_rate * scale for c in configs], device=device)
    decays = torch.tensor([c.weight_decay for c in configs], device=device)
    if Optimizer(settings.optimizer) is Optimizer.ADAMW:
        return _AdamW(parameters, rates, decays)
    return _Sgd(parameters, rates, decays, settings.momentum)


def _chunks(count: int, head: list[Layer], batch_size: int, settings: ProbeSettings) -> list[range]:
    """Which heads train together: as many as fit into memory."""
    states = 3 if Optimizer(settings.optimizer) is Optimizer.SGD else 5
    parameters = sum(part.numel() for layer in head for part in layer)
    outputs = sum(layer.bias.numel() for layer in head)
    size = states * parameters + 3 * batch_size * outputs
    together = max(1, _LARGEST_CHUNK // size)
    return [range(start, min(start + together, count)) for start in range(0, count, together)]


def _generator(seed: int, stream: int) -> torch.Generator:
    """One stream for the first weights, one for shuffled factors, one for each epoch."""
    return torch.Generator().manual_seed(seed * 2**20 + stream)


def _per_head(values: Tensor, parameter: Tensor) -> Tensor:
    """[M] -> [M, 1, ...] to go with a parameter [M, ...]."""
    return values.view(-1, *[1] * (parameter.ndim - 1))


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


def _check_configs(configs: list[ProbeConfig]) -> None:
    if not configs:
        raise ValueError("Expected at least one configuration to train, but got none.")
    for config in configs:
        FactorControl(config.control)
        for name in ("learning_rate", "weight_decay", "alpha", "gamma"):
            _check_at_least(name, getattr(config, name), 0)


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
