"""Built indexes in the user's cache: what another process takes over, and what it never does."""

import json
import logging
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from filelock import FileLock
from support.forks import Errand, die, find_no_space, outcome
from support.stored import blob_of, flipped, names_in
from support.tiny import tiny_model
from torch import Tensor

from hf_knn import KnnForImageClassification
from hf_knn.core.manifest import DatastoreError
from hf_knn.core.search import RowSpace, normalize_rows
from hf_knn.store import disk, kept, mapped, searcher
from hf_knn.store import index as row_index
from hf_knn.store.datastore import Datastore
from hf_knn.store.searcher import IndexSpace

ROWS, WIDTH, K = 2000, 8, 10
KINDS = ["IVF4,Flat", "IVF4,SQ8", "HNSW8"]
PIECE, BLOCK = 16, 8192
"""Bytes of one row, and of many."""

DAMAGED = "the kept one cannot be used"


def rows(seed: int = 0, count: int = ROWS) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


QUERIES = rows(9, 40)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is built in no time is kept too."""
    monkeypatch.setattr(row_index, "MOMENT", 0.0)
    kept._warn_once.cache_clear()


@pytest.fixture
def mapped_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row files are mapped, and have many blocks of many pieces."""
    monkeypatch.setattr(disk, "LARGEST_VERIFIED_AT_ONCE", 0)
    monkeypatch.setattr("hf_knn.core.manifest.HASH_BLOCK", BLOCK)
    monkeypatch.setattr(mapped, "PIECE", PIECE)


def stored(folder: Path, index: str = "HNSW8", seed: int = 0, **options: Any) -> Path:
    labels = torch.arange(ROWS) % 7
    Datastore.from_features(rows(seed), labels, index=index, **options).save(folder)
    return folder


def answer(folder: Path) -> tuple[Tensor, ...]:
    """What a process says that opens the folder and searches."""
    return tuple(Datastore.load(folder).search(QUERIES, K))


def same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
    return all(map(torch.equal, found, wanted))


def entries(cache: Path) -> list[Path]:
    return sorted((cache / kept.FOLDER).glob("[!.]*"))


def only(cache: Path) -> Path:
    (entry,) = entries(cache)
    return entry


def forbid_building(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("it was built")

    monkeypatch.setattr(row_index, "_approximate", refuse)


# what another process takes over


@pytest.mark.parametrize("index", KINDS)
@pytest.mark.parametrize("metric", ["cosine", pytest.param("l2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", ["in memory", "mapped"])
def test_another_process_answers_alike_without_building(
    tmp_path: Path, index: str, metric: str, where: str, monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    if where == "mapped":
        request.getfixturevalue("mapped_files")
    options: dict[str, Any] = {"metric": metric}
    options |= {"normalization": "none"} if metric == "l2" else {}
    first = Datastore.load(stored(tmp_path / "store", index, **options))
    wanted = tuple(first.search(QUERIES, K))
    forbid_building(monkeypatch)

    def search() -> None:
        store = Datastore.load(tmp_path / "store")
        assert same(tuple(store.search(QUERIES, K)), wanted)
        assert store.index == first.index  # measured there, so not again

    assert outcome(search) == ""
    search()


@pytest.mark.parametrize("index", KINDS)
def test_an_index_that_was_taken_over_takes_rows_in_and_loses_them(
    tmp_path: Path, index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(tmp_path / "store", index)
    built = Datastore.load(tmp_path / "store")
    built.build_index()
    forbid_building(monkeypatch)
    taken = Datastore.load(tmp_path / "store")
    taken.build_index()
    for store in (built, taken):
        store.add(rows(5, 30), [1] * 30)
        store.remove(range(0, 300, 3))
    assert same(tuple(taken.search(QUERIES, K)), tuple(built.search(QUERIES, K)))
    assert 0 not in taken.search(rows()[:1], 1).ids
    assert ROWS in taken.search(rows(5, 30)[:1], 1).ids


def test_an_exact_index_is_not_kept(tmp_path: Path, knn_cache: Path) -> None:
    answer(stored(tmp_path / "store", "flat"))
    assert not (knn_cache / kept.FOLDER).exists()


def test_what_is_built_in_a_moment_is_not_kept(
    tmp_path: Path, knn_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_index, "MOMENT", 1e6)
    answer(stored(tmp_path / "store"))
    assert not (knn_cache / kept.FOLDER).exists()


def test_what_decides_the_index_tells_kept_ones_apart(tmp_path: Path, knn_cache: Path) -> None:
    """Rows, kind and metric do; the folder does not, nor does a note on where they came from."""
    kinds: dict[str, dict[str, Any]] = {
        "a": {}, "b": {"index": "IVF4,Flat"}, "c": {"seed": 1}, "d": {"normalization": "l2"},
    }  # fmt: skip
    for name, options in kinds.items():
        answer(stored(tmp_path / name, **options))
    assert len(entries(knn_cache)) == 4
    store = Datastore.load(tmp_path / "b")
    store.source = {"dataset": "elsewhere"}
    store.save(tmp_path / "b")
    shutil.copytree(tmp_path / "b", tmp_path / "copy")
    before = [path.stat().st_mtime_ns for path in entries(knn_cache)]
    answer(tmp_path / "b")
    answer(tmp_path / "copy")
    assert [path.stat().st_mtime_ns for path in entries(knn_cache)] == before


def test_an_index_of_another_version_of_faiss_is_built_again(
    tmp_path: Path, knn_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = answer(stored(tmp_path / "store"))
    monkeypatch.setattr(row_index, "made_by", lambda: "faiss 0.9")
    assert len(answer(tmp_path / "store")) == len(wanted)
    about = json.loads((only(knn_cache) / kept.ABOUT_NAME).read_text())
    assert about["made_by"].endswith("faiss 0.9")


def test_nothing_of_it_lies_in_the_checkpoint(tmp_path: Path, knn_cache: Path) -> None:
    stored(tmp_path / "store", "IVF4,SQ8")
    before = {p.name: p.read_bytes() for p in (tmp_path / "store").iterdir()}
    for _ in range(2):
        answer(tmp_path / "store")
    assert {p.name: p.read_bytes() for p in (tmp_path / "store").iterdir()} == before
    assert only(knn_cache)


# what is damaged, or not ours


def flip(path: Path, seed: int) -> None:
    place = random.Random(seed).randrange(path.stat().st_size)
    path.write_bytes(flipped(path.read_bytes(), place, seed % 8))


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def damages(entry: Path, other: Path) -> dict[str, Callable[[], object]]:
    found: dict[str, Callable[[], object]] = {}
    for name in (kept.INDEX_NAME, kept.ABOUT_NAME):
        path = entry / name
        size = path.stat().st_size
        found |= {f"flip {name} {seed}": partial(flip, path, seed) for seed in range(12)}
        found |= {
            f"cut {name}": partial(cut, path, size // 2),
            f"empty {name}": partial(cut, path, 0),
        }
        found |= {f"no {name}": path.unlink, f"readable {name}": partial(path.chmod, 0o644)}
        found |= {f"swapped {name}": partial(shutil.copy, other / name, path)}
        found |= {f"zeros {name}": partial(path.write_bytes, bytes(size))}
    return found | {"swapped whole": partial(shutil.copytree, other, entry, dirs_exist_ok=True)}


def test_what_is_damaged_is_not_parsed_but_built_again(
    tmp_path: Path, knn_cache: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    stored(tmp_path / "store", "IVF4,Flat")
    wanted = answer(tmp_path / "store")
    entry = only(knn_cache)
    answer(stored(tmp_path / "other", "IVF4,Flat", seed=1))
    (other,) = set(entries(knn_cache)) - {entry}
    good = {path.name: path.read_bytes() for path in entry.iterdir()}
    parsed: list[object] = []
    read = kept.MappedIndex.read

    def counting(file: kept.MappedIndex, library: Any) -> Any:
        parsed.append(file)
        return read(file, library)

    monkeypatch.setattr(kept.MappedIndex, "read", counting)
    for name, damage in damages(entry, other).items():
        caplog.clear()
        damage()
        parsed.clear()
        assert same(answer(tmp_path / "store"), wanted), name
        assert not parsed, name
        assert "no about" in name or DAMAGED in caplog.text, name
        assert {path.name for path in entry.iterdir()} == set(good), name
        assert (entry / kept.INDEX_NAME).read_bytes() == good[kept.INDEX_NAME], name
        caplog.clear()
        assert same(answer(tmp_path / "store"), wanted), name
        assert len(parsed) == 1, name  # the one that was built again
        assert DAMAGED not in caplog.text, name


def test_files_are_for_their_owner_alone(tmp_path: Path, knn_cache: Path) -> None:
    old = os.umask(0)
    try:
        answer(stored(tmp_path / "store"))
    finally:
        os.umask(old)
    entry = only(knn_cache)
    assert {path.stat().st_mode & 0o777 for path in entry.iterdir()} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in (entry, entry.parent)} == {0o700}


def test_a_file_of_somebody_else_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = answer(stored(tmp_path / "store", "IVF4,Flat"))
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    assert same(answer(tmp_path / "store"), wanted)
    assert DAMAGED in caplog.text


# rows are hashed where they are read


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes of row files are read to be hashed, from now on."""
    found: list[int] = []
    read = mapped.read_at

    def counting(*request: Any) -> bytes:
        data: bytes = read(*request)
        found.append(len(data))
        return data

    monkeypatch.setattr(mapped, "read_at", counting)
    return found


@pytest.mark.usefixtures("mapped_files")
def test_another_process_hashes_no_more_than_what_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = blob_of(stored(tmp_path / "store", "IVF4,Flat")).stat().st_size
    read = count_reads(monkeypatch)
    wanted = answer(tmp_path / "store")
    assert sum(read) == size  # each block once
    read.clear()
    store = Datastore.load(tmp_path / "store")
    few = store.search(QUERIES[:1], 3)
    assert torch.equal(few.ids, wanted[2][:1, :3])
    features = ROWS * WIDTH * 2
    candidates = 3 + 44
    assert size - features <= sum(read) <= size - features + (2 * candidates + 4) * PIECE
    for _ in range(2):
        assert same(tuple(store.search(QUERIES, K)), wanted)
    assert sum(read) <= size  # and none twice


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three, each with its own stretch of the rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    monkeypatch.setattr(searcher, "_NORMALIZED", 64)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("mapped_files", "threads")
@pytest.mark.parametrize("index", ["IVF4,Flat", "flat"])
@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_threads_that_build_hash_each_block_once(
    tmp_path: Path, index: str, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(
        tmp_path / "store", index, metric=metric, normalization="none" if metric == "l2" else "l2"
    )
    wanted = Datastore.load(tmp_path / "store", verify="full")
    space = IndexSpace(
        wanted.mean.double().numpy(), metric, wanted.normalization, None, wanted._table.features
    )
    size = blob_of(tmp_path / "store").stat().st_size
    read = count_reads(monkeypatch)
    opened = Datastore.load(tmp_path / "store")
    opened.build_index()
    assert sum(read) == size
    features = opened._table.features
    made = (space.normalize(features[:]) / space.scale).astype(np.float32)
    assert np.array_equal(space.index_rows(features), made)
    assert np.array_equal(
        space.first_pass_rows(features), RowSpace.first_pass_rows(space, features)
    )
    assert same(tuple(opened.search(QUERIES, K)), tuple(wanted.search(QUERIES, K)))


@pytest.mark.usefixtures("mapped_files")
@pytest.mark.parametrize("index", ["IVF4,Flat", "flat"])
def test_no_answer_comes_from_damaged_rows(tmp_path: Path, index: str) -> None:
    """With a kept index or without: what a row says is hashed before it is compared."""
    store = Datastore.load(stored(tmp_path / "store", index))
    wanted = tuple(store.search(QUERIES, K))
    blob = blob_of(tmp_path / "store")
    place = blob.read_bytes().index(rows()[1234].half().numpy().tobytes())
    blob.write_bytes(flipped(blob.read_bytes(), place, 0))
    opened = Datastore.load(tmp_path / "store")
    for _ in range(2):
        with pytest.raises(DatastoreError, match=blob.name):
            opened.search(rows()[1234:1235], 1)
    near = store.search(QUERIES, 70).ids
    beside = torch.tensor([1233, 1234, 1235])  # which may lie in the same piece
    far = [i for i, ids in enumerate(near) if not torch.isin(beside, ids).any()]
    if index != "flat":  # all rows of which are read, to build it
        assert len(far) > 10
        for i in far[:10]:
            found = opened.search(QUERIES[i : i + 1], K)
            assert torch.equal(found.ids, wanted[2][i : i + 1])
    for use in (lambda: opened.features, lambda: opened.rows_of([3]), lambda: opened.paths):
        with pytest.raises(DatastoreError, match=blob.name):
            use()


@pytest.mark.usefixtures("mapped_files")
@pytest.mark.parametrize("what", ["ids", "labels", "mean", "lists", "header"])
def test_what_is_copied_of_a_file_is_hashed_first(tmp_path: Path, what: str) -> None:
    answer(stored(tmp_path / "store", "IVF4,Flat"))
    blob = blob_of(tmp_path / "store")
    data = blob.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    begin = 8 + int.from_bytes(data[:8], "little")
    place = begin - 1 if what == "header" else begin + header[what]["data_offsets"][0] + 4
    blob.write_bytes(flipped(data, place, 0))
    with pytest.raises(DatastoreError):
        answer(tmp_path / "store")
    if what != "header":
        with pytest.raises(DatastoreError, match=blob.name):
            _ = Datastore.load(tmp_path / "store").labels


@pytest.mark.usefixtures("mapped_files")
def test_pieces_that_are_wrongly_remembered_cost_a_block(tmp_path: Path, knn_cache: Path) -> None:
    wanted = answer(stored(tmp_path / "store", "IVF4,Flat"))
    place = only(knn_cache) / kept.ABOUT_NAME
    about = json.loads(place.read_text())
    pieces = about["pieces"][blob_of(tmp_path / "store").name]
    pieces[:] = pieces[1:] + pieces[:1]
    about.pop("checksum")
    place.write_text(kept.signed_json(about))
    assert same(answer(tmp_path / "store"), wanted)


@pytest.mark.usefixtures("mapped_files")
def test_numbers_that_are_not_finite_are_refused_where_they_are_read(tmp_path: Path) -> None:
    store = Datastore.from_features(rows(), [0] * ROWS, index="IVF4,Flat")
    store.build_index()
    good = store._table.features.parts[0]
    good[777, 3] = torch.inf
    store.save(tmp_path / "store")
    for use in (
        lambda opened: opened.search(QUERIES, K),
        lambda opened: opened.features,
        lambda opened: opened.verify(),
    ):
        with pytest.raises(DatastoreError, match=r"not usable.*finite"):
            use(Datastore.load(tmp_path / "store"))


# a bounded folder, and one that cannot be written


def test_the_least_recently_used_go_first(
    tmp_path: Path, knn_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["a", "b", "c"]
    for seed, name in enumerate(names):
        stored(tmp_path / name, seed=seed)
    answer(tmp_path / "a")
    size = sum(path.stat().st_size for path in only(knn_cache).iterdir())
    monkeypatch.setattr(kept, "MOST_BYTES", int(2.5 * size))
    of = {"a": only(knn_cache)}
    answer(tmp_path / "b")
    (of["b"],) = set(entries(knn_cache)) - {of["a"]}
    for age, name in enumerate(names[:2]):
        long_ago = time.time() - 1000 + age
        for path in of[name].iterdir():
            os.utime(path, (long_ago, long_ago))
    answer(tmp_path / "a")  # so that b was not of use for longest
    answer(tmp_path / "c")
    found = set(entries(knn_cache))
    assert of["a"] in found
    assert of["b"] not in found
    assert len(found) == 2


@pytest.mark.parametrize("bound", ["bytes", "disk"])
def test_what_is_too_large_is_not_kept(
    tmp_path: Path, knn_cache: Path, bound: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if bound == "bytes":
        monkeypatch.setattr(kept, "MOST_BYTES", 1000)
    else:
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    wanted = answer(stored(tmp_path / "store", "IVF4,Flat"))
    assert names_in(knn_cache / kept.FOLDER) == {".lock"}
    assert same(answer(tmp_path / "store"), wanted)


def full(patch: pytest.MonkeyPatch, cache: Path) -> None:
    patch.setattr(kept, "_write_privately", lambda *_: find_no_space())


def a_file(patch: pytest.MonkeyPatch, cache: Path) -> None:
    cache.write_text("no folder")


def read_only(patch: pytest.MonkeyPatch, cache: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(f"Permission denied: {cache}")

    patch.setattr(kept.tempfile, "mkdtemp", refuse)


@pytest.mark.parametrize("trouble", [full, a_file, read_only])
def test_a_folder_that_cannot_be_written_is_one_warning(
    tmp_path: Path, knn_cache: Path, trouble: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    trouble(monkeypatch, knn_cache)
    stored(tmp_path / "store", "IVF4,Flat")
    assert same(answer(tmp_path / "store"), answer(tmp_path / "store"))
    said = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert [record.name for record in said] == ["hf_knn.store.kept"]
    assert "not kept" in caplog.text
    assert trouble is a_file or not list(knn_cache.glob(f"{kept.FOLDER}/*/"))


def test_a_cache_that_can_only_be_read_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = answer(stored(tmp_path / "store"))
    forbid_building(monkeypatch)

    def refuse(*_: object) -> None:
        raise PermissionError("Permission denied")

    monkeypatch.setattr(os, "utime", refuse)
    assert same(answer(tmp_path / "store"), wanted)
    assert not caplog.records


# kills, and others who write


def write_and_die(write: Callable[[Path], object]) -> Callable[[Path, Any], int]:
    """Half of the index, and no more."""

    def half(path: Path, _: object) -> int:
        write(path)
        die()
        return 0

    return half


def dying(*_: object) -> Any:
    die()


@pytest.mark.parametrize("moment", ["index", "about", "rename"])
def test_a_writer_that_is_killed_leaves_nothing_that_is_used(
    tmp_path: Path, knn_cache: Path, moment: str
) -> None:
    stored(tmp_path / "store", "IVF4,Flat")

    def search() -> None:
        if moment == "index":
            kept._write_privately = write_and_die(  # type: ignore[assignment]
                lambda path: path.write_bytes(b"half an index")
            )
        elif moment == "about":
            kept.shutil.disk_usage = dying  # type: ignore[assignment]
        else:
            kept._make_room = dying  # type: ignore[assignment]
        answer(tmp_path / "store")

    assert outcome(search) == "ended by -9"
    assert entries(knn_cache) == []
    assert len(list((knn_cache / kept.FOLDER).glob(".*/"))) == 1
    wanted = answer(tmp_path / "store")
    assert names_in(knn_cache / kept.FOLDER) == {".lock", only(knn_cache).name}
    assert same(answer(tmp_path / "store"), wanted)


def test_what_a_killed_writer_left_goes_with_the_next_save(tmp_path: Path, knn_cache: Path) -> None:
    stored(tmp_path / "store")
    litter = knn_cache / kept.FOLDER / ".abcdefgh"
    litter.mkdir(parents=True)
    (litter / kept.INDEX_NAME).write_bytes(b"half an index")
    Datastore.load(tmp_path / "store").save(tmp_path / "store")
    assert not litter.exists()


def test_several_processes_at_once_keep_one(tmp_path: Path, knn_cache: Path) -> None:
    stored(tmp_path / "store", "IVF4,Flat")
    children = [Errand.start(lambda: answer(tmp_path / "store")) for _ in range(4)]
    assert [child.outcome() for child in children] == [""] * 4
    assert names_in(knn_cache / kept.FOLDER) == {".lock", only(knn_cache).name}


def test_nobody_waits_for_another_writer(tmp_path: Path, knn_cache: Path) -> None:
    stored(tmp_path / "store", "IVF4,Flat")
    (knn_cache / kept.FOLDER).mkdir(parents=True)
    with FileLock(knn_cache / kept.FOLDER / ".lock"):
        assert outcome(lambda: answer(tmp_path / "store")) == ""
    assert entries(knn_cache) == []


def test_an_index_whose_version_was_replaced_meanwhile_is_not_kept(
    tmp_path: Path, knn_cache: Path
) -> None:
    stored(tmp_path / "store", "IVF4,Flat")
    opened = Datastore.load(tmp_path / "store")
    opened.labels  # noqa: B018, it is looked for now
    stored(tmp_path / "store", "IVF4,Flat", seed=1)
    opened.search(QUERIES, K)
    assert entries(knn_cache) == []


def test_what_is_removed_while_it_is_used_stays_in_use(tmp_path: Path, knn_cache: Path) -> None:
    answer(stored(tmp_path / "store"))
    opened = Datastore.load(tmp_path / "store")
    wanted = tuple(opened.search(QUERIES, K))
    shutil.rmtree(knn_cache)
    assert same(tuple(opened.search(QUERIES, K)), wanted)


# what is removed is gone there too


def holds(cache: Path, row: Tensor, mean: Tensor | None = None) -> bool:
    """Whether any file of the cache has the row [D] as an index has it, about a mean."""
    center = torch.zeros(len(row)) if mean is None else mean
    rows = row.half().numpy()[None]
    vector = normalize_rows(rows, center.double().numpy(), "l2_centered").astype(np.float32)
    files = [path for path in cache.rglob("*") if path.is_file()]
    return any(vector.tobytes() in path.read_bytes() for path in files)


def test_a_row_that_was_removed_is_in_no_kept_index(tmp_path: Path, knn_cache: Path) -> None:
    stored(tmp_path / "store", "IVF4,Flat", normalization="l2")
    answer(tmp_path / "store")  # of the first version
    taught = Datastore.load(tmp_path / "store")
    taught.build_index()
    taught.add(rows(7, 3), [0, 1, 2])
    taught.save(tmp_path / "store")
    answer(tmp_path / "store")  # of the second
    assert holds(knn_cache, rows()[5])
    taught.remove([5])
    taught.save(tmp_path / "store")
    assert not holds(knn_cache, rows()[5])
    answer(tmp_path / "store")
    assert holds(knn_cache, rows()[6])
    assert not holds(knn_cache, rows()[5])


def test_what_a_model_forgets_is_in_no_kept_index(tmp_path: Path, knn_cache: Path) -> None:
    model = tiny_model()
    width = model.config.feature_dim
    features = torch.randn(60, width, generator=torch.Generator().manual_seed(0))
    model.datastore = Datastore.from_features(features, [0] * 60, index="IVF4,Flat")
    mean = model.datastore.mean
    model.save_pretrained(tmp_path / "model")
    for keep in (True, False):
        opened = KnnForImageClassification.from_pretrained(tmp_path / "model")
        opened(features=features[:3])
        opened.teach(features=features[:1] + len(entries(knn_cache)), labels=["ant"])
        opened.save_pretrained(tmp_path / "model", keep_replaced=keep)
    for place in ("model", "model/.before"):
        Datastore.load(tmp_path / place).search(features[:3], 3)
    assert len(entries(knn_cache)) == 2
    assert holds(knn_cache, features[5], mean)
    opened = KnnForImageClassification.from_pretrained(tmp_path / "model")
    opened.forget([5])
    opened.save_pretrained(tmp_path / "model")
    assert not holds(knn_cache, features[5], mean)


def test_versions_that_are_gone_are_cleared(tmp_path: Path, knn_cache: Path) -> None:
    answer(stored(tmp_path / "old"))
    shutil.rmtree(tmp_path / "old")
    first = only(knn_cache)
    answer(stored(tmp_path / "new", seed=1))
    assert only(knn_cache) != first


def test_the_limits_of_faiss_are_as_they_were(tmp_path: Path) -> None:
    answer(stored(tmp_path / "store"))
    answer(tmp_path / "store")
    assert faiss.get_deserialization_vector_byte_limit() == 2**40


def test_where_nobody_is_at_home_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(kept, "cache_root", nobody)
    stored(tmp_path / "store", "IVF4,Flat")
    assert same(answer(tmp_path / "store"), answer(tmp_path / "store"))
    assert caplog.text.count("not kept") == 1
