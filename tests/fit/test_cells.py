"""Every cell, ties included, against a dense table of all classes that knows the same rule."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_knn import Neighbors, tune
from hf_knn.core.votes import blend_log_probs, knn_log_probs
from hf_knn.fit.blend import Cell, Grid
from hf_knn.fit.cells import CellScorer

CLASSES, TIE, FLOOR = 7, 1e-7, 1e-12
GRID = Grid((1, 2, 5, 17, 90), (1e-4, 0.02, 0.3, 1.0), (0.0, 0.05, 0.5, 0.95, 1.0))


def tied_rows(count: int, head_classes: int, metric: str) -> tuple[Neighbors, Tensor, Tensor]:
    """Rows of which many have classes that tie: the head's, the neighbours', or a blend's."""
    generator = torch.Generator().manual_seed(head_classes)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    votes = torch.randint(CLASSES, (count, 90), generator=generator)
    votes = torch.where(torch.rand(votes.shape, generator=generator) < 0.4, labels[:, None], votes)
    votes[::5] = labels[::5, None]  # all of the label's class
    steps = torch.randint(20, votes.shape, generator=generator)  # equal distances
    similarities = (1 - steps / 40).sort(dim=1, descending=True).values
    if metric == "l2":
        similarities = 30 * (similarities - 1)
    similarities[::11] = -torch.inf  # nobody votes
    similarities[1::11, 3:] = -torch.inf
    logits = torch.randint(3, (count, head_classes), generator=generator).float()  # equal classes
    logits[::3] += torch.randn(logits[::3].shape, generator=generator)
    known = (labels < head_classes).nonzero().flatten()
    logits[known, labels[known]] += torch.randint(3, known.shape, generator=generator)
    logits[4::9] *= 40  # sure, maybe of the wrong class
    return Neighbors(similarities, votes, votes), logits.log_softmax(1), labels


def dense_cells(
    neighbors: Neighbors, head: Tensor, labels: Tensor, grid: Grid, **options: Any
) -> list[Cell]:
    """The same cells from [N, C] probabilities of the blend."""
    rows, classes = torch.arange(len(labels)), torch.arange(CLASSES)
    allowed = torch.where(classes < labels[:, None], -TIE, TIE).double()
    allowed[rows, labels] = torch.inf
    cells = []
    for weight in grid.knn_weights:
        for temperature in grid.temperatures:
            for k in grid.k:
                votes = knn_log_probs(
                    neighbors.similarities[:, :k].double(), neighbors.labels[:, :k], CLASSES,
                    temperature, **options,
                )  # fmt: skip
                blend = blend_log_probs(head.double(), votes, weight).exp()
                own = blend[rows, labels]
                hits = (blend - own[:, None] <= allowed).all(dim=1).double()
                per_class = [float(hits[labels == label].mean()) for label in labels.unique()]
                likelihood = float(own.clamp_min(FLOOR).log().mean())
                mean_class = sum(per_class) / len(per_class)
                cells.append(
                    Cell(k, temperature, weight, float(hits.mean()), mean_class, likelihood)
                )
    return cells


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("weighting", ["softmax", "uniform", "inverse_distance", "rank"])
@pytest.mark.parametrize("head_classes", [7, 5, 1])
def test_cells_with_ties(head_classes: int, weighting: str, metric: str) -> None:
    rows = tied_rows(700, head_classes, metric)
    temperatures = GRID.temperatures if weighting == "softmax" else (1.0,)
    grid = GRID._replace(temperatures=temperatures)
    options: dict[str, Any] = {"metric": metric, "weighting": weighting}
    found = CellScorer(*rows, CLASSES, **options).score(grid)
    wanted = dense_cells(*rows, grid, **options)
    assert [cell[:3] for cell in found] == [cell[:3] for cell in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one[3:5] == pytest.approx(other[3:5], abs=1e-12), (one, other)
        assert one[5] == pytest.approx(other[5], rel=1e-10), (one, other)
    assert len({cell.accuracy for cell in found}) > 3


def test_cells_do_not_depend_on_the_order_of_the_rows() -> None:
    neighbors, head, labels = tied_rows(600, 5, "cosine")
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    moved = Neighbors(*(part[order] for part in neighbors))
    tables = [
        tune(*rows, CLASSES, grid=GRID).table
        for rows in ((neighbors, head, labels), (moved, head[order], labels[order]))
    ]
    for one, other in zip(*tables, strict=True):
        assert one[:5] == other[:5]
        assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-12)


def test_a_label_that_no_voice_holds_possible() -> None:
    """Products of sixteen probabilities at the floor are no zero."""
    neighbors = Neighbors(torch.ones(64, 1), torch.zeros(64, 1, dtype=torch.int64), torch.ones(64))
    head = torch.tensor([0.0, -800.0]).expand(64, 2)
    grid = Grid((1,), (0.14,), (0.0, 1.0))
    table = tune(neighbors, head, torch.ones(64, dtype=torch.int64), 2, grid=grid).table
    for cell in table:
        assert cell.log_likelihood == pytest.approx(math.log(FLOOR), rel=1e-12)
        assert cell.accuracy == 0
