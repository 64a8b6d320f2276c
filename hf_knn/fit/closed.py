"""Closed-form heads on raw features: kernel, regulariser and temperature by leave-one-out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ..core.backbone import KnnHead
from ..core.config import CLOSED_FORM, HEAD_COMPONENTS, HEAD_FEATURES, Head, Kernel, Normalization
from ..core.votes import ClassWeighting
from ..data.splits import few_rows
from ..model.closed_form import check_weighting, prepare_rows
from ..model.ridge import RidgeState
from ..model.scatter import rounding
from .dual import DualRidge
from .lda import fit_lda, within_scale
from .ridge import RELATIVE_REGULARIZERS, RidgeFit, RidgeScore, fit_ridge, scale_of, score_sample


class RandomMap(NamedTuple):
    """How random features are made.

    Attributes:
        kernel: `rbf` or `relu`.
        sharpness: γ of the kernel ``exp(-γ |x - y|^2)`` of components of length 1.
        whitening: principal components are divided by their variance to this power: 0 leaves them,
            0.5 makes all directions alike.
    """

    kernel: str
    sharpness: float
    whitening: float


MAPS = (RandomMap("rbf", 0.5, 0.25), RandomMap("relu", 1.0, 0.25))
"""Those that are compared.

On four of the benchmark's offline settings 4,096 random features of 128 components had 66.5 (`rbf`)
and 66.6 % (`relu`) on test where ridge has 65.4 and the exact kernel 66.9; without random noise
whitening in full is as good, with it 66.1 to 66.2. 2,048 features cost 0.3 to 0.7 points, 1,024 as
much again. On ten settings 64 or 256 components and no whitening were no better, and no features of
their own beside the random ones 0.8 points worse.
"""

_MOST_LEFT_OUT, _MOST_COMPARED = 2048, 1024
"""Of more rows a sample chooses the regulariser, and a smaller one the random map."""

_MOST_ROWS_FOR_AXES = 20_000
_BLOCK = 1024


class ClosedCell(NamedTuple):
    """What a closed-form head is fitted with.

    Attributes:
        map: of a kernel head; None for the others.
        regularizer: relative to the mean eigenvalue that can differ from 0: of the Gram matrix, for
            discriminants of the scatter within classes.
        temperature: > 0, that divides the logits.
    """

    map: RandomMap | None
    regularizer: float
    temperature: float


@dataclass(frozen=True)
class ClosedFit:
    """A fitted head.

    Attributes:
        cell: what it was fitted with.
        fit: its solution, and the sums over the rows.
        head: as which rows are seen.
    """

    cell: ClosedCell
    fit: RidgeFit
    head: KnnHead

    def log_probs(self, features: Tensor) -> Tensor:
        """[B, D] raw features -> [B, C] float32; -inf for a class without rows."""
        parts = [self.fit.log_probs(prepare_rows(self.head, rows)) for rows in _blocks(features)]
        return torch.cat(parts).float()


def fit_closed(
    kind: str,
    features: Tensor,
    labels: Tensor,
    num_labels: int,
    *,
    normalization: str = Normalization.L2_CENTERED,
    class_weighting: str = ClassWeighting.NONE,
    cell: ClosedCell | None = None,
    seed: int = 0,
) -> ClosedFit:
    """Fits a closed-form head on raw features.

    Args:
        kind: `ridge`, `kernel` or `lda`.
        features: [N, D] raw features.
        labels: [N] int64 in [0, num_labels).
        num_labels: C.
        normalization: of the features, see `KnnConfig`.
        class_weighting: `none`, `inverse` or `inverse_sqrt`; a kernel head takes `none` alone.
        cell: what to fit it with; None chooses by leave-one-out log-likelihood.
        seed: of the random features.

    Raises:
        ValueError: for another kind, class weights with a kernel, or no rows.
    """
    if kind not in CLOSED_FORM:
        raise ValueError(
            f"Expected `kind` to be one of {[str(k) for k in CLOSED_FORM]}, but got {kind!r}."
        )
    expansion = (0, 0)
    if kind == Head.KERNEL:
        expansion = (min(HEAD_COMPONENTS, features.shape[1]), HEAD_FEATURES)
    is_unit = Normalization(normalization) is not Normalization.NONE
    head = KnnHead(features.shape[1], num_labels, (), is_unit, Kernel.RBF, expansion)
    if Normalization(normalization) is Normalization.L2_CENTERED and len(features):
        head.mean.copy_(features.double().mean(dim=0))
    found, fit = fit_on_rows(head, kind, features, labels, num_labels, class_weighting, cell, seed)
    return ClosedFit(found, fit, head)


def fit_on_rows(
    head: KnnHead,
    kind: str,
    features: Tensor,
    labels: Tensor,
    num_labels: int,
    class_weighting: str = ClassWeighting.NONE,
    cell: ClosedCell | None = None,
    seed: int = 0,
) -> tuple[ClosedCell, RidgeFit]:
    """Solves a head that sees features about its mean already, and gives it its random features.

    Args:
        head: centred; axes and directions of a kernel head are set.
        kind: see `fit_closed`, as the rest.
        features: [N, D] raw features.
        labels: [N] int64.
        num_labels: C.
        class_weighting: see `fit_closed`.
        cell: see `fit_closed`.
        seed: of the random features.

    Returns:
        What it was fitted with, and the fit, whose solution is not in the head yet.
    """
    check_weighting(kind, class_weighting)
    if kind == Head.KERNEL:
        axes = PrincipalAxes.of(head, features, seed)
        if cell is None:
            return _choose_kernel(head, axes, features, labels, num_labels, seed)
        assert cell.map is not None
        set_random_map(head, axes, cell.map, seed)
    if cell is None:
        fit_kind = fit_lda if kind == Head.LDA else fit_ridge
        rows = prepare_rows(head, features)
        fit = fit_kind(rows, labels, num_labels, class_weighting=class_weighting)
        scale = within_scale(fit.state) if kind == Head.LDA else scale_of(fit.state)
        return ClosedCell(None, fit.regularizer / scale, fit.temperature), fit
    weighting = ClassWeighting.NONE if kind == Head.LDA else ClassWeighting(class_weighting)
    state = _summed(head, features, labels, num_labels, weighting)
    regularizer = cell.regularizer
    if kind == Head.LDA:
        regularizer *= within_scale(state)
        solution = state.solve_discriminants(regularizer, class_weighting)
    else:
        regularizer *= scale_of(state)
        solution = state.solve(regularizer)
    return cell, RidgeFit(*solution, cell.temperature, regularizer, [], state)


class PrincipalAxes(NamedTuple):
    """Directions in which rows differ most, as many as a head takes.

    Attributes:
        vectors: [P', D] float64, of length 1.
        variances: [P'] of the rows along them, about 0.
    """

    vectors: Tensor
    variances: Tensor

    @classmethod
    def of(cls, head: KnnHead, features: Tensor, seed: int) -> Self:
        """Those of rows as a head sees them.

        Args:
            head: centred; its axes have the shape.
            features: [N, D] raw features, of which 20,000 are enough.
            seed: of the sample.
        """
        assert head.axes is not None
        count, width = head.axes.shape
        if len(features) > _MOST_ROWS_FOR_AXES:
            order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
            features = features[order[:_MOST_ROWS_FOR_AXES]]
        bare = KnnHead(width, 1, (), head.unit_length)  # rows before their random features
        bare.mean, bare.scale = head.mean, head.scale
        rows = prepare_rows(bare, features)
        is_wide = len(rows) < width
        values, vectors = torch.linalg.eigh(rows @ rows.T if is_wide else rows.T @ rows)
        is_real = values > rounding(float(values.max()), width)
        values, vectors = values[is_real].flip(0)[:count], vectors[:, is_real].flip(1)[:, :count]
        if is_wide:
            vectors = rows.T @ vectors / values.sqrt()
        return cls(vectors.T, values / len(rows))


def set_random_map(head: KnnHead, axes: PrincipalAxes, chosen: RandomMap, seed: int) -> None:
    """Gives a kernel head its axes and random directions, always the same for a seed.

    Directions are orthogonal in blocks, with the lengths of normal vectors (Yu et al., *Orthogonal
    random features*, NeurIPS 2016).

    Args:
        head: whose axes and directions have the shape.
        axes: of the rows.
        chosen: which map.
        seed: of the draw.
    """
    assert head.axes is not None
    scaled = torch.zeros_like(head.axes)
    scaled[: len(axes.vectors)] = axes.vectors / axes.variances[:, None] ** chosen.whitening
    head.axes, head.kernel = scaled, Kernel(chosen.kernel)
    generator = torch.Generator().manual_seed(seed)
    width = len(scaled)
    count = head.random if head.kernel is Kernel.RELU else head.random // 2
    blocks = []
    for _ in range(math.ceil(count / width)):
        square = torch.randn(width, width, generator=generator, dtype=torch.float64)
        lengths = torch.randn(width, width, generator=generator, dtype=torch.float64).norm(dim=1)
        blocks.append(torch.linalg.qr(square).Q * lengths[:, None])
    directions = torch.cat(blocks)[:count] * math.sqrt(2 * chosen.sharpness)
    head.directions = directions.to(scaled.device, scaled.dtype)


def _choose_kernel(
    head: KnnHead,
    axes: PrincipalAxes,
    features: Tensor,
    labels: Tensor,
    num_labels: int,
    seed: int,
) -> tuple[ClosedCell, RidgeFit]:
    """Compares `MAPS` on all rows or a sample, and leaves the best in the head."""
    is_sample = len(labels) > _MOST_LEFT_OUT
    rows, own = _sample(features, labels, _MOST_COMPARED) if is_sample else (features, labels)
    found: list[tuple[float, RandomMap, RidgeFit]] = []
    for candidate in MAPS:
        set_random_map(head, axes, candidate, seed)
        fit = fit_ridge(prepare_rows(head, rows), own, num_labels)
        best = max((score.log_likelihood for score in fit.table), default=-math.inf)
        found.append((best, candidate, fit))
    _, chosen, fit = max(found, key=lambda one: one[0])
    set_random_map(head, axes, chosen, seed)
    if is_sample:
        start = fit.regularizer / scale_of(fit.state)
        fit = _choose_regularizer(head, features, labels, num_labels, start)
    return ClosedCell(chosen, fit.regularizer / scale_of(fit.state), fit.temperature), fit


def _choose_regularizer(
    head: KnnHead,
    features: Tensor,
    labels: Tensor,
    num_labels: int,
    start: float,
) -> RidgeFit:
    """Uphill from a relative regulariser, scored by leave-one-out.

    All rows are left out where they are fewer than the columns, else a sample of them.
    """
    state = _summed(head, features, labels, num_labels)
    grid, scale, system = list(RELATIVE_REGULARIZERS), scale_of(state), None
    if len(labels) < head.classifier.in_features:
        system = DualRidge(prepare_rows(head, features), labels, num_labels)
        measure = system.score
    else:
        sample, own = _sample(features, labels, _MOST_LEFT_OUT)
        measure = partial(
            score_sample, state, state.centered_gram(), prepare_rows(head, sample), own
        )
    table: dict[int, RidgeScore] = {}

    def score(place: int) -> float:
        if place not in table:
            table[place] = measure(grid[place] * scale)
        return table[place].log_likelihood

    best, temperature = min(range(len(grid)), key=lambda i: abs(math.log(grid[i] / start))), 1.0
    if bool((labels.bincount() > 1).any()):  # else no row can be left out
        for step in (1, -1):
            while 0 <= best + step < len(grid) and score(best + step) > score(best):
                best += step
        score(best)
        temperature = table[best].temperature
    weight, bias = (system or state).solve(grid[best] * scale)
    tried = [table[place] for place in sorted(table)]
    return RidgeFit(weight, bias, temperature, grid[best] * scale, tried, state)


def _sample(features: Tensor, labels: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Some of the rows, of each class its share, and at least four of it where there are."""
    share = max(most, 4 * int(labels.max() + 1)) / len(labels)
    some = few_rows(labels, min(1.0, share), 0)
    return features[some], labels[some]


def _summed(
    head: KnnHead,
    features: Tensor,
    labels: Tensor,
    num_labels: int,
    weighting: ClassWeighting = ClassWeighting.NONE,
) -> RidgeState:
    state = RidgeState(head.classifier.in_features, num_labels, weighting)
    for rows, own in zip(_blocks(features), labels.split(_BLOCK), strict=True):
        state.add(prepare_rows(head, rows), own)
    return state


def _blocks(features: Tensor) -> Sequence[Tensor]:
    return features.split(_BLOCK)
