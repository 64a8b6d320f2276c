"""Pictures of what was tried."""

from pathlib import Path

import numpy as np

from .tuning import TuneResult


def draw_tuning(result: TuneResult, path: Path) -> None:
    """Draws accuracy over k and temperature, and over λ, as heat maps; the chosen cell is marked.

    Args:
        result: what `tune` found.
        path: the picture to write; folders are made.

    Raises:
        ImportError: without matplotlib, naming what to install.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Drawing needs matplotlib; run `pip install matplotlib`.") from error
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
    chosen = place["k"][result.k]
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
