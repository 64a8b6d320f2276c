"""Strangers are found, clean rows are not; p-values are uniform where nothing is wrong."""

import numpy as np
from scipy.stats import kstest
from sklearn.neighbors import NearestNeighbors

from hf_knn.checkup.findings import Pictures
from hf_knn.checkup.labels import NEIGHBOR, conformal_p_values, deviations, outlier_findings


def distances_of(rows) -> np.ndarray:
    near = NearestNeighbors(n_neighbors=NEIGHBOR + 1).fit(rows)
    return near.kneighbors(rows)[0][:, -1]


def clean(seed: int, count: int = 600) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 6
    centres = 4 * generator.standard_normal((6, 32))
    return centres[labels] + generator.standard_normal((count, 32)), labels


def test_strangers_are_found_and_clean_rows_are_not():
    for seed in range(5):
        rows, labels = clean(seed)
        assert (deviations(distances_of(rows), labels) > 4).sum() == 0
        rows[[10, 200, 431]] = 30 * np.random.default_rng(seed).standard_normal((3, 32))
        far = np.flatnonzero(deviations(distances_of(rows), labels) > 4)
        assert set(far.tolist()) == {10, 200, 431}


def test_a_scattered_class_is_no_outlier():
    rows, labels = clean(0)
    rows[labels == 2] *= 6
    far = deviations(distances_of(rows), labels) > 4
    assert far[labels == 2].sum() <= 1


def test_equal_rows_are_not_far_from_each_other():
    assert not (deviations(np.zeros(50), np.zeros(50, np.int64)) > 4).any()


def test_p_values_are_the_share_of_its_class_that_is_as_far():
    distances, labels = np.array([1.0, 3.0, 3.0, 9.0, 5.0]), np.array([0, 0, 0, 0, 1])
    assert conformal_p_values(distances, labels).tolist() == [1.0, 0.75, 0.75, 0.25, 1.0]
    generator = np.random.default_rng(0)
    values = conformal_p_values(generator.exponential(size=5000), np.zeros(5000, np.int64))
    assert kstest(values, "uniform").pvalue > 0.01


def test_a_finding_says_where():
    distances = np.r_[np.linspace(1, 1.2, 40), 30.0]
    numbers = np.arange(41)
    table = Pictures(["train"] * 41, numbers, numbers, [""] * 41, numbers * 0, ["ant"])
    (found,) = outlier_findings(distances, table)
    assert found.picture == 40
    assert "ant" in found.detail
    assert 0.5 < found.score < 1
