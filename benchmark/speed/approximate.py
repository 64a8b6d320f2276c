"""Approximate top-20 at equal recall: `Datastore(index="auto")` against hnswlib and usearch."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import faiss
import hnswlib
import numpy as np
import torch
import typer
from harness import compare, report, shared
from rows import DIM, clustered
from usearch.index import Index as UsearchIndex

from hf_knn import Datastore

K = 20
PEER = "Datastore, auto"
LINKS, BUILD_WIDTH = 16, 100
"""Of both graphs; their widths of search are doubled until they reach the recall."""

Search = Callable[[], np.ndarray]


def main(
    rows: Annotated[int, typer.Option(help="Rows of the datastore.")] = 250_000,
    queries: Annotated[int, typer.Option(help="Queries per round.")] = 1000,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 9,
    recall: Annotated[float, typer.Option(help="Recall at 20 that all must reach.")] = 0.99,
    output: Annotated[Path, typer.Option(help="JSON file.")] = Path("outputs/speed/approx.json"),
) -> None:
    """Time building and searching."""
    stored, asked = clustered(rows, 1), clustered(queries, 2)
    flat = faiss.IndexFlatIP(DIM)
    flat.add(stored)
    _, oracle = flat.search(asked, K)
    del flat
    built: dict[str, float] = {}
    reached: dict[str, float] = {}
    settings: dict[str, str] = {}

    started = time.perf_counter()
    store = Datastore.from_features(
        stored, np.zeros(rows, np.int64), normalization="l2", index="auto", min_recall=recall
    )
    store.build_index()
    built[PEER] = time.perf_counter() - started
    tensor = torch.from_numpy(asked)
    contestants: dict[str, Search] = {PEER: lambda: store.search(tensor, K).ids.numpy()}
    settings[PEER] = str(store.index)

    started = time.perf_counter()
    graph = hnswlib.Index("ip", DIM)
    graph.init_index(rows, M=LINKS, ef_construction=BUILD_WIDTH, random_seed=0)
    graph.add_items(stored, num_threads=os.cpu_count() or 1)
    built["hnswlib"] = time.perf_counter() - started
    graph.set_num_threads(os.cpu_count() or 1)
    contestants["hnswlib"] = lambda: graph.knn_query(asked, K)[0]
    settings["hnswlib"] = _widen(graph.set_ef, contestants["hnswlib"], oracle, recall)

    started = time.perf_counter()
    other: Any = UsearchIndex(
        ndim=DIM, metric="ip", dtype="f32", connectivity=LINKS, expansion_add=BUILD_WIDTH
    )
    other.add(np.arange(rows), stored)
    built["usearch"] = time.perf_counter() - started
    contestants["usearch"] = lambda: other.search(asked, K).keys.astype(np.int64)

    def set_width(width: int) -> None:
        other.expansion_search = width

    settings["usearch"] = _widen(set_width, contestants["usearch"], oracle, recall)
    for name, search in contestants.items():
        reached[name] = shared(search(), oracle, K)
    timings = compare(contestants, peer=PEER, rounds=rounds)
    title = f"top-{K} of {rows:,} x {DIM} at recall {recall}, {queries:,} queries"
    report(
        title, timings, PEER, output, recall=reached, build_seconds=built, settings=settings
    )  # fmt: skip
    for name in contestants:
        facts = f"{settings[name]}, recall@{K} {reached[name]:.4f}"
        print(f"{name}: built in {built[name]:.1f} s, {facts}")


def _widen(
    set_width: Callable[[int], None], search: Search, oracle: np.ndarray, recall: float
) -> str:
    """Doubles the width of a search until it reaches the recall."""
    width = 32
    set_width(width)
    while shared(search(), oracle, K) < recall and width < 4096:
        width *= 2
        set_width(width)
    return f"M {LINKS}, ef {width}"


if __name__ == "__main__":
    typer.run(main)
