"""Planted label errors rank high and are named; clean labels are not."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from support.pictures import random_features

from hf_knn.checkup.findings import Kind, Pictures
from hf_knn.checkup.labels import label_findings, score_labels
from hf_knn.data.splits import stratified_folds
from hf_knn.fit.voices import K, choose_cell, out_of_fold

CLASSES = 4


def rows(spread: float = 1.0):
    found = random_features([row % CLASSES for row in range(240)], spread=spread)
    return found.features, found.labels


def table(labels: torch.Tensor) -> Pictures:
    numbers = np.arange(len(labels))
    names = ["ant", "bee", "cat", "dog"]
    return Pictures(["train"] * len(labels), numbers, numbers, [""] * len(labels),
                    labels.numpy(), names)  # fmt: skip


def asked(features, labels):
    return out_of_fold(features, labels, CLASSES, stratified_folds(labels, 5, 0))


def test_planted_errors_are_ranked_high_and_named_with_the_right_class():
    features, clean = rows()
    labels = clean.clone()
    bad = np.random.default_rng(0).choice(len(labels), 12, replace=False)
    labels[bad] = (clean[bad] + 1) % CLASSES
    voices = asked(features, labels)
    scores = score_labels(voices, labels)
    assert roc_auc_score(np.isin(np.arange(240), bad), scores.score) > 0.99
    found = label_findings(scores, voices, table(labels))
    assert {finding.picture for finding in found} <= set(bad.tolist())
    assert len(found) >= 11
    for finding in found:
        assert finding.kind is Kind.LABEL_ERROR
        assert finding.suggested == int(clean[finding.picture])


def test_clean_labels_raise_no_alarm_even_where_classes_overlap():
    for spread, most in ((1.0, 0.0), (2.5, 0.03)):
        features, labels = rows(spread)
        scores = score_labels(asked(features, labels), labels)
        assert scores.is_named.mean() <= most


def test_labels_at_random_are_told_by_few():
    features, labels = rows()
    shuffled = labels[torch.randperm(240, generator=torch.Generator().manual_seed(0))]
    scores = score_labels(asked(features, shuffled), shuffled)
    assert scores.is_named.mean() < 0.1


def test_no_voice_has_seen_the_row_it_is_asked_about():
    """With labels that say nothing, a voice that had seen the row would be right."""
    features, _ = rows()
    labels = torch.from_numpy(np.random.default_rng(1).integers(0, CLASSES, 240))
    voices = asked(features, labels)
    for log_probs in (voices.head, voices.knn, voices.blend):
        assert (log_probs.argmax(1) == labels).double().mean() < 0.4
    assert voices.asked.all()


def test_the_neighbours_are_those_of_scikit_learn():
    features, labels = rows(2.0)
    folds = stratified_folds(labels, 5, 0)
    voices = out_of_fold(features, labels, CLASSES, folds)
    for fold in folds:
        fitted = features[fold.fitted].double()
        mean = fitted.mean(0)
        unit = torch.nn.functional.normalize(fitted - mean, dim=1).numpy()
        queries = torch.nn.functional.normalize(features[fold.held_out].double() - mean, dim=1)

        def weights(distances):
            return np.exp(-(distances**2) / 0.14)

        oracle = KNeighborsClassifier(K, weights=weights).fit(unit, labels[fold.fitted].numpy())
        wanted = oracle.predict_proba(queries.numpy())
        found = voices.knn[fold.held_out].exp().numpy()
        assert np.abs(found - wanted).max() < 5e-3  # rows are stored as float16


def test_the_head_is_that_of_scikit_learn():
    """With one choice of regulariser and temperature, made on the rows of the first fold."""
    features, labels = rows(2.0)
    folds = stratified_folds(labels, 5, 0)
    voices = out_of_fold(features, labels, CLASSES, folds)
    first = folds[0].fitted
    cell = choose_cell(features[first], labels[first], CLASSES)
    for fold in folds:
        fitted = features[fold.fitted].double()
        mean = fitted.mean(0)
        unit = torch.nn.functional.normalize(fitted - mean, dim=1).numpy()
        queries = torch.nn.functional.normalize(features[fold.held_out].double() - mean, dim=1)
        scale = np.square(unit - unit.mean(0)).sum() / min(unit.shape[1], len(unit) - 1)
        oracle = Ridge(alpha=cell.regularizer * scale)
        oracle.fit(unit, np.eye(CLASSES)[labels[fold.fitted]])
        wanted = torch.from_numpy(oracle.predict(queries.numpy()) / cell.temperature).softmax(1)
        found = voices.head[fold.held_out].exp().numpy()
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)


def test_features_of_any_size_say_the_same():
    features, labels = rows(spread=3.0)
    wanted, tiny = asked(features, labels), asked(features * 1e-20, labels)
    torch.testing.assert_close(tiny.head, wanted.head, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tiny.knn, wanted.knn, atol=0.01, rtol=0.01)  # of float16 rows
    assert bool((wanted.head.argmax(1) == labels).double().mean() > 0.5)


def test_one_class_is_refused():
    features, labels = rows()
    voices = out_of_fold(features, labels * 0, 1, stratified_folds(labels, 2, 0))
    with pytest.raises(ValueError, match="at least two classes"):
        score_labels(voices, labels * 0)
