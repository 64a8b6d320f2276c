"""The recall that an index states holds for queries unlike the rows, too."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.oracles import similarity_matrix
from support.stored import read_manifest, write_manifest
from torch import Tensor

from hf_knn.core.manifest import MEASURED_ON, DatastoreError
from hf_knn.store.datastore import Datastore
from hf_knn.store.recall import RecallTest, queries_for

COUNT, WIDTH, K = 4000, 32, 20
ROWS, STRANGERS = MEASURED_ON


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


@pytest.mark.parametrize("index", [*LISTS, "HNSW8", "IVF16,PQ8x4", "PQ8x4"])
@pytest.mark.parametrize(
    ("space", "offset"),
    [(("cosine", "l2_centered"), 5.0), (("cosine", "l2"), 0.0), (("l2", "none"), 0.0)],
)
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
    if stated >= min_recall:
        assert own >= min_recall - 0.05


def test_lists_are_searched_until_strangers_find_their_rows_too() -> None:
    rows = clustered(0, COUNT)
    store = Datastore.from_features(rows, [0] * COUNT, index="IVF64,Flat")
    store.build_index()
    assert store.index.recall is not None
    assert store.index.recall >= 0.99
    assert store.index.parameters["nprobe"] > 1  # which is enough for the rows alone
    for queries in elsewhere(0.0).values():
        assert true_recall(store, queries) >= 0.95


def test_what_cannot_reach_it_says_of_what(caplog: pytest.LogCaptureFixture) -> None:
    store = Datastore.from_features(clustered(0, COUNT), [0] * COUNT, index="PQ4x4")
    with caplog.at_level(logging.WARNING):
        store.build_index()
    assert store.index.recall is not None
    assert store.index.recall < 0.9
    said = f"recall@20 {store.index.recall:.4f}, below 0.9900, on {store.index.measured_on}"
    assert said in caplog.text
    assert str(store.index.measured_on) in str(store.index)


def test_a_search_that_misses_strangers_alone_is_found() -> None:
    rows = clustered(0, 500).numpy()
    ids = np.arange(500) * 7

    def exact(queries: Any, k: int) -> Any:
        distances = np.linalg.norm(rows[None] - queries.features[:, None], axis=2)
        distances[queries.own[:, None] == ids[None]] = np.inf
        return np.argsort(distances, axis=1)[:, :k]

    def misses_half(queries: Any, k: int) -> Any:
        found = exact(queries, k)
        if queries.kind == STRANGERS:
            found[:, ::2] = -1
        return found

    def misses_more_rows(queries: Any, k: int) -> Any:
        found = misses_half(queries, k)
        return np.full_like(found, -1) if queries.kind == ROWS else found

    test = RecallTest(rows, ids, exact)
    assert test.worst(exact)[0] == 1
    assert test.worst(misses_half) == (0.5, STRANGERS)
    assert test.worst(misses_more_rows) == (0.0, ROWS)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30, 3e38])
@pytest.mark.parametrize("count", [1, 2, 3, 700])
def test_queries_are_finite_and_like_no_row(count: int, scale: float) -> None:
    rows = clustered(0, count).clamp(-1, 1).numpy() * np.float32(scale)
    own, *strangers = queries_for(rows, np.arange(count))
    assert own.kind == ROWS
    assert np.array_equal(own.features, rows[own.own])
    assert {each.kind for each in strangers} == {STRANGERS}
    for each in strangers:
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
    del values["index"]["measured_on"]
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


@pytest.mark.parametrize("count", [1, 2])
def test_of_a_row_or_two_nothing_is_missed(count: int) -> None:
    store = Datastore.from_features(clustered(0, count), [0] * count, index="HNSW8")
    store.build_index()
    assert store.index.recall == 1
    assert store.index.measured_on in MEASURED_ON
