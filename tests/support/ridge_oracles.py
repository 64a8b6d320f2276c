"""Rows for the ridge head, and what it should say to them: plain formulas in numpy."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp
from torch import Tensor

INF = math.inf
WEIGHTINGS = ["none", "inverse", "inverse_sqrt"]
SHAPES = [(40, 6, 3), (12, 30, 4), (30, 30, 2), (9, 1, 3)]  # rows, width, classes

Floats = NDArray[np.float64]


def clusters(
    rows: int, width: int, classes: int, seed: int = 0, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Overlapping clusters of unequal size, each class at least twice."""
    generator = np.random.default_rng(seed)
    twice = np.repeat(np.arange(classes), 2)
    others = np.minimum(generator.geometric(0.4, rows) - 1, classes - 1)
    labels = np.concatenate([twice, others])[:rows]
    centers = generator.normal(size=(classes, width))
    features = centers[labels] + generator.normal(size=(rows, width)) + offset
    return torch.from_numpy(features), torch.from_numpy(labels)


def row_weights(labels: NDArray, weighting: str) -> Floats:
    """[N] plain formula: 1 / count or 1 / sqrt(count), mean 1."""
    counts = np.bincount(labels)[labels].astype(float)
    weights = counts ** {"none": 0.0, "inverse": -1.0, "inverse_sqrt": -0.5}[weighting]
    return weights / weights.mean()


def least_squares(
    features: NDArray, targets: NDArray, regularizer: float, weights: NDArray
) -> tuple[Floats, Floats]:
    """Weight [C, D] and bias [C] by one call of lstsq: penalties are rows of the system."""
    rows, width = features.shape
    roots = np.sqrt(weights)[:, None]
    system = np.zeros((rows + width, width + 1))
    system[:rows] = np.hstack([features, np.ones((rows, 1))]) * roots
    system[rows:, :width] = np.sqrt(regularizer) * np.eye(width)
    wanted = np.vstack([targets * roots, np.zeros((width, targets.shape[1]))])
    solution = np.linalg.lstsq(system, wanted, rcond=None)[0]
    return solution[:-1].T, solution[-1]


def refits(features: Tensor, labels: Tensor, classes: int, regularizer: float, weighting: str):
    """[N, C] the prediction for each row by a fit on the others, with the weights of all."""
    x, y = features.double().numpy(), labels.numpy()
    targets, weights = np.eye(classes)[y], row_weights(y, weighting)
    predictions = np.zeros_like(targets)
    for i in range(len(x)):
        others = np.arange(len(x)) != i
        weight, bias = least_squares(x[others], targets[others], regularizer, weights[others])
        predictions[i] = weight @ x[i] + bias
    return predictions


def mean_log_prob(logits: NDArray, labels: NDArray, sharpness: float, weights: NDArray) -> float:
    scaled = logits * sharpness
    own = scaled[np.arange(len(labels)), labels] - logsumexp(scaled, axis=1)
    return float(own @ weights / weights.sum())


def assert_same(found: Sequence[Tensor], wanted: Sequence[Tensor], part: float = 1e-8) -> None:
    """Equal relative to the largest number; infinite in the same places."""
    for mine, other in zip(found, wanted, strict=True):
        assert mine.shape == other.shape
        assert not mine.isnan().any()
        assert (mine.isfinite() == other.isfinite()).all()
        size = float(other[other.isfinite()].abs().amax()) if other.isfinite().any() else 0.0
        gap = torch.where(other.isfinite(), mine - other, 0).abs()
        # one row alone has weight 0 in a refit, a rounding error after updates
        assert (gap <= part * size + 1e-13).all(), f"{gap.max()} of {size}"
