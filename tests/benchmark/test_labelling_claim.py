"""The ridge head of the benchmark of orders is the one that a session guesses with."""

import torch

from claims.labelling import _IMPOSSIBLE, REGULARIZER, TEMPERATURE, ridge
from hf_knn.fit.choice import FIXED_CELL
from hf_knn.model.ridge import RidgeState


def test_the_dual_solution_is_that_of_the_sums() -> None:
    torch.manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(40, 12, dtype=torch.float64), dim=1)
    chosen, labels = [3, 7, 1, 9, 20], torch.tensor([0, 1, 1, 2, 0])
    found = ridge(rows @ rows[chosen].T, chosen, labels, 4)
    weight, bias = RidgeState.from_rows(rows[chosen], labels, 4).solve(REGULARIZER)
    logits = (rows @ weight.T + bias) / TEMPERATURE
    logits[:, 3] = _IMPOSSIBLE  # no row has it
    assert torch.allclose(found, logits.softmax(dim=1), atol=1e-12)
    assert (FIXED_CELL.regularizer, FIXED_CELL.temperature) == (REGULARIZER, TEMPERATURE)
