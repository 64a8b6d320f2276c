"""What is measured, as `evaluate.Metric` objects that work offline.

Recall and the ROC curve are scikit-learn's. What is by hand takes no more lines than a call would:
of equal classes scikit-learn's top-k takes the last, its log loss of a certain answer is not 0, its
balanced accuracy warns where a class does not occur, and its Brier score knows more than two
classes from version 1.7 on only.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import evaluate
import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta
from sklearn.metrics import recall_score, roc_auc_score
from torch import Tensor

from ..core.votes import PROBABILITY_FLOOR
from ..data.loading import PREDICTION_FEATURES

ERROR_RATES = (0.01, 0.02, 0.05, 0.1, 0.2)
"""For which `KnnTrainer.tune` looks for thresholds."""

SURENESS = 0.9
_CANDIDATES, _FIRST_ERRORS = 100, 10


def thresholds(log_probs: Tensor, labels: Tensor, rates: Sequence[float]) -> dict[str, float]:
    """From which confidence on no more than a share of the answers is wrong, 90 % sure.

    Whatever the confidence means: the promise is broken in one of ten samples at most, also by one
    that says nothing. Candidates are tested in a sequence that the number of rows alone fixes, from
    few answers to many, each by its exact upper bound (Clopper-Pearson). The first that fails ends
    it, so that many tests go wrong no more often than one (fixed-sequence testing; Angelopoulos et
    al., *Learn then Test*, 2021).

    Args:
        log_probs: [N, C] of rows that nothing was fitted on, independent of each other.
        labels: [N] int64.
        rates: of errors, each in (0, 1).

    Returns:
        Rate, as text, to threshold in [0, 1], the confidence of a row; rates for which there are
        too few rows, or too many errors, are left out.
    """
    confidence, answer = log_probs.float().exp().clamp_max(1).max(1)  # as `explain` reads them
    order = confidence.argsort(descending=True, stable=True)
    wrong = (answer != labels)[order].long().cumsum(0).numpy()
    ranked = confidence[order].numpy()
    found = {f"{rate:g}": _lowest_safe(ranked, wrong, rate) for rate in rates}
    return {rate: threshold for rate, threshold in found.items() if threshold is not None}


def _lowest_safe(
    confidence: NDArray[np.float32], wrong: NDArray[np.int64], rate: float
) -> float | None:
    """The last of the candidates in a row that are safe.

    Args:
        confidence: [N] descending.
        wrong: [N] errors up to each row.
        rate: of errors.
    """
    ranks = _candidates(len(confidence), rate)
    if not len(ranks):
        return None
    lowest = confidence[ranks - 1]
    # answers of one confidence are given together; without the last of them, which sets the
    # threshold, they are a sample of what lies above it
    counts = np.searchsorted(-confidence, -lowest, side="right") - 1
    fails = upper_bounds(wrong[counts - 1], counts) > rate
    passed = int(fails.argmax()) if fails.any() else len(fails)
    return float(lowest[passed - 1]) if passed else None


def _candidates(rows: int, rate: float) -> NDArray[np.int64]:
    """How many answers to try, ascending: it must not depend on what the rows say.

    The first test wants to pass: ten errors' worth of answers, but no more than a third of them.
    """
    fewest = math.ceil(math.log(1 - SURENESS) / math.log1p(-rate)) + 1  # none of them wrong
    first = max(fewest, min(round(_FIRST_ERRORS / rate), rows // 3))
    if first > rows:
        return np.empty(0, np.int64)
    return np.unique(np.linspace(first, rows, _CANDIDATES).round().astype(np.int64))


def upper_bounds(
    errors: NDArray[np.int64], counts: NDArray[np.int64], sureness: float = SURENESS
) -> NDArray[np.float64]:
    """The error rates that are exceeded with a chance of 1 - sureness only (Clopper-Pearson).

    Args:
        errors: [M] of so many answers.
        counts: [M], > 0.
        sureness: in (0, 1).
    """
    is_all = errors >= counts
    bounds = beta.ppf(sureness, errors + 1, np.where(is_all, 1, counts - errors))
    return np.where(is_all, 1.0, bounds)


CALIBRATION_BINS = 15
_FLOAT32_ERROR = 1e-5  # of log(1e-12)
ALL = "all"

COMPLEMENTARITY = ("both_wrong", "oracle", "blend_gain")
"""What `complementarity` returns."""

Scores = NDArray[np.float64]
Labels = NDArray[np.int64]


def is_possible(log_probs: Scores) -> NDArray[np.bool_]:
    """[N, C] which classes were given any probability: a class without a vote is no answer.

    Such a class has -inf, or the floor that stands for it in `logits`. What a very sure head says
    of the other classes lies below the floor, and counts.

    Args:
        log_probs: [N, C].
    """
    is_floor = np.abs(log_probs - np.log(PROBABILITY_FLOOR)) < _FLOAT32_ERROR
    return (log_probs > -np.inf) & ~is_floor


def answers_of(log_probs: Scores) -> Labels:
    """[N] the most probable class of each picture, the lowest of equal ones; -1 where none is."""
    return np.where(is_possible(log_probs).any(axis=1), log_probs.argmax(axis=1), -1)


def top_k_accuracy(log_probs: Scores, labels: Labels, k: int) -> float:
    """Share of pictures whose label is among the k most probable classes.

    Args:
        log_probs: [N, C]; classes without any probability are not counted, see `is_possible`.
        labels: [N].
        k: from 1; more than C counts as C.
    """
    return float(is_in_top(log_probs, labels, k).mean())


def is_in_top(log_probs: Scores, labels: Labels, k: int) -> NDArray[np.bool_]:
    """[N] whether each label is among the k most probable classes; see `top_k_accuracy`."""
    best = np.argsort(-log_probs, axis=1, kind="stable")[:, :k]  # the lower of equal classes first
    found = (best == labels[:, None]) & np.take_along_axis(is_possible(log_probs), best, axis=1)
    return found.any(axis=1)


def mean_class_accuracy(log_probs: Scores, labels: Labels) -> float:
    """Mean over the classes that occur of their top-1 accuracy."""
    predicted = answers_of(log_probs)
    present = np.unique(labels)
    return float(recall_score(labels, predicted, labels=present, average="macro", zero_division=0))


def negative_log_likelihood(log_probs: Scores, labels: Labels) -> float:
    """Mean of ``-log p(label)``, each p floored at 1e-12."""
    return float(surprises(log_probs, labels).mean())


def surprises(log_probs: Scores, labels: Labels) -> Scores:
    """[N] ``-log p(label)``, each p floored at 1e-12."""
    own = log_probs[np.arange(len(labels)), labels]
    return np.abs(np.maximum(own, np.log(PROBABILITY_FLOOR)))  # never -0


def expected_calibration_error(
    log_probs: Scores, labels: Labels, bins: int = CALIBRATION_BINS
) -> float:
    """Mean gap between confidence and accuracy over bins of equal mass.

    Args:
        log_probs: [N, C].
        labels: [N].
        bins: how many bins of (nearly) the same number of pictures.
    """
    found = calibration_bins(log_probs, labels, bins)
    return sum(n * abs(confidence - right) for confidence, right, n in found) / len(labels)


def calibration_bins(log_probs: Scores, labels: Labels, bins: int) -> list[list[float]]:
    """Bins of (nearly) the same number of pictures, by how sure the answers are.

    Returns:
        Mean confidence, accuracy and number of pictures of each bin.
    """
    confidence = np.exp(log_probs.max(axis=1))
    correct = (answers_of(log_probs) == labels).astype(np.float64)
    return [
        [float(confidence[part].mean()), float(correct[part].mean()), float(len(part))]
        for part in bins_of(confidence, bins)
    ]


def bins_of(confidence: Scores, bins: int = CALIBRATION_BINS) -> list[Labels]:
    """The rows of bins of (nearly) the same number of pictures, by how sure the answers are.

    Args:
        confidence: [N] of the answers.
        bins: at most so many; never more than rows.
    """
    order = np.argsort(confidence, kind="stable")
    return np.array_split(order, min(bins, len(confidence)))


def reliability(log_probs: Tensor, labels: Tensor) -> list[list[float]]:
    """The bins of `expected_calibration_error`, to be drawn.

    Args:
        log_probs: [N, C].
        labels: [N] int64.

    Returns:
        Mean confidence, accuracy and number of pictures of each bin, by confidence.
    """
    scores, wanted = log_probs.double().cpu().numpy(), labels.cpu().numpy()
    return calibration_bins(scores, wanted, CALIBRATION_BINS)


def brier_score(log_probs: Scores, labels: Labels) -> float:
    """Mean over pictures of ``sum_c (p_c - [c = label])^2``, in [0, 2]."""
    return float(brier_scores(log_probs, labels).mean())


def brier_scores(log_probs: Scores, labels: Labels) -> Scores:
    """[N] the score of each picture, see `brier_score`."""
    gaps = np.exp(log_probs)
    gaps[np.arange(len(labels)), labels] -= 1
    return (gaps**2).sum(axis=1)


def auroc(log_probs: Scores, labels: Labels) -> float:
    """Area under the ROC curve of class 1 of two; NaN if only one class occurs."""
    if len(np.unique(labels)) < 2:
        return float("nan")
    floored = np.maximum(log_probs, np.log(PROBABILITY_FLOOR))
    return float(roc_auc_score(labels, floored[:, 1] - floored[:, 0]))


@dataclass(frozen=True)
class _Definition:
    name: str
    compute: Callable[[Scores, Labels], float]
    description: str


_DEFINITIONS = (
    _Definition("top1", lambda p, y: top_k_accuracy(p, y, 1), "top-1 accuracy"),
    _Definition("top5", lambda p, y: top_k_accuracy(p, y, 5), "top-5 accuracy"),
    _Definition("mean_class", mean_class_accuracy, "mean per-class accuracy"),
    _Definition("nll", negative_log_likelihood, "negative log-likelihood, p floored at 1e-12"),
    _Definition("ece", expected_calibration_error, "expected calibration error, equal-mass bins"),
    _Definition("brier", brier_score, "Brier score over all classes"),
    _Definition("auroc", auroc, "area under the ROC curve, two classes"),
)


def score_log_probs(log_probs: Scores, labels: Labels) -> dict[str, float]:
    """All metrics of one voice, from arrays.

    Args:
        log_probs: [N, C] float64 log-probabilities; -inf or log(1e-12) for a class without any.
        labels: [N] int64.

    Returns:
        `top1`, `top5`, `mean_class`, `nll`, `ece`, `brier`, and `auroc` for two classes.
    """
    is_binary = log_probs.shape[1] == 2
    return {
        definition.name: definition.compute(log_probs, labels)
        for definition in _DEFINITIONS
        if is_binary or definition.name != "auroc"
    }


class LogProbMetric(evaluate.Metric):
    """One number from log-probabilities and labels.

    Args:
        config_name: which: `top1`, `top5`, `mean_class`, `nll`, `ece`, `brier` or `auroc`; `all`
            gives all of them, `auroc` for two classes only.
        kwargs: see `evaluate.Metric`.

    Raises:
        ValueError: for another name.
    """

    def __init__(self, config_name: str, **kwargs: Any) -> None:
        known = {definition.name: definition for definition in _DEFINITIONS}
        if config_name not in known and config_name != ALL:
            raise ValueError(
                f"Expected a metric of {[*sorted(known), ALL]}, but got {config_name!r}."
            )
        self.definitions = _DEFINITIONS if config_name == ALL else (known[config_name],)
        super().__init__(config_name=config_name, keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="; ".join(definition.description for definition in self.definitions),
            citation="",
            inputs_description="predictions: log-probabilities [N, C]; references: labels [N]",
            features=PREDICTION_FEATURES,
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        log_probs = np.asarray(predictions, dtype=np.float64)
        labels = np.asarray(references, dtype=np.int64)
        if len(self.definitions) == 1:
            return {self.definitions[0].name: self.definitions[0].compute(log_probs, labels)}
        return score_log_probs(log_probs, labels)


def measure(log_probs: Tensor, labels: Tensor) -> dict[str, float]:
    """All metrics of one voice.

    Args:
        log_probs: [N, C] log-probabilities; -inf or log(1e-12) for a class without any.
        labels: [N] int64.

    Returns:
        `top1`, `top5`, `mean_class`, `nll`, `ece`, `brier`, and `auroc` for two classes.
    """
    metric = LogProbMetric(ALL)  # one, since each writes the log-probabilities to Arrow
    results: dict[str, float] = metric.compute(
        predictions=log_probs.float().cpu().numpy(), references=labels.cpu().numpy()
    )
    return results


def complementarity(head: Tensor, knn: Tensor, blend: Tensor, labels: Tensor) -> dict[str, float]:
    """How much the two voices know that the other does not.

    Args:
        head: [N, C] log-probabilities of the head.
        knn: [N, C] those of the neighbours.
        blend: [N, C] those of both.
        labels: [N] int64.

    Returns:
        `both_wrong`: share of pictures at which both err. `oracle`: accuracy of an oracle that
        picks the right voice, 1 - both_wrong. `blend_gain`: top-1 of the blend minus the head's.
    """
    wanted = labels.cpu().numpy()
    head_right, knn_right, blend_right = (
        answers_of(voice.double().cpu().numpy()) == wanted for voice in (head, knn, blend)
    )
    both_wrong = float((~head_right & ~knn_right).mean())
    gain = float(blend_right.mean() - head_right.mean())
    return {"both_wrong": both_wrong, "oracle": 1 - both_wrong, "blend_gain": gain}
