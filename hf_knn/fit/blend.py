"""k, temperature and the blend's weight from one search at the largest k.

Every cell of the grid is derived from the same neighbours: a cell's k takes the first k of them,
its temperature weighs their votes, its weight λ blends them with the head. Cells are compared on
held-out rows only: a validation split, or folds in which neither voice has seen the row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..core.search import Neighbors
from ..core.votes import Choice, Metric, Weighting, check_labels
from .cells import Cell as Cell
from .cells import CellScorer
from .cells import Grid as Grid

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


class Criterion(Choice):
    """What makes a cell the best."""

    ONE_STANDARD_ERROR = "one_standard_error"
    ACCURACY = "accuracy"
    MEAN_CLASS = "mean_class"
    LOG_LIKELIHOOD = "log_likelihood"
    FIXED = "fixed"


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
        cell = (
            f"{self.k} neighbours vote (k = {self.k}, temperature = {self.temperature:g}) and "
            "count "
            f"{self.knn_weight:.0%} beside the head (λ = {self.knn_weight:g})"
        )
        wanted = f"{self.rows} {where}; {FEW_LABELS} a class are wanted"
        few = f"Too few labels to choose by ({wanted}), so"
        if self.criterion == Criterion.FIXED:
            if self.has_few_labels and self.knn_weight == 0:
                return f"{few} the head answers alone (λ = 0); the neighbours only explain."
            if self.has_few_labels:
                return f"{few} usual values are taken: {cell}."
            return f"Usual values, as asked for: {cell}."
        alone = " The neighbours add nothing here; they still explain." * (self.knn_weight == 0)
        if self.has_few_labels and len({(c.k, c.temperature) for c in self.table}) == 1:
            return f"{few} only what neighbours count is chosen: {cell}.{alone}"
        return f"Chosen by {self.criterion} {where}: {cell}.{alone}"


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


def head_alone() -> TuneResult:
    """The same at λ = 0, where a class has too few rows for neighbours to help its head.

    On eight settings of the offline benchmark, two draws of 1 and 2 labels a class each, λ = 0.5
    had 3.8 and 3.7 points less on test than 0 beside a ridge head, 1.1 and 1.3 beside a linear one;
    a λ chosen by folds of 2 labels had 1.2 less beside ridge, and no more beside any head.
    """
    return replace(untuned(), knn_weight=0.0)


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
    scorer = CellScorer(neighbors, head_log_probs, labels, num_labels, metric, weighting)
    table = scorer.score(grid._replace(k=_clip(grid.k, neighbors.labels.shape[1])), progress)
    lone = _clip([FIXED_K], neighbors.labels.shape[1])
    head, fixed = scorer.score(Grid(lone, (FIXED_TEMPERATURE,), (0.0, FIXED_KNN_WEIGHT)))
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
        head=head,
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
