"""Crowds of writers, and files that are damaged in every way."""

import contextlib
import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support.forks import Errand
from support.oracles import assert_same_store
from support.stored import (
    DIM,
    FAISS,
    MANIFEST,
    QUERIES,
    assert_same_answers,
    blob_of,
    content,
    flipped,
    make_store,
    names_in,
    two_shards,
    varied_store,
    version_of,
)

from hf_knn.core.manifest import DatastoreError
from hf_knn.store import disk as datastore_files
from hf_knn.store.datastore import Datastore

# crowds


def save_in_a_crowd(folder: Path, writers: int, saves: int) -> tuple[set[int], int]:
    """Each process saves two versions in turn; returns what a reader saw and how often it read."""
    stores = [make_store(version) for version in range(2 * writers)]
    stores[0].save(folder)

    def save(writer: int) -> None:
        for number in range(saves):
            stores[2 * writer + number % 2].save(folder)

    errands = [Errand.start(partial(save, number)) for number in range(writers)]
    versions, reads = set(), 0
    while not all(errand.has_ended() for errand in errands):
        found = Datastore.load(folder)
        version = int(found.labels[0])
        assert_same_store(found, stores[version])
        versions.add(version)
        reads += 1
    assert [errand.outcome() for errand in errands] == [""] * writers
    assert version_of(Datastore.load(folder)) % 2 == (saves - 1) % 2  # somebody's last
    assert names_in(folder) == {MANIFEST, FAISS, blob_of(folder).name}
    assert names_in(folder.parent) == {folder.name}
    return versions, reads


@pytest.mark.parametrize(
    ("writers", "saves"), [(3, 10), pytest.param(8, 50, marks=pytest.mark.faults)]
)
def test_a_crowd_of_writers_and_a_reader(tmp_path: Path, writers: int, saves: int) -> None:
    versions, reads = save_in_a_crowd(tmp_path / "crowd" / "store", writers, saves)
    assert len(versions) >= writers
    assert reads > writers


@pytest.mark.parametrize("index", ["auto", "HNSW8"])
def test_a_trusted_index_is_that_of_the_version_that_was_opened(folder: Path, index: str) -> None:
    generator = torch.Generator().manual_seed(0)
    old, new = (
        Datastore.from_features(torch.randn(500, DIM, generator=generator), [0] * 500, index=index)
        for _ in range(2)
    )
    old.save(folder)
    opened = Datastore.load(folder, trust_faiss_index=True)
    new.save(folder)
    with contextlib.suppress(DatastoreError):  # that it is gone may be said
        assert_same_answers(opened, old)


# damage


def bit_flipped(data: bytes, generator: random.Random) -> bytes:
    return flipped(data, generator.randrange(len(data)), generator.randrange(8))


def byte_changed(data: bytes, generator: random.Random) -> bytes:
    place = generator.randrange(len(data))
    return data[:place] + bytes([generator.randrange(256)]) + data[place + 1 :]


def truncated(data: bytes, generator: random.Random) -> bytes:
    return data[: generator.randrange(len(data))]


def longer(data: bytes, generator: random.Random) -> bytes:
    return data + generator.choice([b"\0", b" ", b"}", data]) * generator.randint(1, 3)


def zeroed(data: bytes, generator: random.Random) -> bytes:
    start, end = sorted(generator.choices(range(len(data) + 1), k=2))
    return data[:start] + bytes(end - start) + data[end:]


def exchanged(data: bytes, generator: random.Random) -> bytes:
    a, b, c, d = sorted(generator.choices(range(len(data) + 1), k=4))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def gone(data: bytes, generator: random.Random) -> None:
    return None


MUTATIONS: list[Callable[[bytes, random.Random], bytes | None]] = [
    bit_flipped, byte_changed, truncated, longer, zeroed, exchanged, gone,
]  # fmt: skip


def overwrite(path: Path, data: bytes) -> None:
    """Without emptying the file first, which makes some file systems wait for the disk."""
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()


class Damage(NamedTuple):
    """A folder whose files are damaged one at a time, and what it holds."""

    folder: Path
    store: Datastore
    trusts_faiss: bool

    def campaign(self, mutations: int) -> Counter[str]:
        """Returns how many were noticed, by a right error, and how many meant nothing."""
        files, seen, generator = content(self.folder), Counter[str](), random.Random(mutations)
        names = sorted(files)
        for number in range(mutations):
            place, kind = number % len(names), number // len(names) % len(MUTATIONS)
            name, mutate = names[place], MUTATIONS[kind]
            path, data = self.folder / name, files[name]
            while (damaged := mutate(data, generator)) == data:
                pass
            path.unlink() if damaged is None else overwrite(path, damaged)
            error = self.error_of_use()
            path.write_bytes(data) if damaged is None else overwrite(path, data)
            about = f"mutation {number}, {mutate.__name__} in {name}: {error!r}"
            if error is None:  # such as another white space
                if name == FAISS:  # without it the index is built from the rows
                    assert mutate is gone or not self.trusts_faiss, about
                else:
                    assert name == MANIFEST, about
                    assert mutate is not gone, about
            else:
                no_manifest = mutate is gone and name == MANIFEST
                assert type(error) is (FileNotFoundError if no_manifest else DatastoreError), about
                assert name in str(error), about
            seen[f"{name} {'means nothing' if error is None else 'noticed'}"] += 1
        return seen

    def error_of_use(self) -> Exception | None:
        """The error of a load and a search; without one, both must be as ever."""

        try:
            found = Datastore.load(self.folder, trust_faiss_index=self.trusts_faiss)
            found.search(QUERIES, 4)
        except Exception as error:
            return error
        assert_same_answers(found, self.store)
        assert_same_store(found, self.store)
        return None


@pytest.mark.parametrize("mutations", [300, pytest.param(20_000, marks=pytest.mark.faults)])
@pytest.mark.parametrize("largest_at_once", [2**28, 0], ids=["hashed at once", "hashed later"])
@pytest.mark.parametrize(
    ("index", "trusts_faiss"),
    [
        ("auto", False),
        ("IVF4,Flat", False),
        ("HNSW8", True),
    ],
)
def test_mutated_files_are_noticed(
    folder: Path,
    index: str,
    trusts_faiss: bool,
    largest_at_once: int,
    mutations: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(datastore_files, "LARGEST_VERIFIED_AT_ONCE", largest_at_once)
    two_shards(monkeypatch)
    store = varied_store(1, index)
    names = [record.name for record in store.save(folder).blobs]
    files = names_in(folder)
    assert len(names) == 2
    seen = Damage(folder, store, trusts_faiss).campaign(mutations)
    assert_same_store(Datastore.load(folder), store)  # everything was put back
    each = mutations // len(files)
    assert all(seen[f"{name} noticed"] >= each for name in names)
    assert seen[f"{MANIFEST} noticed"] > each * 0.8
    assert seen[f"{MANIFEST} means nothing"] > 0
    if FAISS in files:
        # gone is not damaged: one mutation in a few
        assert seen[f"{FAISS} {'noticed' if trusts_faiss else 'means nothing'}"] > each * 0.8
