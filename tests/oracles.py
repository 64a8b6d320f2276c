"""Slow, plain float64 versions of what hf_knn computes, and checks shared by the tests.

Nothing here uses the package's own maths: numpy on probabilities, one pair at a time.
"""

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from hf_knn.datastore import Datastore, Neighbors

Floats = NDArray[np.float64]

TIE = 1e-13
"""Similarities closer than this part of the largest one are equal as far as float64 can tell."""


def as_numpy(values: torch.Tensor | NDArray) -> Floats:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, np.float64)


def normalized(rows: torch.Tensor | NDArray, mean: torch.Tensor, normalization: str) -> Floats:
    values = as_numpy(rows).copy()
    if normalization == "none":
        return values
    for row in values:
        if normalization == "l2_centered":
            row -= as_numpy(mean)
        length = np.sqrt((row**2).sum())
        if length:
            row /= length
    return values


def similarity_matrix(store: Datastore, queries: torch.Tensor | NDArray) -> Floats:
    """[B, N] float64 similarities of the stored values."""
    rows = normalized(store.features, store.mean, store.normalization)
    wanted = normalized(queries, store.mean, store.normalization)
    if store.metric == "cosine":
        return np.array([[(row * query).sum() for row in rows] for query in wanted])
    return np.array([[-((row - query) ** 2).sum() for row in rows] for query in wanted])


def assert_nearest(
    hits: Neighbors,
    store: Datastore,
    queries: torch.Tensor | NDArray,
    k: int,
    exclude_ids: NDArray | None = None,
) -> None:
    """Checks hits against brute force: values, order by (similarity, id), nothing left out.

    Where float64 can tell two similarities apart this means equal ids in equal order. Rows with
    equal stored values must be in the order of their ids.
    """
    matrix = similarity_matrix(store, queries)
    ids, labels = store.ids.numpy(), store.labels.numpy()
    row_of = {int(number): row for row, number in enumerate(ids)}
    width = max(0, min(k, len(store) - (exclude_ids is not None)))
    assert hits.similarities.shape == hits.labels.shape == hits.ids.shape == (len(matrix), width)
    tie = TIE * max(1e-300, np.abs(matrix).max(initial=0))
    content = [row.tobytes() for row in store.features.numpy()]
    for i, similarities in enumerate(matrix):
        found = [row_of[int(number)] for number in hits.ids[i]]  # a KeyError for id -1
        assert len(set(found)) == len(found)
        assert hits.labels[i].tolist() == labels[found].tolist()
        largest = np.finfo(np.float32).max
        wanted = similarities[found].clip(-largest, largest)
        np.testing.assert_allclose(hits.similarities[i].numpy(), wanted, rtol=1e-6, atol=1e-7)
        left_out = set(range(len(store))) - set(found)
        if exclude_ids is not None and int(exclude_ids[i]) in row_of:
            itself = row_of[int(exclude_ids[i])]
            assert itself in left_out
            left_out.remove(itself)
        assert all(similarities[a] >= similarities[b] - tie for a, b in pairwise(found))
        if found and left_out:
            assert similarities[found[-1]] >= max(similarities[list(left_out)]) - tie
        order: dict[bytes, list[int]] = {}
        for row in [*found, *sorted(left_out, key=lambda row: ids[row])]:
            order.setdefault(content[row], []).append(int(ids[row]))
        assert all(numbers == sorted(numbers) for numbers in order.values())


def vote_probs(
    squared_distances: Floats,
    labels: NDArray,
    num_labels: int,
    weighting: str,
    temperature: float,
    reliability: Floats | None = None,
) -> Floats:
    """[B, C] probabilities by adding up plain votes."""
    probs = np.zeros((len(labels), num_labels))
    for i, distances in enumerate(squared_distances):
        if weighting == "softmax":
            votes = np.exp(-(distances - distances.min(initial=np.inf)) / temperature)
        elif weighting == "uniform":
            votes = np.ones(len(distances))
        elif weighting == "rank":
            votes = 1 / (2 + np.arange(len(distances)))
        else:
            is_zero = distances == 0
            votes = is_zero.astype(float) if is_zero.any() else 1 / np.sqrt(distances)
        if reliability is not None:
            votes = votes * reliability[i]
        for label, vote in zip(labels[i], votes, strict=True):
            probs[i, label] += vote
        probs[i] /= probs[i].sum() or 1.0
    return probs


def blend_probs(head: Floats, knn: Floats, knn_weight: float) -> Floats:
    """method.md 5 on plain probabilities; a row without neighbours is its head."""
    width = head.shape[1]
    blended = np.zeros_like(knn)
    for i in range(len(head)):
        if knn[i].sum() == 0:
            blended[i, :width] = head[i]
            continue
        left = knn[i, :width].sum()  # 1 - q
        given = knn[i, :width] / left if left > 0 else np.zeros(width)
        blended[i, :width] = left * (knn_weight * given + (1 - knn_weight) * head[i])
        blended[i, width:] = knn[i, width:]
    return blended


def assert_same_store(one: Datastore, other: Datastore) -> None:
    """Checks that two datastores hold the same bits."""
    for name in ("features", "labels", "ids", "mean"):
        mine, others = getattr(one, name), getattr(other, name)
        assert mine.dtype == others.dtype, name
        assert mine.shape == others.shape, name
        assert mine.numpy().tobytes() == others.numpy().tobytes(), name
    for name in ("paths", "metric", "normalization", "index", "dtype", "dim", "source"):
        assert getattr(one, name) == getattr(other, name), name
