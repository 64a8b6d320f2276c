"""Low-data protocols on made-up features: what they may choose on, and what they can reach."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from support.made_up_study import CLASSES, study_of

from study.arms_of import FIXED
from study.few import FewVoices
from study.lowdata import measure_few_losses, measure_lowdata
from study.phases import Phases


@pytest.mark.parametrize("shots", [1, 2, 8])
def test_easy_classes_are_learned_by_everyone(shots):
    for measure in (measure_lowdata, measure_few_losses):
        voices, arms = measure(study_of(0.2), 0, shots)
        for name, arm in arms.items():
            hits = (arm.test.argmax(1) == voices.split.test.labels).double().mean()
            assert hits > 0.95, name


def test_nothing_is_chosen_on_the_test_pictures():
    for measure in (measure_lowdata, measure_few_losses):
        _, first = measure(study_of(1.0), 3, 4)
        _, second = measure(study_of(1.0, shuffle_test=True), 3, 4)
        assert {name: arm.chosen for name, arm in first.items()} == {
            name: arm.chosen for name, arm in second.items()
        }


def test_labels_without_meaning_are_answered_by_chance():
    voices, arms = measure_lowdata(study_of(0.2, shuffle_train=True, shuffle_test=True), 0, 8)
    for arm in arms.values():
        hits = float((arm.test.argmax(1) == voices.split.test.labels).double().mean())
        assert 0.12 < hits < 0.38  # a quarter, of 200 pictures


def test_the_size_of_features_does_not_matter_to_ridge():
    """Those of untrained weights have lengths of 1e-20."""
    found = [measure_lowdata(study_of(1.0, size=size), 1, 8)[1]["ridge"] for size in (1.0, 1e-21)]
    assert torch.allclose(found[0].test, found[1].test, atol=1e-3)


def test_the_ridge_arm_ranks_classes_as_scikit_learn_does():
    voices, arms = measure_lowdata(study_of(1.0), 1, 8)
    train, _, test = voices.split
    mean = train.head.mean(0)
    unit, asked = (torch.nn.functional.normalize(r.head - mean, dim=1) for r in (train, test))
    fit = Ridge(arms["ridge"].chosen["regularizer"])
    fit.fit(unit.numpy(), np.eye(CLASSES)[train.labels.numpy()])
    assert np.array_equal(arms["ridge"].test.argmax(1), fit.predict(asked.numpy()).argmax(1))


@pytest.mark.parametrize(
    ("shots", "has_seen", "folds"), [(1, False, 0), (2, False, 2), (2, True, 0)]
)
def test_folds_are_of_pictures_that_nothing_has_seen(shots, has_seen, folds):
    """Features that were trained on a label answer for it, in whatever fold it lies."""
    split = study_of(1.0).few_voices(0, shots).split
    voices = FewVoices(split, CLASSES, 0, Phases(), has_seen=has_seen)
    assert len(voices.folds) == folds
    if not folds:
        assert voices.tuned is None
        assert voices.blend.chosen == FIXED
        return
    assert voices.held is not None
    asked = np.concatenate([fold.held_out for fold in voices.folds])
    assert sorted(asked) == list(range(shots * CLASSES))
    assert torch.equal(voices.held.labels, split.train.labels[torch.from_numpy(asked)])
    sizes = [len(part.asked.labels) for part in voices.held.parts]
    for part, near in zip(voices.held.parts, voices.held.near.ids.split(sizes), strict=True):
        assert int(near.max()) < len(part.fitted.labels)  # rows of the fold's own datastore


def test_protocols_share_what_was_fitted():
    study = study_of(1.0)
    first, second = measure_lowdata(study, 0, 8), measure_few_losses(study, 0, 8)
    assert first[0] is second[0]
    assert first[1]["head"].chosen == second[1]["plain"].chosen
