"""Where rows lie in the plane, so that clusters and strangers can be seen."""

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor

from .configuration_knn import Normalization
from .search import normalize_rows

MOST_ROWS = 5_000
_PRINCIPAL = 50
_PERPLEXITY = 30.0


def place_features(features: Tensor, seed: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Places rows in the plane so that neighbours stay neighbours: PCA to 50, then t-SNE.

    Args:
        features: [N, D] raw; they are centred and put to unit length here. Of more than 5,000 rows
            so many are drawn at random.
        seed: of the choice and the places.

    Returns:
        [M] the rows and [M, 2] where they lie.

    Raises:
        ValueError: for fewer than four rows.
    """
    if len(features) < 4:
        raise ValueError(f"Expected at least 4 rows to draw a map of, but got {len(features)}.")
    rows = np.arange(len(features))
    if len(rows) > MOST_ROWS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, MOST_ROWS, replace=False))
    mean = features.double().mean(0).numpy()
    values = normalize_rows(features.numpy()[rows], mean, Normalization.L2_CENTERED)
    width = min(_PRINCIPAL, *values.shape)
    reduced = PCA(width, random_state=seed, svd_solver="randomized").fit_transform(values)
    perplexity = min(_PERPLEXITY, (len(rows) - 1) / 3)
    placed = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(reduced)
    return rows, placed.astype(np.float64)
