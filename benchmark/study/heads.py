"""The heads that `hf-knn train --head auto` chooses among, and what it chooses.

Each is measured alone and beside the neighbours, at the cell that `compare_heads` gives it on what
is held out; `auto` is the head and the cell that `compare_heads` takes.
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
    """Every head alone and beside the neighbours, the neighbours alone, and `auto`.

    The linear head and its blend are those of the other protocols, with six trials.
    """
    arms = {"linear": voices.head} | {kind: closed_head(voices, kind) for kind in CLOSED}
    choice = _compare(voices)
    cells = {str(score.head): score.best for score in choice.table}
    beside = {kind: voices.at_cell(arms[kind], cells.get(kind, choice.result)) for kind in CLOSED}
    arms |= {"knn": voices.knn, "blend:linear+knn": voices.blend}
    arms |= {f"blend:{kind}+knn": arm for kind, arm in beside.items()}
    return arms | {"auto": _chosen(voices, choice)}


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
    if choice.head == "linear":
        train = voices.split.train
        with voices.phases.phase(FIT_HEADS):
            fit = fit_linear(train.head, train.labels, voices.num_labels, seed=voices.seed)
        head = _asked(voices, fit.log_probs, {})
    else:
        head = closed_head(voices, str(choice.head), choice.fixed)
    found = voices.at_cell(head, choice.result)
    return Arm(found.validation, found.test, {"head": str(choice.head), **found.chosen})


def _asked(voices: Voices, answer: Callable[[Tensor], Tensor], chosen: dict[str, Any]) -> Arm:
    _, validation, test = voices.split
    held = answer(validation.head) if voices.has_validation else None
    return Arm(held, answer(test.head), chosen)


def _labelled(rows: Rows) -> LabelledRows:
    return LabelledRows(rows.head, rows.store, rows.labels)
