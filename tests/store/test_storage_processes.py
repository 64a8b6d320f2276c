"""The stored datastore: kills, readers beside writers, full disks and read-only folders."""

import contextlib
import os
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forks import Fork, in_child, outcome
from support.stored import (
    FAISS,
    MANIFEST,
    blob_of,
    blob_of_version,
    flipped,
    make_store,
    names_in,
    version_of,
)

from hf_knn.core.manifest import DatastoreError, FileRecord
from hf_knn.store import disk as persistence
from hf_knn.store.datastore import Datastore
from hf_knn.store.folders import exclusive_lock


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


@pytest.mark.parametrize(
    ("place", "error"),
    [
        (("hf_knn.store.disk", "read_blob"), FileNotFoundError),
        (("hf_knn.store.row_files", "load_file"), FileNotFoundError),  # as safetensors says it
        (("hf_knn.store.row_files", "load_file"), RuntimeError),  # and torch
    ],
)
def test_a_blob_that_vanishes_while_it_is_opened_is_read_anew(
    saved: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: tuple[str, str],
    error: type[Exception],
) -> None:
    module, name = import_module(place[0]), place[1]
    read, calls = getattr(module, name), []

    def vanishing(*found: Any) -> Any:
        calls.append(found)
        if len(calls) == 1:
            assert not outcome(lambda: make_store(1).save(saved))
            raise error("unable to open file")
        return read(*found)

    if name == "load_file":
        monkeypatch.setattr(persistence, "LARGEST_VERIFIED_AT_ONCE", 0)
    monkeypatch.setattr(module, name, vanishing)
    assert version_of(Datastore.load(saved)) == 1
    assert len(calls) == 2


def test_a_damaged_version_is_read_once(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = blob_of(saved).read_bytes()
    blob_of(saved).write_bytes(flipped(data, len(data) - 1, 3))
    compare, calls = FileRecord.compare, []

    def count(record: FileRecord, *request: Any) -> None:
        calls.append(record.name)
        compare(record, *request)

    monkeypatch.setattr(FileRecord, "compare", count)
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
