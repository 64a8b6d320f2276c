"""How build time, query time and memory grow with the rows, as a plot."""

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import torch
import typer
from harness import memory, write
from rows import clustered

from hf_knn import Datastore

K, QUERIES, ROUNDS = 20, 200, 5
MEASURES = {
    "query_milliseconds": "milliseconds per query",
    "build_seconds": "build seconds",
    "bytes": "gigabytes over the rows' own",
}
app = typer.Typer(add_completion=False)


@app.command()
def main(
    sizes: Annotated[list[int] | None, typer.Option("--rows", help="Rows to measure at.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for plot and JSON.")] = Path("outputs/speed"),
) -> None:
    """Measure each size and index in a process of its own and draw them."""
    measured = []
    for rows in sizes or [10**4, 10**5, 10**6]:
        for index in ("flat", "auto"):
            command = [sys.executable, __file__, "one", str(rows), index]
            found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            measured.append(json.loads(found.stdout.splitlines()[-1]))
            print(measured[-1])
    write(output / "growth.json", {"title": "Time and memory by rows of 384", "measured": measured})
    figure, axes = plt.subplots(1, len(MEASURES), figsize=(12, 3.6), layout="constrained")
    for axis, (name, title) in zip(axes, MEASURES.items(), strict=True):
        for index in ("flat", "auto"):
            points = [point for point in measured if point["requested"] == index]
            scale = 1e-9 if name == "bytes" else 1.0
            values = [max(1e-3, point[name] * scale) for point in points]
            axis.plot([point["rows"] for point in points], values, "o-", label=index)
        axis.set(xscale="log", yscale="log", xlabel="rows of 384", title=title)
        axis.legend()
    figure.savefig(output / "growth.png", dpi=120)
    print(f"wrote {output / 'growth.png'}")


@app.command()
def one(rows: int, index: str) -> None:
    """Measure one size; print it as JSON."""
    features, asked = clustered(rows, 1), torch.from_numpy(clustered(QUERIES, 2))
    store = Datastore.from_features(
        features, np.zeros(rows, np.int64), normalization="l2", index=index
    )
    del features
    before = memory("VmRSS")
    started = time.perf_counter()
    store.build_index()
    built = time.perf_counter() - started
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        store.search(asked, K)
        seconds.append(time.perf_counter() - started)
    facts = {
        "rows": rows,
        "requested": index,
        "index": str(store.index),
        "build_seconds": built,
        "query_milliseconds": 1000 * median(seconds) / QUERIES,
        "bytes": memory("VmRSS") - before,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    if sys.argv[1:2] not in (["one"], ["main"]):
        sys.argv.insert(1, "main")
    app()
