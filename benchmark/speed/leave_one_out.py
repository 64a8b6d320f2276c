"""Leave-one-out p_knn of every stored row: seconds, memory, and how far from exact."""

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from harness import memory, write
from rich.console import Console
from rich.table import Table
from rows import CLUSTERS, DIM, clustered
from torch import Tensor

from hf_knn import Datastore, Neighbors, knn_log_probs

K, TEMPERATURE = 20, 0.14


def main(
    rows: Annotated[int, typer.Option(help="Rows of the datastore.")] = 200_000,
    sample: Annotated[int, typer.Option(help="Rows compared with exact search.")] = 2000,
    indexes: Annotated[list[str] | None, typer.Option("--index", help="What to time.")] = None,
    output: Annotated[Path, typer.Option(help="JSON file.")] = Path("outputs/speed/loo.json"),
) -> None:
    """Time one pass over all rows per index."""
    features = clustered(rows, 1)
    labels = np.random.default_rng(3).integers(CLUSTERS, size=rows)
    chosen = np.sort(np.random.default_rng(4).permutation(rows)[:sample])
    exact = Datastore.from_features(features, labels, normalization="l2", index="flat")
    wanted = _own_log_probs(
        exact.search(exact.features[chosen], K, chosen), torch.from_numpy(labels[chosen])
    )
    del exact
    table = Table("index", "build s", "pass s", "rows/s", "largest difference of p", "mean", "peak")
    measured = []
    for index in indexes or ["auto", "IVF1024,Flat"]:
        started = time.perf_counter()
        store = Datastore.from_features(features, labels, normalization="l2", index=index)
        store.build_index()
        built = time.perf_counter()
        parts, first = [], 0
        for chunk in store.leave_one_out(K, progress=True):
            count = len(chunk.labels)
            own = torch.from_numpy(labels[first : first + count])
            parts.append(_own_log_probs(chunk, own))
            first += count
        seconds = time.perf_counter() - built
        found = torch.cat(parts)[torch.from_numpy(chosen)]
        gap = (found.exp() - wanted.exp()).abs()
        facts = {
            "requested": index,
            "index": str(store.index),
            "build_seconds": built - started,
            "pass_seconds": seconds,
            "largest_difference": float(gap.max()),
            "mean_difference": float(gap.mean()),
            "peak_bytes": memory("VmHWM"),
        }
        measured.append(facts)
        table.add_row(
            f"{index}: {store.index}", f"{built - started:.1f}", f"{seconds:.1f}",
            f"{rows / seconds:,.0f}", f"{gap.max():.2e}", f"{gap.mean():.2e}",
            f"{memory('VmHWM') / 1e9:.1f} GB",
        )  # fmt: skip
    table.title = f"leave-one-out p_knn of {rows:,} x {DIM} (k {K}), {sample:,} rows beside exact"
    Console().print(table)
    write(output, {"title": table.title, "measured": measured})


def _own_log_probs(neighbors: Neighbors, labels: Tensor) -> Tensor:
    votes = knn_log_probs(neighbors.similarities, neighbors.labels, CLUSTERS, TEMPERATURE)
    return votes.gather(1, labels.unsqueeze(1)).squeeze(1)


if __name__ == "__main__":
    typer.run(main)
