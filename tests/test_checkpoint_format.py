"""The stored datastore: round trips, damage, lies, kills, full disks and two writers at once."""

import contextlib
import copy
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_same_store
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_knn import blobs, datastore, persistence, storage
from hf_knn import manifest as manifest_module
from hf_knn.datastore import Datastore
from hf_knn.manifest import Binding, DatastoreError, FileRecord, Manifest
from hf_knn.storage import exclusive_lock, hash_blocks, replaced_folder, write_durably

GOLDEN = Path(__file__).parent / "golden" / "datastore-v1"
MANIFEST, FAISS = "datastore.json", "datastore.faiss"
NAMES_A_FILE = re.compile(
    r"datastore\.json|datastore-[0-9a-f]{12}\.safetensors|manifest|The datastore is not usable"
)
OWN_FILES = re.compile(r"datastore\.(json|faiss)|datastore-[0-9a-f]{12}\.safetensors")


def make_store(version: int = 0, count: int = 6, **options: Any) -> Datastore:
    """Rows in which everything tells the version."""
    features = torch.arange(count * 3).reshape(count, 3) % 7 + 1.0 + version
    labels = torch.full((count,), version)
    options = {"paths": [f"{version}/é {row}.png" for row in range(count)]} | options
    return Datastore.from_features(features, labels, torch.arange(count) + version, **options)


def version_of(store: Datastore) -> int:
    """The version of a store that is whole; fails for a mix of two."""
    version = int(store.labels[0])
    assert_same_store(store, make_store(version, len(store)))
    return version


def blob_of(folder: Path) -> Path:
    (blob,) = folder.glob("datastore-*.safetensors")
    return blob


def names_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def read_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())


def write_manifest(folder: Path, values: Any) -> None:
    if isinstance(values, dict):  # a lie that is signed, so that the checks behind it are reached
        values["checksum"] = manifest_module._checksum(
            {name: value for name, value in values.items() if name != "checksum"}
        )
    (folder / MANIFEST).write_text(json.dumps(values))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def saved(folder: Path) -> Path:
    make_store().save(folder)
    return folder


@pytest.fixture
def without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(persistence, "has_faiss", lambda: False)


# round trips


@pytest.mark.parametrize("paths", [None, ["", "a/b.png", "é ✓.jpg", "x" * 1000, "\n", "last"]])
@pytest.mark.parametrize("big", [1.0, 1e5], ids=["float16", "float32"])
@pytest.mark.parametrize(
    ("metric", "normalization"), [("cosine", "l2_centered"), ("l2", "none"), ("l2", "l2")]
)
def test_round_trip_is_bit_equal(
    folder: Path, paths: list[str] | None, big: float, metric: str, normalization: str
) -> None:
    features = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)) * big
    ids = [2**62, 0, 5, 3, 17, 4]
    store = Datastore.from_features(
        features, [3, 1, 0, 0, 2**40, 1], ids, metric, normalization, paths=paths
    )
    store.source = {"dataset": "me/data ✓", "revision": "abc", "split": "train"}
    store.add(features[:1], [9], [8])  # the mean is no longer that of the rows
    assert store.dtype == ("float16" if big == 1 else "float32")
    manifest = store.save(folder)
    loaded = Datastore.load(folder)
    assert_same_store(loaded, store)
    assert loaded.manifest == manifest
    for mine, others in zip(store.search(features, 4), loaded.search(features, 4), strict=True):
        assert torch.equal(mine, others)
    loaded.add(features[1:2], [1])  # a loaded store can be changed
    assert (len(loaded), len(store)) == (8, 7)


@pytest.mark.parametrize(
    "paths",
    [
        None,
        pytest.param(
            [],
        ),
    ],
)
def test_an_empty_store_is_saved(folder: Path, paths: list[str] | None) -> None:
    store = Datastore.from_features(torch.zeros(0, 5), [], paths=paths)
    store.save(folder)
    loaded = Datastore.load(folder)
    assert_same_store(loaded, store)
    assert loaded.search(torch.ones(1, 5), 3).ids.shape == (1, 0)
    store.add(torch.ones(1, 5), [0])
    store.save(folder)
    assert_same_store(Datastore.load(folder), store)


@pytest.mark.parametrize("with_paths", [True, False])
def test_several_shards(folder: Path, with_paths: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "SHARD_BYTES", 12)  # two rows of three float16 values
    store = make_store(count=7) if with_paths else make_store(count=7, paths=None)
    manifest = store.save(folder)
    names = [blob.name for blob in manifest.blobs]
    assert len(names) == 4
    assert names_in(folder) == {*names, MANIFEST, FAISS}
    assert_same_store(Datastore.load(folder), store)

    inodes = [(folder / name).stat().st_ino for name in names]
    store.remove([5])  # the first row of the third shard
    changed = store.save(folder)
    assert [blob.name for blob in changed.blobs[:2]] == names[:2]
    assert [(folder / name).stat().st_ino for name in names[:2]] == inodes[:2]
    assert names_in(folder) == {*(blob.name for blob in changed.blobs), MANIFEST, FAISS}
    assert_same_store(Datastore.load(folder), store)


@pytest.mark.parametrize("count", [2, 4])
def test_all_rows_of_the_first_shard_can_be_removed(
    folder: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobs, "SHARD_BYTES", 12)
    store = make_store()
    store.save(folder)
    store.remove(list(range(count)))
    store.save(folder)
    assert_same_store(Datastore.load(folder), store)


CHANGES = ["add", "add", "add without paths", "remove", "remove", "relabel", "recenter", "widen"]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    changes=st.lists(st.sampled_from(CHANGES), min_size=1, max_size=6),
    seed=st.integers(0, 2**32 - 1),
    large=st.sampled_from([1, 13, 1000]),
    reloads=st.booleans(),
    with_paths=st.booleans(),
)
def test_files_that_are_not_written_again_hold_the_rows_of_now(
    changes: list[str], seed: int, large: int, reloads: bool, with_paths: bool
) -> None:
    generator = random.Random(seed)
    store = make_store(count=7) if with_paths else make_store(count=7, paths=None)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as place:
        patch.setattr(persistence, "has_faiss", lambda: False)
        patch.setattr(blobs, "SHARD_BYTES", 18)  # three rows
        patch.setattr(blobs, "SMALL_SHARD_BYTES", large)
        for step, change in enumerate(changes):
            some = generator.sample(store.ids.tolist(), k=min(3, len(store)))
            if change.startswith("add"):
                paths = [f"new {step}"] * 2 if change == "add" else None
                store.add(torch.full((2, 3), step + 0.5), [step, step], paths=paths)
            elif change == "widen":
                store.add(torch.full((1, 3), 1e5 + step), [step])
            elif change == "remove":
                store.remove(some)
            elif change == "relabel":
                store.relabel(some, [50 + step] * len(some))
            else:
                store.recenter()
            if generator.random() < 0.7 or step + 1 == len(changes):
                store.save(place)
                assert_same_store(Datastore.load(place), store)
                if reloads:
                    store = Datastore.load(place)


def test_added_rows_leave_large_files_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "SMALL_SHARD_BYTES", 36)  # six rows, as the store has
    store = make_store()
    name = store.save(folder).blobs[0].name
    inode = (folder / name).stat().st_ino
    store.add(torch.ones(1, 3), [1])
    two = store.save(folder).blobs
    assert (len(two), two[0].name, (folder / name).stat().st_ino) == (2, name, inode)
    store.add(torch.ones(2, 3), [1, 2])
    more = store.save(folder).blobs
    assert (len(more), more[0].name) == (2, name)  # the second file was small, it grew
    assert more[1].name != two[1].name
    assert_same_store(Datastore.load(folder), store)


def test_source_and_binding_are_kept(folder: Path) -> None:
    files = [FileRecord("model.safetensors", 3, "b" * 64, ["c" * 64])]
    binding = Binding("a" * 64, "d" * 64, "", "cls", "float32", files)
    make_store().save(folder, binding=binding)
    loaded = Datastore.load(folder)
    assert loaded.manifest is not None
    assert loaded.manifest.binding == binding


def test_names_lie_in_one_flat_folder(saved: Path) -> None:
    assert all(OWN_FILES.fullmatch(name) for name in names_in(saved))
    assert names_in(saved.parent) == {"store"}  # no lock, no temporary file
    assert hashlib.sha256(blob_of(saved).read_bytes()).hexdigest()[:12] in blob_of(saved).name


def test_the_manifest_says_what_is_there(saved: Path) -> None:
    values = read_manifest(saved)
    blob = blob_of(saved)
    sha256 = hashlib.sha256(blob.read_bytes()).hexdigest()
    assert values["blobs"] == [
        {"name": blob.name, "size": blob.stat().st_size, "sha256": sha256, "blocks": [sha256]}
    ]
    sha256 = hashlib.sha256((saved / FAISS).read_bytes()).hexdigest()
    assert values["faiss_index"]["sha256"] == sha256
    wanted = {"format": "hf_knn.datastore", "format_version": 1, "block_size": 64 * 2**20}
    wanted |= {"num_rows": 6, "dim": 3, "dtype": "float16", "metric": "cosine"}
    wanted["index"] = {"requested": "auto", "spec": "flat", "parameters": {}, "recall": None}
    assert {key: values[key] for key in wanted} == wanted


def test_hash_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "HASH_BLOCK", 4)
    for data in (b"", b"abc", b"abcd", b"abcdefghi"):
        (tmp_path / "file").write_bytes(data)
        parts = [data[i : i + 4] for i in range(0, len(data), 4)]
        assert hash_blocks(tmp_path / "file") == (
            hashlib.sha256(data).hexdigest(),
            [hashlib.sha256(part).hexdigest() for part in parts],
        )


# what a save touches


def test_an_unchanged_blob_is_not_written_again(saved: Path) -> None:
    before = blob_of(saved).stat()
    store = Datastore.load(saved)
    store.source = {"dataset": "new"}
    store.save(saved)
    after = blob_of(saved).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert Datastore.load(saved).source == {"dataset": "new"}


def test_reuse_links_unchanged_blobs(saved: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    Datastore.load(saved).save(other, reuse=saved)
    assert blob_of(other).samefile(blob_of(saved))
    assert_same_store(Datastore.load(other), Datastore.load(saved))
    make_store(1).save(other, reuse=saved)  # nothing to reuse; the link goes, the file stays
    assert version_of(Datastore.load(other)) == 1
    assert version_of(Datastore.load(saved)) == 0


@pytest.mark.parametrize("damaged", ["folder", "reuse"])
def test_a_damaged_blob_is_not_reused(saved: Path, tmp_path: Path, damaged: str) -> None:
    other = tmp_path / "other"
    name = blob_of(saved).name
    place = saved if damaged == "reuse" else other
    place.mkdir(exist_ok=True)
    (place / name).write_bytes(b"x" * blob_of(saved).stat().st_size)
    reuse = saved if damaged == "reuse" else tmp_path / "nowhere"
    make_store().save(other, reuse=reuse)
    assert version_of(Datastore.load(other)) == 0


def test_litter_goes_and_foreign_files_stay(saved: Path) -> None:
    litter = ["datastore-0123456789ab.safetensors"]
    foreign = ["config.json", "datastore-notes.txt", ".hidden", "datastore-0123.safetensors"]
    for name in litter + foreign:
        (saved / name).write_text("x")
    (saved / "datastore-folder").mkdir()
    make_store(1).save(saved)
    own = {MANIFEST, FAISS, blob_of_version(saved, 1)}
    assert names_in(saved) == {*foreign, "datastore-folder", *own}


@pytest.mark.parametrize("is_folder", [True, False])
def test_hidden_files_of_the_user_stay(saved: Path, is_folder: bool) -> None:
    mine = saved / ".datastore_notes"
    if is_folder:
        mine.mkdir()
    else:
        mine.write_text("mine")
    make_store(1).save(saved)
    assert mine.exists()


def blob_of_version(folder: Path, version: int) -> str:
    manifest = Datastore.load(folder).manifest
    assert manifest is not None
    assert version_of(Datastore.load(folder)) == version
    return manifest.blobs[0].name


@pytest.mark.usefixtures("without_faiss")
def test_what_a_killed_save_left_is_cleared(saved: Path) -> None:
    scratch = saved / persistence.SCRATCH
    (scratch / "deep").mkdir(parents=True)
    for name in ("rows", ".tmpAbCdEf", f".{FAISS}.tmp", "deep/file"):
        (scratch / name).write_text("x")
    Datastore.load(saved).save(saved)
    assert names_in(saved) == {MANIFEST, blob_of_version(saved, 0)}


@pytest.mark.parametrize(("umask", "mode"), [(0o027, 0o640), (0o077, 0o600), (0o022, 0o644)])
def test_file_modes_follow_the_umask(folder: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        make_store().save(folder)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {mode}
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask


def test_removed_rows_leave_no_bytes(folder: Path) -> None:
    store = Datastore.from_features(
        torch.tensor([[1.5, 2.5, 3.5], [4.25, 5.25, 6.25], [9.0, 8.0, 9.0]]), [0, 1, 2],
        metric="l2", normalization="none", paths=["one.png", "secret.png", "three.png"],
    )  # fmt: skip
    row = store.features[1]
    traces = [row.numpy().tobytes(), row.float().numpy().tobytes(), b"secret"]
    store.save(folder)
    files = content(folder)
    assert all(any(trace in data for data in files.values()) for trace in traces)
    store.remove([1])
    store.save(folder)
    files = content(folder)
    assert not any(trace in data for trace in traces for data in files.values())


@pytest.mark.usefixtures("without_faiss")
def test_an_old_faiss_index_does_not_outlive_its_rows(saved: Path) -> None:
    (saved / FAISS).write_bytes(b"old")
    manifest = make_store(1).save(saved)
    assert manifest.faiss_index is None
    assert FAISS not in names_in(saved)


def test_the_faiss_index_is_only_written(saved: Path) -> None:
    (saved / FAISS).write_bytes(b"hostile")
    assert version_of(Datastore.load(saved)) == 0
    (saved / FAISS).unlink()
    assert version_of(Datastore.load(saved)) == 0


def test_the_manifest_is_renamed_last_and_everything_is_flushed_first(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    replace, fsync, unlink = os.replace, storage.fsync_path, Path.unlink

    def log_replace(source: Any, target: Any) -> None:
        events.append(("rename", Path(target).name))
        replace(source, target)

    def log_fsync(path: Path) -> None:
        events.append(("fsync", path.name))
        fsync(path)

    def log_unlink(path: Path, missing_ok: bool = False) -> None:
        if OWN_FILES.fullmatch(path.name):
            events.append(("unlink", path.name))
        unlink(path, missing_ok)

    old = blob_of(saved).name
    monkeypatch.setattr(os, "replace", log_replace)
    for module in (storage, blobs, persistence):
        monkeypatch.setattr(module, "fsync_path", log_fsync)
    monkeypatch.setattr(Path, "unlink", log_unlink)
    name = make_store(1).save(saved).blobs[0].name
    for file, staged in ((name, "rows"), (FAISS, f".{FAISS}.tmp"), (MANIFEST, f".{MANIFEST}.tmp")):
        assert events.index(("fsync", staged)) < events.index(("rename", file))
    commit = events.index(("rename", MANIFEST))
    assert [place for place, event in enumerate(events) if event[0] == "rename"][-1] == commit
    assert ("fsync", saved.name) in events[:commit]  # names of blobs are on disk before it
    assert events[commit + 1] == ("fsync", saved.name)
    assert events.index(("unlink", old)) > commit


def test_file_names_of_any_bytes_are_kept(folder: Path) -> None:
    store = make_store(count=1, paths=[os.fsdecode(b"caf\xe9.png")])
    store.save(folder)
    assert Datastore.load(folder).paths == store.paths


# damage


def test_a_folder_without_datastore_is_not_found(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=rf"{folder}.*no datastore\.json"):
            Datastore.load(folder)


def flipped(data: bytes, position: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 1 << bit
    return bytes(changed)


def spots(size: int, count: int, seed: int) -> list[tuple[int, int]]:
    generator = random.Random(seed)
    return [(generator.randrange(size), generator.randrange(8)) for _ in range(count)]


def test_every_flipped_bit_of_a_blob_is_found(saved: Path) -> None:
    blob = blob_of(saved)
    data = blob.read_bytes()
    for position, bit in spots(len(data), 300, 0):
        blob.write_bytes(flipped(data, position, bit))
        with pytest.raises(DatastoreError, match=re.escape(blob.name)):
            Datastore.load(saved)


def load_or_error(folder: Path) -> Datastore | DatastoreError:
    try:
        return Datastore.load(folder)
    except DatastoreError as error:
        return error


def test_a_flipped_bit_of_the_manifest_is_found_or_means_nothing(saved: Path) -> None:
    data = (saved / MANIFEST).read_bytes()
    found = 0
    for position, bit in spots(len(data), 600, 1):
        (saved / MANIFEST).write_bytes(flipped(data, position, bit))
        result = load_or_error(saved)
        if isinstance(result, Datastore):
            assert version_of(result) == 0
        else:
            found += 1
            assert NAMES_A_FILE.search(str(result)), result
    assert found > 300


def test_a_flipped_bit_in_the_source_is_found(folder: Path) -> None:
    store = make_store()
    store.source = {"revision": "0123456789abcdef"}
    store.save(folder)
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace("0123456789", "0123456798"))
    with pytest.raises(DatastoreError, match=r"datastore\.json"):
        Datastore.load(folder)


@pytest.mark.parametrize("name", ["blob", MANIFEST])
def test_truncated_files_are_found(saved: Path, name: str) -> None:
    path = blob_of(saved) if name == "blob" else saved / MANIFEST
    data = path.read_bytes()
    lengths = {0, 1, 7, 8, len(data) - 2} | set(range(0, len(data) - 1, 17))
    for length in lengths:  # the last byte of the manifest is a line end
        path.write_bytes(data[:length])
        with pytest.raises(DatastoreError, match=re.escape(path.name)):
            Datastore.load(saved)
    path.write_bytes(data + b"x")
    with pytest.raises(DatastoreError, match=re.escape(path.name)):
        Datastore.load(saved)


def test_missing_blobs_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "SHARD_BYTES", 12)
    for index in range(3):
        manifest = make_store().save(folder)
        name = manifest.blobs[index].name
        (folder / name).unlink()
        with pytest.raises(DatastoreError, match=rf"{name}.*missing"):
            Datastore.load(folder)
        (folder / name).mkdir()
        with pytest.raises(DatastoreError, match=rf"{name}.*missing"):
            Datastore.load(folder)
        (folder / name).rmdir()


def test_files_from_another_save_are_found(saved: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    make_store(1).save(other)
    mine, others = content(saved), content(other)
    # its manifest beside my blob
    (saved / MANIFEST).write_bytes(others[MANIFEST])
    with pytest.raises(DatastoreError, match=rf"{blob_of(other).name}.*missing"):
        Datastore.load(saved)
    # its blob, of the same size, under my name
    (saved / MANIFEST).write_bytes(mine[MANIFEST])
    assert blob_of(saved).stat().st_size == blob_of(other).stat().st_size
    blob_of(saved).write_bytes(others[blob_of(other).name])
    with pytest.raises(DatastoreError, match=rf"{blob_of(saved).name} to have sha256"):
        Datastore.load(saved)


def test_a_size_that_differs_is_told_with_both_numbers(saved: Path) -> None:
    size = blob_of(saved).stat().st_size
    with blob_of(saved).open("ab") as file:
        file.write(b"more")
    with pytest.raises(DatastoreError, match=rf"{size} bytes, but got {size + 4}"):
        Datastore.load(saved)


# stores that are hashed later


@pytest.fixture
def hashed_later(saved: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datastore, "LARGEST_VERIFIED_AT_ONCE", 0)
    return saved


USES: dict[str, Callable[[Datastore], object]] = {
    "search": lambda store: store.search(torch.ones(1, 3), 2),
    "leave_one_out": lambda store: next(store.leave_one_out(2)),
    "features": lambda store: store.features,
    "labels": lambda store: store.labels,
    "ids": lambda store: store.ids,
    "paths": lambda store: store.paths,
    "path_of": lambda store: store.path_of(0),
    "add": lambda store: store.add(torch.ones(1, 3), [0]),
    "remove": lambda store: store.remove([0]),
    "relabel": lambda store: store.relabel([0], [1]),
    "recenter": lambda store: store.recenter(),
    "subset": lambda store: store.subset([0]),
    "merge": lambda store: make_store(7).merge(store),
    "copy": lambda store: copy.deepcopy(store).search(torch.ones(1, 3), 2),
    "save": lambda store: store.save("elsewhere"),
}


@pytest.mark.parametrize("use", USES)
def test_nothing_is_used_before_it_is_hashed(
    hashed_later: Path, use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blob = blob_of(hashed_later)
    USES[use](Datastore.load(hashed_later))
    data = blob.read_bytes()
    blob.unlink()  # a file of its own, not the one that is mapped
    blob.write_bytes(flipped(data, len(data) - 1, 0))
    store = Datastore.load(hashed_later)
    assert len(store) == 6
    for _ in range(2):  # and it does not become right by asking again
        with pytest.raises(DatastoreError, match=re.escape(blob.name)):
            USES[use](store)
    with pytest.raises(DatastoreError, match=re.escape(blob.name)):
        Datastore.load(hashed_later, verify="full")


def test_what_needs_no_hash_is_found_at_once(hashed_later: Path) -> None:
    blob = blob_of(hashed_later)
    data = blob.read_bytes()
    blob.write_bytes(data[:-1])
    with pytest.raises(DatastoreError, match=rf"{blob.name} to have {len(data)} bytes"):
        Datastore.load(hashed_later)
    blob.unlink()
    with pytest.raises(DatastoreError, match=rf"{blob.name}.*missing"):
        Datastore.load(hashed_later)
    with pytest.raises(ValueError, match=r"`verify`.*'none'"):
        Datastore.load(hashed_later, verify="none")


def test_files_hashed_later_are_hashed_once(
    hashed_later: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify, seen = FileRecord.verify_stream, []

    def count(record: FileRecord, file: BinaryIO) -> None:
        seen.append(record.name)
        verify(record, file)

    monkeypatch.setattr(FileRecord, "verify_stream", count)
    store = Datastore.load(hashed_later)
    assert not seen
    for _ in range(2):
        store.search(torch.ones(1, 3), 2)
    assert len(seen) == 1


def test_damage_in_a_later_file_is_found_each_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datastore, "LARGEST_VERIFIED_AT_ONCE", 0)
    monkeypatch.setattr(blobs, "SHARD_BYTES", 12)
    blob = folder / make_store().save(folder).blobs[1].name
    blob.write_bytes(flipped(blob.read_bytes(), blob.stat().st_size - 1, 0))
    store = Datastore.load(folder)
    for _ in range(3):
        with pytest.raises(DatastoreError, match=re.escape(blob.name)):
            store.search(torch.ones(1, 3), 2)


def test_a_store_and_its_copy_are_both_hashed(hashed_later: Path) -> None:
    store = Datastore.load(hashed_later)
    twin = copy.deepcopy(store)
    assert version_of(store) == version_of(twin) == 0


def test_a_version_that_was_opened_stays_usable_when_it_is_replaced(hashed_later: Path) -> None:
    store = Datastore.load(hashed_later)
    make_store(1).save(hashed_later)
    assert version_of(store) == 0


# lies in the manifest


def changed(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    """Sets a field; the name is a path such as `blobs.0.size`."""

    def change(values: dict[str, Any]) -> Any:
        *parents, last = [int(part) if part.isdigit() else part for part in name.split(".")]
        place: Any = values
        for part in parents:
            place = place[part]
        if value is KeyError:
            del place[last]
        else:
            place[last] = value
        return values

    return change


LIES: list[Any] = [
    ("num_rows", 7, "7 x 3|(7, 3)"),
    ("num_rows", 5, r"\(5, 3\).*\(6, 3\)"),
    ("num_rows", 0, r"\(0, 3\).*\(6, 3\)"),
    ("dim", 2, r"\(6, 2\).*\(6, 3\)"),
    ("dim", 4, r"\(6, 4\).*\(6, 3\)"),
    ("dtype", "float32", r"float32.*float16"),
    ("dtype", "float64", r"`dtype`.*float64"),
    ("metric", "l1", r"`metric`.*cosine.*l1"),
    ("metric", 3, r"`metric`.*3"),
    ("normalization", "none", r"`normalization`.*'none'"),
    ("normalization", "max", r"`normalization`.*max"),
    ("index", "IVF16,Flat", "`index`.*object.*str"),
    ("index", None, "`index`.*object.*NoneType"),
    ("index.spec", 7, r"`index\.spec`.*7"),
    ("index.recall", 2.0, r"`index\.recall`.*2"),
    ("index.parameters", {"nprobe": -1}, r"`index\.parameters\.nprobe`.*-1"),
    ("format", "other", r"`format`.*hf_knn\.datastore.*other"),
    ("format_version", 2, "version 1, but got version 2; upgrade"),
    ("format_version", 0, "version 1, but got version 0"),
    ("format_version", "1", "`format_version`.*'1'"),
    ("format_version", True, "`format_version`.*True"),
    ("block_size", 1024, "`block_size`.*67108864.*1024"),
    ("num_rows", -1, "`num_rows`.*-1"),
    ("num_rows", 6.0, r"`num_rows`.*6\.0"),
    ("num_rows", "6", "`num_rows`.*'6'"),
    ("num_rows", 2**62, f"`num_rows`.*{2**62}"),
    ("num_rows", 2**47, rf"{2**47} x.*{2**47 * 6} bytes.*have \d+ bytes"),
    ("dim", 2**47, f"{2**47} float16"),
    ("blobs.0.size", 2**47, r"`blobs\[0\]\.blocks`"),
    ("blobs.0.size", 2**20, f"{2**20} bytes, but got"),
    ("blobs.0.size", -1, r"`blobs\[0\]\.size`.*-1"),
    ("blobs.0.blocks", [], r"`blobs\[0\]\.blocks`.*one hash per"),
    ("blobs.0.blocks", ["a" * 64] * 2, r"`blobs\[0\]\.blocks`.*one hash per"),
    ("blobs.0.blocks", ["A" * 64], r"`blobs\[0\]\.blocks`"),
    ("blobs.0.blocks", [3], r"`blobs\[0\]\.blocks`"),
    ("blobs.0.sha256", "0" * 64, "sha256 000000000000"),
    ("blobs.0.sha256", "0" * 63, r"`blobs\[0\]\.sha256`"),
    ("blobs.0.sha256", None, r"`blobs\[0\]\.sha256`"),
    ("blobs", [], "0 bytes"),
    ("blobs", {}, "`blobs`.*list"),
    ("blobs", [[]], r"blobs\[0\].*object.*list"),
    ("blobs", None, "`blobs`.*list.*None"),
    ("blobs", KeyError, "`blobs`"),
    ("blobs.0.name", KeyError, r"`blobs\[0\]\.name`"),
    ("num_rows", KeyError, "`num_rows`"),
    ("faiss_index", KeyError, "`faiss_index`"),
    ("faiss_index.name", "../datastore.faiss", r"`faiss_index\.name`"),
    ("source", [], "`source`"),
    ("source", {"dataset": 3}, "`source`"),
    ("binding", [], "binding.*object.*list"),
    ("binding", {}, "`binding.fingerprint`"),
] + [
    ("blobs.0.name", name, r"`blobs\[0\]\.name`")
    for name in (
        "../datastore-0123456789ab.safetensors",
        "/etc/passwd",
        "sub/datastore-0123456789ab.safetensors",
        "datastore-0123456789ab.safetensors\n",
        "datastore-0123456789AB.safetensors",
        "datastore-0123456789ab.safetensors\0",
        "datastore-0123456789ab.pkl",
        "model.safetensors",
        "",
        "..",
        7,
    )
]


@pytest.mark.parametrize(("name", "value", "message"), LIES)
def test_lies_in_the_manifest_are_refused(saved: Path, name: str, value: Any, message: str) -> None:
    write_manifest(saved, changed(name, value)(read_manifest(saved)))
    with pytest.raises(DatastoreError, match=message) as caught:
        Datastore.load(saved)
    assert NAMES_A_FILE.search(str(caught.value))


@pytest.mark.parametrize(
    ("name", "value"), [("num_rows", 2**40), ("dim", 2**40), ("blobs.0.size", 2**40)]
)
def test_huge_sizes_are_refused_before_a_file_is_opened(
    saved: Path, name: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = changed(name, value)(read_manifest(saved))
    if name == "blobs.0.size":
        values = changed("blobs.0.blocks", ["0" * 64] * (2**40 // 2**26))(values)
        values = changed("num_rows", 2**36)(values)
    write_manifest(saved, values)

    def refuse(*_: Any) -> None:
        raise AssertionError("a file was read")

    monkeypatch.setattr(blobs, "load_file", refuse)
    monkeypatch.setattr("hf_knn.manifest.hash_blocks", refuse)
    with pytest.raises(DatastoreError, match=str(value)):
        Datastore.load(saved)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"null", id="null"),
        pytest.param(b'"text"', id="string"),
        pytest.param(b"{}", id="nothing in it"),
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(b'{"a":' * 100_000, id="deep objects"),
        pytest.param(b"\xff\xfe{}", id="not UTF-8"),
        pytest.param(b"\x80\x04N.", id="pickle"),
        pytest.param(b'{"format": NaN}', id="NaN"),
        pytest.param(
            b'{"format": ' + b"9" * 5000 + b"}", id="a number of 5000 digits",
        ),
    ],
)  # fmt: skip
def test_what_is_no_manifest_is_refused(saved: Path, text: bytes) -> None:
    (saved / MANIFEST).write_bytes(text)
    with pytest.raises(DatastoreError, match=r"datastore\.json"):
        Datastore.load(saved)


def test_a_huge_manifest_is_not_read(saved: Path) -> None:
    os.truncate(saved / MANIFEST, 65 * 2**20)  # sparse
    tracemalloc.start()
    try:
        with pytest.raises(DatastoreError, match=r"datastore\.json below 64 MiB"):
            Datastore.load(saved)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_doubled_blob_is_refused(saved: Path) -> None:
    values = read_manifest(saved)
    values["blobs"] *= 2
    values["num_rows"] = 12
    write_manifest(saved, values)
    with pytest.raises(DatastoreError, match=r"unique `ids`"):
        Datastore.load(saved)


def test_blobs_in_another_order_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "SHARD_BYTES", 18)
    make_store().save(folder)
    values = read_manifest(folder)
    assert len(values["blobs"]) == 2
    values["blobs"].reverse()
    write_manifest(folder, values)
    with pytest.raises(DatastoreError, match=r"datastore-.*`mean`"):
        Datastore.load(folder)


BINDING = Binding(
    "a" * 64, "b" * 64, "", "cls", "float32", [FileRecord("config.json", 1, "c" * 64, ["c" * 64])]
)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fingerprint", "short"),
        ("weights", None),
        ("processor", 3),
        ("pooling", "sum"),
        ("dtype", None),
        ("files", "config.json"),
        ("files.0.name", "../config.json"),
        ("files.0.name", "/config.json"),
        ("files.0.name", ".."),
        ("files.0.size", "1"),
    ],
)
def test_lies_in_the_binding_are_refused(folder: Path, name: str, value: Any) -> None:
    make_store().save(folder, binding=BINDING)
    write_manifest(folder, changed(f"binding.{name}", value)(read_manifest(folder)))
    with pytest.raises(DatastoreError, match=r"`binding\..*datastore\.json"):
        Datastore.load(folder)


# lies inside a blob whose hash is right


def forge(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Gives the blob other tensors, and the manifest the right hash of it."""
    blob = blob_of(folder)
    tensors = {name: tensor.clone() for name, tensor in load_file(blob).items()}
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    blob.unlink()
    temporary = folder / "forged"
    save_file(tensors, temporary)
    name = f"datastore-{hash_blocks(temporary)[0][:12]}.safetensors"
    temporary.rename(folder / name)
    record = FileRecord.of(folder / name)
    write_manifest(folder, read_manifest(folder) | {"blobs": [vars(record)]})


SIX = torch.arange(6)
ROWS = make_store().features
BAD_TENSORS: list[Any] = [
    ("negative label", {"labels": SIX - 1}, "`labels` to be >= 0, but got -1"),
    ("float labels", {"labels": SIX.float()}, r"`labels`.*float32"),
    ("bool labels", {"labels": SIX > 2}, r"`labels`.*bool"),
    ("few labels", {"labels": SIX[:5]}, r"row \(6\).*5 labels"),
    ("many labels", {"labels": torch.arange(7)}, r"row \(6\).*7 labels"),
    ("square labels", {"labels": SIX.reshape(6, 1)}, r"`labels`.*\(6, 1\)"),
    ("doubled ids", {"ids": torch.tensor([0, 1, 2, 3, 4, 4])}, r"unique `ids`.*\[4\]"),
    ("negative ids", {"ids": SIX - 1}, "`ids` to be >= 0, but got -1"),
    ("few ids", {"ids": SIX[:5]}, "5 ids"),
    ("NaN", {"features": ROWS.clone().index_fill_(0, SIX[1:2], torch.nan)}, r"rows \[1\]"),
    ("infinity", {"features": ROWS.clone().index_fill_(0, SIX[5:], torch.inf)}, r"rows \[5\]"),
    ("few rows", {"features": ROWS[:5].clone()}, r"\(6, 3\).*\(5, 3\)"),
    ("narrow rows", {"features": ROWS[:, :2].clone()}, r"\(6, 3\).*\(6, 2\)"),
    ("flat rows", {"features": ROWS.flatten()}, r"\(6, 3\).*\(18,\)"),
    ("float32 rows", {"features": ROWS.float()}, r"float16.*float32"),
    ("NaN mean", {"mean": torch.full((3,), torch.nan)}, "`mean`"),
    ("infinite mean", {"mean": torch.full((3,), torch.inf)}, "`mean`"),
    ("short mean", {"mean": torch.zeros(2)}, r"`mean`.*\(3,\).*\(2,\)"),
    ("flat mean", {"mean": torch.zeros(1, 3)}, "`mean`"),
    ("no features", {"features": None}, r"datastore-.*`features`"),
    ("no labels", {"labels": None}, r"datastore-.*`labels`"),
    ("no ids", {"ids": None}, r"datastore-.*`ids`"),
    ("no mean", {"mean": None}, r"datastore-.*`mean`"),
    ("no path bytes", {"path_bytes": None}, r"datastore-.*`path_bytes`"),
    ("few paths", {"path_ends": torch.tensor([3, 60])}, r"datastore-|path per row \(6\).*2"),
    ("paths beyond", {"path_ends": SIX * 1000}, "paths.*order"),
    ("square path ends", {"path_ends": SIX.reshape(2, 3)}, "`path_ends`.*list"),
    ("paths in disorder", {"path_ends": torch.tensor([9, 3, 9, 9, 9, 60])}, "paths.*order"),
]
UNCHECKED: list[Any] = [
    ("scalar mean", {"mean": torch.tensor(0.0)}, "`mean`"),
    ("scalar path ends", {"path_ends": torch.tensor(6)}, "path"),
    ("float path ends", {"path_ends": (SIX + 1) * 10.0}, "path"),
    ("bfloat16 path bytes", {"path_bytes": torch.zeros(27).bfloat16()}, "path"),
    ("negative path ends", {"path_ends": torch.tensor([-9, 3, 9, 9, 9, 60])}, "path"),
]


@pytest.mark.parametrize(("changes", "message"), [case[1:] for case in BAD_TENSORS],
                         ids=[case[0] for case in BAD_TENSORS])  # fmt: skip
def test_lies_in_a_rightly_hashed_blob_are_refused(
    saved: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    forge(saved, changes)
    with pytest.raises(DatastoreError, match=message):
        Datastore.load(saved)


@pytest.mark.parametrize(("changes", "message"), [case[1:] for case in UNCHECKED],
                         ids=[case[0] for case in UNCHECKED])  # fmt: skip
def test_tensors_of_another_kind_are_refused(
    saved: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    forge(saved, changes)
    with pytest.raises(DatastoreError, match=message):
        Datastore.load(saved)


def test_a_forged_blob_with_nothing_changed_loads(saved: Path) -> None:
    forge(saved, {})
    assert version_of(Datastore.load(saved)) == 0


def test_a_hashed_blob_that_is_no_safetensors_file_is_refused(saved: Path) -> None:
    blob_of(saved).unlink()
    for number, data in enumerate((b"\x80\x04N.", b"\xff" * 400, b"")):
        sha256 = hashlib.sha256(data).hexdigest()
        path = saved / f"datastore-{sha256[:12]}.safetensors"
        path.write_bytes(data)
        values = read_manifest(saved) | {"blobs": [vars(FileRecord.of(path))]}
        write_manifest(saved, values | {"num_rows": 0})
        with pytest.raises(DatastoreError, match=path.name):
            Datastore.load(saved)
        assert number < 3


# golden files


def golden_store() -> Datastore:
    features = torch.tensor(
        [[0.5, 1.0, -2.0], [3.0, 0.25, 1.0], [-1.5, 2.0, 0.0],
         [8.0, -4.0, 0.125], [1.0, 1.0, 1.0], [0.0, -0.75, 6.0]]
    )  # fmt: skip
    paths = ["cat/1.png", "cat/2.png", "", "größe.jpg", "dog/1.png", "dog/2.png"]
    store = Datastore.from_features(
        features, [0, 0, 1, 2, 1, 1], [10, 11, 3, 2**40, 4, 5], paths=paths
    )
    store.source = {"dataset": "golden", "split": "train"}
    return store


@pytest.mark.skipif(
    "HF_KNN_WRITE_GOLDEN" not in os.environ,
    reason="writes the golden files: only with a new format version",
)
@pytest.mark.usefixtures("without_faiss")
def test_write_golden_files() -> None:
    assert not GOLDEN.exists(), f"delete {GOLDEN} first"
    golden_store().save(GOLDEN)


@pytest.mark.usefixtures("without_faiss")  # the index's bytes depend on faiss's version
def test_golden_files_load_and_save_to_the_same_bytes(tmp_path: Path) -> None:
    copied = shutil.copytree(GOLDEN, tmp_path / "copied")  # a save may link to what was loaded
    loaded = Datastore.load(copied)
    assert_same_store(loaded, golden_store())
    assert loaded.features.tolist()[3] == [8.0, -4.0, 0.125]
    assert loaded.labels.tolist() == [0, 0, 1, 2, 1, 1]
    assert loaded.ids.tolist() == [10, 11, 3, 2**40, 4, 5]
    assert (loaded.path_of(2**40), loaded.path_of(3)) == ("größe.jpg", "")
    # column sums 11, -0.5, 6.125, by six
    assert loaded.mean.tolist() == pytest.approx([11 / 6, -0.5 / 6, 6.125 / 6])
    assert (loaded.metric, loaded.normalization, loaded.dtype) == (
        "cosine", "l2_centered", "float16",
    )  # fmt: skip
    assert loaded.source == {"dataset": "golden", "split": "train"}
    assert len(content(GOLDEN)) == 2
    loaded.save(tmp_path / "again")
    golden_store().save(tmp_path / "anew")  # has no file to link, writes every byte
    assert content(tmp_path / "again") == content(tmp_path / "anew") == content(GOLDEN)


# processes


def in_child(work: Callable[[], object]) -> int:
    """Forks; the child works and leaves without clean-up of this process's things."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def outcome(work: Callable[[], object]) -> str:
    """Runs in a child and returns its error (`PermissionError: text`), or nothing."""
    reader, writer = os.pipe()

    def report() -> None:
        try:
            work()
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())

    pid = in_child(report)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return text


class Fork(NamedTuple):
    """A child that does `work(0)`, `work(1)`, … until it is killed, and says when one is done."""

    pid: int
    done: int

    @classmethod
    def repeating(cls, work: Callable[[int], object]) -> "Fork":
        reader, writer = os.pipe()

        def repeat() -> None:
            for number in range(2**15):  # what fits into the pipe
                os.write(writer, b".")
                work(number)

        child = cls(in_child(repeat), reader)
        os.close(writer)
        child.wait_for(1)  # it runs
        return child

    def wait_for(self, count: int) -> None:
        """Waits until so many more calls have returned."""
        for _ in range(count):
            assert os.read(self.done, 1) == b".", "the child ended by an error"

    def kill(self) -> None:
        """Kills it; fails if it ended by itself, by an error."""
        os.kill(self.pid, signal.SIGKILL)
        os.close(self.done)
        assert os.WTERMSIG(os.waitpid(self.pid, 0)[1]) == signal.SIGKILL

    def kill_at_random(self, generator: random.Random) -> None:
        """Kills it after 0 to 3 calls and, on a machine that is not busy, somewhere in the next."""
        self.wait_for(generator.randrange(4))
        time.sleep(generator.uniform(0, 0.008))
        self.kill()


def kill_saves(folder: Path, kills: int, seed: int) -> set[int]:
    """Kills saves of versions 0 and 1 at random moments; returns the versions found."""
    stores = [make_store(0), make_store(1)]
    stores[0].save(folder)
    generator, found = random.Random(seed), set()
    for _ in range(kills):
        child = Fork.repeating(lambda number: stores[number % 2].save(folder))
        child.kill_at_random(generator)
        found.add(version_of(Datastore.load(folder)))
        litter = names_in(folder) - {MANIFEST, FAISS, persistence.SCRATCH}
        assert len(litter) <= 2  # the blobs of both versions
        assert names_in(folder.parent) <= {folder.name, f".{folder.name}.lock"}
    stores[1].save(folder)
    assert names_in(folder) == {MANIFEST, FAISS, blob_of_version(folder, 1)}
    assert names_in(folder.parent) == {folder.name}
    return found


def test_a_kill_during_save_leaves_one_version(folder: Path) -> None:
    assert kill_saves(folder, 25, 0) == {0, 1}


@pytest.mark.faults
@pytest.mark.slow
def test_many_kills_during_save_leave_one_version(folder: Path) -> None:
    assert kill_saves(folder, 300, 1) == {0, 1}


def test_a_kill_while_safetensors_writes_leaves_no_litter(folder: Path) -> None:
    small, big = make_store(0), Datastore.from_features(torch.ones(10_000, 1000), [0] * 10_000)
    small.save(folder)
    child = Fork.repeating(lambda _: big.save(folder))
    end = time.monotonic() + 20
    while True:  # until it has its own temporary file, of a random name
        assert time.monotonic() < end
        with contextlib.suppress(FileNotFoundError):  # the scratch folder comes and goes
            if list((folder / persistence.SCRATCH).glob(".tmp??????")):
                break
    child.kill()
    assert names_in(folder) <= {MANIFEST, FAISS, persistence.SCRATCH, blob_of_version(folder, 0)}
    small.save(folder)
    assert names_in(folder) == {MANIFEST, FAISS, blob_of_version(folder, 0)}


def kill_exchanges(folder: Path, kills: int, seed: int) -> set[str]:
    """Kills exchanges of whole folders; returns the versions found."""
    parts = ["a", "b", "sub/c"]

    def write(version: int) -> None:
        with replaced_folder(folder, lambda name: name in ("a", "b", "sub")) as staging:
            (staging / "sub").mkdir()
            for part in parts:
                (staging / part).write_text(str(version))

    write(0)
    (folder / "notes.txt").write_text("mine")
    (folder / "runs").mkdir()
    (folder / "runs" / "log").write_text("mine too")
    generator, found = random.Random(seed), set()
    beside = {folder.name, f".{folder.name}.lock", f".{folder.name}.staging"}
    for _ in range(kills):
        child = Fork.repeating(lambda number: write(number % 2))
        child.kill_at_random(generator)
        versions = {(folder / part).read_text() for part in parts}
        assert len(versions) == 1
        found |= versions
        assert (folder / "notes.txt").read_text() == "mine"
        assert (folder / "runs" / "log").read_text() == "mine too"
        assert names_in(folder.parent) <= beside
    write(7)
    assert names_in(folder.parent) == {folder.name}
    assert names_in(folder) == {"a", "b", "sub", "notes.txt", "runs"}
    return found


def test_a_kill_during_an_exchange_leaves_one_version(folder: Path) -> None:
    assert kill_exchanges(folder, 25, 0) == {"0", "1"}


@pytest.mark.faults
@pytest.mark.slow
def test_many_kills_during_an_exchange_leave_one_version(folder: Path) -> None:
    assert kill_exchanges(folder, 300, 1) == {"0", "1"}


@pytest.fixture(scope="module")
def reads(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[int], int, list[Exception]]:
    """Loads while two processes save: the versions seen, the number of loads, the errors."""
    folder = tmp_path_factory.mktemp("shared") / "store"
    stores = [make_store(version) for version in range(4)]
    stores[0].save(folder)

    def save_two(first: int) -> Fork:
        return Fork.repeating(lambda number: stores[first + number % 2].save(folder))

    writers = [save_two(0), save_two(2)]
    versions: set[int] = set()
    errors: list[Exception] = []
    count, start = 0, time.monotonic()
    # two seconds, or longer where the machine is busy
    while (passed := time.monotonic() - start) < 2 or (len(versions) < 4 and passed < 30):
        count += 1
        try:
            versions.add(version_of(Datastore.load(folder)))
        except (OSError, RuntimeError, DatastoreError) as error:
            errors.append(error)
    for writer in writers:
        writer.kill()
    stores[0].save(folder)
    assert names_in(folder) == {MANIFEST, FAISS, blob_of_version(folder, 0)}
    assert names_in(folder.parent) == {folder.name}
    return versions, count, errors


def test_a_reader_beside_two_writers_sees_whole_versions(
    reads: tuple[set[int], int, list[Exception]],
) -> None:
    versions, count, _ = reads
    assert versions == {0, 1, 2, 3}
    assert count > 100


def test_a_reader_beside_two_writers_sees_no_error(
    reads: tuple[set[int], int, list[Exception]],
) -> None:
    assert not reads[2]


def while_reading(monkeypatch: pytest.MonkeyPatch, *steps: Callable[[], object]) -> None:
    """Runs the steps before, and after, the first time a blob's record is compared."""
    verify, waiting = FileRecord.verify_size, list(steps)

    def verify_later(record: FileRecord, path: Path | None) -> Path:
        before, after = (waiting.pop(0) if waiting else None for _ in range(2))
        try:
            if before is not None:
                before()
            return verify(record, path if path is None or path.is_file() else None)
        finally:
            if after is not None:
                after()

    monkeypatch.setattr(FileRecord, "verify_size", verify_later)


def test_a_version_replaced_before_its_blob_is_read_is_read_anew(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    while_reading(monkeypatch, lambda: outcome(lambda: make_store(1).save(saved)))
    assert version_of(Datastore.load(saved)) == 1


def test_a_version_replaced_before_its_blob_is_opened_is_read_anew(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace() -> None:
        assert not outcome(lambda: make_store(1).save(saved))

    while_reading(monkeypatch, lambda: None, replace)
    assert version_of(Datastore.load(saved)) == 1


def test_a_version_replaced_and_put_back_is_read_anew(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    while_reading(
        monkeypatch,
        lambda: outcome(lambda: make_store(1).save(saved)),
        lambda: outcome(lambda: make_store(0).save(saved)),
    )
    assert version_of(Datastore.load(saved)) == 0


def test_a_blob_that_vanishes_while_it_is_opened_is_read_anew(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (FileNotFoundError, RuntimeError):  # as safetensors says it, and torch
        calls: list[Path] = []

        def load(path: Path, error: type[Exception] = error, calls: list = calls) -> Any:
            calls.append(path)
            if len(calls) == 1:
                assert not outcome(lambda: make_store(1).save(saved))
                raise error(f"unable to open file <{path}>")
            return load_file(path)

        make_store(0).save(saved)
        monkeypatch.setattr(blobs, "load_file", load)
        assert version_of(Datastore.load(saved)) == 1


def test_a_damaged_version_is_read_once(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = blob_of(saved).read_bytes()
    blob_of(saved).write_bytes(flipped(data, len(data) - 1, 3))
    verify, calls = FileRecord.verify_stream, []

    def count(record: FileRecord, file: BinaryIO) -> None:
        calls.append(record.name)
        verify(record, file)

    monkeypatch.setattr(FileRecord, "verify_stream", count)
    with pytest.raises(DatastoreError):
        Datastore.load(saved)
    assert len(calls) == 1


def test_writers_wait_for_each_other(folder: Path) -> None:
    with exclusive_lock(folder):
        reader, writer = os.pipe()

        def save() -> None:
            make_store(1).save(folder)
            os.write(writer, b"saved")

        pid = in_child(save)
        time.sleep(0.3)
        assert not (folder / MANIFEST).exists()
    assert os.read(reader, 5) == b"saved"
    assert os.waitpid(pid, 0)[1] == 0
    assert version_of(Datastore.load(folder)) == 1
    assert names_in(folder.parent) == {folder.name}


# disks that refuse


def save_with_limit(store: Datastore, folder: Path, limit: int) -> str:
    """Saves where no file may grow beyond `limit` bytes, as on a full disk."""

    def save() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        store.save(folder)

    return outcome(save)


@pytest.mark.parametrize("limit", [0, 1, 100, 300, 500])
def test_a_full_disk_leaves_the_old_version(saved: Path, limit: int) -> None:
    before = content(saved)
    assert limit < blob_of(saved).stat().st_size
    error = save_with_limit(make_store(1), saved, limit)
    assert error.startswith("OSError: ")
    assert str(saved) in error
    assert "is intact" in error
    assert content(saved) == before
    assert names_in(saved.parent) == {saved.name}
    assert save_with_limit(make_store(1), saved, 2**20) == ""
    assert version_of(Datastore.load(saved)) == 1


def test_a_disk_full_at_the_manifest_leaves_the_old_version(saved: Path) -> None:
    before = content(saved)
    files = {name: len(data) for name, data in before.items()}
    limit = max(size for name, size in files.items() if name != MANIFEST)
    assert limit < files[MANIFEST]
    error = save_with_limit(make_store(1), saved, limit)
    assert error.startswith("OSError: ")
    assert str(saved) in error
    after = content(saved)
    assert all(after[name] == before[name] for name in before if name != FAISS)
    assert version_of(Datastore.load(saved)) == 0
    make_store(2).save(saved)
    assert names_in(saved) == {MANIFEST, FAISS, blob_of_version(saved, 2)}


def test_a_disk_full_at_the_manifest_leaves_the_old_faiss_index(saved: Path) -> None:
    before = content(saved)
    limit = max(len(data) for name, data in before.items() if name != MANIFEST)
    assert save_with_limit(make_store(1), saved, limit)
    assert content(saved)[FAISS] == before[FAISS]


def test_a_full_disk_for_a_first_save(folder: Path) -> None:
    assert str(folder) in save_with_limit(make_store(), folder, 10)
    with pytest.raises(FileNotFoundError):
        Datastore.load(folder)
    assert not folder.exists() or names_in(folder) == set()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(OSError, match=rf"Could not save the datastore to {folder}:"):
            make_store().save(folder)
    assert names_in(tmp_path) == {"file"}
    assert (tmp_path / "file").read_text() == "mine"


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A folder that another user can enter, as pytest's own are not."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o777)
    yield place
    for entry in place.iterdir():
        entry.chmod(0o755)
    shutil.rmtree(place)


def as_nobody(work: Callable[[], object]) -> str:
    def drop() -> None:
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        work()

    return outcome(drop)


def test_a_read_only_folder_keeps_its_version(open_place: Path) -> None:
    folder = open_place / "store"
    make_store().save(folder)
    before = content(folder)
    folder.chmod(0o555)
    assert as_nobody(lambda: version_of(Datastore.load(folder))) == ""  # reading needs no lock
    error = as_nobody(lambda: make_store(1).save(folder))
    assert error.startswith("OSError: ")
    assert str(folder) in error
    assert "Permission denied" in error
    assert content(folder) == before
    assert names_in(open_place) == {"store"}


# write_durably and replaced_folder


def test_an_error_while_writing_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_durably(path, fail)
    assert names_in(tmp_path) == {"file"}
    assert path.read_text() == "old"


@pytest.fixture
def version(tmp_path: Path) -> Path:
    folder = tmp_path / "version"
    (folder / "own").mkdir(parents=True)
    (folder / "runs" / "deep").mkdir(parents=True)
    for name in ("model", "stale", "own/part", "notes", "runs/log", "runs/deep/log"):
        (folder / name).write_text("old")
    (folder / "link").symlink_to("notes")
    (folder / "broken").symlink_to("nowhere")
    return folder


def is_owned(name: str) -> bool:
    return name in ("model", "stale", "own")


def replace_version(folder: Path) -> None:
    with replaced_folder(folder, is_owned) as staging:
        assert names_in(staging) == set()
        (staging / "model").write_text("new")


def test_a_folder_is_replaced_and_foreign_files_stay(version: Path) -> None:
    version.chmod(0o750)
    inode = (version / "runs" / "log").stat().st_ino
    with (version / "runs" / "log").open("a") as log:
        replace_version(version)
        log.write(", and more")  # a program that has a file open goes on writing to it
    assert names_in(version) == {"model", "notes", "runs", "link", "broken"}
    assert (version / "model").read_text() == "new"
    assert (version / "runs" / "log").read_text() == "old, and more"
    assert (version / "runs" / "log").stat().st_ino == inode
    assert (version / "runs" / "deep" / "log").read_text() == "old"
    assert (version / "link").readlink() == Path("notes")
    assert (version / "broken").readlink() == Path("nowhere")
    assert version.stat().st_mode & 0o777 == 0o750
    assert names_in(version.parent) == {"version"}


def test_the_new_version_wins_over_a_foreign_file(version: Path) -> None:
    with replaced_folder(version, is_owned) as staging:
        (staging / "notes").write_text("new")
    assert (version / "notes").read_text() == "new"


def test_foreign_files_beside_new_ones_in_a_sub_folder_stay(version: Path) -> None:
    with replaced_folder(version, is_owned) as staging:
        (staging / "runs").mkdir()
        (staging / "runs" / "new").write_text("new")
    assert names_in(version / "runs") == {"new", "log", "deep"}


def test_a_new_folder_is_made(tmp_path: Path) -> None:
    replace_version(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "model").read_text() == "new"
    assert names_in(tmp_path / "a") == {"b"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_inside_keeps_the_old_folder(version: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), replaced_folder(version, is_owned) as staging:  # noqa: PT012
        (staging / "model").write_text("new")
        raise error
    assert (version / "model").read_text() == "old"
    assert "stale" in names_in(version)
    assert names_in(version.parent) == {"version"}


def test_an_old_staging_folder_is_cleared(version: Path) -> None:
    staging = version.parent / ".version.staging"
    (staging / "sub").mkdir(parents=True)
    (staging / "model").write_text("half")
    replace_version(version)
    assert names_in(version) == {"model", "notes", "runs", "link", "broken"}
    assert names_in(version.parent) == {"version"}


def test_everything_is_flushed_before_the_exchange(
    version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, exchange = storage.fsync_path, storage._exchange

    def log_fsync(path: Path) -> None:
        events.append(path.name)
        fsync(path)

    def log_exchange(first: Path, second: Path) -> bool:
        events.append("exchange")
        return exchange(first, second)

    monkeypatch.setattr(storage, "fsync_path", log_fsync)
    monkeypatch.setattr(storage, "_exchange", log_exchange)
    replace_version(version)
    middle = events.index("exchange")
    assert {"model", "notes", ".version.staging"} <= set(events[:middle])
    assert events[middle:] == ["exchange", version.parent.name]


def test_without_an_atomic_exchange_two_renames_do(
    version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_exchange", lambda first, second: False)
    replace_version(version)
    assert names_in(version) == {"model", "notes", "runs", "link", "broken"}
    assert (version / "model").read_text() == "new"
    assert names_in(version.parent) == {"version"}


def test_the_old_folder_is_taken_back_after_a_kill_between_two_renames(version: Path) -> None:
    version.rename(version.parent / ".version.old")  # what such a kill leaves
    with pytest.raises(ValueError, match="stop"), replaced_folder(version, is_owned):
        raise ValueError("stop")
    assert (version / "model").read_text() == "old"


@pytest.mark.parametrize("where", [".", "runs/deep"])
def test_the_working_folder_may_lie_inside(
    version: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(version / where)
    replace_version(version if where != "." else Path("."))
    assert Path.cwd() == version / where
    wanted = {"model", "notes", "runs", "link", "broken"} if where == "." else {"log"}
    assert names_in(Path(".")) == wanted
    Path("made").touch()  # the folder that exists now, not a deleted one
    assert (version / where / "made").exists()


def test_the_working_folder_may_lie_inside_by_another_name(
    version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (version.parent / "alias").symlink_to(version.parent)
    monkeypatch.chdir(version)
    replace_version(version.parent / "alias" / "version")
    assert Path.cwd() == version


def test_the_working_folder_may_be_gone(version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = version.parent / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    replace_version(version)


def test_a_symbolic_link_to_the_folder_stays_one(version: Path) -> None:
    link = version.parent / "latest"
    link.symlink_to(version)
    replace_version(link)
    assert link.is_symlink()
    assert (version / "model").read_text() == "new"


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="to be a folder, but got a file"):
        replace_version(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    assert names_in(tmp_path) == {"file"}


def test_a_manifest_survives_its_own_json(saved: Path) -> None:
    manifest = Manifest.read(saved / MANIFEST)
    assert Manifest.parse(json.loads(manifest.to_json())) == manifest
    assert copy.deepcopy(manifest) == manifest


def test_an_index_of_more_lists_than_there_are_is_refused_before_it_is_built(saved: Path) -> None:
    values = read_manifest(saved)
    for spec in ("IVF999999999999,Flat", "IVF999999999999,PQ1"):
        write_manifest(saved, values | {"index": values["index"] | {"spec": spec}})
        with pytest.raises(ValueError, match=r"lists"):
            Datastore.load(saved).search(torch.ones(1, 3), 2)
