"""The fastest exact first pass is measured and remembered, and never changes an answer."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.first_passes import MADE, SPACES
from support.oracles import assert_nearest
from torch import Tensor

from hf_knn.core.search import Floats, Ints, Singles
from hf_knn.store import products, quickest
from hf_knn.store.datastore import Datastore
from hf_knn.store.faiss import FaissFlat
from hf_knn.store.products import Products
from hf_knn.store.quickest import Milliseconds, Quickest

ROWS, WIDTH = 700, 16
CONTENDERS = ("float32", "bfloat16", "int8", "faiss")


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is remembered from before, and all contend, whatever the processor has."""
    monkeypatch.setattr(quickest, "_known", {})
    monkeypatch.setattr(quickest, "contenders", lambda: {name: MADE[name] for name in CONTENDERS})


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The rows and widths that were measured, in place of doing it."""
    asked: list[tuple[int, int]] = []

    def measure(made: dict[str, Any], rows: int, width: int) -> quickest.Times:
        asked.append((rows, width))
        return {name: Milliseconds(2.0 + place, 9.0 - place) for place, name in enumerate(made)}

    monkeypatch.setattr(quickest, "measure", measure)
    return asked


def let_win(monkeypatch: pytest.MonkeyPatch, single: str, batch: str) -> None:
    """As if these had been the fastest."""
    times = {name: Milliseconds(9.0, 9.0) for name in CONTENDERS}
    times[single] = times[single]._replace(single=1.0)
    times[batch] = times[batch]._replace(batch=1.0)
    monkeypatch.setattr(quickest, "times_of", lambda count, width: times)


def kinds_of(store: Datastore) -> list[str]:
    first_pass = store.build_index().index
    assert isinstance(first_pass, Quickest)
    for name, inside in first_pass.inside.items():
        assert type(inside) is (FaissFlat if name == "faiss" else Products)
    assert str(first_pass).startswith(first_pass.few)
    assert str(first_pass).endswith(first_pass.many if len(first_pass.inside) == 1 else "for more")
    return list(first_pass.inside)


def test_each_is_measured_for_both_kinds_of_call() -> None:
    found = quickest.measure(quickest.contenders(), 1024, 8)
    assert list(found) == list(CONTENDERS)
    assert min(value for times in found.values() for value in times) > 0


def test_a_batch_of_a_slow_one_is_tried_with_few_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = [0.0], []

    class Clocked:
        """Takes so many seconds a row and query, by a clock of its own."""

        extra = 0

        def __init__(self, rows: Singles, seconds: float) -> None:
            self.held, self.seconds = len(rows), seconds

        def add(self, rows: Singles) -> None:
            self.held += len(rows)

        def candidates(self, queries: Singles, count: int) -> tuple[Ints, Floats]:
            now[0] += self.seconds * self.held * len(queries)
            asked.append((self.seconds, self.held, len(queries)))
            return np.zeros((len(queries), count), np.int64), np.zeros((len(queries), count))

    monkeypatch.setattr(quickest, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    made: dict[str, quickest.Make] = {
        str(seconds): partial(Clocked, seconds=seconds) for seconds in (1.0, 2.0, 5.0)
    }
    found = quickest.measure(made, 16_384, 4)
    for name, times in found.items():
        single = 1000 * float(name) * 16_384
        assert times == (pytest.approx(single), pytest.approx(64 * single))
    whole = {(seconds, queries) for seconds, held, queries in asked if held == 16_384}
    assert whole == {(1.0, 1), (2.0, 1), (5.0, 1), (1.0, 64), (2.0, 64)}


@pytest.mark.parametrize("name", ["float32", "int8"])
def test_rows_that_are_repeated_are_found_as_if_they_had_come_so_often(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_BLOCK_ROWS", 64)
    rows = torch.nn.functional.normalize(normal(0, 128, WIDTH)).numpy()
    repeated, whole = MADE[name](rows), MADE[name](np.tile(rows, (3, 1)))
    assert isinstance(repeated, Products)
    repeated.repeat(3)
    places, reach = repeated.candidates(rows[:9], 60)
    assert np.array_equal(reach, whole.candidates(rows[:9], 60)[1])
    assert all(len(set(found)) == 60 for found in places.tolist())
    assert places.max() >= 256


def test_it_is_measured_once_and_remembered_in_the_process_and_on_disk(
    measured: list[tuple[int, int]], knn_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = quickest.times_of(3000, WIDTH)
    assert measured == [(4096, WIDTH)]
    assert quickest.times_of(4096, WIDTH) is first
    monkeypatch.setattr(quickest, "_known", {})  # as in another process
    assert quickest.times_of(2049, WIDTH) == first
    assert measured == [(4096, WIDTH)]
    (place,) = (knn_cache / "search").iterdir()
    document = json.loads(place.read_text())
    assert (document["rows"], document["width"]) == (4096, WIDTH)
    assert document["milliseconds"]["int8"] == list(first["int8"])


def test_another_size_width_or_machine_is_measured_again(
    measured: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    quickest.times_of(3000, WIDTH)
    quickest.times_of(5000, WIDTH)
    quickest.times_of(3000, WIDTH + 1)
    for name, value in (("_processor", "other"), ("_versions", ("99.0",))):
        monkeypatch.setattr(quickest, name, lambda value=value: value)
        quickest.times_of(3000, WIDTH)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    quickest.times_of(3000, WIDTH)
    assert measured == [(4096, 16), (8192, 16), (4096, 17), *[(4096, 16)] * 3]


def test_what_is_measured_takes_no_more_memory_for_more_rows(
    measured: list[tuple[int, int]],
) -> None:
    quickest.times_of(10**7, 384)
    quickest.times_of(10**8, 384)
    quickest.times_of(10, 10**6)
    assert measured == [(32_768, 384), (1024, 10**6)]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace("milliseconds", "seconds"),
        lambda text: text.replace("9.0", "-9.0"),
        lambda text: text.replace("9.0", "NaN"),
        lambda text: text.replace("9.0", '"fast"'),
        lambda text: text.replace('"faiss"', '"others"'),
        lambda text: text.replace("9.0", "9.0, 1.0"),
        lambda text: "[" * 100_000,
    ],
)
def test_a_damaged_file_is_measured_again(
    damage: Any, measured: list[tuple[int, int]], knn_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = quickest.times_of(ROWS, WIDTH)
    (place,) = (knn_cache / "search").iterdir()
    whole = place.read_text()
    place.write_text(damage(whole))
    monkeypatch.setattr(quickest, "_known", {})
    assert quickest.times_of(ROWS, WIDTH) == first
    assert len(measured) == 2
    assert place.read_text() == whole
    assert [other.name for other in place.parent.iterdir()] == [place.name]


def test_a_cache_that_cannot_be_written_is_no_reason_not_to_search(
    measured: list[tuple[int, int]], knn_cache: Path
) -> None:
    knn_cache.write_text("a file where the folder would be")
    store = Datastore.from_features(normal(0, ROWS, WIDTH), [0] * ROWS, index="flat")
    assert_nearest(store.search(normal(1, 5, WIDTH), 7), store, normal(1, 5, WIDTH), 7)
    assert len(measured) == 1


@pytest.mark.parametrize(
    ("times", "wanted"),
    [
        ({"a": (1, 9), "b": (5, 2)}, ("a", "b")),
        ({"a": (1, 1), "b": (2, 2)}, ("a", "a")),
        ({"a": (4, 9), "b": (5, 2)}, ("b", "b")),  # hardly faster for one query
        ({"a": (1, 10), "b": (5, 8)}, ("a", "a")),  # hardly faster for many
        ({"a": (1, 50), "b": (90, 2), "c": (9, 9)}, ("a", "b")),
    ],
)
def test_a_second_one_is_kept_where_it_is_worth_its_memory(
    times: dict[str, tuple[float, float]], wanted: tuple[str, str]
) -> None:
    assert quickest.choose({name: Milliseconds(*pair) for name, pair in times.items()}) == wanted


@pytest.mark.parametrize(("metric", "normalization"), SPACES)
def test_whichever_wins_the_answer_is_the_same(
    metric: str, normalization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, queries = normal(0, ROWS, WIDTH), normal(1, 40, WIDTH)
    rows[300:600] = rows[:300]
    found = []
    pairs = [(name, name) for name in CONTENDERS] + [("int8", "float32"), ("faiss", "int8")]
    for single, batch in pairs:
        let_win(monkeypatch, single, batch)
        store = Datastore.from_features(
            rows[:500], [0] * 500, None, metric, normalization, index="flat"
        )
        assert kinds_of(store) == list(dict.fromkeys((single, batch)))
        store.add(rows[500:], [0] * 200)
        store.remove([3, 4])
        found.append([store.search(queries, 9), store.search(queries[:3], 9)])
    for both in found:
        for hits, wanted in zip(both, found[0], strict=True):
            assert torch.equal(hits.ids, wanted.ids)
            assert torch.equal(hits.similarities, wanted.similarities)
    assert_nearest(found[0][0], store, queries, 9)


def test_short_numbers_are_not_used_where_they_leave_too_many_rows_in_doubt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    let_win(monkeypatch, "int8", "int8")
    near = torch.ones(3000, WIDTH) + 1e-3 * normal(0, 3000, WIDTH)
    store = Datastore.from_features(near, [0] * 3000, normalization="l2", index="flat")
    assert kinds_of(store) != ["int8"]
    assert_nearest(store.search(near[:5], 20), store, near[:5], 20)


def test_as_many_candidates_are_asked_for_as_the_rows_need(monkeypatch: pytest.MonkeyPatch) -> None:
    let_win(monkeypatch, "int8", "int8")
    spread = Datastore.from_features(normal(0, 2000, 128), [0] * 2000, index="flat")
    rows = normal(0, 100, 128).repeat(20, 1) + 0.15 * normal(1, 2000, 128)
    dense = Datastore.from_features(rows, [0] * 2000, index="flat")
    assert kinds_of(spread) == kinds_of(dense) == ["int8"]
    assert dense.build_index().first_pass.extra >= spread.build_index().first_pass.extra


def test_few_rows_are_not_worth_a_measurement(measured: list[tuple[int, int]]) -> None:
    few = quickest.FEWEST_ROWS - 1
    store = Datastore.from_features(normal(0, few, 4), [0] * few, index="flat")
    assert kinds_of(store) == ["float32"]
    assert_nearest(store.search(normal(1, 3, 4), 5), store, normal(1, 3, 4), 5)
    assert measured == []


def test_those_that_are_not_here_do_not_contend(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.undo()
    for name in ("has_fast_bfloat16", "has_exact_int8", "has_faiss"):
        monkeypatch.setattr(quickest, name, lambda: False)
    quickest._say_once_that_faiss_is_missing.cache_clear()
    assert list(quickest.contenders()) == ["float32"]
    assert "faiss is not installed" in caplog.text
