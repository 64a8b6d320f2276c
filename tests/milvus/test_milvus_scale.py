"""20,000 rows in Milvus Lite; servers and loaders that are killed in the middle of a load."""

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.milvus_loader import AWAY, COLLECTION, known_store
from support.milvus_servers import Server
from support.oracles import assert_nearest

from hf_knn import Datastore, MilvusDatastore
from hf_knn.core.manifest import DatastoreError

pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")
pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "support" / "milvus_loader.py"
ROWS, DIM, BATCH = 2000, 32, 20
FULL_ROWS, FULL_DIM = 20_000, 384


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    running = Server(tmp_path / "milvus")
    yield running
    running.kill()


class Loader:
    """A load in a process of its own."""

    def __init__(self, uri: str, patience: float = 0.5) -> None:
        sizes = [str(number) for number in (ROWS, DIM, BATCH, patience)]
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), uri, *sizes],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.lines: list[str] = []

    def wait_for(self, line: str, count: int) -> bool:
        """Reads until a line came so often; False if the process ended before."""
        assert self.process.stdout is not None
        while self.lines.count(line) < count:
            read = self.process.stdout.readline()
            if not read:
                return False
            self.lines.append(read.strip())
        return True

    def finish(self) -> int:
        assert self.process.stdout is not None
        self.lines += self.process.stdout.read().split("\n")
        return self.process.wait(120)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def assert_whole(inside: MilvusDatastore, store: Datastore) -> None:
    """Every row is there once, as it was, and found."""
    assert inside.collection.count() == len(inside) == len(store)
    order = store.ids.argsort()
    assert torch.equal(inside.ids, store.ids[order])  # ascending, so none is doubled
    inside.verify()
    back = inside.to_datastore()
    assert torch.equal(back.features, store.features[order])
    assert torch.equal(back.labels, store.labels[order])
    queries = store.features[:40].float()
    for own in (None, store.ids[:40]):
        found, wanted = inside.search(queries, 20, own), store.search(queries, 20, own)
        for mine, theirs in zip(found, wanted, strict=True):
            assert torch.equal(mine, theirs)


def assert_not_opened(uri: str) -> None:
    with pytest.raises(DatastoreError, match=r"load was interrupted|there is none"):
        MilvusDatastore.connect(uri, COLLECTION)


def test_a_server_killed_in_the_middle_of_a_load(server: Server) -> None:
    """Killed at eight moments, each time the load is called again; nothing is doubled or lost."""
    moments = [("starts", 1), *[("writes", count) for count in (1, 2, 3, 1, 2, 4)], ("wrote", 3)]
    generator = random.Random(0)
    for line, count in moments:
        loader = Loader(server.uri)
        assert loader.wait_for(line, count), loader.lines
        time.sleep(generator.uniform(0, 0.05))
        server.kill()
        assert loader.finish() == AWAY, loader.lines
        assert f"Milvus at {server.uri}" in " ".join(loader.lines)
        server.start()
        assert_not_opened(server.uri)
    loader = Loader(server.uri)
    assert loader.finish() == 0, loader.lines[-3:]
    assert 0 < loader.lines.count("wrote") < ROWS / BATCH  # it went on, not from the beginning
    assert_whole(MilvusDatastore.connect(server.uri, COLLECTION), known_store(ROWS, DIM))


def test_a_server_that_comes_back_in_time(server: Server) -> None:
    """The load waits for it and goes on by itself."""
    loader = Loader(server.uri, patience=60)
    for count in (3, 9):
        assert loader.wait_for("writes", count), loader.lines
        server.kill()
        server.start()
    assert loader.finish() == 0, loader.lines[-3:]
    inside = MilvusDatastore.connect(server.uri, COLLECTION)
    server.kill()
    server.start()
    assert_whole(inside, known_store(ROWS, DIM))  # over the connection of before


def test_a_loader_killed_with_its_own_server(tmp_path: Path) -> None:
    """A local file, which Milvus Lite serves in the process that loads."""
    uri, generator = str(tmp_path / "rows.db"), random.Random(1)
    for line, count in [("starts", 1), ("writes", 1), ("wrote", 2), ("writes", 3), ("wrote", 5)]:
        loader = Loader(uri)
        assert loader.wait_for(line, count), loader.lines
        time.sleep(generator.uniform(0, 0.3) if line == "starts" else 0)
        loader.kill()
    loader = Loader(uri)
    assert loader.finish() == 0, loader.lines[-3:]
    assert 0 < loader.lines.count("wrote") < ROWS / BATCH
    assert_whole(MilvusDatastore.connect(uri, COLLECTION), known_store(ROWS, DIM))


def test_twenty_thousand_rows_deletes_and_a_restart(server: Server) -> None:
    store = known_store(FULL_ROWS, FULL_DIM)
    inside = MilvusDatastore.from_datastore(store, server.uri, COLLECTION, progress=False)
    assert_whole(inside, store)
    removed, changed = store.ids[:1500].clone(), store.ids[3000:3100].clone()
    for one in (store, inside):
        one.remove(removed)
        one.relabel(changed, [9] * len(changed))
    inside.close()
    server.kill()
    server.start()
    again = MilvusDatastore.connect(server.uri, COLLECTION)
    assert_whole(again, store)
    queries = torch.randn(30, FULL_DIM, generator=torch.Generator().manual_seed(5))
    assert_nearest(again.search(queries, 20), store, queries, 20)
    assert_nearest(again.search(queries, 20, labels=[9]), store.subset(
        store.ids[store.labels == 9]), queries, 20)  # fmt: skip
