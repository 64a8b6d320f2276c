"""The smallest set of rows that changes an answer, against trying every set on the real model."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from support.pictures import small_model
from torch import Tensor

from hf_knn import Datastore, blend_log_probs, knn_log_probs
from hf_knn.model.flips import Ballot, margin_of, smallest_flip, vote_shares

CLASSES = 4


def ballot_of(seed: int, rows: int = 8, **options: Any) -> Ballot:
    """A random ballot of all rows; without options, head and neighbours count alike."""
    generator = torch.Generator().manual_seed(seed)
    similarities = torch.rand(rows, generator=generator).sort(descending=True).values
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    head = torch.zeros(CLASSES)
    known = options.pop("head_classes", CLASSES)
    head[:known] = torch.rand(known, generator=generator)
    options.setdefault("tuned", known)
    values = {"k": 3, "knn_weight": 0.5, "temperature": 0.5, "metric": "cosine"}
    values |= {"weighting": "softmax", "is_all": True} | options
    return Ballot(similarities, labels, head=(head / head.sum()).double(), **values)  # type: ignore[arg-type]


def answer_without(ballot: Ballot, removed: Any) -> int:
    """By the public functions, as the model does it."""
    kept = [i for i in range(len(ballot.labels)) if i not in removed][: ballot.k]
    votes = knn_log_probs(
        ballot.similarities[kept].unsqueeze(0), ballot.labels[kept].unsqueeze(0), CLASSES,
        ballot.temperature, metric=ballot.metric, weighting=ballot.weighting,
    )  # fmt: skip
    blend = blend_log_probs(
        ballot.head.log().unsqueeze(0), votes.double(), ballot.knn_weight, ballot.tuned
    )
    return int(blend.argmax())


def smallest_by_trying(ballot: Ballot, most: int) -> int | None:
    before = answer_without(ballot, ())
    for size in range(1, most + 1):
        for removed in combinations(range(len(ballot.labels)), size):
            if answer_without(ballot, removed) != before:
                return size
    return None


OPTIONS: list[dict[str, Any]] = [
    {},
    {"k": 1},
    {"k": 8},
    {"knn_weight": 0.0},
    {"knn_weight": 1.0},
    {"knn_weight": 0.9, "temperature": 0.05},
    {"weighting": "uniform", "k": 4},
    {"weighting": "inverse_distance"},
    {"head_classes": 2},
    {"head_classes": 3, "knn_weight": 0.0},
    {"head_classes": 2, "knn_weight": 1.0, "k": 5},
    {"tuned": 2, "knn_weight": 0.2},
    {"tuned": 3, "head_classes": 4, "weighting": "uniform"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_smaller_set_of_all_sets_changes_the_answer(options: dict[str, Any]) -> None:
    changed = 0
    for seed in range(25):
        ballot = ballot_of(seed, **options)
        found, wanted = smallest_flip(ballot), smallest_by_trying(ballot, 8)
        assert (found is None) == (wanted is None), seed
        if found is None:
            continue
        rows, answer, is_smallest = found
        changed += 1
        assert is_smallest
        assert len(rows) == wanted, seed
        assert answer_without(ballot, rows) == answer != answer_without(ballot, ())
    assert changed > 5 or options.get("knn_weight") == 0.0


@pytest.mark.parametrize("weighting", ["rank", "inverse_distance"])
def test_where_terms_depend_on_others_the_set_works(weighting: str) -> None:
    changed = 0
    for seed in range(25):
        ballot = ballot_of(seed, weighting=weighting)
        if weighting == "inverse_distance":
            ballot.similarities[:2] = 1.0  # zero distances take all the weight
        found = smallest_flip(ballot)
        if found is not None:
            changed += 1
            assert not found[2]
            assert answer_without(ballot, found[0]) == found[1] != answer_without(ballot, ())
    assert changed > 5


def test_rows_beyond_the_ballot_are_not_forgotten() -> None:
    ballot = ballot_of(0, rows=6, k=3)._replace(labels=torch.zeros(6, dtype=torch.int64))
    ballot = ballot._replace(head=torch.tensor([0.1, 0.9, 0.0, 0.0]).double(), knn_weight=0.9)
    assert smallest_flip(ballot._replace(is_all=False)) is None  # others may be of class 0 too
    found = smallest_flip(ballot)
    assert found is not None
    assert (len(found[0]), found[1]) == (6, 1)


def test_the_flip_of_a_real_model_is_what_forgetting_does() -> None:
    model: Any = small_model(CLASSES, k=4, knn_temperature=0.3)
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(30, 16, generator=generator)
    model.datastore = Datastore.from_features(
        features, torch.randint(CLASSES, (30,), generator=generator)
    )
    queries = torch.randn(12, 16, generator=generator)
    flips = 0
    for query in queries.split(1):
        (found,) = model.explain(features=query)
        if found.flip is None:
            continue
        flips += 1
        model.forget(found.flip.row_ids)
        (after,) = model.explain(features=query)
        assert after.answer == found.flip.answer != found.answer
        model.undo()
        if len(found.flip.row_ids) > 1:  # one less is not enough
            model.forget(found.flip.row_ids[1:])
            assert model.explain(features=query)[0].answer == found.answer
            model.undo()
    assert flips > 6


def test_shares_and_margin_are_those_of_the_vote() -> None:
    ballot = ballot_of(1, k=5)
    shares = vote_shares(ballot)
    votes: Tensor = torch.zeros(CLASSES, dtype=torch.float64)
    votes.index_add_(0, ballot.labels[:5], shares)
    wanted = knn_log_probs(
        ballot.similarities[:5].unsqueeze(0), ballot.labels[:5].unsqueeze(0), CLASSES, 0.5
    )
    np.testing.assert_allclose(votes, wanted[0].exp(), rtol=1e-5)
    first, second = votes.sort(descending=True).values[:2].tolist()
    assert margin_of(shares, ballot.labels[:5], CLASSES) == pytest.approx(first - second)
    assert margin_of(torch.ones(1), torch.zeros(1, dtype=torch.int64), 1) == 1.0
