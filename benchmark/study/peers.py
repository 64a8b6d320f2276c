"""Classical models on the same features: alone, beside the head, and beside the neighbours.

Is it k-NN that helps a head, or any second voice? Each voice, k-NN among them, is fitted on the
training pictures in as many settings; one is chosen on validation, after its scores were turned
into probabilities by one temperature. Features are centred and of length 1, as the neighbours see
them.
"""

import math
import os
import warnings
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
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor

from hf_knn.fit import ProbeConfig, ProbeScore, choose_probe
from study.arms import FLOOR, Arm, blended
from study.arms_of import Voices, directions

PCA_WIDTH = 128  # of the features that LDA and logistic regression see: hundreds of times cheaper
TREES = 50
ITERATIONS = 5_000  # of logistic regression, which took 400 at most where it was looked at
TRIALS = 4
"""Settings of every voice, so that none wins by having been tuned more."""
TEMPERATURES = tuple(np.logspace(-3, 1, 17).tolist())

Floats = NDArray[np.floating]


class Trial(NamedTuple):
    """One setting of a peer: its scores [V, C'] and [T, C'] for its classes [C']."""

    chosen: dict[str, Any]
    validation: Floats
    test: Floats
    classes: NDArray[np.integer]


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
    for c in (1.0, 10.0, 100.0, 1000.0):
        fit = LogisticRegression(C=c, max_iter=ITERATIONS, tol=1e-4)
        fit.fit(reduced.train, data.labels)
        yield _probabilities(fit, {"C": c, "pca": PCA_WIDTH}, reduced)


def _ridge(data: Data) -> Iterator[Trial]:
    targets, classes = _one_hot(data.labels)
    for alpha in (0.01, 0.1, 1.0, 10.0):
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
        for c in (1.0, 10.0):
            fit = SVC(C=c, kernel="precomputed").fit(kernel, data.labels)
            chosen = {"gamma": gamma, "C": c}
            yield _trial(chosen, fit.decision_function, asked, fit.classes_)


def _lda(data: Data) -> Iterator[Trial]:
    reduced = data.reduced()
    for shrinkage in ("auto", 0.1, 0.3, 0.9):
        fit = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)
        fit.fit(reduced.train, data.labels)
        yield _probabilities(fit, {"shrinkage": shrinkage, "pca": PCA_WIDTH}, reduced)


def _ncm(data: Data) -> Iterator[Trial]:
    has_spread = len(data.train) > len(np.unique(data.labels))
    for threshold in (None, 0.1, 0.3, 1.0):
        shrink = threshold if has_spread else None  # its unit is the spread within classes
        with warnings.catch_warnings():  # features that are the same everywhere are no news
            warnings.filterwarnings("ignore", "self.within_class_std_dev_ has", UserWarning)
            fit = NearestCentroid(shrink_threshold=shrink).fit(data.train, data.labels)
        scores = [_nearness(part, fit.centroids_) for part in data[2:4]]
        yield Trial({"shrink_threshold": shrink}, scores[0], scores[1], fit.classes_)


def _forest(data: Data) -> Iterator[Trial]:
    jobs = os.cpu_count() if len(data.train) > 256 else 1
    for leaf in (1, 2, 4, 8):
        fit = RandomForestClassifier(
            TREES, min_samples_leaf=leaf, random_state=data.seed, n_jobs=jobs
        )
        fit.fit(data.train, data.labels)
        yield _probabilities(fit, {"trees": TREES, "min_samples_leaf": leaf}, data)


def _knn_sklearn(data: Data) -> Iterator[Trial]:
    for k in (5, 10, 20, 50):
        fit = KNeighborsClassifier(min(k, len(data.train)), weights="distance", algorithm="brute")
        fit.fit(data.train, data.labels)
        yield _probabilities(fit, {"k": k}, data)


def _neighbors(voices: Voices) -> Iterator[Trial]:
    """Our own, in as many settings as a peer has."""
    classes = np.arange(voices.num_labels)
    for k in (5, 20):
        for temperature in (0.07, 0.14):
            arm = voices.votes(k, temperature)
            assert arm.validation is not None
            yield Trial(arm.chosen, arm.validation.numpy(), arm.test.numpy(), classes)


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
    """Every peer alone, as a second voice beside the head, and with the neighbours beside it.

    `knn` has the trials of a peer; `knn_grid`, and `blend` beside the head, the whole grid of
    `hf_knn.tune`.
    """
    train, validation, _ = voices.split
    mean = train.head.mean(0)
    unit = [directions(rows.head, mean).numpy() for rows in voices.split]
    data = Data(unit[0], train.labels.numpy(), unit[1], unit[2], voices.seed)
    with threadpool_limits(1, "blas"):  # on matrices as small as these threads cost up to 20 times
        arms = {
            name: _best(list(fit(data)), validation.labels, voices.num_labels)
            for name, fit in PEERS.items()
        }
    knn = _best(list(_neighbors(voices)), validation.labels, voices.num_labels)
    arms |= {"dino": voices.dino, "knn": knn}
    blends = {
        f"blend:head+{name}": blended(voices.head, arm, validation.labels)
        for name, arm in arms.items()
    }
    pairs = {f"blend:{name}+knn": blended(arms[name], knn, validation.labels) for name in PEERS}
    whole = {"knn_grid": voices.knn, "blend": voices.blend}
    return arms | whole | {"head": voices.head} | blends | pairs


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
    validation, test = (
        _spread(part, trial.classes, num_labels) for part in (trial.validation, trial.test)
    )

    def likelihood(temperature: float) -> float:
        log_probs = (validation / temperature).log_softmax(1)
        own = log_probs.gather(1, labels.unsqueeze(1)).clamp_min(math.log(FLOOR))
        return float(own.double().mean())

    best = max(TEMPERATURES, key=likelihood)
    validation, test = ((part / best).log_softmax(1) for part in (validation, test))
    return Arm(validation, test, trial.chosen | {"calibration": best})


def _spread(scores: Floats, classes: NDArray[np.integer], num_labels: int) -> Tensor:
    """[B, C'] -> [B, C], -inf for a class that the peer has not seen."""
    full = torch.full((len(scores), num_labels), -torch.inf)
    full[:, torch.from_numpy(classes.astype(np.int64))] = torch.from_numpy(
        np.asarray(scores, np.float32)
    )
    return full


def _probabilities(fit: Any, chosen: dict[str, Any], data: Data) -> Trial:
    with np.errstate(divide="ignore"):  # a class without a vote
        scores = [np.log(fit.predict_proba(part)) for part in data[2:4]]
    return Trial(chosen, scores[0], scores[1], fit.classes_)


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
