"""Closed-form heads on raw features: kernel, regulariser and temperature by leave-one-out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.backbone import KnnHead
from ..core.config import CLOSED_FORM, HEAD_COMPONENTS, HEAD_FEATURES, Head, Kernel, Normalization
from ..core.votes import ClassWeighting
from ..data.splits import few_rows
from ..model.closed_form import check_weighting, prepare_rows
from ..model.ridge import RidgeState
from .lda import fit_lda, within_scale
from .ridge import RELATIVE_REGULARIZERS, RidgeFit, RidgeScore, fit_ridge, scale_of, score_sample

KERNELS = ((Kernel.RBF, 0.5), (Kernel.RELU, 1.0))
"""Random features that are compared, with their sharpness."""

_MOST_LEFT_OUT = 2048
"""Rows that a kernel, and of many rows its regulariser, is chosen on."""

_MOST_ROWS_FOR_AXES = 20_000
_BLOCK = 1024


class ClosedCell(NamedTuple):
    """What a closed-form head is fitted with.

    Attributes:
        kernel: of a kernel head, `rbf` or `relu`; empty for the others.
        sharpness: of its projections.
        regularizer: relative to the mean eigenvalue that can differ from 0: of the Gram matrix, for
            discriminants of the scatter within classes.
        temperature: > 0, that divides the logits.
    """

    kernel: str
    sharpness: float
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
        head.axes = principal_axes(head, features, seed)
        if cell is None:
            return _choose_kernel(head, features, labels, num_labels, seed)
        set_directions(head, cell.kernel, cell.sharpness, seed)
    if cell is None:
        fit_kind = fit_lda if kind == Head.LDA else fit_ridge
        rows = prepare_rows(head, features)
        fit = fit_kind(rows, labels, num_labels, class_weighting=class_weighting)
        scale = within_scale(fit.state) if kind == Head.LDA else scale_of(fit.state)
        return ClosedCell("", 0.0, fit.regularizer / scale, fit.temperature), fit
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


def principal_axes(head: KnnHead, features: Tensor, seed: int) -> Tensor:
    """[P, D] float32: directions in which rows differ most; zeros where there are fewer.

    Args:
        head: as which rows are seen; its axes have the shape.
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
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    kept = min(count, len(rows))
    axes = torch.zeros(count, width, dtype=head.axes.dtype, device=head.axes.device)
    axes[:kept] = vectors[:, values.argsort(descending=True)[:kept]].T
    return axes


def set_directions(head: KnnHead, kernel: str, sharpness: float, seed: int) -> None:
    """Draws the random directions of a kernel head, always the same for a seed.

    They are orthogonal in blocks, with the lengths of normal vectors (Yu et al., *Orthogonal random
    features*, NeurIPS 2016).

    Args:
        head: whose directions have the shape.
        kernel: `rbf` or `relu`.
        sharpness: γ of the kernel ``exp(-γ |x - y|^2)``; of `relu` it does not matter.
        seed: of the draw.
    """
    assert head.directions is not None
    assert head.axes is not None
    head.kernel = Kernel(kernel)
    generator = torch.Generator().manual_seed(seed)
    width = head.axes.shape[0]
    count = head.random if head.kernel is Kernel.RELU else head.random // 2
    blocks = []
    for _ in range(math.ceil(count / width)):
        square = torch.randn(width, width, generator=generator, dtype=torch.float64)
        lengths = torch.randn(width, width, generator=generator, dtype=torch.float64).norm(dim=1)
        blocks.append(torch.linalg.qr(square).Q * lengths[:, None])
    directions = torch.cat(blocks)[:count] * math.sqrt(2 * sharpness)
    head.directions = directions.to(head.directions.device, head.axes.dtype)


def _choose_kernel(
    head: KnnHead, features: Tensor, labels: Tensor, num_labels: int, seed: int
) -> tuple[ClosedCell, RidgeFit]:
    """Compares `KERNELS` on all rows or a sample, and leaves the best in the head."""
    is_sample = len(labels) > _MOST_LEFT_OUT
    rows, own = features, labels
    if is_sample:
        some = few_rows(labels, min(1.0, max(_MOST_LEFT_OUT, 4 * num_labels) / len(labels)), seed)
        rows, own = features[some], labels[some]
    found: list[tuple[float, Kernel, float, RidgeFit]] = []
    for kernel, sharpness in KERNELS:
        set_directions(head, kernel, sharpness, seed)
        fit = fit_ridge(prepare_rows(head, rows), own, num_labels)
        best = max((score.log_likelihood for score in fit.table), default=-math.inf)
        found.append((best, kernel, sharpness, fit))
    _, kernel, sharpness, fit = max(found, key=lambda one: one[0])
    set_directions(head, kernel, sharpness, seed)
    if is_sample:
        start = fit.regularizer / scale_of(fit.state)
        fit = _choose_regularizer(head, features, labels, num_labels, rows, own, start)
    relative = fit.regularizer / scale_of(fit.state)
    return ClosedCell(str(kernel), sharpness, relative, fit.temperature), fit


def _choose_regularizer(
    head: KnnHead,
    features: Tensor,
    labels: Tensor,
    num_labels: int,
    sample: Tensor,
    own: Tensor,
    start: float,
) -> RidgeFit:
    """Uphill from a relative regulariser, scored on a sample of the rows that are left out."""
    state = _summed(head, features, labels, num_labels)
    rows, scale = prepare_rows(head, sample), scale_of(state)
    grid = list(RELATIVE_REGULARIZERS)
    table: dict[int, RidgeScore] = {}

    def score(place: int) -> float:
        if place not in table:
            table[place] = score_sample(state, rows, own, grid[place] * scale)
        return table[place].log_likelihood

    best = min(range(len(grid)), key=lambda i: abs(math.log(grid[i] / start)))
    for step in (1, -1):
        while 0 <= best + step < len(grid) and score(best + step) > score(best):
            best += step
    chosen = table.get(best) or score_sample(state, rows, own, grid[best] * scale)
    weight, bias = state.solve(chosen.regularizer)
    tried = [table[place] for place in sorted(table)]
    return RidgeFit(weight, bias, chosen.temperature, chosen.regularizer, tried, state)


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
