"""Rows for the heads on cached features, and what neighbours say to them."""

import numpy as np
import torch
from torch import Tensor


def clusters(rows: int = 90, width: int = 7, classes: int = 4, seed: int = 0) -> tuple:
    """Overlapping clusters far from the origin, classes of unequal size."""
    generator = np.random.default_rng(seed)
    labels = np.minimum(generator.geometric(0.4, rows) - 1, classes - 1)
    centers = np.random.default_rng(99).normal(size=(classes, width))
    features = 3 * (centers[labels] + generator.normal(size=(rows, width))) + 10
    return torch.from_numpy(features).float(), torch.from_numpy(labels)


def votes(labels: Tensor, seed: int = 1) -> Tensor:
    """[N] leave-one-out log-probabilities, some of them 0 and -inf."""
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(len(labels), generator=generator)
    probs[:4] = torch.tensor([0.0, 1.0, 0.0, 1.0])
    return probs.log()
