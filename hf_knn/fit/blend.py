"""k, temperature and the blend's weight from one search at the largest k.

Every cell of the grid is derived from the same neighbours: a cell's k takes the first k of them,
its temperature weighs their votes, its weight λ blends them with the head. Cells are compared on
held-out rows only: a validation split, or folds in which neither voice has seen the row.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from ..core.search import Neighbors
from ..core.votes import (
    PROBABILITY_FLOOR,
    Choice,
    Metric,
    Weighting,
    check_labels,
    neighbor_log_weights,
)

TEMPERATURES = (
    1e-4, 1e-3, *(i / 100 for i in range(1, 10)), *(i / 10 for i in range(1, 10)), 1.0, 10.0,
)  # fmt: skip

KNN_WEIGHTS = tuple(i / 20 for i in range(21))
COARSE_TEMPERATURES = (0.03, 0.07, 0.14, 0.3)
COARSE_KNN_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
COARSE_K = (1, 5, 10, 20, 50)
LARGEST_K = 512
FIXED_K, FIXED_TEMPERATURE, FIXED_KNN_WEIGHT = 20, 0.14, 0.5

FEW_LABELS = 16
"""Below this many labels per class the fixed cell is taken.

With a frozen EfficientNet-Lite0, 12 draws each, what was chosen by log-likelihood on 2, 4 and 8
pictures a class was in single draws up to 3.6 points worse on test than the fixed cell, on average
-0.3, -0.3 and +0.1 points (openmoji categories) or +1.2, +1.7 and +1.8 better (digits, where
neighbours are poor), and at 2 less likely by 0.6 and 0.05 nats. From 16 on it was no worse on
average: 0.0 and +0.8 points.
"""

_ROW_BLOCK = 1024
_TIE = 1e-7  # the head comes as float32 log-probabilities, which tell no smaller difference


class Criterion(Choice):
    """What makes a cell the best."""

    ONE_STANDARD_ERROR = "one_standard_error"
    ACCURACY = "accuracy"
    MEAN_CLASS = "mean_class"
    LOG_LIKELIHOOD = "log_likelihood"
    FIXED = "fixed"


class Grid(NamedTuple):
    """The cells that are tried: every combination."""

    k: tuple[int, ...]
    temperatures: tuple[float, ...]
    knn_weights: tuple[float, ...]


class Cell(NamedTuple):
    """One combination and what it scored on the held-out rows.

    Attributes:
        k: neighbours that really voted, at most as many as there are.
        temperature: divides squared distances.
        knn_weight: λ.
        accuracy: top-1.
        mean_class: mean per-class accuracy.
        log_likelihood: mean ``log p(label)``, p floored at 1e-12.
    """

    k: int
    temperature: float
    knn_weight: float
    accuracy: float
    mean_class: float
    log_likelihood: float


@dataclass(frozen=True)
class TuneResult:
    """What `tune` found.

    Attributes:
        k: of the chosen cell.
        temperature: of the chosen cell.
        knn_weight: of the chosen cell.
        score: the criterion's own number of the chosen cell: accuracy, mean-per-class accuracy or
            log-likelihood; of the fixed cell its accuracy, NaN where no row was held out.
        criterion: what was maximised, or `fixed`: nothing was chosen.
        table: every cell.
        best_knn: the best cell of the neighbours alone (λ = 1).
        head: the head alone (λ = 0).
        fixed: the fixed cell (λ 0.5, k 20, T 0.14) on the same rows.
        rows: how many rows it was chosen on.
        has_few_labels: whether these were too few to choose by.
    """

    k: int
    temperature: float
    knn_weight: float
    score: float
    criterion: str
    table: list[Cell]
    best_knn: Cell
    head: Cell
    fixed: Cell
    rows: int
    has_few_labels: bool

    def say(self, where: str) -> str:
        """What was chosen and why, as a sentence.

        Args:
            where: what the rows were, as in "on a validation set".
        """
        cell = f"k = {self.k}, temperature = {self.temperature:g}, λ = {self.knn_weight:g}"
        if self.criterion != Criterion.FIXED:
            alone = " The neighbours add nothing here; they still explain."
            chosen = f"Chosen by {self.criterion} {where}: {cell}."
            return chosen + alone * (self.knn_weight == 0)
        if not self.has_few_labels:
            return f"The fixed cell, as asked for: {cell}."
        return (
            f"Too few labels to choose by ({self.rows} {where}; {FEW_LABELS} a class are wanted), "
            f"so the fixed cell is taken: {cell}."
        )


def default_grid(num_rows: int, num_labels: int, *, coarse: bool = False) -> Grid:
    """The published grid, or a coarse one for few labels.

    Args:
        num_rows: N, rows of the datastore.
        num_labels: C.
        coarse: few cells, for when there are too few labels to tell many apart.
    """
    if coarse:
        return Grid(_clip(COARSE_K, num_rows), COARSE_TEMPERATURES, COARSE_KNN_WEIGHTS)
    powers = [2**i for i in range(LARGEST_K.bit_length())]
    wanted = [*powers, num_rows // max(1, num_labels), num_labels]
    ks = [k for k in wanted if k >= 1]
    return Grid(_clip(ks, num_rows), TEMPERATURES, KNN_WEIGHTS)


def has_few_labels(num_rows: int, num_labels: int) -> bool:
    """Whether there are too few labels to choose by: below 16 a class, on average."""
    return num_rows < FEW_LABELS * num_labels


def untuned() -> TuneResult:
    """The fixed cell, where no row can be held out."""
    nothing = Cell(FIXED_K, FIXED_TEMPERATURE, FIXED_KNN_WEIGHT, math.nan, math.nan, math.nan)
    return TuneResult(
        *nothing[:3], math.nan, str(Criterion.FIXED), [], nothing._replace(knn_weight=1.0),
        nothing._replace(knn_weight=0.0), nothing, 0, True,
    )  # fmt: skip


def tune(
    neighbors: Neighbors,
    head_log_probs: Tensor,
    labels: Tensor,
    num_labels: int,
    criterion: str | None = None,
    *,
    metric: str = Metric.COSINE,
    weighting: str = Weighting.SOFTMAX,
    grid: Grid | None = None,
    progress: bool = False,
) -> TuneResult:
    """Chooses k, temperature and λ on held-out rows.

    Args:
        neighbors: [N, K] of each row among rows that both voices were made from, the row itself
            never among them; K at least the largest k wanted.
        head_log_probs: [N, C_head] of a head that has not seen the rows.
        labels: [N] int64 in [0, num_labels).
        num_labels: C.
        criterion: `one_standard_error` (of the cells within one standard error of the best
            accuracy the one with the best log-likelihood), `accuracy`, `mean_class`,
            `log_likelihood`, or `fixed` (k 20, T 0.14, λ 0.5, whatever the rows say). None is the
            first, and the last below 16 labels a class, where a choice would be chance. Ties go to
            the smaller λ, then k, then temperature; where λ = 0 is best, k and temperature are
            those of the neighbours alone, who still explain.
        metric: of the similarities.
        weighting: of the votes; only `softmax` has a temperature.
        grid: the cells to try; None is the published grid, or a coarse one below 16 labels a class.
        progress: show a progress bar.

    Raises:
        ValueError: for no rows, shapes that disagree, labels out of range, NaN or a bad option.
    """
    count = len(labels)
    _check_rows(neighbors, head_log_probs, labels, num_labels)
    few = has_few_labels(count, num_labels)
    grid = grid or default_grid(neighbors.labels.shape[1], num_labels, coarse=few)
    if Weighting(weighting) is not Weighting.SOFTMAX:
        grid = grid._replace(temperatures=grid.temperatures[:1])
    chosen_by = Criterion(criterion or ("fixed" if few else "one_standard_error"))
    scorer = _Scorer(neighbors, head_log_probs, labels, num_labels, metric, weighting)
    table = scorer.score(grid._replace(k=_clip(grid.k, neighbors.labels.shape[1])), progress)
    lone = Grid(_clip([FIXED_K], neighbors.labels.shape[1]), (FIXED_TEMPERATURE,), (0.0,))
    fixed = scorer.score(lone._replace(knn_weights=(FIXED_KNN_WEIGHT,)))[0]
    if chosen_by is Criterion.FIXED:  # of a store that grows later, 20 may vote
        best, score, rule = fixed._replace(k=FIXED_K), fixed.accuracy, Criterion.LOG_LIKELIHOOD
    else:
        (best, score), rule = _choose(table, chosen_by, count), chosen_by
    pure = [cell for cell in table if cell.knn_weight == 1] or table
    best_knn = _choose(pure, rule, count)[0]
    if best.knn_weight == 0:  # all k and T are alike then, but neighbours still explain
        best = best._replace(k=best_knn.k, temperature=best_knn.temperature)
    return TuneResult(
        k=best.k,
        temperature=best.temperature,
        knn_weight=best.knn_weight,
        score=score,
        criterion=str(chosen_by),
        table=table,
        best_knn=best_knn,
        head=scorer.score(lone)[0],
        fixed=fixed,
        rows=count,
        has_few_labels=few,
    )


def _check_rows(neighbors: Neighbors, head: Tensor, labels: Tensor, num_labels: int) -> None:
    count = len(labels)
    if count == 0 or len(head) != count or len(neighbors.labels) != count:
        raise ValueError(
            f"Expected neighbours, head and labels of the same rows, but got "
            f"{len(neighbors.labels)}, {len(head)} and {count}."
        )
    check_labels(labels, num_labels, "labels")
    check_labels(neighbors.labels, num_labels, "neighbors.labels")
    if head.ndim != 2 or not 1 <= head.shape[1] <= num_labels:
        raise ValueError(
            f"Expected `head_log_probs` to be [N, 1 to {num_labels}], but got {tuple(head.shape)}."
        )
    bad = head.isnan().any(dim=1).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"Expected `head_log_probs` without NaN, but rows {bad[:10].tolist()} have some."
        )


class _Scorer:
    """Scores cells without ever building [N, C] votes, and all λ of a (k, temperature) at once.

    A class can only win a row if one of its neighbours has it or if it is the head's first choice.
    So each row keeps one slot for the latter, and one per class among its neighbours, in the order
    of first appearance: those of the nearest k come first.

    A score is linear in λ. So the λ at which a class beats the label of a row are a half-line, and
    those at which the label wins are an interval.
    """

    def __init__(
        self,
        neighbors: Neighbors,
        head_log_probs: Tensor,
        labels: Tensor,
        num_labels: int,
        metric: str,
        weighting: str,
    ) -> None:
        self.similarities = neighbors.similarities
        self.neighbor_labels = neighbors.labels
        self.head = head_log_probs
        self.labels, self.num_labels = labels, num_labels
        self.metric, self.weighting = metric, weighting

    def score(self, grid: Grid, progress: bool = False) -> list[Cell]:
        """The cells of a grid, k fastest, then temperature, then weight."""
        shape = (len(grid.temperatures), len(grid.k))
        correct = torch.zeros(*shape, self.num_labels, len(grid.knn_weights), dtype=torch.float64)
        likelihood = torch.zeros(*shape, len(grid.knn_weights), dtype=torch.float64)
        with transformers_logging.tqdm(
            total=len(self.labels) * len(grid.temperatures), unit=" rows", unit_scale=True,
            desc="Choosing k, temperature and λ", disable=not progress,
        ) as bar:  # fmt: skip
            for start in range(0, len(self.labels), _ROW_BLOCK):
                rows = slice(start, start + _ROW_BLOCK)
                self._score_rows(rows, grid, correct, likelihood, bar.update)
        counts = torch.bincount(self.labels, minlength=self.num_labels).double()
        present = counts > 0
        accuracy = correct.sum(-2) / counts.sum()
        mean_class = (correct[:, :, present] / counts[present].unsqueeze(1)).mean(-2)
        likelihood /= counts.sum()
        return [
            Cell(
                k, temperature, weight,
                float(accuracy[t, i, w]), float(mean_class[t, i, w]), float(likelihood[t, i, w]),
            )
            for w, weight in enumerate(grid.knn_weights)
            for t, temperature in enumerate(grid.temperatures)
            for i, k in enumerate(grid.k)
        ]  # fmt: skip

    def _score_rows(
        self,
        rows: slice,
        grid: Grid,
        correct: Tensor,
        likelihood: Tensor,
        advance: Callable[[int], object],
    ) -> None:
        targets = self.labels[rows]  # [B]
        slots, slot_labels = _assign_slots(self.neighbor_labels[rows], self.num_labels)
        head = _Head(self.head[rows], targets, slot_labels, self.num_labels)
        used = [_slots_used(slots, k) for k in grid.k]
        knn_weights = torch.tensor(grid.knn_weights, dtype=torch.float64)
        for t, temperature in enumerate(grid.temperatures):
            weights = neighbor_log_weights(
                self.similarities[rows], temperature, metric=self.metric, weighting=self.weighting
            ).exp()  # [B, K]
            votes = torch.zeros(len(targets), slot_labels.shape[1] + 1, dtype=torch.float64)
            done = 0
            for i, k in enumerate(grid.k):
                votes.scatter_add_(1, slots[:, done:k] + 1, weights[:, done:k].double())
                done = k
                ends = head.blend(votes[:, : used[i] + 1])
                hits = ends.hits(head.ties[:, : used[i] + 1], knn_weights)  # [B, W]
                correct[t, i].index_add_(0, targets, hits.double())
                own = torch.lerp(ends.own_head[:, None], ends.own_knn[:, None], knn_weights)
                likelihood[t, i] += own.clamp_min(PROBABILITY_FLOOR).log().sum(dim=0)
            advance(len(targets))


class _Head:
    """What the head says about some rows: about their labels, and about the class of each slot.

    Args:
        log_probs: [B, C_head].
        targets: [B] the labels.
        slot_labels: [B, S] classes of the neighbours; before them comes the head's first choice.
        num_labels: C, which is the class of a slot that is not used.
    """

    def __init__(
        self, log_probs: Tensor, targets: Tensor, slot_labels: Tensor, num_labels: int
    ) -> None:
        probs = log_probs.double().exp()
        width = probs.shape[1]
        # of equal classes the lowest
        choice = (probs >= probs.amax(dim=1, keepdim=True) - _TIE).to(torch.int8).argmax(dim=1)
        classes = torch.cat([choice.unsqueeze(1), slot_labels], dim=1)  # [B, 1 + S]
        is_outside = classes >= width
        self.is_taught = is_outside & (classes < num_labels)
        self.has_taught = bool(self.is_taught.any())
        self.slots = probs.gather(1, classes.clamp(max=width - 1)).masked_fill(is_outside, 0)
        self.is_target_taught = targets >= width
        own = probs.gather(1, targets.clamp(max=width - 1).unsqueeze(1)).squeeze(1)
        self.own = own.masked_fill(self.is_target_taught, 0)
        self.at_target = classes == targets.unsqueeze(1)
        # how far a class may be ahead of the label: of those that float32 cannot tell apart, the
        # lowest wins
        ties = torch.where(classes < targets.unsqueeze(1), -_TIE, _TIE).double()
        self.ties = ties.masked_fill(self.at_target, torch.inf)

    def blend(self, votes: Tensor) -> "_Ends":
        """The scores of the blend at both ends of λ.

        Args:
            votes: [B, 1 + S] of the slots; nobody votes for the first one.
        """
        width = votes.shape[1]
        total = votes.sum(dim=1, keepdim=True)
        shares = votes / total.clamp_min(torch.finfo(torch.float64).tiny)
        slots, own = self.slots[:, :width], self.own
        own_share = (shares * self.at_target[:, :width]).sum(dim=1)
        if self.has_taught:  # their votes count in full, whatever λ is
            is_taught = self.is_taught[:, :width]
            rest = 1 - (shares * is_taught).sum(dim=1)
            slots = torch.where(is_taught, shares, slots * rest.unsqueeze(1))
            own = torch.where(self.is_target_taught, own_share, own * rest)
        is_silent = total <= 0
        if bool(is_silent.any()):  # the head alone, whatever λ is
            shares = torch.where(is_silent, self.slots[:, :width], shares)
            slots = torch.where(is_silent, self.slots[:, :width], slots)
            own_share = torch.where(is_silent.squeeze(1), self.own, own_share)
            own = torch.where(is_silent.squeeze(1), self.own, own)
        return _Ends(shares, slots, own_share, own)


class _Ends(NamedTuple):
    """Scores at the ends of λ, between which they are linear.

    Attributes:
        knn: [B, S] of the slots at λ = 1.
        head: [B, S] of the slots at λ = 0.
        own_knn: [B] of the row's label at λ = 1.
        own_head: [B] of the row's label at λ = 0.
    """

    knn: Tensor
    head: Tensor
    own_knn: Tensor
    own_head: Tensor

    def hits(self, ties: Tensor, knn_weights: Tensor) -> Tensor:
        """[B, W] whether no class is ahead of the label of a row at λ.

        Args:
            ties: [B, S] how far each class may be ahead.
            knn_weights: [W] λ.
        """
        gap = self.head - self.own_head[:, None]  # at λ = 0
        slope = self.knn - self.own_knn[:, None] - gap
        crossing = (ties - gap) / slope
        # a gap that is the same everywhere: the division gave infinity with the right sign, or
        # 0 / 0 for what is just as far ahead as it may be
        highest = crossing.masked_fill((slope < 0) | crossing.isnan(), torch.inf).amin(dim=1)
        lowest = crossing.masked_fill(slope >= 0, -torch.inf).amax(dim=1)
        return (lowest[:, None] <= knn_weights) & (knn_weights <= highest[:, None])


def _assign_slots(neighbor_labels: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
    """[B, K] labels -> the slot of each neighbour [B, K] and the class of each slot [B, S].

    Slots are in the order of first appearance; unused ones carry the class `num_labels`, which no
    row has.
    """
    rows, width = neighbor_labels.shape
    if width == 0:
        return neighbor_labels, neighbor_labels
    ordered, order = neighbor_labels.sort(dim=1, stable=True)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    numbers = starts.cumsum(dim=1) - 1  # [B, K] of the labels in ascending order
    places = torch.full((rows, width), width, dtype=torch.int64)
    places.scatter_reduce_(1, numbers, order, "amin")  # [B, K] where each label appears first
    slots_of = places.argsort(dim=1).argsort(dim=1)  # [B, K] its number in the order of those
    slots = torch.empty_like(order).scatter_(1, order, slots_of.gather(1, numbers))
    classes = torch.full((rows, int(numbers.amax()) + 1), num_labels, dtype=torch.int64)
    classes.scatter_(1, slots, neighbor_labels)
    return slots, classes


def _slots_used(slots: Tensor, k: int) -> int:
    """How many slots the nearest k fill at most."""
    return int(slots[:, :k].amax()) + 1 if k and slots.numel() else 0


def _choose(table: list[Cell], criterion: Criterion, count: int) -> tuple[Cell, float]:
    def tie_break(cell: Cell) -> tuple[float, int, float]:
        return (-cell.knn_weight, -cell.k, -cell.temperature)

    def by(name: str, cells: list[Cell]) -> Cell:
        return max(cells, key=lambda cell: (getattr(cell, name), *tie_break(cell)))

    if criterion is not Criterion.ONE_STANDARD_ERROR:
        best = by(str(criterion), table)
        return best, float(getattr(best, str(criterion)))
    top = max(cell.accuracy for cell in table)
    error = math.sqrt(top * (1 - top) / count)
    best = by("log_likelihood", [cell for cell in table if cell.accuracy >= top - error])
    return best, best.accuracy


def _clip(ks: Sequence[int], width: int) -> tuple[int, ...]:
    """The distinct effective k, ascending."""
    return tuple(sorted({min(int(k), width) for k in ks})) if width else (0,)
