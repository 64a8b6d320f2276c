"""Intervals against scipy's own, and against the truth in samples that are drawn."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, ttest_1samp

from hf_knn.fit.intervals import (
    Comparison,
    Number,
    chance_calibration_error,
    compare,
    mean_of,
    mean_of_shares,
    percent,
    share_of,
    wilson,
)

NAMES = {"head": "head alone", "knn": "neighbours alone"}


def ends(number: Number) -> tuple[float, float]:
    assert number.low is not None
    assert number.high is not None
    return number.low, number.high


@pytest.mark.parametrize("count", [1, 2, 12, 228])
def test_wilson_is_scipys_for_every_share(count: int) -> None:
    right = np.arange(count + 1)
    found = np.stack(wilson(right, np.full(count + 1, count)), axis=1)
    wanted = [binomtest(int(k), count).proportion_ci(method="wilson") for k in right]
    np.testing.assert_allclose(found, [(one.low, one.high) for one in wanted], atol=1e-12)
    assert ends(share_of(count, count)) == tuple(found[-1])


def test_of_no_picture_nothing_is_known() -> None:
    assert [float(end[0]) for end in wilson(np.array([0]), np.array([0]))] == [0, 1]
    nothing = share_of(0, 0)
    assert math.isnan(nothing.value)
    assert (nothing.low, nothing.high) == (None, None)
    assert nothing.say_share(0) == "-"
    assert math.isnan(mean_of_shares(np.array([0]), np.array([0])).value)


@pytest.mark.parametrize(
    ("right", "count", "said"),
    [
        (183, 228, "80.3 % ± 5"),
        (12, 12, "100 % of 12 (at least 75 %)"),
        (796, 796, "100 % of 796 (at least 99.5 %)"),
        (1, 1, "100 % of 1 (at least 20 %)"),
        (0, 12, "0 % of 12 (at most 25 %)"),
        (49, 50, "98.0 % (90 to 99.6 %)"),
        (3, 12, "25.0 % (9 to 53 %)"),
        (5000, 10_000, "50.0 % ± 1.0"),
        (99_999, 100_000, "99.99 % (99.99 to 99.99 %)"),
    ],
)
def test_shares_in_words(right: int, count: int, said: str) -> None:
    assert share_of(right, count).say_share(count) == said


@given(st.integers(1, 10**6), st.data())
@settings(deadline=None)
def test_no_share_is_said_to_be_all_or_nothing_without_a_doubt(
    count: int, data: st.DataObject
) -> None:
    right = data.draw(st.integers(0, count))
    said = share_of(right, count).say_share(count)
    first = said.split(" %")[0]
    assert (float(first) == 100) == (right == count)
    assert (float(first) == 0) == (right == 0)
    assert any(word in said for word in ("±", " to ", "at least", "at most"))


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (0.5, "50 %"),
        (0.004, "0.4 %"),
        (1, "100 %"),
        (0, "0 %"),
        (1e-9, "0.01 %"),
        (0.9971, "99.7 %"),
    ],
)
def test_percent(share: float, said: str) -> None:
    assert percent(share) == said


def test_percent_rounds_where_it_is_told_to() -> None:
    assert percent(0.7575, down=True) == "75 %"
    assert percent(0.2425, down=False) == "25 %"
    assert percent(0.75, down=True) == percent(0.75, down=False) == "75 %"


# ---- means --------------------------------------------------------------------------------------


def test_the_mean_of_one_class_is_its_share() -> None:
    found = mean_of_shares(np.array([7, 0]), np.array([9, 0]))
    assert found.value == pytest.approx(7 / 9)
    assert ends(found) == pytest.approx(ends(share_of(7, 9)))


def test_classes_that_are_all_right_leave_a_doubt_that_shrinks_with_pictures() -> None:
    few, many = (mean_of_shares(np.array([n] * 4), np.array([n] * 4)) for n in (3, 300))
    assert few.value == many.value == few.high == many.high == 1
    assert 0.5 < ends(few)[0] < ends(many)[0] < 1
    assert few.say_share(12).startswith("100 % of 12 (at least ")


@pytest.mark.parametrize("counts", [[10, 20, 5, 40, 8, 1], [3] * 30, [5] * 70, [1] * 50, [200, 4]])
def test_the_mean_per_class_is_held_by_95_of_100_intervals(counts: list[int]) -> None:
    generator = np.random.default_rng(0)
    total, held = np.array(counts), 0
    for _ in range(1500):
        shares = generator.uniform(generator.uniform(0.3, 0.95), 0.99, len(total))
        low, high = ends(mean_of_shares(generator.binomial(total, shares), total))
        held += low <= shares.mean() <= high
    assert 0.92 < held / 1500 < 0.985


def test_the_mean_of_values_is_students() -> None:
    values = np.random.default_rng(1).exponential(size=40)
    wanted = ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean_of(values).value == pytest.approx(values.mean())
    assert ends(mean_of(values)) == pytest.approx((wanted.low, wanted.high))
    assert mean_of(values[:1]) == Number(values[0])
    assert mean_of(np.array([0.0, 5.0])).low == 0  # none is below
    assert Number(0.5123, 0.4, 0.62).say() == "0.512 ± 0.11"
    assert Number(0.01, 0, 0.03).say() == "0.010 (at most 0.030)"
    assert Number(13.017, 11.04, 14.99).say() == "13.0 ± 2.0"
    assert Number(0.25).say() == "0.250"


# ---- two voices ---------------------------------------------------------------------------------


def two(both: int, first: int, second: int, neither: int) -> Comparison:
    """The head is `first`, the neighbours are `second`."""
    rows = [(1, 1)] * both + [(1, 0)] * first + [(0, 1)] * second + [(0, 0)] * neither
    columns = np.array(rows, bool)
    return compare("head", "knn", columns[:, 0], columns[:, 1])


@pytest.mark.parametrize(("first", "second"), [(0, 1), (5, 14), (20, 20), (0, 9), (31, 12)])
def test_mcnemars_exact_test_is_the_binomial_one(first: int, second: int) -> None:
    found = two(100, first, second, 30)
    assert found.p == pytest.approx(binomtest(first, first + second, 0.5).pvalue)
    assert (found.only_first, found.only_second) == (first, second)
    assert found.difference.value == pytest.approx((second - first) / (130 + first + second))
    other = two(100, second, first, 30)
    assert other.p == pytest.approx(found.p)
    assert ends(other.difference) == pytest.approx(
        [-end for end in reversed(ends(found.difference))]
    )


def test_voices_that_never_differ_may_still_be_different() -> None:
    found = two(10, 0, 0, 2)
    low, high = ends(found.difference)
    assert (found.p, found.difference.value) == (1, 0)
    assert low < 0 < high
    assert not found.is_shown
    assert "no difference that 12 pictures can show, 0.0 (" in found.say(NAMES)


@given(*[st.integers(0, 60)] * 4)
@settings(deadline=None)
def test_test_and_interval_do_not_disagree(
    both: int, first: int, second: int, neither: int
) -> None:
    if not both + first + second + neither:
        return
    found = two(both, first, second, neither)
    low, high = ends(found.difference)
    assert -1 <= low <= found.difference.value <= high <= 1
    if found.is_shown:
        assert found.p < 0.05
    assert found.is_shown == ("no difference" not in found.say(NAMES))


def test_a_difference_is_said_with_its_direction() -> None:
    assert two(100, 2, 30, 10).say(NAMES) == (
        "neighbours alone against head alone: better, +19.7 (+12.2 to +26.7) points."
    )
    assert ": worse, -19.7 (" in two(100, 30, 2, 10).say(NAMES)
    assert "that 1 picture can show" in two(1, 0, 0, 0).say(NAMES)


@pytest.mark.parametrize(("first", "second", "count"), [(0.05, 0.05, 228), (0.02, 0.08, 60)])
def test_the_difference_is_held_by_95_of_100_intervals(
    first: float, second: float, count: int
) -> None:
    generator = np.random.default_rng(0)
    held = shown = 0
    for _ in range(800):
        draws = generator.random(count)
        only_first, only_second = draws < first, (draws >= first) & (draws < first + second)
        both = draws > 0.5
        found = compare("head", "knn", only_first | both, only_second | both)
        low, high = ends(found.difference)
        held += low <= second - first <= high
        shown += found.is_shown
    assert held / 800 > 0.94
    assert first != second or shown / 800 <= 0.05


# ---- calibration --------------------------------------------------------------------------------


def test_a_calibrated_model_is_off_by_less_than_chance_95_times_of_100() -> None:
    generator = np.random.default_rng(0)
    sure = generator.uniform(0.4, 1, 300)
    parts = np.array_split(np.argsort(sure), 15)
    most = chance_calibration_error(sure, parts)
    errors = []
    for _ in range(1000):
        right = generator.random(300) < sure
        errors.append(sum(abs(right[p].sum() - sure[p].sum()) for p in parts) / 300)
    assert 0.9 < np.mean(np.array(errors) <= most) < 0.99
    assert chance_calibration_error(np.ones(5), [np.arange(5)]) == 0
