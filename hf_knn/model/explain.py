"""Why an answer is what it is: who voted, what would change it, and is anything like it known."""

import copy
from dataclasses import dataclass
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..core.backbone import split_features
from ..core.config import KnnConfig
from ..core.search import Neighbors
from ..store.backend import RowStore, as_row_store, learned_map_of
from ..store.datastore import Datastore
from ..store.kinds import FLAT
from .flips import Ballot, Doubles, margin_of, smallest_flip, vote_shares

if TYPE_CHECKING:
    from .modeling import KnnForImageClassification


def typicality(nearest: float, calibration: Doubles) -> float:
    """A conformal p-value: how many known rows are as far from the others as a picture is.

    Valid if pictures and rows are exchangeable (Vovk et al., *Algorithmic Learning in a Random
    World*): at level 0.05, 5 % of the pictures of the known kind are called unlike anything seen.

    Args:
        nearest: similarity of a picture to its nearest row.
        calibration: [M] ascending similarities of stored rows to their nearest other row.

    Returns:
        In (0, 1].
    """
    as_far = int(np.searchsorted(calibration, nearest, side="right"))
    return (1 + as_far) / (1 + len(calibration))


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
            picture from its nearest, in (0, 1]: a p-value of "like what was seen", always without
            a learned map, which knows its rows. None without rows, or where they lie mapped on a
            server.
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

    Without a learned map: rows that it was trained on lie nearer to one another than new pictures
    do, so that a p-value behind it would not be one.

    Attributes:
        plain: the rows without a map, or None where that would read all of them from a server.
        nearest: [M] ascending similarities, of at most 5,000 rows taken at random.
    """

    def __init__(self, store: RowStore) -> None:
        self._seen, self.plain = (store, *store.marks), _without_map(store)
        self.nearest: Doubles = np.empty(0)
        if self.plain is None:
            return
        ids = store.ids
        generator = torch.Generator().manual_seed(0)
        rows = store.rows_of(ids[torch.randperm(len(ids), generator=generator)[:_CALIBRATED_ON]])
        found = self.plain.search(rows.features, 1, rows.ids).similarities
        self.nearest = np.sort(found.double().flatten().numpy())

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # copies and pickles of a model count again when they need to

    def p_values(self, found: Neighbors, rows: Tensor, own: Tensor | None) -> list[float] | None:
        """How typical pictures are, see `typicality`.

        Args:
            found: their neighbours in the datastore.
            rows: [B, D] their features, if they have to be searched for without a map.
            own: [B] ids of rows that are left out, or None.
        """
        if self.plain is None:
            return None
        if self.plain is not self._seen[0]:
            found = self.plain.search(rows, 1, own)
        return [typicality(nearest, self.nearest) for nearest in found.similarities[:, 0].tolist()]

    def is_of(self, store: RowStore) -> bool:
        """Whether rows and mean are those that were counted; nothing is read from a server."""
        now = (store, *store.marks)
        return len(now) == len(self._seen) and all(map(is_, now, self._seen))


def _without_map(store: RowStore) -> RowStore | None:
    if learned_map_of(store) is None:
        return store
    if not isinstance(store, Datastore):
        return None
    plain = copy.copy(store)
    plain.remap(None)
    return plain


def typicality_of(
    model: "KnnForImageClassification", features: Tensor, found: Neighbors | None
) -> list[float] | None:
    """How typical pictures are; see `Explanation.typicality`.

    Args:
        model: what answers.
        features: [B, D], as in `pooler_output`.
        found: their neighbours, as the model returns them; None without a datastore.

    Returns:
        B numbers in (0, 1]; None where it is unknown.
    """
    store = model.datastore
    if store is None or found is None or len(store) < 2:
        return None
    rows = split_features(features.to(model.device), model.config)[1].float()
    return _calibrated(model, as_row_store(store)).p_values(found, rows, None)


def _calibrated(model: "KnnForImageClassification", store: RowStore) -> Calibration:
    """The calibration of the rows, counted once for all who ask."""
    with model.once:
        known = model.calibration
        if known is None or not known.is_of(store):
            known = model.calibration = Calibration(store)
        return known


def explain(
    model: "KnnForImageClassification",
    features: Tensor,
    sample_ids: Tensor | None = None,
    *,
    level: float = 0.05,
    max_error: float | None = None,
) -> list[Explanation]:
    """Explains answers; see `KnnForImageClassification.explain`.

    Args:
        model: what answers.
        features: [B, D], as in `pooler_output`.
        sample_ids: [B] rows that are not neighbours, -1 for none.
        level: p-values below it are "unlike anything seen".
        max_error: the error rate at which it abstains.
    """
    if not 0 < level < 1:
        raise ValueError(f"Expected `level` to be in (0, 1), but got {level}.")
    config, threshold = model.config, answer_threshold(model.config, max_error)
    store = model.datastore
    store = as_row_store(store) if store is not None and len(store) else None
    with torch.inference_mode():
        head_part, store_part = split_features(features.to(model.device), config)
        near = wide = None
        if store is not None:
            near, wide = _search(store, config.k, store_part.float(), sample_ids)
        logits, head_logits, votes = model.weigh(head_part, near)
    answers = _Answers(
        logits.exp().cpu(), head_logits.float().cpu(),
        None if votes is None else votes.exp().cpu(), wide, _paths_of(store, near),
        config.metric if store is None else store.metric,
    )  # fmt: skip
    p_values = None
    if store is not None and wide is not None and len(store) > 1:
        p_values = _calibrated(model, store).p_values(wide, store_part.float(), sample_ids)
    return [
        _explain_one(
            config, answers, row, None if p_values is None else p_values[row], level, threshold
        )
        for row in range(len(features))
    ]


class _Answers(NamedTuple):
    """What was found out about some pictures, on the CPU.

    Attributes:
        blend: [B, C] probabilities.
        head: [B, C_head] logits.
        knn: [B, C] probabilities; None without a datastore.
        wide: [B, 2 k] rows, or all there are: those that vote and those that could come after.
        paths: id of each row that votes to where its picture lies.
        metric: of the datastore.
    """

    blend: Tensor
    head: Tensor
    knn: Tensor | None
    wide: Neighbors | None
    paths: dict[int, str]
    metric: str


def _search(
    store: RowStore, k: int, rows: Tensor, sample_ids: Tensor | None
) -> tuple[Neighbors, Neighbors]:
    """The rows that vote, and as many more as could have to be removed: one search for both."""
    found = store.search(rows, 2 * k, sample_ids)
    wide = Neighbors(*(part.cpu() for part in found))
    if store.index.spec != FLAT:  # which may miss a row that it finds when asked for more
        return store.search(rows, k, sample_ids), wide
    return Neighbors(*(part[:, :k] for part in found)), wide


def _paths_of(store: RowStore | None, near: Neighbors | None) -> dict[int, str]:
    """Where the pictures of all voters lie, asked for at once."""
    if store is None or near is None:
        return {}
    ids = near.ids.unique().tolist()
    return dict(zip(ids, store.paths_of(ids), strict=True))


def _explain_one(
    config: KnnConfig,
    answers: _Answers,
    row: int,
    p_value: float | None,
    level: float,
    threshold: float,
) -> Explanation:
    names = config.class_names
    blend, head, wide = answers.blend[row], answers.head[row], answers.wide
    named: dict[str, Any] = {
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
        config.blended_classes, config.knn_weight, config.knn_temperature, answers.metric,
        config.knn_weighting, is_all=len(labels) < 2 * config.k,
    )  # fmt: skip
    shares, found = vote_shares(ballot), smallest_flip(ballot)
    columns = (ids, labels.tolist(), similarities.tolist(), shares.tolist())
    voters = [  # the first k of them: there are no more shares
        Voter(row_id, names[label], similarity, share, answers.paths[row_id])
        for row_id, label, similarity, share in zip(*columns, strict=False)
    ]
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


def answer_threshold(config: KnnConfig, max_error: float | None) -> float:
    """The probability from which a model answers.

    Args:
        config: of the model.
        max_error: the error rate asked for; None always answers.

    Raises:
        ValueError: for an error rate that no threshold was found for.
    """
    if max_error is None:
        return 0.0
    known = config.answer_thresholds
    if f"{max_error:g}" not in known:
        raise ValueError(
            f"Expected `max_error` to be one of {sorted(map(float, known))}, the error rates that "
            f"a threshold was found for, but got {max_error:g}; tune on held-out pictures, or on "
            "more of them."
        )
    return known[f"{max_error:g}"]
