"""What every kind of datastore is, and searches among some of the rows."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from support.oracles import assert_nearest
from torch import Tensor

from hf_knn import Datastore, MilvusDatastore, SearchBackend
from hf_knn.core.search import Neighbors
from hf_knn.store.backend import RowStore, as_row_store, check_split, even_parts
from hf_knn.store.table import StoredRows

ROWS, DIM = 200, 5
KINDS = [("cosine", "l2_centered"), ("l2", "none")]


def as_backend(store: Datastore, other: MilvusDatastore) -> list[RowStore]:
    """That both are one is what mypy checks here."""
    return [store, other]


def make_store(metric: str = "cosine", normalization: str = "l2_centered") -> Datastore:
    generator = torch.Generator().manual_seed(0)
    store = Datastore.from_features(
        torch.randint(-2, 3, (ROWS, DIM), generator=generator).float(),
        torch.randint(0, 5, (ROWS,), generator=generator),
        torch.randperm(1000, generator=generator)[:ROWS],
        metric=metric, normalization=normalization,
    )  # fmt: skip
    store.source = {"split": "train"}
    return store


def queries() -> Tensor:
    return torch.randn(8, DIM, generator=torch.Generator().manual_seed(1))


def of_labels(store: Datastore, labels: list[int]) -> Datastore:
    """The oracle: a datastore that never had other rows, with the same mean."""
    kept = torch.isin(store.labels, torch.tensor(labels))
    return Datastore(
        store.features[kept], store.labels[kept], store.ids[kept], store.mean,
        metric=store.metric, normalization=store.normalization,
    )  # fmt: skip


def public(kind: type) -> set[str]:
    names = set(vars(kind)) | set(kind.__annotations__)
    return {name for name in names if not name.startswith("_") or name == "__len__"}


def test_a_datastore_is_a_backend(tmp_path: Path) -> None:
    store = make_store()
    assert isinstance(store, SearchBackend)
    assert not isinstance(torch.nn.Linear(1, 1), SearchBackend)
    for name in public(SearchBackend):
        assert hasattr(store, name), name


def test_what_a_model_asks_is_little():
    assert public(SearchBackend) == {
        "__len__", "dim", "metric", "normalization", "mean", "search", "rows_of", "save",
    }  # fmt: skip


def test_what_only_answers_cannot_be_changed():
    class Answers:
        metric, normalization, mean, dim = "cosine", "none", torch.zeros(2), 2

        def __len__(self) -> int:
            return 0

        def search(self, queries: Any, k: int = 20, exclude_ids: Any = None) -> Neighbors:
            raise NotImplementedError

        def rows_of(self, ids: Any) -> StoredRows:
            raise NotImplementedError

        def save(self, folder: str | Path, *, binding: Any = None, reuse: Any = None) -> None:
            raise NotImplementedError

    store = make_store()
    assert as_row_store(store) is store
    assert isinstance(Answers(), SearchBackend)
    with pytest.raises(ValueError, match=r"Answers only answers, without add, .*; use a Datastore"):
        as_row_store(Answers())


def test_rows_that_were_removed_come_back():
    store = make_store()
    paths = [f"{row}.png" for row in store.ids.tolist()]
    named = Datastore.from_features(store.features, store.labels, store.ids, paths=paths)
    for each in (store, named):
        gone, known = each.rows_of(each.ids[3:9]), each.hash_sum()
        each.remove(gone.ids)
        assert each.put_back(gone).tolist() == gone.ids.tolist()
        assert each.hash_sum() == known


@pytest.mark.parametrize("kind", [Datastore, MilvusDatastore])
def test_the_parameters_are_those_of_the_protocol(kind: type) -> None:
    """Whoever calls by name finds each parameter, with the same default."""
    for name in (
        "search",
        "leave_one_out",
        "add",
        "remove",
        "relabel",
        "path_of",
        "paths_of",
        "save",
    ):
        wanted = inspect.signature(getattr(RowStore, name)).parameters
        found = inspect.signature(getattr(kind, name)).parameters
        for parameter in wanted.values():
            assert found[parameter.name].default == parameter.default, (name, parameter.name)
            assert found[parameter.name].kind == parameter.kind, (name, parameter.name)


def test_paths_of_many_rows_are_those_of_each():
    store = make_store()
    named = Datastore.from_features(
        store.features, store.labels, store.ids, paths=[f"{row}.png" for row in store.ids.tolist()]
    )
    for count in (0, 1, 8, 9, ROWS):
        ids = store.ids[torch.randperm(ROWS)[:count]].tolist()
        assert named.paths_of(ids) == [f"{row}.png" for row in ids]
        assert store.paths_of(ids) == [""] * count
    missing = int(store.ids.max()) + 1
    with pytest.raises(ValueError, match="does not have"):
        named.paths_of([*store.ids.tolist(), missing])


@pytest.mark.parametrize(("metric", "normalization"), KINDS)
@pytest.mark.parametrize("labels", [[1], [0, 4], [2, 2, 3], [99], []])
def test_only_rows_of_some_labels(labels, metric, normalization):
    store = make_store(metric, normalization)
    wanted = of_labels(store, labels)
    own = store.ids[:8].clone()
    for k in (1, 12, ROWS):
        for excluded in (None, own):
            hits = store.search(queries(), k, excluded, labels=labels)
            assert_nearest(hits, wanted, queries(), k, None if excluded is None else own.numpy())
    assert set(hits.labels.unique().tolist()) <= set(labels)


def test_labels_are_exact_where_the_index_is_not():
    store = make_store()
    lists = Datastore(
        store.features, store.labels, store.ids, store.mean, index="IVF8,Flat", min_recall=0.01
    )
    hits = lists.search(queries(), 20, labels=[0, 2])
    assert_nearest(hits, of_labels(store, [0, 2]), queries(), 20)


def test_filtered_rows_follow_every_change():
    store = make_store()

    def check() -> None:
        hits = store.search(queries(), 10, labels=[1, 2])
        assert_nearest(hits, of_labels(store, [1, 2]), queries(), 10)

    check()
    store.relabel(store.ids[:60], [2] * 60)
    check()
    store.remove(store.ids[10:50])
    check()
    store.add(torch.ones(5, DIM), [1] * 5, range(5000, 5005))
    check()
    store.recenter()
    check()
    first, again = (store._of_labels([2, 1]) for _ in range(2))
    assert first is again  # kept ready for the next search


def test_splits():
    store = make_store()
    assert torch.equal(
        store.search(queries(), 5, split="train").ids, store.search(queries(), 5).ids
    )
    with pytest.raises(ValueError, match="but got 'test' and its rows are of 'train'"):
        store.search(queries(), 5, split="test")
    store.source = {}
    with pytest.raises(ValueError, match="it does not know of which split they are"):
        store.search(queries(), 5, split="train")
    check_split(None, {})


def test_similarities_beyond_float32_are_its_largest():
    huge = Neighbors(torch.tensor([[-1e300]], dtype=torch.float64), *[torch.zeros(1, 1)] * 2)
    assert huge.rounded(queries()).similarities.item() == -torch.finfo(torch.float32).max


@pytest.mark.parametrize(("count", "parts"), [(0, 0), (0, 3), (1, 1), (10, 3), (4097, 2), (7, 7)])
def test_queries_are_cut_into_parts_of_one_length(count: int, parts: int) -> None:
    cut = even_parts(count, parts)
    assert len(cut) == parts
    assert [row for part in cut for row in range(count)[part]] == list(range(count))
    lengths = [part.stop - part.start for part in cut]
    assert max(lengths, default=0) - min(lengths, default=0) <= 1


def test_leave_one_out_has_no_last_call_of_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    search = Datastore.search

    def counted(self: Datastore, queries: Tensor, *rest: Any, **options: Any) -> Neighbors:
        asked.append(len(queries))
        return search(self, queries, *rest, **options)

    monkeypatch.setattr(Datastore, "search", counted)
    features = torch.randn(131, 4, generator=torch.Generator().manual_seed(0))
    store = Datastore.from_features(features, torch.zeros(131).long())
    found = torch.cat([hits.ids for hits in store.leave_one_out(3, 65)])
    assert asked == [43, 44, 44]
    assert torch.equal(found, search(store, features, 3, store.ids).ids)
