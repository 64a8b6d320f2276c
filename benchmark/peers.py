"""Classical models on the same features: alone, beside the head, and beside the neighbours.

Is it k-NN that helps a head, or any second voice? Each peer is fitted on the training pictures,
its setting chosen among a few on validation, scores turned into probabilities by one temperature.
Features are centred and of length 1, as the neighbours see them.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import RandomForestClassifier
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics.pairwise import euclidean_distances, rbf_kernel
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.svm import SVC
from torch import Tensor
from torch.nn import functional
from voices import FLOOR, Arm, Voices, choose_weight, mixed

from hf_knn import ProbeConfig, ProbeScore, choose_probe

PCA_WIDTH = 128  # of the features that LDA and logistic regression see: hundreds of times cheaper
TREES = 50
TEMPERATURES = tuple(np.logspace(-3, 1, 17).tolist())

Floats = NDArray[np.floating]


class Trial(NamedTuple):
    """One setting of a peer: its scores [V, C'] and [T, C'] for its classes [C']."""

    chosen: dict[str, Any]
    validation: Floats
    test: Floats
    classes: NDArray[np.integer]
    is_probability: bool = False


class Data(NamedTuple):
    """What a peer is fitted on and asked about."""

    train: Floats
    labels: NDArray[np.int64]
    validation: Floats
    test: Floats
    seed: int

    def reduced(self) -> "Data":
        """The same on the first principal components of the training pictures."""
        width = max(1, min(PCA_WIDTH, len(self.train) // 2, self.train.shape[1]))
        fitted = PCA(width, svd_solver="randomized", random_state=0).fit(self.train)
        parts = (fitted.transform(part) for part in (self.train, self.validation, self.test))
        train, validation, test = parts
        return Data(train, self.labels, validation, test, self.seed)


def _logistic(data: Data) -> Iterator[Trial]:
    reduced = data.reduced()
    for c in (1.0, 10.0, 100.0):
        fit = LogisticRegression(C=c, max_iter=100, tol=1e-2).fit(reduced.train, data.labels)
        yield _probabilities(fit, {"C": c, "pca": PCA_WIDTH}, reduced)


def _ridge(data: Data) -> Iterator[Trial]:
    targets, classes = _one_hot(data.labels)
    for alpha in (0.1, 1.0, 10.0):
        fit = Ridge(alpha=alpha).fit(data.train, targets)
        yield _trial({"alpha": alpha}, fit.predict, data[2:4], classes)


def _kernel_ridge(data: Data) -> Iterator[Trial]:
    targets, classes = _one_hot(data.labels)
    for gamma in (0.5, 2.0):
        kernel, *asked = _kernels(data, gamma)
        for alpha in (0.01, 0.1):
            fit = KernelRidge(alpha=alpha, kernel="precomputed").fit(kernel, targets)
            chosen = {"gamma": gamma, "alpha": alpha}
            yield _trial(chosen, fit.predict, asked, classes)


def _svm(data: Data) -> Iterator[Trial]:
    for gamma in (0.5, 2.0):
        kernel, *asked = _kernels(data, gamma)
        fit = SVC(C=10.0, kernel="precomputed").fit(kernel, data.labels)
        chosen = {"gamma": gamma, "C": 10.0}
        yield _trial(chosen, fit.decision_function, asked, fit.classes_)


def _lda(data: Data) -> Iterator[Trial]:
    reduced = data.reduced()
    fit = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
    fit.fit(reduced.train, data.labels)
    yield _probabilities(fit, {"shrinkage": "auto", "pca": PCA_WIDTH}, reduced)


def _ncm(data: Data) -> Iterator[Trial]:
    fit = NearestCentroid().fit(data.train, data.labels)
    yield _trial({}, lambda asked: _nearness(asked, fit.centroids_), data[2:4], fit.classes_)


def _forest(data: Data) -> Iterator[Trial]:
    fit = RandomForestClassifier(
        TREES, random_state=data.seed, n_jobs=os.cpu_count() if len(data.train) > 256 else 1
    )
    fit.fit(data.train, data.labels)
    yield _probabilities(fit, {"trees": TREES}, data)


def _knn_sklearn(data: Data) -> Iterator[Trial]:
    for k in (5, 10, 20, 50):
        fit = KNeighborsClassifier(min(k, len(data.train)), weights="distance", algorithm="brute")
        fit.fit(data.train, data.labels)
        yield _probabilities(fit, {"k": k}, data)


PEERS: dict[str, Callable[[Data], Iterator[Trial]]] = {
    "logistic": _logistic,
    "ridge": _ridge,
    "kernel_ridge": _kernel_ridge,
    "svm": _svm,
    "lda": _lda,
    "ncm": _ncm,
    "forest": _forest,
    "knn_sklearn": _knn_sklearn,
}


def measure_peers(voices: Voices) -> dict[str, Arm]:
    """Every peer alone, as a second voice beside the head, and with the neighbours beside it."""
    train, validation, _ = voices.split
    mean = train.head.mean(0)
    unit = [functional.normalize(rows.head - mean, dim=1).numpy() for rows in voices.split]
    data = Data(unit[0], train.labels.numpy(), unit[1], unit[2], voices.seed)
    arms = {
        name: _best(list(fit(data)), validation.labels, voices.num_labels)
        for name, fit in PEERS.items()
    }
    arms |= {"dino": voices.dino, "knn": voices.knn}
    blends = {
        f"blend:head+{name}": _blend(voices.head, arm, validation.labels)
        for name, arm in arms.items()
    }
    pairs = {
        f"blend:{name}+knn": _blend(arms[name], voices.knn, validation.labels) for name in PEERS
    }
    return arms | {"head": voices.head} | blends | pairs


def _best(trials: list[Trial], labels: Tensor, num_labels: int) -> Arm:
    """The trial, and the temperature of its scores, that is best by the rule of `hf_knn.tune`."""
    arms, table = [], []
    for trial in trials:
        arm = _calibrated(trial, labels, num_labels)
        assert arm.validation is not None
        own = arm.validation.gather(1, labels.unsqueeze(1)).double().clamp_min(math.log(FLOOR))
        hits = float((arm.validation.argmax(1) == labels).double().mean())
        arms.append(arm)
        table.append(ProbeScore(ProbeConfig(0.0), hits, float(own.mean()), diverged=False))
    return arms[choose_probe(table, len(labels)).best]


def _calibrated(trial: Trial, labels: Tensor, num_labels: int) -> Arm:
    """Scores as log-probabilities over all classes."""
    parts = [_spread(part, trial.classes, num_labels) for part in (trial.validation, trial.test)]
    if trial.is_probability:
        validation, test = (part.clamp_min(0).log() for part in parts)
        return Arm(validation, test, trial.chosen)
    absent = torch.ones(num_labels, dtype=torch.bool)
    absent[torch.from_numpy(trial.classes.astype(np.int64))] = False
    validation, test = (part.masked_fill(absent, -torch.inf) for part in parts)

    def likelihood(temperature: float) -> float:
        log_probs = (validation / temperature).log_softmax(1)
        own = log_probs.gather(1, labels.unsqueeze(1)).clamp_min(math.log(FLOOR))
        return float(own.double().mean())

    best = max(TEMPERATURES, key=likelihood)
    validation, test = ((part / best).log_softmax(1) for part in (validation, test))
    return Arm(validation, test, trial.chosen | {"temperature": best})


def _spread(scores: Floats, classes: NDArray[np.integer], num_labels: int) -> Tensor:
    """[B, C'] -> [B, C], 0 for a class that the peer has not seen."""
    full = torch.zeros(len(scores), num_labels)
    full[:, torch.from_numpy(classes.astype(np.int64))] = torch.from_numpy(
        np.asarray(scores, np.float32)
    )
    return full


def _blend(first: Arm, second: Arm, labels: Tensor) -> Arm:
    """Two voices, the weight of the second chosen on validation."""
    assert first.validation is not None
    assert second.validation is not None
    weight = choose_weight(first.validation, second.validation, labels)
    return mixed(first, Arm(second.validation, second.test, {}), weight)


def _probabilities(fit: Any, chosen: dict[str, Any], data: Data) -> Trial:
    trial = _trial(chosen, fit.predict_proba, data[2:4], fit.classes_)
    return trial._replace(is_probability=True)


def _trial(
    chosen: dict[str, Any],
    answer: Callable[[Floats], Floats],
    asked: Sequence[Any],
    classes: NDArray[np.integer],
) -> Trial:
    """What a fitted peer says; of two classes scikit-learn's margins have one column."""
    scores = [answer(part) for part in asked]
    validation, test = (np.stack([-s, s], axis=1) if s.ndim == 1 else s for s in scores)
    return Trial(chosen, validation, test, classes)


def _nearness(asked: Floats, centroids: Floats) -> Floats:
    return -np.asarray(euclidean_distances(asked, centroids, squared=True))


def _kernels(data: Data, gamma: float) -> list[Floats]:
    return [rbf_kernel(part, data.train, gamma) for part in (data.train, *data[2:4])]


def _one_hot(labels: NDArray[np.int64]) -> tuple[Floats, NDArray[np.int64]]:
    classes, places = np.unique(labels, return_inverse=True)
    return np.eye(len(classes))[places], classes
