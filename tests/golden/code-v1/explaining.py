"""Why an answer is what it is: who voted, what would change it, and is anything like it known."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .backbone import split_features
from .confidence import typicality
from .datastore import Datastore
from .flips import Ballot, Doubles, margin_of, smallest_flip, vote_shares
from .indexing import FLAT
from .search_backend import Neighbors

_CALIBRATED_ON = 5000


class Voter(NamedTuple):
    """A neighbour and its part in the vote.

    Attributes:
        row_id: of the stored row.
        label: its class name.
        similarity: higher is closer.
        share: of the vote, in [0, 1].
        path: where its picture lies; empty if unknown.
    """

    row_id: int
    label: str
    similarity: float
    share: float
    path: str


class Flip(NamedTuple):
    """Stored rows without which the answer would be another one, the head as it is.

    Attributes:
        row_ids: what to remove, nearest first.
        answer: the class that it would be then.
        is_smallest: whether no smaller set does it; else it is the smallest one that was found.
    """

    row_ids: list[int]
    answer: str
    is_smallest: bool


@dataclass(frozen=True)
class Explanation:
    """One answer and its reasons.

    Attributes:
        answer: the class name.
        probabilities: class name to blended probability, most likely first.
        head: likewise of the head alone.
        knn: likewise of the neighbours alone; empty without a datastore.
        neighbors: the rows that voted, nearest first.
        margin: share of the vote of its first class minus that of its second, in [0, 1].
        flip: what would change the answer; None if no set as large as was looked for does.
        typicality: share of stored rows that lie as far from their nearest other row as this
            picture from its nearest, in (0, 1]: a p-value of "like what was seen". None without.
        is_typical: False for "unlike anything seen": the p-value is below the level asked for.
        answers: False if it rather abstains, for the error rate asked for.
    """

    answer: str
    probabilities: dict[str, float]
    head: dict[str, float]
    knn: dict[str, float]
    neighbors: list[Voter]
    margin: float
    flip: Flip | None
    typicality: float | None
    is_typical: bool
    answers: bool


class Calibration:
    """How near stored rows lie to their nearest other row, as long as the rows stay the same.

    Attributes:
        nearest: [M] ascending similarities, of at most 5,000 rows taken at random.
    """

    def __init__(self, store: Any) -> None:
        self._seen = _marks(store)
        if isinstance(store, Datastore):
            generator = torch.Generator().manual_seed(0)
            rows = torch.randperm(len(store), generator=generator)[:_CALIBRATED_ON]
            asked = store.subset(store.ids[rows])
            found = store.search(asked.features, 1, asked.ids).similarities
        else:
            found = torch.cat([near.similarities for near in store.leave_one_out(1)])
        self.nearest: Doubles = np.sort(found.double().flatten().numpy())

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # copies and pickles of a model count again when they need to

    def is_of(self, store: Any) -> bool:
        """Whether rows and mean are those that were counted."""
        now = _marks(store)
        return len(now) == len(self._seen) and all(map(_is_same, self._seen, now))


def _marks(store: Any) -> tuple[Any, ...]:
    """What is something else once rows or mean have changed; nothing is read from a server."""
    if isinstance(store, Datastore):
        return store, store.ids, store.mean
    return store, getattr(store, "fingerprint", store.mean)


def _is_same(first: Any, second: Any) -> bool:
    return first is second or (isinstance(first, str) and first == second)


def explain(
    model: Any,
    features: Tensor,
    sample_ids: Tensor | None = None,
    *,
    level: float = 0.05,
    max_error: float | None = None,
) -> list[Explanation]:
    """Explains answers; see `KnnForImageClassification.explain`.

    Args:
        model: a `KnnForImageClassification`.
        features: [B, D], as in `pooler_output`.
        sample_ids: [B] rows that are not neighbours, -1 for none.
        level: p-values below it are "unlike anything seen".
        max_error: the error rate at which it abstains.
    """
    if not 0 < level < 1:
        raise ValueError(f"Expected `level` to be in (0, 1), but got {level}.")
    threshold = _threshold(model, max_error)
    with torch.inference_mode():
        head_part, store_part = split_features(features.to(model.device), model.config)
        near, wide = _search(model, store_part.float(), sample_ids)
        logits, head_logits, votes = model.weigh(head_part, near)
    answers = _Answers(
        logits.exp().cpu(), head_logits.float().cpu(),
        None if votes is None else votes.exp().cpu(), wide,
    )  # fmt: skip
    calibration = None
    if wide is not None and len(model.datastore) > 1:
        calibration = _calibration(model).nearest
    return [
        _explain_one(model, answers, row, calibration, level, threshold)
        for row in range(len(features))
    ]


class _Answers(NamedTuple):
    """What was found out about some pictures, on the CPU.

    Attributes:
        blend: [B, C] probabilities.
        head: [B, C_head] logits.
        knn: [B, C] probabilities; None without a datastore.
        wide: [B, 2 k] rows, or all there are: those that vote and those that could come after.
    """

    blend: Tensor
    head: Tensor
    knn: Tensor | None
    wide: Neighbors | None


def _search(
    model: Any, rows: Tensor, sample_ids: Tensor | None
) -> tuple[Neighbors | None, Neighbors | None]:
    """The rows that vote, and as many more as could have to be removed: one search for both."""
    store, k = model.datastore, model.config.k
    if store is None or len(store) == 0:
        return None, None
    found = store.search(rows, 2 * k, sample_ids)
    wide = Neighbors(*(part.cpu() for part in found))
    if store.index.spec != FLAT:  # which may miss a row that it finds when asked for more
        return store.search(rows, k, sample_ids), wide
    return Neighbors(*(part[:, :k] for part in found)), wide


def _explain_one(
    model: Any,
    answers: _Answers,
    row: int,
    calibration: Doubles | None,
    level: float,
    threshold: float,
) -> Explanation:
    config, names = model.config, model.config.class_names
    blend, head, wide = answers.blend[row], answers.head[row], answers.wide
    named = {
        "answer": names[int(blend.argmax())],
        "probabilities": _named(blend, names),
        "head": _named(functional.softmax(head, dim=0), names),
        "answers": float(blend.max()) >= threshold,
    }
    if answers.knn is None or wide is None or wide.ids.shape[1] == 0:
        return Explanation(
            **named, knn={}, neighbors=[], margin=0.0, flip=None, typicality=None, is_typical=True
        )
    similarities, labels, ids = wide.similarities[row], wide.labels[row], wide.ids[row].tolist()
    ballot = Ballot(
        similarities, labels, min(config.k, len(labels)),
        functional.pad(functional.softmax(head, dim=0).double(), (0, config.classes - len(head))),
        config.blended_classes, config.knn_weight, config.knn_temperature, model.datastore.metric,
        config.knn_weighting, is_all=len(labels) < 2 * config.k,
    )  # fmt: skip
    shares, found = vote_shares(ballot), smallest_flip(ballot)
    columns = (ids, labels.tolist(), similarities.tolist(), shares.tolist())
    paths = model.datastore.paths_of(ids[: ballot.k])
    voters = [
        Voter(row_id, names[label], similarity, share, path)
        for row_id, label, similarity, share, path in zip(*columns, paths, strict=False)
    ]
    p_value = None if calibration is None else typicality(float(similarities[0]), calibration)
    return Explanation(
        **named,
        knn=_named(answers.knn[row], names),
        neighbors=voters,
        margin=margin_of(shares, labels[: ballot.k], config.classes),
        flip=None if found is None else Flip([ids[i] for i in found[0]], names[found[1]], found[2]),
        typicality=p_value,
        is_typical=p_value is None or p_value >= level,
    )


def _named(probabilities: Tensor, names: list[str]) -> dict[str, float]:
    order = probabilities.argsort(descending=True, stable=True)
    return {names[n]: p for n, p in zip(order.tolist(), probabilities[order].tolist(), strict=True)}


def _calibration(model: Any) -> Calibration:
    if model.calibration is None or not model.calibration.is_of(model.datastore):
        model.calibration = Calibration(model.datastore)
    return model.calibration


def _threshold(model: Any, max_error: float | None) -> float:
    if max_error is None:
        return 0.0
    known = model.config.answer_thresholds
    if f"{max_error:g}" not in known:
        raise ValueError(
            f"Expected `max_error` to be one of {sorted(map(float, known))}, the error rates that "
            f"a threshold was found for, but got {max_error:g}; tune on held-out pictures, or on "
            "more of them."
        )
    return known[f"{max_error:g}"]
