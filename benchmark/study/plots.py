"""The picture of a run: queries and the training pictures that voted for them."""

from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_knn import extract_features
from hf_knn.fit import draw_neighbors
from study.experiments import TaskResult

QUERIES = 6


def draw_task(result: TaskResult, rows: Dataset, path: Path) -> None:
    """Draws some test pictures of the first split with their nearest training pictures.

    Args:
        result: with the model and test rows of the first split.
        rows: the task's pictures, whose row numbers are the datastore's ids.
        path: the PNG file.
    """
    assert result.model is not None
    step = max(1, len(result.test_rows) // QUERIES)
    chosen = result.test_rows[::step][:QUERIES]
    queries = extract_features(result.model, rows.select(chosen), use_cache=False, progress=False)

    def picture(row: int) -> Any:
        return rows[row]["image"]

    draw_neighbors(
        result.model, queries, lambda row: picture(chosen[row]), picture, path,
        title=f"{result.task}: test picture and answer (left), nearest training pictures",
    )  # fmt: skip
