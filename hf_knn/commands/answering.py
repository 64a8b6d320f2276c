"""What `hf-knn predict` says about each picture, and about all of them together."""

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..features.encoders import Encoded
from ..model.explain import Explanation, answer_threshold, typicality_of
from ..model.modeling import KnnForImageClassification
from ..store.backend import as_row_store
from ..store.kinds import FLAT
from .answers import Column, Row

CLASSES, NEIGHBORS = 5, 5
"""Shown of each picture, unless another number is asked for."""

STRANGE_BELOW = 0.05
"""The typicality below which a picture is unlike anything seen."""

UNSURE, STRANGE, DIVIDED = "not sure enough", "unlike anything seen", "head and neighbours disagree"

KEPT = 100
"""Pictures of a page, and lines of a table, at most."""


@dataclass(frozen=True)
class PredictOptions:
    """What `hf-knn predict` was asked.

    Attributes:
        top: classes shown per picture, >= 1; None is 5, and none in a file.
        neighbors: neighbours shown per picture, >= 0; None is 5, and 24 on a page.
        explain: also say why.
        page: an HTML file to write; None prints.
        pictures: folder that the stored paths are relative to; None shows no stored picture.
        max_error: error rate at which it abstains; None always answers.
        json_output: print JSON instead.
        output: a file for all answers; None prints.
        overwrite: replace the file that is there.
        split: which split of a dataset; None is all.
    """

    top: int | None = None
    neighbors: int | None = None
    explain: bool = False
    page: Path | None = None
    pictures: Path | None = None
    max_error: float | None = None
    json_output: bool = False
    output: Path | None = None
    overwrite: bool = False
    split: str | None = None

    @property
    def shown_classes(self) -> int:
        """How many on the screen, and in JSON."""
        return CLASSES if self.top is None else self.top

    @property
    def shown_neighbors(self) -> int:
        """How many on the screen, in JSON and in a file."""
        return NEIGHBORS if self.neighbors is None else self.neighbors

    @property
    def columns(self) -> list[Column]:
        """Of the file."""
        names = [
            ("path", "text"), ("answer", "text"), ("probability", "number"),
            ("head_answer", "text"), ("head_probability", "number"), ("knn_answer", "text"),
            ("knn_probability", "number"), ("nearest_ids", "ids"),
            ("nearest_similarities", "numbers"), ("p_value", "number"), ("abstained", "flag"),
        ]  # fmt: skip
        if self.top is not None:
            names += [("classes", "texts"), ("class_probabilities", "numbers")]
        if self.explain:
            names += [("margin", "number"), ("flip_ids", "ids"), ("flip_answer", "text")]
            names += [("notices", "texts")]
        return [Column(*each) for each in [*names, ("error", "text")]]


class Answer(NamedTuple):
    """What a model says to one picture.

    Attributes:
        number: of the picture.
        error: why it could not be read; empty for one that was, and nothing else is known then.
        blend: [C] probabilities.
        head: [C_head] likewise of the head alone.
        knn: [C] likewise of the neighbours; None without a datastore.
        similarities: of the neighbours, nearest first.
        labels: likewise, class numbers.
        ids: likewise, of the stored rows.
        typicality: see `Explanation`; None if unknown or not asked for.
        explanation: if asked for.
    """

    number: int
    error: str = ""
    blend: Tensor = torch.empty(0)
    head: Tensor = torch.empty(0)
    knn: Tensor | None = None
    similarities: list[float] = []  # noqa: RUF012 - never changed
    labels: list[int] = []  # noqa: RUF012
    ids: list[int] = []  # noqa: RUF012
    typicality: float | None = None
    explanation: Explanation | None = None


class Answerer:
    """Answers pictures by their features, each as the model answers it alone.

    Args:
        model: a checkpoint.
        max_error: error rate at which it abstains.
        explain: also give explanations.
        judge: also say how typical a picture is.

    Attributes:
        threshold: the probability from which it answers.

    Raises:
        ValueError: for an error rate without a threshold.
    """

    def __init__(
        self,
        model: KnnForImageClassification,
        max_error: float | None,
        *,
        explain: bool,
        judge: bool,
    ) -> None:
        self.threshold = answer_threshold(model.config, max_error)
        self._model, self._max_error, self._explain, self._judge = model, max_error, explain, judge
        store = model.datastore
        # an approximate index may find other rows for several pictures than for one of them
        self._is_exact = not store or as_row_store(store).index.spec == FLAT

    def __call__(self, part: Encoded) -> list[Answer]:
        """The answers to some pictures, those that could not be read among them, in their order."""
        answers = [Answer(bad.row, bad.reason) for bad in part.bad]
        if part.features is not None:
            size = len(part.rows) if self._is_exact else 1
            for start in range(0, len(part.rows), size):
                rows = slice(start, start + size)
                answers += self._answers(part.rows[rows], part.features[rows])
        return sorted(answers, key=lambda answer: answer.number)

    def _answers(self, numbers: list[int], features: Tensor) -> Iterator[Answer]:
        with torch.inference_mode():
            output = self._model(features=features.to(self._model.device), return_neighbors=True)
            blend = output.logits.exp().cpu()
            head = output.head_logits.float().softmax(-1).cpu()
            knn = None if output.knn_log_probs is None else output.knn_log_probs.exp().cpu()
        found = output.neighbors
        explained: list[Explanation] = []
        typical: Sequence[float | None] | None = None
        if self._explain:
            reasons = self._model.explain(features=features, max_error=self._max_error)
            explained = reasons if isinstance(reasons, list) else [reasons]
            typical = [each.typicality for each in explained]
        elif self._judge:
            typical = typicality_of(self._model, features, found)
        for row, number in enumerate(numbers):
            yield Answer(
                number, "", blend[row], head[row],
                None if knn is None else knn[row],
                *([] if found is None else (
                    part[row].tolist() for part in (found.similarities, found.labels, found.ids)
                )),
            )._replace(
                typicality=None if typical is None else typical[row],
                explanation=explained[row] if explained else None,
            )  # fmt: skip


def order_of(answer: Answer) -> list[int]:
    """All classes, the most likely first, as explanations have them."""
    return answer.blend.argsort(descending=True, stable=True).tolist()


def row_of(answer: Answer, name: str, class_names: list[str], threshold: float) -> Row:
    """A row of the file with all columns that there can be, but for the reasons.

    Args:
        answer: to one picture.
        name: of the picture.
        class_names: of the model.
        threshold: the probability from which it answers.
    """
    if answer.error:
        return {"path": name, "error": answer.error}
    order = order_of(answer)
    probability = float(answer.blend[order[0]])
    row: Row = {
        "path": name,
        "answer": class_names[order[0]],
        "probability": probability,
        "nearest_ids": answer.ids,
        "nearest_similarities": answer.similarities,
        "p_value": answer.typicality,
        "abstained": probability < threshold,
        "classes": [class_names[each] for each in order],
        "class_probabilities": answer.blend[order].tolist(),
        "error": None,
    }
    for voice, shares in (("head", answer.head), ("knn", answer.knn)):
        best = None if shares is None else shares.max(-1)
        row[f"{voice}_answer"] = None if best is None else class_names[int(best.indices)]
        row[f"{voice}_probability"] = None if best is None else float(best.values)
    return row


def document_of(
    model: KnnForImageClassification, name: str, found: Answer, options: PredictOptions
) -> dict[str, Any]:
    """What `--json` says about one picture.

    Args:
        model: what answered.
        name: of the picture.
        found: the answer.
        options: what was asked.
    """
    if found.error:
        blank: dict[str, Any] = {"image": name, "answer": None, "classes": [], "neighbors": []}
        return blank | {"error": found.error}
    names = model.config.class_names
    classes = order_of(found)[: options.shown_classes]
    head, votes = found.head, found.knn
    answer: dict[str, Any] = {
        "image": name,
        "answer": names[classes[0]],
        "classes": [
            {
                "label": names[c],
                "probability": float(found.blend[c]),
                "head": float(head[c]) if c < len(head) else None,
                "knn": None if votes is None else float(votes[c]),
            }
            for c in classes
        ],
        "neighbors": [],
    }
    if model.datastore is not None:
        columns = zip(found.labels, found.similarities, found.ids, strict=True)
        answer["neighbors"] = [
            {
                "label": names[label],
                "similarity": similarity,
                "id": row_id,
                "path": model.datastore.path_of(row_id),
            }
            for label, similarity, row_id in [*columns][: options.shown_neighbors]
        ]
    if found.explanation is not None:
        _add_reasons(answer, found.explanation)
    return answer | {"error": None}


def _add_reasons(answer: dict[str, Any], explanation: Explanation) -> None:
    """What `--explain` adds to a document, by the names that it has without."""
    shares = {voter.row_id: voter.share for voter in explanation.neighbors}
    for row in answer["neighbors"]:
        row["share"] = shares.get(row["id"], 0.0)
    flip = explanation.flip
    answer |= {
        "answers": explanation.answers,
        "margin": explanation.margin,
        "typicality": explanation.typicality,
        "is_typical": explanation.is_typical,
        "flip": None if flip is None else flip._asdict(),
        "notices": notices(explanation),
    }


def notices(explanation: Explanation) -> list[str]:
    """What one should know before one believes an answer, in sentences."""
    said = []
    if not explanation.answers:
        said.append("Not sure enough for the error rate asked for: better ask somebody.")
    if not explanation.is_typical:
        said.append(
            f"Unlike anything seen: only {explanation.typicality:.1%} of the stored pictures are "
            "as far from their nearest."
        )
    head, knn = next(iter(explanation.head)), next(iter(explanation.knn), None)
    if knn is not None and head != knn:
        said.append(f"Head and neighbours disagree: {head} and {knn}.")
    return said


def flip_text(explanation: Explanation) -> str:
    """What would change the answer, in a sentence."""
    flip = explanation.flip
    if flip is None:
        return (
            f"No set of up to {len(explanation.neighbors)} stored pictures was found without which "
            "the answer would be another one."
        )
    count = len(flip.row_ids)
    rows = "1 stored picture" if count == 1 else f"{count} stored pictures"
    least = "" if flip.is_smallest else " (a smaller set may do)"
    return f"Without {rows} the answer would be {flip.answer}{least}."


def cut(row: Row, options: PredictOptions) -> Row:
    """A row with the columns that were asked for, as long as they were asked for.

    Args:
        row: see `row_of`.
        options: what was asked.
    """
    lengths = dict.fromkeys(("classes", "class_probabilities"), options.shown_classes)
    lengths |= dict.fromkeys(("nearest_ids", "nearest_similarities"), options.shown_neighbors)
    found: Row = {column.name: row.get(column.name) for column in options.columns}
    for name, length in lengths.items():
        if found.get(name) is not None:
            found[name] = found[name][:length]
    return {name: _plain(value) for name, value in found.items()}


def doubts_of(row: Row) -> list[str]:
    """Why an answer should be looked at; empty if nothing speaks against it.

    Args:
        row: see `row_of`.
    """
    doubts = [UNSURE] if row["abstained"] else []
    if row["p_value"] is not None and row["p_value"] < STRANGE_BELOW:
        doubts.append(STRANGE)
    if row["knn_answer"] is not None and row["head_answer"] != row["knn_answer"]:
        doubts.append(DIVIDED)
    return doubts


@dataclass
class Counted:
    """What became of one class.

    Attributes:
        pictures: that were answered with it.
        doubtful: of them, that should be looked at.
        probability: the sum over all of them.
    """

    pictures: int = 0
    doubtful: int = 0
    probability: float = 0.0


@dataclass
class Summary:
    """All answers together, told one after the other in the order of the pictures.

    Attributes:
        classes: by answer.
        seen: pictures so far.
        broken: how many could not be read.
        first_broken: the first of them, and why.
        doubts: how many answers each reason to look at them concerns.
    """

    classes: dict[str, Counted] = field(default_factory=dict)
    seen: int = 0
    broken: int = 0
    first_broken: Row | None = None
    doubts: dict[str, int] = field(default_factory=dict)
    _least: list[tuple[float, int]] = field(default_factory=list)

    def see(self, row: Row) -> None:
        """Hears of the next one."""
        number, self.seen = self.seen, self.seen + 1
        if row["answer"] is None:
            self.broken += 1
            self.first_broken = self.first_broken or row
            return
        probability, doubts = row["probability"] or 0.0, doubts_of(row)
        counted = self.classes.setdefault(row["answer"], Counted())
        counted.pictures += 1
        counted.doubtful += bool(doubts)
        counted.probability += probability
        for doubt in doubts:
            self.doubts[doubt] = self.doubts.get(doubt, 0) + 1
        one = (-probability, -number)
        keep = heapq.heappush if len(self._least) < KEPT else heapq.heappushpop
        keep(self._least, one)

    @property
    def answered(self) -> int:
        """How many could be read."""
        return self.seen - self.broken

    @property
    def least_sure(self) -> list[int]:
        """The pictures with the lowest probability, 100 at most, in their order."""
        return sorted(-number for _, number in self._least)

    @property
    def most_doubtful(self) -> int:
        """The picture with the lowest probability of all that were answered, by its number."""
        return -max(self._least)[1]

    def as_json(self) -> dict[str, Any]:
        """For other programs."""
        classes = {
            name: {
                "pictures": one.pictures,
                "doubtful": one.doubtful,
                "mean_probability": one.probability / one.pictures,
            }
            for name, one in self.by_size()
        }
        counts = {"pictures": self.seen, "answered": self.answered, "broken": self.broken}
        return counts | {"doubts": self.doubts, "classes": classes}

    def by_size(self) -> list[tuple[str, Counted]]:
        """The classes, the largest first."""
        return sorted(self.classes.items(), key=lambda one: (-one[1].pictures, one[0]))


def _plain(value: Any) -> Any:
    """What is not finite is not known."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return [*map(_plain, value)] if isinstance(value, list) else value
