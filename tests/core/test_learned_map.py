"""A learned map: its formula, what it refuses, and answers that depend on nothing else."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.oracles import as_numpy, normalized

from hf_knn.core.learned import LearnedMap
from hf_knn.core.search import normalize_rows
from hf_knn.store.datastore import Datastore

CASES = [("cosine", "l2_centered"), ("cosine", "l2"), ("l2", "none"), ("l2", "l2_centered")]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_store(metric: str = "cosine", normalization: str = "l2_centered") -> Datastore:
    rows = drawn(200, 12) * 3 + 1
    store = Datastore.from_features(
        rows, torch.arange(200) % 5, metric=metric, normalization=normalization, index="flat"
    )
    store.remap(drawn(4, 12, seed=1))
    return store


@pytest.mark.parametrize(("metric", "normalization"), CASES)
def test_it_is_what_a_dense_computation_gives(metric: str, normalization: str) -> None:
    store, queries = make_store(metric, normalization), drawn(9, 12, seed=2)
    weight = as_numpy(drawn(4, 12, seed=1))
    zero, kind = torch.zeros(12), normalization.removesuffix("_centered")
    mean = as_numpy(store.mean) if normalization == "l2_centered" else 0

    def dense(values: torch.Tensor) -> np.ndarray:
        return normalized((as_numpy(values) - mean) @ weight.T, zero[:4], kind)

    rows, wanted = dense(store.features), dense(queries)
    similarities = wanted @ rows.T
    if metric == "l2":
        similarities = -((rows[None] - wanted[:, None]) ** 2).sum(-1)
    order = np.argsort(-similarities, axis=1)[:, :7]
    found = store.search(queries, 7)
    assert found.ids.tolist() == order.tolist()
    near = np.take_along_axis(similarities, order, axis=1)
    np.testing.assert_allclose(found.similarities.numpy(), near, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("width", [1, 3, 1280, 4096])
def test_a_row_is_the_same_in_any_company(width: int) -> None:
    """Rounded to whole numbers whose sums float64 holds: bit for bit, whatever the order."""
    rows, learned = drawn(70, width).numpy() * 1e3, LearnedMap(drawn(min(width, 40), width) * 0.01)
    wanted = learned.apply(rows.astype(np.float64))
    alone = np.concatenate([learned.apply(row[None].astype(np.float64)) for row in rows])
    assert np.array_equal(wanted, alone)
    order = torch.randperm(width, generator=torch.Generator().manual_seed(3))
    turned = LearnedMap(learned.weight[:, order])
    assert np.array_equal(turned.apply(rows.astype(np.float64)[:, order.numpy()]), wanted)
    exact = rows.astype(np.float64) @ as_numpy(learned.weight).T
    assert np.abs(wanted - exact).max() <= 1e-4 * np.abs(exact).max()


def test_rows_without_a_direction_stay_without() -> None:
    rows = np.zeros((2, 3), np.float32)
    rows[1] = 1e-30
    found = normalize_rows(rows, np.zeros(3), "l2", LearnedMap(torch.eye(3)[:2]))
    assert found[0].tolist() == [0, 0]
    np.testing.assert_allclose(found[1], [0.5**0.5] * 2, rtol=1e-6)


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(2, 3), torch.eye(3).double(), torch.eye(3).half(), torch.ones(4, 3),
        torch.ones(3), torch.empty(0, 3), torch.full((2, 3), 2e6),
        torch.tensor([[1.0, float("nan")]]), torch.tensor([[float("inf"), 1.0]]),
    ],
)  # fmt: skip
def test_hostile_maps_are_refused(weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="Expected a learned map to be"):
        LearnedMap(weight)
    store = make_store()
    before = store.learned_map
    with pytest.raises(ValueError, match="Expected a learned map"):
        store.remap(weight)
    assert store.learned_map is before


def test_a_map_of_other_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="rows of width 12, as the datastore has, but got one of"):
        make_store().remap(torch.eye(11))


def test_it_is_a_value() -> None:
    weight = drawn(2, 3)
    learned = LearnedMap(weight)
    weight.zero_()
    assert learned.weight.abs().max() > 0
    assert learned.sha256 == LearnedMap(learned.weight).sha256
    assert learned.sha256 != LearnedMap(learned.weight.reshape(1, 6)).sha256


@pytest.mark.parametrize(("metric", "normalization"), CASES)
def test_the_answer_is_the_same_for_any_batch_and_number_of_threads(
    metric: str, normalization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, queries = make_store(metric, normalization), drawn(64, 12, seed=4)
    whole = store.search(queries, 20)
    threads = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            parts = [store.search(part, 20) for part in queries.split(7)]
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(torch.cat([part.ids for part in parts]), whole.ids)
        assert torch.equal(torch.cat([part.similarities for part in parts]), whole.similarities)
    monkeypatch.setattr("hf_knn.core.search._COMPARE_BYTES", 1)  # every row by itself
    assert torch.equal(store.search(queries, 20).similarities, whole.similarities)


def test_removing_it_gives_the_plain_answers_back(tmp_path: Path) -> None:
    store, queries = make_store(), drawn(9, 12, seed=2)
    plain = Datastore.from_features(store.features, store.labels, index="flat")
    assert not torch.equal(plain.search(queries, 5).ids, store.search(queries, 5).ids)
    store.remap(None)
    assert torch.equal(plain.search(queries, 5).ids, store.search(queries, 5).ids)
    assert store.save(tmp_path / "a").to_json() == plain.save(tmp_path / "b").to_json()
