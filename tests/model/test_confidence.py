"""p-values and error rates, against scipy and by simulation."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, kstest

from hf_knn.fit.metrics import thresholds, upper_bounds
from hf_knn.model.explain import typicality


@pytest.mark.parametrize(("errors", "count"), [(0, 1), (0, 20), (3, 50), (49, 50), (7, 1000)])
def test_the_bound_is_clopper_pearsons(errors: int, count: int) -> None:
    interval = binomtest(errors, count).proportion_ci(0.8, method="exact")
    found = upper_bounds(np.array([errors, count]), np.array([count, count]))
    assert found.tolist() == pytest.approx([interval.high, 1.0], abs=1e-9)


def test_p_values_of_the_same_kind_are_uniform() -> None:
    generator = np.random.default_rng(0)
    found = []
    for _ in range(400):
        values = generator.normal(size=60)
        found.append(typicality(values[0], np.sort(values[1:])))
    assert kstest(found, "uniform").pvalue > 0.01
    assert min(found) >= 1 / 60
    assert typicality(-9.0, np.sort(values)) == pytest.approx(1 / 61)
    assert typicality(9.0, np.sort(values)) == 1.0


def answers(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of two classes that are right as often as they say."""
    generator = torch.Generator().manual_seed(seed)
    sure = 0.5 + 0.5 * torch.rand(count, generator=generator, dtype=torch.float64)
    right = torch.rand(count, generator=generator, dtype=torch.float64) < sure
    return torch.stack([sure, 1 - sure], 1).log(), (~right).long()


def test_no_more_errors_than_promised_nine_times_in_ten() -> None:
    fresh, labels = answers(200_000, 999)
    broken = 0
    for seed in range(60):
        found = thresholds(*answers(500, seed), (0.1, 0.2))
        assert found.get("0.1", 1.0) >= found["0.2"]
        given = fresh.exp().max(1).values >= found["0.2"]
        wrong = fresh.argmax(1) != labels
        broken += float(wrong[given].double().mean()) > 0.2
    assert broken <= 12  # about 6 are expected, choosing among thresholds costs a little


def test_a_threshold_is_a_confidence_that_was_seen_and_ties_go_together() -> None:
    log_probs = torch.tensor([[0.9, 0.1]] * 40 + [[0.6, 0.4]] * 40).log()
    labels = torch.tensor([0] * 40 + [0, 1] * 20)
    found = thresholds(log_probs, labels, (0.1, 0.4, 0.01))
    assert found == {"0.1": pytest.approx(0.9), "0.4": pytest.approx(0.6)}
    assert thresholds(log_probs[:0], labels[:0], (0.1,)) == {}
