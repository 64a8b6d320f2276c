"""The quickstart: what `python benchmark/run.py` does without arguments.

Openmoji sub-categories on a frozen EfficientNet-Lite0 over several splits, and digits with a tiny
ViT trained from scratch. It needs no network and writes a table, a JSON file, a picture of
neighbours and a checkpoint.
"""

import sys
import time
from pathlib import Path

from accelerate import PartialState
from rich.console import Console

from catalog.cache import unknown_name
from catalog.offline_tasks import load_pictures
from study.experiments import TaskResult, run_from_scratch, run_frozen
from study.plots import draw_task
from study.results import results_table, seconds_table, write_results

DEFAULT_TASKS = ["openmoji", "digits"]
FROZEN = {"openmoji": "efficientnet-lite0", "openmoji-categories": "efficientnet-lite0"}
FROM_SCRATCH = {"digits": "tiny-vit-digits"}
SEEDS, SCRATCH_SEEDS, EPOCHS, SCRATCH_EPOCHS = 5, 1, 60, 40


def run_quickstart(
    output: Path,
    tasks: list[str],
    seeds: int,
    scratch_seeds: int,
    epochs: int,
    scratch_epochs: int,
    limit: int | None,
    cache_dir: Path | None,
) -> None:
    """Head, k-NN and blend on real pictures, no network.

    Args:
        output: folder of the results.
        tasks: keys of `FROZEN` or `FROM_SCRATCH`; none takes `DEFAULT_TASKS`.
        seeds: splits of each frozen task.
        scratch_seeds: splits trained from scratch.
        epochs: of the head on frozen features.
        scratch_epochs: of a model from scratch.
        limit: pictures per task, to try things out.
        cache_dir: where pictures, backbones and features are kept.

    Raises:
        ValueError: for an unknown task.
    """
    for name in tasks:
        if name not in FROZEN | FROM_SCRATCH:
            raise unknown_name("task of the quick suite", name, FROZEN | FROM_SCRATCH)
    tasks = tasks or DEFAULT_TASKS
    started = time.perf_counter()
    state = PartialState()
    console = Console(quiet=not state.is_main_process)
    results: list[TaskResult] = []
    for name in tasks:
        if name in FROZEN:
            result = run_frozen(name, FROZEN[name], seeds, epochs, limit, cache_dir, console.print)
        else:
            result = run_from_scratch(
                name, FROM_SCRATCH[name], scratch_seeds, scratch_epochs, limit, cache_dir,
                console.print,
            )  # fmt: skip
        results.append(result)
    if state.is_main_process:
        _write(results, output, limit, cache_dir, console, sys.argv[1:])
        console.print(f"Done after {time.perf_counter() - started:.0f} s.")


def _write(
    results: list[TaskResult],
    output: Path,
    limit: int | None,
    cache_dir: Path | None,
    console: Console,
    options: list[str],
) -> None:
    console.print(results_table(results))
    console.print(seconds_table(results))
    write_results(output / "results.json", results, {"arguments": options})
    first = results[0]
    assert first.model is not None
    rows = load_pictures(first.task, cache_dir, limit)
    draw_task(first, rows, output / "neighbors.png")
    checkpoint = output / "checkpoint"
    assert first.model.datastore is not None
    first.model.datastore.source |= {"dataset": first.task, "split": "train, seed 0"}
    first.model.save_pretrained(checkpoint)
    query = output / "query.png"
    rows[first.test_rows[0]]["image"].save(query)
    console.print(f"Numbers: {output / 'results.json'}")
    console.print(f"Picture: {output / 'neighbors.png'}")
    console.print(f"Checkpoint: {checkpoint}")
    command = f".venv/bin/hf-knn predict {checkpoint} {query}"
    console.print(f"Next: [bold]{command}[/]", soft_wrap=True)
