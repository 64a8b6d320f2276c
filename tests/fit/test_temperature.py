"""The temperature of logits against scipy's search on a plain likelihood."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from support.ridge_oracles import INF, clusters, mean_log_prob

from hf_knn.fit.temperature import fit_temperature


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


@pytest.mark.parametrize(
    ("call", "message"),
    [
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
