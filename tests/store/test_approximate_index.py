"""Approximate indexes: what they state about themselves, changes, files, odd factory strings."""

import copy
import logging
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from support.first_passes import SPACES
from support.oracles import as_numpy, assert_nearest, assert_sound, normalized, similarity_matrix
from support.stored import FAISS, blob_of
from torch import Tensor

from hf_knn.core.search import Neighbors, Searcher
from hf_knn.store import choice
from hf_knn.store import table as row_table
from hf_knn.store.approximate import FaissApproximate
from hf_knn.store.datastore import Datastore
from hf_knn.store.index import MIN_RECALL, Placement

COUNT, WIDTH = 4000, 16
STATED_ON, K = 256, 20
"""The package measures recall at K on so many rows."""

in_every_space = pytest.mark.parametrize(("metric", "normalization"), SPACES)
QUICK = (("cosine", "l2_centered"), ("l2", "none"))
in_two_spaces = pytest.mark.parametrize(
    ("metric", "normalization"),
    [pytest.param(*each, marks=[] if each in QUICK else [pytest.mark.slow]) for each in SPACES],
)
"""In the others where there is time."""
CODES = "RaBitQfs,Refine(SQfp16)"
LISTS = ("IVF32,Flat", "IVF32,SQ8", "IVF32,SQfp16", f"IVF32,{CODES}", "IVF32,RaBitQfs")
with_lists = pytest.mark.parametrize("index", LISTS)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clustered(seed: int, count: int = COUNT) -> Tensor:
    """Around 40 places, which are the same for every seed."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(40, (count,), generator=generator)
    return 2 * normal(99, 40, WIDTH)[places] + 0.5 * normal(seed, count, WIDTH)


def store_of(
    rows: Tensor,
    index: str,
    metric: str = "cosine",
    normalization: str = "l2_centered",
    **options: Any,
) -> Datastore:
    """Labels 0 to 6; ids 1000, 1003, …"""
    count = len(rows)
    ids = 1000 + 3 * torch.arange(count)
    return Datastore.from_features(
        rows, torch.arange(count) % 7, ids, metric, normalization, index, **options
    )


def built(rows: Tensor, index: str, *space: str, **options: Any) -> Datastore:
    store = store_of(rows, index, *space, **options)
    store.build_index()
    return store


def flat_twin(store: Datastore) -> Datastore:
    """An exact store of the same rows and mean, built now."""
    return Datastore(
        store.features, store.labels, store.ids, store.mean,
        metric=store.metric, normalization=store.normalization,
    )  # fmt: skip


def measured_recall(store: Datastore, rows: Tensor, k: int = K) -> float:
    """Share of the k nearest other rows that a search finds for stored rows, by brute force."""
    queries, own = store.features[rows], store.ids[rows]
    found = store.search(queries, k, own).ids.numpy()
    matrix = similarity_matrix(store, queries)
    matrix[np.arange(len(rows)), rows.numpy()] = -np.inf
    best = store.ids.numpy()[np.argsort(-matrix, axis=1)[:, :k]]
    return float((best[:, :, None] == found[:, None, :]).any(axis=2).mean())


def other_rows(store: Datastore, count: int = 400) -> Tensor:
    """Rows that the package did not measure its recall on, as it takes a sample of its own."""
    return torch.from_numpy(np.random.default_rng(12345).permutation(len(store))[:count])


def assert_equal_hits(one: Neighbors, other: Neighbors) -> None:
    for mine, others in zip(one, other, strict=True):
        assert torch.equal(mine, others)


def stated(store: Datastore) -> float:
    """What `min_recall` is about: on rows and perturbed rows; strangers are only told about."""
    recalls = store.index.recalls
    assert store.index.recall == min(recalls.values()) >= 0
    return min(recalls["rows"], recalls["perturbed rows"])


# which index, and what it states


@pytest.fixture
def small_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than this are too many for an exact search."""
    monkeypatch.setattr(choice, "LARGEST_EXACT", COUNT - 1)


@pytest.mark.usefixtures("small_threshold")
def test_auto_is_exact_up_to_the_threshold_and_an_inverted_file_above() -> None:
    rows = clustered(0)
    few = built(rows[: COUNT - 1], "auto")
    assert (few.index.requested, few.index.spec, few.index.recall) == ("auto", "flat", None)
    store = store_of(rows, "auto")
    assert store.index.spec == "IVF128,SQfp16"  # the power of two next to 2 · √4000
    assert store.index.recall is None  # not built yet
    store.search(rows[:1], 1)
    assert store.index.requested == "auto"
    assert 1 <= store.index.parameters["nprobe"] <= 128
    assert stated(store) >= MIN_RECALL


@pytest.mark.usefixtures("small_threshold")
def test_auto_is_chosen_again_when_the_rows_become_fewer_or_more() -> None:
    rows = clustered(0)
    store = built(rows, "auto")
    store.remove(store.ids[:2000])
    assert store.index.spec == "flat"
    assert_nearest(store.search(rows[:20], 5), store, rows[:20], 5)
    store.add(rows[:2000], [0] * 2000)
    store.recenter()
    assert store.index.spec == "IVF128,SQfp16"
    assert_sound(store.search(rows[:20], 5), store, rows[:20], 5)


@in_two_spaces
@with_lists
@pytest.mark.parametrize("min_recall", [0.7, 0.99])
def test_the_stated_recall_is_that_of_other_rows(
    index: str, metric: str, normalization: str, min_recall: float
) -> None:
    # no clusters: the recall is far from 1 unless many lists are searched
    store = built(normal(0, COUNT, WIDTH), index, metric, normalization, min_recall=min_recall)
    assert stated(store) >= min_recall
    # it is the worse of rows and perturbed rows
    assert -0.02 <= measured_recall(store, other_rows(store)) - stated(store) <= 0.08


@in_two_spaces
@with_lists
def test_the_recall_wanted_is_reached_on_clusters(
    index: str, metric: str, normalization: str
) -> None:
    rows, probes = clustered(0), []
    for wanted in (0.5, 0.9, 0.99, 1.0):
        store = built(rows, index, metric, normalization, min_recall=wanted)
        probes.append(store.index.parameters["nprobe"])
        if index.endswith("Flat"):
            assert stated(store) >= wanted
        assert measured_recall(store, other_rows(store)) >= min(wanted, stated(store)) - 0.02
    assert probes == sorted(probes)


@pytest.mark.usefixtures("small_threshold")
def test_auto_compares_codes_first_where_lists_read_many_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = clustered(0)
    plain = built(rows, "auto")
    assert plain.index.spec == "IVF128,SQfp16"
    monkeypatch.setattr(choice, "MANY_READ", 10)
    store = built(rows, "auto")
    assert store.index.spec == f"IVF128,{CODES}"
    assert set(store.index.parameters) == {"nprobe", "k_factor"}
    assert stated(store) >= MIN_RECALL
    assert measured_recall(store, other_rows(store)) >= stated(store) - 0.02
    store.save(tmp_path / "codes")
    plain.save(tmp_path / "plain")
    for name in ("centroids", "lists"):  # which are not looked for again
        both = [lists_in(tmp_path / folder)[name] for folder in ("codes", "plain")]
        assert torch.equal(*both)
    assert Datastore.load(tmp_path / "codes").index == store.index
    lists_alone = bytes_of_lists(COUNT, 128, WIDTH)
    assert built(rows, "auto", max_memory=lists_alone).index.spec == "IVF128,SQfp16"


@pytest.mark.usefixtures("small_threshold")
def test_auto_keeps_its_lists_where_codes_miss_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "MANY_READ", 10)
    real = Searcher.search
    coded = []

    def miss(self: Any, queries: NDArray, k: int, exclude_ids: Any) -> Any:
        similarities, positions = real(self, queries, k, exclude_ids)
        if getattr(getattr(self, "index", None), "spec", "").endswith(CODES):
            coded.append(len(queries))
            positions = np.zeros_like(positions)
        return similarities, positions

    monkeypatch.setattr(Searcher, "search", miss)
    store = built(clustered(0), "auto")
    assert coded, "codes were not tried"
    assert store.index.spec == "IVF128,SQfp16"
    assert stated(store) >= MIN_RECALL
    queries = clustered(3, 20)
    assert_sound(store.search(queries, 5), store, queries, 5)


@pytest.mark.usefixtures("small_threshold")
def test_auto_is_exact_where_most_lists_would_be_looked_into(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "MANY_READ", COUNT)
    monkeypatch.setattr(choice, "LARGEST_SHARE", 0.1)
    rows = normal(0, COUNT + 200, WIDTH)  # no clusters: neighbours lie in any list
    with caplog.at_level(logging.INFO):
        store = built(rows[:COUNT], "auto")
    assert (store.index.spec, store.index.recall) == ("flat", None)
    assert "an exact search" in caplog.text
    assert "built in" in caplog.text
    assert_nearest(store.search(rows[:20], 5), store, rows[:20], 5)
    store.add(rows[COUNT : COUNT + 90], [0] * 90)  # 4,000 and 4,090 rows are about as many
    assert store.index.spec == "flat"
    store.add(rows[COUNT + 90 :], [0] * 110)
    assert store.index.spec == "IVF128,SQfp16", "it was not tried again with many more rows"
    assert_nearest(store.search(rows[:20], 5), store, rows[:20], 5)
    assert store.index.spec == "flat"


@pytest.mark.usefixtures("small_threshold")
def test_a_limit_of_memory_is_kept_to_where_lists_hardly_pay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choice, "LARGEST_SHARE", 0.1)
    store = built(normal(0, COUNT, WIDTH), "auto", max_memory=4 * WIDTH * COUNT - 1)
    assert store.index.spec.startswith("IVF128,")


@pytest.mark.usefixtures("small_threshold")
def test_lists_that_go_to_a_gpu_hold_what_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "MANY_READ", 10)
    store = built(clustered(0), "auto")
    moved = store._index.on(Placement((torch.device("cuda"),)))
    assert (moved.info.spec, moved.info.recall) == ("IVF128,SQfp16", None)
    assert moved.centroids is store._index.centroids
    assert store._index.on(Placement()).info == store.index


@pytest.mark.usefixtures("small_threshold")
def test_a_graph_is_built_where_latency_matters(tmp_path: Path) -> None:
    rows = clustered(0)
    store = built(rows, "auto:latency", min_recall=0.9)
    assert store.index.spec == "HNSW16_SQfp16"
    assert store.index.requested == "auto:latency"
    assert stated(store) >= 0.9
    assert measured_recall(store, other_rows(store)) >= stated(store) - 0.02
    store.save(tmp_path)
    loaded = Datastore.load(tmp_path)
    loaded.search(rows[:1], 1)
    assert (loaded.index.spec, loaded.index.requested) == (store.index.spec, "auto:latency")
    assert built(rows[: COUNT - 1], "auto:latency").index.spec == "flat"


def serialized(store: Datastore) -> NDArray[np.uint8]:
    """Every byte that faiss holds: lists, codes, rows."""
    index = store.build_index().index
    assert isinstance(index, FaissApproximate)
    found: NDArray[np.uint8] = faiss.serialize_index(index.index)
    return found


@in_every_space
@with_lists
def test_an_index_is_filled_again_bit_by_bit(
    index: str, metric: str, normalization: str, tmp_path: Path
) -> None:
    store = built(clustered(0, 2000), index, metric, normalization, min_recall=0.01)
    store.save(tmp_path / "first")
    loaded = Datastore.load(tmp_path / "first")
    assert np.array_equal(serialized(loaded), serialized(store))
    if index.endswith("SQ8"):
        return  # its ranges are those of the rows that it was built from
    store.add(clustered(1, 150), [3] * 150)
    store.save(tmp_path / "second")
    assert np.array_equal(serialized(Datastore.load(tmp_path / "second")), serialized(store))


@with_lists
def test_one_query_finds_what_a_batch_finds(index: str) -> None:
    store = built(clustered(0), index, min_recall=0.9)
    queries = torch.cat([clustered(3, 200), normal(4, 100, WIDTH)])
    wanted = store.search(queries, K)
    alone = [store.search(query[None], K) for query in queries]
    for mine, others in zip(wanted, map(torch.cat, zip(*alone, strict=True)), strict=True):
        assert torch.equal(mine, others)


@pytest.mark.parametrize("min_recall", [0, -0.5, 1.01, float("nan")])
def test_a_recall_that_cannot_be_reached_is_refused(min_recall: float) -> None:
    with pytest.raises(ValueError, match=r"`min_recall`.*\(0, 1\]"):
        store_of(clustered(0, 100), "flat", min_recall=min_recall)


def bytes_of_lists(count: int, lists: int, width: int) -> int:
    """Vectors in float16 and ids, and the centroids."""
    return count * (2 * width + 8) + lists * 4 * width


@pytest.mark.usefixtures("small_threshold")
@in_every_space
def test_auto_quantizes_to_keep_to_max_memory(
    metric: str, normalization: str, tmp_path: Path
) -> None:
    rows = clustered(0)
    enough = bytes_of_lists(COUNT, 128, WIDTH)
    space = (metric, normalization)
    assert store_of(rows, "auto", *space, max_memory=enough).index.spec == "IVF128,SQfp16"
    store = built(rows, "auto", *space, max_memory=enough - 1)
    assert store.index.spec == "IVF128,SQ8"
    assert measured_recall(store, other_rows(store)) >= stated(store) - 0.02
    store.save(tmp_path)
    index: Any = faiss.read_index(str(tmp_path / FAISS))
    assert (index.ntotal, index.code_size) == (COUNT, WIDTH)  # a byte for each value


@pytest.mark.parametrize("max_memory", ["", "0", "-1GB", "much", "2XB", 0, 1.5e-9])
def test_a_memory_limit_that_is_none_is_refused(max_memory: Any) -> None:
    with pytest.raises(ValueError, match=r"`max_memory` to be like '2GB', but got"):
        store_of(clustered(0, 100), "auto", max_memory=max_memory)


def test_a_hopeless_index_says_so_with_its_recall(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        store = built(normal(0, COUNT, WIDTH), "PQ4x4")
    assert stated(store) < 0.9
    (message,) = [record.getMessage() for record in caplog.records if "recall" in record.msg]
    assert f"PQ4x4 reaches recall@20 {stated(store):.4f}, below 0.9900" in message
    assert "flat" in message
    assert measured_recall(store, other_rows(store)) == pytest.approx(stated(store), abs=0.02)


def test_an_index_that_reaches_its_recall_does_not_warn(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        built(clustered(0), "IVF32,Flat")
    assert not caplog.records


def test_a_graph_of_unnormalized_rows_is_about_as_good_as_faiss_makes_it() -> None:
    store = built(clustered(0), "HNSW16", "l2", "none")
    alone = faiss.index_factory(WIDTH, "HNSW16", faiss.METRIC_L2)
    rows = store.features.float().numpy()
    alone.add(rows)
    picked = other_rows(store)
    _, found = alone.search(rows[picked], K + 1)  # efSearch 16, its default
    itself = found[:, 0] == picked.numpy()
    assert itself.mean() > 0.98
    assert stated(store) >= 0.98


# changes are seen at once


@in_two_spaces
@pytest.mark.parametrize("index", [*LISTS, "HNSW16"])
def test_an_added_row_is_its_own_nearest(index: str, metric: str, normalization: str) -> None:
    store = built(normal(0, COUNT, WIDTH), index, metric, normalization)
    added = normal(1, 300, WIDTH)
    ids = store.add(added, [9] * 300)
    rows = store.features[-300:]
    hits = store.search(rows, 5)
    found = hits.ids[:, 0] == ids
    assert found.double().mean() >= min(0.99, stated(store)), found.double().mean()
    assert (hits.labels[found, 0] == 9).all()
    assert_sound(hits, store, rows, 5)
    assert measured_recall(store, torch.arange(COUNT, COUNT + 300)) >= stated(store) - 0.02


@pytest.mark.parametrize("index", ["IVF32,SQ8", "HNSW16"])
def test_an_added_row_unlike_all_others_is_its_own_nearest(index: str) -> None:
    store = built(normal(0, COUNT, WIDTH), index, "l2", "none", min_recall=0.9)
    ids = store.add(0.1 * normal(4, 300, WIDTH), [9] * 300)
    found = store.search(store.features[-300:], 1).ids[:, 0] == ids
    assert found.double().mean() >= stated(store) - 0.02
    assert measured_recall(store, torch.arange(COUNT, COUNT + 300)) >= stated(store) - 0.02


@in_two_spaces
@pytest.mark.parametrize("index", [*LISTS, "HNSW16"])
def test_a_removed_row_is_never_found_and_a_new_label_at_once(
    index: str, metric: str, normalization: str
) -> None:
    rows = clustered(0)
    rows[100:200] = rows[:100]  # what is removed has a twin that stays
    store = built(rows, index, metric, normalization)
    everything = store.ids
    gone = everything[:100]
    store.remove(gone)
    store.relabel(everything[100:200], [77] * 100)
    hits = store.search(rows[:100], 50)
    assert not torch.isin(hits.ids, gone).any()
    assert_sound(hits, store, rows[:100], 50)
    twins = hits.ids[:, 0] == everything[100:200]
    assert twins.double().mean() >= min(0.98, stated(store) - 0.02)
    assert (hits.labels[twins, 0] == 77).all()
    assert measured_recall(store, other_rows(store)) >= stated(store) - 0.02


@in_every_space
def test_with_all_lists_searched_changes_equal_a_fresh_exact_store(
    metric: str, normalization: str
) -> None:
    rows = normal(0, 2500, WIDTH)
    rows[1000:1300] = rows[:300]
    store = built(rows[:2000], "IVF8,Flat", metric, normalization, min_recall=1.0)
    assert store.index.parameters["nprobe"] == 8, "the test needs all lists to be searched"
    queries = torch.cat([rows[:300], normal(1, 100, WIDTH)])
    exclude_ids = torch.cat([store.ids[:300], torch.full((100,), -1)])
    searcher = store.build_index()
    changes: list[Callable[[], object]] = [
        # more than a tenth, and the lists would be made anew
        lambda: store.add(rows[2000:2150], torch.arange(150) % 7),
        lambda: store.remove(store.ids[1000:1400]),
        lambda: store.relabel(store.ids[::2], [5] * len(store.ids[::2])),
        lambda: store.add(rows[1000:1040], [6] * 40),
    ]
    for change in changes:
        change()
        twin = flat_twin(store)
        for k in (1, K):
            hits = store.search(queries, k, exclude_ids)
            assert_equal_hits(hits, twin.search(queries, k, exclude_ids))
    assert store.build_index() is searcher, "it was built again instead of following"


# a graph cannot forget: rows are masked until the next save


def bytes_in(folder: Path, rows: Tensor | NDArray) -> int:
    """How many rows lie in any file of a folder, value for value."""
    content = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    values = rows.numpy() if isinstance(rows, Tensor) else rows
    return sum(any(row.tobytes() in file for file in content) for row in values)


def ways_to_write(store: Datastore, rows: Tensor) -> list[NDArray]:
    """The rows as they were given, as they are stored, and as an index holds them."""
    unit = normalized(rows, store.mean, store.normalization)
    stored = rows.numpy()
    return [stored, stored.astype(np.float32), unit.astype(np.float32), unit.astype(np.float16)]


@pytest.mark.parametrize(
    "index", ["HNSW16", "IVF8,Flat", "IVF8,SQ8", "IVF8,SQfp16", f"IVF8,{CODES}", "flat"]
)
@pytest.mark.parametrize("reloaded", [False, True])
def test_removed_rows_are_masked_at_once_and_in_no_file(
    index: str, reloaded: bool, tmp_path: Path
) -> None:
    store = built(normal(0, 1000, WIDTH), index, "cosine", "l2_centered")
    folder = tmp_path / "store"
    store.save(folder)
    if reloaded:
        store = Datastore.load(folder)
        store.search(normal(1, 1, WIDTH), 1)
    gone, rows = store.ids[100:200], store.features[100:200]
    kept = store.features[:100]
    written = [bytes_in(folder, way) for way in ways_to_write(store, rows)]
    assert written[0] == 100  # or this test looks for the wrong bytes
    store.remove(gone)
    hits = store.search(rows, 30)
    assert not torch.isin(hits.ids, gone).any()
    assert_sound(hits, store, rows, 30)
    store.save(folder)
    assert [bytes_in(folder, way) for way in ways_to_write(store, rows)] == [0] * 4
    assert bytes_in(folder, kept) == 100
    loaded = Datastore.load(folder)
    assert (len(loaded), loaded.index.spec) == (900, index)
    hits = loaded.search(rows, 30)
    assert not torch.isin(hits.ids, gone).any()
    assert_sound(hits, loaded, rows, 30)
    in_file = faiss.read_index(str(folder / FAISS))
    assert in_file.ntotal == 900
    if not index.endswith("SQ8"):  # the vectors themselves
        inner: Any = faiss.downcast_index(getattr(in_file, "index", in_file))
        if index.endswith(CODES):
            inner = faiss.downcast_index(inner.refine_index)
        elif index.startswith("IVF"):
            inner.make_direct_map()
        vectors = as_numpy(inner.reconstruct_n(0, 900))
        away = normalized(rows, store.mean, store.normalization)
        nearest = (vectors @ away.T).max(axis=0)
        assert (nearest < 1 - 1e-4).all()


def test_most_rows_of_a_graph_can_go() -> None:
    """Beyond some share of masked rows it is built again."""
    store = built(clustered(0, 1500), "HNSW16")
    for start in range(0, 1450, 50):
        store.remove(store.ids[:50])
        k = min(20, len(store))
        queries = clustered(start, 3)
        assert_sound(store.search(queries, k), store, queries, k)
    assert len(store) == 50
    hits = store.search(store.features, 50)
    assert_nearest(hits, store, store.features, 50)


# files


def lists_in(folder: Path) -> dict[str, Tensor]:
    return load_file(blob_of(folder))


@in_every_space
@with_lists
def test_lists_are_loaded_without_training(
    index: str, metric: str, normalization: str, tmp_path: Path
) -> None:
    store = built(clustered(0, 2000), index, metric, normalization, min_recall=0.9)
    store.save(tmp_path / "first")
    first = lists_in(tmp_path / "first")["centroids"]
    # another k-means would be one of other rows
    store.add(clustered(1, 200), [3] * 200)
    store.remove(store.ids[100:300])
    queries = clustered(2, 200)
    wanted = store.search(queries, K)
    store.save(tmp_path / "second")
    loaded = Datastore.load(tmp_path / "second")
    assert_equal_hits(loaded.search(queries, K), wanted)
    assert loaded.index == store.index
    assert stated(loaded) == stated(store)
    loaded.relabel(loaded.ids[:1], [6])  # the next save writes the file again
    loaded.save(tmp_path / "third")
    for name in ("second", "third"):
        tensors = lists_in(tmp_path / name)
        assert torch.equal(tensors["centroids"].view(torch.int32), first.view(torch.int32))
    for name in ("features", "lists"):
        again = lists_in(tmp_path / "third")[name]
        assert torch.equal(lists_in(tmp_path / "second")[name], again)


def test_a_store_that_was_loaded_follows_changes_like_the_one_that_was_saved(
    tmp_path: Path,
) -> None:
    store = built(clustered(0, 2000), "IVF16,Flat", min_recall=0.9)
    store.save(tmp_path)
    loaded = Datastore.load(tmp_path)
    queries = clustered(2, 100)
    for one in (store, loaded):
        one.search(queries, 1)
        one.add(clustered(1, 100), [4] * 100)
        one.remove(one.ids[50:100])
    assert_equal_hits(loaded.search(queries, K), store.search(queries, K))


def test_a_copy_has_an_index_of_its_own() -> None:
    store = built(clustered(0, 2000), "IVF16,Flat")
    queries = clustered(2, 100)
    wanted = store.search(queries, K)
    twin = copy.deepcopy(store)
    twin.remove(twin.ids[:500])
    twin.add(queries, [1] * 100)
    assert twin.search(queries, 1).labels.eq(1).all()
    assert_equal_hits(store.search(queries, K), wanted)


# k, leave-one-out


@pytest.mark.parametrize("index", ["IVF64,Flat", "IVF64,SQ8", "HNSW8"])
@pytest.mark.parametrize("excludes", [False, True])
def test_k_larger_than_what_is_found_is_filled_up(index: str, excludes: bool) -> None:
    rows = clustered(0, 3000)
    rows[1000:2800] = rows[0]  # one list holds more than half of the rows, most hold few
    store = built(rows, index, min_recall=0.1)
    queries = torch.cat([rows[:4], normal(1, 4, WIDTH)])
    exclude_ids = torch.cat([store.ids[:4], torch.tensor([-1, 5, -1, 5])]) if excludes else None
    given = None if exclude_ids is None else exclude_ids.numpy()
    for k in (1, 100, 700, 1499):
        hits = store.search(queries, k, exclude_ids)
        assert hits.ids.shape == (8, k)
        assert_sound(hits, store, queries, k, given)
    for k in (2999, 3000, 10**12):
        hits = store.search(queries, k, exclude_ids)
        assert hits.ids.shape == (8, min(k, 3000 - excludes))
        assert_nearest(hits, store, queries, k, given)


@with_lists
@pytest.mark.parametrize("batch_size", [1, 999, 4096])
def test_leave_one_out_is_search_without_that_row(index: str, batch_size: int) -> None:
    rows = clustered(0, 2000 if batch_size > 1 else 200)
    store = built(rows, index, min_recall=0.9)
    parts = list(store.leave_one_out(K, batch_size))
    sizes = [len(part.ids) for part in parts]
    assert len(parts) == -(-len(store) // batch_size)
    assert max(sizes) - min(sizes) <= 1
    hits = Neighbors(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
    assert_equal_hits(hits, store.search(store.features, K, store.ids))
    assert hits.ids.shape == (len(store), K)
    assert not (hits.ids == store.ids[:, None]).any()
    # each row once and in order: who stands in row i is near to row i
    rows = torch.arange(0, len(store), 7)
    part = Neighbors(*(column[rows] for column in hits))
    assert_sound(part, store, store.features[rows], K, store.ids[rows].numpy())


# odd strings and few rows


@pytest.mark.parametrize("index", ["", "nonsense", "ivf4,flat", "IVF4,Flat ", "LSH"])
def test_a_string_that_faiss_does_not_understand_is_refused(index: str) -> None:
    with pytest.raises(ValueError, match=rf"`index` to be auto, flat or .*{re.escape(index)}"):
        store_of(clustered(0, 100), index)


def test_a_string_that_does_not_fit_the_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`index`.*PQ5x4"):
        store_of(clustered(0, 100), "PQ5x4")


@pytest.mark.parametrize("count", [0, 1, 9])
def test_more_lists_than_rows_are_refused_with_both_numbers(count: int) -> None:
    with pytest.raises(ValueError, match=rf"as many rows as lists.*'IVF10,Flat'.*{count} rows"):
        store_of(clustered(0, count), "IVF10,Flat")
    assert len(store_of(clustered(0, 10), "IVF10,Flat")) == 10


@pytest.mark.parametrize("index", ["auto", "HNSW8", "SQ8"])
def test_an_empty_store_has_no_neighbours_and_can_grow(index: str, tmp_path: Path) -> None:
    store = store_of(clustered(0, 0), index)
    assert store.search(clustered(1, 2), 3).ids.shape == (2, 0)
    store.save(tmp_path)
    for one in (store, Datastore.load(tmp_path)):
        assert not list(one.leave_one_out())
        one.add(clustered(0, 300), [2] * 300)
        hits = one.search(clustered(0, 300), 1)
        assert torch.equal(hits.ids[:, 0], one.ids)


@pytest.mark.parametrize("index", ["auto", "HNSW8", "SQ8", "IVF1,Flat", "IVF1,SQ8"])
def test_one_row(index: str, tmp_path: Path) -> None:
    store = store_of(clustered(0, 1), index)
    store.save(tmp_path)
    for one in (store, Datastore.load(tmp_path)):
        hits = one.search(clustered(1, 2), 20)
        assert hits.ids.tolist() == [[1000], [1000]]
        assert one.search(clustered(1, 2), 20, [1000, -1]).ids.shape == (2, 0)
        (alone,) = one.leave_one_out()
        assert alone.ids.shape == (1, 0)


def shrunk(store: Datastore) -> None:
    store.remove(store.ids[5:])


def grown_from_nothing(store: Datastore) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store.save(folder)
        loaded = Datastore.load(folder)
    loaded.remove(loaded.ids)
    loaded.add(clustered(1, 3), [0, 1, 2])
    assert loaded.search(clustered(1, 3), 1).ids.shape == (3, 1)


def cut(store: Datastore) -> None:
    assert len(store.subset(store.ids[:3])) == 3


@pytest.mark.parametrize("change", [shrunk, grown_from_nothing, cut])
def test_fewer_rows_than_lists_after_a_change(change: Callable[[Datastore], None]) -> None:
    store = built(clustered(0, 300), "IVF16,Flat")
    change(store)
    queries = clustered(1, 4)
    assert_sound(store.search(queries, 3), store, queries, 3)


def test_a_refused_removal_changes_nothing() -> None:
    store = built(clustered(0, 300), "IVF16,Flat")
    try:
        store.remove(store.ids[5:])
    except ValueError:
        assert len(store) == 300


@pytest.mark.parametrize(
    "index", ["IVF0,Flat", "IVF4,PQ0", "IDMap,Flat", "PCA17,Flat", "OPQ0,Flat", "PQ4x8"]
)
def test_a_string_that_cannot_be_built_is_refused_by_name(index: str) -> None:
    with pytest.raises(ValueError, match=rf"`index`.*{index}"):
        built(clustered(0, 100), index).search(clustered(1, 1), 1)


def test_an_index_that_cannot_take_rows_in_is_built_again() -> None:
    store = built(clustered(0, 300), "NSG8")
    (new,) = store.add(clustered(1, 1), [0]).tolist()
    assert store.search(clustered(1, 1), 1).ids.tolist() == [[new]]


def test_a_number_with_zeros_in_front_can_be_loaded(tmp_path: Path) -> None:
    store = built(clustered(0, 300), "IVF004,Flat")
    store.save(tmp_path)
    assert_equal_hits(
        Datastore.load(tmp_path).search(clustered(1, 5), 3), store.search(clustered(1, 5), 3)
    )


def test_rows_that_become_too_few_before_anything_was_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_table, "SHARD_BYTES", 100 * 2 * WIDTH)  # several files, with lists
    built(clustered(0, 300), "IVF8,Flat").save(tmp_path)
    store = Datastore.load(tmp_path)
    store.add(clustered(1, 5), [0] * 5)
    store.remove(store.ids[4:-1])
    assert_equal_hits(store.search(clustered(2, 5), 3), flat_twin(store).search(clustered(2, 5), 3))
    store.save(tmp_path)
    kept = [key for path in tmp_path.glob("*.safetensors") for key in load_file(path)]
    assert {"lists", "centroids"}.isdisjoint(kept)
    assert Datastore.load(tmp_path).index.spec == "flat"


CRASH_SCRIPT = """
import torch
from hf_knn.store.datastore import Datastore
try:
    rows = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    Datastore.from_features(rows, [0] * 300, index={index!r}).search(rows, 1)
except ValueError as error:
    print("refused:", error)
else:
    raise SystemExit("it was built and searched")
"""


@pytest.mark.faults
@pytest.mark.parametrize("index", ["HNSW0", "HNSW1", "PQ4x0", "RQ0x4", "IVF4_HNSW1,Flat"])
def test_a_string_that_kills_faiss_is_refused(index: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CRASH_SCRIPT.format(index=index)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.startswith("refused:")
    assert index in done.stdout


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("index", ["IVF32,Flat", "HNSW16"])
@pytest.mark.parametrize("factor", [1e3, 1e30, 1e36])
def test_a_query_far_beyond_all_rows_is_searched_in_the_index(
    index: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = built(normal(0, COUNT, WIDTH), index, "l2", "none")
    compared: list[int] = []
    rescore = Searcher._rescore

    def watch(self: Searcher, asked: NDArray, candidates: NDArray, *others: NDArray) -> None:
        compared.append(candidates.shape[1])
        rescore(self, asked, candidates, *others)

    monkeypatch.setattr(Searcher, "_rescore", watch)
    queries = normal(7, 20, WIDTH).double() * factor
    hits = store.search(queries, 5)
    assert max(compared) < COUNT / 2, "every row was compared"
    assert_sound(hits, store, queries, 5)


@pytest.mark.parametrize("count", [150, 300, 380, 420, 800])
def test_one_neighbour_is_found_as_surely_as_the_twenty_of_the_recall(count: int) -> None:
    store = store_of(clustered(0, count), "HNSW8")
    store.search(clustered(0, 1), 1)
    assert store.index.recall is not None
    hits = store.search(clustered(0, count), 1)
    share = float((hits.ids[:, 0] == store.ids).double().mean())
    assert share >= store.index.recall - 0.01
