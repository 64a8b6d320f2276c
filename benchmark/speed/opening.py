"""Opening a large datastore: the first process that ever searches it, and every one after that.

Each open is a process of its own. The first finds an empty cache, builds the index and keeps it;
the second finds it there. Seconds are from `Datastore.load` to the first answer, with the import of
faiss; the row file is in the page cache. Both are run in turn, round by round.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from harness import memory, report, timings_of
from rich.console import Console
from rows import DATA, DIM, IMAGENET_ROWS

from hf_knn import Datastore

K = 20
FIRST, SECOND, EXACT = "first ever", "second process", "exact, nothing kept"
LIMITS = {FIRST: 6.0, SECOND: 1.0}
"""Seconds at 1,281,167 rows."""

_SMALL = 200_000
_HASHED = 2**28
app = typer.Typer(add_completion=False)


@app.command()
def main(
    rows: Annotated[int, typer.Option(help="Rows of the datastore.")] = _SMALL,
    full: Annotated[bool, typer.Option("--full", help="1,281,167 rows.")] = False,
    rounds: Annotated[int, typer.Option(help="Rounds, each of every kind of open.")] = 5,
    data: Annotated[str, typer.Option(help="clusters or jittered.")] = "clusters",
    index: Annotated[str, typer.Option(help="Index of the datastore.")] = "auto",
    output: Annotated[Path, typer.Option(help="JSON.")] = Path("outputs/speed/opening.json"),
) -> None:
    """Build and save once; open again and again."""
    count = IMAGENET_ROWS if full else rows
    with tempfile.TemporaryDirectory() as folder:
        store, flat, cache = (Path(folder) / name for name in ("store", "flat", "cache"))
        _in_process("build", cache, str(store), str(flat), data, str(count), index)
        found: dict[str, list[dict[str, Any]]] = {FIRST: [], SECOND: [], EXACT: []}
        _in_process("first-answer", cache, str(flat))  # into the page cache
        for _ in range(rounds):
            shutil.rmtree(cache, ignore_errors=True)
            for name, place in ((FIRST, store), (SECOND, store), (EXACT, flat)):
                found[name].append(_in_process("first-answer", cache, str(place)))
        kept = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
        stored = sum(path.stat().st_size for path in store.iterdir())
    answers = {str(one["ids"]) for name in (FIRST, SECOND) for one in found[name]}
    facts = {
        "index": found[SECOND][0]["index"],
        "row_file_bytes": stored,
        "kept_bytes": kept,
        "same_answers": len(answers) == 1,
        "bytes_after_first_answer": {n: [o["bytes"] for o in runs] for n, runs in found.items()},
        "open_seconds": {n: [o["open"] for o in runs] for n, runs in found.items()},
        "sha256_gb_per_second": _hashing(),
    }
    timings = timings_of({n: [o["seconds"] for o in runs] for n, runs in found.items()}, FIRST)
    title = f"open and answer once, {count:,} x {DIM}, {data}"
    report(title, timings, FIRST, output, **facts)
    print(json.dumps(facts, indent=2))
    if count == IMAGENET_ROWS:
        for timing in timings:
            if timing.name in LIMITS:
                median = sorted(timing.seconds)[len(timing.seconds) // 2]
                word = "within" if median <= LIMITS[timing.name] else "[red]above[/]"
                Console().print(
                    f"{timing.name}: {median:.2f} s, {word} {LIMITS[timing.name]:.0f} s"
                )


@app.command()
def build(folder: Path, flat: Path, name: str, rows: int, index: str) -> None:
    """Build and save a datastore, and one of the same rows that is searched exactly."""
    made = DATA[name](rows, 1)
    for place, kind in ((folder, index), (flat, "flat")):
        store = Datastore.from_features(
            made, np.zeros(rows, np.int64), normalization="l2", index=kind
        )
        store.save(place)
    print(json.dumps({}))


@app.command()
def first_answer(folder: Path) -> None:
    """Open a datastore and search once; print the seconds as JSON."""
    query = np.random.default_rng(3).standard_normal((1, DIM), dtype=np.float32)
    started = time.perf_counter()
    store = Datastore.load(folder)
    opened = time.perf_counter()
    ids = store.search(query, K).ids
    done = time.perf_counter()
    facts = {
        "open": opened - started,
        "seconds": done - started,
        "ids": ids.tolist(),
        "index": str(store.index),
        "bytes": memory("VmRSS"),
    }
    print(json.dumps(facts))


def _hashing() -> float:
    """Gigabytes that one thread hashes in a second, for scale."""
    data = bytes(_HASHED)
    started = time.perf_counter()
    hashlib.sha256(data).hexdigest()
    return _HASHED / (time.perf_counter() - started) / 1e9


def _in_process(command: str, cache: Path, *arguments: str) -> dict[str, Any]:
    called = [sys.executable, __file__, command, *arguments]
    environment = {**os.environ, "HF_KNN_CACHE": str(cache)}
    found = subprocess.run(called, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    facts: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return facts


if __name__ == "__main__":
    # without a command it is the whole measurement
    if sys.argv[1:2] not in (["build"], ["first-answer"], ["main"]):
        sys.argv.insert(1, "main")
    app()
