"""Ridge regression from products of rows, beside the one from sums over rows."""

import math

import pytest
import torch
from torch import Tensor

from hf_knn.fit import dual as duals
from hf_knn.fit.closed import fit_closed
from hf_knn.fit.dual import DualRidge
from hf_knn.fit.ridge import RELATIVE_REGULARIZERS, fit_ridge, scale_of
from hf_knn.model.closed_form import prepare_rows


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
    monkeypatch.setattr(duals, "_BLOCK", block)
    rows, labels = wide_rows()
    wanted = fit_ridge(rows, labels, 7)
    dual = DualRidge(rows.clone(), labels, 7)
    assert dual.scale == pytest.approx(scale_of(wanted.state), rel=1e-12)
    found = dual.score_all([score.regularizer for score in wanted.table])
    for one, other in zip(found, wanted.table, strict=True):
        assert tuple(one) == pytest.approx(tuple(other), rel=1e-7)
        assert tuple(dual.score(one.regularizer)) == pytest.approx(tuple(other), rel=1e-7)
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
    given = torch.tensor(labels)
    dual = DualRidge(rows.clone(), given, 2)
    table = dual.score_all(RELATIVE_REGULARIZERS)
    assert len(table) == (len(RELATIVE_REGULARIZERS) if labels == [1, 1] else 0)
    weight, bias = dual.solve(0.1)
    logits = rows @ weight.T + bias
    assert logits.argmax(dim=1).tolist() == labels


def test_a_kernel_head_of_few_rows_makes_its_sums_when_asked() -> None:
    features, labels = wide_rows()
    fit = fit_closed("kernel", features.float(), labels, 7)
    assert "state" not in vars(fit.fit)
    weight, bias = fit.fit.state.solve(fit.fit.regularizer)
    assert fit.fit.state is fit.fit.state
    rows = prepare_rows(fit.head, features.float())
    own = torch.addmm(fit.fit.bias, rows, fit.fit.weight.T)
    torch.testing.assert_close(torch.addmm(bias, rows, weight.T), own, rtol=1e-8, atol=1e-8)
