"""`tune` beside a dense torch implementation that makes its grid from one search as well."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from harness import compare, memory, report
from torch import Tensor
from torch.nn import functional

from hf_knn import Neighbors, knn_log_probs, tune
from hf_knn.fit import default_grid

PEER = "dense torch"
DIM, PER_CLASS, K = 64, 50, 512
FLOOR = 1e-12
app = typer.Typer(add_completion=False)


def make_rows(rows: int, classes: int) -> tuple[Neighbors, Tensor, Tensor]:
    """Validation rows of overlapping classes: neighbours, a head's log-probabilities, labels."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, DIM, generator=generator)

    def around(labels: Tensor) -> Tensor:
        noise = torch.randn(len(labels), DIM, generator=generator)
        return functional.normalize(centres[labels] + 1.6 * noise, dim=1)

    stored = torch.arange(classes).repeat_interleave(PER_CLASS)
    store = around(stored)
    labels = torch.randint(classes, (rows,), generator=generator)
    queries = around(labels)
    found = [(block @ store.T).topk(K) for block in queries.split(500)]
    places = torch.cat([part.indices for part in found])
    neighbors = Neighbors(torch.cat([part.values for part in found]), stored[places], places)
    head = (20 * queries @ functional.normalize(centres, dim=1).T).log_softmax(1)
    return neighbors, head, labels


def tune_densely(
    neighbors: Neighbors,
    head: Tensor,
    labels: Tensor,
    ks: list[int],
    temperatures: list[float],
    knn_weights: list[float],
) -> list[tuple[float, float]]:
    """Accuracy and log-likelihood of each cell from [N, C] votes, weight fastest."""
    classes = head.shape[1]
    head_probs = head.exp()
    rows = torch.arange(len(labels))
    cells = []
    for k in ks:
        for temperature in temperatures:
            votes = knn_log_probs(
                neighbors.similarities[:, :k], neighbors.labels[:, :k], classes, temperature
            ).exp()  # [N, C]
            for weight in knn_weights:
                blend = torch.lerp(head_probs, votes, weight)
                accuracy = (blend.argmax(1) == labels).double().mean()
                likelihood = blend[rows, labels].double().clamp_min(FLOOR).log().mean()
                cells.append((float(accuracy), float(likelihood)))
    return cells


@app.command()
def main(
    rows: Annotated[int, typer.Option(help="Validation rows.")] = 10_000,
    classes: Annotated[int, typer.Option(help="Classes.")] = 1000,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 5,
    share: Annotated[int, typer.Option(help="The peer tries one of so many temperatures.")] = 11,
    output: Annotated[Path, typer.Option(help="JSON file.")] = Path("outputs/speed/tuning.json"),
) -> None:
    """Time 22 temperatures x 12 k x 21 weights both ways, and compare all cells they share."""
    neighbors, head, labels = make_rows(rows, classes)
    # the published one: so few labels per class would get a coarse one
    grid = default_grid(PER_CLASS * classes, classes)
    result = tune(neighbors, head, labels, classes, grid=grid)
    ks = sorted({cell.k for cell in result.table})
    temperatures = sorted({cell.temperature for cell in result.table})
    weights = sorted({cell.knn_weight for cell in result.table})
    some = temperatures[1::share]
    dense = tune_densely(neighbors, head, labels, ks, some, weights)
    own = {cell[:3]: cell for cell in result.table}
    cells = [own[k, temperature, w] for k in ks for temperature in some for w in weights]
    gaps = [
        (abs(cell.accuracy - accuracy), abs(cell.log_likelihood - likelihood))
        for cell, (accuracy, likelihood) in zip(cells, dense, strict=True)
    ]
    contestants = {
        PEER: lambda: tune_densely(neighbors, head, labels, ks, some, weights),
        "hf_knn.tune": lambda: tune(neighbors, head, labels, classes, grid=grid),
    }
    timings = compare(contestants, PEER, rounds, {PEER: len(some) / len(temperatures)})
    command = [sys.executable, __file__, "peak", str(rows), str(classes)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    facts = json.loads(done.stdout.splitlines()[-1])
    title = f"{len(result.table):,} cells on {rows:,} rows, {classes:,} classes"
    report(
        title, timings, PEER, output,
        largest_accuracy_gap=max(gap for gap, _ in gaps),
        largest_log_likelihood_gap=max(gap for _, gap in gaps),
        cells_compared=len(gaps), **facts,
    )  # fmt: skip
    print(
        f"peak memory {facts['peak_bytes_over_input'] / 1e9:.2f} GB over the input; of {len(gaps)} "
        f"cells the accuracies differ by at most {max(gap for gap, _ in gaps):.1e}"
    )


@app.command()
def peak(rows: int, classes: int) -> None:
    """Print what `tune` needs beyond its input, as JSON."""
    neighbors, head, labels = make_rows(rows, classes)
    before = memory("VmHWM")
    tune(neighbors, head, labels, classes, grid=default_grid(PER_CLASS * classes, classes))
    print(json.dumps({"peak_bytes_over_input": memory("VmHWM") - before}))


if __name__ == "__main__":
    if sys.argv[1:2] not in (["peak"], ["main"]):
        sys.argv.insert(1, "main")
    app()
