"""The maths: points checked by eye, scikit-learn and plain float64 probabilities as oracles."""

import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.neighbors import KNeighborsClassifier
from sklearn.utils.class_weight import compute_class_weight
from support.oracles import blend_probs, normalized, similarity_matrix, vote_probs
from torch import Tensor

from hf_knn.core.votes import (
    blend_log_probs,
    floor_log_probs,
    knn_log_probs,
    neighbor_log_weights,
    squared_distances,
)
from hf_knn.fit.weights import class_weights, focal_loss_weights, knn_loss_weights
from hf_knn.store.datastore import Datastore

INF = math.inf
HALVING = 1 / math.log(2)  # with this temperature a vote is 2 ** -d
SPACES = [
    ("cosine", "l2_centered"),
    ("cosine", "l2"),
    ("l2", "l2_centered"),
    ("l2", "l2"),
    ("l2", "none"),
]
WEIGHTINGS = ["softmax", "uniform", "inverse_distance", "rank"]


def probs_of(similarities: list[float], labels: list[int], count: int, **options: Any) -> list:
    call: dict[str, Any] = {"temperature": HALVING, "metric": "l2"} | options
    row = torch.tensor([similarities], dtype=torch.float64)
    return knn_log_probs(row, torch.tensor([labels]), count, **call).exp()[0].tolist()


# four points


def test_four_points_by_eye_l2() -> None:
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    store = Datastore.from_features(points, [0, 0, 1, 2], metric="l2", normalization="none")
    hits = store.search(torch.zeros(1, 2), k=3)
    # squared distances 0, 1, 4 (and 9, not among the three)
    assert hits.similarities.tolist() == [[0, -1, -4]]
    assert hits.ids.tolist() == [[0, 1, 2]]
    # votes 2^0 + 2^-1 = 1.5 for class 0, 2^-4 = 0.0625 for class 1: of 1.5625 in all 0.96 and 0.04
    log_probs = knn_log_probs(hits.similarities, hits.labels, 3, HALVING, metric="l2")
    assert log_probs.dtype == torch.float32
    assert log_probs.exp()[0].tolist() == pytest.approx([0.96, 0.04, 0])
    assert log_probs[0, 2] == -INF


def test_four_points_by_eye_cosine() -> None:
    points = torch.tensor([[0.0, 5.0], [3.0, 4.0], [2.0, 0.0], [4.0, 3.0]])
    store = Datastore.from_features(points, [2, 1, 0, 1], normalization="l2")
    hits = store.search(torch.tensor([[7.0, 0.0]]), k=4)
    # cosines with (1, 0): 2/2 = 1, 4/5, 3/5, 0
    assert hits.ids.tolist() == [[2, 3, 1, 0]]
    assert hits.similarities[0].tolist() == pytest.approx([1, 0.8, 0.6, 0])
    # d = 2 - 2 cos = 0, 0.4, 0.8, 2; T = 0.4 / ln 2 makes the votes 1, 1/2, 1/4, 1/32
    log_probs = knn_log_probs(hits.similarities, hits.labels, 3, 0.4 * HALVING)
    # class 0: 32/32, class 1: 16/32 + 8/32, class 2: 1/32, in all 57/32
    assert log_probs.exp()[0].tolist() == pytest.approx([32 / 57, 24 / 57, 1 / 57])


def test_four_points_by_eye_centred() -> None:
    # mean (2, 2); centred (2, 0), (-2, 0), (0, 1), (0, -1): directions east, west, north, south
    points = torch.tensor([[4.0, 2.0], [0.0, 2.0], [2.0, 3.0], [2.0, 1.0]])
    store = Datastore.from_features(points, [0, 1, 2, 3])
    assert store.mean.tolist() == [2, 2]
    hits = store.search(torch.tensor([[5.0, 6.0]]), k=4)  # centred (3, 4): cosines .6, -.6, .8, -.8
    assert hits.labels.tolist() == [[2, 0, 1, 3]]
    assert hits.similarities[0].tolist() == pytest.approx([0.8, 0.6, -0.6, -0.8])


def test_weightings_by_eye() -> None:
    similarities, labels = [-1.0, -4.0, -9.0], [0, 1, 0]
    # uniform 2 : 1; 1/distance 1 + 1/3 : 1/2 = 8 : 3; rank 1/2 + 1/4 : 1/3 = 9 : 4
    for weighting, wanted in (
        ("uniform", [2 / 3, 1 / 3]),
        ("inverse_distance", [8 / 11, 3 / 11]),
        ("rank", [9 / 13, 4 / 13]),
    ):
        assert probs_of(similarities, labels, 2, weighting=weighting) == pytest.approx(wanted)
    # two neighbours at distance zero share everything
    zeros = probs_of([0.0, 0.0, -1e-9], [1, 0, 2], 3, weighting="inverse_distance")
    assert zeros == pytest.approx([0.5, 0.5, 0])


def test_an_identical_row_is_known_through_a_rounding_error() -> None:
    options = {"metric": "cosine", "weighting": "inverse_distance"}

    def votes(*similarities: float) -> list[float]:
        row = torch.tensor([similarities])  # float32: one place below 1 is 1 - 2^-24
        return neighbor_log_weights(row, 1.0, **options).exp()[0].tolist()  # type: ignore[arg-type]

    assert votes(1 - 2**-24, 1 - 1e-5) == [1, 0]
    # d = 2e-5 and 8e-5 are real distances: 1 / sqrt(d) is as 2 to 1
    assert votes(1 - 1e-5, 1 - 4e-5) == pytest.approx([2 / 3, 1 / 3], rel=1e-2)


def test_squared_distances() -> None:
    assert squared_distances(torch.tensor([1.0, 0.5, -1.0, 1.5])).tolist() == [0, 1, 4, 0]
    assert squared_distances(torch.tensor([0.0, -3.0, 1e-9]), "l2").tolist() == [0, 3, 0]


# scikit-learn


def sklearn_weights(weighting: str, temperature: float) -> str | Callable[[NDArray], NDArray]:
    if weighting == "softmax":
        return lambda distances: np.exp(-(distances**2) / temperature)
    if weighting == "rank":
        return lambda distances: np.tile(
            1 / (2.0 + np.arange(distances.shape[1])), (len(distances), 1)
        )
    return {"uniform": "uniform", "inverse_distance": "distance"}[weighting]


def clusters(seed: int, rows: int, width: int, classes: int) -> tuple[Tensor, Tensor]:
    """Overlapping clusters away from the origin, exact in float16."""
    generator = np.random.default_rng(seed)
    labels = np.arange(rows) % classes
    centers = generator.normal(size=(classes, width))
    features = centers[labels] + generator.normal(size=(rows, width)) + 0.5
    return torch.from_numpy(features).half().float(), torch.from_numpy(labels)


@pytest.mark.parametrize("k", [1, 2, 5, 40, 60])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize(("metric", "normalization"), SPACES)
def test_equals_sklearn_and_brute_force(
    metric: str, normalization: str, weighting: str, k: int
) -> None:
    features, labels = clusters(0, 60, 5, 4)
    queries, _ = clusters(1, 30, 5, 4)
    store = Datastore.from_features(features, labels, metric=metric, normalization=normalization)
    hits = store.search(queries, k)
    ours = knn_log_probs(
        hits.similarities, hits.labels, 4, 0.3, metric=metric, weighting=weighting
    ).exp()

    rows = normalized(features, store.mean, normalization)
    wanted = normalized(queries, store.mean, normalization)
    model = KNeighborsClassifier(
        k, weights=sklearn_weights(weighting, 0.3), algorithm="kd_tree"
    ).fit(rows, labels.numpy())
    np.testing.assert_allclose(ours.numpy(), model.predict_proba(wanted), rtol=1e-4, atol=1e-5)

    distances = ((wanted[:, None] - rows) ** 2).sum(-1)
    order = distances.argsort(axis=1)[:, :k]
    nearest = np.take_along_axis(distances, order, 1)
    oracle = vote_probs(nearest, labels.numpy()[order], 4, weighting, 0.3)
    np.testing.assert_allclose(ours.numpy(), oracle, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("metric", "normalization"), SPACES)
def test_zero_distances_take_all_the_weight_as_in_sklearn(metric: str, normalization: str) -> None:
    features, labels = clusters(2, 40, 6, 3)
    doubled = torch.cat([features, features[:10]])  # rows 0..9 lie there twice
    both_labels = torch.cat([labels, (labels[:10] + 1) % 3])  # with another label
    store = Datastore.from_features(
        doubled, both_labels, metric=metric, normalization=normalization
    )
    hits = store.search(features[:20], 7)
    ours = knn_log_probs(
        hits.similarities, hits.labels, 3, 0.1, metric=metric, weighting="inverse_distance"
    ).exp()
    rows = normalized(doubled, store.mean, normalization)
    wanted = normalized(features[:20], store.mean, normalization)
    model = KNeighborsClassifier(7, weights="distance", algorithm="kd_tree")
    model.fit(rows, both_labels.numpy())
    np.testing.assert_allclose(ours.numpy(), model.predict_proba(wanted), atol=1e-6)
    assert ours[:10].max(dim=1).values.tolist() == pytest.approx([0.5] * 10)  # one vote each
    assert ours[10:].max(dim=1).values.tolist() == pytest.approx([1.0] * 10)


def test_cosine_without_normalisation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`normalization`.*metric='cosine'.*'none'.*metric='l2'"):
        Datastore.from_features(torch.ones(2, 2), [0, 1], metric="cosine", normalization="none")


def test_equals_a_dino_evaluator() -> None:
    features, labels = clusters(3, 300, 8, 5)
    queries, _ = clusters(4, 50, 8, 5)
    # the vote of DINO's evaluation loop: l2-normalised, top-k cosines, exp(cosine / 0.07)
    train = torch.nn.functional.normalize(features.double(), dim=1)
    test = torch.nn.functional.normalize(queries.double(), dim=1)
    cosines, rows = (test @ train.T).topk(20, dim=1)
    one_hot = torch.nn.functional.one_hot(labels[rows], 5)
    votes = (one_hot * (cosines / 0.07).exp().unsqueeze(2)).sum(1)
    dino = votes / votes.sum(1, keepdim=True)

    store = Datastore.from_features(features, labels, normalization="l2")
    hits = store.search(queries, 20)
    ours = knn_log_probs(hits.similarities, hits.labels, 5, 0.14).exp()
    torch.testing.assert_close(ours.double(), dino, rtol=1e-4, atol=1e-6)
    assert len(dino.argmax(1).unique()) > 2  # not a trivial vote


# log space


def decimal_log_probs(distances: list[float], labels: list[int], count: int, t: float) -> list:
    """log p in 60 decimal digits, where exp(-40000) is an ordinary number."""
    with localcontext() as context:
        context.prec = 60
        votes = [(-Decimal(d) / Decimal(t)).exp() for d in distances]
        sums = [sum(v for v, y in zip(votes, labels, strict=True) if y == c) for c in range(count)]
        return [float((s / sum(votes)).ln()) if s else -INF for s in sums]


@pytest.mark.parametrize("temperature", [1e-4, 1e-3, 0.07, 1.0, 10.0])
@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_tiny_temperature_equals_sixty_digits(metric: str, temperature: float) -> None:
    similarities = [1.0, 0.99, 0.98999, 0.5, 0.0, -1.0]
    if metric == "l2":
        similarities = [s - 1.5 for s in similarities]  # d > 0 for the nearest one too
    distances = [2 - 2 * s if metric == "cosine" else -s for s in similarities]
    labels = [3, 0, 0, 1, 4, 4]
    wanted = decimal_log_probs(distances, labels, 6, temperature)
    rows = torch.tensor([similarities], dtype=torch.float64)
    exact = knn_log_probs(rows, torch.tensor([labels]), 6, temperature, metric=metric)
    assert exact.dtype == torch.float64
    assert exact[0].tolist() == pytest.approx(wanted, rel=1e-11, abs=1e-12)
    assert exact[0, [0, 1, 3, 4]].isfinite().all()
    assert exact[0, [2, 5]].tolist() == [-INF, -INF]
    single = knn_log_probs(rows.float(), torch.tensor([labels]), 6, temperature, metric=metric)
    assert single.dtype == torch.float32
    # what float32 similarities know: d within 1.2e-7, so log p within 2.4e-7 / T
    error = max(1e-6, 2.4e-7 / temperature)
    assert single[0].tolist() == pytest.approx(wanted, rel=1e-6, abs=error)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_without_neighbours_every_class_is_minus_infinity(weighting: str) -> None:
    nothing = torch.empty(3, 0)
    log_probs = knn_log_probs(nothing, nothing.long(), 4, 0.1, weighting=weighting)
    assert log_probs.tolist() == [[-INF] * 4] * 3
    assert neighbor_log_weights(nothing, 0.1, weighting=weighting).shape == (3, 0)
    no_rows = torch.empty(0, 5)
    assert knn_log_probs(no_rows, no_rows.long(), 4, 0.1, weighting=weighting).shape == (0, 4)


def test_floor() -> None:
    floored = floor_log_probs(torch.tensor([-INF, -100.0, -1.0, 0.0]))
    assert floored.tolist() == pytest.approx([math.log(1e-12), math.log(1e-12), -1, 0])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    k=st.integers(0, 12),
    weighting=st.sampled_from(WEIGHTINGS),
    metric=st.sampled_from(["cosine", "l2"]),
    with_reliability=st.booleans(),
)
def test_votes_equal_plain_probabilities(
    seed: int, k: int, weighting: str, metric: str, with_reliability: bool
) -> None:
    generator = np.random.default_rng(seed)
    distances = np.sort(generator.uniform(0.01, 3.9, size=(4, k)), axis=1)
    labels = generator.integers(0, 5, size=(4, k))
    # some votes count nothing, in the last row none counts
    reliability = generator.uniform(size=(4, k)).round(1) if with_reliability else None
    if reliability is not None:
        reliability[3] = 0
    similarities = torch.from_numpy(1 - distances / 2 if metric == "cosine" else -distances)
    ours = knn_log_probs(
        similarities,
        torch.from_numpy(labels),
        5,
        0.5,
        metric=metric,
        weighting=weighting,
        reliability=None if reliability is None else torch.from_numpy(reliability),
    )
    wanted = vote_probs(distances, labels, 5, weighting, 0.5, reliability)
    np.testing.assert_allclose(ours.exp().numpy(), wanted, rtol=1e-9, atol=1e-12)
    if with_reliability:
        assert ours[3].tolist() == [-INF] * 5


def test_reliability_by_eye() -> None:
    # votes 1, 1/2, 1/2 times 1/4, 1, 0: class 0 has 1/4, class 1 has 1/2, class 2 nothing
    reliability = torch.tensor([[0.25, 1.0, 0.0]])
    found = probs_of([0.0, -1.0, -1.0], [0, 1, 2], 3, reliability=reliability)
    assert found == pytest.approx([1 / 3, 2 / 3, 0])


@pytest.mark.parametrize("value", [math.nan, -0.1, 1.5])
def test_reliability_outside_0_1_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="`reliability`"):
        probs_of([-1.0, -2.0], [0, 1], 2, reliability=torch.tensor([[value, 1.0]]))


def good_call(**changes: Any) -> Tensor:
    call: dict[str, Any] = {
        "similarities": torch.zeros(2, 3),
        "labels": torch.zeros(2, 3, dtype=torch.int64),
        "num_labels": 2,
        "temperature": 0.1,
    }
    return knn_log_probs(**(call | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0}, "`temperature`.*but got 0"),
        ({"temperature": -1.0}, "`temperature`.*but got -1"),
        ({"temperature": math.nan}, "`temperature`.*but got nan"),
        ({"temperature": INF}, "`temperature`.*but got inf"),
        ({"metric": "euclid"}, "euclid"),
        ({"weighting": "gauss"}, "gauss"),
        ({"labels": torch.zeros(2, 2, dtype=torch.int64)}, r"`labels`.*\(2, 3\).*\(2, 2\)"),
        ({"labels": torch.zeros(2, 3)}, "`labels`.*int64.*float32"),
        ({"labels": torch.full((2, 3), 2)}, r"`labels`.*\[0, 2\).*2"),
        ({"labels": torch.full((2, 3), -1)}, r"`labels`.*\[0, 2\).*-1"),
        (
            {"similarities": torch.tensor([[0.0] * 3, [0, math.nan, 0]])},
            r"`similarities` without NaN.*\[1\]",
        ),
        (
            {"similarities": torch.zeros(3), "labels": torch.zeros(3, dtype=torch.int64)},
            r"`similarities`.*\(3,\)",
        ),
        ({"reliability": torch.zeros(2, 2)}, r"`reliability`.*\(2, 3\).*\(2, 2\)"),
    ],
)
def test_votes_refuse(changes: dict[str, Any], message: str) -> None:
    assert good_call().shape == (2, 2)
    with pytest.raises(ValueError, match=message):
        good_call(**changes)


# blend


def random_voices(seed: int, rows: int, known: int, taught: int) -> tuple[NDArray, NDArray]:
    """Head and k-NN probabilities; k-NN with zeros, all taught, none taught, and no neighbours."""
    generator = np.random.default_rng(seed)
    head = generator.dirichlet(np.full(known, 0.3), size=rows).clip(1e-30)
    head /= head.sum(1, keepdims=True)
    knn = generator.dirichlet(np.full(known + taught, 0.5), size=rows)
    knn *= generator.integers(0, 2, size=knn.shape)
    if taught:
        knn[0, :known] = 0
        knn[1 % rows, known:] = 0
    total = knn.sum(1, keepdims=True)
    return head, np.divide(knn, total, out=np.zeros_like(knn), where=total > 0)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    known=st.integers(1, 5),
    taught=st.integers(0, 3),
    knn_weight=st.sampled_from([0.0, 0.05, 0.5, 1.0]) | st.floats(0, 1),
)
def test_blend_equals_plain_probabilities(
    seed: int, known: int, taught: int, knn_weight: float
) -> None:
    head, knn = random_voices(seed, 6, known, taught)
    head_log, knn_log = torch.from_numpy(head).log(), torch.from_numpy(knn).log()
    ours = blend_log_probs(head_log, knn_log, knn_weight)
    wanted = blend_probs(head, knn, knn_weight)
    np.testing.assert_allclose(ours.exp().numpy(), wanted, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(ours.exp().sum(1).numpy(), 1, rtol=1e-9)
    single = blend_log_probs(head_log.float(), knn_log.float(), knn_weight)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.exp().numpy(), wanted, rtol=1e-4, atol=1e-6)


def test_blend_by_eye() -> None:
    head = torch.tensor([[0.8, 0.2]]).log()
    knn = torch.tensor([[0.4, 0.6]]).log()
    # 0.25 * 0.4 + 0.75 * 0.8 = 0.7
    assert blend_log_probs(head, knn, 0.25).exp()[0].tolist() == pytest.approx([0.7, 0.3])
    # a taught class with q = 0.6; 0.4 is left: 0.4 * (0.5 * (0.1 / 0.4) + 0.5 * 0.8) = 0.21
    taught = torch.tensor([[0.1, 0.3, 0.6]]).log()
    found = blend_log_probs(head, taught, 0.5).exp()[0].tolist()
    assert found == pytest.approx([0.21, 0.19, 0.6])
    # a head that was taught the class as well: 0.5 * (0.1 + 0.4 * 0.2) = 0.09; 0.5 * (0.3 + 0.4 *
    # 0.1) = 0.17; 0.6 + 0.5 * 0.4 * 0.7 = 0.74
    taught_head = torch.tensor([[0.2, 0.1, 0.7]]).log()
    found = blend_log_probs(taught_head, taught, 0.5, num_tuned=2).exp()[0].tolist()
    assert found == pytest.approx([0.09, 0.17, 0.74])


def test_blend_at_the_ends_is_one_voice_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(20, 5, generator=generator).log_softmax(1)
    knn = torch.randn(20, 5, generator=generator).log_softmax(1)
    knn[3, 2] = -INF
    assert torch.equal(blend_log_probs(head, knn, 0.0), head)
    assert torch.equal(blend_log_probs(head, knn, 1.0), knn)


@pytest.mark.parametrize("knn_weight", [0.0, 0.05, 0.5, 1.0])
def test_a_taught_class_keeps_its_probability(knn_weight: float) -> None:
    head, knn = random_voices(7, 12, 3, 2)
    ours = blend_log_probs(torch.from_numpy(head).log(), torch.from_numpy(knn).log(), knn_weight)
    has_neighbors = knn.sum(1) > 0
    assert has_neighbors.sum() > 6
    assert torch.equal(ours[:, 3:], torch.from_numpy(knn).log()[:, 3:])
    np.testing.assert_allclose(ours.exp().sum(1).numpy(), 1, rtol=1e-12)


@pytest.mark.parametrize("taught", [0, 2])
def test_a_row_without_neighbours_is_its_head(taught: int) -> None:
    head = torch.tensor([[0.7, 0.3], [0.1, 0.9]]).log()
    knn = torch.full((2, 2 + taught), -INF)
    knn[1, 0] = 0.0
    blended = blend_log_probs(head, knn, 0.5)
    assert torch.equal(blended[0, :2], head[0])
    assert blended[0, 2:].tolist() == [-INF] * taught
    assert blended[1, :2].exp().tolist() == pytest.approx([0.55, 0.45])


@pytest.mark.parametrize("knn_weight", [-0.1, 1.1, math.nan, INF])
def test_blend_refuses_a_weight(knn_weight: float) -> None:
    with pytest.raises(ValueError, match=r"`knn_weight`.*\[0, 1\].*but got"):
        blend_log_probs(torch.zeros(1, 2), torch.zeros(1, 2), knn_weight)


@pytest.mark.parametrize("shape", [(2, 3), (1, 1)])
def test_blend_refuses_a_shape(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"\[1, at least 2\].*but got \(\d, \d\)"):
        blend_log_probs(torch.zeros(1, 2), torch.zeros(shape), 0.5)


@pytest.mark.parametrize(("head", "knn"), [((2, 2), (2,)), ((2,), (2, 2)), ((2, 2, 2), (2, 2))])
def test_blend_refuses_another_number_of_dimensions(
    head: tuple[int, ...], knn: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"`(head|knn)_log_probs`"):
        blend_log_probs(torch.zeros(head), torch.zeros(knn), 0.5)


# loss weights

SURPRISES = torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [0.1, 0.0, 0.9]]).log()


def test_loss_weights_by_eye() -> None:
    labels = torch.tensor([1, 1, 0])  # surprises ln 4, 0 and ln 10
    wanted = [1 + 0.5 * math.log(4), 1, 1 + 0.5 * math.log(10)]
    assert knn_loss_weights(SURPRISES, labels, 0.5).tolist() == pytest.approx(wanted)
    clamped = knn_loss_weights(SURPRISES, labels, 0.5, clamp=2.0)
    assert clamped.tolist() == pytest.approx([*wanted[:2], 1 + 0.5 * 2])


def test_loss_weights_clamp_the_impossible() -> None:
    labels = torch.tensor([2, 0, 1])  # probabilities 0.25, 0 and 0
    wanted = [1 + 0.1 * math.log(4), 11, 11]
    assert knn_loss_weights(SURPRISES, labels, 0.1).tolist() == pytest.approx(wanted)
    tamer = knn_loss_weights(SURPRISES, labels, 0.1, clamp=10)
    assert tamer.tolist() == pytest.approx([wanted[0], 2, 2])


@pytest.mark.parametrize("normalize", ["none", "mean"])
def test_alpha_zero_is_exactly_one(normalize: str) -> None:
    factors = knn_loss_weights(SURPRISES, torch.tensor([0, 0, 1]), 0.0, normalize=normalize)
    assert factors.dtype == torch.float32
    assert torch.equal(factors, torch.ones(3))


def test_alpha_zero_is_exactly_one_without_a_clamp() -> None:
    factors = knn_loss_weights(SURPRISES, torch.tensor([0, 0, 1]), 0.0, clamp=INF)
    assert torch.equal(factors, torch.ones(3))


def test_loss_weights_normalised_by_their_mean() -> None:
    labels = torch.tensor([0, 0, 1])
    plain = knn_loss_weights(SURPRISES, labels, 0.3)
    factors = knn_loss_weights(SURPRISES, labels, 0.3, normalize="mean")
    torch.testing.assert_close(factors, plain / plain.mean())
    assert factors.mean().item() == pytest.approx(1)
    assert factors.std() > 0.1


def test_loss_weights_have_no_gradient() -> None:
    log_probs = SURPRISES.clamp_min(-50).requires_grad_()
    labels = torch.tensor([0, 1, 2])
    assert not knn_loss_weights(log_probs, labels, 0.3, normalize="mean").requires_grad
    assert not focal_loss_weights(log_probs, labels, 2.0).requires_grad


def test_focal_weights() -> None:
    labels = torch.tensor([1, 1, 0])  # probabilities 1/4, 1, 1/10
    found = focal_loss_weights(SURPRISES, labels, 2.0)
    assert found.tolist() == pytest.approx([0.75**2, 0, 0.9**2], abs=1e-7)
    assert focal_loss_weights(SURPRISES, torch.tensor([0, 0, 1]), 1.0)[1:].tolist() == [1, 1]
    assert torch.equal(focal_loss_weights(SURPRISES, labels, 0.0), torch.ones(3))
    nearly_one = torch.tensor([[-1e-9]], dtype=torch.float64)  # 1 - p without cancellation
    found = focal_loss_weights(nearly_one, torch.tensor([0]), 1.0)
    assert found.item() == pytest.approx(1e-9, rel=1e-9, abs=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.1}, "`alpha`.*-0.1"),
        ({"alpha": math.nan}, "`alpha`.*nan"),
        ({"alpha": INF}, "`alpha`.*inf"),
        ({"clamp": 0.0}, "`clamp`.*0"),
        ({"clamp": math.nan}, "`clamp`.*nan"),
        ({"normalize": "sum"}, "sum"),
        ({"labels": torch.tensor([0, 1, 3])}, r"`labels`.*\[0, 3\).*3"),
        ({"labels": torch.tensor([0, -1, 1])}, r"`labels`.*\[0, 3\).*-1"),
        ({"labels": torch.tensor([0.0, 1.0, 1.0])}, "`labels`.*int64"),
    ],
)
def test_loss_weights_refuse(options: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"labels": torch.tensor([0, 1, 1]), "alpha": 0.1} | options
    with pytest.raises(ValueError, match=message):
        knn_loss_weights(SURPRISES, **call)


@pytest.mark.parametrize("count", [2, 4])
def test_loss_weights_refuse_another_number_of_labels(count: int) -> None:
    with pytest.raises(ValueError, match="`labels`"):
        knn_loss_weights(SURPRISES, torch.zeros(count, dtype=torch.int64), 0.1)


@pytest.mark.parametrize("gamma", [-1.0, math.nan, INF])
def test_focal_refuses(gamma: float) -> None:
    with pytest.raises(ValueError, match=r"`gamma`.*but got"):
        focal_loss_weights(SURPRISES, torch.tensor([0, 1, 1]), gamma)


def test_class_weights_equal_sklearn_balanced() -> None:
    labels = torch.tensor([0] * 7 + [1] * 2 + [2] * 3)
    balanced = compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy())
    assert class_weights(labels, 3).tolist() == pytest.approx(balanced)
    roots = class_weights(labels, 3, "inverse_sqrt")
    # up to the factor that makes the mean over the examples 1
    ratio = roots.numpy() / np.sqrt(balanced)
    assert ratio == pytest.approx([ratio[0]] * 3)
    for weights in (class_weights(labels, 3), roots):
        assert weights.dtype == torch.float32
        assert weights[labels].mean().item() == pytest.approx(1)
    assert torch.equal(class_weights(labels, 3, "none"), torch.ones(3))


@pytest.mark.parametrize("mode", ["inverse", "inverse_sqrt"])
def test_class_weights_of_a_class_without_examples(mode: str) -> None:
    labels = torch.tensor([0, 0, 0, 3])
    weights = class_weights(labels, 5, mode)
    assert weights[[1, 2, 4]].tolist() == [0, 0, 0]
    ratio = 3 if mode == "inverse" else math.sqrt(3)
    assert (weights[3] / weights[0]).item() == pytest.approx(ratio)
    assert weights[labels].mean().item() == pytest.approx(1)
    assert class_weights(torch.empty(0, dtype=torch.int64), 2, mode).tolist() == [0, 0]


def test_class_weights_refuse() -> None:
    with pytest.raises(ValueError, match="balanced"):
        class_weights(torch.tensor([0]), 1, "balanced")
    with pytest.raises(ValueError, match=r"`labels`.*\[0, 1\).*1"):
        class_weights(torch.tensor([0, 1]), 1)


def test_leave_one_out_votes_equal_the_matrix_without_the_diagonal() -> None:
    features, labels = clusters(5, 50, 4, 3)
    features[40:] = features[:10]  # duplicates, some with another label
    store = Datastore.from_features(features, labels)
    hits = store.search(features, 9, exclude_ids=store.ids)
    ours = knn_log_probs(hits.similarities, hits.labels, 3, 0.2).exp()
    matrix = similarity_matrix(store, features)
    np.fill_diagonal(matrix, -INF)
    order = np.lexsort((np.broadcast_to(np.arange(50), (50, 50)), -matrix.round(12)))[:, :9]
    distances = 2 - 2 * np.take_along_axis(matrix, order, 1)
    wanted = vote_probs(distances, labels.numpy()[order], 3, "softmax", 0.2)
    np.testing.assert_allclose(ours.numpy(), wanted, rtol=1e-4, atol=1e-6)


def test_a_name_that_is_no_choice_is_refused_with_those_there_are() -> None:
    one, label = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"`metric` .* one of \['cosine', 'l2'\], but got 'dot'"):
        knn_log_probs(one, label, 2, 0.1, metric="dot")
    with pytest.raises(ValueError, match=r"`weighting` to be one of \['softmax', .*but got 'x'"):
        knn_log_probs(one, label, 2, 0.1, weighting="x")
    with pytest.raises(ValueError, match=r"`normalization` to be one of .*but got None"):
        Datastore.from_features(one, [0], normalization=None)  # type: ignore[arg-type]
