"""Where a search runs changes nothing in its answer."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.first_passes import force
from support.oracles import assert_nearest
from torch import Tensor

from hf_knn.core import search
from hf_knn.core.rows import RowParts
from hf_knn.store import index as indexing
from hf_knn.store import searcher as first_pass
from hf_knn.store import table as row_table
from hf_knn.store.approximate import FaissApproximate
from hf_knn.store.datastore import Datastore

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
PLACES: list[Any] = [
    ("cpu", False),
    ("cpu", True),
    (["cpu", "cpu", "cpu"], False),
    pytest.param("cuda", False, marks=CUDA),
    pytest.param("cuda", True, marks=CUDA),
    pytest.param(["cuda:0", "cuda:0"], True, marks=CUDA),
]


def rows(count: int, seed: int = 0, width: int = 16) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize(("device", "float16"), PLACES)
def test_the_answer_is_the_same_wherever_it_is_searched(
    device: Any, float16: bool, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_pass, "ROW_BLOCK", 100)
    values = torch.cat([rows(450), rows(50), rows(500, 1)])  # 50 of them twice
    store = Datastore.from_features(values, [0] * 1000, metric=metric)
    queries, own = rows(40, 2), np.arange(40)
    wanted = store.search(queries, 30, own)
    moved = copy.deepcopy(store).to(device, float16=float16)
    for _ in range(2):
        found = moved.search(queries, 30, own)
        assert torch.equal(found.ids, wanted.ids)
        assert torch.equal(found.similarities, wanted.similarities)
        assert found.ids.device == queries.device
        moved.add(rows(1, 3), [1], [5000])  # in place, then away again
        assert moved.search(rows(1, 3), 1).ids.item() == 5000
        moved.remove([5000])


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_a_short_cut_for_matrix_products_does_not_change_the_answer(precision: str) -> None:
    store = Datastore.from_features(rows(2000, width=64), [0] * 2000).to(["cpu", "cpu"])
    queries = rows(50, 1, width=64)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert_nearest(store.search(queries, 10), store, queries, 10)
    finally:
        torch.set_float32_matmul_precision(before)


SETTINGS = {
    "fp32_precision = 'tf32'": 2.0**-9,
    "cuda.matmul.fp32_precision = 'tf32'": 2.0**-9,
    "mkldnn.matmul.fp32_precision = 'bf16'": 2.0**-6,
    "mkldnn.fp32_precision = 'bf16'": 2.0**-6,  # which products inherit
    "fp32_precision = 'ieee'": 0.0,
    "cuda.matmul.allow_tf32 = True; torch.backends.mkldnn.matmul.fp32_precision = 'bf16'": 2.0**-6,
}
"""Settings of `torch.backends`, and what each lets a product be off."""

_SEARCH = """
import sys, torch
from support.oracles import assert_nearest
from hf_knn.core import search
from hf_knn.store.datastore import Datastore
data = torch.randn(2050, 64, generator=torch.Generator().manual_seed(0))
for place in ("cpu", ["cpu", "cpu"]):
    store = Datastore.from_features(data[:2000], [0] * 2000).to(place)
    exec("torch.backends." + sys.argv[1])
    assert search.shortcut() == float(sys.argv[2]), search.shortcut()
    assert_nearest(store.search(data[2000:], 10), store, data[2000:], 10)
"""


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_new_settings_of_precision_do_not_change_the_answer(setting: str) -> None:
    """`torch.get_float32_matmul_precision` raises once they are mixed with the old ones."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this torch has the old settings only")
    root = Path(__file__).parents[2]  # in a process of its own: what is set is never quite unset
    done = subprocess.run(
        [sys.executable, "-c", _SEARCH, setting, str(SETTINGS[setting])], cwd=root, text=True,
        env=os.environ | {"PYTHONPATH": f"{root}:{root / 'tests'}"}, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_float16_first_pass_sees_what_float16_cannot_tell_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(first_pass, "ROW_BLOCK", 128)
    near = torch.ones(600, 16) + 1e-3 * rows(600)
    store = Datastore.from_features(torch.cat([near, rows(100, 1)]), [0] * 700, normalization="l2")
    store.to("cpu", float16=True)
    queries = torch.ones(5, 16) + 1e-3 * rows(5, 2)
    assert_nearest(store.search(queries, 20), store, queries, 20)


@pytest.mark.parametrize("device", ["cuda:99", "meta", "nonsense", ["cpu", "meta"], []])
def test_a_device_that_is_not_here_is_refused(device: Any) -> None:
    store = Datastore.from_features(rows(5), [0] * 5)
    with pytest.raises(ValueError, match=r"Expected `device` to be one"):
        store.to(device)
    assert len(store.search(rows(2), 3).ids) == 2


def test_where_a_store_is_searched_is_not_saved(tmp_path: Path) -> None:
    store = Datastore.from_features(rows(50), [0] * 50).to(["cpu", "cpu"])
    store.search(rows(2), 3)
    store.save(tmp_path)
    loaded = Datastore.load(tmp_path)
    loaded.search(rows(2), 3)
    assert not isinstance(loaded.build_index().first_pass, first_pass.PlacedFirstPass)


@CUDA
def test_an_inverted_file_goes_to_the_gpu() -> None:
    pytest.importorskip("faiss", reason="needs faiss")
    store = Datastore.from_features(rows(5000), [0] * 5000, index="IVF16,Flat")
    wanted = store.search(rows(40, 2), 10)
    store.to("cuda")
    found = store.search(rows(40, 2), 10)
    index = store.build_index().first_pass
    assert isinstance(index, FaissApproximate)
    if index.on_gpus is None:
        pytest.skip("this faiss has no GPUs")
    assert (found.ids == wanted.ids).float().mean() > 0.95


# rows in several arrays


@pytest.mark.parametrize("small", [1, 10**6])
def test_rows_in_several_arrays_answer_as_in_one(
    small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_table, "SMALL_SHARD_BYTES", small)
    monkeypatch.setattr(search, "ROW_BLOCK", 64)
    whole = Datastore.from_features(rows(300), range(300))
    parts = Datastore.from_features(rows(300)[:100], range(100))
    parts.mean = whole.mean
    parts.add(rows(300)[100:101], [100])
    parts.add(rows(300)[101:], range(101, 300))
    assert len(parts._table.features.parts) == (3 if small == 1 else 1)
    assert torch.equal(parts.features, whole.features)
    for store in (whole, parts):
        store.remove([5, 100, 250])
        store.relabel([101], [7])
    found, wanted = parts.search(rows(20, 1), 9), whole.search(rows(20, 1), 9)
    assert torch.equal(found.ids, wanted.ids)
    assert torch.equal(found.labels, wanted.labels)
    assert torch.equal(parts.subset([299, 0]).features, whole.subset([299, 0]).features)


def test_slices_over_several_arrays() -> None:
    parts = RowParts([rows(3), rows(0), rows(4, 1)])
    joined = parts.joined().numpy()
    assert parts.shape == joined.shape == (7, 16)
    for start in range(8):
        for stop in range(8):
            assert np.array_equal(parts[start:stop], joined[start:stop])
    order = np.array([6, 0, 3, 2, 2])
    assert np.array_equal(parts[order], joined[order])
    assert parts[0:3].base is not None  # a view: nothing is copied inside one array
    with pytest.raises(ValueError, match="step 1"):
        parts[::2]


def test_adding_one_row_does_not_copy_a_large_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_table, "SMALL_SHARD_BYTES", 100)
    store = Datastore.from_features(rows(500), [0] * 500)
    large = store._table.features.parts[0]
    store.add(rows(1, 1), [0])
    store.remove([500])
    assert store._table.features.parts[0] is large


# approximate indexes that are asked for more than they would look at


@pytest.mark.parametrize("index", ["IVF32,Flat", "PCA8,IVF32,Flat", "IVF32,Flat,RFlat"])
def test_many_neighbours_are_found_without_comparing_every_row(
    index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Datastore.from_features(rows(4000), [0] * 4000, index=index, min_recall=0.05)
    asked = []
    real = search.Searcher._search_chunk

    def watch(self: search.Searcher, *args: Any) -> Any:
        asked.append(args[-1])
        return real(self, *args)

    store.build_index()
    monkeypatch.setattr(search.Searcher, "_search_chunk", watch)
    hits = store.search(rows(20, 1), 500)  # more than the 125 of a list
    assert hits.ids.shape == (20, 500)
    assert not any(asked), "every row was compared"


@pytest.mark.parametrize("index", ["flat", "IVF16,Flat"])
def test_rows_are_normalised_once_for_many_queries_with_many_neighbours(
    index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force("float32", monkeypatch)  # short numbers may leave a query in doubt, which asks again
    generator = torch.Generator().manual_seed(0)
    stored, queries = (torch.randn(n, 128, generator=generator) for n in (2000, 400))
    store = Datastore.from_features(stored, [0] * 2000, index=index, min_recall=0.05)
    store.build_index()
    normalised = []
    real = search.RowSpace.normalize

    def watch(self: search.RowSpace, features: NDArray) -> NDArray:
        normalised.append(len(features))
        return real(self, features)

    monkeypatch.setattr(search.RowSpace, "normalize", watch)
    monkeypatch.setattr(search, "_COMPARE_BYTES", 2**24)
    monkeypatch.setattr(search, "_PAIRS_AT_ONCE", 2**22)
    hits = store.search(queries, 100)
    assert sum(normalised) <= 400 + 2 * 2000  # of two steps
    for row in range(30):
        alone = store.search(queries[row : row + 1], 100)
        assert torch.equal(alone.ids[0], hits.ids[row])
        assert torch.equal(alone.similarities[0], hits.similarities[row])


# leave-one-out in chunks


def test_leave_one_out_shows_progress_if_asked(capsys: pytest.CaptureFixture[str]) -> None:
    store = Datastore.from_features(rows(50), [0] * 50)
    quiet = list(store.leave_one_out(3, 20))
    assert capsys.readouterr().err == ""
    shown = list(store.leave_one_out(3, 20, progress=True))
    assert "50/50" in capsys.readouterr().err
    # no last chunk of a few rows
    assert [len(chunk.ids) for chunk in quiet] == [16, 17, 17]
    assert [len(chunk.ids) for chunk in shown] == [16, 17, 17]


def test_leave_one_out_speaks_of_the_rows_that_it_began_with() -> None:
    store = Datastore.from_features(rows(60), [0] * 60)
    wanted = [chunk.ids for chunk in copy.deepcopy(store).leave_one_out(3, 20)]
    chunks = store.leave_one_out(3, 20)
    first = next(chunks)
    store.add(rows(60), [1] * 60)
    assert torch.equal(first.ids, wanted[0])
    assert sum(len(chunk.ids) for chunk in chunks) == 40


@pytest.mark.parametrize("spec", ["HNSW1000000", "IVF4,PQ99999", "PCA5000,Flat"])
def test_huge_numbers_in_a_factory_string_are_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="numbers up to"):
        indexing.choose_index(spec, 100, 16, None)
