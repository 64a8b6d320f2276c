"""Numbers of a quickstart: means over splits, the tables and the JSON file."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.table import Table

from study.experiments import TaskResult
from study.provenance import write_findings

VOICES = {"head": "head", "knn": "kNN", "blend": "blend"}


def top1_values(result: TaskResult, voice: str) -> list[float]:
    """Test top-1 of one voice (`head`, `knn`, `blend`, `fixed`), one value per split."""
    if voice == "fixed":
        return [split.fixed_blend_top1 for split in result.splits]
    return [split.test[f"eval_{voice}_top1"] for split in result.splits]


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the latter is NaN for a single value."""
    return mean(values), stdev(values) if len(values) > 1 else float("nan")


def results_table(results: Sequence[TaskResult]) -> Table:
    """Top-1 on test per task and voice, in %, mean ± std over splits."""
    table = Table(title="Top-1 on test in %, mean ± std over splits", title_justify="left")
    table.add_column("task")
    table.add_column("splits", justify="right")
    for label in (*VOICES.values(), "fixed blend"):
        table.add_column(label, justify="right")
    for result in results:
        cells = [_shown(top1_values(result, voice)) for voice in (*VOICES, "fixed")]
        table.add_row(result.task, str(len(result.splits)), *cells)
    what = [f"{result.task}: {result.backbone}, {result.how}" for result in results]
    table.caption = "\n".join([*what, "fixed blend: k 20, temperature 0.14, λ 0.5, nothing tuned"])
    table.caption_justify = "left"
    return table


def seconds_table(results: Sequence[TaskResult]) -> Table:
    """Seconds per phase, and pictures per second through the backbone."""
    phases = list(dict.fromkeys(phase for result in results for phase in result.seconds))
    table = Table(title="Seconds per phase, all splits", title_justify="left")
    table.add_column("task")
    for phase in phases:
        table.add_column(phase, justify="right")
    table.add_column("images/s", justify="right")
    for result in results:
        cells = [f"{result.seconds.get(phase, 0):.1f}" for phase in phases]
        rate = "cached" if result.seconds.get("features") else "-"
        if result.images:
            rate = f"{result.images / result.seconds['features']:.0f}"
        table.add_row(result.task, *cells, rate)
    return table


def write_results(path: Path, results: Sequence[TaskResult], options: dict[str, Any]) -> None:
    """Writes everything that was measured, with where it comes from.

    Args:
        path: the JSON file.
        results: one per task.
        options: of the run.
    """
    write_findings(path, options=options, tasks=[_task_entry(result) for result in results])


def _task_entry(result: TaskResult) -> dict[str, Any]:
    summary = {}
    for voice in (*VOICES, "fixed"):
        average, deviation = mean_and_std(top1_values(result, voice))
        summary[voice] = {"mean": average, "std": None if deviation != deviation else deviation}
    return {
        "task": result.task,
        "backbone": result.backbone,
        "how": result.how,
        "top1": summary,
        "seconds": result.seconds,
        "images_through_backbone": result.images,
        "splits": [asdict(split) for split in result.splits],
    }


def _shown(values: Sequence[float]) -> str:
    average, deviation = mean_and_std(values)
    return f"{average:.1%}"[:-1] + ("" if deviation != deviation else f" ± {deviation * 100:.1f}")
