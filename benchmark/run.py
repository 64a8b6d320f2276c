"""The benchmark: `python benchmark/run.py`, or `accelerate launch benchmark/run.py --suite NAME`.

Without arguments it is the quickstart: real pictures, no network, under three minutes. With a suite
it measures the suite's cells into a folder that can be continued at any time.
"""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from accelerate import PartialState
from rich.console import Console
from rich.live import Live
from rich.table import Table

from catalog.tasks import Source, find_task
from hf_knn_cli.terminal import prepare_streams
from quickstart import EPOCHS as HEAD_EPOCHS
from quickstart import SCRATCH_EPOCHS, SCRATCH_SEEDS, SEEDS, run_quickstart
from study.cells import Cell, is_finished
from study.estimates import check_disk, estimate, seconds_of
from study.experiments import hide_progress_bars
from study.protocols import PROTOCOLS
from study.ranks import start
from study.runner import EPOCHS, Options, Progress, Run
from study.suites import QUICK, SUITES, make_cells

app = typer.Typer(add_completion=False)


class SaidOnce(logging.Filter):
    """Lets a message through once: cells are alike, and so is what is said of their rows."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is new."""
        message = record.getMessage()
        is_new = message not in self._said
        self._said.add(message)
        return is_new


@app.command()
def main(
    suite: Annotated[str, typer.Option(help=f"One of {[QUICK, *SUITES]}.")] = QUICK,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Repeatable: a known name, imagefolder:PATH, hub:ID[@REVISION][:CONFIG]"),
    ] = None,
    backbones: Annotated[
        list[str] | None,
        typer.Option("--backbone", "--backbones", help="Repeatable: a name, a Hub id, a folder."),
    ] = None,
    protocol: Annotated[
        list[str] | None, typer.Option(help=f"Repeatable: {', '.join(PROTOCOLS)}.")
    ] = None,
    shots: Annotated[
        list[int] | None, typer.Option(min=1, help="Repeatable: pictures per class of lowdata.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many splits.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the results.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the cells, seconds and disk; run nothing.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=8, help="Pictures per task, to try things out.")
    ] = None,
    stream: Annotated[
        bool | None, typer.Option("--stream/--no-stream", help="Keep features, not pictures.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of the Hub task.")] = None,
    precision: Annotated[str, typer.Option(help="Of features: fp32, bf16 or fp16.")] = "fp32",
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per forward pass.")] = 32,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Quick: of the head. Else: of backbones that are trained."),
    ] = None,
    scratch_seeds: Annotated[
        int | None, typer.Option(min=1, help="Quick: splits trained from scratch.")
    ] = None,
    scratch_epochs: Annotated[
        int | None, typer.Option(min=1, help="Quick: of a model from scratch.")
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Default: $HF_KNN_CACHE or ~/.cache/hf_knn.")
    ] = None,
) -> None:
    """Measure head, k-NN and blend; without arguments a quickstart that needs no network."""
    state = start()
    is_quick = suite == QUICK
    foreign: dict[str, Any] = {
        "--backbone": backbones, "--protocol": protocol, "--shots": shots, "--dry-run": dry_run,
        "--stream": stream, "--revision": revision,
    }  # fmt: skip
    if not is_quick:
        foreign = {"--scratch-seeds": scratch_seeds, "--scratch-epochs": scratch_epochs}
    for name, value in foreign.items():
        if value:
            raise typer.BadParameter(
                f"{name} is not an option of the suite {suite!r}; "
                f"do pass --suite with one of {list(SUITES) if is_quick else [QUICK]}"
            )
    try:
        if is_quick:
            run_quickstart(
                output or Path("outputs/quickstart"), task or [], seeds or SEEDS,
                scratch_seeds or SCRATCH_SEEDS, epochs or HEAD_EPOCHS,
                scratch_epochs or SCRATCH_EPOCHS, limit, cache_dir,
            )  # fmt: skip
            return
        cells = make_cells(
            suite, tasks=task, backbones=backbones, protocols=protocol, shots=shots, seeds=seeds
        )
        _check_revision(cells, revision)
        options = Options(
            limit, epochs or EPOCHS, precision, batch_size, stream, revision, cache_dir
        )
        folder = output or Path("outputs") / suite
        if dry_run:
            _list(cells, options)
            return
        check_disk(folder, estimate(cells, limit, stream).megabytes)
        failed = _run(folder, suite, cells, options)
    except (ValueError, OSError, RuntimeError) as error:
        who = f"Error on rank {state.process_index}" if state.num_processes > 1 else "Error"
        raise SystemExit(f"{who}: {error}") from error
    if failed and state.is_main_process:  # another rank's exit would end it before it has spoken
        raise SystemExit(1)


def _check_revision(cells: list[Cell], revision: str | None) -> None:
    """A commit is one of one dataset."""
    tasks = dict.fromkeys(cell.task for cell in cells)
    on_hub = [task for task in tasks if find_task(task).source is Source.HUB]
    if revision is not None and len(on_hub) != 1:
        raise ValueError(
            f"Expected one task of the Hub with --revision, but got {on_hub or 'none'}; do choose "
            "one with --task, or write hub:ID@REVISION."
        )


def _list(cells: list[Cell], options: Options) -> None:
    table = Table(title=f"{len(cells)} cells", title_justify="left")
    for column in ("cell", "about s"):
        table.add_column(column, justify="left" if column == "cell" else "right", no_wrap=True)
    for cell in cells:
        table.add_row(cell.name, f"{seconds_of(cell, options.limit):.1f}")
    found = estimate(cells, options.limit, options.streaming)
    state = PartialState()
    width = None if sys.stdout.isatty() else 160
    console = Console(width=width, quiet=not state.is_main_process)
    console.print(table)
    ranks, minutes = state.num_processes, found.seconds / 60
    shared = f", {minutes / ranks:.0f} by the {ranks} of this launch" if ranks > 1 else ""
    console.print(
        f"About {minutes:.0f} minutes by one rank{shared}, features and shared trainings included "
        f"and within a factor of three; {found.megabytes:,.0f} MB of disk. Nothing was run.",
        soft_wrap=True,
    )


def _run(folder: Path, suite: str, cells: list[Cell], options: Options) -> int:
    """Runs and shows it; returns how many cells failed."""
    started = time.perf_counter()
    state = PartialState()
    console = Console(quiet=not state.is_main_process)
    if state.num_processes > 1:
        console.print(f"{state.num_processes} ranks share the work.")
    hide_progress_bars()
    with _shown(console) as watch, _said_once("hf_knn.core.rows"):
        run = Run(folder, options, watch)
        run.run(suite, cells)
    same: dict[str, list[str]] = {}  # of a task that is not there each cell says the same
    for name, error in run.told:
        same.setdefault(error, []).append(name)
    for error, names in same.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        console.print("[red]Failed[/]", end=" ")
        console.print(f"{names[0]}{more}: {error}", soft_wrap=True, markup=False)
    done = sum(is_finished(folder, cell) for cell in cells)
    console.print(f"{done} of {len(cells)} cells are in {folder}.", soft_wrap=True)
    console.print(f"Done after {time.perf_counter() - started:.0f} s.")
    if done:
        console.print(f"Next: [bold]python benchmark/report.py {folder}[/]", soft_wrap=True)
    return len(run.told)


@contextmanager
def _said_once(name: str) -> Iterator[None]:
    logger, once = logging.getLogger(name), SaidOnce()
    logger.addFilter(once)
    try:
        yield
    finally:
        logger.removeFilter(once)


@contextmanager
def _shown(console: Console) -> Iterator[Any]:
    """A live table on a terminal; elsewhere a line per task and backbone."""
    if not console.is_terminal:
        said: set[str] = set()

        def say(progress: dict[tuple[str, str], Progress], doing: str) -> None:
            if doing.endswith(": features") and doing not in said:
                said.add(doing)
                console.print(doing, soft_wrap=True)

        yield say
        return
    with Live(console=console, refresh_per_second=2) as live:
        yield lambda progress, doing: live.update(_progress_table(progress, doing))


def _progress_table(progress: dict[tuple[str, str], Progress], doing: str) -> Table:
    table = Table(title="Cells of this rank", title_justify="left", caption=doing)
    for column in ("task", "backbone", "cells", "finished", "from before", "failed", "seconds"):
        table.add_column(column, justify="left" if column in ("task", "backbone") else "right")
    for (task, backbone), p in progress.items():
        numbers = (p.total, p.done, p.skipped, p.failed)
        table.add_row(task, backbone, *map(str, numbers), f"{p.seconds:.0f}")
    return table


if __name__ == "__main__":
    prepare_streams()
    app()
