"""The heads that `hf-knn train --head auto` chooses among, and what it chooses.

Each is fitted as the command does it, and measured alone and beside the neighbours, at the cell
that `compare_heads` gives it on what is held out; `auto` is the head and the cell that it takes.
Beside them stand the linear head and the blend of the other protocols, which have six trials.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hf_knn.fit import (
    ClosedCell,
    HeadChoice,
    LabelledRows,
    compare_heads,
    fit_closed,
    fit_linear,
)
from study.arms import Arm
from study.arms_of import Voices
from study.phases import HEADS as FIT_HEADS
from study.pool import Rows

CLOSED = ("ridge", "kernel", "lda")
HEADS = ("linear", *CLOSED)


def measure_heads(voices: Voices) -> dict[str, Arm]:
    """Every head alone and beside the neighbours, the neighbours alone, and `auto`."""
    choice = _compare(voices)
    cells = {str(score.head): score.best for score in choice.table}
    arms = {head: _head(voices, head) for head in HEADS}
    beside = {
        f"blend:{head}+knn": voices.at_cell(arm, cells.get(head, choice.result))
        for head, arm in arms.items()
    }
    arms |= {"trials": voices.head, "knn": voices.knn} | beside
    return arms | {"blend:trials+knn": voices.blend, "auto": _chosen(voices, choice)}


def linear_head(voices: Voices) -> Arm:
    """The linear head of `hf-knn train`, one recipe, on the training pictures."""
    if "linear" not in voices.fitted:
        train = voices.split.train
        with voices.phases.phase(FIT_HEADS):
            fit = fit_linear(train.head, train.labels, voices.num_labels, seed=voices.seed)
        voices.fitted["linear"] = _asked(voices, fit.log_probs, {})
    return voices.fitted["linear"]


def closed_head(voices: Voices, kind: str, cell: ClosedCell | None = None) -> Arm:
    """A head in closed form, on the training pictures; it is fitted once.

    Args:
        voices: of a split.
        kind: `ridge`, `kernel` or `lda`.
        cell: what it is fitted with; None chooses by leave-one-out.
    """
    key = kind if cell is None else f"{kind} as given"
    if key not in voices.fitted:
        train = voices.split.train
        with voices.phases.phase(FIT_HEADS):
            found = fit_closed(
                kind, train.head, train.labels, voices.num_labels, cell=cell, seed=voices.seed
            )
        chosen: dict[str, Any] = {
            "regularizer": found.fit.regularizer, "calibration": found.cell.temperature,
        }  # fmt: skip
        if found.cell.map is not None:
            chosen |= found.cell.map._asdict()
        voices.fitted[key] = _asked(voices, found.log_probs, chosen)
    return voices.fitted[key]


def _compare(voices: Voices) -> HeadChoice:
    train, validation, _ = voices.split
    held = _labelled(validation) if voices.has_validation else voices.folds
    with voices.phases.phase(FIT_HEADS):
        return compare_heads(_labelled(train), held, voices.num_labels, seed=voices.seed)


def _chosen(voices: Voices, choice: HeadChoice) -> Arm:
    """What the model answers that has the head and the cell that were chosen."""
    head = _head(voices, str(choice.head), choice.fixed)
    found = voices.at_cell(head, choice.result)
    return Arm(found.validation, found.test, {"head": str(choice.head), **found.chosen})


def _head(voices: Voices, head: str, cell: ClosedCell | None = None) -> Arm:
    return linear_head(voices) if head == "linear" else closed_head(voices, head, cell)


def _asked(voices: Voices, answer: Callable[[Tensor], Tensor], chosen: dict[str, Any]) -> Arm:
    _, validation, test = voices.split
    held = answer(validation.head) if voices.has_validation else None
    return Arm(held, answer(test.head), chosen)


def _labelled(rows: Rows) -> LabelledRows:
    return LabelledRows(rows.head, rows.store, rows.labels)
