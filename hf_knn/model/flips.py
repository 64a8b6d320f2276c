"""What would change an answer: the smallest set of stored rows without which it is another one.

Everything here is about one picture, the head as it is.
"""

from collections.abc import Iterator
from heapq import heappush, heappushpop
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.votes import Metric, Weighting, neighbor_log_weights, squared_distances

Doubles = NDArray[np.float64]
_ROUNDING = 1e-12
_SMALLEST_TOTAL = 1e-200  # below it, weights beside the nearest row's have lost digits


class Ballot(NamedTuple):
    """What decides one answer.

    Attributes:
        similarities: [K] of the nearest rows, more than vote, nearest first.
        labels: [K] int64.
        k: how many vote.
        head: [C] float64 probabilities of the head, 0 for a class that it does not know.
        tuned: how many classes, the first ones, λ holds for.
        knn_weight: λ.
        temperature: of the vote.
        metric: of the similarities.
        weighting: of the vote.
        is_all: whether there are no rows beyond the K.
    """

    similarities: Tensor
    labels: Tensor
    k: int
    head: Tensor
    tuned: int
    knn_weight: float
    temperature: float
    metric: str
    weighting: str
    is_all: bool


def vote_shares(ballot: Ballot) -> Tensor:
    """[k] float64 shares of the vote."""
    weights = neighbor_log_weights(
        ballot.similarities[: ballot.k].unsqueeze(0), ballot.temperature, metric=ballot.metric,
        weighting=ballot.weighting,
    )  # fmt: skip
    return weights.squeeze(0).exp()


def margin_of(shares: Tensor, labels: Tensor, classes: int) -> float:
    """Share of the vote of its first class minus that of its second."""
    totals = torch.zeros(max(2, classes), dtype=torch.float64)
    best = totals.index_add(0, labels, shares.double()).topk(2).values
    return float(best[0] - best[1])


def smallest_flip(ballot: Ballot) -> tuple[list[int], int, bool] | None:
    """The smallest set of rows whose removal changes the answer, the head as it is.

    When rows go, the next ones vote. With weights that depend on a row's own distance alone, class
    c beats class a if a sum over the k voters of ``w_j (g_c(y_j) - g_a(y_j))`` is positive, where g
    is linear in the labels (method.md, section 5). So the best m rows to remove of the nearest
    k + m are those with the m smallest terms, and trying m = 1, 2, … is exact. Where weights depend
    on the rank, or zero distances take them all, terms change with every removal; then the set is
    one that works, found greedily.

    Args:
        ballot: with K > k similarities; at most K - k rows, or all, are removed.

    Returns:
        Places of the rows, the class that would win, and whether no smaller set does it; None if
        none was found.
    """
    weights = _own_weights(ballot)
    if weights is None:
        return _greedy_flip(ballot)
    labels = ballot.labels.numpy()
    answer = _winner(ballot, np.arange(len(labels)), weights)
    rivals = _rivals(ballot, answer)
    gains = _gains(ballot, rivals, labels) - _gains(ballot, [answer], labels)  # [R, K]
    best: tuple[list[int], int] | None = None
    for terms in _hopeful(weights * gains, ballot):
        most = len(labels) if best is None else len(best[0]) - 1
        for removed in _cheapest(terms, ballot.k, most, ballot.is_all):
            kept = np.setdiff1d(np.arange(len(labels)), removed)
            winner = _winner(ballot, kept, weights)
            if winner != answer:
                best = (removed, winner)
                break
    return None if best is None else (*best, True)


def _hopeful(terms: Doubles, ballot: Ballot) -> Doubles:
    """The rows of [R, K] terms of which the k largest, nobody else voting, would be enough."""
    if ballot.is_all or terms.shape[1] <= ballot.k or not len(terms):
        return terms
    largest = np.partition(terms, -ballot.k, axis=1)[:, -ballot.k :].sum(axis=1)
    return terms[largest >= -_ROUNDING * np.abs(terms).max(axis=1)]


def _rivals(ballot: Ballot, answer: int) -> list[int]:
    """Classes that could win: those with rows, and the head's best without."""
    known = set(ballot.labels.tolist())
    silent = [c for c in range(len(ballot.head)) if c not in known]
    best = max(silent, key=lambda c: float(ballot.head[c]), default=answer)
    return sorted((known | {best}) - {answer})


def _cheapest(terms: Doubles, k: int, most: int, is_all: bool) -> Iterator[list[int]]:
    """For m = 1, 2, …: the m rows whose removal leaves the largest sum, if that is not below 0.

    Of the first k + m rows those with the m smallest terms, kept in a heap while m grows.
    """
    kept: list[tuple[float, int]] = []
    removed: list[int] = []
    total, least = 0.0, -_ROUNDING * float(np.abs(terms).max(initial=0))
    for place, term in enumerate(terms.tolist()):
        if len(removed) == most:
            return
        if len(kept) < k:
            heappush(kept, (term, -place))
            total += term
            continue
        smallest, gone = heappushpop(kept, (term, -place))
        removed.append(-gone)
        total += term - smallest
        if total >= least:
            yield sorted(removed)
    kept.sort(reverse=True)
    while is_all and kept and len(removed) < most:  # nobody takes their places
        smallest, gone = kept.pop()
        removed.append(-gone)
        total -= smallest
        if total >= least or not kept:
            yield sorted(removed)


def _greedy_flip(ballot: Ballot) -> tuple[list[int], int, bool] | None:
    places = np.arange(len(ballot.labels))
    labels = ballot.labels.numpy()
    answer, removed = _winner(ballot, places), []
    while ballot.is_all or len(places) > ballot.k:
        voters = places[: ballot.k]
        own = voters[labels[voters] == answer]
        if not len(own):
            return None
        removed.append(int(own[0]))
        places = places[places != own[0]]
        winner = _winner(ballot, places)
        if winner != answer:
            return removed, winner, False
    return None


def _own_weights(ballot: Ballot) -> Doubles | None:
    """[K] what each row weighs whoever else votes, up to a factor; None if there is no such."""
    weighting = Weighting(ballot.weighting)
    distances = squared_distances(ballot.similarities.double(), ballot.metric).numpy()
    if weighting is Weighting.UNIFORM:
        return np.ones(len(distances))
    if weighting is Weighting.SOFTMAX:
        return np.exp(-(distances - distances[:1]) / ballot.temperature)
    rounding = 4 * np.finfo(np.float32).eps if ballot.metric == Metric.COSINE else 0
    if weighting is Weighting.INVERSE_DISTANCE and not (distances <= rounding).any():
        return 1 / np.sqrt(distances)
    return None


def _gains(ballot: Ballot, classes: list[int], labels: NDArray[np.int64]) -> Doubles:
    """[C', K] what a unit of weight of each row gives each of some classes."""
    wanted = np.array(classes, np.int64)[:, None]
    own = np.where(wanted < ballot.tuned, ballot.knn_weight, 1.0) * (labels == wanted)
    return own + (1 - ballot.knn_weight) * ballot.head.numpy()[wanted] * (labels < ballot.tuned)


def _winner(ballot: Ballot, kept: NDArray[np.int64], weights: Doubles | None = None) -> int:
    """The answer when only some rows, by place, are there; the head's if none is.

    Args:
        ballot: of the picture.
        kept: places of the rows.
        weights: [K] of `_own_weights`, if they are known.
    """
    voters = kept[: ballot.k]
    scores = ballot.head.numpy()
    if len(voters):
        shares, labels = _shares_among(ballot, voters, weights), ballot.labels.numpy()[voters]
        votes: Doubles = np.bincount(labels, shares, minlength=len(scores)).astype(np.float64)
        scores = scores * (1 - ballot.knn_weight) * votes[: ballot.tuned].sum()
        votes[: ballot.tuned] *= ballot.knn_weight
        scores = scores + votes
    return int(scores.argmax())


def _shares_among(ballot: Ballot, voters: NDArray[np.int64], weights: Doubles | None) -> Doubles:
    """[k] shares of the vote of the rows at some places."""
    own = None if weights is None else weights[voters]
    if own is not None and own.sum() > _SMALLEST_TOTAL:
        return own / own.sum()
    left = ballot._replace(similarities=ballot.similarities[torch.from_numpy(voters)])
    shares: Doubles = vote_shares(left._replace(k=len(voters))).numpy()
    return shares
