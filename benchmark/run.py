"""The offline benchmark: `python benchmark/run.py`, or `accelerate launch benchmark/run.py`.

Without arguments: openmoji sub-categories on a frozen EfficientNet-Lite0 over several splits, and
digits with a tiny ViT trained from scratch. It needs no network and writes a table, a JSON file, a
picture of neighbours and a checkpoint.
"""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from accelerate import PartialState
from experiments import TaskResult, run_from_scratch, run_frozen
from offline_tasks import load_pictures
from plots import draw_task
from results import results_table, seconds_table, write_results
from rich.console import Console

DEFAULT_TASKS = ["openmoji", "digits"]
FROZEN = {"openmoji": "efficientnet-lite0", "openmoji-categories": "efficientnet-lite0"}
FROM_SCRATCH = {"digits": "tiny-vit-digits"}


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results.")] = Path(
        "outputs/quickstart"
    ),
    task: Annotated[
        list[str] | None, typer.Option(help=f"One of {sorted(FROZEN | FROM_SCRATCH)}; repeatable.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Splits of each frozen task.")] = 5,
    scratch_seeds: Annotated[int, typer.Option(min=1, help="Splits trained from scratch.")] = 1,
    epochs: Annotated[int, typer.Option(min=1, help="Of the head on frozen features.")] = 60,
    scratch_epochs: Annotated[int, typer.Option(min=1, help="Of a model from scratch.")] = 40,
    limit: Annotated[
        int | None, typer.Option(min=8, help="Pictures per task, to try things out.")
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Default: $HF_KNN_CACHE or ~/.cache/hf_knn.")
    ] = None,
) -> None:
    """Run the offline default: head, k-NN and blend on real pictures, no network."""
    started = time.perf_counter()
    state = PartialState()
    console = Console(quiet=not state.is_main_process)
    tasks = task or DEFAULT_TASKS
    unknown = sorted(set(tasks) - set(FROZEN | FROM_SCRATCH))
    if unknown:
        raise typer.BadParameter(
            f"unknown task {unknown}; choose from {sorted(FROZEN | FROM_SCRATCH)}"
        )
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
    first.model.datastore.source = {"dataset": first.task, "split": "train, seed 0"}
    first.model.save_pretrained(checkpoint)
    query = output / "query.png"
    rows[first.test_rows[0]]["image"].save(query)
    console.print(f"Numbers: {output / 'results.json'}")
    console.print(f"Picture: {output / 'neighbors.png'}")
    console.print(f"Checkpoint: {checkpoint}")
    command = f".venv/bin/hf-knn predict {checkpoint} {query}"
    console.print(f"Next: [bold]{command}[/]", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
