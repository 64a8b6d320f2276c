"""A learned metric is trained, tried on rows held out, and kept only where neighbours gain."""

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_knn import Datastore
from hf_knn.data import stratified_folds
from hf_knn.fit import choose_metric
from hf_knn.fit.metric import (
    LEAST_GAIN,
    WIDTH,
    MetricChoice,
    Recipe,
    choose_recipe,
    train_map,
)


def hidden_classes(rows: int = 240, dim: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Six classes that two directions tell apart, under much that has nothing to do with them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 6
    angles = labels * (2 * torch.pi / 6)
    spread = torch.randn(rows, dim, generator=generator)
    spread[:, :2] = 0.15 * spread[:, :2] + torch.stack([angles.cos(), angles.sin()], 1)
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
    return spread @ turn, labels


def make(features: Tensor, labels: Tensor) -> Datastore:
    return Datastore.from_features(features, labels, index="flat")


def choose(features: Tensor, labels: Tensor, seed: int = 0, **options: object) -> MetricChoice:
    folds = stratified_folds(labels, 4, 0)
    return choose_metric(features, labels, 6, folds, make, seed=seed, **options)  # type: ignore[arg-type]


def accuracy(store: Datastore, queries: Tensor, labels: Tensor) -> float:
    votes = torch.nn.functional.one_hot(store.search(queries, 10).labels, 6).sum(1)
    return float((votes.argmax(1) == labels).double().mean())


def test_kept_where_neighbours_gain_much() -> None:
    features, labels = hidden_classes()
    choice = choose(features, labels)
    assert choice.is_kept
    assert choice.rows == 240
    assert choice.learned - choice.plain > 0.2
    assert "kept; neighbours find" in choice.say()
    queries, wanted = hidden_classes(600, seed=0)[0][240:], hidden_classes(600, seed=0)[1][240:]
    train, own = hidden_classes(600, seed=0)[0][:240], hidden_classes(600, seed=0)[1][:240]
    plain, store = make(train, own), choice.give_to(make(train, own))
    assert store.learned_map is not None
    assert store.learned_map.width <= min(WIDTH, 40)
    assert accuracy(store, queries, wanted) > accuracy(plain, queries, wanted) + 0.2


@pytest.mark.parametrize("seed", range(4))
def test_noise_is_kept_by_the_rule_alone(seed: int) -> None:
    features, _ = hidden_classes(120)
    labels = torch.randint(6, (120,), generator=torch.Generator().manual_seed(seed))
    choice = choose(features, labels)
    assert choice.is_kept == (choice.learned - choice.plain > max(choice.error, LEAST_GAIN))
    assert choice.learned < 0.4


def test_not_kept_where_neighbours_find_everything_already() -> None:
    _, labels = hidden_classes()
    noise = torch.randn(240, 20, generator=torch.Generator().manual_seed(1))
    features = 20 * torch.nn.functional.one_hot(labels, 20) + noise
    choice = choose(features, labels)
    assert choice.plain == 1
    assert not choice.is_kept
    assert "not kept" in choice.say()
    store = make(features, labels)
    assert choice.give_to(store) is store
    assert store.learned_map is None


def test_not_kept_without_rows_to_hold_out() -> None:
    features, labels = hidden_classes()
    choice = choose_metric(features[:6], labels[:6], 6, [], make)
    assert not choice.is_kept
    assert "no row could be held out" in choice.say()


def test_the_same_seed_gives_the_same_map() -> None:
    features, labels = hidden_classes()
    first, second = choose(features, labels), choose(features, labels)
    maps = [one.give_to(make(features, labels)).learned_map for one in (first, second)]
    assert maps[0] is not None
    assert maps[1] is not None
    assert torch.equal(maps[0].weight, maps[1].weight)
    state = torch.get_rng_state()
    store = make(features, labels)
    train_map(store, choose_recipe(store, 3), 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_map_is_trained_once_for_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = hidden_classes()
    choice = choose(features, labels)
    fold = stratified_folds(labels, 4, 0)[1]
    store = make(features[fold.fitted], labels[fold.fitted])
    monkeypatch.setattr("hf_knn.fit.metric.train_map", lambda *args: pytest.fail("trained again"))
    assert choice.give_to(store).learned_map is not None


def test_rows_of_one_group_count_once() -> None:
    """Doubled rows say nothing new: the error of the difference stays what it was."""
    features, labels = hidden_classes(120)
    twice, twins = torch.cat([features] * 2), torch.cat([labels] * 2)
    groups = torch.arange(120).repeat(2)
    folds = stratified_folds(twins, 4, 0, groups)
    together = choose_metric(twice, twins, 6, folds, make, groups=groups)
    apart = choose_metric(twice, twins, 6, folds, make)
    assert together.learned == apart.learned
    assert together.error > 1.2 * apart.error


@pytest.mark.parametrize("normalization", ["l2_centered", "l2", "none"])
def test_any_normalisation(normalization: str) -> None:
    features, labels = hidden_classes()
    metric = "l2" if normalization == "none" else "cosine"

    def own(some: Tensor, numbers: Tensor) -> Datastore:
        return Datastore.from_features(
            some, numbers, metric=metric, normalization=normalization, index="flat"
        )

    folds = stratified_folds(labels, 4, 0)
    choice = choose_metric(features, labels, 6, folds, own)
    assert choice.is_kept
    assert choice.learned > choice.plain + 0.2


@pytest.mark.parametrize("rows", [6, 7, 13])
def test_few_rows(rows: int) -> None:
    features, labels = hidden_classes(rows)
    store = make(features, labels)
    weight = train_map(store, choose_recipe(store, 0), 0)
    assert weight.isfinite().all()
    assert weight.shape[0] <= rows


def test_rows_that_are_all_the_same() -> None:
    store = make(torch.ones(8, 5), torch.arange(8) % 2)
    weight = train_map(store, Recipe(1.0, 3), 0)
    assert weight.isfinite().all()
    assert float(weight.abs().max()) > 0


def test_about_as_good_as_the_neighbourhood_components_of_scikit_learn() -> None:
    from sklearn.neighbors import NeighborhoodComponentsAnalysis

    features, labels = hidden_classes(600)
    train, own, queries, wanted = features[:240], labels[:240], features[240:], labels[240:]
    oracle = NeighborhoodComponentsAnalysis(n_components=6, init="pca", random_state=0)
    oracle.fit(train.numpy(), own.numpy())
    theirs, mine = make(train, own), make(train, own)
    theirs.remap(torch.from_numpy(oracle.components_.astype(np.float32)))
    mine.remap(train_map(mine, choose_recipe(mine, 0), 0))
    assert accuracy(mine, queries, wanted) > accuracy(theirs, queries, wanted) - 0.03
