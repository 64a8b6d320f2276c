"""What is measured, against loops by hand, and as `evaluate` calls it: offline and in batches."""

import math
import socket
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import (
    balanced_accuracy_score,
    brier_score_loss,
    log_loss,
    roc_auc_score,
)

from hf_knn.fit.metrics import (
    CALIBRATION_BINS,
    LogProbMetric,
    auroc,
    brier_score,
    complementarity,
    expected_calibration_error,
    mean_class_accuracy,
    measure,
    negative_log_likelihood,
    score_log_probs,
    top_k_accuracy,
)

NAMES = {"top1", "top5", "mean_class", "nll", "ece", "brier"}
Floats = NDArray[np.float64]


def sample(rows: int, classes: int, seed: int = 0) -> tuple[Floats, NDArray[np.int64]]:
    """Random log-probabilities, and labels that agree with them more often than not."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, rows)
    logits = generator.normal(size=(rows, classes))
    logits[np.arange(rows), labels] += generator.normal(1, 1, rows)
    logits = logits.astype(np.float32).astype(np.float64)  # what evaluate stores
    return logits - np.log(np.exp(logits).sum(1, keepdims=True)), labels


def logs(rows: list[list[float]]) -> Floats:
    with np.errstate(divide="ignore"):
        return np.log(np.array(rows))


# each number by hand


def test_top_1_and_top_2_by_eye() -> None:
    log_probs = logs([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.3, 0.6, 0.1], [0.2, 0.3, 0.5]])
    labels = np.array([0, 1, 1, 0])
    assert top_k_accuracy(log_probs, labels, 1) == 0.5
    assert top_k_accuracy(log_probs, labels, 2) == 0.75
    assert top_k_accuracy(log_probs, labels, 3) == 1


@pytest.mark.parametrize(
    ("classes", "k"), [(6, 1), (6, 2), (6, 5), (40, 5), (5, 5), (2, 5), (2, 1)]
)
def test_top_k_counts_who_is_ahead(classes: int, k: int) -> None:
    log_probs, labels = sample(80, classes)
    ahead = [(row > row[label]).sum() for row, label in zip(log_probs, labels, strict=True)]
    wanted = np.mean([number < k for number in ahead])
    assert top_k_accuracy(log_probs, labels, k) == pytest.approx(wanted, abs=1e-12)
    assert (wanted == 1) == (classes <= k)


@pytest.mark.parametrize("present", [[0], [3], [0, 4], [2, 7]])
def test_top_5_when_most_classes_do_not_occur(present: list[int]) -> None:
    log_probs, _ = sample(40, 8)
    labels = np.resize(present, 40)
    ahead = [(row > row[label]).sum() for row, label in zip(log_probs, labels, strict=True)]
    wanted = np.mean([number < 5 for number in ahead])
    assert top_k_accuracy(log_probs, labels, 5) == pytest.approx(wanted, abs=1e-12)


def test_top_5_holds_what_top_1_holds_also_with_ties() -> None:
    # three neighbours of each of seven classes, with equal votes
    log_probs, labels = np.full((1, 7), -math.log(7)), np.array([0])
    assert top_k_accuracy(log_probs, labels, 1) == 1
    assert top_k_accuracy(log_probs, labels, 5) == 1


@pytest.mark.parametrize("silence", [-math.inf, math.log(1e-12), float(np.float32(np.log(1e-12)))])
def test_a_class_without_a_vote_is_none_of_the_best(silence: float) -> None:
    # one vote each: of class 2, of class 0, of nobody
    log_probs = np.full((3, 6), silence)
    log_probs[0, 2] = log_probs[1, 0] = 0
    found = score_log_probs(log_probs, np.array([2, 1, 0]))
    assert (found["top1"], found["top5"], found["mean_class"]) == (1 / 3, 1 / 3, 1 / 3)
    assert found["nll"] == pytest.approx(2 / 3 * 12 * math.log(10))
    assert found["ece"] == pytest.approx(
        1 / 3, abs=1e-9
    )  # sure and wrong once; else as sure as right
    voices = torch.from_numpy(log_probs)
    assert complementarity(voices, voices, voices, torch.tensor([2, 1, 0]))["both_wrong"] == 2 / 3


def test_what_a_very_sure_head_says_of_the_others_counts() -> None:
    log_probs = np.log(np.array([[1.0, 1e-13, 1e-20, 1e-30, 1e-40, 1e-50, 1e-60]]))
    ranks = [top_k_accuracy(log_probs, np.array([label]), 5) for label in range(7)]
    assert ranks == [1, 1, 1, 1, 1, 0, 0]
    through_evaluate = measure(torch.from_numpy(log_probs), torch.tensor([4]))
    assert through_evaluate["top5"] == 1


def test_mean_per_class_by_eye() -> None:
    log_probs = logs([[0.7, 0.2, 0.1]] * 5)
    # three pictures of class 0, all right; two of class 2, none right; class 1 does not occur
    labels = np.array([0, 0, 0, 2, 2])
    assert mean_class_accuracy(log_probs, labels) == 0.5
    assert top_k_accuracy(log_probs, labels, 1) == 0.6


def test_mean_per_class_of_many() -> None:
    log_probs, labels = sample(200, 9)
    labels[labels == 4] = 5  # one class is absent
    assert 4 in log_probs.argmax(1)
    by_hand = np.mean([(log_probs[labels == c].argmax(1) == c).mean() for c in set(labels)])
    with pytest.warns(UserWarning, match="not in y_true"):
        theirs = balanced_accuracy_score(labels, log_probs.argmax(1))
    assert by_hand == pytest.approx(theirs, abs=1e-12)
    assert mean_class_accuracy(log_probs, labels) == pytest.approx(by_hand, abs=1e-12)


def test_likelihood_is_floored() -> None:
    log_probs = logs([[1.0, 0.0], [0.5, 0.5], [1e-20, 1.0], [1e-11, 1.0]])
    own = [12 * math.log(10), math.log(2), 12 * math.log(10), 11 * math.log(10)]
    found = negative_log_likelihood(log_probs, np.array([1, 0, 0, 0]))
    assert found == pytest.approx(np.mean(own), rel=1e-12)
    assert negative_log_likelihood(log_probs[:1], np.array([0])) == 0


def test_likelihood_of_many() -> None:
    log_probs, labels = sample(300, 7)
    wanted = log_loss(labels, np.exp(log_probs), labels=range(7))
    assert negative_log_likelihood(log_probs, labels) == pytest.approx(wanted, rel=1e-9)


def test_calibration_by_eye() -> None:
    # confidences 0.9, 0.6, 0.8, 0.7: right, right, right, wrong
    log_probs = logs([[0.9, 0.1], [0.4, 0.6], [0.8, 0.2], [0.7, 0.3]])
    labels = np.array([0, 1, 0, 1])
    # two bins of equal mass: {0.6, 0.7} is right half the time, {0.8, 0.9} always
    found = expected_calibration_error(log_probs, labels, bins=2)
    assert found == pytest.approx((0.15 + 0.15) / 2, abs=1e-12)
    # one bin: 0.75 and 0.75
    assert expected_calibration_error(log_probs, labels, bins=1) == pytest.approx(0, abs=1e-12)
    # a bin per picture, as with the default of 15: 0.1, 0.4, 0.2, 0.7
    assert expected_calibration_error(log_probs, labels) == pytest.approx(1.4 / 4, abs=1e-12)


def test_calibration_bins_of_unequal_size() -> None:
    # 0.5, 0.6 | 0.9: gaps |0.55 - 0.5| twice and |0.9 - 0| once
    log_probs = logs([[0.9, 0.1], [0.5, 0.5], [0.6, 0.4]])
    found = expected_calibration_error(log_probs, np.array([1, 0, 1]), bins=2)
    assert found == pytest.approx((2 * 0.05 + 0.9) / 3, abs=1e-12)


def test_calibration_of_many() -> None:
    log_probs, labels = sample(15 * 8, 5)
    order = sorted(range(120), key=lambda row: log_probs[row].max())
    total = 0.0
    for start in range(0, 120, 8):
        rows = order[start : start + 8]
        confidence = sum(math.exp(log_probs[row].max()) for row in rows) / 8
        right = sum(int(log_probs[row].argmax() == labels[row]) for row in rows) / 8
        total += 8 / 120 * abs(confidence - right)
    assert CALIBRATION_BINS == 15
    assert expected_calibration_error(log_probs, labels) == pytest.approx(total, abs=1e-12)


def test_brier_by_eye_and_of_many() -> None:
    log_probs = logs([[1, 0], [0.5, 0.5], [0, 1]])
    # 0, then twice a quarter, then certain and wrong
    assert brier_score(log_probs, np.array([0, 0, 0])) == pytest.approx((0 + 0.5 + 2) / 3)
    log_probs, labels = sample(200, 2)
    wanted = 2 * brier_score_loss(labels, np.exp(log_probs[:, 1]))
    assert brier_score(log_probs, labels) == pytest.approx(wanted)


def test_complementarity_by_eye() -> None:
    labels = torch.tensor([0, 0, 0, 0])
    right, wrong = [-0.1, -2.0], [-2.0, -0.1]
    head = torch.tensor([right, right, wrong, wrong])
    knn = torch.tensor([right, wrong, right, wrong])
    blend = torch.tensor([right, right, right, wrong])
    assert complementarity(head, knn, blend, labels) == {
        "both_wrong": 0.25,
        "oracle": 0.75,
        "blend_gain": 0.25,
    }


def test_auroc_counts_pairs() -> None:
    log_probs, labels = sample(60, 2)
    log_probs[:10] = log_probs[10:20]  # with ties
    scores = log_probs[:, 1]
    pairs = [(a, b) for a in scores[labels == 1] for b in scores[labels == 0]]
    wanted = np.mean([float(a > b) + 0.5 * (a == b) for a, b in pairs])
    assert auroc(log_probs, labels) == pytest.approx(wanted, abs=1e-12)
    assert auroc(log_probs, labels) == pytest.approx(roc_auc_score(labels, np.exp(scores)))
    assert 0.5 < wanted < 1


def test_auroc_of_one_class_is_unknown() -> None:
    assert math.isnan(auroc(logs([[0.4, 0.6], [0.2, 0.8]]), np.array([1, 1])))


def test_auroc_of_certain_votes() -> None:
    assert auroc(logs([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]), np.array([0, 1, 1])) == 1


@given(
    rows=st.integers(1, 40),
    classes=st.integers(2, 9),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_bounds_and_permutations(rows: int, classes: int, seed: int) -> None:
    log_probs, labels = sample(rows, classes, seed)
    shuffled = np.random.default_rng(seed).permutation(rows)
    renamed = np.random.default_rng(seed + 1).permutation(classes)
    for compute in (
        lambda p, y: top_k_accuracy(p, y, 1),
        lambda p, y: top_k_accuracy(p, y, 5),
        mean_class_accuracy,
        expected_calibration_error,
    ):
        value = compute(log_probs, labels)
        assert 0 <= value <= 1
        assert compute(log_probs[shuffled], labels[shuffled]) == pytest.approx(value, abs=1e-9)
        back = np.argsort(renamed)  # class c is now called renamed[c]
        assert compute(log_probs[:, back], renamed[labels]) == pytest.approx(value, abs=1e-9)


# as evaluate.Metric


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a metric reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


PLAIN = {
    "top1": lambda p, y: top_k_accuracy(p, y, 1),
    "top5": lambda p, y: top_k_accuracy(p, y, 5),
    "mean_class": mean_class_accuracy,
    "nll": negative_log_likelihood,
    "ece": expected_calibration_error,
    "brier": brier_score,
}


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", [*PLAIN, "auroc"])
def test_all_ways_of_evaluate_agree(name: str) -> None:
    log_probs, labels = sample(50, 2 if name == "auroc" else 8)
    wanted = PLAIN.get(name, auroc)(log_probs, labels)
    metric = LogProbMetric(name)
    assert isinstance(metric, evaluate.Metric)
    whole = metric.compute(predictions=log_probs, references=labels)
    assert whole == {name: pytest.approx(wanted, abs=1e-6)}
    for start in range(0, 50, 20):  # 20, 20 and 10
        rows = slice(start, start + 20)
        metric.add_batch(predictions=log_probs[rows], references=labels[rows])
    assert metric.compute() == whole
    for row, label in zip(log_probs, labels, strict=True):
        metric.add(prediction=row, reference=label)
    assert metric.compute() == whole
    listed = metric.compute(predictions=log_probs.tolist(), references=labels.tolist())
    assert listed == whole


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("classes", [2, 3, 8])
def test_measure_has_every_number_of_a_voice(classes: int) -> None:
    log_probs, labels = sample(70, classes)
    found = measure(torch.from_numpy(log_probs), torch.from_numpy(labels))
    assert found.keys() == NAMES | ({"auroc"} if classes == 2 else set())
    for name, value in found.items():
        assert isinstance(value, float)
        wanted = PLAIN.get(name, auroc)(log_probs, labels)
        assert value == pytest.approx(wanted, abs=1e-6), name


def test_measure_takes_half_precision_and_no_gradient() -> None:
    log_probs, labels = sample(70, 4)
    half = torch.from_numpy(log_probs).bfloat16().requires_grad_()
    found = measure(half.detach(), torch.from_numpy(labels))
    wanted = measure(half.detach().float(), torch.from_numpy(labels))
    assert found == wanted


def test_an_unknown_metric() -> None:
    with pytest.raises(ValueError, match=r"'auroc', 'brier', 'ece', .*but got 'f1'"):
        LogProbMetric("f1")
