"""Many heads on cached features at once, beside scikit-learn one by one and us one by one."""

import warnings
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from harness import compare, report
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional

from hf_knn.fit import ProbeGrid, ProbeSettings, choose_probe, score_probes, train_probes

PEER, BATCHED, ONE_BY_ONE = "32 x LogisticRegression", "32 heads at once", "32 heads, one by one"
GRID = ProbeGrid(
    learning_rates=(1.0, 0.5, 0.25, 0.1, 0.05, 0.025, 0.01, 0.005),
    weight_decays=(1e-2, 1e-3, 1e-4, 0.0),
)
_SHARE = 8  # one by one we train one of so many
REGULARIZERS = np.logspace(-4, 4, 32)


def make_features(
    rows: int, held_out: int, dim: int, classes: int, spread: float
) -> tuple[Tensor, ...]:
    """Unit vectors of overlapping classes: features and labels to fit, and to choose on."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, dim, generator=generator)
    labels = torch.randint(classes, (rows + held_out,), generator=generator)
    noise = torch.randn(rows + held_out, dim, generator=generator)
    features = functional.normalize(centres[labels] + spread * noise, dim=1)
    return features[:rows], labels[:rows], features[rows:], labels[rows:]


def main(
    rows: Annotated[int, typer.Option(help="Rows to fit.")] = 10_000,
    dim: Annotated[int, typer.Option(help="Width of a row.")] = 384,
    classes: Annotated[int, typer.Option(help="Classes.")] = 100,
    spread: Annotated[float, typer.Option(help="Of the classes: 3.5 is easy, 7 is hard.")] = 7.0,
    epochs: Annotated[int, typer.Option(help="Of each head.")] = 100,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 3,
    output: Annotated[Path, typer.Option(help="JSON file.")] = Path("outputs/speed/heads.json"),
) -> None:
    """Time both, and compare the accuracy of the best head of each on rows held out."""
    features, labels, held_out, wanted = make_features(rows, 5000, dim, classes, spread)
    settings = ProbeSettings(epochs=epochs, batch_size=512)
    found: dict[str, float] = {}

    def sklearn() -> None:
        """Standardised as our heads do it themselves."""
        mean = features.mean(0)
        scale = float((features - mean).pow(2).mean().sqrt())
        fitted, asked = ((part - mean).numpy() / scale for part in (features, held_out))
        scores = []
        for strength in REGULARIZERS:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                model = LogisticRegression(C=strength, max_iter=100).fit(fitted, labels.numpy())
            scores.append(float(model.score(asked, wanted.numpy())))
        found[PEER] = max(scores)

    def at_once() -> None:
        heads = train_probes(features, labels, classes, GRID, settings, progress=False)
        table = score_probes(heads, held_out, wanted)
        found[BATCHED] = max(row.accuracy for row in table if not row.diverged)
        found["chosen of 32"] = choose_probe(table, len(wanted)).score.accuracy

    def one_by_one() -> None:
        for config in GRID.configs()[::_SHARE]:
            heads = train_probes(features, labels, classes, [config], settings, progress=False)
            score_probes(heads, held_out, wanted)

    contestants = {PEER: sklearn, BATCHED: at_once, ONE_BY_ONE: one_by_one}
    timings = compare(contestants, PEER, rounds, {ONE_BY_ONE: 1 / _SHARE})
    title = (
        f"32 configurations x {epochs} epochs on {rows:,} x {dim}, {classes} classes, "
        f"spread {spread:g}"
    )
    report(title, timings, PEER, output, best_held_out_accuracy=found)
    print(", ".join(f"{name}: {value:.2%}" for name, value in found.items()))


if __name__ == "__main__":
    typer.run(main)
