"""Exact top-20: the whole `Datastore.search` path against others, and against what is possible.

For each number of rows two things are compared, in rounds that all contestants take in turn: a
batch, with the bare product of queries and rows in blocks and the best of each block (torch, in the
fastest number format that the processor multiplies), and with faiss; and one query at a time, with
the time that reading the bytes of the rows once takes in the same process.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import faiss
import numpy as np
import torch
import typer
from harness import Timing, compare, report, shared
from rich.console import Console
from rich.table import Table
from rows import DATA, DIM
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from hf_knn import Datastore

K = 20
PEER, OURS = "faiss IndexFlatIP", "Datastore, flat"
BARE = "bare product with topk"
READING = "reading the rows once"

BLOCKS = ((1000, 65_536), (256, 16_384))
"""Queries and rows of a block of the bare product; the better one counts."""

_SLOW_SHARE = 0.1
"""scikit-learn and the loop of small batches get a tenth of the queries."""

_OF_BARE, _OF_READING, _MORE_SECONDS = 0.85, 1.3, 0.0003
"""What is promised: a rate, and a time."""

_ROW_BLOCK = 65_536


def main(
    rows: Annotated[list[int] | None, typer.Option(help="Rows of the datastores.")] = None,
    data: Annotated[str, typer.Option(help=f"What is searched: {', '.join(DATA)}.")] = "clusters",
    queries: Annotated[int, typer.Option(help="Queries per round.")] = 1000,
    alone: Annotated[int, typer.Option(help="Queries per round that are searched alone.")] = 50,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 9,
    output: Annotated[Path, typer.Option(help="JSON file.")] = Path("outputs/speed/search.json"),
) -> None:
    """Time exact search and check how many neighbours are those of float64 brute force."""
    sizes, promised = sorted(rows or [20_000, 100_000, 500_000]), []
    for count in sizes:
        # what a datastore stores, so that every contestant searches the same values
        stored = DATA[data](count, 1).astype(np.float16)
        asked = DATA[data](queries, 2)
        found = Run(stored, asked, alone, rounds, with_slow=count == sizes[-1])
        promised += found.promised()
    title = f"exact top-{K} of {sizes[-1]:,} x {DIM} ({data}), {queries:,} queries"
    facts = {"bfloat16 in hardware": has_bfloat16(), "first_pass": found.first_pass}
    report(title, found.batch, PEER, output, **facts, recall=found.recall, promised=promised)
    table = Table("rows", "call", "promise", "wanted", "median", "from", "to", "kept")
    for fact in promised:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in fact.values()))
    Console().print(table)
    print(f"bfloat16 in hardware: {has_bfloat16()}; first pass: {found.first_pass}")
    for name, share in found.recall.items():
        print(f"{name}: recall@{K} {share:.5f} of float64 brute force")


class Run:
    """What was measured at one number of rows.

    Args:
        stored: [N, 384] float16.
        asked: [B, 384] float32.
        alone: how many of them are searched one by one.
        rounds: how often.
        with_slow: time those that nobody would wait for, too.

    Attributes:
        first_pass: of the datastore.
        recall: by contestant, of float64 brute force.
        batch: timings of all queries at once.
        single: timings of one query.
    """

    def __init__(
        self, stored: np.ndarray, asked: np.ndarray, alone: int, rounds: int, with_slow: bool
    ) -> None:
        self.rows = len(stored)
        single, tensor = stored.astype(np.float32), torch.from_numpy(asked)
        store = Datastore.from_features(
            stored, np.zeros(self.rows, np.int64), normalization="l2", index="flat"
        )
        self.first_pass = str(store.build_index().first_pass)
        flat = faiss.IndexFlatIP(DIM)
        flat.add(single)
        unit = torch.nn.functional.normalize(torch.from_numpy(single))
        answers: dict[str, Callable[[], Any]] = {
            PEER: lambda: flat.search(asked, K)[1],
            OURS: lambda: store.search(tensor, K).ids.numpy(),
        }
        for dtype in (torch.float32, *([torch.bfloat16] if has_bfloat16() else [])):
            for block in BLOCKS:
                name = f"{BARE}, {str(dtype).removeprefix('torch.')}, {block[0]} x {block[1]}"
                answers[name] = partial(bare, unit.to(dtype), tensor.to(dtype), *block)
        oracle = brute_force(single, asked)
        self.recall = {name: shared(answer(), oracle, K) for name, answer in answers.items()}
        contestants, shares = dict(answers), {}
        if with_slow:
            few = asked[: max(1, round(_SLOW_SHARE * len(asked)))]
            slow = slow_ones(single, few)
            contestants |= slow
            shares = dict.fromkeys(slow, len(few) / len(asked))
        self.batch = compare(contestants, PEER, rounds, shares)
        words = torch.from_numpy(stored).view(torch.int64)
        one_by_one = tensor[:alone].split(1)
        timings = compare(
            {
                READING: lambda: [words.sum() for _ in one_by_one],
                PEER: lambda: [flat.search(query.numpy(), K) for query in one_by_one],
                OURS: lambda: [store.search(query, K) for query in one_by_one],
            },
            READING,
            rounds,
        )
        self.single = [replace(t, seconds=[s / alone for s in t.seconds]) for t in timings]

    def promised(self) -> list[dict[str, Any]]:
        """What the measured times are to be, and are."""
        batch = {timing.name: timing for timing in self.batch}
        best = min((t for name, t in batch.items() if name.startswith(BARE)), key=_median)
        single = {timing.name: timing for timing in self.single}
        allowed = [_OF_READING * s + _MORE_SECONDS for s in single[READING].seconds]
        over_faiss = 1.2 if has_bfloat16() else 1.0
        return [
            self._promise("batch", f"of the rate of the {best.name}", _OF_BARE,
                          _ratios(best.seconds, batch[OURS].seconds)),
            self._promise("batch", f"times as fast as {PEER}", over_faiss,
                          _ratios(batch[PEER].seconds, batch[OURS].seconds)),
            self._promise("one query", "times as fast as 1.3 x reading the rows + 0.3 ms", 1.0,
                          _ratios(allowed, single[OURS].seconds)),
            self._promise("one query", f"times as fast as {PEER}", over_faiss,
                          _ratios(single[PEER].seconds, single[OURS].seconds)),
        ]  # fmt: skip

    def _promise(self, call: str, what: str, wanted: float, found: list[float]) -> dict[str, Any]:
        middle = median(found)
        return {
            "rows": self.rows, "call": call, "promise": what, "wanted": wanted, "median": middle,
            "low": min(found), "high": max(found), "kept": middle >= wanted,
        }  # fmt: skip


def bare(stored: Tensor, asked: Tensor, queries: int, rows: int) -> np.ndarray:
    """[B, 20] positions: the product in blocks and the best of each, and nothing else."""
    answer = []
    for part in asked.split(queries):
        scores, places = [], []
        for start in range(0, len(stored), rows):
            best = (part @ stored[start : start + rows].T).topk(K, dim=1)
            scores.append(best.values)
            places.append(best.indices + start)
        order = torch.cat(scores, 1).topk(K, dim=1).indices
        answer.append(torch.cat(places, 1).gather(1, order))
    return torch.cat(answer).numpy()


def slow_ones(stored: np.ndarray, few: np.ndarray) -> dict[str, Callable[[], object]]:
    """Those that get a part of the queries."""
    block, asked = torch.from_numpy(stored), torch.from_numpy(few)
    found: dict[str, Callable[[], object]] = {
        "torch loop, batch 10": lambda: small_batches(block, asked)
    }
    for metric in ("cosine", "euclidean"):
        nearest = NearestNeighbors(n_neighbors=K, algorithm="brute", metric=metric, n_jobs=-1)
        found[f"scikit-learn brute, {metric}"] = partial(nearest.fit(stored).kneighbors, few)
    return found


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


def small_batches(stored: Tensor, asked: Tensor) -> None:
    """The evaluation loop that many papers use."""
    for batch in asked.split(10):
        (batch @ stored.T).topk(K, dim=1)


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware (Linux)."""
    listing = Path("/proc/cpuinfo")
    flags = listing.read_text().split() if listing.exists() else []
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _median(timing: Timing) -> float:
    return median(timing.seconds)


def _ratios(theirs: list[float], ours: list[float]) -> list[float]:
    return [their / our for their, our in zip(theirs, ours, strict=True)]


if __name__ == "__main__":
    typer.run(main)
