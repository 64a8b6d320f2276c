"""The cells as a table: one row per cell and arm, as parquet through `datasets`."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value

from reporting.cells import Cell, Results

TABLE_NAME = "results.parquet"
METRICS = ("top1", "top5", "mean_class", "nll", "ece", "auroc")
_PARTS = ("validation", "test", "test_clean")
_TEXTS = (
    "task", "backbone", "protocol", "shift", "arm", "chosen", "task_revision", "model_revision",
    "commit", "device", "precision", "finished",
)  # fmt: skip
_NUMBERS = (
    "seed", "shots", "classes", "train_rows", "validation_rows", "test_rows", "near_duplicates",
    "images", "peak_memory_bytes",
)  # fmt: skip

FEATURES = Features(
    {name: Value("string") for name in _TEXTS}
    | {name: Value("int64") for name in _NUMBERS}
    | {f"{part}_{metric}": Value("float64") for part in _PARTS for metric in METRICS}
    | {"seconds": Value("float64"), "images_per_second": Value("float64")}
)
"""Columns of the table; `chosen` is JSON, metrics that were not measured are null."""


def as_dataset(results: Results) -> Dataset:
    """The results as a dataset, in the order of cells and arms."""
    rows = [_row(cell, arm) for cell in results.cells for arm in cell.arms]
    return Dataset.from_list(rows, features=FEATURES)


def write_table(results: Results, folder: Path) -> Path:
    """Writes `results.parquet`.

    Args:
        results: of a run.
        folder: where to; made if it is missing.

    Returns:
        The path of the table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / TABLE_NAME
    as_dataset(results).to_parquet(path)
    return path


def _row(cell: Cell, arm: str) -> dict[str, Any]:
    document, entry, setting = cell.document, cell.arms[arm], cell.setting
    provenance, data = document["provenance"], document["data"]
    row = dict.fromkeys(FEATURES) | setting._asdict()
    row |= {
        "arm": arm, "seed": cell.seed, "chosen": json.dumps(entry.get("chosen") or {}),
        "task_revision": str(document["task"].get("revision")),
        "model_revision": str(document["model"].get("revision")),
        "classes": document["task"].get("classes"), "images": document.get("images"),
        "train_rows": data.get("train"), "validation_rows": data.get("validation"),
        "test_rows": data.get("test"), "near_duplicates": data.get("near_duplicates_in_train"),
        "peak_memory_bytes": document.get("peak_memory_bytes"),
        "seconds": sum(value or 0 for value in document["seconds"].values()),
        "images_per_second": document.get("images_per_second"),
    }  # fmt: skip
    row |= {name: provenance.get(name) for name in ("commit", "device", "precision", "finished")}
    for part in _PARTS:
        row |= {f"{part}_{metric}": (entry.get(part) or {}).get(metric) for metric in METRICS}
    return row
