"""The picture of a run: queries and the training pictures that voted for them."""

from pathlib import Path

import matplotlib as mpl
import torch
from datasets import Dataset
from experiments import TaskResult

from hf_knn import extract_features

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

QUERIES, NEIGHBORS = 6, 6
RIGHT, WRONG = "#1a7f37", "#b42318"


def draw_neighbors(result: TaskResult, rows: Dataset, path: Path) -> None:
    """Draws some test pictures with their nearest training pictures, right ones in green.

    Args:
        result: with the model and test rows of the first split.
        rows: the task's pictures, whose row numbers are the datastore's ids.
        path: the PNG file.
    """
    assert result.model is not None
    model, names = result.model, rows.features["label"].names
    step = max(1, len(result.test_rows) // QUERIES)
    chosen = result.test_rows[::step][:QUERIES]
    features = extract_features(model, rows.select(chosen), use_cache=False, progress=False)
    with torch.inference_mode():
        output = model(features=features.features.to(model.device), return_neighbors=True)
    figure, axes = plt.subplots(
        len(chosen), NEIGHBORS + 1, figsize=(1.7 * (NEIGHBORS + 1), 1.95 * len(chosen)),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for i, row in enumerate(chosen):
        label = rows[row]["label"]
        answer = int(output.logits[i].argmax())
        share = float(output.logits[i].exp().max())
        _show(axes[i][0], rows, row, f"{names[label]}\n→ {names[answer]} {share:.0%}")
        _frame(axes[i][0], answer == label, width=3)
        near = zip(output.neighbors.ids[i], output.neighbors.similarities[i], strict=True)
        for place, (row_id, similarity) in enumerate(list(near)[:NEIGHBORS], start=1):
            neighbor = int(row_id)
            found = rows[neighbor]["label"]
            _show(axes[i][place], rows, neighbor, f"{names[found]}\n{float(similarity):.2f}")
            _frame(axes[i][place], found == label, width=1.5)
        for place in range(len(output.neighbors.ids[i]) + 1, NEIGHBORS + 1):
            axes[i][place].axis("off")
    figure.suptitle(
        f"{result.task}: test picture and answer (left), nearest training pictures and similarity",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _show(axes: Axes, rows: Dataset, row: int, title: str) -> None:
    axes.imshow(rows[row]["image"].convert("RGB"), interpolation="nearest")
    axes.set_title(title, fontsize=7)
    axes.set_xticks([])
    axes.set_yticks([])


def _frame(axes: Axes, is_right: bool, width: float) -> None:
    for spine in axes.spines.values():
        spine.set_color(RIGHT if is_right else WRONG)
        spine.set_linewidth(width)
