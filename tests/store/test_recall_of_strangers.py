"""The recall that is stated holds for queries unlike the rows; what is aimed at, near the rows."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.oracles import similarity_matrix
from support.stored import read_manifest, write_manifest
from torch import Tensor

from hf_knn.core.manifest import MEASURED_ON, DatastoreError, IndexInfo
from hf_knn.store import effort
from hf_knn.store.choice import pays
from hf_knn.store.datastore import Datastore
from hf_knn.store.recall import RecallTest, queries_for, worst

COUNT, WIDTH, K = 4000, 32, 20
ROWS, PERTURBED, STRANGERS = MEASURED_ON


def clustered(seed: int, count: int, places: int = 1, offset: float = 0.0) -> Tensor:
    """Around 100 places; others where `places` is another number."""
    generator = torch.Generator().manual_seed(seed)
    middle = torch.randn(100, WIDTH, generator=torch.Generator().manual_seed(places))
    chosen = torch.randint(100, (count,), generator=generator)
    return offset + middle[chosen] + 0.3 * torch.randn(count, WIDTH, generator=generator)


def elsewhere(offset: float) -> dict[str, Tensor]:
    """Queries that no row is like."""
    generator = torch.Generator().manual_seed(3)
    return {
        "other places": clustered(4, 300, places=77, offset=offset),
        "noise": offset + torch.randn(300, WIDTH, generator=generator),
        "a cube": offset + 4 * torch.rand(300, WIDTH, generator=generator) - 2,
    }


def true_recall(store: Datastore, queries: Tensor) -> float:
    """By brute force in float64."""
    found = store.search(queries, K).ids.numpy()
    best = store.ids.numpy()[np.argsort(-similarity_matrix(store, queries), axis=1)[:, :K]]
    return float((best[:, :, None] == found[:, None, :]).any(axis=2).mean())


LISTS = ["IVF64,Flat", "IVF64,SQ8", "IVF64,SQfp16", "IVF64,RaBitQfs,Refine(SQfp16)"]
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("IVF16,PQ8x4", "PQ8x4")]


@pytest.mark.parametrize("index", [*LISTS, "HNSW8", *SLOW])
@pytest.mark.parametrize(
    ("space", "offset"),
    [
        (("cosine", "l2_centered"), 5.0), (("l2", "none"), 0.0),
        pytest.param(("cosine", "l2"), 0.0, marks=pytest.mark.slow),
    ],
)  # fmt: skip
@pytest.mark.parametrize("min_recall", [pytest.param(0.5, marks=pytest.mark.slow), 0.99])
def test_strangers_get_the_recall_that_is_stated(
    index: str, space: tuple[str, str], offset: float, min_recall: float
) -> None:
    store = Datastore.from_features(
        clustered(0, COUNT, offset=offset), [0] * COUNT, None, *space, index,
        min_recall=min_recall,
    )  # fmt: skip
    store.build_index()
    stated = store.index.recall
    assert stated is not None
    assert store.index.measured_on in MEASURED_ON
    for name, queries in elsewhere(offset).items():
        assert stated <= true_recall(store, queries) + 0.05, (name, store.index)
    own = true_recall(store, clustered(9, 300, offset=offset))
    assert stated <= own + 0.05
    recalls = store.index.recalls
    assert set(recalls) == set(MEASURED_ON)
    assert (min(recalls.values()), recalls[str(store.index.measured_on)]) == (stated, stated)
    if min(recalls[ROWS], recalls[PERTURBED]) >= min_recall:
        assert own >= min_recall - 0.05
        assert true_recall(store, on_their_way(offset)) >= min_recall - 0.05


def on_their_way(offset: float) -> Tensor:
    """Queries some of the way from one place to another, with the noise of the rows."""
    here, there = clustered(10, 300, offset=offset), clustered(11, 300, offset=offset)
    return here + 0.25 * (there - here)


def test_lists_are_searched_until_perturbed_rows_find_theirs_too() -> None:
    rows = clustered(0, COUNT)
    store = Datastore.from_features(rows, [0] * COUNT, index="IVF64,Flat")
    store.build_index()
    recalls, probes = store.index.recalls, store.index.parameters["nprobe"]
    assert min(recalls[ROWS], recalls[PERTURBED]) >= 0.99
    assert true_recall(store, on_their_way(0.0)) >= 0.98
    assert true_recall(store, rows[:300]) >= 0.98
    # strangers would take more lists; what they get is said
    assert (recalls[STRANGERS], STRANGERS) == (store.index.recall, store.index.measured_on)
    assert probes < 32
    for kind, recall in recalls.items():
        assert f"{recall:.4f} on {kind}" in str(store.index)


@pytest.mark.parametrize(("recall", "pays_off"), [(0.99, True), (0.98, False)])
def test_auto_is_judged_by_rows_and_perturbed_rows(recall: float, pays_off: bool) -> None:
    for near in (ROWS, PERTURBED):
        recalls = {ROWS: 1.0, PERTURBED: 1.0, STRANGERS: 0.2} | {near: recall}
        info = IndexInfo("auto", "IVF64,SQfp16", {"nprobe": 3}, 0.2, STRANGERS, recalls)
        assert pays(info, 0.99) == pays_off


@pytest.mark.parametrize("wanted", [1, 7, 16, 100, 511, 512, 1000])
@pytest.mark.parametrize("others", [4, 9])
def test_a_search_is_no_harder_than_it_takes(wanted: int, others: int) -> None:
    """Parameters are doubled until they are enough, then as small as is enough, to an eighth."""
    least, largest = {"nprobe": 1, "k_factor": 4}, {"nprobe": 512, "k_factor": 64}

    def is_enough(values: dict[str, int]) -> bool:
        return values["nprobe"] >= wanted and values["k_factor"] >= others

    values = dict(least)
    while not is_enough(values) and (wider := effort.wider(values, largest)):
        values = max(wider, key=lambda each: (is_enough(each), -each["k_factor"]))
    values = effort.narrowed(values, least, is_enough) if is_enough(values) else values
    assert is_enough(values) == (wanted <= 512)
    if is_enough(values):
        assert values["nprobe"] <= max(wanted + 1, wanted * 9 // 8 + 1)


def test_perturbed_rows_are_near_the_rows() -> None:
    rows = clustered(0, 700).numpy()
    ids = np.arange(700)[::-1] * 3

    def exact(queries: Any, k: int) -> Any:
        distances = np.linalg.norm(rows[None] - queries.features[:, None], axis=2)
        distances[queries.own[:, None] == ids[None]] = np.inf
        return ids[np.argsort(distances, axis=1)[:, :k]]

    own, perturbed, *strangers = queries_for(rows, ids, exact)
    assert [perturbed.kind, *(each.kind for each in strangers)] == [PERTURBED, STRANGERS, STRANGERS]
    far = [
        np.sort(np.linalg.norm(rows[None] - each.features[:, None], axis=2), axis=1)[:, 1].mean()
        for each in (own, perturbed, *strangers)
    ]
    assert far == sorted(far)
    moved = np.linalg.norm(perturbed.features - own.features, axis=1)
    between = np.linalg.norm(rows - rows.mean(axis=0), axis=1).mean() * 2**0.5
    assert 0.2 * between < moved.mean() < 0.7 * between


def test_what_cannot_reach_it_says_of_what(caplog: pytest.LogCaptureFixture) -> None:
    store = Datastore.from_features(clustered(0, COUNT), [0] * COUNT, index="PQ4x4")
    with caplog.at_level(logging.WARNING):
        store.build_index()
    near = {kind: store.index.recalls[kind] for kind in (ROWS, PERTURBED)}
    recall, kind = worst(near)
    assert recall < 0.99
    assert f"recall@20 {recall:.4f}, below 0.9900, on {kind}" in caplog.text


def test_a_search_that_misses_strangers_alone_is_found() -> None:
    rows = clustered(0, 500).numpy()
    ids = np.arange(500) * 7

    def exact(queries: Any, k: int) -> Any:
        distances = np.linalg.norm(rows[None] - queries.features[:, None], axis=2)
        distances[queries.own[:, None] == ids[None]] = np.inf
        return ids[np.argsort(distances, axis=1)[:, :k]]

    def misses_half(queries: Any, k: int) -> Any:
        found = exact(queries, k)
        if queries.kind == STRANGERS:
            found[:, ::2] = -1
        return found

    def misses_more_rows(queries: Any, k: int) -> Any:
        found = misses_half(queries, k)
        return np.full_like(found, -1) if queries.kind == ROWS else found

    test = RecallTest(rows, ids, exact, exact)
    assert test.recalls(exact) == {ROWS: 1, PERTURBED: 1, STRANGERS: 1}
    assert test.recalls(misses_half) == {ROWS: 1, PERTURBED: 1, STRANGERS: 0.5}
    assert test.aimed(misses_half)[0] == 1
    assert worst(test.recalls(misses_half)) == (0.5, STRANGERS)
    assert test.aimed(misses_more_rows) == (0.0, ROWS)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30, 3e38])
@pytest.mark.parametrize("equal", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("count", [1, 2, 3, 700])
def test_queries_are_finite_and_like_no_row(count: int, equal: float, scale: float) -> None:
    rows = clustered(0, count).clamp(-1, 1).numpy() * np.float32(scale)
    rows[: int(equal * count)] = rows[0]  # between which there is no direction
    generator = np.random.default_rng(0)

    def some(queries: Any, k: int) -> Any:
        return np.stack([generator.permutation(count)[:k] for _ in queries.own])

    own, perturbed, *strangers = queries_for(rows, np.arange(count), some)
    assert (own.kind, perturbed.kind) == (ROWS, PERTURBED)
    assert np.array_equal(own.features, rows[own.own])
    assert {each.kind for each in strangers} == {STRANGERS}
    for each in (perturbed, *strangers):
        assert np.isfinite(each.features).all()
        assert each.features.dtype == np.float32
        assert (each.own == -1).all()


def saved(folder: Path, index: str) -> Datastore:
    store = Datastore.from_features(clustered(0, COUNT), [0] * COUNT, index=index)
    store.save(folder)
    return store


def test_it_is_stored_with_the_rows_and_measured_anew_where_it_was_not(tmp_path: Path) -> None:
    store = saved(tmp_path, "IVF64,Flat")
    assert Datastore.load(tmp_path).index == store.index
    values = read_manifest(tmp_path)  # as version 0.1 wrote it: of rows alone
    del values["index"]["measured_on"], values["index"]["recalls"]
    values["index"] |= {"recall": 1.0, "parameters": {"nprobe": 1}}
    write_manifest(tmp_path, values)
    old = Datastore.load(tmp_path)
    assert old.index.measured_on is None
    old.build_index()
    assert old.index == store.index


@pytest.mark.parametrize("value", [7, "pictures", True, [], {}, "", "queries"])
def test_what_it_was_measured_on_is_checked(tmp_path: Path, value: Any) -> None:
    saved(tmp_path, "IVF64,Flat")
    values = read_manifest(tmp_path)
    values["index"]["measured_on"] = value
    write_manifest(tmp_path, values)
    with pytest.raises(DatastoreError, match=r"`index\.measured_on` in datastore\.json"):
        Datastore.load(tmp_path)


def test_a_manifest_of_before_there_were_kinds_is_opened(tmp_path: Path) -> None:
    store = saved(tmp_path, "IVF64,Flat")
    values = read_manifest(tmp_path)
    del values["index"]["recalls"]
    write_manifest(tmp_path, values)
    old = Datastore.load(tmp_path)
    old.build_index()
    assert old.index == dataclasses.replace(store.index, recalls={})
    assert f"recall@20 {store.index.recall:.4f} on {store.index.measured_on}" in str(old.index)


@pytest.mark.parametrize("value", [7, [], "rows", {"rows": 2.0}, {"pictures": 0.5}, {"rows": None}])
def test_recalls_are_checked(tmp_path: Path, value: Any) -> None:
    saved(tmp_path, "IVF64,Flat")
    values = read_manifest(tmp_path)
    values["index"]["recalls"] = value
    write_manifest(tmp_path, values)
    with pytest.raises(DatastoreError, match=r"`index\.recalls.*datastore\.json"):
        Datastore.load(tmp_path)


@pytest.mark.parametrize("count", [1, 2])
def test_of_a_row_or_two_nothing_is_missed(count: int) -> None:
    store = Datastore.from_features(clustered(0, count), [0] * count, index="HNSW8")
    store.build_index()
    assert store.index.recall == 1
    assert store.index.measured_on in MEASURED_ON
