"""The datastore: exact search against brute force, and every row of "Numbers" in reliability.md."""

import copy
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.first_passes import FIRST_PASSES, force
from support.forks import outcome
from support.oracles import assert_nearest, assert_same_store
from torch import Tensor

from hf_knn.core.search import Neighbors
from hf_knn.core.votes import knn_log_probs
from hf_knn.store import disk as persistence
from hf_knn.store import index as indexing
from hf_knn.store import quickest
from hf_knn.store import searcher as first_pass
from hf_knn.store.datastore import Datastore

SPACES = [
    ("cosine", "l2_centered"),
    ("cosine", "l2"),
    ("l2", "l2_centered"),
    ("l2", "l2"),
    ("l2", "none"),
]
in_every_space = pytest.mark.parametrize(("metric", "normalization"), SPACES)


def pretend(monkeypatch: pytest.MonkeyPatch, has_faiss: Callable[[], bool]) -> None:
    """Makes the package believe that faiss is there, or is not."""
    for module in (persistence, indexing, quickest):
        monkeypatch.setattr(module, "has_faiss", has_faiss)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_store(count: int = 6, width: int = 3, **options: Any) -> Datastore:
    """Rows 0, 1, …; labels 0, 1, 2, 0, 1, 2 …; ids 100, 101, …"""
    ids = torch.arange(count) + 100
    return Datastore.from_features(normal(0, count, width), torch.arange(count) % 3, ids, **options)


def stored_as_given(features: Tensor, **options: Any) -> Datastore:
    """A datastore of exactly these values, without the cast of `from_features`."""
    count = len(features)
    store = Datastore(
        features, torch.arange(count) % 5, torch.arange(count), features[0] * 0, **options
    )
    store.recenter()
    return store


def assert_equal_hits(one: Neighbors, other: Neighbors) -> None:
    for mine, others in zip(one, other, strict=True):
        assert torch.equal(mine, others)


@pytest.fixture
def without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, lambda: False)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads(), faiss.omp_get_max_threads()

    def use(count: int) -> None:
        torch.set_num_threads(count)
        faiss.omp_set_num_threads(count)

    yield use
    torch.set_num_threads(before[0])
    faiss.omp_set_num_threads(before[1])


# search against brute force


@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 60) | st.integers(61, 150),
    width=st.sampled_from([1, 2, 3, 8, 33]),
    space=st.sampled_from(SPACES),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    is_grid=st.booleans(),
    doubled=st.sampled_from([0.0, 0.3, 1.0]),
    k=st.integers(1, 12) | st.integers(1, 200),
    with_exclusion=st.booleans(),
)
def assert_search_equals_brute_force(
    seed: int,
    count: int,
    width: int,
    space: tuple[str, str],
    dtype: type,
    is_grid: bool,
    doubled: float,
    k: int,
    with_exclusion: bool,
) -> None:
    generator = np.random.default_rng(seed)
    features: NDArray
    if is_grid:  # many ties that are no duplicates, and zero vectors
        features = generator.integers(-2, 3, size=(count, width)).astype(dtype)
    else:
        features = (generator.normal(size=(count, width)) + 0.5).astype(dtype)
    copies = generator.uniform(size=count) < doubled
    features[copies] = features[generator.integers(0, count, size=copies.sum())]
    ids = generator.permutation(1000)[:count]
    store = Datastore.from_features(features, generator.integers(0, 4, size=count), ids, *space)
    rows = generator.integers(0, count, size=5)
    queries = features[rows].copy()  # stored rows, and others
    queries[3:] += generator.normal(size=(2, width)).astype(dtype)
    exclude_ids = ids[rows] if with_exclusion else None
    if exclude_ids is not None:
        exclude_ids[1], exclude_ids[3] = -1, 5000  # nothing, and an id that is not there
    hits = store.search(queries, k, exclude_ids)
    assert_nearest(hits, store, queries, k, exclude_ids)


@pytest.mark.parametrize("examples", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_search_equals_brute_force(examples: int) -> None:
    drawn = settings(max_examples=examples, deadline=None, derandomize=True)
    drawn(assert_search_equals_brute_force)()


with_every_library = pytest.mark.parametrize("library", FIRST_PASSES)


@in_every_space
@with_every_library
def test_continuous_data_has_exactly_the_ids_of_brute_force(
    metric: str, normalization: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(library, monkeypatch)
    store = Datastore.from_features(
        normal(0, 700, 16) + 1, torch.arange(700) % 7, None, metric, normalization
    )
    queries = normal(1, 40, 16)
    rows, wanted = store.features.double(), queries.double()
    if normalization == "l2_centered":
        rows, wanted = rows - store.mean.double(), wanted - store.mean.double()
    if normalization != "none":
        rows = rows / rows.norm(dim=1, keepdim=True)
        wanted = wanted / wanted.norm(dim=1, keepdim=True)
    similarities = wanted @ rows.T
    if metric == "l2":
        similarities = -(
            torch.cdist(wanted, rows, compute_mode="donot_use_mm_for_euclid_dist") ** 2
        )
    best = similarities.topk(15, dim=1)
    hits = store.search(queries, 15)
    assert torch.equal(hits.ids, best.indices)
    assert torch.equal(hits.labels, best.indices % 7)
    torch.testing.assert_close(hits.similarities, best.values.float())


@in_every_space
@with_every_library
def test_differences_below_float32_are_seen(
    metric: str, normalization: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(library, monkeypatch)
    # 400 rows in one direction but for 1e-5: cosines with the query differ by about 1e-10
    close = torch.ones(1, 8) + 1e-5 * normal(3, 400, 8)
    features = torch.cat([close, normal(4, 400, 8)])
    store = stored_as_given(features, metric=metric, normalization=normalization)
    queries = torch.ones(3, 8) + 1e-5 * normal(5, 3, 8)
    assert_nearest(store.search(queries, 30), store, queries, 30)


@with_every_library
def test_rows_that_are_nearly_orthogonal_to_the_query(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(library, monkeypatch)
    # cosines of about 4e-4 with a query that bfloat16 holds exactly: as large as what the rows lose
    rows = normal(9, 640, 16)
    rows -= rows.mean(dim=1, keepdim=True)
    rows += 4e-4 * normal(10, 640, 1)
    store = stored_as_given(
        torch.cat([rows, -torch.eye(16).repeat(4, 1)]), metric="cosine", normalization="l2"
    )
    queries = torch.full((1, 16), 0.25)
    assert_nearest(store.search(queries, 10), store, queries, 10)


@with_every_library
def test_near_rows_that_lie_far_apart_in_the_store(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(library, monkeypatch)
    rows = normal(11, 2400, 16)
    rows -= rows.mean(dim=1, keepdim=True)
    rows[::40] = 1 + 1e-3 * normal(12, 60, 16)  # 60 neighbours, no two in one block of 32
    store = stored_as_given(rows, metric="cosine", normalization="l2")
    queries = 1 + 1e-3 * normal(13, 3, 16)
    hits = store.search(queries, 30)
    assert (hits.ids % 40 == 0).all()
    assert_nearest(hits, store, queries, 30)


@with_every_library
def test_an_index_is_built_anew_for_rows_beyond_its_scale(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(library, monkeypatch)
    store = stored_as_given(normal(14, 300, 4), metric="l2", normalization="none")
    store.build_index()
    far = 1e4 + 1e-2 * normal(15, 400, 4)  # at the scale of the first rows float32 sees one point
    store.add(far, [1] * 400)
    queries = 1e4 + 1e-2 * normal(16, 3, 4)
    assert_nearest(store.search(queries, 10), store, queries, 10)


@in_every_space
@with_every_library
def test_an_index_that_follows_changes_stays_exact(
    metric: str, normalization: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(library, monkeypatch)
    features = normal(0, 400, 6)
    features[200:250] = features[:50]
    store = Datastore.from_features(
        features[:300], torch.arange(300) % 5, None, metric, normalization
    )
    queries = torch.cat([features[:4], normal(1, 4, 6), features[300:304]])
    searcher = store.build_index()
    changes: list[Callable[[], object]] = [
        lambda: store.add(features[300:], torch.arange(100) % 5),
        lambda: store.remove(range(0, 90, 2)),
        lambda: store.add(features[:30], [7] * 30),  # duplicates of rows that went or stayed
        lambda: store.remove([400, 3, 399]),
        lambda: store.add(normal(2, 2, 6) * 50, [8, 8]),  # longer than every row before
        lambda: store.remove(store.ids[50:250]),  # more than half of what is there
        lambda: store.add(normal(3, 100, 6), [9] * 100),
    ]
    followed = 0
    for change in changes:
        change()
        followed += store._index.searcher is searcher
        exclude_ids = np.array([*range(4), *[-1] * 4, *range(300, 304)])
        for k in (1, 9):
            hits = store.search(queries, k, exclude_ids)
            assert_nearest(hits, store, queries, k, exclude_ids)
        # the same as an index built now, bit for bit
        anew = copy.deepcopy(store)
        assert_equal_hits(hits, anew.search(queries, 9, exclude_ids))
    assert followed >= 4


@in_every_space
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_rows_far_from_the_origin(metric: str, normalization: str, scale: float) -> None:
    features = (1000 + normal(6, 300, 8)) * scale
    features[0] *= 1000  # one long row must not cost the others their order
    features[1] = 0
    store = stored_as_given(features, metric=metric, normalization=normalization)
    queries = torch.cat([(1000 + normal(7, 3, 8)) * scale, -normal(8, 2, 8) * scale])
    hits = store.search(queries, 20)
    assert hits.similarities.isfinite().all()
    if scale > 1 and normalization == "none":  # beyond float32: clamped, but in order
        assert hits.similarities.min() == -torch.finfo(torch.float32).max
    assert_nearest(hits, store, queries, 20)


@in_every_space
def test_the_answer_does_not_depend_on_batch_size_or_threads(
    metric: str, normalization: str, threads: Callable[[int], None]
) -> None:
    features = normal(0, 400, 8)
    features = torch.cat([features, features, features[:1].expand(500, 8)])  # doubled, 500 equal
    store = Datastore.from_features(features, torch.arange(1300) % 3, None, metric, normalization)
    queries = torch.cat([features[:200], normal(1, 800, 8)])
    exclude_ids = torch.arange(1000) - 1
    wanted = store.search(queries, 10, exclude_ids)
    for count in (1, 2):
        threads(count)
        # one by one some of either kind are enough: 70 stored rows, and 70 others
        for size, rows in ((1, slice(130, 270)), (7, slice(130, 270)), (64, ...), (1000, ...)):
            asked = zip(queries[rows].split(size), exclude_ids[rows].split(size), strict=True)
            parts = [store.search(part, 10, excluded) for part, excluded in asked]
            for name in Neighbors._fields:
                found = torch.cat([getattr(part, name) for part in parts])
                assert torch.equal(found, getattr(wanted, name)[rows]), (count, size, name)


@in_every_space
@pytest.mark.parametrize("copies", [1, 2, 500])
def test_the_answer_does_not_depend_on_insertion_order(
    metric: str, normalization: str, copies: int
) -> None:
    features = normal(0, 1000, 6)
    if copies == 2:
        features[500:] = features[:500]
    elif copies == 500:
        features[500:] = features[0]
    labels, ids = torch.arange(1000) % 4, torch.arange(1000) * 3
    wanted = None
    for seed in range(3):
        order = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))
        store = Datastore.from_features(
            features[order], labels[order], ids[order], metric, normalization
        )
        hits = store.search(features[:50], 20, exclude_ids=ids[:50])
        wanted = wanted or hits
        assert_equal_hits(hits, wanted)


def test_the_mean_does_not_depend_on_insertion_order() -> None:
    features = torch.tensor([[1e30, 1.0], [3.0, 2.0], [-1e30, 3.0], [0.0, 1.0]])
    query = torch.tensor([[0.3, 1.75]])
    ids = torch.arange(4)
    wanted = Datastore.from_features(features, [0] * 4, ids).search(query, 1)
    order = torch.tensor([0, 2, 1, 3])
    assert_equal_hits(
        Datastore.from_features(features[order], [0] * 4, order).search(query, 1), wanted
    )


@pytest.mark.parametrize("copies", [2, 500])
def test_ties_are_ordered_by_id(copies: int) -> None:
    ids = np.random.default_rng(0).permutation(2000)[:copies]
    features = torch.cat([torch.ones(copies, 4), -torch.ones(100, 4) + normal(0, 100, 4) * 0.1])
    store = Datastore.from_features(features, [0] * len(features), [*ids, *range(3000, 3100)])
    for k in (1, 2, copies):
        hits = store.search(torch.ones(3, 4), k)
        assert hits.ids.tolist() == [sorted(ids.tolist())[:k]] * 3


# leave-one-out


@in_every_space
def test_leave_one_out_equals_search_without_that_row(metric: str, normalization: str) -> None:
    features = normal(0, 150, 4)
    features[120:] = features[:30]
    labels, ids = torch.arange(150) % 4, torch.arange(150) + 7
    store = Datastore.from_features(features, labels, ids, metric, normalization)
    for k in (1, 5, 149, 1000):
        hits = store.search(features, k, exclude_ids=ids)
        assert hits.ids.shape == (150, min(k, 149))
        assert not (hits.ids == ids[:, None]).any()
        for row in (0, 17, 60, 120, 149):
            others = copy.deepcopy(store)
            others.remove(ids[row : row + 1])
            wanted = others.search(features[row : row + 1], k)  # same mean: remove leaves it
            assert_equal_hits(Neighbors(*(part[row : row + 1] for part in hits)), wanted)


def test_a_duplicate_is_still_a_neighbour_when_the_row_itself_is_excluded() -> None:
    store = Datastore.from_features(torch.ones(3, 2), [0, 1, 2], [7, 8, 9], normalization="l2")
    hits = store.search(torch.ones(3, 2), 2, exclude_ids=[8, 7, -1])
    assert hits.ids.tolist() == [[7, 9], [8, 9], [7, 8]]
    assert hits.labels.tolist() == [[0, 2], [1, 2], [0, 1]]


def test_exclude_ids_are_checked() -> None:
    store = make_store()
    query = normal(1, 2, 3)
    with pytest.raises(ValueError, match=r"`exclude_ids`.*one id per query \(2\).*got 1"):
        store.search(query, 1, exclude_ids=[100])
    with pytest.raises(ValueError, match=r"`exclude_ids` to be >= -1, but got -2"):
        store.search(query, 1, exclude_ids=[-2, 0])
    with pytest.raises(ValueError, match=r"`exclude_ids`.*whole numbers.*float"):
        store.search(query, 1, exclude_ids=torch.zeros(2))


# reliability.md, Numbers: NaN, infinities, extremes


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_numbers_non_finite_features_are_refused_with_their_rows(
    bad: float, dtype: torch.dtype
) -> None:
    features = normal(0, 20, 3).to(dtype)
    features[[3, 17], 1] = bad
    with pytest.raises(ValueError, match=r"`features`.*finite.*rows \[3, 17\]"):
        Datastore.from_features(features, [0] * 20)
    store = make_store()
    before = copy.deepcopy(store)
    with pytest.raises(ValueError, match=r"`features`.*finite.*rows \[3, 17\]"):
        store.add(features, [0] * 20)
    assert_same_store(store, before)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_non_finite_queries_are_refused_with_their_rows(bad: float) -> None:
    queries = normal(0, 5, 3)
    queries[2, 0] = bad
    with pytest.raises(ValueError, match=r"`queries`.*finite.*rows \[2\]"):
        make_store().search(queries, 1)


def test_numbers_many_bad_rows_are_shown_in_short() -> None:
    with pytest.raises(ValueError, match=r"rows \[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, …\]"):
        Datastore.from_features(torch.full((1000, 2), torch.nan), [0] * 1000)


def test_numbers_beyond_float32_are_refused() -> None:
    huge = torch.tensor([[1.0], [1e39]], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"float32's range.*rows \[1\]"):
        Datastore.from_features(huge, [0, 1])


EXTREMES = torch.tensor([[0.0, 0.0], [1e-45, 0.0], [1e30, 0.0], [-1e30, 1e30], [1.0, 2.0]])


@in_every_space
def test_numbers_zero_tiny_and_huge_vectors_are_defined(metric: str, normalization: str) -> None:
    store = Datastore.from_features(EXTREMES, [0, 1, 2, 3, 4], None, metric, normalization)
    assert store.dtype == "float32"
    assert torch.equal(store.features, EXTREMES)
    queries = torch.cat([EXTREMES, -EXTREMES, torch.full((1, 2), -3e38)])
    hits = store.search(queries, 5)
    assert hits.similarities.isfinite().all()
    assert (hits.ids.sort(dim=1).values == torch.arange(5)).all()
    log_probs = knn_log_probs(hits.similarities, hits.labels, 5, 1e-3, metric=metric)
    assert not log_probs.isnan().any()
    assert_nearest(hits, store, queries, 5)


def test_numbers_a_zero_vector_has_cosine_zero_with_everything() -> None:
    store = Datastore.from_features(EXTREMES, [0, 1, 2, 3, 4], normalization="l2")
    hits = store.search(torch.zeros(1, 2), 5)
    assert hits.similarities.tolist() == [[0] * 5]
    assert hits.ids.tolist() == [[0, 1, 2, 3, 4]]
    # (1, 0): the direction of 1e-45 and of 1e30 is exact, the zero vector is neither near nor far
    hits = store.search(torch.tensor([[1.0, 0.0]]), 5)
    assert hits.ids.tolist() == [[1, 2, 4, 0, 3]]
    wanted = [1, 1, 5**-0.5, 0, -(2**-0.5)]
    assert hits.similarities[0].tolist() == pytest.approx(wanted)


def test_numbers_a_row_at_the_mean_has_cosine_zero_with_everything() -> None:
    features = torch.tensor([[1.0, 1.0], [3.0, 1.0], [2.0, 1.0]])  # mean (2, 1)
    store = Datastore.from_features(features, [0, 1, 2])
    hits = store.search(torch.tensor([[5.0, 1.0]]), 3)
    assert hits.ids.tolist() == [[1, 2, 0]]
    assert hits.similarities.tolist() == [[1, 0, -1]]


def test_numbers_tiny_float64_queries_have_cosines_within_one() -> None:
    store = Datastore.from_features(torch.eye(2), [0, 1], normalization="l2")
    query = torch.tensor([[2.7e-162, 0.0]], dtype=torch.float64)
    assert store.search(query, 2).similarities.max() <= 1 + 1e-6


# reliability.md, Numbers: k and N


@pytest.mark.parametrize("k", [0, -1, True, False, 1.0, 2.5, "3", None, torch.tensor(2)])
def test_numbers_k_must_be_a_whole_number_above_zero(k: Any) -> None:
    with pytest.raises(ValueError, match=r"`k`.*whole number >= 1.*but got"):
        make_store().search(normal(1, 1, 3), k)


@pytest.mark.parametrize("k", [6, 7, 1000, 10**12, np.int64(10**12), 10**30])
def test_numbers_k_larger_than_the_store_gives_what_exists(k: int) -> None:
    store = make_store()
    hits = store.search(normal(1, 2, 3), k)
    assert hits.ids.shape == (2, 6)
    assert (hits.ids.sort(dim=1).values == store.ids).all()
    assert store.search(normal(1, 2, 3), k, exclude_ids=[100, -1]).ids.shape == (2, 5)


def test_numbers_an_empty_store_has_no_neighbours() -> None:
    store = Datastore.from_features(torch.zeros(0, 3), [])
    assert (len(store), store.dim, store.dtype) == (0, 3, "float16")
    for exclude_ids in (None, [1, 2]):
        hits = store.search(normal(1, 2, 3), 20, exclude_ids)
        assert [tuple(part.shape) for part in hits] == [(2, 0)] * 3
        assert [part.dtype for part in hits] == [torch.float32, torch.int64, torch.int64]
    assert store.add(normal(0, 2, 3), [4, 5]).tolist() == [0, 1]
    assert store.search(normal(1, 1, 3), 20).ids.shape == (1, 2)
    store.remove([0, 1])
    assert store.search(normal(1, 1, 3), 20).ids.shape == (1, 0)


def test_numbers_a_store_of_one_row() -> None:
    store = Datastore.from_features(normal(0, 1, 3), [5], [9])
    assert store.search(normal(1, 2, 3), 3).labels.tolist() == [[5], [5]]
    assert store.search(normal(1, 2, 3), 3, exclude_ids=[9, -1]).ids.shape == (2, 0)


def test_numbers_no_queries() -> None:
    assert make_store().search(torch.zeros(0, 3), 2).ids.shape == (0, 2)


def test_numbers_one_class_and_a_class_without_rows() -> None:
    store = Datastore.from_features(normal(0, 5, 3), [1] * 5)
    hits = store.search(normal(1, 2, 3), 3)
    log_probs = knn_log_probs(hits.similarities, hits.labels, 3, 0.1)
    assert log_probs[:, 1].exp().tolist() == pytest.approx([1, 1])
    assert (log_probs[:, [0, 2]] == -torch.inf).all()


# reliability.md, Numbers: kinds of input


@pytest.mark.parametrize(
    ("library", "kind"),
    [("torch", "bfloat16")]
    + [
        (library, kind)
        for library in ("torch", "numpy")
        for kind in ("float16", "float64", "strided", "transposed")
    ],
)
def test_numbers_other_float_kinds_are_converted(library: str, kind: str) -> None:
    plain = normal(0, 40, 3).bfloat16().float()  # exact in all of them
    converted = {
        "float16": lambda rows: rows.half(),
        "bfloat16": lambda rows: rows.bfloat16(),
        "float64": lambda rows: rows.double(),
        "strided": lambda rows: torch.stack([rows, rows + 1], dim=2)[:, :, 0],
        "transposed": lambda rows: rows.T.contiguous().T,
    }[kind](plain)
    if library == "numpy":
        converted = converted.numpy()
    store = Datastore.from_features(converted, [0] * 40)
    wanted = Datastore.from_features(plain, [0] * 40)
    assert_same_store(store, wanted)
    assert store.features.is_contiguous()
    assert_equal_hits(store.search(converted, 5), wanted.search(plain, 5))
    store.add(converted, [1] * 40)
    wanted.add(plain, [1] * 40)
    assert_same_store(store, wanted)


def test_numbers_arrays_with_negative_strides_are_converted() -> None:
    rows = normal(0, 6, 3).numpy()
    assert_same_store(
        Datastore.from_features(rows[::-1, ::-1], [0] * 6),
        Datastore.from_features(rows[::-1, ::-1].copy(), [0] * 6),
    )


def test_numbers_float64_queries_keep_their_digits() -> None:
    # the nearer row is known in float64 only: 1 + 1e-9 rounds to 1 in float32
    store = Datastore.from_features(
        torch.tensor([[0.0], [2.0]]), [0, 1], metric="l2", normalization="none"
    )
    queries = torch.tensor([[1 - 1e-9], [1 + 1e-9], [1.0]], dtype=torch.float64)
    assert store.search(queries, 1).ids.flatten().tolist() == [0, 1, 0]


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_numbers_other_kinds_of_features_are_refused(dtype: torch.dtype) -> None:
    features = torch.ones(2, 3).to(dtype)
    with pytest.raises(ValueError, match=rf"`features`.*float dtype.*{dtype}"):
        Datastore.from_features(features, [0, 1])
    with pytest.raises(ValueError, match=rf"`queries`.*float dtype.*{dtype}"):
        make_store().search(features, 1)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 1), ()])
def test_numbers_another_number_of_dimensions_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`features` to be \[N, D\]"):
        Datastore.from_features(torch.ones(shape), [0, 1])
    with pytest.raises(ValueError, match=r"`queries` to be \[N, D\]"):
        make_store().search(torch.ones(shape), 1)


def test_numbers_another_width_is_refused_with_both() -> None:
    store = make_store()
    with pytest.raises(ValueError, match=r"`queries` to have width 3.*but got 4"):
        store.search(normal(0, 2, 4), 1)
    with pytest.raises(ValueError, match=r"`features` to have width 3.*but got 2"):
        store.add(normal(0, 2, 2), [0, 0])


def test_numbers_width_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="`features`"):
        Datastore.from_features(torch.zeros(3, 0), [0, 1, 2])


@pytest.mark.parametrize(
    "labels",
    [[0.0, 1.0], [0, -1], [True, False], [0], [0, 1, 2], [[0, 1]], torch.tensor([0.5, 1]), 3],
)
def test_numbers_labels_are_checked(labels: Any) -> None:
    with pytest.raises(ValueError, match="labels"):
        Datastore.from_features(normal(0, 2, 3), labels)
    store = make_store()
    before = copy.deepcopy(store)
    with pytest.raises(ValueError, match="labels"):
        store.add(normal(0, 2, 3), labels)
    with pytest.raises(ValueError, match="labels"):
        store.relabel([100, 101], labels)
    assert_same_store(store, before)


@pytest.mark.parametrize("ids", [[0.0, 1.0], [0, -1], [0], [0, 1, 2], [4, 4], [True, False]])
def test_numbers_ids_are_checked(ids: Any) -> None:
    with pytest.raises(ValueError, match="ids"):
        Datastore.from_features(normal(0, 2, 3), [0, 1], ids)
    store = make_store()
    before = copy.deepcopy(store)
    with pytest.raises(ValueError, match="ids"):
        store.add(normal(0, 2, 3), [0, 1], ids)
    assert_same_store(store, before)


@pytest.mark.parametrize(
    "values", [np.array([0, 1], np.int32), np.array([0, 1], np.uint8), torch.tensor([0, 1]), (0, 1)]
)
def test_numbers_other_whole_numbers_are_converted(values: Any) -> None:
    store = Datastore.from_features(normal(0, 2, 3), values, values)
    assert store.labels.dtype == store.ids.dtype == torch.int64
    assert store.labels.tolist() == store.ids.tolist() == [0, 1]


@pytest.mark.parametrize("labels", [np.array([1j, 2j]), ["cat", "dog"], [None, 1]])
def test_numbers_labels_that_are_no_numbers_are_refused(labels: Any) -> None:
    with pytest.raises(ValueError, match="labels"):
        Datastore.from_features(normal(0, 2, 3), labels)


# what goes in


def test_options_are_checked() -> None:
    rows = normal(0, 2, 3)
    bad: list[dict[str, Any]] = [
        {"metric": "euclid"},
        {"normalization": "max"},
        {"index": "IVF16,Flat"},
        {"paths": ["a"]},
        {"metric": "cosine", "normalization": "none"},
    ]
    for options in bad:
        with pytest.raises(ValueError, match=r"euclid|max|`index`.*IVF16|path.*2.*1|'none'"):
            Datastore.from_features(rows, [0, 1], **options)


def test_the_constructor_refuses_parts_that_do_not_fit() -> None:
    rows, numbers = normal(0, 2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"`features`.*float16 or float32.*float64"):
        Datastore(rows.double(), numbers, numbers, torch.zeros(3))
    with pytest.raises(ValueError, match=r"`mean`.*\(3,\).*\(2,\)"):
        Datastore(rows, numbers, numbers, torch.zeros(2))
    with pytest.raises(ValueError, match=r"row \(2\).*3 labels and 2 ids"):
        Datastore(rows, torch.arange(3), numbers, torch.zeros(3))


def test_changing_the_callers_arrays_does_not_change_the_store() -> None:
    features, labels, ids = torch.full((3, 2), 1e5), torch.arange(3), torch.arange(3)
    store = Datastore.from_features(features, labels, ids)
    features[0], labels[0], ids[0] = 7.0, 99, 98
    assert store.features[0, 0] == 1e5
    assert store.labels.tolist() == store.ids.tolist() == [0, 1, 2]


# storage dtype


def storage_message(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "float32" in record.message]


def test_float16_by_default(caplog: pytest.LogCaptureFixture) -> None:
    features = normal(0, 50, 8) * 100
    features[0, 0] = 6e4
    store = Datastore.from_features(features, [0] * 50)
    assert store.dtype == "float16"
    assert torch.equal(store.features, features.half())
    assert store.mean.dtype == torch.float32
    torch.testing.assert_close(store.mean, features.half().double().mean(0).float())
    assert not storage_message(caplog)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param([6.01e4, 1.0], id="above 6e4"),
        pytest.param([-7e4, 1.0], id="below -6e4"),
        pytest.param([3e-7, 4e-8], id="turned by the cast"),
        pytest.param([1e-9, 0.0], id="vanishes in the cast"),
    ],
)
def test_float32_by_itself_with_a_message(
    row: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    features = torch.cat([normal(0, 20, 2), torch.tensor([row])])
    with caplog.at_level(logging.WARNING):
        store = Datastore.from_features(features, [0] * 21)
    assert store.dtype == "float32"
    assert torch.equal(store.features, features)
    assert len(storage_message(caplog)) == 1


def test_the_limit_of_the_cosine_is_0_9999() -> None:
    # (8, n) quanta of float16's subnormal numbers: 8.46 -> 8 turns by about 0.018 rad at n = 8
    quantum = 2.0**-24
    for second, dtype in ((8.02, "float16"), (8.46, "float32")):
        row = torch.tensor([[8.0, second]], dtype=torch.float64) * quantum
        cast = row.half().double()
        cosine = float((row * cast).sum() / row.norm() / cast.norm())
        assert (cosine >= 0.9999) == (dtype == "float16")
        assert Datastore.from_features(row, [0]).dtype == dtype


def test_add_widens_the_store_when_it_must(caplog: pytest.LogCaptureFixture) -> None:
    store = make_store(metric="l2", normalization="none")
    before = copy.deepcopy(store)
    store.add(normal(1, 2, 3), [0, 1])
    assert store.dtype == "float16"
    with caplog.at_level(logging.WARNING):
        store.add(torch.full((1, 3), 1e5), [1])
    assert len(storage_message(caplog)) == 1
    assert store.dtype == "float32"
    assert torch.equal(store.features[:6], before.features.float())
    assert store.features[8].tolist() == [1e5] * 3
    store.add(torch.full((1, 3), 0.1), [1])  # stays float32, and so does what comes after
    assert store.features[9].tolist() == torch.full((3,), 0.1).tolist()
    assert_nearest(store.search(normal(2, 4, 3), 5), store, normal(2, 4, 3), 5)


# add, remove, relabel, recenter


def table_of(store: Datastore) -> dict[int, tuple[list[float], int, str]]:
    """What the store says about each id; fails when the parts are out of step."""
    assert len(store) == len(store.features) == len(store.labels) == len(store.ids)
    assert store.paths is None or len(store.paths) == len(store)
    return {
        number: (store.features[row].tolist(), int(store.labels[row]), store.path_of(number))
        for row, number in enumerate(store.ids.tolist())
    }


def paths_for(ids: list[int]) -> list[str]:
    return [f"pictures/{number}.png" for number in ids]


def bad_changes(store: Datastore, some: list[int]) -> list[Callable[[], object]]:
    """Changes that must be refused as a whole; `some` are ids of the store, 50 and more are not."""
    rows, taken = torch.ones(2, store.dim), (some or [-1])[0]
    return [
        lambda: store.remove([*some, 99]),
        lambda: store.relabel([*some, 99], [0] * (len(some) + 1)),
        lambda: store.relabel(some, [0] * (len(some) + 1)),
        lambda: store.add(rows, [0, 1], [50, 50]),
        lambda: store.add(rows, [0, 1], [50, taken]),
        lambda: store.add(rows, [0, 1], [50, 51], ["one"]),
        lambda: store.add(rows, [0]),
        lambda: store.add(rows * torch.nan, [0, 1]),
    ]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_sequence_of_changes_keeps_rows_together(data: st.DataObject) -> None:
    width, generator = 3, np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    model: dict[int, tuple[list[float], int, str]] = {}
    store = Datastore.from_features(torch.zeros(0, width), [], paths=[])

    def rows(count: int) -> NDArray:
        return generator.integers(-50, 50, size=(count, width)).astype(np.float32)

    for _ in range(data.draw(st.integers(1, 8))):
        action = data.draw(st.sampled_from(["add", "add", "remove", "relabel", "recenter", "bad"]))
        known = sorted(model)
        some = data.draw(st.lists(st.sampled_from(known), unique=True)) if known else []
        before, mean = copy.deepcopy(store), store.mean
        if action == "add":
            fresh = data.draw(st.lists(st.integers(0, 40), unique=True, max_size=6))
            fresh = [number for number in fresh if number not in model]
            features, labels = rows(len(fresh)), generator.integers(0, 5, size=len(fresh))
            added = store.add(features, labels, fresh, paths_for(fresh))
            assert added.tolist() == fresh
            for number, row, label in zip(fresh, features, labels, strict=True):
                model[number] = row.tolist(), int(label), paths_for([number])[0]
        elif action == "remove":
            store.remove(some)
            for number in some:
                del model[number]
        elif action == "relabel":
            labels = generator.integers(0, 5, size=len(some))
            store.relabel(some, labels)
            for number, label in zip(some, labels, strict=True):
                model[number] = model[number][0], int(label), model[number][2]
        elif action == "recenter":
            store.recenter()
            wanted = np.mean([row for row, _, _ in model.values()] or [[0] * width], axis=0)
            np.testing.assert_allclose(store.mean.numpy(), wanted, rtol=1e-6, atol=1e-6)
            mean = store.mean
        else:
            for change in bad_changes(store, some):
                with pytest.raises(ValueError, match=r"Expected"):
                    change()
            assert_same_store(store, before)
        assert torch.equal(store.mean, mean)
        assert table_of(store) == model
        assert store.search(rows(1), 4).ids.shape == (1, min(4, len(model)))
    queries = rows(3)
    assert_nearest(store.search(queries, 4), store, queries, 4)


def test_errors_name_the_ids() -> None:
    store = make_store()
    with pytest.raises(ValueError, match=r"`ids`.*does not have.*but it has \[100, 103\]"):
        store.add(normal(1, 3, 3), [0, 0, 0], [100, 7, 103])
    with pytest.raises(ValueError, match=r"`ids` that the datastore has.*\[7, 9\]"):
        store.remove([100, 7, 9])
    with pytest.raises(ValueError, match=r"`ids` that the datastore has.*\[7\]"):
        store.relabel([7], [0])
    with pytest.raises(ValueError, match="doubled"):
        store.remove([100, 100])
    with pytest.raises(ValueError, match=r"unique `ids`.*\[4\]"):
        store.add(normal(1, 3, 3), [0, 0, 0], [4, 5, 4])
    with pytest.raises(ValueError, match=r"`ids` that the datastore has.*\[0\]"):
        Datastore.from_features(torch.zeros(0, 3), []).remove([0])
    with pytest.raises(ValueError, match=r"`ids` that the datastore has.*\[7\]"):
        store.path_of(7)


def test_add_numbers_new_rows_after_the_largest_id() -> None:
    store = Datastore.from_features(normal(0, 3, 2), [0, 1, 2], [5, 40, 2])
    assert store.add(normal(1, 2, 2), [0, 1]).tolist() == [41, 42]
    assert store.add(torch.zeros(0, 2), []).tolist() == []
    assert store.ids.tolist() == [5, 40, 2, 41, 42]


def test_paths_are_optional_row_by_row() -> None:
    store = make_store(2)
    assert not store.paths
    assert store.path_of(100) == ""
    store.add(normal(1, 1, 3), [0], [7], ["a.png"])
    assert store.paths == ["", "", "a.png"]
    store.add(normal(1, 1, 3), [0], [8])
    assert [store.path_of(number) for number in (100, 7, 8)] == ["", "a.png", ""]


def test_search_sees_each_change_at_once() -> None:
    store = Datastore.from_features(
        torch.tensor([[0.0, 1.0], [5.0, 0.0]]), [0, 1], metric="l2", normalization="none"
    )
    query = torch.tensor([[0.0, 2.0]])
    assert store.search(query, 1).labels.item() == 0
    store.add(query, [2])
    assert store.search(query, 1).labels.item() == 2
    store.relabel([2], [7])
    assert store.search(query, 1).labels.item() == 7
    store.remove([2])
    assert store.search(query, 1).labels.item() == 0


def test_the_mean_moves_by_recenter_only() -> None:
    store = Datastore.from_features(torch.tensor([[1.0, 1.0], [3.0, 1.0]]), [0, 1])
    query = torch.tensor([[4.0, 2.0]])
    store.add(torch.tensor([[100.0, 1.0]]), [2])
    store.remove([0])
    assert store.mean.tolist() == [2, 1]
    # (4, 2) - (2, 1) = (2, 1); (100, 1) and (3, 1) are both east of the mean: ties, by id
    assert store.search(query, 2).ids.tolist() == [[1, 2]]
    assert store.search(query, 1).similarities.item() == pytest.approx(2 / 5**0.5)
    store.recenter()
    assert store.mean.tolist() == [51.5, 1]
    # (-47.5, 1) from the new mean: (3, 1) is west of it as well
    assert store.search(query, 2).ids.tolist() == [[1, 2]]
    wanted = 47.5 / (47.5**2 + 1) ** 0.5
    assert store.search(query, 2).similarities[0].tolist() == pytest.approx([wanted, -wanted])


def test_deepcopy_shares_the_arrays_and_nothing_else() -> None:
    store = make_store(paths=paths_for(list(range(6))))
    twin = copy.deepcopy(store)
    for name in ("features", "labels", "ids", "mean"):
        assert getattr(twin, name).data_ptr() == getattr(store, name).data_ptr()
    before = table_of(store)
    twin.relabel([100], [9])
    twin.add(normal(1, 1, 3), [0], paths=["new.png"])
    twin.remove([101])
    twin.recenter()
    assert table_of(store) == before
    assert store.search(normal(1, 1, 3), 99).ids.shape == (1, 6)
    assert len(twin) == 6
    assert not torch.equal(twin.mean, store.mean)


def test_len_dim_and_repr() -> None:
    store = make_store(metric="l2", normalization="none")
    assert (len(store), store.dim, store.dtype, store.index.spec) == (6, 3, "float16", "flat")
    assert "6 x 3 float16" in repr(store)


# without faiss


@in_every_space
def test_torch_search_equals_faiss_search(
    metric: str, normalization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = normal(0, 2000, 12)
    features[1000:1600] = features[:600]
    features[1600:] = features[0]
    queries = torch.cat([features[:100], normal(1, 100, 12)])

    def found() -> Neighbors:
        store = Datastore.from_features(
            features, torch.arange(2000) % 9, None, metric, normalization
        )
        return store.search(queries, 20, exclude_ids=torch.arange(200))

    wanted = found()
    pretend(monkeypatch, lambda: False)
    monkeypatch.setattr(first_pass, "ROW_BLOCK", 300)
    assert_equal_hits(found(), wanted)


SEARCH_SCRIPT = """
import sys
if {hide}:
    sys.modules["faiss"] = None  # `import faiss` raises ImportError
import torch
from hf_knn.store.datastore import Datastore
from hf_knn.store.faiss import has_faiss
assert has_faiss() != {hide}
rows = torch.randn(3000, 24, generator=torch.Generator().manual_seed(0))
rows[2000:2900] = rows[:900]
rows[2900:] = rows[5]
hits = []
for metric, normalization in {spaces}:
    store = Datastore.from_features(rows, torch.arange(3000) % 9, None, metric, normalization)
    for _ in range(2):
        found = store.search(rows[:100] + 0.01, 20, exclude_ids=torch.arange(100))
    hits += list(found)
    store.save({folder!r} + "/store-" + metric + normalization)
torch.save(hits, {folder!r} + "/hits.pt")
store.add(rows[:1], [0])
store.search(rows[:1], 1)
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Path, str]]:
    """The same searches in a fork of this process, with faiss, and in a new one without."""
    folders = {hide: tmp_path_factory.mktemp(f"hide-{hide}") for hide in (False, True)}
    scripts = {
        hide: SEARCH_SCRIPT.format(hide=hide, spaces=SPACES, folder=str(folder))
        for hide, folder in folders.items()
    }
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", scripts[True]], cwd=folders[True], env=environment,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = folders[False] / "said.txt"

    def search_here() -> None:
        with said.open("w") as file:
            logging.basicConfig(stream=file, level=logging.WARNING, force=True)
            exec(scripts[False], {})

    assert outcome(search_here) == ""
    return {False: (folders[False], said.read_text()), True: (folders[True], done.stderr)}


@pytest.mark.slow
def test_without_faiss_neighbours_are_bit_equal(
    two_processes: dict[bool, tuple[Path, str]],
) -> None:
    hits = [torch.load(two_processes[hide][0] / "hits.pt") for hide in (False, True)]
    assert len(hits[0]) == 3 * len(SPACES)
    for mine, others in zip(*hits, strict=True):
        assert torch.equal(mine, others)


def test_without_faiss_saved_rows_are_equal(two_processes: dict[bool, tuple[Path, str]]) -> None:
    for metric, normalization in SPACES:
        folders = [
            two_processes[hide][0] / f"store-{metric}{normalization}" for hide in (False, True)
        ]
        assert_same_store(*(Datastore.load(folder) for folder in folders))
        assert [(folder / "datastore.faiss").exists() for folder in folders] == [True, False]


def test_without_faiss_a_message_names_the_extra(
    two_processes: dict[bool, tuple[Path, str]],
) -> None:
    assert "faiss" not in two_processes[False][1]
    errors = two_processes[True][1]
    assert "faiss is not installed" in errors
    assert re.search(r"pip install .*\[cpu\]", errors)
    assert "Traceback" not in errors


def test_without_faiss_there_is_one_message(two_processes: dict[bool, tuple[Path, str]]) -> None:
    assert two_processes[True][1].count("faiss is not installed") == 1


@pytest.mark.usefixtures("without_faiss")
def test_without_faiss_autocast_does_not_matter() -> None:
    store, queries = make_store(200, 8), normal(1, 5, 8)
    wanted = store.search(queries, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal_hits(store.search(queries, 5), wanted)


def test_autocast_and_inference_mode_do_not_matter() -> None:
    queries = normal(1, 5, 8)
    wanted = make_store(200, 8).search(queries, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal_hits(make_store(200, 8).search(queries, 5), wanted)
    with torch.inference_mode():
        store = make_store(200, 8)
        assert_equal_hits(store.search(queries, 5), wanted)
    assert_equal_hits(store.search(queries.requires_grad_(), 5), wanted)


def test_queries_that_need_more_candidates_do_not_disturb_the_others() -> None:
    features = torch.cat([torch.ones(600, 4), normal(0, 600, 4)])
    store = Datastore.from_features(features, torch.arange(1200) % 5, normalization="l2")
    queries = torch.stack([features[0], features[700], features[1], features[800]])
    hits = store.search(queries, 8)
    for row in range(4):
        alone = store.search(queries[row : row + 1], 8)
        assert_equal_hits(Neighbors(*(part[row : row + 1] for part in hits)), alone)
    assert hits.ids[0].tolist() == hits.ids[2].tolist() == list(range(8))
    assert hits.ids[:, 0].tolist() == [0, 700, 0, 800]
