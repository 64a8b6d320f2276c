"""The ridge head against scikit-learn, least squares on N - 1 rows, and full refits."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]
from scipy.special import logsumexp  # type: ignore[import-untyped]
from sklearn.linear_model import Ridge, RidgeClassifierCV, RidgeCV
from sklearn.utils.class_weight import compute_sample_weight
from torch import Tensor

from hf_knn import ridge
from hf_knn.functional import class_weights
from hf_knn.ridge import (
    RELATIVE_REGULARIZERS,
    RidgeFit,
    RidgeScore,
    RidgeState,
    default_regularizers,
    fit_ridge,
    fit_temperature,
    leave_one_out_logits,
)

INF = math.inf
WEIGHTINGS = ["none", "inverse", "inverse_sqrt"]
SHAPES = [(40, 6, 3), (12, 30, 4), (30, 30, 2), (9, 1, 3)]  # rows, width, classes

Floats = NDArray[np.float64]


def clusters(
    rows: int, width: int, classes: int, seed: int = 0, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Overlapping clusters of unequal size, each class at least twice."""
    generator = np.random.default_rng(seed)
    twice = np.repeat(np.arange(classes), 2)
    others = np.minimum(generator.geometric(0.4, rows) - 1, classes - 1)
    labels = np.concatenate([twice, others])[:rows]
    centers = generator.normal(size=(classes, width))
    features = centers[labels] + generator.normal(size=(rows, width)) + offset
    return torch.from_numpy(features), torch.from_numpy(labels)


def row_weights(labels: NDArray, weighting: str) -> Floats:
    """[N] plain formula: 1 / count or 1 / sqrt(count), mean 1."""
    counts = np.bincount(labels)[labels].astype(float)
    weights = counts ** {"none": 0.0, "inverse": -1.0, "inverse_sqrt": -0.5}[weighting]
    return weights / weights.mean()


def least_squares(
    features: NDArray, targets: NDArray, regularizer: float, weights: NDArray
) -> tuple[Floats, Floats]:
    """Weight [C, D] and bias [C] by one call of lstsq: penalties are rows of the system."""
    rows, width = features.shape
    roots = np.sqrt(weights)[:, None]
    system = np.zeros((rows + width, width + 1))
    system[:rows] = np.hstack([features, np.ones((rows, 1))]) * roots
    system[rows:, :width] = np.sqrt(regularizer) * np.eye(width)
    wanted = np.vstack([targets * roots, np.zeros((width, targets.shape[1]))])
    solution = np.linalg.lstsq(system, wanted, rcond=None)[0]
    return solution[:-1].T, solution[-1]


def refits(features: Tensor, labels: Tensor, classes: int, regularizer: float, weighting: str):
    """[N, C] the prediction for each row by a fit on the others, with the weights of all."""
    x, y = features.double().numpy(), labels.numpy()
    targets, weights = np.eye(classes)[y], row_weights(y, weighting)
    predictions = np.zeros_like(targets)
    for i in range(len(x)):
        others = np.arange(len(x)) != i
        weight, bias = least_squares(x[others], targets[others], regularizer, weights[others])
        predictions[i] = weight @ x[i] + bias
    return predictions


def assert_same(found: Sequence[Tensor], wanted: Sequence[Tensor], part: float = 1e-8) -> None:
    """Equal relative to the largest number; infinite in the same places."""
    for mine, other in zip(found, wanted, strict=True):
        assert mine.shape == other.shape
        assert not mine.isnan().any()
        assert (mine.isfinite() == other.isfinite()).all()
        size = float(other[other.isfinite()].abs().amax()) if other.isfinite().any() else 0.0
        gap = torch.where(other.isfinite(), mine - other, 0).abs()
        # one row alone has weight 0 in a refit, a rounding error after updates
        assert (gap <= part * size + 1e-13).all(), f"{gap.max()} of {size}"


# points by eye


def test_two_points_by_eye() -> None:
    # at -1 and 1: the mean is 0, the Gram matrix 2; targets about their mean are -1/2 and 1/2, so
    # X'Y = 1 for class 1; with r = 2 the weight is 1 / (2 + 2), the bias the mean target
    state = RidgeState.from_rows(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1]))
    weight, bias = state.solve(2.0)
    assert weight.tolist() == [[-0.25], [0.25]]
    assert bias.tolist() == [0.5, 0.5]
    assert weight.dtype == bias.dtype == torch.float64
    # a third class that nobody has
    state = RidgeState.from_rows(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1]), 3)
    weight, bias = state.solve(2.0)
    assert weight.tolist() == [[-0.25], [0.25], [0.0]]
    assert bias.tolist() == [0.5, 0.5, -INF]


def test_three_points_left_out_by_eye() -> None:
    # without the row at 4 the others lie together at 0: the fit is their mean target, (1/2, 1/2)
    # without a row at 0 (label 1): points 0 and 4 with labels 0, 1; mean 2, Gram matrix 8, X'Y = 2
    # for class 1, r = 8: weight 1/8, bias 1/2 - 2/8 = 1/4: class 1 has 1/4 at 0, class 0 has 3/4
    x, y = torch.tensor([[0.0], [0.0], [4.0]]), torch.tensor([0, 1, 1])
    found = leave_one_out_logits(RidgeState.from_rows(x, y), x, y, 8.0)
    assert found[1].tolist() == pytest.approx([0.75, 0.25])
    assert found[2].tolist() == pytest.approx([0.5, 0.5])
    assert found[0].tolist() == pytest.approx([0, 1])  # class 0 has no other row


# scikit-learn and refits


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_solution_equals_sklearn(
    shape: tuple[int, int, int], weighting: str, offset: float
) -> None:
    x, y = clusters(*shape, offset=offset)
    state = RidgeState.from_rows(x, y, class_weighting=weighting)
    balance = {"none": None, "inverse": "balanced"}
    for regularizer in (1e-3, 1.0, 100.0):
        weight, bias = state.solve(regularizer)
        weights = row_weights(y.numpy(), weighting)
        model = Ridge(regularizer).fit(x.numpy(), np.eye(shape[2])[y], sample_weight=weights)
        np.testing.assert_allclose(weight.numpy(), model.coef_, rtol=1e-7, atol=1e-9)
        logits = torch.addmm(bias, x, weight.T)
        np.testing.assert_allclose(logits.numpy(), model.predict(x.numpy()), atol=1e-7)
        if weighting != "inverse_sqrt":
            same = compute_sample_weight(balance[weighting], y.numpy())
            np.testing.assert_allclose(weights, same)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_row_weights_are_those_of_the_loss(weighting: str) -> None:
    x, y = clusters(40, 3, 3)
    state = RidgeState.from_rows(x, y, 5, class_weighting=weighting)
    wanted = class_weights(y, 5, weighting).double()
    torch.testing.assert_close(state.row_weights, wanted, rtol=1e-6, atol=0)
    rows = torch.from_numpy(row_weights(y.numpy(), weighting))
    torch.testing.assert_close(state.row_weights[y], rows, rtol=1e-12, atol=0)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("regularizer", [1e-3, 0.5, 50.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_leave_one_out_equals_refits(
    shape: tuple[int, int, int], regularizer: float, weighting: str
) -> None:
    x, y = clusters(*shape)
    y[-1] = shape[2]  # the only row of its class
    state = RidgeState.from_rows(x, y, class_weighting=weighting)
    found = leave_one_out_logits(state, x, y, regularizer)
    wanted = refits(x, y, shape[2] + 1, regularizer, weighting)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_scores_equal_refits(weighting: str) -> None:
    x, y = clusters(40, 6, 3)
    y[-1] = 3
    fit = fit_ridge(x, y, 6, regularizers=[3.0, 0.1], class_weighting=weighting)
    assert [score.regularizer for score in fit.table] == [0.1, 3.0]
    kept, weights = np.arange(40) < 39, row_weights(y.numpy(), weighting)
    for score in fit.table:
        out = refits(x, y, 4, score.regularizer, weighting)[kept]
        labels, share = y.numpy()[kept], weights[kept] / weights[kept].sum()
        assert score.accuracy == pytest.approx(share @ (out.argmax(1) == labels))
        errors = ((out - np.eye(4)[labels]) ** 2).sum(1)
        assert score.squared_error == pytest.approx(share @ errors, rel=1e-9)
        best = minimize_scalar(
            lambda b, out=out, labels=labels, share=share: -mean_log_prob(out, labels, b, share),
            bounds=(0, 100), method="bounded", options={"xatol": 1e-10},
        )  # fmt: skip
        assert score.log_likelihood == pytest.approx(-best.fun, rel=1e-9)
        assert score.temperature == pytest.approx(1 / best.x, rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_choice_equals_sklearn(shape: tuple[int, int, int]) -> None:
    x, y = clusters(*shape)
    grid = [1e-2, 0.1, 1.0, 10.0, 100.0]
    fit = fit_ridge(x, y, regularizers=grid, criterion="squared_error")
    targets = np.eye(shape[2])[y]
    model = RidgeCV(grid, store_cv_results=True).fit(x.numpy(), targets)
    assert fit.regularizer == model.alpha_
    errors = model.cv_results_.reshape(len(y), shape[2], len(grid)).sum(1).mean(0)
    assert [score.squared_error for score in fit.table] == pytest.approx(errors.tolist())
    classifier = RidgeClassifierCV(grid).fit(x.numpy(), y.numpy())
    assert fit.regularizer == classifier.alpha_
    assert fit.log_probs(x).argmax(1).tolist() == classifier.predict(x.numpy()).tolist()


def test_the_criterion_decides() -> None:
    x, y = clusters(60, 8, 4, seed=3)
    grid = np.logspace(-3, 4, 15).tolist()
    for criterion in ("accuracy", "squared_error", "log_likelihood"):
        fit = fit_ridge(x, y, regularizers=grid, criterion=criterion)
        values = [getattr(score, criterion) for score in fit.table]
        best = min(values) if criterion == "squared_error" else max(values)
        chosen = next(score for score in fit.table if score.regularizer == fit.regularizer)
        assert getattr(chosen, criterion) == best
        assert chosen.temperature == fit.temperature
        others = [score.temperature for score in fit.table if score is not chosen]
        assert np.isnan(others).all() == (criterion != "log_likelihood")
    assert fit_ridge(x, y, regularizers=grid).table == fit.table  # the likelihood is the default


def test_ties_go_to_the_larger_regulariser() -> None:
    x = torch.tensor([[-1.0], [-1.0], [1.0], [1.0]])
    y = torch.tensor([0, 0, 1, 1])
    fit = fit_ridge(x, y, regularizers=[1.0, 1.0 + 1e-16, 1e-3], criterion="accuracy")
    assert {score.accuracy for score in fit.table} == {1.0}
    assert fit.regularizer == 1e-3  # its squared error is smaller
    constant = fit_ridge(torch.ones(4, 2), y, criterion="accuracy")
    assert constant.regularizer == RELATIVE_REGULARIZERS[-1]


# updates


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    steps=st.lists(st.sampled_from(["add", "remove", "relabel"]), min_size=1, max_size=12),
    width=st.integers(1, 12),
    offset=st.sampled_from([0.0, 1.0, 30.0]),
    regularizer=st.sampled_from([1e-2, 1.0, 30.0]),
)
def test_updates_equal_a_refit(
    weighting: str, seed: int, steps: list[str], width: int, offset: float, regularizer: float
) -> None:
    generator = np.random.default_rng(seed)
    state = RidgeState(width, class_weighting=weighting)
    x, y = torch.empty(0, width, dtype=torch.float64), torch.empty(0, dtype=torch.int64)
    for step in steps:
        picked = torch.from_numpy(generator.permutation(len(x))[: generator.integers(0, 6)])
        kept = torch.ones(len(x), dtype=torch.bool)
        kept[picked] = False
        if step == "add":
            count = int(generator.integers(1, 8))
            new = torch.from_numpy(generator.normal(offset, 1, (count, width)))
            new[count // 2 :] = new[0].clone()  # duplicates
            labels = torch.from_numpy(generator.integers(0, 5, count))
            state.add(new, labels)
            x, y = torch.cat([x, new]), torch.cat([y, labels])
        elif step == "remove":
            state.remove(x[picked], y[picked])
            x, y = x[kept], y[kept]
        else:
            labels = torch.from_numpy(generator.integers(0, 6, len(picked)))
            state.relabel(x[picked], y[picked], labels)
            y[picked] = labels
        assert state.counts.tolist() == torch.bincount(y, minlength=state.num_labels).tolist()
    refit = RidgeState.from_rows(x, y, state.num_labels, weighting)
    assert len(state) == len(x)
    assert_same(state.solve(regularizer), refit.solve(regularizer))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_many_single_updates_equal_a_refit(weighting: str) -> None:
    x, y = clusters(900, 24, 7, seed=5)
    x = torch.nn.functional.normalize(x - x.mean(0), dim=1)
    state = RidgeState.from_rows(x[:300], y[:300], class_weighting=weighting)
    for i in range(300, 900):  # a window of 300 rows that moves over all of them
        state.add(x[i : i + 1], y[i : i + 1])
        state.remove(x[i - 300 : i - 299], y[i - 300 : i - 299])
    refit = RidgeState.from_rows(x[600:], y[600:], state.num_labels, weighting)
    assert_same(state.solve(1e-2), refit.solve(1e-2))


def test_a_taught_class_gets_its_row_and_loses_it() -> None:
    x, y = clusters(40, 6, 3)
    state = RidgeState.from_rows(x, y)
    before = state.solve(1.0)
    new, labels = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)), torch.full((5,), 4)
    state.add(new, labels)
    weight, bias = state.solve(1.0)
    assert weight.shape == (5, 6)
    assert bias.isfinite().tolist() == [True, True, True, False, True]
    assert weight[3].abs().max() == 0
    state.remove(new, labels)
    weight, bias = state.solve(1.0)
    assert bias[3:].tolist() == [-INF, -INF]
    assert_same((weight[:3], bias[:3]), before)
    log_probs = RidgeFit(weight, bias, 0.5, 1.0, [], state).log_probs(new)
    assert log_probs[:, 3:].max() == -INF
    assert log_probs.exp().sum(1).tolist() == pytest.approx([1] * 5)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_all_rows_gone_is_a_state_without_rows(weighting: str) -> None:
    x, y = clusters(12, 4, 3)
    state = RidgeState.from_rows(x, y, class_weighting=weighting)
    state.remove(x, y)
    assert len(state) == 0
    assert state.sums.abs().max() == state.grams.abs().max() == 0
    weight, bias = state.solve(1.0)
    assert weight.tolist() == [[0] * 4] * 3
    assert bias.tolist() == [0] * 3
    far = x + 1e6  # the next rows decide the shift anew
    state.add(far, y)
    assert_same(state.solve(1.0), RidgeState.from_rows(far, y, 0, weighting).solve(1.0))


def test_a_copy_is_independent() -> None:
    x, y = clusters(12, 4, 3)
    state = RidgeState.from_rows(x, y)
    other = state.copy()
    other.add(x, y)
    other.sums[:] = 7
    assert_same(state.solve(1.0), RidgeState.from_rows(x, y).solve(1.0))


@pytest.mark.parametrize(
    "change",
    [
        lambda state, x, y: state.remove(x, torch.full_like(y, 2)),
        lambda state, x, y: state.remove(x, torch.full_like(y, 9)),
        lambda state, x, y: state.relabel(x, torch.full_like(y, 2), y),
        lambda state, x, y: state.relabel(x, y, y - 1),
        lambda state, x, y: state.relabel(x, y, y[:-1]),
        lambda state, x, y: state.add(x.index_fill(0, torch.tensor([7]), math.nan), y),
        lambda state, x, y: state.add(x, y - 5),
    ],
)
def test_a_refused_change_changes_nothing(change: Callable[..., None]) -> None:
    x, y = clusters(12, 4, 3)
    for weighting in WEIGHTINGS:
        state = RidgeState.from_rows(x, y, class_weighting=weighting)
        before = state.copy()
        with pytest.raises(ValueError, match="Expected"):
            change(state, x, y)
        for name in ("shift", "counts", "sums", "grams"):
            assert torch.equal(getattr(state, name), getattr(before, name)), name


# temperature


def mean_log_prob(logits: NDArray, labels: NDArray, sharpness: float, weights: NDArray) -> float:
    scaled = logits * sharpness
    own = scaled[np.arange(len(labels)), labels] - logsumexp(scaled, axis=1)
    return float(own @ weights / weights.sum())


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(2, 60),
    classes=st.integers(2, 6),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e5]),
    weighted=st.booleans(),
)
def test_temperature_equals_scipy(
    seed: int, rows: int, classes: int, scale: float, weighted: bool
) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(rows, classes))
    labels = generator.integers(0, classes, rows)
    logits[np.arange(rows), labels] += 1
    weights = generator.uniform(0.1, 2, rows) if weighted else np.ones(rows)
    options = torch.from_numpy(weights) if weighted else None
    values = torch.from_numpy(logits * scale)
    found = fit_temperature(values, torch.from_numpy(labels), options) / scale
    best = minimize_scalar(
        lambda log_b: -mean_log_prob(logits, labels, math.exp(log_b), weights),
        bounds=(-12, 12), method="bounded", options={"xatol": 1e-10},
    )  # fmt: skip
    at_found = mean_log_prob(logits, labels, 1 / found, weights)
    surest = math.log1p(-0.5 / (rows + 1))
    if -best.fun > surest:  # right on every row: likelihoods without a maximum are cut there
        assert at_found == pytest.approx(surest, rel=1e-6)
    elif best.x > -6:
        assert at_found == pytest.approx(-best.fun, rel=1e-9, abs=1e-12)
        assert found == pytest.approx(math.exp(-best.x), rel=1e-3)
    else:  # the logits are worse than nothing
        assert at_found == pytest.approx(-math.log(classes), rel=1e-2)
    assert fit_temperature(values, torch.from_numpy(labels), options) / scale == found


def test_temperature_by_eye() -> None:
    # right with margin 1 three times of four: sigmoid(1 / T) = 3/4 at 1 / T = log 3
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    labels = torch.tensor([0, 0, 1, 1])
    assert fit_temperature(logits, labels) == pytest.approx(1 / math.log(3))
    # right four times of four: a chance of 0.1 to fail, sigmoid(1 / T) = 0.9
    labels = torch.tensor([0, 0, 1, 0])
    assert fit_temperature(logits, labels) == pytest.approx(1 / math.log(9))
    # always wrong
    assert fit_temperature(logits, 1 - labels) == pytest.approx(500)  # the spread is 1/2
    # says nothing
    assert fit_temperature(torch.ones(3, 4), torch.tensor([0, 1, 2])) == 1
    assert fit_temperature(torch.tensor([[3.0]]), torch.tensor([0])) == 1


def test_temperature_with_impossible_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (30,), generator=generator)
    wider = torch.cat([logits, torch.full((30, 2), -INF, dtype=torch.float64)], dim=1)
    assert fit_temperature(wider, labels) == pytest.approx(fit_temperature(logits, labels))


def test_rows_without_weight_do_not_count() -> None:
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [5.0, 0.0]])
    labels = torch.tensor([0, 0, 1, 1, 1])
    weights = torch.tensor([1.0, 1, 1, 1, 0])
    assert fit_temperature(logits, labels, weights) == pytest.approx(1 / math.log(3))


# hard numbers


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_scales_that_are_powers_of_two_change_nothing(weighting: str) -> None:
    x, y = clusters(30, 5, 3, offset=2.0)
    plain = fit_ridge(x, y, class_weighting=weighting)
    for power in (-140, -40, 30, 140):
        scale = 2.0**power
        fit = fit_ridge(x * scale, y, class_weighting=weighting)
        assert fit.regularizer == pytest.approx(plain.regularizer * scale**2)
        assert_same((fit.weight * scale, fit.bias), (plain.weight, plain.bias), 1e-9)
        assert fit.temperature == pytest.approx(plain.temperature)


def test_a_large_mean_cancels_nothing() -> None:
    x, y = clusters(60, 8, 3)
    x = (x * 2**20).round() / 2**20  # so that the offset is added without rounding
    plain = RidgeState.from_rows(x, y).solve(1.0)
    far = RidgeState.from_rows(x + 2.0**30, y)
    weight, _ = far.solve(1.0)
    assert_same([weight], [plain[0]])
    far.add(x[:5] + 2.0**30, y[:5])
    near = RidgeState.from_rows(torch.cat([x, x[:5]]), torch.cat([y, y[:5]]))
    assert_same([far.solve(1.0)[0]], [near.solve(1.0)[0]])


def test_float16_and_float32_rows_are_what_they_say() -> None:
    x, y = clusters(50, 6, 3)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        low = x.to(dtype)
        wanted = RidgeState.from_rows(low.double(), y).solve(1.0)
        assert_same(RidgeState.from_rows(low, y).solve(1.0), wanted, 1e-12)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([[1.0, 2.0]], [0]),  # one row
        ([[1.0, 2.0]], [3]),
        ([[1.0, 2.0], [1.0, 2.0]], [0, 1]),  # the same row twice, each class once
        ([[1.0, 2.0], [3.0, 1.0], [0.0, 1.0]], [0, 0, 0]),  # one class
        ([[1.0, 2.0]] * 4, [0, 0, 1, 1]),  # all the same
        ([[0.0, 0.0]] * 4, [0, 0, 1, 1]),
        ([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0], [0.0, 4.0]], [0, 1, 0, 1]),  # a constant column
        ([[1e-200, 0.0], [0.0, 1e-200], [0.0, 0.0], [1.0, 1.0]], [0, 1, 0, 1]),
        ([[1e99, 0.0], [0.0, 1e99], [1.0, 0.0], [1.0, 1.0]], [0, 1, 0, 1]),
        ([[1.0] * 9, [2.0] * 9, [3.0] * 9, [9.0] * 9], [0, 0, 1, 1]),  # wide, rank 1
    ],
)
def test_degenerate_rows_give_numbers(x: list, y: list, weighting: str) -> None:
    rows, labels = torch.tensor(x, dtype=torch.float64), torch.tensor(y)
    for regularizers in (None, [1e-300], [1e-12, 1e12]):
        for criterion in ("accuracy", "squared_error", "log_likelihood"):
            fit = fit_ridge(
                rows, labels, 5, regularizers=regularizers, criterion=criterion,
                class_weighting=weighting,
            )  # fmt: skip
            assert fit.weight.isfinite().all()
            has_rows = torch.bincount(labels, minlength=5) > 0
            assert (fit.bias.isfinite() == has_rows).all()
            assert 0 < fit.temperature < INF
            assert not fit.log_probs(rows).isnan().any()
            assert all(math.isfinite(score.squared_error) for score in fit.table)
        state = RidgeState.from_rows(rows, labels, 5, weighting)
        assert not leave_one_out_logits(state, rows, labels, 1e-6).isnan().any()


def test_rows_that_all_stand_alone_take_the_middle_of_the_grid() -> None:
    fit = fit_ridge(torch.eye(3), torch.tensor([0, 1, 2]))
    grid = default_regularizers(fit.state)
    assert (fit.regularizer, fit.temperature, fit.table) == (grid[6], 1.0, [])
    assert fit.log_probs(torch.eye(3)).argmax(1).tolist() == [0, 1, 2]


def test_a_vanishing_regulariser_is_the_shortest_solution() -> None:
    x, y = clusters(8, 20, 2)  # interpolates
    x[4:] = x[:4]  # rank 3 about the mean
    weight, _ = RidgeState.from_rows(x, y).solve(1e-30)
    centered = (x - x.mean(0)).numpy()
    targets = np.eye(2)[y] - np.eye(2)[y].mean(0)
    wanted = np.linalg.pinv(centered, rcond=1e-10) @ targets
    np.testing.assert_allclose(weight.numpy(), wanted.T, atol=1e-9)


def test_the_default_grid_holds_the_best() -> None:
    x, y = clusters(300, 20, 4, seed=9)
    fit = fit_ridge(x, y)
    assert fit.table[0].regularizer < fit.regularizer < fit.table[-1].regularizer
    # an eigenvalue of the centred Gram matrix is about N times a variance
    eigenvalues = np.linalg.eigvalsh(np.cov(x.numpy().T, bias=True) * 300)
    scale = eigenvalues.mean()
    assert default_regularizers(fit.state) == pytest.approx(
        [scale * value for value in RELATIVE_REGULARIZERS]
    )
    assert default_regularizers(RidgeState(4)) == RELATIVE_REGULARIZERS


# blocks


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_blocks_change_nothing(weighting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = clusters(101, 7, 4, offset=3.0)
    for width in (7, 120):  # fewer columns, and fewer rows
        wide = torch.cat([x, torch.randn(101, width - 7, dtype=torch.float64)], dim=1)
        monkeypatch.undo()
        whole = fit_ridge(wide, y, class_weighting=weighting)
        left_out = leave_one_out_logits(whole.state, wide, y, 1.0)
        monkeypatch.setattr(ridge, "_BLOCK_NUMBERS", 1000)
        monkeypatch.setattr(ridge, "_KEPT_LOGITS", 50)  # every step computes the logits again
        parts = fit_ridge(wide, y, class_weighting=weighting)
        assert_same((parts.weight, parts.bias), (whole.weight, whole.bias), 1e-9)
        assert flat(parts.table) == pytest.approx(flat(whole.table), rel=1e-7)
        torch.testing.assert_close(leave_one_out_logits(whole.state, wide, y, 1.0), left_out)


def flat(table: list[RidgeScore]) -> list[float]:
    return [value for score in table for value in score]


def test_gradients_and_inference_mode_do_not_matter() -> None:
    x, y = clusters(30, 5, 3)
    plain = fit_ridge(x, y)
    tracked = fit_ridge(x.clone().requires_grad_(), y)
    assert not tracked.weight.requires_grad
    with torch.inference_mode(), torch.autocast("cpu"):
        inside = fit_ridge(x, y)
    for fit in (tracked, inside):
        assert_same((fit.weight, fit.bias), (plain.weight, plain.bias), 1e-12)


@pytest.mark.slow
def test_a_million_rows_fit_into_two_gigabytes() -> None:
    import resource

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(100, (1_000_000,), generator=generator)
    centers = torch.randn(100, 384, generator=generator)
    features = torch.empty(1_000_000, 384)
    for rows in torch.arange(1_000_000).split(50_000):
        noise = torch.randn(len(rows), 384, generator=generator)
        features[rows] = centers[labels[rows]] + 5 * noise
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fit = fit_ridge(features, labels, criterion="squared_error")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    assert grown < 2  # GiB
    assert fit.table[0].accuracy > 0.5


# what is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: fit_ridge(x[0], y), r"`features`.*\[N, D\].*\(4,\)"),
        (lambda x, y: fit_ridge(x, y[:-1]), r"`labels`.*int64 \[12\].*\(11,\)"),
        (lambda x, y: fit_ridge(x, y.int()), "`labels`.*int64.*int32"),
        (lambda x, y: fit_ridge(x, y - 1), "`labels`.*>= 0.*-1"),
        (lambda x, y: fit_ridge(x[:0], y[:0]), "rows to fit.*0 and 13"),
        (lambda x, y: fit_ridge(x, y, regularizers=[]), "regularisers to try.*12 and 0"),
        (lambda x, y: fit_ridge(x, y, regularizers=[1.0, 0.0]), "`regularizer`.*> 0.*0"),
        (lambda x, y: fit_ridge(x, y, regularizers=[math.nan]), "`regularizer`.*nan"),
        (lambda x, y: fit_ridge(x, y, criterion="auc"), "auc"),
        (lambda x, y: fit_ridge(x, y, class_weighting="some"), "some"),
        (lambda x, y: fit_ridge(x * INF, y), "`features`.*finite"),
        (lambda x, y: fit_ridge(x * 1e101, y), "`features`.*1e.100"),
        (lambda x, y: RidgeState.from_rows(x, y).solve(-1.0), "`regularizer`.*-1"),
        (lambda x, y: RidgeState.from_rows(x, y).solve(INF), "`regularizer`.*inf"),
        (lambda x, y: RidgeState.from_rows(x, y).add(x[:, 1:], y), r"\[N, 4\].*\(12, 3\)"),
        (
            lambda x, y: RidgeState.from_rows(x, y).remove(x[:2], torch.tensor([7, 7])),
            "at least 2 rows of class 7 to remove, but got 0",
        ),
        (
            lambda x, y: leave_one_out_logits(RidgeState.from_rows(x, y), x[1:], y[1:], 1.0),
            "rows that the state was made from",
        ),
        (lambda x, y: fit_temperature(x, y[1:]), r"`logits` \[N, C\].*\(11,\)"),
        (lambda x, y: fit_temperature(x[:0], y[:0]), "N > 0"),
        (lambda x, y: fit_temperature(x * math.nan, y), "finite at the labels"),
        (lambda x, y: fit_temperature(x - INF, y), "finite at the labels"),
        (lambda x, y: fit_temperature(x, y, torch.zeros(12)), "`weights`.*all 0"),
        (lambda x, y: fit_temperature(x, y, torch.ones(11)), r"`weights`.*\[12\].*\(11,\)"),
    ],
)
def test_bad_calls_are_refused(call: Callable[..., Any], message: str) -> None:
    x, y = clusters(12, 4, 3)
    with pytest.raises(ValueError, match=message):
        call(x, y)


def test_no_rows_to_leave_out() -> None:
    assert leave_one_out_logits(
        RidgeState(3, 2), torch.empty(0, 3), torch.empty(0, dtype=torch.int64), 1.0
    ).shape == (0, 2)
