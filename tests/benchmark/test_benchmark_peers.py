"""Second voices: equal trials, probabilities, and the predictions of scikit-learn."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC
from torch.nn import functional

from study.arms import choose_weight, pair_accuracies
from study.arms_of import Split, Voices, directions
from study.peers import PEERS, TRIALS, Data, _best, _neighbors, measure_peers
from study.pool import Rows

CLASSES = 5


def rows(count: int, seed: int, classes: int = CLASSES) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    features = 2 * torch.eye(CLASSES, 12)[labels] + torch.randn(count, 12, generator=generator)
    return Rows(features.relu(), features.relu(), labels)


@pytest.fixture(scope="module")
def voices() -> Voices:
    return Voices(Split(rows(60, 0), rows(40, 1), rows(80, 2)), CLASSES, 0)


def data_of(voices: Voices) -> Data:
    train, validation, test = voices.split
    mean = train.head.mean(0)
    unit = [functional.normalize(r.head - mean, dim=1).numpy() for r in (train, validation, test)]
    return Data(unit[0], train.labels.numpy(), unit[1], unit[2], 0)


def test_every_voice_has_as_many_trials(voices):
    counts = {name: len(list(fit(data_of(voices)))) for name, fit in PEERS.items()}
    counts["knn"] = len(list(_neighbors(voices)))
    assert set(counts.values()) == {TRIALS}, counts
    for fit in PEERS.values():
        settings = [tuple(trial.chosen.items()) for trial in fit(data_of(voices))]
        assert len(set(settings)) == TRIALS


def test_every_arm_says_probabilities(voices):
    for name, arm in measure_peers(voices).items():
        total = arm.test.double().exp().sum(1)
        assert torch.allclose(total, torch.ones_like(total), atol=1e-4), name


def test_every_two_voices_are_blended(voices):
    arms, labels = measure_peers(voices), voices.split.test.labels
    chosen = {name: arms[name] for name in (*PEERS, "knn")}
    pairs = pair_accuracies(chosen, voices.split.validation.labels, labels)
    assert len(pairs) == 36
    for name in PEERS:  # the arms that are kept whole
        kept = arms[f"blend:{name}+knn"].test.argmax(1)
        assert pairs[f"{name}+knn"] == accuracy_score(labels, kept)
    first, second = arms["svm"], arms["lda"]
    assert first.validation is not None
    assert second.validation is not None
    weight = choose_weight(first.validation, second.validation, voices.split.validation.labels)
    plain = (1 - weight) * first.test.double().exp() + weight * second.test.double().exp()
    assert pairs["svm+lda"] == accuracy_score(labels, plain.argmax(1))


@pytest.mark.parametrize("name", ["svm", "knn_sklearn"])
def test_predictions_are_those_of_scikit_learn(name, voices):
    data = data_of(voices)
    arm = _best(list(PEERS[name](data)), voices.split.validation.labels, CLASSES)
    if name == "svm":
        svm = SVC(C=arm.chosen["C"], gamma=arm.chosen["gamma"], kernel="rbf")
        scores = svm.fit(data.train, data.labels).decision_function(data.test)
    else:
        near = KNeighborsClassifier(arm.chosen["k"], weights="distance")
        scores = near.fit(data.train, data.labels).predict_proba(data.test)
    assert np.array_equal(arm.test.argmax(1).numpy(), scores.argmax(1))


def test_features_of_any_size_are_the_same_to_every_voice(voices):
    """Those of untrained weights have lengths of 1e-20: peers took them for zero."""
    smaller = [part._replace(head=1e-21 * part.head) for part in voices.split]
    tiny = Voices(Split(*smaller), CLASSES, 0, voices.head)
    arms, labels = measure_peers(tiny), voices.split.test.labels.numpy()
    for name, arm in measure_peers(voices).items():
        first, second = (accuracy_score(labels, a.test.argmax(1)) for a in (arm, arms[name]))
        assert abs(first - second) < 0.03, name


def test_logistic_regression_is_fitted_to_its_end(voices):
    """A loose tolerance stopped it after one step, and made a weak peer of it."""
    data = data_of(voices).reduced()
    trials = list(PEERS["logistic"](data_of(voices)))
    for trial in trials[:2]:  # C of 1 and 10; beyond them the optimum is flat
        fit = LogisticRegression(C=trial.chosen["C"], max_iter=5000, tol=1e-8)
        wanted = fit.fit(data.train, data.labels).predict_proba(data.test)
        assert np.abs(np.exp(trial.test) - wanted).max() < 0.05


def test_logistic_regression_ends_where_features_are_of_very_unlike_spread():
    rng = np.random.default_rng(0)
    labels = np.arange(400) % CLASSES
    values = (
        rng.normal(size=(400, 24)) * np.logspace(0, -3, 24) + 0.05 * np.eye(CLASSES, 24)[labels]
    )
    unit = directions(torch.from_numpy(values), torch.from_numpy(values).mean(0)).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        assert len(list(PEERS["logistic"](Data(unit, labels, unit[:9], unit[:9], 0)))) == TRIALS


def test_a_class_that_was_not_seen_has_no_probability():
    split = Split(rows(60, 0, CLASSES - 1), rows(40, 1), rows(80, 2))
    for name, arm in measure_peers(Voices(split, CLASSES, 0)).items():
        if "+" not in name and name not in ("head", "blend"):
            assert float(arm.test[:, -1].exp().max()) == 0, name
