"""Exact top-20 of 500,000 x 384: the whole `Datastore.search` path against others."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import faiss
import numpy as np
import torch
import typer
from harness import compare, report, shared
from rows import DIM, clustered
from sklearn.neighbors import NearestNeighbors

from hf_knn import Datastore

K = 20
PEER = "faiss IndexFlatIP"
_SLOW_SHARE = 0.1
"""scikit-learn and the loop of small batches get a tenth of the queries."""

_ROW_BLOCK = 65_536


def main(
    rows: Annotated[int, typer.Option(help="Rows of the datastore.")] = 500_000,
    queries: Annotated[int, typer.Option(help="Queries per round.")] = 1000,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 9,
    output: Annotated[Path, typer.Option(help="JSON file.")] = Path("outputs/speed/search.json"),
) -> None:
    """Time exact search and check how many neighbours are those of float64 brute force."""
    # what a datastore stores, so that every contestant searches the same values
    stored, asked = clustered(rows, 1).astype(np.float16).astype(np.float32), clustered(queries, 2)
    few = asked[: max(1, round(_SLOW_SHARE * queries))]
    oracle = brute_force(stored, asked)
    contestants: dict[str, Callable[[], object]] = {}
    answers: dict[str, Callable[[], np.ndarray]] = {}

    flat = faiss.IndexFlatIP(DIM)
    flat.add(stored)
    contestants[PEER] = lambda: flat.search(asked, K)
    answers[PEER] = lambda: flat.search(asked, K)[1]
    tensor, labels = torch.from_numpy(asked), np.zeros(rows, np.int64)
    stores = {
        name: Datastore.from_features(stored, labels, normalization="l2", index="flat")
        for name in ("Datastore, flat", "Datastore, flat, torch float32")
    }
    stores["Datastore, flat, torch float32"].to(["cpu", "cpu"])
    for name, store in stores.items():
        contestants[name] = partial(store.search, tensor, K)
        answers[name] = partial(_ids, store, tensor)

    block = torch.from_numpy(stored)
    contestants["torch loop, batch 10"] = lambda: small_batches(block, torch.from_numpy(few))
    for metric in ("cosine", "euclidean"):
        nearest = NearestNeighbors(n_neighbors=K, algorithm="brute", metric=metric, n_jobs=-1)
        contestants[f"scikit-learn brute, {metric}"] = partial(nearest.fit(stored).kneighbors, few)
    slow = [name for name in contestants if name.startswith(("torch loop", "scikit"))]
    shares = dict.fromkeys(slow, len(few) / queries)
    recall = {name: shared(answer(), oracle, K) for name, answer in answers.items()}
    timings = compare(contestants, peer=PEER, rounds=rounds, shares=shares)
    first_pass = type(stores["Datastore, flat"].build_index().first_pass).__name__
    title = f"exact top-{K} of {rows:,} x {DIM}, {queries:,} queries"
    report(title, timings, PEER, output, recall=recall, first_pass=first_pass)
    print(f"first pass of the datastore: {first_pass}")
    for name, share in recall.items():
        print(f"{name}: recall@{K} {share:.5f} of float64 brute force")


def brute_force(stored: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """[B, 20] positions by float64 cosine, ties by position."""
    queries = torch.from_numpy(asked).double()
    best = torch.empty(len(asked), 0, dtype=torch.float64)
    places = torch.empty(len(asked), 0, dtype=torch.int64)
    for start in range(0, len(stored), _ROW_BLOCK):
        part = torch.from_numpy(stored[start : start + _ROW_BLOCK]).double()
        scores = queries @ (part / part.norm(dim=1, keepdim=True)).T
        numbers = torch.arange(start, start + len(part)).expand(len(asked), -1)
        best, places = torch.cat([best, scores], 1), torch.cat([places, numbers], 1)
        best, order = best.topk(min(K, best.shape[1]), dim=1)
        places = places.gather(1, order)
    return places.numpy()


def small_batches(stored: torch.Tensor, asked: torch.Tensor) -> None:
    """The evaluation loop that many papers use."""
    for batch in asked.split(10):
        (batch @ stored.T).topk(K, dim=1)


def _ids(store: Datastore, queries: torch.Tensor) -> np.ndarray:
    return store.search(queries, K).ids.numpy()


if __name__ == "__main__":
    typer.run(main)
