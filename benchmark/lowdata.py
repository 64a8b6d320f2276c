"""What helps with few labelled pictures: `python benchmark/lowdata.py`.

Shots per class are nested and seeded; half of the pictures is the test set of a seed. Labels to
choose on are part of the shots. Reports test top-1 over seeds, and paired differences with 95 %
confidence intervals (Student's t over seeds).
"""

import json
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

import matplotlib as mpl
import torch
import typer
from few_shot import ARMS, VOICES, Rows, measure_split
from offline_backbones import build_backbone
from offline_tasks import load_pictures
from results import provenance
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student  # type: ignore[import-untyped]
from tqdm import tqdm

from hf_knn import KnnForImageClassification, extract_features, few_rows, few_shots

mpl.use("Agg")
from matplotlib import pyplot as plt

NAMES = (*ARMS, *VOICES)
DIFFERENCES = (
    ("blend", "head"), ("ridge", "head"), ("blend_ridge", "ridge"), ("reweighted", "head"),
    ("normalised", "head"), ("shuffled", "head"), ("constant", "head"),
    ("reweighted", "constant"), ("reweighted", "shuffled"), ("blend_reweighted", "blend"),
)  # fmt: skip
DRAWN = ("head", "ridge", "knn", "blend", "blend_ridge")

Scores = dict[int, list[dict[str, float]]]
"""Test top-1 by name, one dict per seed, by shots."""


def main(
    task: Annotated[list[str] | None, typer.Option(help="Repeatable.")] = None,
    shots: Annotated[list[int] | None, typer.Option(help="Pictures per class.")] = None,
    seeds: Annotated[int, typer.Option(min=2, help="Splits.")] = 10,
    backbone: Annotated[str, typer.Option(help="Frozen.")] = "efficientnet-lite0",
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("outputs/lowdata"),
    cache_dir: Annotated[
        Path | None, typer.Option(help="Default: $HF_KNN_CACHE or ~/.cache/hf_knn.")
    ] = None,
) -> None:
    """Measure heads, controls, neighbours and blends with few labelled pictures."""
    console, started = Console(), time.perf_counter()
    results: dict[str, Scores] = {}
    for name in task or ["openmoji-categories", "digits"]:
        rows, classes = task_features(name, backbone, cache_dir)
        results[name] = _measure(name, rows, classes, shots or [1, 2, 4, 8, 16], seeds)
        console.print(_scores_table(name, results[name]))
        console.print(_differences_table(name, results[name]))
    output.mkdir(parents=True, exist_ok=True)
    document = {
        "provenance": provenance(),
        "backbone": backbone,
        "seconds": time.perf_counter() - started,
        "top1": results,
    }
    (output / "lowdata.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    _draw(results, output / "lowdata.png")
    console.print(f"Numbers: {output / 'lowdata.json'}; picture: {output / 'lowdata.png'}")


def task_features(task: str, backbone: str, cache_dir: Path | None) -> tuple[Rows, int]:
    """Features of a task by a frozen backbone, and how many classes it has."""
    dataset = load_pictures(task, cache_dir)
    names = dataset.features["label"].names
    model = KnnForImageClassification.from_backbone(build_backbone(backbone, cache_dir), names)
    cache = None if cache_dir is None else cache_dir / "features"
    features = extract_features(model, dataset, cache_dir=cache)
    return Rows(features.features, features.labels), len(names)


def _measure(task: str, rows: Rows, classes: int, shots: list[int], seeds: int) -> Scores:
    found: Scores = {count: [] for count in shots}
    everyone = torch.arange(len(rows.labels))
    with tqdm(total=len(shots) * seeds, desc=task) as bar:
        for seed in range(seeds):
            pool = torch.as_tensor(few_rows(rows.labels, 0.5, seed))
            test = rows.select(everyone[~torch.isin(everyone, pool)])
            train = rows.select(pool)
            for count in shots:
                few = train.select(few_shots(train.labels, count, seed))
                found[count].append(measure_split(few, test, classes, seed))
                bar.update()
    return found


def _scores_table(task: str, scores: Scores) -> Table:
    table = Table(title=f"{task}: test top-1 in %, mean ± std", title_justify="left")
    for column in ("", *(f"{count} shots" for count in scores)):
        table.add_column(column, justify="right" if column else "left")
    for name in NAMES:
        columns = [[row[name] for row in rows] for rows in scores.values()]
        table.add_row(name, *(f"{100 * mean(c):.1f} ± {100 * stdev(c):.1f}" for c in columns))
    return table


def _differences_table(task: str, scores: Scores) -> Table:
    table = Table(title=f"{task}: paired differences in points, 95 %", title_justify="left")
    for column in ("", *(f"{count} shots" for count in scores)):
        table.add_column(column, justify="right" if column else "left")
    for name, other in DIFFERENCES:
        cells = []
        for rows in scores.values():
            gaps = [100 * (row[name] - row[other]) for row in rows]
            reach = student.ppf(0.975, len(gaps) - 1) * stdev(gaps) / len(gaps) ** 0.5
            mark = " *" if abs(mean(gaps)) > reach else ""
            cells.append(f"{mean(gaps):+.2f} ± {reach:.2f}{mark}")
        table.add_row(f"{name} - {other}", *cells)
    table.caption = "* the interval leaves out 0"
    return table


def _draw(results: dict[str, Scores], path: Path) -> None:
    figure, axes = plt.subplots(
        1, len(results), figsize=(6 * len(results), 4), layout="constrained", squeeze=False
    )
    for axis, (task, scores) in zip(axes[0], results.items(), strict=True):
        for name in DRAWN:
            columns = [[100 * row[name] for row in rows] for rows in scores.values()]
            axis.errorbar(
                list(scores), [mean(c) for c in columns], [stdev(c) for c in columns],
                marker="o", capsize=3, label=name,
            )  # fmt: skip
        axis.set(xscale="log", xlabel="pictures per class", ylabel="test top-1 in %", title=task)
        axis.set_xticks(list(scores), [str(count) for count in scores])
        axis.minorticks_off()
        axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    typer.run(main)
