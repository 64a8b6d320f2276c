"""The power law is found again, and nothing is said where it does not hold."""

import numpy as np
import pytest
import torch
from support.pictures import random_features

from hf_knn.checkup.learning_curve import FRACTIONS, fit_curve, fit_power_law, measure_curve
from hf_knn.data.splits import stratified_folds
from hf_knn.fit.voices import out_of_fold

SIZES = np.array([100.0, 200.0, 400.0, 800.0])


def law(a: float, b: float, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """[5, 4] accuracies of five folds."""
    generator = np.random.default_rng(seed)
    return 1 - a * SIZES**-b + noise * generator.standard_normal((5, 4))


def test_a_power_law_is_found_again():
    a, b = fit_power_law(SIZES, 3.0 * SIZES**-0.4)
    assert (a, b) == pytest.approx((3.0, 0.4), rel=1e-3)


def test_twice_the_pictures_bring_what_the_law_says():
    curve = fit_curve(SIZES, law(3.0, 0.4), 10)
    assert curve.gain == pytest.approx(3.0 * 800**-0.4 - 3.0 * 1600**-0.4, rel=1e-3)
    assert curve.spread == pytest.approx(0, abs=1e-6)
    assert "With 80 pictures per class" in curve.statement()
    assert f"{100 * curve.gain:+.1f} points" in curve.statement()


def test_noise_shows_in_the_spread():
    quiet, loud = (fit_curve(SIZES, law(3.0, 0.4, noise), 10) for noise in (0.002, 0.01))
    assert 0 < quiet.spread < loud.spread
    assert abs(quiet.gain - fit_curve(SIZES, law(3.0, 0.4), 10).gain) < 0.02


@pytest.mark.parametrize(
    ("accuracies", "classes", "reason"),
    [
        (np.tile([0.5, 0.7, 0.6, 0.62], (5, 1)), 10, "does not fall like a power"),
        (np.tile([0.7, 0.6, 0.5, 0.4], (5, 1)), 10, "does not fall like a power"),
        (np.ones((5, 4)), 10, "nothing that was held out is answered wrong"),
        (law(3.0, 0.4), 300, "too few pictures per class"),
        (law(3.0, 0.4)[:1], 10, "from fold to fold"),
    ],
)
def test_nothing_is_said_where_nothing_can_be_said(accuracies, classes, reason):
    curve = fit_curve(SIZES, accuracies, classes)
    assert np.isnan(curve.gain)
    assert reason in curve.statement()
    assert "points" not in curve.statement()


def test_parts_are_measured_on_rows_held_out():
    found = random_features([row % 4 for row in range(400)], spread=3.0)
    folds = stratified_folds(found.labels, 4, 0)
    voices = out_of_fold(found.features, found.labels, 4, folds)
    seen: list[int] = []
    curve = measure_curve(found.features, found.labels, 4, folds, voices, 0, seen.append)
    assert sum(seen) == len(folds) * len(FRACTIONS)
    assert curve.accuracies.shape == (4, 4)
    assert curve.sizes.tolist() == pytest.approx([300 / 8, 75, 150, 300], abs=3)
    wanted = (voices.blend.argmax(1) == found.labels).double()
    held = torch.stack([wanted[fold.held_out].mean() for fold in folds])
    assert curve.accuracies[:, -1] == pytest.approx(held.numpy())
    assert curve.accuracies[:, 0].mean() < curve.accuracies[:, -1].mean()
