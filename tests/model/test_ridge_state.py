"""The sums of the ridge head: solutions against scikit-learn, updates against full refits."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.utils.class_weight import compute_sample_weight
from support.ridge_oracles import INF, SHAPES, WEIGHTINGS, assert_same, clusters, row_weights

from hf_knn.fit.weights import class_weights
from hf_knn.model.ridge import RidgeState


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


# scikit-learn


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


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_copies_share_sums_until_one_changes(weighting: str) -> None:
    x, y = clusters(12, 4, 3)
    first = RidgeState.from_rows(x, y, class_weighting=weighting)
    second = first.copy()
    second.add(x + 1, y + 1)
    third = second.copy()
    third.relabel(x[:2], y[:2], y[:2] + 3)
    second.remove(x + 1, y + 1)
    third.remove(x[2:], y[2:])
    first.add(x, y)
    wanted = (
        (torch.cat([x, x]), torch.cat([y, y])),
        (x, y),
        (torch.cat([x + 1, x[:2]]), torch.cat([y + 1, y[:2] + 3])),
    )
    for state, (rows, labels) in zip((first, second, third), wanted, strict=True):
        refit = RidgeState.from_rows(rows, labels, state.num_labels, weighting)
        assert_same(state.solve(1.0), refit.solve(1.0))


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


# hard numbers


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


def test_a_vanishing_regulariser_is_the_shortest_solution() -> None:
    x, y = clusters(8, 20, 2)  # interpolates
    x[4:] = x[:4]  # rank 3 about the mean
    weight, _ = RidgeState.from_rows(x, y).solve(1e-30)
    centered = (x - x.mean(0)).numpy()
    targets = np.eye(2)[y] - np.eye(2)[y].mean(0)
    wanted = np.linalg.pinv(centered, rcond=1e-10) @ targets
    np.testing.assert_allclose(weight.numpy(), wanted.T, atol=1e-9)


# what is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: RidgeState.from_rows(x, y).solve(-1.0), "`regularizer`.*-1"),
        (lambda x, y: RidgeState.from_rows(x, y).solve(INF), "`regularizer`.*inf"),
        (lambda x, y: RidgeState.from_rows(x, y).add(x[:, 1:], y), r"\[N, 4\].*\(12, 3\)"),
        (
            lambda x, y: RidgeState.from_rows(x, y).remove(x[:2], torch.tensor([7, 7])),
            "at least 2 rows of class 7 to remove, but got 0",
        ),
    ],
)
def test_bad_calls_are_refused(call: Callable[..., Any], message: str) -> None:
    x, y = clusters(12, 4, 3)
    with pytest.raises(ValueError, match=message):
        call(x, y)
