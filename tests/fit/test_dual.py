"""Ridge regression from products of rows, beside the one from sums over rows."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_knn.fit import closed
from hf_knn.fit.dual import DualRidge
from hf_knn.fit.ridge import fit_ridge, scale_of
from hf_knn.model import scatter


def wide_rows(count: int = 60) -> tuple[Tensor, Tensor]:
    """Rows far from 0 with more columns than there are rows; class 3 has none and class 5 one."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (count,), generator=generator)
    labels[labels == 3] = 2
    labels[0] = 5
    centres = torch.randn(6, 200, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, 200, generator=generator, dtype=torch.float64)
    return 3 + 0.3 * centres[labels] + noise, labels


@pytest.mark.parametrize("block", [7, 512])
def test_solution_and_table_are_those_of_the_sums(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scatter, "_BLOCK", block)
    rows, labels = wide_rows()
    wanted = fit_ridge(rows, labels, 7)
    dual = DualRidge(rows.clone(), labels, 7)
    assert dual.scale == pytest.approx(scale_of(wanted.state), rel=1e-12)
    found = [dual.score(score.regularizer) for score in wanted.table]
    for one, other in zip(found, wanted.table, strict=True):
        assert tuple(one) == pytest.approx(tuple(other), rel=1e-7)
    assert len({score.accuracy for score in found}) > 3
    for regularizer in (1e-2, wanted.regularizer, 1e4):
        weight, bias = dual.solve(regularizer)
        expected, intercept = wanted.state.solve(regularizer)
        torch.testing.assert_close(weight, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(bias, intercept, rtol=1e-9, atol=1e-9)
    assert bias[3] == bias[6] == -math.inf


def test_leave_one_out_is_what_the_others_say() -> None:
    rows, labels = wide_rows(25)
    score = DualRidge(rows.clone(), labels, 6).score(50.0)
    right, missed, total = 0, 0.0, 0
    for row in range(25):
        if (labels == labels[row]).sum() < 2:
            continue
        rest = torch.arange(25) != row
        weight, bias = DualRidge(rows[rest], labels[rest], 6).solve(50.0)
        logits = weight @ rows[row] + bias
        right += int(logits.argmax() == labels[row])
        logits[labels[row]] -= 1
        missed += float(logits[logits.isfinite()].square().sum())
        total += 1
    assert 20 < total < 25
    assert score.accuracy == pytest.approx(right / total)
    assert score.squared_error == pytest.approx(missed / total, rel=1e-9)


@pytest.mark.parametrize("labels", [[0], [1, 0], [1, 1]])
def test_one_or_two_rows(labels: list[int]) -> None:
    rows = torch.arange(2.0 * 5, dtype=torch.float64).reshape(2, 5)[: len(labels)]
    weight, bias = DualRidge(rows.clone(), torch.tensor(labels), 2).solve(0.1)
    logits = rows @ weight.T + bias
    assert logits.argmax(dim=1).tolist() == labels


@pytest.mark.parametrize("is_wide", [True, False])
@pytest.mark.parametrize("is_alone", [False, True])
def test_many_rows_are_left_out_one_by_one_where_they_are_few_for_their_columns(
    is_alone: bool, is_wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, labels = wide_rows()
    labels = torch.arange(60) if is_alone else labels
    monkeypatch.setattr(closed, "_MOST_LEFT_OUT", 30)
    monkeypatch.setattr(closed, "_MOST_COMPARED", 20)
    monkeypatch.setattr(closed, "HEAD_FEATURES", 64 if is_wide else 16)
    monkeypatch.setattr(closed, "HEAD_COMPONENTS", 8)
    features = rows.float() if is_wide else rows.float()[:, :12]
    made: list[DualRidge] = []

    def make(*args: Any) -> DualRidge:
        made.append(DualRidge(*args))
        return made[-1]

    monkeypatch.setattr(closed, "DualRidge", make)
    fit = closed.fit_closed("kernel", features, labels, 60)
    assert bool(made) == is_wide
    assert bool(fit.fit.table) != is_alone
    assert fit.cell.temperature == 1 or not is_alone
    weight, bias = fit.fit.state.solve(fit.fit.regularizer)
    torch.testing.assert_close(fit.fit.weight, weight, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(fit.fit.bias, bias, rtol=1e-8, atol=1e-10)
    if not is_alone:
        right = (fit.log_probs(features).argmax(dim=1) == labels).double().mean()
        assert right > (0.9 if is_wide else 0.5)
