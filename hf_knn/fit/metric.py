"""A learned metric: a linear map under which rows of one class are each other's neighbours.

It is trained by leave-one-out neighbour loss (neighbourhood components analysis: Goldberger et al.,
NIPS 2004): the probability that a row's stochastic neighbour has its label. The map starts where
spread within classes counts the same in all directions, and is drawn back there. It is kept only
where folds say that neighbours find more labels with it than without.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from ..core.search import Neighbors, normalize_rows
from ..core.votes import Metric, Weighting, knn_log_probs
from ..data.splits import Fold, split_rows
from ..store.datastore import Datastore
from .blend import COARSE_K, FIXED_TEMPERATURE, Criterion, default_grid, tune

WIDTH = 128
"""Values of a row behind the map, at most."""

MOST_ROWS = 20_000
"""A map is trained on at most so many rows, drawn at random."""

_SHRINKAGE = 1.0
_STEPS, _BATCH, _RATE, _PULL = 100, 1024, 0.003, 1e-3
_HELD_OUT, _LOOK_EVERY, _PATIENCE = 0.2, 10, 3
_FLOOR = -20.0


@dataclass
class MetricChoice:
    """Whether a learned metric is kept, and the maps themselves.

    Attributes:
        is_kept: whether it gained more than one standard error.
        plain: accuracy of the neighbours without a map, on rows held out, with their best cell.
        learned: with one, likewise.
        error: standard error of the difference, row by row.
        rows: on how many rows.
        seed: of the trainings.
    """

    is_kept: bool
    plain: float
    learned: float
    error: float
    rows: int
    seed: int
    _maps: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def say(self) -> str:
        """What was decided and why, as a sentence."""
        if not self.rows:
            return "Learned metric: not kept, since no row could be held out to try it on."
        gain = f"{100 * (self.learned - self.plain):+.1f} points ± {100 * self.error:.1f}"
        return (
            f"Learned metric: {'kept' if self.is_kept else 'not kept'}; neighbours find "
            f"{self.learned:.1%} of {self.rows} rows held out with it, {self.plain:.1%} without "
            f"({gain})."
        )

    def give_to(self, store: Datastore) -> Datastore:
        """Gives a datastore the map that is trained on its rows, if one is kept; returns it.

        Args:
            store: is changed in place.
        """
        if self.is_kept:
            store.remap(self._map_of(store))
        return store

    def _map_of(self, store: Datastore) -> Tensor:
        """Trained once: it depends on the rows and the seed alone."""
        found = hashlib.sha256(store.labels.numpy().tobytes())
        found.update(store.features.numpy().tobytes())
        key = found.hexdigest()
        if key not in self._maps:
            self._maps[key] = train_map(store, self.seed)
        return self._maps[key]


def choose_metric(
    features: Tensor,
    labels: Tensor,
    num_labels: int,
    folds: Sequence[Fold],
    make: Callable[[Tensor, Tensor], Datastore],
    *,
    groups: Tensor | None = None,
    weighting: str = Weighting.SOFTMAX,
    seed: int = 0,
    progress: bool = False,
) -> MetricChoice:
    """Tries a learned metric on folds: each map is trained without the rows that it is asked about.

    Args:
        features: [N, D] raw features.
        labels: [N] int64.
        num_labels: C.
        folds: from `stratified_folds`; none keeps nothing.
        make: a datastore from some features and their labels.
        groups: [N] int64 of what belongs together; None: each row is by itself.
        weighting: of the votes.
        seed: of the trainings.
        progress: show a progress bar.

    Returns:
        The choice; `give_to` puts the map into a datastore.
    """
    choice = MetricChoice(True, math.nan, math.nan, math.nan, 0, seed)
    said: tuple[list[Neighbors], list[Neighbors]] = ([], [])
    asked, kind, most = [], str(Metric.COSINE), max(COARSE_K)
    for fold in transformers_logging.tqdm(folds, desc="Learning a metric", disable=not progress):
        fitted, held_out = torch.from_numpy(fold.fitted), torch.from_numpy(fold.held_out)
        store = make(features[fitted], labels[fitted])
        kind = store.metric
        said[0].append(store.search(features[held_out], most))
        said[1].append(choice.give_to(store).search(features[held_out], most))
        asked.append(held_out)
    if not asked:
        choice.is_kept = False
        return choice
    rows = torch.cat(asked)
    right = [_right(parts, labels[rows], num_labels, kind, weighting) for parts in said]
    plain, learned = (float(one.mean()) for one in right)
    gains = _by_owner(right[1] - right[0], None if groups is None else groups[rows])
    error = float(gains.std()) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
    choice.is_kept = learned - plain > error
    choice.plain, choice.learned, choice.error, choice.rows = plain, learned, error, len(rows)
    return choice


def _right(
    parts: Sequence[Neighbors], labels: Tensor, num_labels: int, metric: str, weighting: str
) -> Tensor:
    """[B] 1.0 where the vote is right, with the k and temperature that are best for it."""
    width = min(part.labels.shape[1] for part in parts)
    near = Neighbors(*(torch.cat([part[i][:, :width] for part in parts]) for i in range(3)))
    grid = default_grid(width, num_labels, coarse=True)._replace(knn_weights=(1.0,))
    silent = torch.zeros(len(labels), num_labels)
    best = tune(
        near, silent, labels, num_labels, Criterion.ACCURACY, metric=metric, weighting=weighting,
        grid=grid,
    )  # fmt: skip
    votes = knn_log_probs(
        near.similarities[:, : best.k], near.labels[:, : best.k], num_labels, best.temperature,
        metric=metric, weighting=weighting,
    )  # fmt: skip
    return (votes.argmax(dim=1) == labels).double()


def _by_owner(gains: Tensor, groups: Tensor | None) -> Tensor:
    """[G] means over what belongs together, whose rows are not independent."""
    if groups is None:
        return gains
    _, owner, counts = groups.unique(return_inverse=True, return_counts=True)
    return torch.zeros(len(counts), dtype=gains.dtype).index_add_(0, owner, gains) / counts


def train_map(store: Datastore, seed: int) -> Tensor:
    """Trains a map on the rows of a datastore, whatever map it has.

    Args:
        store: N rows, at least one.
        seed: of what is drawn.

    Returns:
        [E, D] float32, the largest value 1 in size.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(store), generator=generator)[:MOST_ROWS].sort().values
    mean, labels = store.mean.double().numpy(), store.labels[chosen].unique(return_inverse=True)[1]
    exact = normalize_rows(store.features[chosen].numpy(), mean, store.normalization)
    rows = torch.from_numpy(exact).float()
    start = _start(rows, labels)
    weight = _descend(rows @ start.T, labels, generator) @ start
    return weight / weight.abs().max()


def _start(rows: Tensor, labels: Tensor) -> Tensor:
    """[E, D] principal axes, turned and scaled so that classes spread alike in all directions.

    The spread within classes is shrunk towards its mean, as shrinkage LDA does.
    """
    axes = _principal_axes(rows)
    found = rows @ axes.T  # [N, E]
    counts = labels.bincount()
    means = torch.zeros(len(counts), len(axes)).index_add_(0, labels, found) / counts[:, None]
    apart = (found - means[labels]).double()
    spread = apart.T @ apart
    shrunk = _SHRINKAGE * float(spread.diagonal().mean()) or 1.0  # no class has two rows
    values, vectors = torch.linalg.eigh(spread + shrunk * torch.eye(len(axes)))
    turned = (vectors / values.sqrt()) @ vectors.T
    return turned.float() @ axes


def _principal_axes(rows: Tensor) -> Tensor:
    """[E, D] the directions in which rows differ most; of rows that are 0 the first axis."""
    exact = rows.double()
    if len(rows) >= rows.shape[1]:
        values, vectors = torch.linalg.eigh(exact.T @ exact)
        axes = vectors.T
    else:
        values, vectors = torch.linalg.eigh(exact @ exact.T)
        axes = vectors.T @ exact / values.clamp_min(1e-300).sqrt()[:, None]
    axes = axes[values > _SMALLEST * values.max()].flip(0)[:WIDTH]
    return axes.float() if len(axes) else torch.eye(1, rows.shape[1])


def _descend(rows: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """[E, E] the map that rows held out like best, on the way down from the identity.

    Args:
        rows: [N, E] about as long in all directions.
        labels: [N] int64.
        generator: of batches and of what is held out.
    """
