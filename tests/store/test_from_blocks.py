"""Datastores from blocks of features: the rows, the index of codes, and what changes cost."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.stored import MANIFEST, names_in
from torch import Tensor

from hf_knn.store import disk, views
from hf_knn.store import table as row_table
from hf_knn.store.approximate import FaissApproximate
from hf_knn.store.blocks import Block
from hf_knn.store.choice import choose_index
from hf_knn.store.datastore import Datastore

COUNT, WIDTH, K = 2000, 16, 10
SPEC = "IVF32,RaBitQfs"


def rows(seed: int, count: int = COUNT) -> Tensor:
    """Around 40 places, which are the same for every seed."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(99))
    chosen = torch.randint(40, (count,), generator=generator)
    return 2 * places[chosen] + 0.5 * torch.randn(count, WIDTH, generator=generator)


LABELS = torch.arange(COUNT) % 7
IDS = torch.randperm(3 * COUNT, generator=torch.Generator().manual_seed(5))[:COUNT]
QUERIES = rows(2, 50)


def blocks(size: int = 700) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    yield from zip(rows(1).split(size), LABELS.split(size), IDS.split(size), strict=True)


@pytest.fixture
def several_mapped_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of 1,000 rows, none of which is read into memory when it is opened."""
    monkeypatch.setattr(row_table, "SHARD_BYTES", 1000 * 2 * WIDTH)
    monkeypatch.setattr(row_table, "SMALL_SHARD_BYTES", 100 * 2 * WIDTH)
    monkeypatch.setattr(disk, "LARGEST_VERIFIED_AT_ONCE", 1)


def index_of(store: Datastore) -> FaissApproximate:
    index = store._index.approximate
    assert index is not None
    return index


@pytest.mark.parametrize(
    "index", ["flat", SPEC, "IVF32,SQ8", pytest.param("HNSW16,Flat", marks=pytest.mark.slow)]
)
def test_blocks_become_the_datastore_that_all_rows_at_once_become(
    index: str, tmp_path: Path
) -> None:
    store = Datastore.from_blocks(blocks(), tmp_path / "store", index=index, metric="l2")
    wanted = Datastore.from_features(rows(1), LABELS, IDS, metric="l2", index="flat")
    assert torch.equal(store.mean, wanted.mean)
    assert store.dtype == "float16"
    order = torch.argsort(store.ids)
    for name in ("ids", "labels", "features"):
        mine, others = getattr(store, name)[order], getattr(wanted, name)[IDS.argsort()]
        assert torch.equal(mine, others)
    found, true = store.search(QUERIES, K), wanted.search(QUERIES, K)
    assert (found.ids == true.ids).float().mean() > 0.95
    again = Datastore.load(tmp_path / "store").search(QUERIES, K)
    for mine, others in zip(found, again, strict=True):
        assert torch.equal(mine, others)
    assert not [name for name in names_in(tmp_path / "store") if name.startswith(("tmp", "."))]


def test_rows_of_a_list_lie_beside_each_other(tmp_path: Path, several_mapped_files: None) -> None:
    store = Datastore.from_blocks(blocks(), tmp_path, index=SPEC)
    lists = store._table.lists
    assert lists is not None
    assert (np.diff(lists) >= 0).all()
    assert len({*map(int, lists)}) > 16
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert torch.equal(torch.from_numpy(lists), torch.from_numpy(index_of(store).lists_of(
        store.build_index().space.index_rows(store._table.features)
    )))  # fmt: skip


def test_codes_find_what_an_exact_search_finds_and_say_how_often(tmp_path: Path) -> None:
    store = Datastore.from_blocks(blocks(), tmp_path, index=SPEC, min_recall=0.99)
    assert store.index.spec == SPEC
    assert store.index.recall is not None
    assert set(store.index.parameters) == {"nprobe", "k_factor"}
    wanted = Datastore.from_features(rows(1), LABELS, IDS, index="flat")
    for k in (1, K, 300, COUNT):
        found, true = store.search(QUERIES, k), wanted.search(QUERIES, k)
        hits = (found.ids[:, :, None] == true.ids[:, None, :]).any(dim=2).float().mean()
        assert found.ids.shape == true.ids.shape
        assert hits > 0.97, k
    own = store.search(store.features[:20], K, exclude_ids=store.ids[:20])
    assert not (own.ids == store.ids[:20, None]).any()


def test_codes_follow_adds_and_removals_as_a_fresh_index_would(
    tmp_path: Path, several_mapped_files: None
) -> None:
    store = Datastore.from_blocks(blocks(), tmp_path, index=SPEC)
    before = index_of(store)
    store.remove(IDS[::10])
    store.add(rows(3, 200), LABELS[:200])
    assert index_of(store) is before
    found = store.search(QUERIES, K)
    fresh = store.__copy__()  # has no index yet: it is filled from centroids and lists
    assert fresh._index.searcher is None
    for mine, others in zip(found, fresh.search(QUERIES, K), strict=True):
        assert torch.equal(mine, others)
    assert index_of(fresh) is not before
    wanted = Datastore(store.features, store.labels, store.ids, store.mean)
    assert (found.ids == wanted.search(QUERIES, K).ids).float().mean() > 0.95
    store.save(tmp_path)
    opened = Datastore.load(tmp_path)
    for mine, others in zip(found, opened.search(QUERIES, K), strict=True):
        assert torch.equal(mine, others)


def test_rows_go_from_mapped_files_without_a_copy_of_the_others(
    tmp_path: Path, several_mapped_files: None
) -> None:
    Datastore.from_blocks(blocks(), tmp_path, index="flat")
    store = Datastore.load(tmp_path)
    mapped = list(store._table.features.parts)
    gone, values = store.ids[5:1700:7], dict(zip(store.ids.tolist(), store.features, strict=True))
    secret = values[int(gone[3])].numpy().tobytes()
    store.remove(gone)
    assert all(
        mine is theirs for mine, theirs in zip(store._table.features.parts, mapped, strict=True)
    )
    added = store.add(rows(4, 150), LABELS[:150])
    values |= dict(zip(added.tolist(), rows(4, 150).half(), strict=True))
    for _ in range(5):  # what was added and removed again is not kept in memory
        store.remove(store.add(rows(5, 150), LABELS[:150]))
    assert sum(map(len, store._table.features.parts)) == COUNT + 150
    assert len(store) == COUNT - len(gone) + 150
    assert not set(gone.tolist()) & set(store.ids.tolist())
    for row_id, row in zip(store.ids.tolist(), store.features, strict=True):
        assert torch.equal(row, values[row_id])
    store.save(tmp_path)
    again = Datastore.load(tmp_path)
    assert torch.equal(again.features, store.features)
    assert torch.equal(again.ids, store.ids)
    assert not any(secret in path.read_bytes() for path in tmp_path.glob("*.safetensors"))


def test_a_whole_file_may_go_and_all_rows_too(tmp_path: Path, several_mapped_files: None) -> None:
    Datastore.from_blocks(blocks(), tmp_path, index="flat")
    store = Datastore.load(tmp_path)
    kept = store.ids[1003:]
    store.remove(store.ids[:1003])
    assert len(store._table.features.parts) == 1
    assert torch.equal(store.ids, kept)
    store.save(tmp_path)
    store = Datastore.load(tmp_path)
    assert torch.equal(store.ids, kept)
    store.remove(store.ids)
    assert store.search(QUERIES, K).ids.shape == (len(QUERIES), 0)
    store.add(rows(3, 20), LABELS[:20])
    assert torch.equal(store.features, rows(3, 20).half())


def test_what_is_known_of_a_large_index_is_saved_while_it_holds_removed_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "LARGEST_FAISS_FILE", 1)
    store = Datastore.from_blocks(blocks(), tmp_path, index=SPEC)
    before = index_of(store)
    store.remove(IDS[:100])
    store.save(tmp_path)
    assert index_of(store) is before
    assert "datastore.faiss" not in names_in(tmp_path)
    opened = Datastore.load(tmp_path)
    assert opened.index == store.index
    for mine, others in zip(store.search(QUERIES, K), opened.search(QUERIES, K), strict=True):
        assert torch.equal(mine, others)


def test_auto_takes_the_most_precise_lists_that_fit() -> None:
    kinds = [
        choose_index("auto", 10_000_000, 384, memory).spec
        for memory in (None, 10 * 10**9, 5 * 10**9, 2 * 10**9)
    ]
    assert kinds == ["IVF8192,SQfp16", "IVF8192,SQfp16", "IVF8192,SQ8", "IVF4096,RaBitQfs"]


def test_a_block_that_needs_float32_widens_those_before_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    large = torch.full((2, WIDTH), 1e5)
    store = Datastore.from_blocks([(rows(1, 30), [0] * 30), (large, [1, 1])], tmp_path)
    assert "float32" in caplog.text
    assert store.dtype == "float32"
    assert torch.equal(store.features[:30], rows(1, 30).half().float())
    assert torch.equal(store.features[30:], large)


def test_blocks_are_numbered_and_may_have_paths(tmp_path: Path) -> None:
    parts: list[Block] = [
        (rows(1, 3), [0, 1, 2]),
        (rows(2, 2), [3, 4], [9, 7], ["a.png", "b.png"]),
        (rows(3, 0), []),
        (rows(3, 1), [5]),
    ]
    store = Datastore.from_blocks(parts, tmp_path)
    assert store.ids.tolist() == [0, 1, 2, 9, 7, 10]
    assert store.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert store.paths == ["", "", "", "a.png", "b.png", ""]


def failing() -> Iterator[tuple[Tensor, list[int]]]:
    yield rows(1, 10), [0] * 10
    raise KeyError("the disk with the features is gone")


@pytest.mark.parametrize(
    ("given", "options", "said"),
    [
        ([], {}, "hold rows"),
        ([(rows(1, 0), [])], {}, "hold rows"),
        ([(rows(1, 3), [0] * 3, [1, 2, 3]), (rows(1, 2), [0] * 2, [3, 4])], {}, "unique.*3"),
        ([(rows(1, 3), [0] * 2)], {}, "one label"),
        ([(rows(1, 3), [0] * 3), (rows(1, 3)[:, :5], [0] * 3)], {}, "width 16.*5"),
        ([(torch.full((1, 2), torch.nan), [0])], {}, "finite"),
        (failing(), {"index": "IVF,,"}, "factory string"),
        (failing(), {"min_recall": 2.0}, "min_recall"),
        (failing(), {"max_memory": "much"}, "max_memory"),
        (failing(), {"metric": "cosines"}, "metric"),
    ],
)
def test_what_is_wrong_is_said_and_what_was_there_stays(
    given: object, options: dict[str, object], said: str, tmp_path: Path
) -> None:
    Datastore.from_features(rows(6, 5), [0] * 5).save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=said):
        Datastore.from_blocks(given, tmp_path, **options)  # type: ignore[arg-type]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_blocks_that_fail_leave_what_was_there(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="gone"):
        Datastore.from_blocks(failing(), tmp_path)
    assert MANIFEST not in names_in(tmp_path)
    assert names_in(tmp_path) == set()


def test_many_chosen_rows_are_read_in_the_order_of_the_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(views, "_AT_ONCE", 7)
    parts = [rows(1, 40), rows(2, 25)]
    order = np.random.default_rng(0).permutation(65)[:50]
    chosen = views.ChosenRows(parts, order)
    wanted = torch.cat(parts).numpy()[order]
    assert np.array_equal(chosen[:], wanted)
    assert np.array_equal(chosen[3:44], wanted[3:44])
    assert np.array_equal(chosen[np.array([9, -1, 9, 2])], wanted[[9, -1, 9, 2]])
    assert torch.equal(chosen.joined(), torch.from_numpy(wanted))
