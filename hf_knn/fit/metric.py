"""A learned metric: a linear map under which rows of one class are each other's neighbours.

It starts at the principal axes, turned so that the spread within classes is the same in all
directions, and goes a few steps down the leave-one-out neighbour loss: -log of the probability that
a row's stochastic neighbour has its label (neighbourhood components analysis: Goldberger et al.,
NIPS 2004), among sampled rows. Rows held out say how many steps are best. It is kept only where
folds say that neighbours find more labels with it than without.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers.utils import logging as transformers_logging

from ..core.search import Neighbors, normalize_rows
from ..core.votes import Metric, Weighting, knn_log_probs
from ..data.splits import Fold, split_rows
from ..store.datastore import Datastore
from .blend import COARSE_K, FIXED_TEMPERATURE, Criterion, default_grid, tune

WIDTH = 256
"""Values of a row behind the map, at most."""

LEAST_GAIN = 0.01
"""For less than a point a map is not kept: it has to be trained, stored, and forgotten in."""

MOST_ROWS = 20_000
"""A map is trained on at most so many rows, drawn at random."""

_SHRINKAGES = (0.3, 1.0, 3.0)
_TEMPERATURES = (0.07, FIXED_TEMPERATURE, 0.3)  # a map changes how far apart rows are
_HELD_OUT = 0.2
_RATE, _BATCH = 3e-3, 1024
_MOST_STEPS, _LOOK_EVERY, _PATIENCE = 60, 5, 2
_FLOOR = -20.0  # of a log-probability
_SMALLEST = 1e-10  # of a principal value, as a part of the largest


class Recipe(NamedTuple):
    """How a map is trained.

    Attributes:
        shrinkage: of the spread within classes towards its mean, >= 0.
        steps: down from the start, >= 0.
    """

    shrinkage: float
    steps: int


@dataclass
class MetricChoice:
    """Whether a learned metric is kept, and the maps themselves.

    Attributes:
        is_kept: whether it gained more than one standard error, and more than a point.
        plain: accuracy of the neighbours without a map, on rows held out, with their best cell.
        learned: with one, likewise.
        error: standard error of the difference, row by row.
        rows: on how many rows.
        seed: of the trainings.
        recipe: of every map, chosen by rows held out when the first one was trained: two numbers
            that no single row can move. None before.
    """

    is_kept: bool
    plain: float
    learned: float
    error: float
    rows: int
    seed: int
    recipe: Recipe | None = None
    _maps: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def kept(cls, seed: int) -> "MetricChoice":
        """One that was decided before, by whom nobody knows."""
        return cls(True, math.nan, math.nan, math.nan, 0, seed)

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
            self.recipe = self.recipe or choose_recipe(store, self.seed)
            self._maps[key] = train_map(store, self.recipe, self.seed)
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
    choice = MetricChoice.kept(seed)
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
    error = _error(_by_owner(right[1] - right[0], None if groups is None else groups[rows]))
    choice.is_kept = learned - plain > max(error, LEAST_GAIN)
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


def _error(gains: Tensor) -> float:
    """Standard error of a mean."""
    return float(gains.std()) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf


def _by_owner(gains: Tensor, groups: Tensor | None) -> Tensor:
    """[G] means over what belongs together, whose rows are not independent."""
    if groups is None:
        return gains
    _, owner, counts = groups.unique(return_inverse=True, return_counts=True)
    return torch.zeros(len(counts), dtype=gains.dtype).index_add_(0, owner, gains) / counts


def choose_recipe(store: Datastore, seed: int) -> Recipe:
    """The shrinkage and number of steps after which rows held out find their labels best.

    Args:
        store: at least one row; the map that it has is not looked at.
        seed: of what is drawn.
    """
    rows, labels = _drawn(store, seed)
    fold = split_rows(labels, _HELD_OUT, seed)
    if not len(fold.held_out):
        return Recipe(_SHRINKAGES[-1], 0)
    fitted, held_out = torch.from_numpy(fold.fitted), torch.from_numpy(fold.held_out)
    axes = principal_axes(rows[fitted])
    near, far = rows[fitted] @ axes.T, rows[held_out] @ axes.T
    best = (math.inf, Recipe(_SHRINKAGES[-1], 0))
    for shrinkage in reversed(_SHRINKAGES):  # of equal ones the one that changes less
        turn = even_spread(near, labels[fitted], shrinkage)
        path = _descent(near @ turn.T, labels[fitted], _MOST_STEPS, seed)
        waited = 0
        for step, weight in enumerate(path):
            if step % _LOOK_EVERY:
                continue
            whole = (weight @ turn).T
            loss = _loss_of_others(near @ whole, labels[fitted], far @ whole, labels[held_out])
            waited = 0 if loss < best[0] else waited + 1
            best = min(best, (loss, Recipe(shrinkage, step)))
            if waited > _PATIENCE:
                break
    return best[1]


def train_map(store: Datastore, recipe: Recipe, seed: int) -> Tensor:
    """Trains a map on the rows of a datastore.

    Args:
        store: at least one row; the map that it has is not looked at.
        recipe: see `choose_recipe`.
        seed: of what is drawn.

    Returns:
        [E, D] float32, the largest value 1 in size.
    """
    rows, labels = _drawn(store, seed)
    axes = principal_axes(rows)
    found = rows @ axes.T
    turn = even_spread(found, labels, recipe.shrinkage)
    weight = turn
    for last in _descent(found @ turn.T, labels, recipe.steps, seed):
        weight = last @ turn
    learned = weight @ axes
    return learned / learned.abs().max()


def learn_again(store: Datastore, seed: int = 0) -> None:
    """Trains the map of a datastore anew on the rows that it has now, if it has a map.

    Args:
        store: is changed in place.
        seed: of what is drawn.
    """
    if store.learned_map is not None and len(store):
        store.remap(train_map(store, choose_recipe(store, seed), seed))


def _drawn(store: Datastore, seed: int) -> tuple[Tensor, Tensor]:
    """Rows [n, D] as they are compared without a map, and labels [n] numbered anew."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(store), generator=generator)[:MOST_ROWS].sort().values
    exact = normalize_rows(
        store.features[chosen].numpy(), store.mean.double().numpy(), store.normalization
    )
    return torch.from_numpy(exact).float(), store.labels[chosen].unique(return_inverse=True)[1]


def principal_axes(rows: Tensor) -> Tensor:
    """[E, D] the directions in which rows [N, D] are largest; the first axis where all are 0."""
    exact = rows.double()
    if len(rows) >= rows.shape[1]:
        values, vectors = torch.linalg.eigh(exact.T @ exact)
        axes = vectors.T
    else:
        values, vectors = torch.linalg.eigh(exact @ exact.T)
        axes = vectors.T @ exact / values.clamp_min(1e-300).sqrt()[:, None]
    axes = axes[values > _SMALLEST * values.max()].flip(0)[:WIDTH]
    return axes.float() if len(axes) else torch.eye(1, rows.shape[1])


def even_spread(rows: Tensor, labels: Tensor, shrinkage: float) -> Tensor:
    """[E, E] what makes the spread within classes the same in all directions.

    The spread is shrunk towards its mean, as shrinkage LDA does.

    Args:
        rows: [N, E].
        labels: [N] int64, numbered from 0.
        shrinkage: > 0.
    """
    counts = labels.bincount()
    means = torch.zeros(len(counts), rows.shape[1]).index_add_(0, labels, rows) / counts[:, None]
    apart = (rows - means[labels]).double()
    spread = apart.T @ apart
    level = float(spread.diagonal().mean())
    if not level > 0:  # every row is the mean of its class
        return torch.eye(rows.shape[1])
    values, vectors = torch.linalg.eigh(spread / level)
    turn = (vectors / (values.clamp_min(0) + shrinkage).sqrt()) @ vectors.T
    return turn.float()


def _descent(rows: Tensor, labels: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    """[E, E] maps on the way down the leave-one-out loss: the identity, and one after each step.

    Args:
        rows: [N, E].
        labels: [N] int64.
        steps: of Adam, on rows that are drawn without repetition.
        seed: of the order.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.eye(rows.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([weight], _RATE)
    order = rows.new_empty(0, dtype=torch.int64)
    yield weight.detach().clone()
    for _ in range(steps):
        if len(order) < min(_BATCH, len(rows)):
            order = torch.randperm(len(rows), generator=generator)
        batch, order = order[:_BATCH], order[_BATCH:]
        with torch.enable_grad():
            loss = _loss_of_own(rows[batch] @ weight.T, labels[batch])
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        yield weight.detach().clone()


def _loss_of_own(rows: Tensor, labels: Tensor) -> Tensor:
    """Mean -log p of the own label among the others of a batch, at the vote's usual temperature."""
    own = torch.eye(len(rows), dtype=torch.bool)
    logits = _logits(rows, rows, FIXED_TEMPERATURE).masked_fill(own, -math.inf)
    same = (labels[:, None] == labels) & ~own
    return _loss(logits[same.any(1)], same[same.any(1)])


def _loss_of_others(near: Tensor, labels: Tensor, far: Tensor, wanted: Tensor) -> float:
    """The same of rows `far` among rows `near`, at the temperature that is best for them."""
    same = wanted[:, None] == labels
    return min(float(_loss(_logits(far, near, t), same)) for t in _TEMPERATURES)


def _logits(rows: Tensor, others: Tensor, temperature: float) -> Tensor:
    """[B, N] negative squared distances of directions, over the temperature, up to a constant."""
    unit = functional.normalize(rows, dim=1), functional.normalize(others, dim=1)
    return (2 / temperature) * unit[0] @ unit[1].T


def _loss(logits: Tensor, same: Tensor) -> Tensor:
    right = logits.masked_fill(~same, -math.inf).logsumexp(1) - logits.logsumexp(1)
    return -right.clamp_min(_FLOOR).mean() if len(right) else logits.sum() * 0
