"""The same answer for any batch size and thread count, and in any order of insertion.

Differences are counted, not asserted query by query: a count tells an unlucky tie from a fault.
"""

from collections import Counter
from collections.abc import Callable, Iterator

import faiss
import pytest
import torch
from support.first_passes import FIRST_PASSES, MADE, SPACES, forced, placed
from support.oracles import assert_nearest
from torch import Tensor

from hf_knn.core.search import Neighbors, Rows, RowSpace
from hf_knn.store import index as indexing
from hf_knn.store.datastore import Datastore
from hf_knn.store.searcher import GrowingFirstPass

WIDTH, K = 8, 10
BLOCK = 512
BATCH_SIZES = (1, 7, 64, 1000)
THREADS = (1, 2)
COPIES = ("doubled", "500 equal")
PER_SPACE, LONG = 240, 10_000
"""Queries of each of the two stores in each of the five spaces: 2,400 in all, or 100,000."""

CODES = "IVF16,RaBitQfs,Refine(SQfp16)"
APPROXIMATE = ("IVF16,Flat", "IVF16,SQ8", "IVF16,SQfp16", CODES, "HNSW8")
in_every_space = pytest.mark.parametrize(("metric", "normalization"), SPACES)
on_ties = pytest.mark.parametrize("copies", COPIES)
long_run = [pytest.mark.faults, pytest.mark.timeout(3600)]
for_many_queries = pytest.mark.parametrize("count", [PER_SPACE, pytest.param(LONG, marks=long_run)])


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_with(copies: str) -> Tensor:
    """[1500, WIDTH]: each row twice, or one of them 500 times; the rows lie in any order."""
    rows = normal(0, 1500, WIDTH)
    if copies == "doubled":
        rows[750:] = rows[:750]
    else:
        rows[1000:] = rows[0]
    return rows[torch.randperm(1500, generator=torch.Generator().manual_seed(1))]


def queries_for(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Stored rows, each as if it were left out, rows nearby, and new ones; with `exclude_ids`."""
    generator = torch.Generator().manual_seed(2)
    picked = torch.randint(len(rows), (count,), generator=generator)
    shift = normal(3, count, rows.shape[1])
    shift[::4] = 0
    shift[1::4] *= 1e-3
    exclude_ids = torch.where(torch.arange(count) % 2 == 0, picked, -1)
    return rows[picked] + shift, exclude_ids


def store_of(rows: Tensor, metric: str, normalization: str, index: str = "flat") -> Datastore:
    return Datastore.from_features(
        rows, torch.arange(len(rows)) % 7, None, metric, normalization, index, min_recall=0.5
    )


def in_batches(store: Datastore, queries: Tensor, exclude_ids: Tensor, size: int) -> Neighbors:
    pairs = zip(queries.split(size), exclude_ids.split(size), strict=True)
    parts = [store.search(part, K, excluded) for part, excluded in pairs]
    return Neighbors(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def differences(found: Neighbors, wanted: Neighbors) -> Counter[str]:
    """How many queries have another answer, by what differs; similarities bit for bit."""
    counted: Counter[str] = Counter()
    for name in Neighbors._fields:
        mine, others = getattr(found, name), getattr(wanted, name)
        assert mine.shape == others.shape
        if mine.is_floating_point():
            mine, others = mine.view(torch.int32), others.view(torch.int32)
        counted[name] = int((mine != others).any(dim=1).sum())
    return +counted  # without the zeros


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads(), faiss.omp_get_max_threads()

    def use(count: int) -> None:
        torch.set_num_threads(count)
        faiss.omp_set_num_threads(count)

    yield use
    torch.set_num_threads(before[0])
    faiss.omp_set_num_threads(before[1])


def count_over_batches(
    store: Datastore,
    queries: Tensor,
    exclude_ids: Tensor,
    wanted: Neighbors,
    threads: Callable[[int], None],
) -> Counter[str]:
    """Differences over all batch sizes and thread counts.

    Every tenth query goes through batches of one, which cost a hundred times as much.
    """
    total: Counter[str] = Counter()
    for count in THREADS:
        threads(count)
        for size in BATCH_SIZES:
            some = slice(None, None, 10 if size == 1 else None)
            found = in_batches(store, queries[some], exclude_ids[some], size)
            total += differences(found, Neighbors(*(part[some] for part in wanted)))
    return total


@for_many_queries
@in_every_space
@on_ties
def test_exact_answers_do_not_depend_on_batch_size_or_threads(
    count: int, copies: str, metric: str, normalization: str, threads: Callable[[int], None]
) -> None:
    rows = rows_with(copies)
    store = store_of(rows, metric, normalization)
    queries, exclude_ids = queries_for(rows, count)
    threads(1)
    wanted = store.search(queries, K, exclude_ids)
    assert not count_over_batches(store, queries, exclude_ids, wanted, threads)


@for_many_queries
@in_every_space
@on_ties
@pytest.mark.parametrize("first_pass", [name for name in FIRST_PASSES if name != "faiss"])
def test_exact_answers_do_not_depend_on_the_library(
    count: int,
    copies: str,
    metric: str,
    normalization: str,
    first_pass: str,
    threads: Callable[[int], None],
) -> None:
    rows = rows_with(copies)
    queries, exclude_ids = queries_for(rows, count // 8)  # the libraries take turns
    with forced("faiss", BLOCK):
        wanted = store_of(rows, metric, normalization).search(queries, K, exclude_ids)
    with forced(first_pass, BLOCK):
        store = placed(store_of(rows, metric, normalization), first_pass)
        assert not count_over_batches(store, queries, exclude_ids, wanted, threads)


@for_many_queries
@on_ties
@pytest.mark.parametrize("index", APPROXIMATE)
def test_approximate_answers_do_not_depend_on_batch_size_or_threads(
    count: int, copies: str, index: str, threads: Callable[[int], None]
) -> None:
    rows = rows_with(copies)
    queries, exclude_ids = queries_for(rows, count)
    # built once: what a k-means or a graph turns out to be may depend on the threads
    store = store_of(rows, "cosine", "l2_centered", index)
    wanted = store.search(queries, K, exclude_ids)
    assert not count_over_batches(store, queries, exclude_ids, wanted, threads)


@for_many_queries
@in_every_space
@on_ties
def test_exact_answers_do_not_depend_on_insertion_order(
    count: int, copies: str, metric: str, normalization: str
) -> None:
    rows, labels = rows_with(copies), torch.arange(1500) % 7
    queries, exclude_ids = queries_for(rows, count)
    wanted = store_of(rows, metric, normalization).search(queries, K, exclude_ids)
    total: Counter[str] = Counter()
    for seed in range(3):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        store = Datastore.from_features(
            rows[order], labels[order], order, metric, normalization, "flat"
        )
        total += differences(store.search(queries, K, exclude_ids), wanted)
    assert not total


@in_every_space
@on_ties
@pytest.mark.parametrize("first_pass", FIRST_PASSES)
def test_exact_answers_do_not_depend_on_how_the_rows_came(
    copies: str, metric: str, normalization: str, first_pass: str
) -> None:
    """Rows that came one part after the other, with others that went again, in a built index."""
    rows, labels = rows_with(copies), torch.arange(1500) % 7
    queries, exclude_ids = queries_for(rows, 100)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(5))
    whole = store_of(rows, metric, normalization)
    wanted = whole.search(queries, K, exclude_ids)
    with forced(first_pass, BLOCK):
        store = Datastore(
            whole.features[order[:1200]], labels[order[:1200]], order[:1200], whole.mean,
            metric=metric, normalization=normalization,
        )  # fmt: skip
        placed(store, first_pass).search(queries, K)
        for part in order[1200:].split(100):
            store.add(rows[part], labels[part], part)
            others = store.add(queries[:50], [3] * 50, torch.arange(50) + 10_000)
            store.search(queries[:50], K)
            store.remove(others)
        assert not differences(store.search(queries, K, exclude_ids), wanted)


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["float32", "int8"])
def test_of_100_000_queries_none_differs_among_rows_of_many_blocks(
    name: str, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks, groups and batches as large as they are in use; each row lies there twice."""

    def built(made: str) -> Datastore:
        def build(features: Rows, space: RowSpace) -> GrowingFirstPass:
            return MADE[made](space.first_pass_rows(features))

        monkeypatch.setattr(indexing, "build_quickest", build)
        store = store_of(rows, "cosine", "l2_centered")
        store.build_index()
        return store

    rows = normal(0, 10_000, 96).repeat(2, 1)
    queries, exclude_ids = queries_for(rows, 100_000)
    peer, store = built("faiss"), built(name)
    wanted = peer.search(queries, K, exclude_ids)
    some = slice(None, None, 500)
    hits = Neighbors(*(part[some] for part in wanted))
    assert_nearest(hits, peer, queries[some], K, exclude_ids[some].numpy())
    total: Counter[str] = Counter()
    for count in THREADS:
        threads(count)
        for number, size in enumerate((1, 8, 64, 1000, 20_000)):
            own = slice(number * 20_000, (number + 1) * 20_000)
            found = in_batches(store, queries[own], exclude_ids[own], size)
            total += differences(found, Neighbors(*(part[own] for part in wanted)))
    assert not total
