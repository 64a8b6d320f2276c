"""What more pictures would bring: accuracy on nested parts of the pictures, and a power law.

The error of a classifier falls about like ``a * n ** -b``. There is no floor as a third parameter:
with four sizes to fit it foretold the last doubling worse on all tasks tried. The statement goes no
further than twice the pictures there are.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import OptimizeWarning, curve_fit
from torch import Tensor

from ..core.votes import blend_log_probs
from ..data.splits import Fold, few_rows
from ..fit.voices import WEIGHT, HeadCell, Voices, ask, choose_cell
from .findings import Floats

FRACTIONS = (0.125, 0.25, 0.5)
"""Parts of the fitted rows that are tried beside all of them."""

LEAST_FIT = 0.85
"""R^2 of log error over log size below which nothing is said."""

_FEWEST_SIZES = 3
_FEWEST_PER_CLASS = 2.0


@dataclass(frozen=True)
class LearningCurve:
    """What was measured, and what it says about more pictures.

    Attributes:
        sizes: [S] mean number of rows fitted.
        per_class: [S] the same by class.
        accuracies: [F, S] top-1 on the held-out rows of each fold.
        gain: what twice the rows would bring in accuracy; NaN if nothing can be said.
        spread: its standard deviation over folds; NaN likewise.
        parameters: a and b of ``error = a * n ** -b``; NaN likewise.
        reason: why nothing can be said; empty otherwise.
    """

    sizes: Floats
    per_class: Floats
    accuracies: Floats
    gain: float
    spread: float
    parameters: tuple[float, float]
    reason: str = ""

    def statement(self) -> str:
        """One sentence for a reader."""
        now = f"{float(self.accuracies[:, -1].mean()):.1%}" if self.accuracies.size else "nothing"
        if self.reason:
            return f"No statement about more pictures: {self.reason}."
        return (
            f"With {self.per_class[-1]:.0f} pictures per class, {now} of those held out are "
            f"answered right; twice the pictures per class would bring about {100 * self.gain:+.1f}"
            f" points (± {100 * self.spread:.1f} over folds), if they are like these."
        )


def measure_curve(
    features: Tensor,
    labels: Tensor,
    num_labels: int,
    folds: Sequence[Fold],
    voices: Voices,
    seed: int,
    on_progress: Callable[[int], object] = lambda done: None,
) -> LearningCurve:
    """Fits both voices on parts of each fold's rows and asks their blend.

    Args:
        features: [N, D] raw features.
        labels: [N] int64 in [0, num_labels).
        num_labels: C.
        folds: of the rows.
        voices: what was said with all fitted rows of the same folds.
        seed: of the parts, which are nested.
        on_progress: called with 1 after each fit.
    """
    sizes = np.zeros((len(folds), len(FRACTIONS) + 1))
    accuracies = np.zeros_like(sizes)
    answers = voices.blend.argmax(1)
    cells: dict[float, HeadCell] = {}
    for row, fold in enumerate(folds):
        held_out, wanted = torch.from_numpy(fold.held_out), labels[fold.held_out]
        for column, fraction in enumerate(FRACTIONS):
            part = fold.fitted[few_rows(labels[fold.fitted], fraction, seed + row)]
            rows = torch.from_numpy(part)
            if fraction not in cells:
                cells[fraction] = choose_cell(features[rows], labels[rows], num_labels)
            head, knn = ask(
                features[rows], labels[rows], num_labels, features[held_out], cells[fraction]
            )
            found = blend_log_probs(head, knn, WEIGHT).argmax(1)
            sizes[row, column] = len(rows)
            accuracies[row, column] = (found == wanted).double().mean()
            on_progress(1)
        sizes[row, -1] = len(fold.fitted)
        accuracies[row, -1] = (answers[held_out] == wanted).double().mean()
    return fit_curve(sizes.mean(axis=0), accuracies, len(labels.unique()))


def fit_curve(sizes: Floats, accuracies: Floats, classes: int) -> LearningCurve:
    """Fits a power law and says what twice the rows would bring, or why nothing can be said.

    Args:
        sizes: [S] rows, ascending.
        accuracies: [F, S] in [0, 1].
        classes: that have rows.
    """
    per_class = sizes / classes
    usable = per_class >= _FEWEST_PER_CLASS
    reason, parameters, gain, spread = "", (np.nan, np.nan), np.nan, np.nan
    errors = 1 - accuracies.mean(axis=0)
    if len(np.unique(sizes[usable])) < _FEWEST_SIZES:
        reason = "there are too few pictures per class to take parts of them"
    elif errors[-1] <= 0:
        reason = "nothing that was held out is answered wrong"
    else:
        parameters = fit_power_law(sizes[usable], errors[usable])
        gain = _gain(parameters, sizes[-1])
        explained = _explained(parameters, sizes[usable], errors[usable])
        folds = [_gain(fit_power_law(sizes[usable], 1 - one[usable]), sizes[-1])
                 for one in accuracies]  # fmt: skip
        spread = float(np.std(folds, ddof=1)) if len(folds) > 1 else np.nan
        if explained < LEAST_FIT:
            reason = f"the error does not fall like a power of the size (R² {explained:.2f})"
        elif not np.isfinite(spread) or spread > max(gain, 0.01):
            reason = "it differs too much from fold to fold"
    if reason:
        parameters, gain, spread = (np.nan, np.nan), np.nan, np.nan
    return LearningCurve(sizes, per_class, accuracies, gain, spread, parameters, reason)


def fit_power_law(sizes: Floats, errors: Floats) -> tuple[float, float]:
    """A and b of ``a * n ** -b`` by least squares on the errors, a > 0 and b >= 0.

    Args:
        sizes: [S] > 0.
        errors: [S] in [0, 1].
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OptimizeWarning)  # a perfect fit has no covariance
        start = (max(float(errors[0]), 1e-3), 0.3)
        scaled = sizes / sizes[0]
        found, _ = curve_fit(
            lambda n, a, b: a * n**-b, scaled, errors, start, bounds=((0, 0), (np.inf, 3))
        )
    return float(found[0] * sizes[0] ** found[1]), float(found[1])


def _gain(parameters: tuple[float, float], size: float) -> float:
    a, b = parameters
    return float(a * size**-b * (1 - 2**-b))


def _explained(parameters: tuple[float, float], sizes: Floats, errors: Floats) -> float:
    logs = np.log(np.maximum(errors, 1e-6))
    rest = logs - np.log(np.maximum(parameters[0] * sizes ** -parameters[1], 1e-6))
    total = np.square(logs - logs.mean()).sum()
    return float(1 - np.square(rest).sum() / total) if total > 0 else 0.0
