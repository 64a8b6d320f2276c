"""Exact top-20 of 500,000 x 384: the whole `Datastore.search` path against bare faiss."""

from pathlib import Path
from typing import Annotated

import faiss
import numpy as np
import torch
import typer
from harness import compare, report

from hf_knn import Datastore

DIM, CLUSTERS, SIGMA, K = 384, 1000, 1.2, 20


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
    """Time exact search and check that both find the same neighbours."""
    stored, asked = clustered(rows, 1), clustered(queries, 2)
    store = Datastore.from_features(stored, np.zeros(rows, np.int64), normalization="l2")
    flat = faiss.IndexFlatIP(DIM)
    flat.add(stored)
    tensor = torch.from_numpy(asked)
    found = store.search(tensor, K).ids.numpy()
    _, expected = flat.search(asked, K)
    overlap = [len(set(a) & set(b)) / K for a, b in zip(found, expected, strict=True)]
    timings = compare(
        {
            "faiss IndexFlatIP": lambda: flat.search(asked, K),
            "Datastore.search": lambda: store.search(tensor, K),
        },
        peer="faiss IndexFlatIP",
        rounds=rounds,
    )
    title = f"exact top-{K} of {rows:,} x {DIM}, {queries:,} queries"
    agreement = float(np.mean(overlap))
    report(title, timings, "faiss IndexFlatIP", output, same_neighbors=agreement)


if __name__ == "__main__":
    typer.run(main)
