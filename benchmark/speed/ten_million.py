"""Ten million rows on a machine whose memory they do not fit into: build, search, delete, add.

Jittered real features of 384 values lie in mapped float16 files, codes of a bit for each value in
memory. One process does all, and is watched: `RssAnon` is what it needs for itself, without the
files that it has mapped.
"""

import logging
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from harness import memory, shared, write
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rows import DIM, Rows, jittered, jittered_blocks

from hf_knn import Datastore

K, BATCH, ROUNDS = 20, 1000, 5
CLASSES = 1000


class Watch:
    """What a run takes: seconds and the largest anonymous memory of each step.

    Attributes:
        steps: by name.
        bar: of the step that is at work.
    """

    def __init__(self, bar: Progress) -> None:
        self.steps: dict[str, dict[str, float]] = {}
        self.bar = bar
        self._most = 0
        self._ends = threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    @contextmanager
    def step(self, name: str, rows: int | None = None) -> Iterator["Step"]:
        """Times what is done within, under a progress bar."""
        self._most = memory("RssAnon")
        task = self.bar.add_task(name, total=rows)
        step = Step(self.bar, task)
        started, worked = time.perf_counter(), time.process_time()
        yield step
        seconds = time.perf_counter() - started - step.seconds_not_counted
        worked = time.process_time() - worked - step.work_not_counted
        self.bar.update(task, total=1, completed=1)
        peak = max(self._most, memory("RssAnon"))
        self.steps[name] = {
            "seconds": seconds, "processor_seconds": worked, "peak_anonymous_gigabytes": peak / 1e9
        }  # fmt: skip
        self.bar.console.print(
            f"{name}: {seconds:.1f} s, {worked:.1f} of a processor, at most {peak / 1e9:.2f} GB"
        )

    def end(self) -> None:
        """Stops looking."""
        self._ends.set()

    def _look(self) -> None:
        while not self._ends.wait(0.1):
            self._most = max(self._most, memory("RssAnon"))


class Step:
    """A step that is at work, and what it took to draw the rows, which is not counted."""

    def __init__(self, bar: Progress, task: Any) -> None:
        self.bar, self.task = bar, task
        self.seconds_not_counted = self.work_not_counted = 0.0

    def blocks(self, rows: int, seed: int) -> Iterator[tuple[Rows, np.ndarray]]:
        """Features and labels, block by block."""
        drawn = jittered_blocks(rows, seed)
        generator = np.random.default_rng(seed)
        while True:
            started, worked = time.perf_counter(), time.process_time()
            block = next(drawn, None)
            self.seconds_not_counted += time.perf_counter() - started
            self.work_not_counted += time.process_time() - worked
            if block is None:
                return
            yield block, generator.integers(CLASSES, size=len(block))
            self.bar.advance(self.task, len(block))


def main(
    rows: Annotated[int, typer.Option(help="Rows of 384 values.")] = 10_000_000,
    queries: Annotated[int, typer.Option(help="Held-out queries that are timed.")] = 5_000,
    checked: Annotated[int, typer.Option(help="Of which so many are answered exactly too.")] = 300,
    max_memory: Annotated[str, typer.Option(help="For the index.")] = "2GB",
    index: Annotated[str, typer.Option(help="auto chooses by --max-memory.")] = "auto",
    recall: Annotated[float, typer.Option(help="Recall at 20 that is to be reached.")] = 0.99,
    folder: Annotated[Path, typer.Option(help="For the rows; removed at the end.")] = Path(
        "outputs/ten-million"
    ),
    output: Annotated[Path, typer.Option(help="JSON file.")] = Path(
        "outputs/speed/ten-million.json"
    ),
) -> None:
    """Build, search, delete and add a tenth, save, and open again; print and write what it took."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_knn").setLevel(logging.INFO)
    if folder.exists():
        raise typer.BadParameter(f"{folder} is there already; name a folder that is not.")
    asked, tenth = jittered(queries, 2), rows // 10
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    facts: dict[str, Any] = {"rows": rows, "before_gigabytes": memory("RssAnon") / 1e9}
    try:
        with Progress(*columns) as bar:
            watch = Watch(bar)
            with watch.step("build", rows) as step:
                store = Datastore.from_blocks(
                    step.blocks(rows, 1), folder, index=index, max_memory=max_memory,
                    min_recall=recall,
                )  # fmt: skip
            facts |= {"index": str(store.index), "bytes_on_disk": _bytes_in(folder)}
            bar.console.print(facts["index"])
            facts["built"] = _searched(store, asked, checked, watch, "search")
            gone = np.random.default_rng(3).choice(rows, tenth, replace=False)
            with watch.step(f"delete {tenth:,} rows"):
                store.remove(gone)
            with watch.step(f"add {tenth:,} rows", tenth) as step:
                for features, labels in step.blocks(tenth, 4):
                    store.add(features, labels)
            facts["changed"] = _searched(store, asked, checked, watch, "search after that")
            facts["is_the_same_index"] = str(store.index) == facts["index"]
            with watch.step("save what changed"):
                store.save(folder)
            before = store.search(asked[:checked], K).ids
            del store
            with watch.step("open"):
                store = Datastore.load(folder)
            with watch.step("first search after opening"):
                opened = store.search(asked[:checked], K).ids
            facts["answers_as_before_saving"] = float((opened == before).float().mean())
            watch.end()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    facts["steps"] = watch.steps
    peak = max(step["peak_anonymous_gigabytes"] for step in watch.steps.values())
    facts["peak_anonymous_gigabytes"] = peak
    write(output, {"title": f"{rows:,} jittered rows of {DIM}", **facts})
    for when in ("built", "changed"):
        print(f"{when}: {facts[when]}")
    print(f"at most {peak:.2f} GB of anonymous memory; wrote {output}")


def _searched(
    store: Datastore, asked: Rows, checked: int, watch: Watch, name: str
) -> dict[str, float]:
    """Queries per second in batches, milliseconds of single ones, and recall beside the truth."""
    tensor = torch.from_numpy(asked)
    rates, work, alone = [], [], []
    with watch.step(name):
        store.search(tensor[:BATCH], K)
        for _ in range(ROUNDS):
            started, worked = time.perf_counter(), time.process_time()
            for part in tensor.split(BATCH):
                store.search(part, K)
            rates.append(len(tensor) / (time.perf_counter() - started))
            work.append((time.process_time() - worked) / len(tensor))
        for query in tensor[:100]:
            started = time.perf_counter()
            store.search(query[None], K)
            alone.append(time.perf_counter() - started)
    found = store.search(tensor[:checked], K).ids.tolist()
    with watch.step(f"exact answers to {checked} queries"):
        wanted = _exact(store, asked[:checked])
    return {
        "queries_per_second": median(rates),
        "slowest_round": min(rates),
        "processor_milliseconds_per_query": 1e3 * median(work),
        "one_query_milliseconds": 1e3 * median(alone),
        "recall": shared(found, wanted, K),
    }


def _exact(store: Datastore, asked: Rows) -> np.ndarray:
    """The ids of the nearest rows, by comparing all of them in float32."""
    mean = store.mean.numpy()
    queries = torch.from_numpy(_unit(asked, mean))
    scores, ids = torch.empty(len(asked), 0), torch.empty(len(asked), 0, dtype=torch.int64)
    for block in store.blocks():
        products = queries @ torch.from_numpy(_unit(block.features, mean)).T
        scores = torch.cat([scores, products], dim=1)
        ids = torch.cat([ids, torch.from_numpy(block.ids).expand(len(asked), -1)], dim=1)
        scores, best = scores.topk(min(K, scores.shape[1]), dim=1)
        ids = ids.gather(1, best)
    return ids.numpy()


def _unit(rows: np.ndarray, mean: np.ndarray) -> Rows:
    centred = rows.astype(np.float32) - mean
    unit: Rows = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    return unit


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


if __name__ == "__main__":
    typer.run(main)
