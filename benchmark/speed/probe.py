"""32 linear heads at once against 32 fits by scikit-learn, and against one head at a time.

The features are drawn: 100 overlapping classes in 384 dimensions whose variances fall like 1 / j,
as those of real backbones do (eigenvalues 65 and 257 of EfficientNet-Lite0 on openmoji are 0.020
and 0.0035 of the first; of 1 / j they would be 0.015 and 0.0039). Among balls (`--decay 0`)
scikit-learn needs a quarter of the steps.

Every contestant fits on the same rows and is chosen on the same other rows; the fits of
scikit-learn are 32 values of C with all else at its defaults.
"""

import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from harness import compare, report
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor, nn

from hf_knn import ProbeGrid, ProbeSettings, train_probes

DIM, CLASSES, SEPARATION = 384, 100, 0.2
PEER = "scikit-learn"
GRID = ProbeGrid((0.03, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 3.0), (0.0, 3e-4, 1e-3, 3e-3))
STRENGTHS = np.logspace(-4, 4, 32)
SLOW_SHARE = 1 / 16
"""One head at a time is timed for two of the 32, which all take the same time."""


class Split(NamedTuple):
    """Rows to fit on and rows to choose on."""

    features: Tensor
    labels: Tensor
    held_features: Tensor
    held_labels: Tensor


def draw(rows: int, held_rows: int, decay: float) -> Split:
    """Gaussian classes with common covariance of eigenvalues j ** -decay, in random directions."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.arange(1, DIM + 1) ** (-decay / 2)
    centres = SEPARATION * torch.randn(CLASSES, DIM, generator=generator) * scales
    directions = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator)).Q
    labels = torch.randint(CLASSES, (rows + held_rows,), generator=generator)
    noise = torch.randn(rows + held_rows, DIM, generator=generator) * scales
    features = (centres[labels] + noise) @ directions
    features = (features - features[:rows].mean(dim=0)) / features[:rows].std()
    return Split(features[:rows], labels[:rows], features[rows:], labels[rows:])


def fit_sklearn(split: Split) -> list[float]:
    """Accuracy on the held-out rows of each of the 32 fits."""
    features, labels = split.features.numpy(), split.labels.numpy()
    held = split.held_features.numpy(), split.held_labels.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # what 100 steps give is what counts
        fits = [LogisticRegression(C=strength).fit(features, labels) for strength in STRENGTHS]
    return [float(fit.score(*held)) for fit in fits]


def fit_at_once(split: Split, epochs: int) -> list[float]:
    """Accuracy of each of the 32 heads."""
    heads = train_probes(split.features, split.labels, CLASSES, GRID, settings_of(epochs))
    correct = torch.zeros(len(heads))
    for features, labels in zip(
        split.held_features.split(1000), split.held_labels.split(1000), strict=True
    ):
        correct += (heads.logits(features).argmax(dim=2) == labels).sum(dim=1)
    return (correct / len(split.held_labels)).tolist()


def fit_one_by_one(split: Split, epochs: int) -> None:
    """The same code for one head after the other."""
    for config in GRID.configs()[: round(SLOW_SHARE * len(GRID.configs()))]:
        train_probes(split.features, split.labels, CLASSES, [config], settings_of(epochs))


def fit_plainly(split: Split, epochs: int) -> None:
    """What one writes by hand: `nn.Linear`, autograd and `torch.optim`."""
    settings = settings_of(epochs)
    for config in GRID.configs()[: round(SLOW_SHARE * len(GRID.configs()))]:
        head = nn.Linear(DIM, CLASSES)
        optimizer = torch.optim.SGD(
            head.parameters(), config.learning_rate, settings.momentum,
            weight_decay=config.weight_decay,
        )  # fmt: skip
        steps = epochs * math.ceil(len(split.labels) / settings.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(epochs):
            for batch in torch.randperm(len(split.labels)).split(settings.batch_size):
                logits = head(split.features[batch])
                optimizer.zero_grad()
                nn.functional.cross_entropy(logits, split.labels[batch]).backward()
                optimizer.step()
                schedule.step()


def settings_of(epochs: int) -> ProbeSettings:
    """The defaults, with a tenth of the epochs for warm-up."""
    return ProbeSettings(epochs=epochs, warmup_epochs=epochs / 10)


def main(
    rows: Annotated[int, typer.Option(help="Rows to fit on.")] = 10_000,
    held_rows: Annotated[int, typer.Option(help="Rows to choose on.")] = 20_000,
    epochs: Annotated[list[int] | None, typer.Option(help="Passes over the rows.")] = None,
    decay: Annotated[float, typer.Option(help="Variances fall like j ** -decay.")] = 1.0,
    threads: Annotated[int, typer.Option(help="Threads of everyone; 0: their defaults.")] = 0,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 3,
    output: Annotated[Path, typer.Option(help="JSON file.")] = Path("outputs/speed/probe.json"),
) -> None:
    """Time both ways to 32 heads and say how good the best one is."""
    if threads:
        torch.set_num_threads(threads)
    split = draw(rows, held_rows, decay)
    found: dict[str, list[float]] = {}

    def remember(name: str, fit: Callable[[], list[float]]) -> None:
        found[name] = fit()

    contestants: dict[str, Callable[[], object]] = {
        PEER: partial(remember, PEER, partial(fit_sklearn, split))
    }
    shares: dict[str, float] = {}
    for count in epochs or [100, 20]:
        name = f"at once, {count} epochs"
        contestants[name] = partial(remember, name, partial(fit_at_once, split, count))
        for way, run in {"one by one": fit_one_by_one, "plain torch": fit_plainly}.items():
            contestants[f"{way}, {count} epochs"] = partial(run, split, count)
            shares[f"{way}, {count} epochs"] = SLOW_SHARE
    with threadpool_limits(threads or None):
        timings = compare(contestants, PEER, rounds, shares)
    best = {name: max(accuracies) for name, accuracies in found.items()}
    title = f"{len(GRID.configs())} heads on {rows:,} x {DIM}, {CLASSES} classes"
    report(title, timings, PEER, output, best_accuracy=best, accuracies=found, decay=decay)
    for name, accuracy in best.items():
        print(f"{name}: best accuracy on {held_rows:,} held-out rows {accuracy:.4f}")


if __name__ == "__main__":
    typer.run(main)
