"""p-values and error rates, against scipy and by simulation."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest, kstest

from hf_knn.fit.metrics import thresholds, upper_bounds
from hf_knn.model.explain import typicality

Floats = NDArray[np.float64]


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


class World(NamedTuple):
    """Pictures by a number u, uniform in [0, 1]: how sure an answer is, and how often wrong."""

    sureness: Callable[[Floats], Floats]
    error: Callable[[Floats, float], NDArray[np.floating[Any]]]

    def ask(self, count: int, rate: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of two classes, and labels."""
        generator = np.random.default_rng(seed)
        u = generator.random(count)
        sure = torch.from_numpy(self.sureness(u))
        wrong = torch.from_numpy(generator.random(count) < self.error(u, rate))
        return torch.stack([sure, 1 - sure], 1).log(), wrong.long()

    def of(self, threshold: float, rate: float) -> tuple[float, float]:
        """Share of pictures that are answered from a threshold on, and of those wrongly."""
        u = (np.arange(100_000) + 0.5) / 100_000
        given = self.sureness(u) >= threshold
        return float(given.mean()), float(self.error(u, rate)[given].mean())


def _often_right(u: Floats, rate: float) -> Floats:
    return 0.5 - 0.5 * np.sqrt(np.sqrt(u))  # whatever the rate


WORLDS = {
    "calibrated": World(lambda u: 0.5 + 0.5 * np.sqrt(np.sqrt(u)), _often_right),
    "over-confident": World(lambda u: 0.99 + 0.01 * u, _often_right),
    "uninformative": World(lambda u: 0.5 + 0.5 * u, lambda u, rate: np.full_like(u, 1.01 * rate)),
    "nearly uninformative": World(
        lambda u: 0.5 + 0.5 * u, lambda u, rate: rate * (1.03 - 0.04 * (u > 0.9))
    ),
    "upside down": World(lambda u: 0.5 + 0.5 * u, lambda u, rate: rate * (0.7 + 0.65 * u)),
    "in steps": World(
        lambda u: 0.5 + 0.1 * np.floor(5 * u), lambda u, rate: rate * (1.4 - 0.5 * u)
    ),
    "always sure": World(np.ones_like, lambda u, rate: np.full_like(u, 1.01 * rate)),
}


def broken_promises(kind: str, count: int, rate: float, runs: int) -> int:
    """In how many runs answers from the threshold on are wrong more often than promised."""
    world, broken = WORLDS[kind], 0
    for seed in range(runs):
        found = thresholds(*world.ask(count, rate, seed), (rate,))
        broken += bool(found) and world.of(found[f"{rate:g}"], rate)[1] > rate
    return broken


@pytest.mark.parametrize("kind", WORLDS)
@pytest.mark.parametrize(("count", "rate"), [(250, 0.1), (800, 0.05)])
def test_no_more_errors_than_promised_nine_times_in_ten(kind: str, count: int, rate: float) -> None:
    assert broken_promises(kind, count, rate, 100) <= 10 + 9  # three standard errors


@pytest.mark.slow
@pytest.mark.parametrize("kind", WORLDS)
@pytest.mark.parametrize(("count", "rate"), [(200, 0.1), (1000, 0.05), (1000, 0.1), (400, 0.2)])
def test_no_more_errors_than_promised_in_2000_runs(kind: str, count: int, rate: float) -> None:
    assert broken_promises(kind, count, rate, 2000) <= 200 + 40


def answered(count: int, rate: float, runs: int) -> float:
    """What is answered of what the true threshold answers, if answers are as sure as they say."""
    world = WORLDS["calibrated"]
    lowest = next(t for t in np.linspace(0.5, 1, 501) if world.of(t, rate)[1] <= rate)
    most, shares = world.of(lowest, rate)[0], []
    for seed in range(runs):
        found = thresholds(*world.ask(count, rate, seed), (rate,)).get(f"{rate:g}")
        shares.append(0.0 if found is None else world.of(found, rate)[0] / most)
    return float(np.mean(shares))


@pytest.mark.parametrize(("count", "rate"), [(600, 0.1), (2500, 0.05)])
def test_most_of_what_could_be_answered_is(count: int, rate: float) -> None:
    assert answered(count, rate, 40) > 0.8


@pytest.mark.slow
@pytest.mark.parametrize(("count", "rate"), [(500, 0.1), (2000, 0.05), (300, 0.2)])
def test_most_of_what_could_be_answered_is_in_2000_runs(count: int, rate: float) -> None:
    assert answered(count, rate, 2000) > 0.8


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.1])
def test_too_few_rows_promise_nothing(rate: float) -> None:
    most = math.ceil(math.log(0.1) / math.log1p(-rate))  # right answers that are still no proof
    for count in (0, 1, most):
        log_probs = torch.tensor([[0.9, 0.1]] * count).log().reshape(count, 2)
        labels = torch.zeros(count, dtype=torch.int64)
        assert thresholds(log_probs, labels, (rate,)) == {}
    enough = torch.tensor([[0.9, 0.1]] * (most + 1)).log()
    found = thresholds(enough, torch.zeros(most + 1, dtype=torch.int64), (rate,))
    assert found == {f"{rate:g}": pytest.approx(0.9)}


def test_a_threshold_is_a_confidence_that_was_seen_and_ties_go_together() -> None:
    log_probs = torch.tensor([[0.9, 0.1]] * 40 + [[0.6, 0.4]] * 40).log()
    labels = torch.tensor([0] * 40 + [0, 1] * 20)
    found = thresholds(log_probs, labels, (0.1, 0.4, 0.01))
    assert found == {"0.1": pytest.approx(0.9), "0.4": pytest.approx(0.6)}
    assert thresholds(log_probs[:0], labels[:0], (0.1,)) == {}
