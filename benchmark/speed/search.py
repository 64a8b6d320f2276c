"""Top-20 of 500,000 x 384: the whole `Datastore.search` path against bare faiss."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import faiss
import numpy as np
import torch
import typer
from harness import compare, report

from hf_knn import Datastore

DIM, CLUSTERS, SIGMA, K = 384, 1000, 1.2, 20
PEER = "faiss IndexFlatIP"


def clustered(rows: int, seed: int) -> np.ndarray:
    """Unit vectors around 1,000 centres: [rows, 384] float32."""
    centres = np.random.default_rng(0).standard_normal((CLUSTERS, DIM), dtype=np.float32)
    generator = np.random.default_rng(seed)
    points = centres[generator.integers(CLUSTERS, size=rows)]
    points += SIGMA * generator.standard_normal((rows, DIM), dtype=np.float32)
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def main(
    rows: Annotated[int, typer.Option(help="Rows of the datastore.")] = 500_000,
    queries: Annotated[int, typer.Option(help="Queries per round.")] = 1000,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 9,
    output: Annotated[Path, typer.Option(help="JSON file.")] = Path("outputs/speed/search.json"),
) -> None:
    """Time search and check how many neighbours are the same."""
    stored, asked = clustered(rows, 1), clustered(queries, 2)
    tensor, labels = torch.from_numpy(asked), np.zeros(rows, np.int64)
    flat = faiss.IndexFlatIP(DIM)
    flat.add(stored)
    _, expected = flat.search(asked, K)
    contestants: dict[str, Callable[[], object]] = {PEER: lambda: flat.search(asked, K)}
    same: dict[str, float] = {}
    for index in ("flat", "auto"):
        store = Datastore.from_features(stored, labels, normalization="l2", index=index)
        found = store.search(tensor, K).ids.numpy()
        name = f"Datastore, {index} ({store.index.spec})"
        pairs = zip(found, expected, strict=True)
        same[name] = float(np.mean([len(set(a) & set(b)) / K for a, b in pairs]))
        contestants[name] = partial(store.search, tensor, K)
    timings = compare(contestants, peer=PEER, rounds=rounds)
    title = f"top-{K} of {rows:,} x {DIM}, {queries:,} queries"
    report(title, timings, PEER, output, neighbors_shared_with_peer=same)
    for name, share in same.items():
        print(f"{name}: {share:.5f} of the neighbours are the peer's")


if __name__ == "__main__":
    typer.run(main)
