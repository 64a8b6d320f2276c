"""Pictures of what was tried, and of who voted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from ..features.extract import ImageFeatures
from ..model.modeling import KnnForImageClassification
from ..store.advice import install_package, needs
from .blend import TuneResult

_RIGHT, _WRONG = "#1a7f37", "#b42318"


def check_drawing() -> None:
    """Checks that pictures can be drawn, before the work that leads to them.

    Raises:
        ImportError: without matplotlib, naming what to install.
    """
    needs({"matplotlib": "matplotlib"}, "Drawing", install_package("matplotlib"))


def draw_tuning(result: TuneResult, path: Path) -> None:
    """Draws accuracy over k and temperature, and over λ, as heat maps; the chosen cell is marked.

    Args:
        result: what `tune` found.
        path: the picture to write; folders are made.

    Raises:
        ImportError: without matplotlib, naming what to install.
        ValueError: where nothing was tried.
    """
    check_drawing()
    from matplotlib.figure import Figure

    if not result.table:
        raise ValueError("Expected rows that cells were tried on, but no row was held out.")
    ks = sorted({cell.k for cell in result.table})
    temperatures = sorted({cell.temperature for cell in result.table})
    weights = sorted({cell.knn_weight for cell in result.table})
    place: dict[str, dict[float, int]] = {
        "k": {value: i for i, value in enumerate(ks)},
        "temperature": {value: i for i, value in enumerate(temperatures)},
        "λ": {value: i for i, value in enumerate(weights)},
    }
    by_temperature = np.full((len(temperatures), len(ks)), np.nan)
    by_weight = np.full((len(weights), len(ks)), np.nan)
    for cell in result.table:
        column = place["k"][cell.k]
        row, weight = place["temperature"][cell.temperature], place["λ"][cell.knn_weight]
        # the best over what an axis leaves out
        by_temperature[row, column] = np.fmax(by_temperature[row, column], cell.accuracy)
        by_weight[weight, column] = np.fmax(by_weight[weight, column], cell.accuracy)
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    axes = figure.subplots(1, 2)
    chosen = place["k"].get(min(result.k, ks[-1]))
    panels = [
        (by_temperature, temperatures, "temperature", place["temperature"][result.temperature]),
        (by_weight, weights, "λ", place["λ"][result.knn_weight]),
    ]
    for axis, (values, labels, name, row) in zip(axes, panels, strict=True):
        image = axis.imshow(values, aspect="auto", origin="lower", cmap="viridis")
        axis.plot(chosen, row, "r+", markersize=14, markeredgewidth=2)
        axis.set(
            xlabel="k", ylabel=name, title=f"accuracy by k and {name}, the best of the rest",
            xticks=range(len(ks)), yticks=range(len(labels)),
            xticklabels=ks, yticklabels=[f"{label:g}" for label in labels],
        )  # fmt: skip
        axis.tick_params(labelsize=7)
        figure.colorbar(image, ax=axis)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def draw_neighbors(
    model: KnnForImageClassification,
    queries: ImageFeatures,
    query_picture: Callable[[int], Image],
    stored_picture: Callable[[int], Image],
    path: Path,
    *,
    title: str = "picture and answer (left), nearest training pictures and similarity",
    count: int = 6,
) -> None:
    """Draws pictures with their nearest training pictures, right ones framed in green.

    Args:
        model: with a datastore.
        queries: features and labels of the pictures.
        query_picture: the picture of a row of `queries`, as PIL image.
        stored_picture: the picture of a stored row, by its id.
        path: the PNG file; folders are made.
        title: of the whole.
        count: neighbours shown per picture, at most what vote.

    Raises:
        ImportError: without matplotlib, naming what to install.
    """
    check_drawing()
    from matplotlib.figure import Figure

    names = model.config.class_names
    with torch.inference_mode():
        output = model(features=queries.features.to(model.device), return_neighbors=True)
    near = output.neighbors
    width = min(count, near.ids.shape[1])
    figure = Figure(figsize=(1.7 * (width + 1), 1.95 * len(queries)), layout="constrained")
    axes = figure.subplots(len(queries), width + 1, squeeze=False)
    for row, label in enumerate(queries.labels.tolist()):
        answer, share = int(output.logits[row].argmax()), float(output.logits[row].exp().max())
        _show(
            axes[row][0], query_picture(row), f"{names[label]}\n→ {names[answer]} {share:.0%}",
            answer == label,
        )  # fmt: skip
        for place in range(width):
            found = int(near.labels[row, place])
            said = f"{names[found]}\n{float(near.similarities[row, place]):.2f}"
            picture = stored_picture(int(near.ids[row, place]))
            _show(axes[row][place + 1], picture, said, found == label)
    figure.suptitle(title, fontsize=10, parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _show(axes: Any, picture: Image, title: str, is_right: bool) -> None:
    axes.imshow(picture.convert("RGB"), interpolation="nearest")
    axes.set_title(title, fontsize=7, parse_math=False)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(_RIGHT if is_right else _WRONG)
        spine.set_linewidth(2)
