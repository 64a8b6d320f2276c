"""From answers to a `Report`: every number with its interval, every class, every wrong answer."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.search import Neighbors
from ..features.extract import ImageFeatures
from ..model.modeling import KnnForImageClassification
from ..store.backend import as_row_store
from .gallery import Gallery
from .intervals import (
    Number,
    chance_calibration_error,
    compare,
    mean_of,
    mean_of_shares,
    share_of,
)
from .measure import ALL_STORED_NOTE, STORED_NOTE, hear_voices, measure_heard
from .metrics import (
    Labels,
    Scores,
    answers_of,
    bins_of,
    brier_scores,
    expected_calibration_error,
    is_in_top,
    surprises,
)
from .report import NOBODY, ClassRow, Confusion, Near, Report, Wrong

_PAIRS = (("head", "blend"), ("knn", "blend"), ("head", "knn"))
_NAMED = 5


def assess(
    model: KnnForImageClassification,
    features: ImageFeatures,
    device: torch.device,
    *,
    pictures: Mapping[int, Any] | None = None,
    stored_pictures: Mapping[int, Any] | None = None,
    notes: Sequence[str] = (),
) -> Report:
    """Measures a model on labelled pictures.

    Args:
        model: what is asked.
        features: the pictures.
        device: of the head.
        pictures: these pictures by sample id, for the page.
        stored_pictures: stored pictures by row id, likewise; one whose print is not that of the
            row is not shown. None takes small pictures that the model keeps.
        notes: what to know, in sentences.
    """
    heard, names = hear_voices(model, features, device), model.config.class_names
    measured, rest = measure_heard(heard, features.labels), heard.measurable.numpy()
    labels, kept = features.labels.numpy(), features.select(rest)
    wanted = kept.labels.numpy()
    voices = {voice: _listen(said, labels, rest) for voice, said in heard.voices.items()}
    blend, answers = voices["blend"], {voice: said.answers for voice, said in voices.items()}
    cells = _confusion(wanted, blend.answers)
    return Report(
        class_names=tuple(names),
        count=len(rest),
        stored=len(heard.stored),
        voices={voice: said.numbers for voice, said in voices.items()},
        with_stored={v: said.with_stored for v, said in voices.items() if said.with_stored},
        comparisons=tuple(
            compare(first, second, answers[first] == wanted, answers[second] == wanted)
            for first, second in _PAIRS
            if "knn" in answers
        ),
        classes=tuple(_classes(cells, len(names), _rows_by_class(model))),
        confusion=tuple(cells),
        wrong=tuple(_wrong(model, kept, heard.nearest, rest, voices)),
        reliability=measured.reliability,
        chance_error=chance_calibration_error(blend.confidence, bins_of(blend.confidence)),
        metrics={f"eval_{name}": value for name, value in measured.numbers.items()},
        facts=_facts(model),
        notes=(*_notes(len(heard.stored), len(labels), names, voices["head"].unknown), *notes),
        gallery=Gallery(model.memory, pictures, stored_pictures),
    )


class _Voice(NamedTuple):
    """What is kept of a voice, whose [N, C] log-probabilities may be large.

    Attributes:
        numbers: see `Report.voices`.
        with_stored: likewise of all rows; empty if none was left out.
        answers: [n] to the rows that are not left out.
        confidence: [n] of these answers, in [0, 1].
        label_confidence: [n] what it gives their labels.
        unknown: classes that it gives nothing at any row.
    """

    numbers: dict[str, Number]
    with_stored: dict[str, Number]
    answers: Labels
    confidence: Scores
    label_confidence: Scores
    unknown: Labels


def _listen(log_probs: Tensor, labels: Labels, rest: Labels) -> _Voice:
    """Sums up a voice.

    Args:
        log_probs: [N, C].
        labels: [N].
        rest: [n] the rows that are not left out.
    """
    said, with_stored = log_probs.float().double().cpu().numpy(), {}  # as `measure` has them
    if len(rest) < len(labels):
        with_stored = _numbers(said, labels)
        said, labels = said[rest], labels[rest]
    return _Voice(
        _numbers(said, labels), with_stored, answers_of(said),
        np.exp(said.max(axis=1)).clip(max=1.0), np.exp(said[np.arange(len(labels)), labels]),
        np.flatnonzero((said == -np.inf).all(axis=0)),
    )  # fmt: skip


def _numbers(log_probs: Scores, labels: Labels) -> dict[str, Number]:
    """The numbers of a voice, each with its interval; the calibration error has none."""
    right, classes = answers_of(log_probs) == labels, log_probs.shape[1]
    count = len(labels)
    totals, found = (np.bincount(own, minlength=classes) for own in (labels, labels[right]))
    return {
        "top1": share_of(int(right.sum()), count),
        "top5": share_of(int(is_in_top(log_probs, labels, 5).sum()), count),
        "mean_class": mean_of_shares(found, totals),
        "nll": mean_of(surprises(log_probs, labels)),
        "brier": mean_of(brier_scores(log_probs, labels)),
        "ece": Number(expected_calibration_error(log_probs, labels)),
    }


def _confusion(labels: Labels, answers: Labels) -> list[Confusion]:
    pairs, counts = np.unique(np.stack([labels, answers]), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    rows = zip(*pairs[:, order].tolist(), counts[order].tolist(), strict=True)
    return [Confusion(label, answer, count) for label, answer, count in rows]


def _classes(
    cells: Iterable[Confusion], classes: int, rows: NDArray[np.int64] | None
) -> list[ClassRow]:
    count, right, answered = (np.zeros(classes, np.int64) for _ in range(3))
    taken_for: dict[int, tuple[int | None, int]] = {}
    for cell in cells:
        count[cell.label] += cell.count
        if cell.answer != NOBODY:
            answered[cell.answer] += cell.count
        if cell.answer == cell.label:
            right[cell.label] = cell.count
        else:  # they come by their counts
            taken_for.setdefault(cell.label, (cell.answer, cell.count))
    found = []
    for label in range(classes):
        confused_with, confused = taken_for.get(label, (None, 0))
        found.append(ClassRow(
            label, int(count[label]), int(right[label]),
            share_of(int(right[label]), int(count[label])), int(answered[label]),
            share_of(int(right[label]), int(answered[label])),
            confused_with, confused, None if rows is None else int(rows[label]),
        ))  # fmt: skip
    return sorted(found, key=_how_bad)


def _how_bad(row: ClassRow) -> tuple[bool, float, int, int]:
    return not row.count, row.recall.value if row.count else 0.0, -row.count, row.label


def _wrong(
    model: KnnForImageClassification,
    features: ImageFeatures,
    nearest: Neighbors | None,
    places: Labels,
    voices: dict[str, _Voice],
) -> list[Wrong]:
    """The rows that the blend answers wrong.

    Args:
        model: with the datastore.
        features: n rows that are not left out.
        nearest: of all rows; None without neighbours.
        places: [n] among all rows.
        voices: of the n rows.
    """
    labels, blend = features.labels.numpy(), voices["blend"]
    rows = np.flatnonzero(blend.answers != labels)
    rows = rows[np.lexsort((features.ids.numpy()[rows], -blend.confidence[rows]))]
    near = [] if nearest is None else [part[places[rows]].numpy() for part in nearest]
    paths = _paths(model, near[2] if near else np.empty(0, np.int64))
    found = []
    for order, row in enumerate(rows.tolist()):
        columns = (part[order].tolist() for part in near)
        neighbors = tuple(
            Near(row_id, label, similarity, paths.get(row_id, ""))
            for similarity, label, row_id in (zip(*columns, strict=True) if near else ())
        )
        found.append(Wrong(
            int(features.ids[row]), features.paths[row] if features.paths else "",
            int(labels[row]), int(blend.answers[row]), float(blend.confidence[row]),
            float(blend.label_confidence[row]), int(voices["head"].answers[row]),
            int(voices["knn"].answers[row]) if "knn" in voices else None, neighbors,
        ))  # fmt: skip
    return found


def _paths(model: KnnForImageClassification, ids: NDArray[np.int64]) -> dict[int, str]:
    """Where the pictures of rows lie, asked for at once; of a store that only answers none."""
    wanted = np.unique(ids).tolist()
    if not wanted or model.datastore is None:
        return {}
    try:
        store = as_row_store(model.datastore)
    except ValueError:
        return {}
    return dict(zip(wanted, store.paths_of(wanted), strict=True))


def _rows_by_class(model: KnnForImageClassification) -> NDArray[np.int64] | None:
    """[C] stored rows of each class; None where counting them would ask a server for all."""
    if model.datastore is None:
        return None
    try:
        store = as_row_store(model.datastore)
    except ValueError:
        return None
    if store.location is not None:
        return None
    return torch.bincount(store.labels, minlength=model.config.classes).numpy()


def _facts(model: KnnForImageClassification) -> dict[str, Any]:
    config = model.config
    return {
        "head": config.head, "k": config.k, "temperature": config.knn_temperature,
        "λ": config.knn_weight, "rows": 0 if model.datastore is None else len(model.datastore),
        "backbone": getattr(config, "base_model", None) or "",
    }  # fmt: skip


def _notes(stored: int, count: int, names: Sequence[str], unknown: Labels) -> list[str]:
    notes = []
    if stored:
        notes.append(ALL_STORED_NOTE if stored == count else STORED_NOTE.format(stored, count))
    if len(unknown):
        more = len(unknown) - _NAMED
        said = ", ".join(names[label] for label in unknown[:_NAMED].tolist())
        said += f" and {more:,} more" if more > 0 else ""
        notes.append(f"The head does not know {said}: only the neighbours find such pictures.")
    return notes
