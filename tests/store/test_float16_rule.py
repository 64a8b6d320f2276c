"""When rows are stored as float16: asked of what a search compares; brute force is the oracle."""

import copy
import logging
from pathlib import Path

import pytest
import torch
from support.tiny import tiny_model
from torch import Tensor

from hf_knn.store import casting
from hf_knn.store.datastore import Datastore
from hf_knn.store.faiss import has_faiss

K = 10
FAISS = pytest.mark.skipif(not has_faiss(), reason="needs faiss")


def clusters(offset: float, spread: float, count: int = 800, seed: int = 0) -> Tensor:
    """Rows in 20 clusters with a common offset, as features behind a bias have it."""
    generator = torch.Generator().manual_seed(7)
    centers = torch.randn(20, 32, generator=generator) * spread
    noise = torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))
    return offset + centers[torch.arange(count) % 20] + noise * spread * 0.5


def labels(rows: Tensor) -> Tensor:
    return torch.arange(len(rows)) % 20


def recall(store: Datastore, rows: Tensor, queries: Tensor) -> float:
    """Against float64 of the features that were given."""
    x, q = rows.double(), queries.double()
    if store.normalization == "l2_centered":
        x, q = x - rows.double().mean(0), q - rows.double().mean(0)
    if store.normalization != "none":
        x, q = (torch.nn.functional.normalize(v, dim=1) for v in (x, q))
    scores = q @ x.T if store.metric == "cosine" else -torch.cdist(q, x)
    wanted = scores.topk(K).indices
    found = store.search(queries, K).ids
    return float((wanted[:, :, None] == found[:, None, :]).any(2).double().mean())


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.message for r in caplog.records if r.name == casting.__name__]


OFFSETS = [(0, 1), (5, 1), (10, 0.1), (50, 0.1), (100, 0.05), (1000, 1), (-300, 0.5)]


@pytest.mark.parametrize(("offset", "spread"), OFFSETS)
@pytest.mark.parametrize(
    ("metric", "normalization"),
    [("cosine", "l2_centered"), ("cosine", "l2"), ("l2", "none"), ("l2", "l2_centered")],
)
def test_what_rows_have_in_common_does_not_count(
    metric: str, normalization: str, offset: float, spread: float,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    rows, queries = clusters(offset, spread), clusters(offset, spread, 100, seed=1)
    store = Datastore.from_features(
        rows, labels(rows), metric=metric, normalization=normalization, index="flat"
    )
    is_narrow = (offset, spread) in [(0, 1), (5, 1)]
    assert store.dtype == ("float16" if is_narrow else "float32")
    assert len(messages(caplog)) == (not is_narrow)
    assert recall(store, rows, queries) > 0.97


def test_one_offset_column_is_enough() -> None:
    """Not only a bias that all columns share."""
    rows = clusters(0, 1)
    rows[:, 3] += 20
    assert Datastore.from_features(rows, labels(rows)).dtype == "float16"
    rows[:, 3] += 5000
    store = Datastore.from_features(rows, labels(rows))
    assert store.dtype == "float32"
    assert recall(store, rows, rows[:50]) > 0.97


@pytest.mark.parametrize(
    "rows",
    [
        torch.ones(1, 8) / 3,
        (torch.ones(1, 8) / 3).repeat(40, 1),
        torch.zeros(5, 8),
        torch.cat([torch.zeros(3, 8), torch.randn(50, 8, generator=torch.Generator())]),
        clusters(0, 1).half().float() + 0,
        (clusters(1000, 1).half()).float(),
    ],
    ids=["one", "all alike", "zeros", "some zeros", "casts", "casts with an offset"],
)
def test_what_float16_holds_stays_float16(rows: Tensor) -> None:
    store = Datastore.from_features(rows, torch.zeros(len(rows)).long())
    assert store.dtype == "float16"
    assert torch.equal(store.features, rows.half())


@pytest.mark.parametrize("normalization", ["l2_centered", "l2"])
def test_a_row_that_vanishes_beside_others_is_seen(normalization: str) -> None:
    rows = torch.cat([clusters(0, 1), torch.full((1, 32), 1e-9)])
    store = Datastore.from_features(rows, labels(rows), normalization=normalization)
    assert store.dtype == "float32"


def test_added_rows_widen_all_and_keep_what_was_stored(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    store = Datastore.from_features(clusters(20, 2), labels(clusters(20, 2)), index="flat")
    assert store.dtype == "float16"
    before, mean = store.features, store.mean
    store.add(clusters(20, 2, 5, seed=2), [0] * 5)
    assert store.dtype == "float16"
    assert not messages(caplog)
    near = mean + 1e-4 * torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
    ids = store.add(near, [1, 2, 3])
    assert store.dtype == "float32"
    assert len(messages(caplog)) == 1
    assert torch.equal(store.features[: len(before)], before.float())
    assert torch.equal(store.features[-3:], near)
    assert store.search(near, 1).ids.flatten().tolist() == ids.tolist()
    store.save(tmp_path / "s")
    assert torch.equal(Datastore.load(tmp_path / "s").features, store.features)
    store.remove(ids)  # as `undo` does: the values are those that were stored
    assert torch.equal(store.features[: len(before)], before.float())


@FAISS
@pytest.mark.parametrize("index", ["IVF16,Flat", "IVF16,SQ8", "HNSW8"])
def test_an_index_follows_rows_that_became_wider(index: str) -> None:
    rows = clusters(20, 2)
    store = Datastore.from_features(rows, labels(rows), index=index)
    store.search(rows[:2], 3)
    near = store.mean + 1e-4 * torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
    ids = store.add(near, [1, 2, 3])
    assert store.dtype == "float32"
    assert store.search(near, 1).ids.flatten().tolist() == ids.tolist()
    wide = Datastore.from_features(clusters(100, 0.05), labels(rows), index=index)
    assert wide.dtype == "float32"
    assert recall(wide, clusters(100, 0.05), clusters(100, 0.05, 100, seed=1)) > 0.9


@pytest.mark.parametrize("offsets", [(0, 1000), (1000, 0), (1000, 1000), (0, 0)])
def test_merged_rows_keep_what_they_are(offsets: tuple[float, float]) -> None:
    parts = [clusters(offset, 1, 300, seed=i) for i, offset in enumerate(offsets)]
    one, other = (Datastore.from_features(rows, labels(rows)) for rows in parts)
    stored = [one.features.float(), other.features.float()]
    was = one.dtype
    one.merge(other, renumber=True)
    assert torch.equal(one.features.float(), torch.cat(stored))
    if was == "float16" and offsets[1] == 0:
        assert one.dtype == "float16"


def test_a_mean_that_moves_too_near_is_told(caplog: pytest.LogCaptureFixture) -> None:
    far, near = clusters(0, 60, 400), clusters(100, 0.05, 400, seed=1)
    store = Datastore.from_features(torch.cat([far, near]), labels(torch.cat([far, near])))
    assert store.dtype == "float16"
    store.recenter()
    assert not messages(caplog)
    store.remove(store.ids[:400])
    store.recenter()
    (message,) = messages(caplog)
    assert "400 of 400 rows lie so near to the new mean" in message
    caplog.clear()
    again = Datastore.from_features(near, labels(near))
    again.recenter()
    assert [record for record in messages(caplog) if "new mean" in record] == []


def test_a_model_counts_its_rows_anew_when_they_become_wider() -> None:
    model = tiny_model()
    width = model.config.feature_dim
    rows = torch.randn(40, width, generator=torch.Generator().manual_seed(0)) + 5
    model.datastore = Datastore.from_features(rows, torch.arange(40) % 4)
    model.fingerprint_rows()
    assert model.datastore.dtype == "float16"
    model.teach(features=model.datastore.mean[None] + 1e-5 * torch.randn(1, width), labels=["ant"])
    assert model.datastore.dtype == "float32"
    fresh = copy.deepcopy(model)
    fresh.datastore = model.datastore  # which forgets what was counted
    assert model.fingerprint_rows() == fresh.fingerprint_rows()
    model.undo()
    assert torch.equal(model.datastore.features, rows.half().float())
    fresh.datastore = model.datastore
    assert model.fingerprint_rows() == fresh.fingerprint_rows()


def test_the_message_says_what_and_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Datastore.from_features(clusters(100, 0.05), labels(clusters(100, 0.05)))
    (message,) = messages(caplog)
    assert "a row that the cast turns" in message
    assert "float32, twice the size" in message
