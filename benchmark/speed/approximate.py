"""Approximate top-20 at equal recall: `Datastore(index="auto")` against hnswlib and usearch."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import faiss
import hnswlib
import numpy as np
import torch
import typer
from harness import Timing, compare, report, shared
from rows import DATA, DIM, Rows
from usearch.index import Index as UsearchIndex

from hf_knn import Datastore

K, BATCH, SIZES = 20, 200, (50_000, 250_000)
PEER, FLOAT32, GRAPH = "Datastore, auto", "Datastore, float32 lists", "Datastore, auto:latency"
LINKS, BUILD_WIDTH = 16, 100
"""Of both graphs; their widths of search are widened until they reach the recall."""

Search = Callable[[Rows], np.ndarray]
"""The ids of the neighbours of a batch of queries."""


@dataclass(frozen=True)
class Built:
    """An index that is ready: how it searches, how long it took, and how it was set."""

    search: Search
    seconds: float
    setting: str


def main(
    rows: Annotated[list[int] | None, typer.Option(help="Rows; 50,000 and 250,000.")] = None,
    data: Annotated[list[str] | None, typer.Option(help=f"Of {sorted(DATA)}.")] = None,
    queries: Annotated[int, typer.Option(help="In batches of 200; a fifth one by one.")] = 1000,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 9,
    recall: Annotated[float, typer.Option(help="Recall at 20 that all must reach.")] = 0.99,
    latency: Annotated[bool, typer.Option(help="Build the graph of faiss too.")] = False,
    output: Annotated[Path, typer.Option(help="JSON file.")] = Path("outputs/speed/approx.json"),
) -> None:
    """Time building and searching, one query at a time and in batches."""
    plans = [(name, count) for name in data or ("jittered", "spectral") for count in rows or SIZES]
    for name, count in plans:
        path = output if len(plans) == 1 else output.with_stem(f"{output.stem}-{name}-{count}")
        _measure(name, count, queries, rounds, recall, latency, path)


def _measure(
    name: str, rows: int, queries: int, rounds: int, recall: float, latency: bool, path: Path
) -> None:
    stored, asked = (_unit(DATA[name](*of)) for of in ((rows, 1), (queries, 2)))
    flat = faiss.IndexFlatIP(DIM)
    flat.add(stored)
    _, oracle = flat.search(asked, K)
    del flat
    lists = 2 ** round(np.log2(2 * rows**0.5))
    built = {PEER: _store(stored, "auto", recall)}
    built[FLOAT32] = _store(stored, f"IVF{lists},Flat", recall)
    if latency:
        built[GRAPH] = _store(stored, "auto:latency", recall)
    built["hnswlib"] = _hnswlib(stored, asked, oracle, recall)
    built["usearch"] = _usearch(stored, asked, oracle, recall)
    reached = {
        each: shared(_in_batches(index.search, asked, BATCH), oracle, K)
        for each, index in built.items()
    }
    facts: dict[str, Any] = {
        "recall": reached,
        "build_seconds": {each: index.seconds for each, index in built.items()},
        "settings": {each: index.setting for each, index in built.items()},
    }
    few, one_path = asked[: max(1, queries // 5)], path.with_stem(f"{path.stem}-one-by-one")
    for size, part, place in ((BATCH, asked, path), (1, few, one_path)):
        contestants = {
            each: lambda search=index.search, part=part, size=size: _in_batches(search, part, size)
            for each, index in built.items()
        }
        timings = compare(contestants, peer=PEER, rounds=rounds)
        calls = f"batches of {size}" if size > 1 else "one query at a time"
        title = f"top-{K} of {rows:,} x {DIM} {name} at recall {recall}, {calls}"
        report(title, timings, PEER, place, **facts)
        _say(timings, len(part), built, reached)


def _say(
    timings: list[Timing], count: int, built: dict[str, Built], reached: dict[str, float]
) -> None:
    """What each took, and how many times as fast `auto` was."""
    for timing in timings:
        index = built[timing.name]
        print(
            f"{timing.name}: {1e3 * median(timing.seconds) / count:.3f} ms a query, auto is "
            f"{1 / timing.ratio:.2f}x as fast; built in {index.seconds:.1f} s, auto in "
            f"{built[PEER].seconds / index.seconds:.2f} of it; {index.setting}, "
            f"recall@{K} {reached[timing.name]:.4f}"
        )


def _unit(rows: Rows) -> Rows:
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def _in_batches(search: Search, asked: Rows, size: int) -> np.ndarray:
    parts = [search(asked[start : start + size]) for start in range(0, len(asked), size)]
    return np.concatenate(parts)


def _store(stored: Rows, index: str, recall: float) -> Built:
    started = time.perf_counter()
    labels = np.zeros(len(stored), np.int64)
    store = Datastore.from_features(
        stored, labels, normalization="l2", index=index, min_recall=recall
    )
    store.build_index()
    seconds = time.perf_counter() - started

    def search(queries: Rows) -> np.ndarray:
        return store.search(torch.from_numpy(queries), K).ids.numpy()

    return Built(search, seconds, str(store.index))


def _hnswlib(stored: Rows, asked: Rows, oracle: np.ndarray, recall: float) -> Built:
    started, threads = time.perf_counter(), os.cpu_count() or 1
    graph = hnswlib.Index("ip", DIM)
    graph.init_index(len(stored), M=LINKS, ef_construction=BUILD_WIDTH, random_seed=0)
    graph.add_items(stored, num_threads=threads)
    seconds = time.perf_counter() - started
    graph.set_num_threads(threads)

    def search(queries: Rows) -> np.ndarray:
        found: np.ndarray = graph.knn_query(queries, K)[0]
        return found

    return Built(search, seconds, _widen(graph.set_ef, search, asked, oracle, recall))


def _usearch(stored: Rows, asked: Rows, oracle: np.ndarray, recall: float) -> Built:
    started = time.perf_counter()
    graph: Any = UsearchIndex(
        ndim=DIM, metric="ip", dtype="f32", connectivity=LINKS, expansion_add=BUILD_WIDTH
    )
    graph.add(np.arange(len(stored)), stored)
    seconds = time.perf_counter() - started

    def set_width(width: int) -> None:
        graph.expansion_search = width

    def search(queries: Rows) -> np.ndarray:
        found: np.ndarray = graph.search(queries, K).keys.astype(np.int64)
        return found.reshape(len(queries), K)

    return Built(search, seconds, _widen(set_width, search, asked, oracle, recall))


def _widen(
    set_width: Callable[[int], None],
    search: Search,
    asked: Rows,
    oracle: np.ndarray,
    recall: float,
) -> str:
    """Widens a search by a quarter each time until it reaches the recall, and hardly more."""
    width = 20
    set_width(width)
    while shared(search(asked), oracle, K) < recall and width < 4096:
        width = width * 5 // 4
        set_width(width)
    return f"M {LINKS}, ef {width}"


if __name__ == "__main__":
    typer.run(main)
