"""What a model says to pictures, by their features: all that predict, sort and a server tell."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..model.explain import Explanation, answer_threshold, typicality_of
from ..model.modeling import KnnForImageClassification
from ..store.backend import as_row_store
from ..store.kinds import FLAT
from .encoders import Encoded

CLASSES, NEIGHBORS = 5, 5
"""Shown of each picture, unless another number is asked for."""


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


def document_of(
    model: KnnForImageClassification,
    name: str,
    found: Answer,
    top: int = CLASSES,
    neighbors: int = NEIGHBORS,
) -> dict[str, Any]:
    """What JSON says about one picture, that of `hf-knn predict --json` and of a server.

    Args:
        model: what answered.
        name: of the picture.
        found: the answer.
        top: classes, >= 1.
        neighbors: stored rows next to it, >= 0.
    """
    if found.error:
        blank: dict[str, Any] = {"image": name, "answer": None, "classes": [], "neighbors": []}
        return blank | {"error": found.error}
    names = model.config.class_names
    classes = order_of(found)[:top]
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
            for label, similarity, row_id in [*columns][:neighbors]
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
