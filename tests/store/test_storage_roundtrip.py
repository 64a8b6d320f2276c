"""The stored datastore: round trips, what a save touches, and golden files."""

import hashlib
import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.oracles import assert_same_store
from support.stored import (
    FAISS,
    MANIFEST,
    OWN_FILES,
    blob_of,
    blob_of_version,
    content,
    make_store,
    names_in,
    read_manifest,
    version_of,
)

from hf_knn.core.manifest import Binding, FileRecord, hash_blocks
from hf_knn.store import disk as blobs
from hf_knn.store import disk as persistence
from hf_knn.store import folders as storage
from hf_knn.store import table as row_table
from hf_knn.store.datastore import Datastore

GOLDEN = Path(__file__).parents[1] / "golden" / "datastore-v1"

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
    monkeypatch.setattr(row_table, "SHARD_BYTES", 12)  # two rows of three float16 values
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
    monkeypatch.setattr(row_table, "SHARD_BYTES", 12)
    store = make_store()
    store.save(folder)
    store.remove(list(range(count)))
    store.save(folder)
    assert_same_store(Datastore.load(folder), store)


CHANGES = ["add", "add", "add without paths", "remove", "remove", "relabel", "recenter", "widen"]


@given(
    changes=st.lists(st.sampled_from(CHANGES), min_size=1, max_size=6),
    seed=st.integers(0, 2**32 - 1),
    large=st.sampled_from([1, 13, 1000]),
    reloads=st.booleans(),
    with_paths=st.booleans(),
)
def assert_files_hold_the_rows_of_now(
    changes: list[str], seed: int, large: int, reloads: bool, with_paths: bool
) -> None:
    generator = random.Random(seed)
    store = make_store(count=7) if with_paths else make_store(count=7, paths=None)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as place:
        patch.setattr(persistence, "has_faiss", lambda: False)
        patch.setattr(row_table, "SHARD_BYTES", 18)  # three rows
        patch.setattr(row_table, "SMALL_SHARD_BYTES", large)
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


@pytest.mark.parametrize("examples", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_files_that_are_not_written_again_hold_the_rows_of_now(examples: int) -> None:
    drawn = settings(max_examples=examples, deadline=None, derandomize=True)
    drawn(assert_files_hold_the_rows_of_now)()


def test_added_rows_leave_large_files_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_table, "SMALL_SHARD_BYTES", 36)  # six rows, as the store has
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
    files = [FileRecord("model.safetensors", 3, "b" * 64, ["b" * 64])]
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
    monkeypatch.setattr("hf_knn.core.manifest.HASH_BLOCK", 4)
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
