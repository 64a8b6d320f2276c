"""The ridge head against scikit-learn, and least squares on N - 1 rows."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.linear_model import RidgeClassifierCV, RidgeCV
from support.ridge_oracles import (
    INF,
    SHAPES,
    WEIGHTINGS,
    assert_same,
    clusters,
    mean_log_prob,
    refits,
    row_weights,
)

from hf_knn.fit import ridge
from hf_knn.fit.ridge import (
    RELATIVE_REGULARIZERS,
    RidgeFit,
    RidgeScore,
    default_regularizers,
    fit_ridge,
    leave_one_out_logits,
)
from hf_knn.model import ridge as ridge_state
from hf_knn.model.ridge import RidgeState


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
        monkeypatch.setattr(ridge_state, "_BLOCK_NUMBERS", 1000)
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


def peak_memory() -> int:
    """The most memory this process has had since its peak was forgotten, in kB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


@pytest.mark.slow
def test_a_million_rows_fit_into_two_gigabytes() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(100, (1_000_000,), generator=generator)
    centers = torch.randn(100, 384, generator=generator)
    features = torch.empty(1_000_000, 384)
    for rows in torch.arange(1_000_000).split(50_000):
        noise = torch.randn(len(rows), 384, generator=generator)
        features[rows] = centers[labels[rows]] + 5 * noise
    # forgets the peak of the tests before, which would hide this one
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory()
    fit = fit_ridge(features, labels, criterion="squared_error")
    grown = (peak_memory() - before) / 2**20
    print(f"a million rows: {grown:.2f} GiB more")
    assert 0 < grown < 2
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
        (
            lambda x, y: leave_one_out_logits(RidgeState.from_rows(x, y), x[1:], y[1:], 1.0),
            "rows that the state was made from",
        ),
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
