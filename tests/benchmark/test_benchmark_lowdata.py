"""Low-data protocols on made-up features: what they may choose on, and what they can reach."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from catalog.splits import TEST, TRAIN
from study.lowdata import measure_few_heads, measure_lowdata
from study.phases import Phases
from study.pool import Pool, Rows
from study.study import Study

CLASSES, TRAINING, TESTED = 4, 64, 200


def study_of(
    spread: float, *, shuffle_test: bool = False, shuffle_train: bool = False, size: float = 1.0
) -> Study:
    """Features around four centres; labels dealt out anew where asked."""
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.eye(CLASSES, 16)
    labels = torch.arange(TRAINING + TESTED) % CLASSES
    features = (centres[labels] + spread * torch.randn(len(labels), 16, generator=generator)).relu()
    for part, dealt in ((slice(0, TRAINING), shuffle_train), (slice(TRAINING, None), shuffle_test)):
        if dealt:
            own = labels[part]
            labels[part] = own[torch.randperm(len(own), generator=generator)]
    features = size * features
    roles = np.repeat(np.array([TRAIN, TEST], np.int8), [TRAINING, TESTED])
    loaded = SimpleNamespace(label_names=list("abcd"))
    backbone = SimpleNamespace(is_scratch=False, phases=Phases())
    return Study(loaded, backbone, Pool(Rows(features, features, labels), None, roles))  # type: ignore[arg-type]


@pytest.mark.parametrize("shots", [1, 2, 8])
def test_easy_classes_are_learned_by_everyone(shots):
    for measure in (measure_lowdata, measure_few_heads):
        voices, arms = measure(study_of(0.2), 0, shots)
        for name, arm in arms.items():
            hits = (arm.test.argmax(1) == voices.split.test.labels).double().mean()
            assert hits > 0.95, name


def test_nothing_is_chosen_on_the_test_pictures():
    for measure in (measure_lowdata, measure_few_heads):
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
