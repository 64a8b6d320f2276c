"""The cells of a folder as a table: `python benchmark/export.py DIR`.

One row per cell and arm, written to `DIR/cells.parquet`, which `datasets` opens. `--trackio` logs
it to trackio, which is local unless told otherwise; `--push org/name` pushes it as a dataset.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from cells import CELLS
from datasets import Dataset

TABLE = "cells.parquet"


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """One row per cell and arm, in the order of their names.

    Args:
        folder: of the results.

    Raises:
        FileNotFoundError: if there is no finished cell.
    """
    paths = sorted((folder / CELLS).glob("*.json"))
    if not paths:
        raise FileNotFoundError(
            f"Expected finished cells in {folder / CELLS}, but there are none; do run "
            "`python benchmark/run.py --suite NAME` first."
        )
    rows = []
    for path in paths:
        document = json.loads(path.read_text(encoding="utf-8"))
        facts = dict(document["cell"])
        facts |= {f"data_{name}": count for name, count in document["data"].items()}
        facts |= {
            "task_revision": document["task"]["revision"],
            "model_revision": document["model"]["revision"],
            "seconds": sum(document["seconds"].values()),
            "peak_memory_bytes": document["peak_memory_bytes"],
            "commit": document["provenance"]["commit"],
        }
        for name, arm in document["arms"].items():
            chosen = json.dumps(arm["chosen"], sort_keys=True)
            metrics = {
                f"{part}_{metric}": value
                for part in ("validation", "test", "test_clean")
                for metric, value in arm[part].items()
            }
            rows.append(facts | {"arm": name, "chosen": chosen} | metrics)
    return rows


def as_dataset(folder: Path) -> Dataset:
    """The table of `rows_of` as a dataset; what an arm has not measured is null."""
    rows = rows_of(folder)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns})


def log_to_trackio(folder: Path, project: str) -> int:
    """Logs a run per task, backbone and arm; returns how many there are."""
    import trackio

    runs: dict[str, list[dict[str, Any]]] = {}
    for row in rows_of(folder):
        key = f"{row['task']}, {row['backbone']}, {row['protocol']}, {row['arm']}"
        runs.setdefault(key, []).append(row)
    for name, rows in runs.items():
        trackio.init(project=project, name=name, config={"task": rows[0]["task"]})
        for row in rows:
            numbers = {k: v for k, v in row.items() if k.startswith(("test_", "validation_"))}
            trackio.log(numbers | {"seed": row["seed"], "shots": row["shots"] or 0})
        trackio.finish()
    return len(runs)


def main(
    folder: Annotated[Path, typer.Argument(help="Of the results.")],
    trackio: Annotated[
        str | None, typer.Option(help="Project to log to; needs `pip install trackio`.")
    ] = None,
    push: Annotated[str | None, typer.Option(help="Dataset on the Hub to push to.")] = None,
) -> None:
    """Write the table of a folder, and log or push it where asked."""
    table = as_dataset(folder)
    table.to_parquet(folder / TABLE)
    print(f"{len(table)} rows: {folder / TABLE}")
    if trackio is not None:
        print(f"{log_to_trackio(folder, trackio)} runs in the trackio project {trackio}")
    if push is not None:
        table.push_to_hub(push)
        print(f"Pushed to https://huggingface.co/datasets/{push}")


if __name__ == "__main__":
    typer.run(main)
