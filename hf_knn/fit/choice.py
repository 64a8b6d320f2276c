"""Which head is best, alone or beside the neighbours: chosen on rows that none of them has seen.

All heads are asked about the same rows, held out in folds or a validation set, and the neighbours
once for all. Each head takes the cell (k, temperature, λ) that `tune` gives it, where λ = 0 is the
head alone; of the heads within one standard error of the best accuracy the one with the best
log-likelihood is taken. Heads and cells are chosen on one half of the rows, or with few labels on
all, see `held_out`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.config import Head, Normalization
from ..core.votes import ClassWeighting, Metric, Weighting
from ..data.splits import Fold
from ..store.datastore import Datastore
from .blend import Cell, Criterion, TuneResult, head_alone
from .closed import ClosedCell, fit_closed
from .held_out import (
    Answer,
    Blended,
    BlendOf,
    Fit,
    HeldOut,
    LabelledRows,
    Store,
    ask,
    choose_cell,
    is_chosen_on_all,
    judged_by_halves,
    widest,
)
from .linear import fit_linear

HEADS = (Head.LINEAR, Head.RIDGE, Head.KERNEL, Head.LDA)
"""Those that are compared."""

FEWEST_LABELS = 3
"""Below this many labels per class (on average over those that have rows) none is compared."""

FIXED_HEAD, FIXED_CELL = Head.RIDGE, ClosedCell(None, 0.1, 0.1)
"""What is taken then, at λ = 0: with this cell below 2 labels a class, else one by leave-one-out.

On eight settings of the offline benchmark with frozen backbones, two draws each, the best on test
with 1 and 2 labels a class: 31.1 and 43.1 %; ten times the regulariser had 30.1 and 42.1, λ = 0.5
beside it 27.8 and 37.5. With 2 labels leave-one-out had 42.6 there, and with a backbone that was
trained on the few 20.3 where the cell had 14.3 (openmoji), and 44.0 where it had 24.6 (glyphs).
"""


class HeadScore(NamedTuple):
    """What a head scored on the rows that it was chosen on.

    Attributes:
        head: its name.
        alone: the head without neighbours.
        best: with its best cell; λ is 0 where neighbours add nothing.
    """

    head: str
    alone: Cell
    best: Cell


_SMOOTHED = {
    True: "as smooth as suits each picture predicted from the others (leave-one-out)",
    False: "as smooth as usual",
}
"""How the regulariser of a head was found."""


@dataclass(frozen=True)
class HeadChoice:
    """Which head was chosen, and the table that it was chosen by.

    Attributes:
        head: its name.
        table: every head that was compared; none where there were too few labels.
        rows: on how many rows heads and cells were compared.
        criterion: of the cells, as it was asked for; None where nothing was compared.
        left_out: heads that could not be compared, each with the reason.
        fixed: what the head is fitted with where not even that could be chosen; else None.
        result: the cell of the head, with the table of all cells; where nothing was compared the
            fixed one at λ = 0.
        answers: what the head and the neighbours said about all rows held out; None likewise.
        judged: what each half of them was told by what the other half chose; None likewise.
    """

    head: str
    table: tuple[HeadScore, ...] = ()
    rows: int = 0
    criterion: str | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    fixed: ClosedCell | None = None
    result: TuneResult = field(default_factory=head_alone, repr=False)
    answers: HeldOut | None = field(default=None, repr=False)
    judged: Blended | None = field(default=None, repr=False)

    def say(self) -> str:
        """What was chosen and why, as a sentence."""
        if not self.table:
            return (
                f"Too few labels to compare heads by ({FEWEST_LABELS} a class are wanted, and some "
                f"that can be held out), so a {self.head} head is taken and answers "
                f"alone (λ = 0), {_SMOOTHED[self.fixed is None]}; the neighbours only explain."
            )
        best = next(score for score in self.table if score.head == self.head).best
        count = f"{best.knn_weight:.0%} (λ = {best.knn_weight:g})"
        how = "alone" if best.knn_weight == 0 else f"with neighbours, which count {count}"
        return f"Best of {len(self.table)} heads on {self.rows} rows held out: {self.head} {how}."

    def as_json(self) -> dict[str, Any]:
        """What a report keeps of it."""
        return {
            "chosen": str(self.head),
            "rows": self.rows,
            "left_out": {str(head): why for head, why in self.left_out.items()},
            "table": [
                {"head": str(score.head)}
                | {"alone": score.alone._asdict(), "with_neighbors": score.best._asdict()}
                for score in self.table
            ],
        }


def compare_heads(
    rows: LabelledRows,
    held_out: LabelledRows | Sequence[Fold],
    num_labels: int,
    *,
    heads: Sequence[str] = HEADS,
    criterion: str | None = None,
    metric: str = Metric.COSINE,
    normalization: str = Normalization.L2_CENTERED,
    weighting: str = Weighting.SOFTMAX,
    class_weighting: str = ClassWeighting.NONE,
    store: Store | None = None,
    seed: int = 0,
    device: torch.device | None = None,
    progress: bool = False,
) -> HeadChoice:
    """Chooses a head.

    Where there are fewer than 3 labels per class (on average over the classes that have rows), or
    no row can be held out, nothing is compared: it is a ridge head, with a regulariser that is
    fixed below 2 labels per class.

    Args:
        rows: to learn from.
        held_out: folds of these rows, from `stratified_folds`, or other rows: a validation set.
        num_labels: C.
        heads: of `linear`, `ridge`, `kernel` and `lda`.
        criterion: of the cell of each head, see `tune`.
        metric: of the neighbours.
        normalization: of features, for neighbours and for heads in closed form.
        weighting: of the votes.
        class_weighting: `none`, `inverse` or `inverse_sqrt`; a kernel head is left out unless it is
            `none`.
        store: makes a datastore from rows; None is `Datastore.from_features`.
        seed: of the heads.
        device: where a linear head is trained; None is the CPU.
        progress: show progress bars.

    Raises:
        ValueError: for a name that is no such head, or rows that cannot be used.
    """
    unknown = [head for head in heads if head not in HEADS]
    if unknown or not heads:
        raise ValueError(
            f"Expected `heads` of {[str(head) for head in HEADS]}, but got {list(heads)}."
        )
    if has_too_few(rows.labels) or not held_out:
        is_lone = len(rows.labels) < 2 * len(rows.labels.unique())
        return HeadChoice(FIXED_HEAD, fixed=FIXED_CELL if is_lone else None)
    left_out = {}
    if ClassWeighting(class_weighting) is not ClassWeighting.NONE and Head.KERNEL in heads:
        left_out = {str(Head.KERNEL): "it takes no class weights"}
    fits = {
        str(head): fit_of(head, num_labels, normalization, class_weighting, seed, device)
        for head in heads
        if head not in left_out
    }
    stored, asked = len(rows.labels), held_out if isinstance(held_out, LabelledRows) else rows
    k = widest(stored, len(asked.labels), num_labels)
    make = store or (lambda some: _store_of(some, metric, normalization))
    answers = ask(rows, held_out, fits, make, k, progress)
    count = len(answers.labels)
    heads_said = {head: answers.of(head) for head in fits}

    def choose_cells(heads: Mapping[str, HeldOut], bars: bool = False) -> dict[str, TuneResult]:
        return {
            head: choose_cell(
                said, count, stored, num_labels, criterion,
                metric=metric, weighting=weighting, progress=bars,
            )
            for head, said in heads.items()
        }  # fmt: skip

    def choose(heads: Mapping[str, HeldOut]) -> tuple[str, TuneResult]:
        cells = choose_cells(heads)
        head = best_of(_table_of(cells), next(iter(cells.values())).rows).head
        return head, cells[head]

    is_few = is_chosen_on_all(count, num_labels, criterion)
    halves = {head: said if is_few else said.halves()[0] for head, said in heads_said.items()}
    results = choose_cells(halves, progress)
    table, chosen_on = _table_of(results), next(iter(results.values())).rows
    best = best_of(table, chosen_on).head
    blend = BlendOf(num_labels, metric, weighting)
    first = None if is_few else (best, results[best])
    judged = judged_by_halves(heads_said, choose, blend, first)
    chosen = HeadChoice(best, table, chosen_on, criterion, left_out)
    return replace(chosen, result=results[best], answers=heads_said[best], judged=judged)


def _table_of(results: Mapping[str, TuneResult]) -> tuple[HeadScore, ...]:
    return tuple(HeadScore(head, result.head, cell_of(result)) for head, result in results.items())


def has_too_few(labels: Tensor) -> bool:
    """Whether there are fewer than 3 labels per class, on average over classes that have rows.

    Args:
        labels: [N] int64 of the rows to learn from.
    """
    return len(labels) < FEWEST_LABELS * len(labels.unique())


def best_of(table: Sequence[HeadScore], count: int) -> HeadScore:
    """Of the heads within one standard error of the best accuracy the likeliest.

    Of equal ones, as where λ = 1 is best for all, the likeliest alone, else the first.

    Args:
        table: of the heads.
        count: rows that they were scored on.
    """
    top = max(score.best.accuracy for score in table)
    error = math.sqrt(top * (1 - top) / count)
    near = [score for score in table if score.best.accuracy >= top - error]
    return max(near, key=lambda score: (score.best.log_likelihood, score.alone.log_likelihood))


def cell_of(result: TuneResult) -> Cell:
    """What the cell that was chosen scored."""
    if result.criterion == Criterion.FIXED:
        return result.fixed
    k = min(result.k, max(cell.k for cell in result.table))  # of few rows fewer vote
    chosen = (k, result.temperature, result.knn_weight)
    return next(cell for cell in result.table if cell[:3] == chosen)


def fit_of(
    head: str,
    num_labels: int,
    normalization: str = Normalization.L2_CENTERED,
    class_weighting: str = ClassWeighting.NONE,
    seed: int = 0,
    device: torch.device | None = None,
    cell: ClosedCell | None = None,
) -> Fit:
    """What makes a head from rows, again and again.

    Args:
        head: of `HEADS`.
        num_labels: C.
        normalization: of the features of a head in closed form.
        class_weighting: of the rows.
        seed: of the head.
        device: where a linear head is trained.
        cell: what a head in closed form is fitted with; None chooses it on the rows of the first
            call, and keeps it for the others: a few numbers, that no single row can move.
    """
    if head == Head.LINEAR:
        return lambda rows: fit_linear(
            rows.head, rows.labels, num_labels,
            class_weighting=class_weighting, seed=seed, device=device,
        ).log_probs  # fmt: skip
    chosen = cell

    def fit(rows: LabelledRows) -> Answer:
        nonlocal chosen
        found = fit_closed(
            head, rows.head, rows.labels, num_labels, normalization=normalization,
            class_weighting=class_weighting, cell=chosen, seed=seed,
        )  # fmt: skip
        chosen = found.cell
        return found.log_probs

    return fit


def _store_of(rows: LabelledRows, metric: str, normalization: str) -> Datastore:
    return Datastore.from_features(
        rows.store, rows.labels, rows.ids, metric=metric, normalization=normalization
    )
