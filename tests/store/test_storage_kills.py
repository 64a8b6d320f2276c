"""Saves that are killed at random moments and at each step: the old version, or the new one."""

import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
from support.forks import Fork, die, find_no_space, outcome, stop_before
from support.oracles import assert_same_store
from support.stored import (
    FAISS,
    MANIFEST,
    ROWS,
    assert_same_answers,
    make_store,
    names_in,
    two_shards,
    varied_store,
    version_of,
)

from hf_knn.store import disk as persistence
from hf_knn.store.datastore import Datastore

VERSIONS = 8


class Kind(NamedTuple):
    """A way to save: what each version holds, and the save of a version into a folder."""

    stores: list[Datastore]
    save: Callable[[int, Path], object]

    def version_of(self, found: Datastore) -> int:
        """The version of a store that is whole; fails for a mix of two."""
        version = int(found.labels[-1])
        assert_same_store(found, self.stores[version])
        assert_same_answers(found, self.stores[version])
        return version


def whole(index: str) -> Kind:
    """Every byte of every version is another."""
    stores = [varied_store(version, index) for version in range(VERSIONS)]
    return Kind(stores, lambda version, folder: stores[version].save(folder))


def changed_after_load() -> Kind:
    """The second file of each version is its own, the first is that of all."""
    base = varied_store(0)
    last = base.ids[ROWS // 2 :]

    def relabeled(store: Datastore, version: int) -> Datastore:
        store.relabel(last, [version] * len(last))
        return store

    def save(version: int, folder: Path) -> None:
        store = Datastore.load(folder) if (folder / MANIFEST).exists() else base
        relabeled(store, version).save(folder)

    stores = [relabeled(varied_store(0), version) for version in range(VERSIONS)]
    return Kind(stores, save)


KINDS: dict[str, Callable[[], Kind]] = {
    "flat": lambda: whole("auto"),
    "inverted file": lambda: whole("IVF4,Flat"),
    "changed after load": changed_after_load,
}


class Extent(NamedTuple):
    """How much lies in a folder and all below it."""

    files: int
    size: int

    @classmethod
    def of(cls, folder: Path) -> "Extent":
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
        return cls(len(sizes), sum(sizes))


@dataclass
class Campaign:
    """Saves of one version after the other, killed at random moments.

    Attributes:
        place: a folder of its own, in which the datastore's folder lies.
        kind: how it is saved.
        generator: of the moments.
        version: what a load must find now.
        seconds: what a save took last, in a child.
    """

    place: Path
    kind: Kind
    generator: random.Random
    version: int = 0
    seconds: float = 0.0

    @property
    def folder(self) -> Path:
        return self.place / "store"

    def run(self, kills: int) -> Counter[str]:
        """Kills at least so often, and until both outcomes were seen."""
        self.kind.save(0, self.folder)
        one = Extent.of(self.place)
        found: Counter[str] = Counter()
        while sum(found.values()) < kills or len(found) < 2:
            assert sum(found.values()) < 300 + kills, found
            found[self.kill()] += 1
            # what is whole, what was being written, and what an earlier kill left
            most = 3
            litter = Extent.of(self.place)
            assert litter.files <= most * one.files + 2, names_in(self.folder)  # a lock, a probe
            assert litter.size <= most * (one.size + 100), names_in(self.folder)
        self.kind.save(self.version, self.folder)
        assert self.kind.version_of(Datastore.load(self.folder)) == self.version
        assert Extent.of(self.place).files == one.files
        assert names_in(self.place) == {"store"}
        return found

    def kill(self) -> str:
        """Kills one process; tells whether its last save is found, or the one before that."""
        first = self.version + 1
        child = Fork.repeating(
            lambda number: self.kind.save((first + number) % VERSIONS, self.folder)
        )
        saves, start = self.generator.randrange(3) if self.seconds else 2, time.monotonic()
        child.wait_for(saves)
        if saves:  # measured each time: it depends on who else uses the machine
            self.seconds = (time.monotonic() - start) / saves
        time.sleep(self.generator.uniform(0, self.seconds))  # evenly over the whole of a save
        returned = child.kill()
        old, new = ((self.version + returned + step) % VERSIONS for step in range(2))
        self.version = self.kind.version_of(Datastore.load(self.folder))
        assert self.version in (old, new), f"version {old} was acknowledged, then came {new}"
        return "old" if self.version == old else "new"


def kill_saves(place: Path, kind: str, kills: int, patch: pytest.MonkeyPatch) -> Counter[str]:
    if kind != "flat":
        two_shards(patch)
    (place / "killed").mkdir()
    return Campaign(place / "killed", KINDS[kind](), random.Random(kills)).run(kills)


def test_a_kill_during_save_leaves_one_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kill_saves(tmp_path, "flat", 25, monkeypatch).keys() == {"old", "new"}


@pytest.mark.parametrize("kind", ["inverted file", "changed after load"])
def test_a_kill_during_a_save_of_two_files_leaves_one_version(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kill_saves(tmp_path, kind, 10, monkeypatch).keys() == {"old", "new"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "kills",
    [pytest.param(100, marks=pytest.mark.slow), pytest.param(1000, marks=pytest.mark.faults)],
)
def test_many_kills_during_save_leave_one_version(
    tmp_path: Path, kind: str, kills: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kill_saves(tmp_path, kind, kills, monkeypatch).keys() == {"old", "new"}


def die_at_step(number: int, place: Path) -> None:
    """The end of this process comes before it touches a path below a folder once more."""
    left = number

    def count(event: str, values: tuple[object, ...]) -> None:
        nonlocal left
        if values and isinstance(values[0], str | Path) and str(values[0]).startswith(str(place)):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(count)


@pytest.mark.parametrize(
    ("is_first", "stride"),
    [
        (False, 3),
        pytest.param(False, 1, marks=pytest.mark.faults),
        pytest.param(True, 1, marks=pytest.mark.faults),
    ],
)
def test_a_kill_at_any_step_leaves_the_old_version_or_the_new_one(
    tmp_path: Path, is_first: bool, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_shards(monkeypatch)
    stores = [varied_store(version, "IVF4,Flat") for version in range(2)]
    place, end = tmp_path / "place", ""
    folder = place / "store"
    found: list[int | None] = []
    while end != "InterruptedError: saved":
        if is_first and place.exists():
            shutil.rmtree(place)
        place.mkdir(exist_ok=True)
        if not is_first:  # which clears what the kill before left
            manifest = stores[0].save(folder)
            names = {record.name for record in manifest.blobs}
            assert names_in(folder) - {FAISS} == names | {MANIFEST}
            assert names_in(place) == {"store"}

        def save() -> None:
            die_at_step(stride * len(found), place)
            stores[1].save(folder)
            raise InterruptedError("saved")  # there was no such step

        end = outcome(save)
        assert end in ("ended by -9", "InterruptedError: saved")
        found.append(found_version(folder, stores))
    commit = found.index(1)
    assert found == [None if is_first else 0] * commit + [1] * (len(found) - commit)
    assert 15 // stride < commit < len(found) - 3 // stride


def found_version(folder: Path, stores: list[Datastore]) -> int | None:
    """The version of what lies there; None for nothing; fails for a mix."""
    try:
        found = Datastore.load(folder)
    except FileNotFoundError:
        return None
    version = int(found.labels[0])
    assert_same_store(found, stores[version])
    return version


@pytest.mark.parametrize("stop", [die, find_no_space])
def test_saves_that_do_not_end_leave_no_more_and_more_files(
    saved: Path, stop: Callable[[], object]
) -> None:
    names = names_in(saved)
    counts = []
    for version in range(1, 6):

        def save(version: int = version) -> None:
            stop_before(MANIFEST, stop)
            make_store(version).save(saved)

        assert outcome(save)
        assert version_of(Datastore.load(saved)) == 0
        counts.append(len(names_in(saved) - names - {persistence.SCRATCH}))
    assert counts[-1] == counts[0], counts


def test_a_save_that_fails_leaves_no_file(saved: Path) -> None:
    names = names_in(saved)

    def save() -> None:
        stop_before(MANIFEST, find_no_space)
        make_store(1).save(saved)

    assert outcome(save).startswith("OSError: Could not save")
    assert names_in(saved) == names


def test_a_kill_before_the_commit_leaves_the_trusted_index(saved: Path) -> None:
    def save() -> None:
        stop_before(MANIFEST, die)
        make_store(1).save(saved)

    assert outcome(save) == "ended by -9"
    assert version_of(Datastore.load(saved, trust_faiss_index=True)) == 0
