"""Bytes that change under an open datastore: never signed anew, whichever way they leave it."""

import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.oracles import assert_same_store
from support.stored import blob_of, cut_into_shards, make_store
from support.tiny import tiny_model, tiny_store

from hf_knn import KnnForImageClassification, datastore_as_dataset
from hf_knn.core.frozen import FrozenDatastore
from hf_knn.core.manifest import DatastoreError, FileRecord, Manifest, read_at
from hf_knn.store import disk
from hf_knn.store.datastore import Datastore

COUNT, WIDTH = 600, 8


def fresh(index: str = "flat") -> Datastore:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(COUNT, WIDTH, generator=generator)
    paths = [f"p/{row}.png" for row in range(COUNT)]
    return Datastore.from_features(rows, torch.arange(COUNT) % 3, paths=paths, index=index)


def damage(path: Path, name: str = "features") -> None:
    """A bad sector, `rsync --inplace`, or `cp` over it: other numbers, all of them finite."""
    values = load_file(path)[name].contiguous().view(torch.uint8).flatten().numpy().tobytes()
    start = path.read_bytes().index(values)
    with path.open("r+b") as file:
        file.seek(start + len(values) // 2 // 8 * 8)
        piece = file.read(16)
        file.seek(-16, os.SEEK_CUR)
        file.write(bytes(value ^ 1 for value in piece))


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "LARGEST_VERIFIED_AT_ONCE", 0)


@pytest.fixture
def without_faiss_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is for rows above 100 MB: that file is made of the rows, which are compared for it."""
    monkeypatch.setattr(disk, "LARGEST_FAISS_FILE", 1)


CHANGES: dict[str, Callable[[Datastore], object]] = {
    "nothing": lambda store: None,
    "add": lambda store: store.add(torch.randn(2, WIDTH), [0, 1]),
    "add that widens": lambda store: store.add(torch.full((1, WIDTH), 1e5), [0]),
    "remove": lambda store: store.remove([5, 6]),
    "relabel": lambda store: store.relabel([5], [2]),
    "recenter": lambda store: store.recenter(),
    "build": lambda store: store.build_index(),
}


def changed_and_saved(store: Datastore, change: str, folder: Path) -> None:
    CHANGES[change](store)
    store.save(folder)


@pytest.mark.parametrize("place", ["here", "elsewhere"])
@pytest.mark.parametrize("change", CHANGES)
def test_rows_in_memory_are_saved_as_they_were_opened(
    tmp_path: Path, change: str, place: str
) -> None:
    fresh().save(tmp_path / "here")
    store, wanted = Datastore.load(tmp_path / "here"), fresh()
    damage(blob_of(tmp_path / "here"))
    for one in (store, wanted):
        torch.manual_seed(3)
        CHANGES[change](one)
    store.save(tmp_path / place)
    assert_same_store(Datastore.load(tmp_path / place, verify="full"), wanted)


@pytest.mark.usefixtures("mapped")
@pytest.mark.parametrize("index", ["flat", "IVF4,Flat"])
@pytest.mark.parametrize("place", ["here", "elsewhere"])
@pytest.mark.parametrize("name", ["features", "labels", "ids", "mean", "path_bytes"])
@pytest.mark.parametrize("change", CHANGES)
def test_rows_of_a_mapped_file_that_changed_are_not_saved(
    tmp_path: Path, change: str, name: str, place: str, index: str
) -> None:
    fresh(index).save(tmp_path / "here")
    before = (tmp_path / "here" / "datastore.json").read_bytes()
    store = Datastore.load(tmp_path / "here", verify="full")
    damage(blob_of(tmp_path / "here"), name)
    with pytest.raises(DatastoreError, match="changed on disk after it was opened"):
        changed_and_saved(store, change, tmp_path / place)
    assert not (tmp_path / "elsewhere" / "datastore.json").exists()
    assert (tmp_path / "here" / "datastore.json").read_bytes() == before
    assert not list((tmp_path / "here").glob(".*"))  # no litter


@pytest.mark.usefixtures("mapped")
@pytest.mark.parametrize("change", CHANGES)
def test_rows_of_a_mapped_file_that_is_whole_are_saved(tmp_path: Path, change: str) -> None:
    fresh().save(tmp_path / "here")
    store, wanted = Datastore.load(tmp_path / "here"), fresh()
    assert store._table.files
    blob_of(tmp_path / "here").unlink()  # its name is gone, not what is open
    for one in (store, wanted):
        torch.manual_seed(3)
        CHANGES[change](one)
    store.save(tmp_path / "elsewhere")
    assert_same_store(Datastore.load(tmp_path / "elsewhere", verify="full"), wanted)
    store.add(torch.ones(1, WIDTH), [1])  # and again, after a save
    store.save(tmp_path / "elsewhere")
    assert len(Datastore.load(tmp_path / "elsewhere", verify="full")) == len(wanted) + 1


@pytest.mark.usefixtures("mapped", "without_faiss_file")
def test_a_whole_copy_beside_a_damaged_file_is_linked(tmp_path: Path) -> None:
    fresh().save(tmp_path / "here")
    fresh().save(tmp_path / "copy")
    store = Datastore.load(tmp_path / "here", verify="full")
    damage(blob_of(tmp_path / "here"))
    store.save(tmp_path / "elsewhere", reuse=tmp_path / "copy")
    assert_same_store(Datastore.load(tmp_path / "elsewhere", verify="full"), fresh())


WAYS: dict[str, Callable[[Datastore, Path], object]] = {
    "subset": lambda store, _: store.subset(store.ids[:4]),
    "merge": lambda store, _: fresh().merge(store, renumber=True),
    "dataset": lambda store, _: datastore_as_dataset(store),
    "all blocks": lambda store, _: list(store.blocks()),
    "hash sum": lambda store, _: store.hash_sum(),
    "recenter": lambda store, _: store.recenter(),
    "verify": lambda store, _: store.verify(),
    "pickle by value": lambda store, _: pickle.dumps(moved(store)),
    "copy": lambda store, folder: copy.copy(store).save(folder / "copy"),
}


def moved(store: Datastore) -> Datastore:
    store.home = None
    return store


@pytest.mark.usefixtures("mapped")
@pytest.mark.parametrize("way", WAYS)
def test_rows_that_leave_a_mapped_file_are_compared(tmp_path: Path, way: str) -> None:
    fresh().save(tmp_path / "here")
    store = Datastore.load(tmp_path / "here", verify="full")
    WAYS[way](store, tmp_path)
    damage(blob_of(tmp_path / "here"))
    with pytest.raises(DatastoreError, match=blob_of(tmp_path / "here").name):
        WAYS[way](store, tmp_path)


@pytest.mark.usefixtures("mapped", "without_faiss_file")
def test_only_the_files_whose_rows_leave_are_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_into_shards(monkeypatch, 200 * 2 * WIDTH)
    fresh().save(tmp_path / "here")
    store = Datastore.load(tmp_path / "here", verify="full")
    assert len(store._table.files) == 3
    seen: list[str] = []
    compare = FileRecord.compare

    def count(record: FileRecord, *request: Any) -> None:
        seen.append(record.name)
        compare(record, *request)

    monkeypatch.setattr(FileRecord, "compare", count)
    names = [file.record.name for file in store._table.files]
    store.save(tmp_path / "elsewhere")
    assert sorted(seen) == sorted(names)  # each once, where it was linked to
    seen.clear()
    store.relabel([250], [2])
    store.save(tmp_path / "elsewhere")
    assert sorted(seen) == sorted(names)  # two where they lie, one behind what was written
    seen.clear()
    store.remove([250])
    assert not seen  # the other rows stay where they lie
    store.save(tmp_path / "elsewhere")
    assert names[1] in seen


@pytest.mark.usefixtures("mapped")
@pytest.mark.parametrize(
    "use",
    [
        lambda store: store.search(torch.ones(1, WIDTH), 2),
        lambda store: store.features,
        lambda store: store.rows_of([3]),
        lambda store: store.verify(),
        lambda store: store.save(Path(os.devnull).parent / "nowhere"),
        lambda store: store.remove([3]),
    ],
    ids=["search", "features", "rows_of", "verify", "save", "remove"],
)
@pytest.mark.parametrize("is_verified", [True, False])
def test_a_mapped_file_that_is_cut_off_is_an_error(
    tmp_path: Path, use: Callable[[Datastore], object], is_verified: bool
) -> None:
    """Without the check the process is killed by SIGBUS."""
    fresh().save(tmp_path / "here")
    store = Datastore.load(tmp_path / "here", verify="full" if is_verified else "auto")
    path = blob_of(tmp_path / "here")
    size = path.stat().st_size
    os.truncate(path, 100)
    with pytest.raises(DatastoreError, match=rf"{path.name}.*{size}.*100"):
        use(store)


def test_small_files_are_in_memory(tmp_path: Path) -> None:
    fresh().save(tmp_path / "here")
    store = Datastore.load(tmp_path / "here")
    os.truncate(blob_of(tmp_path / "here"), 0)
    assert_same_store(store, fresh())
    store.save(tmp_path / "here")  # which mends the file
    assert_same_store(Datastore.load(tmp_path / "here"), fresh())


def test_a_link_that_changes_with_its_file_is_found(tmp_path: Path) -> None:
    fresh().save(tmp_path / "here")
    Datastore.load(tmp_path / "here").save(tmp_path / "linked")
    assert blob_of(tmp_path / "linked").samefile(blob_of(tmp_path / "here"))
    damage(blob_of(tmp_path / "here"))
    with pytest.raises(DatastoreError, match=blob_of(tmp_path / "linked").name):
        Datastore.load(tmp_path / "linked", verify="full")


def test_a_copy_that_went_wrong_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are no hard links, what was copied is hashed, not what it was copied from."""
    fresh().save(tmp_path / "here")

    def copy_badly(source: str, target: str) -> None:
        data = bytearray(Path(source).read_bytes())
        data[-1] ^= 1
        Path(target).write_bytes(data)

    monkeypatch.setattr(disk, "link_or_copy", copy_badly)
    store = Datastore.load(tmp_path / "here")
    store.save(tmp_path / "elsewhere")
    assert_same_store(Datastore.load(tmp_path / "elsewhere", verify="full"), fresh())


def test_an_index_that_changed_after_it_was_opened_is_not_taken(tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="needs faiss")
    fresh("HNSW8").save(tmp_path / "here")
    store = Datastore.load(tmp_path / "here", trust_faiss_index=True)
    path = tmp_path / "here" / "datastore.faiss"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1  # among the vectors, which come last: it can still be parsed
    path.write_bytes(bytes(data))
    with pytest.raises(DatastoreError, match=r"datastore\.faiss"):
        store.save(tmp_path / "elsewhere")


def model_with_store() -> KnnForImageClassification:
    model = tiny_model()
    model.datastore = tiny_store(model)
    return model


@pytest.mark.parametrize("where", [0.2, 0.5, 0.99])
def test_weights_do_not_change_with_their_file(tmp_path: Path, where: float) -> None:
    """Transformers maps them: another save would sign what somebody wrote into the file."""
    model_with_store().save_pretrained(tmp_path / "here")
    model = KnnForImageClassification.from_pretrained(tmp_path / "here")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = tmp_path / "here" / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(int(path.stat().st_size * where) // 4 * 4)
        file.write(b"\x3c" * 200)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    model.save_pretrained(tmp_path / "elsewhere")
    again = KnnForImageClassification.from_pretrained(tmp_path / "elsewhere")
    assert all(torch.equal(before[name], t) for name, t in again.state_dict().items())


def test_a_ridge_head_is_not_made_of_rows_that_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_with_store().save_pretrained(tmp_path / "here")
    monkeypatch.setattr(disk, "LARGEST_VERIFIED_AT_ONCE", 0)
    model = KnnForImageClassification.from_pretrained(tmp_path / "here")
    store = model.datastore
    assert isinstance(store, Datastore)
    store.verify()
    damage(blob_of(tmp_path / "here"))
    with pytest.raises(DatastoreError, match=blob_of(tmp_path / "here").name):
        model.forget([int(store.ids[0])])
    assert len(store) == len(model.datastore)


def test_what_opens_without_the_package_is_in_memory(tmp_path: Path) -> None:
    store = fresh()
    manifest = store.save(tmp_path / "here")
    frozen = FrozenDatastore(
        Manifest.read(tmp_path / "here" / "datastore.json"), lambda name: tmp_path / "here" / name
    )
    os.truncate(blob_of(tmp_path / "here"), 0)
    found = frozen.search(store.features[:5], 3)
    assert torch.equal(found.ids, store.search(store.features[:5], 3).ids)
    with pytest.raises(DatastoreError, match=manifest.blobs[0].name):
        frozen.copy_to(tmp_path / "elsewhere")


def test_files_are_read_alike_without_pread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows has no `os.pread`: each piece is looked for and read under a lock."""
    data = os.urandom(3_000_000)
    (tmp_path / "file").write_bytes(data)
    with (tmp_path / "file").open("rb") as file:
        wanted = [read_at(file, start, 1000) for start in (0, 2_999_999, 5, 4_000_000)]
        monkeypatch.delattr(os, "pread")
        assert [read_at(file, start, 1000) for start in (0, 2_999_999, 5, 4_000_000)] == wanted
        assert wanted[:2] == [data[:1000], data[-1:]]
    make_store().save(tmp_path / "store")
    monkeypatch.setattr(disk, "LARGEST_VERIFIED_AT_ONCE", 0)
    assert_same_store(Datastore.load(tmp_path / "store", verify="full"), make_store())
    damage(blob_of(tmp_path / "store"), "ids")
    with pytest.raises(DatastoreError, match="sha256"):
        Datastore.load(tmp_path / "store", verify="full")


def test_a_file_without_hashes_is_no_file_with_any(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    record = FileRecord.of(tmp_path / "file")
    assert record.read(tmp_path / "file") == b""
    (tmp_path / "file").write_bytes(b"more")
    with pytest.raises(DatastoreError, match="0 bytes, but got 4"):
        record.read(tmp_path / "file")
