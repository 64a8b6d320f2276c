"""How far from the truth a number may be that was measured on so many pictures: 95 % intervals.

Each picture is one trial, independent of the others. What belongs together (one patient, one
camera) tells less than these intervals say.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, norm, t

SURENESS = 0.95
"""How often an interval holds the number that all pictures of this kind would give."""

_Z = float(norm.ppf((1 + SURENESS) / 2))
_LOPSIDED = 0.25
_FINE = 2.0  # points, below which an interval is said with a decimal
_LEAST = 0.01  # per cent

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Number:
    """Something measured, and where the truth may lie.

    Attributes:
        value: as measured.
        low: the lower end of the interval; None if there is none.
        high: the upper end.
    """

    value: float
    low: float | None = None
    high: float | None = None

    def say_share(self, count: int) -> str:
        """A share of so many pictures in words, never a bare 100 %.

        Args:
            count: how many pictures it is a share of.
        """
        if not count:
            return "-"
        if self.low is None or self.high is None:
            return percent(self.value)
        if self.value >= 1:
            return f"100 % of {count:,} (at least {percent(self.low, down=True)})"
        if self.value <= 0:
            return f"0 % of {count:,} (at most {percent(self.high, down=False)})"
        value = percent(self.value, fine=True)
        half = 50 * (self.high - self.low)
        if abs(50 * (self.high + self.low) - 100 * self.value) > _LOPSIDED * half:
            return f"{value} ({percent(self.low, short=True)} to {percent(self.high)})"
        return f"{value} ± {half:.0f}" if half >= _FINE else f"{value} ± {half:.1f}"

    def say(self) -> str:
        """A number that is no share in words."""
        if self.low is None or self.high is None:
            return f"{self.value:.3f}"
        if self.low <= 0:
            return f"{self.value:.3f} (at most {self.high:.3f})"
        half = (self.high - self.low) / 2
        return f"{self.value:.3f} ± {half:.2g}" if half < 1 else f"{self.value:.1f} ± {half:.1f}"


def percent(
    share: float, *, fine: bool = False, short: bool = False, down: bool | None = None
) -> str:
    """A share in per cent: with decimals near the ends, where whole numbers would say too much.

    Args:
        share: in [0, 1].
        fine: with a decimal elsewhere too.
        short: leave out the sign.
        down: round down (True) or up (False); None rounds to the nearest.
    """
    value = 100 * share
    if 0 < value < 100:
        value = min(max(value, _LEAST), 100 - _LEAST)  # else it would be said to be 0 or 100
    is_plain = 1 <= value <= 99 or value in (0, 100)
    digits = int(fine) if is_plain else 1 if 0.1 <= value <= 99.9 else 2
    if down is not None:
        factor = 10**digits
        value = (math.floor if down else math.ceil)(round(value * factor, 6)) / factor
    return f"{value:.{digits}f}" + ("" if short else " %")


def wilson(right: Counts | Floats, count: Counts | Floats) -> tuple[Floats, Floats]:
    """Intervals of shares: Wilson's score interval, sound for few pictures and near 0 or 1.

    From ``|p - right / n| <= z sqrt(p (1 - p) / n)`` (Wilson, *Probable inference, the law of
    succession, and statistical inference*, 1927).

    Args:
        right: [M] how many.
        count: [M] of how many; of none the interval is [0, 1].

    Returns:
        [M] lower and [M] upper ends.
    """
    is_known = np.asarray(count) > 0
    total = np.where(is_known, np.asarray(count, np.float64), 1.0)
    share = np.asarray(right, np.float64) / total
    shrink = 1 + _Z**2 / total
    middle = (share + _Z**2 / (2 * total)) / shrink
    half = _Z * np.sqrt(share * (1 - share) / total + (_Z / (2 * total)) ** 2) / shrink
    low = np.where(share <= 0, 0.0, middle - half)  # exactly, whatever rounding makes of it
    high = np.where(share >= 1, 1.0, middle + half)
    return np.where(is_known, low, 0.0), np.where(is_known, high, 1.0)


def share_of(right: int, count: int) -> Number:
    """A share of pictures; NaN of none.

    Args:
        right: how many.
        count: of how many.
    """
    if not count:
        return Number(math.nan)
    low, high = wilson(np.array([right]), np.array([count]))
    return Number(right / count, float(low[0]), float(high[0]))


def mean_of_shares(right: Counts, count: Counts) -> Number:
    """The mean of the shares of several classes, each of which counts alike.

    Wilson's interval for as many pictures as a plain share would need to vary as much (an effective
    sample size, as of stratified surveys; Korn and Graubard, *Confidence intervals for proportions
    with small expected number of positive counts estimated from survey data*, 1998). What each
    class adds to the variance is taken from its share and two more pictures of the overall one, so
    that a class whose few pictures are all right is not taken for one without a doubt. In samples
    that were drawn 93 to 96 of 100 intervals held the truth, for 1 to 200 pictures a class.

    Args:
        right: [C] how many of each class.
        count: [C] of how many; classes of none are left out.
    """
    known = np.asarray(count) > 0
    if not known.any():
        return Number(math.nan)
    found, total = right[known], count[known]
    overall = (found.sum() + 2) / (total.sum() + 4)
    shares = (found + 2 * overall) / (total + 2)
    variance = (shares * (1 - shares) / total).sum() / len(total) ** 2
    mean = float((found / total).mean())
    pictures = np.array([shares.mean() * (1 - shares.mean()) / variance])
    low, high = wilson(mean * pictures, pictures)
    return Number(mean, float(low[0]), float(high[0]))


def mean_of(values: Floats) -> Number:
    """The mean of a number that each picture has, by Student's t; one picture has no interval.

    Args:
        values: [N], none below 0, N > 0.
    """
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return Number(mean)
    half = float(t.ppf((1 + SURENESS) / 2, count - 1) * values.std(ddof=1) / math.sqrt(count))
    return Number(mean, max(0.0, mean - half), mean + half)


@dataclass(frozen=True)
class Comparison:
    """Two voices on the same pictures.

    Attributes:
        first: name of a voice.
        second: of another.
        count: pictures.
        only_first: of these, answered right by the first alone.
        only_second: by the second alone.
        difference: accuracy of the second less that of the first, with its interval.
        p: of McNemar's exact test, that both are right as often.
    """

    first: str
    second: str
    count: int
    only_first: int
    only_second: int
    difference: Number
    p: float

    @property
    def is_shown(self) -> bool:
        """Whether so many pictures show a difference: the interval does not hold 0."""
        low, high = self.difference.low, self.difference.high
        return low is not None and high is not None and (low > 0 or high < 0)

    @property
    def verdict(self) -> str:
        """What the second voice is, in words."""
        if not self.is_shown:
            return "not shown to differ"
        return "better" if self.difference.value > 0 else "worse"

    def say_points(self) -> str:
        """The difference in percentage points, with its interval."""
        ends = (self.difference.value, self.difference.low or 0.0, self.difference.high or 0.0)
        value, low, high = map(_points, ends)
        return f"{value} ({low} to {high})"

    def say(self, names: dict[str, str]) -> str:
        """What follows of it, in a sentence.

        Args:
            names: of the voices, in words.
        """
        pictures = "1 picture" if self.count == 1 else f"{self.count:,} pictures"
        verdict = self.verdict if self.is_shown else f"no difference that {pictures} can show"
        voices = f"{names[self.second]} against {names[self.first]}"
        return f"{voices}: {verdict}, {self.say_points()} points."


def compare(first: str, second: str, first_right: Bools, second_right: Bools) -> Comparison:
    """Compares two voices by the pictures that only one of them answers right.

    The test is McNemar's, exact: of those pictures each voice has half, if both are right as often.
    The interval is that of Bonett and Price (*Adjusted Wald confidence interval for a difference of
    binomial proportions based on paired data*, 2012), widened to what the exact test leaves open,
    so that the two never disagree.

    Args:
        first: name of a voice.
        second: of another.
        first_right: [N] bool, N > 0.
        second_right: [N] bool.
    """
    count = len(first_right)
    only_first = int((first_right & ~second_right).sum())
    only_second = int((second_right & ~first_right).sum())
    apart = only_first + only_second
    value = (only_second - only_first) / count
    one, other = (only_first + 1) / (count + 2), (only_second + 1) / (count + 2)
    half = _Z * math.sqrt((one + other - (other - one) ** 2) / (count + 2))
    low, high = other - one - half, other - one + half
    p = 1.0
    if apart:
        test = binomtest(only_second, apart)
        p = float(test.pvalue)
        exact = test.proportion_ci(SURENESS, method="exact")
        low = min(low, (2 * exact.low - 1) * apart / count)
        high = max(high, (2 * exact.high - 1) * apart / count)
    difference = Number(value, max(-1.0, low), min(1.0, high))
    return Comparison(first, second, count, only_first, only_second, difference, p)


def chance_calibration_error(
    confidence: Floats, parts: Sequence[Counts], draws: int = 200, seed: int = 0
) -> float:
    """What a calibrated model's calibration error may be by chance, on 95 of 100 sets of pictures.

    Its answers are right as often as they say, but so many pictures show that only so well
    (consistency resampling; Bröcker and Smith, *Increasing the reliability of reliability
    diagrams*, 2007).

    Args:
        confidence: [N] of the answers.
        parts: the rows of each bin.
        draws: sets of pictures that are drawn.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    errors = np.zeros(draws)
    for part in parts:
        sure = confidence[part]
        right = np.array([(generator.random(len(part)) < sure).sum() for _ in range(draws)])
        errors += abs(right - sure.sum()) / len(confidence)
    return float(np.quantile(errors, SURENESS))


def _points(share: float) -> str:
    said = f"{100 * share:+.1f}"
    return "0.0" if float(said) == 0 else said
