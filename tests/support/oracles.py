"""Slow, plain float64 versions of what hf_knn computes, and checks shared by the tests.

Nothing here uses the package's own maths: plain sums in numpy, no matrix products, no log space.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from hf_knn.core.search import Neighbors
from hf_knn.store.backend import RowStore
from hf_knn.store.datastore import Datastore

Floats = NDArray[np.float64]

ROUNDINGS = 4e-16
"""How far a float64 similarity may be off, as a part of it and per value of the row."""


def as_numpy(values: torch.Tensor | NDArray) -> Floats:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, np.float64)


def normalized(rows: torch.Tensor | NDArray, mean: torch.Tensor, normalization: str) -> Floats:
    values = as_numpy(rows).copy()
    if normalization == "none":
        return values
    if normalization == "l2_centered":
        values -= as_numpy(mean)
    lengths = np.sqrt((values**2).sum(axis=1, keepdims=True))
    return values / np.where(lengths > 0, lengths, 1)


def similarity_matrix(store: RowStore, queries: torch.Tensor | NDArray) -> Floats:
    """[B, N] float64 similarities of the stored values."""
    rows = normalized(store.features, store.mean, store.normalization)
    wanted = normalized(queries, store.mean, store.normalization)
    # no matrix product: its sums would depend on the shape
    if store.metric == "cosine":
        similarities = [(rows * query).sum(axis=1) for query in wanted]
    else:
        similarities = [-((rows - query) ** 2).sum(axis=1) for query in wanted]
    return np.array(similarities, np.float64).reshape(len(wanted), len(rows))


def uncertainty(matrix: Floats, store: Datastore) -> Floats:
    """[B, N] how far float64 may be off: closer similarities are equal as far as it can tell."""
    part = ROUNDINGS * (store.dim + 16)
    if store.metric == "cosine":
        return np.full(matrix.shape, part)  # of unit vectors, or 0
    size = np.abs(matrix)
    if store.normalization == "none":
        return part * size
    return part * size + part * np.sqrt(size) + part**2  # the unit vectors are rounded themselves


def tie_groups(store: Datastore) -> NDArray[np.int64]:
    """[N] equal numbers for rows whose similarity with every query is the same bit for bit."""
    values = as_numpy(store.features)
    if store.normalization == "l2":  # the direction of a power of two times a row is the row's
        _, exponents = np.frexp(np.abs(values).max(axis=1, initial=0.0))
        values = np.ldexp(values, -exponents[:, None])
    return np.unique(values + 0.0, axis=0, return_inverse=True)[1].reshape(len(values))


def rows_of(store: Datastore, ids: NDArray) -> NDArray[np.int64]:
    """Where ids of any shape lie; fails for one (such as -1) that the store does not have."""
    known = store.ids.numpy()
    if not ids.size:
        return np.zeros(ids.shape, np.int64)
    order = known.argsort()
    rows = order[np.searchsorted(known[order], ids).clip(max=len(known) - 1)]
    assert np.array_equal(known[rows], ids), f"unknown ids: {ids[known[rows] != ids]}"
    return rows


def assert_sound(
    hits: Neighbors,
    store: Datastore,
    queries: torch.Tensor | NDArray,
    k: int,
    exclude_ids: NDArray | None = None,
) -> tuple[Floats, NDArray[np.int64]]:
    """Checks what even an approximate index must get right, against brute force.

    As many rows as promised, each once and none that is excluded, with the right labels and
    similarities, ordered by (similarity, id). Returns the similarities of all rows [B, N] and the
    positions [B, k] of those that were found.
    """
    matrix = similarity_matrix(store, queries)
    width = max(0, min(k, len(store) - (exclude_ids is not None)))
    assert hits.similarities.shape == hits.labels.shape == hits.ids.shape == (len(matrix), width)
    kinds = (hits.similarities.dtype, hits.labels.dtype, hits.ids.dtype)
    assert kinds == (torch.float32, torch.int64, torch.int64)
    ids, found = store.ids.numpy(), rows_of(store, hits.ids.numpy())
    assert (np.diff(np.sort(found, axis=1), axis=1) > 0).all(), "a row was found twice"
    assert np.array_equal(hits.labels.numpy(), store.labels.numpy()[found])
    if exclude_ids is not None:
        assert (hits.ids.numpy() != np.asarray(exclude_ids)[:, None]).all(), "excluded, but found"
    similarities = np.take_along_axis(matrix, found, axis=1)
    doubt = np.take_along_axis(uncertainty(matrix, store), found, axis=1)
    answered = hits.similarities.double().numpy()
    largest = float(np.finfo(np.float32).max)
    rounding = 2.0**-23 * np.abs(similarities) + 2.0**-149
    wrong = np.abs(answered - similarities.clip(-largest, largest)) > rounding + doubt
    assert not wrong.any(), (answered[wrong], similarities[wrong])
    in_order = similarities[:, :-1] + doubt[:, :-1] >= similarities[:, 1:] - doubt[:, 1:]
    assert in_order.all(), "not by similarity"
    groups = tie_groups(store)[found]
    together = np.argsort(groups, axis=1, kind="stable")
    grouped = np.take_along_axis(groups, together, axis=1)
    numbers = np.take_along_axis(ids[found], together, axis=1)
    tied = grouped[:, :-1] == grouped[:, 1:]
    assert (numbers[:, :-1] < numbers[:, 1:])[tied].all(), "equal rows are not by id"
    return matrix, found


def assert_nearest(
    hits: Neighbors,
    store: Datastore,
    queries: torch.Tensor | NDArray,
    k: int,
    exclude_ids: NDArray | None = None,
) -> None:
    """Checks hits against brute force: values, order by (similarity, id), nothing left out.

    Where float64 can tell two similarities apart this means equal ids in equal order. Rows with
    equal stored values must be in the order of their ids, and so must all ties of whole numbers,
    whose squared distances are exact.
    """
    matrix, found = assert_sound(hits, store, queries, k, exclude_ids)
    if not hits.ids.numel():
        return
    ids, groups, doubt = store.ids.numpy(), tie_groups(store), uncertainty(matrix, store)
    is_left_out = np.ones(matrix.shape, bool)
    np.put_along_axis(is_left_out, found, False, axis=1)
    if exclude_ids is not None:
        is_left_out &= ids[None] != np.asarray(exclude_ids)[:, None]
    worst = (matrix + doubt)[np.arange(len(matrix)), found[:, -1]]
    best_left_out = np.where(is_left_out, matrix - doubt, -np.inf).max(axis=1)
    assert (worst >= best_left_out).all(), "a nearer row was left out"
    for i, row in enumerate(found):
        first = np.full(len(store), np.iinfo(np.int64).max)  # smallest id left out of each group
        np.minimum.at(first, groups[is_left_out[i]], ids[is_left_out[i]])
        assert (ids[row] < first[groups[row]]).all(), "an equal row with a smaller id was left out"
    if store.metric == "l2" and store.normalization == "none" and are_small_whole(store, queries):
        allowed = np.where(is_left_out, matrix, -np.inf)
        np.put_along_axis(allowed, found, np.take_along_axis(matrix, found, axis=1), axis=1)
        wanted = np.lexsort((np.broadcast_to(ids, allowed.shape), -allowed), axis=-1)
        assert np.array_equal(found, wanted[:, : found.shape[1]]), "ties are not by id"


def are_small_whole(store: Datastore, queries: torch.Tensor | NDArray) -> bool:
    """Whether squared distances are whole numbers that float64 holds exactly."""
    values = np.concatenate([as_numpy(store.features), as_numpy(queries)])
    return bool((np.abs(values) < 2**20).all() and (values == values.round()).all())


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


def assert_same_store(one: RowStore, other: RowStore) -> None:
    """Checks that two datastores hold the same bits."""
    for name in ("features", "labels", "ids", "mean"):
        mine, others = getattr(one, name), getattr(other, name)
        assert mine.dtype == others.dtype, name
        assert mine.shape == others.shape, name
        assert mine.numpy().tobytes() == others.numpy().tobytes(), name
    for name in ("paths", "metric", "normalization", "index", "dtype", "dim", "source"):
        assert getattr(one, name) == getattr(other, name), name
