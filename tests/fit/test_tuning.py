"""Every cell against dense log-probabilities, the choice among cells, and the planted trap."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support.oracles import blend_probs, vote_probs
from support.pictures import small_model
from torch import Tensor

import hf_knn
from hf_knn import Datastore, KnnTrainer, KnnTrainingArguments, Neighbors, tune
from hf_knn.core.votes import blend_log_probs, knn_log_probs
from hf_knn.features.extract import ImageFeatures
from hf_knn.fit.blend import (
    KNN_WEIGHTS,
    TEMPERATURES,
    Cell,
    Grid,
    TuneResult,
    default_grid,
    has_few_labels,
)

WEIGHTINGS = ["softmax", "uniform", "inverse_distance", "rank"]
METRICS = ["cosine", "l2"]
GRID = Grid((1, 2, 3, 5, 12), (1e-4, 0.05, 0.14, 1.0, 10.0), (0.0, 0.3, 0.5, 0.95, 1.0))
FLOOR = 1e-12


def planted(
    rows: int = 60, width: int = 12, classes: int = 6, head_classes: int = 6, seed: int = 0,
    metric: str = "cosine",
) -> tuple[Neighbors, Tensor, Tensor]:  # fmt: skip
    """Held-out rows whose neighbours and head are right more often than not."""
    generator = torch.Generator().manual_seed(seed)
    similarities = 2 * torch.rand(rows, width, generator=generator) ** 0.2 - 1
    similarities[::7, :2] = 1.0  # duplicates of the query
    if metric == "l2":
        similarities = 30 * (similarities - 1)
    similarities = similarities.sort(dim=1, descending=True).values
    labels = torch.randint(classes, (rows,), generator=generator)
    votes = torch.randint(classes, (rows, width), generator=generator)
    agree = torch.rand(rows, width, generator=generator) < 0.4
    votes = torch.where(agree, labels.unsqueeze(1), votes)
    votes[::7, 1:2] = votes[::7, :1]
    logits = 2 * torch.randn(rows, head_classes, generator=generator)
    known = labels < head_classes
    logits[known.nonzero().flatten(), labels[known]] += 1.5
    ids = torch.arange(rows * width).reshape(rows, width)
    return Neighbors(similarities, votes, ids), logits.log_softmax(1), labels


class Bounds(NamedTuple):
    """What a cell may score: rows where classes tie to the last bit can go either way."""

    accuracy: tuple[float, float]
    mean_class: tuple[float, float]
    log_likelihood: float


def dense_cell(
    neighbors: Neighbors, head: Tensor, labels: Tensor, classes: int, cell: Cell, **options: Any
) -> Bounds:
    """A cell's scores by way of [N, C] log-probabilities."""
    votes = knn_log_probs(
        neighbors.similarities[:, : cell.k].double(), neighbors.labels[:, : cell.k],
        classes, cell.temperature, **options,
    )  # fmt: skip
    blend = blend_log_probs(head.double(), votes, cell.knn_weight).exp().numpy()
    wanted = labels.numpy()
    own = blend[np.arange(len(wanted)), wanted]
    is_best = blend >= blend.max(axis=1, keepdims=True) * (1 - 1e-9)
    may_win = is_best[np.arange(len(wanted)), wanted]
    both = [may_win & (is_best.sum(axis=1) == 1), may_win]
    per_class = [[right[wanted == label].mean() for label in set(wanted)] for right in both]
    return Bounds(
        (both[0].mean(), both[1].mean()),
        (float(np.mean(per_class[0])), float(np.mean(per_class[1]))),
        float(np.log(np.maximum(own, FLOOR)).mean()),
    )


def assert_cell(cell: Cell, wanted: Bounds) -> None:
    for found, (least, most) in zip(cell[3:5], wanted[:2], strict=True):
        assert least - 1e-12 <= found <= most + 1e-12, (cell, wanted)
    assert cell.log_likelihood == pytest.approx(wanted.log_likelihood, rel=1e-9, abs=1e-12), cell


# cells


@pytest.mark.parametrize("head_classes", [6, 4, 1])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("metric", METRICS)
def test_every_cell_equals_the_dense_one(metric: str, weighting: str, head_classes: int) -> None:
    neighbors, head, labels = planted(head_classes=head_classes, metric=metric)
    if head_classes < 6:
        neighbors.labels[5] = 5  # nothing but neighbours the head does not know
        neighbors.labels[6, :3] = 4
        assert (labels >= head_classes).any()
    options: dict[str, Any] = {"metric": metric, "weighting": weighting}
    result = tune(neighbors, head, labels, 6, grid=GRID, **options)
    temperatures = GRID.temperatures if weighting == "softmax" else GRID.temperatures[:1]
    wanted = {(k, t, w) for k in GRID.k for t in temperatures for w in GRID.knn_weights}
    assert {cell[:3] for cell in result.table} == wanted
    assert len(result.table) == len(wanted)
    free = 0
    for cell in result.table:
        bounds = dense_cell(neighbors, head, labels, 6, cell, **options)
        assert_cell(cell, bounds)
        free += bounds.accuracy[0] != bounds.accuracy[1]
    assert weighting == "uniform" or free <= len(wanted) * 0.25
    assert len({cell.log_likelihood for cell in result.table}) > 4


def test_cells_in_plain_probabilities() -> None:
    neighbors, head, labels = planted(rows=20, head_classes=4)
    distances = 2 - 2 * neighbors.similarities.double().numpy()
    for cell in tune(neighbors, head, labels, 6, grid=GRID).table:
        votes = vote_probs(
            distances[:, : cell.k], neighbors.labels[:, : cell.k].numpy(), 6, "softmax",
            cell.temperature,
        )  # fmt: skip
        blend = blend_probs(head.double().exp().numpy(), votes, cell.knn_weight)
        own = np.maximum(blend[np.arange(20), labels.numpy()], FLOOR)
        assert cell.log_likelihood == pytest.approx(np.log(own).mean(), rel=1e-9)


def test_ties_go_to_the_lowest_class() -> None:
    similarities = torch.tensor([[0.9, 0.9], [0.9, 0.5], [0.5, 0.5]])
    neighbors = Neighbors(similarities, torch.tensor([[2, 1], [1, 2], [0, 2]]), torch.zeros(3, 2))
    head = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5], [0.25, 0.5, 0.25]]).log()
    labels = torch.tensor([1, 1, 1])
    grid = Grid((1, 2), (0.14,), (0.0, 0.5, 1.0))
    result = tune(neighbors, head, labels, 3, grid=grid, weighting="uniform")
    found = {(cell.k, cell.knn_weight): cell.accuracy for cell in result.table}
    assert found == {
        (1, 0.0): pytest.approx(1 / 3),  # the head's 0, 2, 1
        (2, 0.0): pytest.approx(1 / 3),
        (1, 0.5): pytest.approx(1 / 3),  # blends .25 .125 .625, then .125 .625 .25, then 0 and 1
        (2, 0.5): pytest.approx(1 / 3),  # .25 .375 .375 is 1; .125 .375 .5 is 2; .375 .25 .375 is 0
        (1, 1.0): pytest.approx(1 / 3),  # 2, 1, 0
        (2, 1.0): pytest.approx(2 / 3),  # 1 before 2, 1 before 2, 0 before 2
    }


@pytest.mark.parametrize(("votes", "head", "winner"), [
    ([0, 1], [0.0, 0.0, 0.5, 0.5], 0),  # four times .25: a neighbour's class is the lowest
    ([2, 3], [0.5, 0.5, 0.0, 0.0], 0),  # four times .25: the head's choice is
    ([1, 2], [0.25, 0.25, 0.5, 0.0], 2),  # .125 .375 .5 0: no tie
])  # fmt: skip
def test_ties_between_a_neighbour_and_the_first_choice_of_the_head(
    votes: list[int], head: list[float], winner: int
) -> None:
    neighbors = Neighbors(torch.full((1, 2), 0.9), torch.tensor([votes]), torch.zeros(1, 2))
    grid = Grid((2,), (0.14,), (0.5,))
    for label in range(4):
        result = tune(
            neighbors, torch.tensor([head], dtype=torch.float64).log(), torch.tensor([label]), 4,
            grid=grid, weighting="uniform",
        )  # fmt: skip
        assert result.table[0].accuracy == float(label == winner), label


def test_many_rows_are_scored_in_blocks() -> None:
    neighbors, head, labels = planted(rows=5000, width=5, head_classes=5)
    grid = Grid((2, 5), (0.14,), (0.0, 0.5))
    for cell in tune(neighbors, head, labels, 6, grid=grid).table:
        assert_cell(cell, dense_cell(neighbors, head, labels, 6, cell))


def test_without_neighbours_every_weight_is_the_head() -> None:
    neighbors, head, labels = planted(width=0)
    result = tune(neighbors, head, labels, 6, "log_likelihood", grid=GRID)
    assert {cell.k for cell in result.table} == {0}
    assert len({cell[3:] for cell in result.table}) == 1
    assert result.table[0].accuracy == float((head.argmax(1) == labels).double().mean())
    assert result.knn_weight == 0


# grids


def test_the_published_grid() -> None:
    assert pytest.approx([0.05 * i for i in range(21)]) == KNN_WEIGHTS
    assert (KNN_WEIGHTS[0], KNN_WEIGHTS[-1]) == (0, 1)
    hundredths, tenths = [0.01 * i for i in range(1, 10)], [0.1 * i for i in range(1, 10)]
    assert pytest.approx([1e-4, 1e-3, *hundredths, *tenths, 1, 10]) == TEMPERATURES
    grid = default_grid(3000, 30)  # N/C = 100
    assert grid.k == (1, 2, 4, 8, 16, 30, 32, 64, 100, 128, 256, 512)
    assert (grid.temperatures, grid.knn_weights) == (TEMPERATURES, KNN_WEIGHTS)
    assert max(default_grid(10**6, 3).k) >= 512  # not capped at C


def test_the_published_grid_of_a_large_store() -> None:
    assert 1300 in default_grid(13_000, 10).k
    assert 1000 in default_grid(10**6, 1000).k


@pytest.mark.parametrize("coarse", [False, True])
def test_a_small_store_clips_k(coarse: bool) -> None:
    grid = default_grid(7, 2, coarse=coarse)
    assert grid.k == ((1, 5, 7) if coarse else (1, 2, 3, 4, 7))
    assert {0.0, 1.0} <= set(grid.knn_weights)
    assert default_grid(1, 1, coarse=coarse).k == (1,)


def test_the_effective_k_is_reported() -> None:
    neighbors, head, labels = planted(width=7)
    result = tune(neighbors, head, labels, 6, grid=Grid((1, 20, 512), (0.14,), (0.0, 1.0)))
    assert {cell.k for cell in result.table} == {1, 7}
    assert result.fixed.k == 7


# the choice


def by_rule(table: list[Cell], criterion: str, count: int) -> Cell:
    """The rule of the documents, written as a sort."""
    if criterion == "one_standard_error":
        best = max(cell.accuracy for cell in table)
        floor = best - math.sqrt(best * (1 - best) / count)
        table = [cell for cell in table if cell.accuracy >= floor]
    number = {"accuracy": 3, "mean_class": 4}.get(criterion, 5)
    order = sorted(
        table, key=lambda cell: (-cell[number], cell.knn_weight, cell.k, cell.temperature)
    )
    return order[0]


CRITERIA = ["one_standard_error", "accuracy", "mean_class", "log_likelihood"]


def test_each_criterion_picks_by_its_rule() -> None:
    picked: dict[str, set[tuple[float, ...]]] = {name: set() for name in CRITERIA}
    tied = 0  # how often the order of equal cells decided
    for seed in range(16):
        rows = 100 if seed % 2 else 25  # few rows have many ties
        neighbors, head, labels = planted(rows=rows, seed=seed)
        for name in CRITERIA:
            result = tune(neighbors, head, labels, 6, name, grid=GRID)
            best = by_rule(result.table, name, rows)
            chosen = (result.k, result.temperature, result.knn_weight)
            assert chosen == best[:3]
            score = best.accuracy if name == "one_standard_error" else getattr(best, name)
            assert result.score == score
            assert result.criterion == name
            pure = [cell for cell in result.table if cell.knn_weight == 1]
            assert result.best_knn == by_rule(pure, name, rows)
            picked[name].add((seed, *chosen))
            if name == "accuracy":
                tied += sum(cell.accuracy == best.accuracy for cell in result.table) > 1
    # the rules are not four names of one
    assert len({frozenset(cells) for cells in picked.values()}) == 4
    assert tied > 1


def test_one_standard_error_by_eye() -> None:
    # 100 rows, one neighbour. Head right in 60 with p = 0.9, else 0.1; neighbour right in 64.
    right = torch.arange(100) < 64
    votes = torch.where(right, 0, 1).unsqueeze(1)
    neighbors = Neighbors(torch.full((100, 1), 0.9), votes, votes)
    sure = torch.where(torch.arange(100) < 60, 0.9, 0.1)
    head, labels = torch.stack([sure, 1 - sure], dim=1).log(), torch.zeros(100, dtype=torch.int64)
    grid = Grid((1,), (0.14,), (0.0, 1.0))
    # s.e. of 0.64 is 0.048, so 0.60 is within it and has the better likelihood
    result = tune(neighbors, head, labels, 2, "one_standard_error", grid=grid)
    assert (result.knn_weight, result.score) == (0.0, 0.6)
    assert tune(neighbors, head, labels, 2, "accuracy", grid=grid).knn_weight == 1.0
    # of four times the rows it is 0.024, and 0.60 is not
    four = Neighbors(*(part.repeat(4, 1) for part in neighbors))
    result = tune(
        four, head.repeat(4, 1), labels.repeat(4), 2, "one_standard_error", grid=grid
    )  # fmt: skip
    assert (result.knn_weight, result.score) == (1.0, 0.64)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_ties_take_the_smaller_weight_then_k_then_temperature(criterion: str) -> None:
    # both voices certain and right: every cell is perfect
    neighbors, _, labels = planted(rows=100, width=6)
    certain = Neighbors(neighbors.similarities, labels.unsqueeze(1).repeat(1, 6), neighbors.ids)
    head = torch.full((100, 6), -1e4).scatter(1, labels.unsqueeze(1), 0.0)
    grid = Grid((2, 4, 6), (0.5, 0.05, 1.0), (1.0, 0.25, 0.5))
    result = tune(certain, head, labels, 6, criterion, grid=grid)
    assert (result.knn_weight, result.k, result.temperature) == (0.25, 2, 0.05)


def test_a_smaller_weight_comes_before_a_smaller_k() -> None:
    # votes of 1/2, 1/3 and 1/4: with k = 1 class 0 has all of them, with k = 3 class 1 the most
    neighbors = Neighbors(
        torch.tensor([[0.9, 0.8, 0.7]] * 2), torch.tensor([[0, 1, 1]] * 2), torch.zeros(2, 3)
    )
    head = torch.tensor([[0.3, 0.0, 0.7], [0.0, 0.0, 1.0]]).log()
    labels = torch.tensor([2, 0])  # the first is right with k = 3 and 0.4, the second with 1 and 1
    grid = Grid((1, 3), (0.14,), (0.4, 1.0))
    result = tune(neighbors, head, labels, 3, "accuracy", grid=grid, weighting="rank")
    found = {(cell.knn_weight, cell.k): cell.accuracy for cell in result.table}
    assert found == {(0.4, 1): 0, (0.4, 3): 0.5, (1.0, 1): 0.5, (1.0, 3): 0}
    assert (result.knn_weight, result.k) == (0.4, 3)


def test_a_smaller_k_comes_before_a_smaller_temperature() -> None:
    distances = torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0, 1.0], [0.0, 0.05, 0.05, 0.06, 0.5, 0.5]])
    votes = torch.tensor([[0, 1, 1, 0, 0, 0], [0, 1, 2, 1, 0, 0]])
    labels = torch.tensor([1, 1])  # the first is right with k = 3 and T = 10, the second 6 and 0.1
    grid = Grid((3, 6), (0.1, 10.0), (1.0,))
    result = tune(
        Neighbors(-distances, votes, votes), torch.zeros(2, 3), labels, 3, "accuracy",
        grid=grid, metric="l2",
    )  # fmt: skip
    found = {(cell.k, cell.temperature): cell.accuracy for cell in result.table}
    assert found == {(3, 0.1): 0, (3, 10.0): 0.5, (6, 0.1): 0.5, (6, 10.0): 0}
    assert (result.k, result.temperature) == (3, 10.0)


def test_the_weight_falls_back_to_either_pure_voice() -> None:
    neighbors, head, labels = planted(rows=200)
    wrong = (labels + 1) % 6
    useless = torch.full((200, 6), -8.0).scatter(1, wrong.unsqueeze(1), 0.0).log_softmax(1)
    result = tune(neighbors, useless, labels, 6, "log_likelihood")
    assert result.knn_weight == 1
    lost = Neighbors(neighbors.similarities, wrong.unsqueeze(1).repeat(1, 12), neighbors.ids)
    assert tune(lost, head, labels, 6, "log_likelihood").knn_weight == 0


def test_neighbours_that_add_nothing_still_explain() -> None:
    """At λ = 0 every k and temperature is alike: those of the neighbours alone are taken."""
    neighbors, _, labels = planted(rows=200)
    head = torch.full((200, 6), -9.0).scatter(1, labels.unsqueeze(1), 0.0).log_softmax(1)
    result = tune(neighbors, head, labels, 6)
    assert result.knn_weight == 0
    assert (result.k, result.temperature) == (result.best_knn.k, result.best_knn.temperature)
    smallest = min(result.table, key=lambda cell: (cell.k, cell.temperature))
    assert (result.k, result.temperature) != smallest[:2]
    assert result.say("here").endswith("The neighbours add nothing here; they still explain.")
    assert "add nothing" not in tune(neighbors, 0 * head, labels, 6).say("here")


def test_few_labels_leave_the_fixed_cell_and_take_the_coarse_grid() -> None:
    assert [has_few_labels(count, 6) for count in (95, 96, 97)] == [True, False, False]
    for rows, few in ((95, True), (96, False)):
        neighbors, head, labels = planted(rows=rows, width=3)
        result = tune(neighbors, head, labels, 6)
        assert result.criterion == ("fixed" if few else "one_standard_error")
        assert (result.has_few_labels, result.rows) == (few, rows)
        cell = (result.k, result.temperature, result.knn_weight)
        assert (cell == (20, 0.14, 0.5)) == few  # three neighbours vote, but 20 may
        assert result.fixed[:3] == (3, 0.14, 0.5)
        temperatures = {cell.temperature for cell in result.table}
        weights = {cell.knn_weight for cell in result.table}
        assert (len(temperatures), len(weights)) == ((4, 5) if few else (22, 21))
        assert 0.14 in temperatures or not few
        assert {0.0, 0.5, 1.0} <= weights
    neighbors, head, labels = planted(rows=95, width=3)
    assert tune(neighbors, head, labels, 6, "accuracy").criterion == "accuracy"


@pytest.mark.parametrize("rows", [60, 200])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_head_and_fixed_cell_are_reported(rows: int, weighting: str) -> None:
    neighbors, head, labels = planted(rows=rows, width=30, head_classes=5)
    result = tune(neighbors, head, labels, 6, weighting=weighting)
    assert isinstance(result, TuneResult)
    assert (result.fixed.k, result.fixed.temperature, result.fixed.knn_weight) == (20, 0.14, 0.5)
    assert result.head.knn_weight == 0
    for cell in (result.fixed, result.head):
        assert_cell(cell, dense_cell(neighbors, head, labels, 6, cell, weighting=weighting))
    assert result.best_knn.knn_weight == 1


# refused


def test_no_rows_and_shapes_that_disagree() -> None:
    neighbors, head, labels = planted()
    empty = Neighbors(*(part[:0] for part in neighbors))
    with pytest.raises(ValueError, match="0, 0 and 0"):
        tune(empty, head[:0], labels[:0], 6)
    with pytest.raises(ValueError, match="60, 59 and 60"):
        tune(neighbors, head[1:], labels, 6)
    with pytest.raises(ValueError, match="60, 60 and 58"):
        tune(neighbors, head, labels[2:], 6)


@pytest.mark.parametrize(
    "options", [{"criterion": "auc"}, {"metric": "dot"}, {"weighting": "gauss"}]
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options.values()))):
        tune(*planted(), 6, **options)


def test_the_public_name() -> None:
    assert hf_knn.tune is tune


# the trap


def islands(count: int, seed: int) -> ImageFeatures:
    """Four classes of five islands each, in so many dimensions that a line can part any rows."""
    centres = torch.randn(20, 96, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(seed)
    island = torch.randint(20, (count,), generator=generator)
    noise = torch.randn(count, 96, generator=generator)
    flipped = torch.rand(count, generator=generator) < 0.1
    labels = torch.where(flipped, torch.randint(4, (count,), generator=generator), island % 4)
    return ImageFeatures(centres[island] + 1.3 * noise, labels, torch.arange(count))


def held_out_likelihood(
    trainer: KnnTrainer, rows: ImageFeatures, result: TuneResult
) -> tuple[float, float]:
    """Mean log p(label) and accuracy of the blend of a chosen cell."""
    store = trainer.model.datastore
    assert store is not None
    hits = store.search(rows.features, result.k)
    with torch.no_grad():
        head = trainer.model.head(rows.features).log_softmax(1)
    cell = Cell(result.k, result.temperature, result.knn_weight, 0, 0, 0)
    bounds = dense_cell(hits, head, rows.labels, 4, cell)
    return bounds.log_likelihood, bounds.accuracy[0]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_head_that_has_seen_the_rows_is_a_trap(seed: int, tmp_path: Path) -> None:
    train, test = islands(160, seed), islands(1500, 77 + seed)
    model = small_model(4, backbone=None)
    model.config.feature_dim = 96
    model.head = type(model.head)(96, 4)
    arguments = KnnTrainingArguments(
        str(tmp_path), freeze_backbone=True, num_train_epochs=80, learning_rate=0.05,
        per_device_train_batch_size=160, tune_criterion="log_likelihood", seed=seed,
        save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
        use_cpu=True,
    )  # fmt: skip
    trainer = KnnTrainer(model, arguments, train_dataset=train)
    trainer.train()
    store = trainer.model.datastore
    assert isinstance(store, Datastore)
    with torch.no_grad():
        in_sample = trainer.model.head(train.features).log_softmax(1)
    assert (in_sample.argmax(1) == train.labels).double().mean() > 0.99  # memorised
    neighbors = store.search(train.features, len(train) - 1, exclude_ids=train.ids)
    trapped = tune(neighbors, in_sample, train.labels, 4, "log_likelihood")
    assert trapped.knn_weight <= 0.05

    honest = trainer.tune()
    assert honest.knn_weight >= 0.2
    config = trainer.model.config
    chosen = (config.k, config.knn_temperature, config.knn_weight)
    assert chosen == (honest.k, honest.temperature, honest.knn_weight)
    likelihoods = [held_out_likelihood(trainer, test, result) for result in (honest, trapped)]
    assert likelihoods[0][0] > likelihoods[1][0] + 0.05
    assert likelihoods[0][1] > likelihoods[1][1]
    # what the folds say about the head is what the test says, not what the training rows say
    assert honest.head.accuracy == pytest.approx(likelihoods[1][1], abs=0.12)
    assert trapped.head.accuracy > likelihoods[1][1] + 0.12


@pytest.mark.parametrize("read", [lambda grid: grid.k, lambda grid: grid.temperatures])
def test_grids_are_ascending(read: Callable[[Grid], tuple[float, ...]]) -> None:
    for rows, classes in ((50, 3), (600, 7), (10**5, 100)):
        for coarse in (True, False):
            values = list(read(default_grid(rows, classes, coarse=coarse)))
            assert values == sorted(set(values))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("labels", lambda values: values + 2, r"`labels` to be in \[0, 2\), but .* from 2"),
        ("labels", lambda values: values - 1, r"`labels` to be in \[0, 2\), but .* from -1"),
        ("labels", lambda values: values.float(), "`labels` to be int64"),
        ("neighbors", lambda values: values + 5, r"`neighbors.labels` to be in \[0, 2\)"),
        ("head", lambda values: values * torch.nan, r"without NaN, but rows \[0, 1, 2, 3\]"),
        ("head", lambda values: torch.zeros(4, 3), r"to be \[N, 1 to 2\], but got \(4, 3\)"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(
    part: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    labels = torch.tensor([0, 1, 0, 1])
    parts = {"labels": labels, "neighbors": labels.unsqueeze(1), "head": torch.zeros(4, 2)}
    parts[part] = change(parts[part])
    near = Neighbors(torch.ones(4, 1), parts["neighbors"], torch.arange(4).unsqueeze(1))
    with pytest.raises(ValueError, match=message):
        tune(near, parts["head"], parts["labels"], 2)
