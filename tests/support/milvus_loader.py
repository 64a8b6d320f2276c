"""Loads known rows into Milvus, in a process that tests/milvus/test_milvus_scale.py kills."""

import sys
from typing import Any

import torch

from hf_knn import Datastore, MilvusDatastore
from hf_knn.milvus.collection import MilvusCollection
from hf_knn.milvus.server import DatastoreConnectionError

COLLECTION, AWAY = "rows", 3


def known_store(count: int, dim: int) -> Datastore:
    """Rows that are the same in each process; some of them equal."""
    generator = torch.Generator().manual_seed(count)
    features = torch.randn(count, dim, generator=generator)
    features[count // 2 : count // 2 + 50] = features[0]
    labels = torch.randint(0, 10, (count,), generator=generator)
    ids = torch.randperm(3 * count, generator=generator)[:count]
    paths = [f"train/{row}.png" for row in range(count)]
    return Datastore.from_features(features, labels, ids, paths=paths, index="flat")


def say_each_write() -> None:
    """Prints a line before and after each write of rows."""
    upsert = MilvusCollection.upsert

    def loud(self: MilvusCollection, rows: list[dict[str, Any]]) -> None:
        print("writes", flush=True)
        upsert(self, rows)
        print("wrote", flush=True)

    MilvusCollection.upsert = loud  # type: ignore[method-assign]


def main(uri: str, count: int, dim: int, batch_size: int, patience: float) -> None:
    torch.set_num_threads(1)
    store = known_store(count, dim)
    say_each_write()
    print("starts", flush=True)
    try:
        MilvusDatastore.from_datastore(
            store, uri, COLLECTION, batch_size=batch_size, patience=patience, timeout=20,
            progress=False,
        )  # fmt: skip
    except DatastoreConnectionError as error:
        print(error, flush=True)
        sys.exit(AWAY)
    print("done", flush=True)


if __name__ == "__main__":
    place, *numbers = sys.argv[1:]
    rows, width, batch = map(int, numbers[:3])
    main(place, rows, width, batch, float(numbers[3]))
