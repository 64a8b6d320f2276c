"""`Datastore(index="auto")` at the size of ImageNet: build, memory, file, open, recall, speed."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import faiss
import numpy as np
import torch
import typer
from harness import compare, memory, report, shared
from rows import DATA, DIM, IMAGENET_ROWS

from hf_knn import Datastore

K = 20
PEER = "faiss IndexFlatIP"
app = typer.Typer(add_completion=False)


@app.command()
def main(
    rows: Annotated[int, typer.Option(help="Rows of the datastore.")] = IMAGENET_ROWS,
    queries: Annotated[int, typer.Option(help="Queries per round.")] = 500,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 9,
    data: Annotated[list[str] | None, typer.Option(help="clusters, jittered.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for JSON.")] = Path("outputs/speed"),
) -> None:
    """Build, save, open and search, each in a process of its own so that memory is its own."""
    for name in data or list(DATA):
        with tempfile.TemporaryDirectory() as folder:
            facts = _in_process("build", folder, name, str(rows))
            facts |= _in_process("open", folder)
            print(json.dumps(facts, indent=2))
            _search(Path(folder), name, rows, queries, rounds, output, facts)


@app.command()
def build(folder: Path, name: str, rows: int) -> None:
    """Build and save a datastore; print what it took as JSON."""
    made = DATA[name](rows, 1)
    before = memory("VmHWM")
    started = time.perf_counter()
    store = Datastore.from_features(
        made, np.zeros(rows, np.int64), normalization="l2", index="auto"
    )
    store.build_index()
    built = time.perf_counter()
    store.save(folder)
    saved = time.perf_counter()
    sizes = [path.stat().st_size for path in folder.iterdir()]
    facts = {
        "index": str(store.index),
        "build_seconds": built - started,
        "save_seconds": saved - built,
        "peak_bytes_with_input": memory("VmHWM"),
        "peak_bytes_before_the_build": before,
        "file_bytes": sum(sizes),
    }
    print(json.dumps(facts))


@app.command(name="open")
def open_(folder: Path) -> None:
    """Open a datastore three times; print the last time and the memory as JSON."""
    before = memory("VmRSS")
    for _ in range(3):  # warm: the file is in the page cache
        started = time.perf_counter()
        store = Datastore.load(folder)
        seconds = time.perf_counter() - started
    opened = memory("VmRSS")
    started = time.perf_counter()
    store.search(torch.ones(1, store.dim), K)
    facts = {
        "open_seconds": seconds,
        "open_bytes_over_import": opened - before,
        "first_search_seconds": time.perf_counter() - started,
        "bytes_after_first_search_over_import": memory("VmRSS") - before,
    }
    print(json.dumps(facts))


def _search(
    folder: Path, name: str, rows: int, queries: int, rounds: int, output: Path, facts: dict
) -> None:
    """Recall and speed beside exact faiss on the same stored values."""
    store = Datastore.load(folder)
    tensor = torch.from_numpy(DATA[name](queries, 2))
    flat = faiss.IndexFlatIP(DIM)
    unit = store.build_index().space.normalize  # what the datastore compares
    for start in range(0, rows, 65_536):
        flat.add(unit(store.features[start : start + 65_536].numpy()).astype(np.float32))
    asked = unit(tensor.numpy()).astype(np.float32)
    _, wanted = flat.search(asked, K)
    recall = shared(store.search(tensor, K).ids.numpy(), wanted, K)
    contestants = {
        PEER: lambda: flat.search(asked, K),
        "Datastore, auto": lambda: store.search(tensor, K),
    }
    timings = compare(contestants, peer=PEER, rounds=rounds)
    title = f"top-{K} of {rows:,} x {DIM}, {name}, {queries:,} queries"
    path = output / f"scale-{name}.json"
    report(title, timings, PEER, path, recall=recall, **facts)
    print(f"recall@{K} {recall:.4f} beside the exact index, {facts['index']}")


def _in_process(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *arguments]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    facts: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return facts


if __name__ == "__main__":
    # without a command it is the whole measurement
    if sys.argv[1:2] not in (["build"], ["open"], ["main"]):
        sys.argv.insert(1, "main")
    app()
