"""Saves on disks that are full, read-only, or refuse for another reason."""

import ctypes
import os
import re
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.forks import as_nobody, outcome
from support.oracles import assert_same_store
from support.stored import (
    FAISS,
    MANIFEST,
    blob_of,
    blob_of_version,
    content,
    make_store,
    names_in,
    version_of,
)

from hf_knn.store import disk as persistence
from hf_knn.store.datastore import Datastore

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


def wide_store(version: int) -> Datastore:
    """Its faiss index, of float32, is the largest file."""
    features = torch.randn(100, 64, generator=torch.Generator().manual_seed(version))
    return Datastore.from_features(features, [version] * 100)


@pytest.mark.parametrize("short", [1, 100, 5000])
def test_a_disk_full_at_the_faiss_index_leaves_the_old_version(folder: Path, short: int) -> None:
    wide_store(0).save(folder)
    before = content(folder)
    limit = len(before[FAISS]) - short
    assert limit > max(len(data) for name, data in before.items() if name != FAISS)
    error = save_with_limit(wide_store(1), folder, limit)
    assert re.match(rf"OSError: Could not save the datastore to {folder}: .*is intact", error)
    after = content(folder)
    assert {name: after.get(name) for name in before} == before
    assert save_with_limit(wide_store(1), folder, limit + short) == ""
    assert_same_store(Datastore.load(folder), wide_store(1))


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


def test_a_folder_that_is_writable_again_is_saved_to(open_place: Path) -> None:
    folder = open_place / "store"
    assert as_nobody(lambda: make_store().save(folder)) == ""
    for place in (folder, open_place):  # no staging folder, and no lock
        place.chmod(0o555)
        error = as_nobody(lambda: make_store(1).save(folder))
        assert error.startswith(f"OSError: Could not save the datastore to {folder}: ")
        assert as_nobody(lambda: version_of(Datastore.load(folder))) == ""
        place.chmod(0o777)
        assert as_nobody(lambda: make_store(1).save(folder)) == ""
        assert version_of(Datastore.load(folder)) == 1
        assert as_nobody(lambda: make_store().save(folder)) == ""
        assert names_in(folder) == {MANIFEST, FAISS, blob_of_version(folder, 0)}
    assert names_in(open_place) == {"store"}


# full disks

PAGE = 4096
_CLONE_NEWNS = 0x20000
_MS_RDONLY, _MS_REMOUNT, _MS_REC, _MS_PRIVATE = 1, 32, 1 << 14, 1 << 18


def system_call(name: str, *values: object) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*values):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def mount_small_disk(place: Path, options: str, flags: int = 0) -> None:
    """Gives this process, and nobody else, a file system of its own in `place`."""
    if not flags & _MS_REMOUNT:
        system_call("unshare", _CLONE_NEWNS)
        system_call("mount", b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None)
    system_call(
        "mount", b"none", os.fsencode(place), b"tmpfs", ctypes.c_ulong(flags), options.encode()
    )


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Where a small disk can be mounted, in a child."""
    place = tmp_path / "disk"
    place.mkdir()
    refused = outcome(lambda: mount_small_disk(place, "size=64k"))
    if refused:
        pytest.skip(f"mounting a file system of its own is not permitted here ({refused})")
    return place


@dataclass
class Ballast:
    """Fills a small disk up to a rest."""

    place: Path

    def leave_pages(self, rest: int) -> None:
        with self.place.open("wb") as file:
            free = os.statvfs(self.place.parent).f_bavail
            if free > rest:
                os.posix_fallocate(file.fileno(), 0, (free - rest) * PAGE)
            assert os.statvfs(self.place.parent).f_bavail == rest

    def leave_names(self, rest: int) -> None:
        self.place.mkdir()
        for number in range(os.statvfs(self.place).f_ffree - rest):
            (self.place / str(number)).touch()
        assert os.statvfs(self.place).f_ffree == rest

    def drop(self) -> None:
        if self.place.is_dir():
            for entry in self.place.iterdir():
                entry.unlink()
            self.place.rmdir()
        else:
            self.place.unlink()


def fill_and_save(disk: Path, rests: range, fill: Callable[[Ballast, int], None]) -> set[str]:
    """Saves where less and less is left; returns what came of it."""
    folder, ballast, results, version = disk / "store", Ballast(disk / "ballast"), set(), 0
    store_of(0).save(folder)
    for turn, rest in enumerate(rests):
        before = content(folder)
        fill(ballast, rest)
        error = error_of_save(store_of(turn + 1), folder)
        if error is None:
            version = turn + 1
        else:
            assert type(error) is OSError, repr(error)
            assert re.match(rf"Could not save the datastore to {folder}: .*is intact", str(error))
            after = content(folder)
            assert {name: after.get(name) for name in before} == before
            assert not (folder / persistence.SCRATCH).exists()
        assert_same_store(Datastore.load(folder), store_of(version))
        results.add("saved" if error is None else "refused")
        ballast.drop()
        version = turn + 1
        store_of(version).save(folder)
        assert_same_store(Datastore.load(folder), store_of(version))
        assert names_in(folder) == {MANIFEST, FAISS, blob_of(folder).name}
        assert names_in(disk) == {"store"}
    return results


def error_of_save(store: Datastore, folder: Path) -> Exception | None:
    try:
        store.save(folder)
    except Exception as error:
        return error
    return None


def store_of(version: int) -> Datastore:
    """About 20 pages in three files."""
    return make_store(version, count=1000)


@pytest.mark.parametrize(
    ("fill", "rests"),
    [
        pytest.param(Ballast.leave_pages, range(32), id="bytes"),
        pytest.param(Ballast.leave_names, range(10), id="names"),
    ],
)  # fmt: skip
def test_a_full_disk_of_any_size_leaves_the_old_version(
    disk: Path, fill: Callable[[Ballast, int], None], rests: range
) -> None:
    def use() -> None:
        mount_small_disk(disk, f"size={80 * PAGE},nr_inodes=40")
        results = fill_and_save(disk, rests, fill)
        assert results == {"refused", "saved"}, results

    assert outcome(use) == ""


def test_a_disk_that_became_read_only_keeps_its_version(disk: Path) -> None:
    folder = disk / "store"

    def use() -> None:
        mount_small_disk(disk, "size=1m")
        make_store().save(folder)
        before = content(folder)
        mount_small_disk(disk, "", _MS_REMOUNT | _MS_RDONLY)
        with pytest.raises(OSError, match=rf"datastore to {folder}: .*Read-only.*is intact"):
            make_store(1).save(folder)
        assert content(folder) == before
        assert version_of(Datastore.load(folder)) == 0
        mount_small_disk(disk, "", _MS_REMOUNT)
        make_store(1).save(folder)
        assert version_of(Datastore.load(folder)) == 1
        assert names_in(disk) == {"store"}

    assert outcome(use) == ""
