"""Statistics of reports against scipy, scikit-learn, and definitions written out."""

from itertools import combinations, product

import numpy as np
import pytest
from scipy import stats
from sklearn.calibration import calibration_curve

from reporting.statistics import (
    Split,
    holm,
    mean_and_std,
    mean_of,
    paired_bootstrap,
    rank_correlation,
    reliability_bins,
    signed_rank,
)

REPLICATES = 4000


def differences(count: int, seed: int = 0) -> np.ndarray:
    """[count] of -1, 0 and 1, as differences of correctness are."""
    return np.random.default_rng(seed).choice([-1.0, 0.0, 1.0], count, p=[0.1, 0.7, 0.2])


def split(values: np.ndarray, clusters: np.ndarray | None = None) -> Split:
    ids = np.arange(len(values)) if clusters is None else clusters
    return Split(values.reshape(len(values), -1), ids)


def scipy_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Percentile interval of a mean, and its standard error."""
    rng = np.random.default_rng(7)
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=REPLICATES, method="percentile", rng=rng
    )
    interval = found.confidence_interval
    return float(interval.low), float(interval.high), float(found.standard_error)


def assert_as_scipy(found, values):
    low, high, error = scipy_interval(values)
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(low, abs=0.2 * error)
    assert found.high == pytest.approx(high, abs=0.2 * error)


def test_one_split_is_the_usual_bootstrap():
    values = differences(400)
    assert_as_scipy(paired_bootstrap([split(values)], REPLICATES)[0], values)


def test_one_split_has_about_the_normal_interval():
    values = np.random.default_rng(3).normal(0.1, 1, 2000)
    (found,) = paired_bootstrap([split(values)], REPLICATES)
    low, high = stats.norm.interval(0.95, values.mean(), stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.1 * stats.sem(values))


def test_the_same_items_in_every_split_are_not_new_evidence():
    """Drawn split by split they would give an interval half as wide."""
    values = differences(300)
    (found,) = paired_bootstrap([split(values)] * 4, REPLICATES)
    assert_as_scipy(found, values)


def test_splits_are_drawn_too():
    """Without noise within splits, it is the bootstrap over their means."""
    means = np.random.default_rng(5).normal(0.02, 0.05, 8)
    splits = [split(np.full(50, mean), np.arange(50) + 50 * n) for n, mean in enumerate(means)]
    assert_as_scipy(paired_bootstrap(splits, REPLICATES)[0], means)


def test_items_of_a_group_are_drawn_together():
    """Groups of equal items: as many pieces of evidence as there are groups."""
    values = differences(60)
    clusters = np.repeat(np.arange(60), 10)
    (found,) = paired_bootstrap([split(np.repeat(values, 10), clusters)], REPLICATES)
    assert_as_scipy(found, values)


@pytest.mark.slow
@pytest.mark.parametrize("same", [True, False])
def test_intervals_hold_the_truth_when_splits_share_items(same):
    """Three splits out of one pool, or of the same test items; what an item does mostly stays."""
    chances = [0.05, 0.88, 0.07]
    rng = np.random.default_rng(0)
    hits = []
    for seed in range(300):
        pool = rng.choice([-1.0, 0.0, 1.0], 400, p=chances)
        fixed = rng.choice(400, 120, replace=False)
        splits = []
        for _ in range(3):
            ids = fixed if same else rng.choice(400, 120, replace=False)
            fresh = rng.choice([-1.0, 0.0, 1.0], 120, p=chances)
            splits.append(split(np.where(rng.random(120) < 0.8, pool[ids], fresh), ids))
        (found,) = paired_bootstrap(splits, 300, seed=seed)
        hits.append(found.low <= 0.02 <= found.high)
    assert np.mean(hits) >= 0.925


def test_columns_are_told_apart_and_the_seed_decides():
    values = np.stack([differences(80), differences(80, 1)], axis=1)
    both = paired_bootstrap([split(values)], 200)
    assert both == [paired_bootstrap([split(v)], 200)[0] for v in values.T]
    assert both == paired_bootstrap([split(values)], 200)
    assert both != paired_bootstrap([split(values)], 200, seed=1)


def test_a_split_that_loses_its_only_item_has_no_say():
    splits = [split(np.ones(1), np.array([0])), split(np.ones(3), np.array([1, 2, 3]))]
    (found,) = paired_bootstrap(splits, 500)
    assert list(found) == [1, 1, 1]
    assert found.sign == 1


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ([], "at least one split"),
        ([Split(np.empty((0, 1)), np.arange(0))], "n >= 1"),
        ([split(np.ones(3)), Split(np.ones((3, 2)), np.arange(3))], r"\[n, 1\]"),
        ([Split(np.ones((3, 1)), np.arange(2))], r"got \[3, 1\] and \[2\]"),
    ],
)
def test_the_bootstrap_refuses(splits, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(splits)


def closed_test(p: list[float]) -> list[float]:
    """Holm's procedure by its definition: Bonferroni on every subset that holds the hypothesis."""
    numbers = range(len(p))
    subsets = [s for size in numbers for s in combinations(numbers, size + 1)]
    return [max(min(1, len(s) * min(p[j] for j in s)) for s in subsets if i in s) for i in numbers]


def test_holm_by_eye_and_by_definition():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    for seed in range(20):
        p = (np.random.default_rng(seed).random(5) ** 3).tolist()
        assert holm(p) == pytest.approx(closed_test(p))


def test_holm_does_not_count_what_was_not_tested():
    found = holm([0.01, float("nan"), 0.02])
    assert found[1] != found[1]
    assert [found[0], found[2]] == pytest.approx([0.02, 0.02])


def test_signed_rank_is_the_share_of_sign_patterns():
    values = [0.5, -0.2, 1.1, 0.7, 0.3, -0.1, 0.9, 0.0]
    kept = np.array([v for v in values if v])
    ranks = stats.rankdata(np.abs(kept))
    total = ranks.sum()
    observed = abs(ranks[kept > 0].sum() - total / 2)
    sums = np.array([np.dot(signs, ranks) for signs in product([0, 1], repeat=len(kept))])
    found = signed_rank(values)
    assert found.pairs == 7
    assert found.p == pytest.approx((np.abs(sums - total / 2) >= observed - 1e-9).mean())


def test_rounding_errors_are_no_differences():
    """0.1 + 0.2 - 0.3 is 5.6e-17: neither above nor a rank, and equal gains stay equal ones."""
    noise = 0.1 + 0.2 - 0.3
    assert noise > 0
    assert mean_of([0.1 + 0.2, -0.3]) == 0
    values = [0.3, -0.1, 0.2, 0.2 + noise, -0.2, 0.4]
    assert signed_rank([*values, noise]) == signed_rank([0.3, -0.1, 0.2, 0.2, -0.2, 0.4])
    (interval,) = paired_bootstrap([split(np.array([0.1, 0.2, -0.3]))])
    assert interval.mean == 0
    gains, heads = [1.0, 2, 3, 4], [0.2, 0.2, 0.7, 0.9]
    assert rank_correlation([0.2, 0.2 + noise, 0.7, 0.9], gains) == rank_correlation(heads, gains)


def test_too_few_pairs_cannot_conclude():
    assert not signed_rank([0.1, 0.2, 0.3, 0.4, 0.5]).can_conclude
    six = signed_rank([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert six.can_conclude
    assert six.p == pytest.approx(six.smallest)
    none = signed_rank([0.0, 0.0])
    assert none.pairs == 0
    assert none.p != none.p
    assert not none.can_conclude


def test_reliability_bins_as_scikit_learn():
    rng = np.random.default_rng(0)
    confidence = rng.random(500)
    correct = rng.random(500) < confidence**2
    true, predicted = calibration_curve(correct, confidence, n_bins=10, strategy="uniform")
    found = reliability_bins(confidence, correct)
    np.testing.assert_allclose(found[:, 0], predicted)
    np.testing.assert_allclose(found[:, 1], true)
    assert found[:, 2].sum() == 500
    assert reliability_bins(np.array([1.0]), np.array([True])).tolist() == [[1, 1, 1]]


def test_small_statistics():
    assert mean_and_std([1.0, 3.0]) == pytest.approx((2, 2**0.5))
    assert mean_and_std([1.0])[1] != mean_and_std([1.0])[1]
    assert rank_correlation([1, 2, 3], [5, 3, 1])[0] == pytest.approx(-1)
    assert rank_correlation([1, 2], [2, 1])[0] != rank_correlation([1, 2], [2, 1])[0]
