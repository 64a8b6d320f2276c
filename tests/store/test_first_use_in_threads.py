"""What is done once is done once, whichever threads, copies and processes ask for it first."""

import copy
import os
import pickle
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forks import in_child
from support.oracles import assert_nearest
from support.tiny import tiny_model, tiny_store

from hf_knn import KnnForImageClassification
from hf_knn.core.lazy import Lock, Once
from hf_knn.core.manifest import FileRecord
from hf_knn.features.encoders import one_torch_thread
from hf_knn.model import explain as explaining
from hf_knn.model import memory as remembering
from hf_knn.store import disk
from hf_knn.store import index as row_index
from hf_knn.store.approximate import FaissApproximate
from hf_knn.store.datastore import Datastore
from hf_knn.store.faiss import has_faiss

THREADS, COUNT, WIDTH = 6, 4000, 16
FAISS = pytest.mark.skipif(not has_faiss(), reason="needs faiss")


def at_once(work: Callable[[int], Any]) -> list[Any]:
    """What several threads get that begin at the same moment; fails as the first that fails."""
    barrier, found, errors = threading.Barrier(THREADS), [None] * THREADS, []

    def run(number: int) -> None:
        barrier.wait()
        try:
            found[number] = work(number)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


def rows() -> torch.Tensor:
    return torch.randn(COUNT, WIDTH, generator=torch.Generator().manual_seed(0))


def counted(patch: pytest.MonkeyPatch, owner: Any, name: str) -> list[int]:
    """Counts the calls of a function, each of which lets the other threads go on meanwhile."""
    work, calls = getattr(owner, name), []

    def call(*args: Any, **options: Any) -> Any:
        calls.append(threading.get_ident())
        time.sleep(0.05)
        return work(*args, **options)

    patch.setattr(owner, name, call)
    return calls


def first_ids(stores: list[Datastore], number: int) -> torch.Tensor:
    return stores[number].search(rows()[number : number + 1], 3).ids


@pytest.mark.parametrize("is_copied", [False, True], ids=["one", "copies"])
@pytest.mark.parametrize("index", ["flat", pytest.param("IVF8,Flat", marks=FAISS)])
def test_first_searches_of_a_mapped_store(
    tmp_path: Path, index: str, is_copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Datastore.from_features(rows(), torch.arange(COUNT) % 9, index=index)
    wanted = store.search(rows()[:THREADS], 3)
    store.save(tmp_path / "s")
    monkeypatch.setattr(disk, "LARGEST_VERIFIED_AT_ONCE", 0)
    for _ in range(5):
        with monkeypatch.context() as patch:
            opened = Datastore.load(tmp_path / "s")
            stores = [copy.copy(opened) if is_copied else opened for _ in range(THREADS)]
            hashed = counted(patch, FileRecord, "compare")
            found = at_once(partial(first_ids, stores))
        assert torch.equal(torch.cat(found), wanted.ids)
        assert len(hashed) == 1


@pytest.mark.parametrize("index", ["flat", pytest.param("IVF8,Flat", marks=FAISS)])
def test_an_index_is_built_once(monkeypatch: pytest.MonkeyPatch, index: str) -> None:
    store = Datastore.from_features(rows(), torch.arange(COUNT) % 9, index=index)
    built = counted(monkeypatch, row_index, "build_searcher")
    found = at_once(lambda i: store.search(rows()[i : i + 1], 1).ids.item())
    assert found == list(range(THREADS))
    assert len(built) == 1


def test_rows_of_a_class_are_gathered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Datastore.from_features(rows(), torch.arange(COUNT) % 9, index="flat")
    gathered = counted(monkeypatch, Datastore, "rows_of")
    built = counted(monkeypatch, row_index, "build_searcher")
    found = at_once(lambda i: store.search(rows()[:40], 5, labels=[3]))
    assert len(gathered) == len(built) == 1
    for hits in found:
        assert (hits.labels == 3).all()
        assert torch.equal(hits.ids, found[0].ids)
    mixed = at_once(lambda i: store.search(rows()[:40], 5, labels=[i]).labels)
    assert all((labels == i).all() for i, labels in enumerate(mixed))


@FAISS
def test_limits_of_faiss_are_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import faiss

    before = (
        faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()
    )  # fmt: skip
    for number in range(THREADS):
        store = Datastore.from_features(rows(), torch.zeros(COUNT).long(), index="HNSW8")
        store.save(tmp_path / str(number))
    stores = [Datastore.load(tmp_path / str(i), trust_faiss_index=True) for i in range(THREADS)]
    counted(monkeypatch, faiss, "read_index")
    for found in at_once(lambda i: stores[i].search(rows()[:20], 1).ids.flatten()):
        assert (found == torch.arange(20)).float().mean() > 0.8
    after = (
        faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()
    )  # fmt: skip
    assert after == before


@FAISS
def test_a_wrapper_is_searched_with_the_lists_that_were_set_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Refine takes no parameters of what is inside, so that they are set for all threads."""
    import faiss

    data = torch.nn.functional.normalize(rows(), dim=1).numpy()
    index = FaissApproximate.from_rows("IVF32,Flat,RFlat", data, is_l2=False)
    wide = index.candidates(data[:THREADS], COUNT // 8)[0]
    set_parameter, inside = faiss.ParameterSpace.set_index_parameter, faiss.extract_index_ivf

    def slowly(space: Any, target: Any, name: str, value: float) -> None:
        set_parameter(space, target, name, value)
        time.sleep(0.02)  # another thread may set another number now
        assert inside(index.index).nprobe == value

    monkeypatch.setattr(faiss.ParameterSpace, "set_index_parameter", slowly)
    counts = [COUNT // 8 if i % 2 else 1 for i in range(THREADS)]
    found = at_once(lambda i: index.candidates(data[i : i + 1], counts[i])[0])
    for number in range(1, THREADS, 2):
        assert (found[number] == wide[number]).all()


def test_threads_of_torch_are_put_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        inside = threading.Barrier(THREADS)

        def work(number: int) -> int:
            with one_torch_thread():
                inside.wait()
                time.sleep(0.01 * number)
                return torch.get_num_threads()

        assert at_once(work) == [1] * THREADS
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def model_with_store() -> KnnForImageClassification:
    model = tiny_model()
    model.datastore = tiny_store(model)
    return model.eval()


def test_rows_are_calibrated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with_store()
    features = torch.randn(2, model.config.feature_dim)
    made = counted(monkeypatch, explaining, "Calibration")

    def typicalities(_: int) -> list[float | None]:
        found = model.explain(features=features)
        assert isinstance(found, list)
        return [explanation.typicality for explanation in found]

    found = at_once(typicalities)
    assert len(made) == 1
    assert all(values == found[0] for values in found)


def test_rows_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with_store()
    counting = counted(monkeypatch, remembering, "_tally")
    found = at_once(lambda _: model.fingerprint_rows())
    assert len(set(found)) == len(counting) == 1


def test_a_count_does_not_take_a_change_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting begins before rows are taught, and ends after that."""
    model = model_with_store()
    features = torch.randn(1, model.config.feature_dim)
    taught = copy.deepcopy(model)
    taught.teach(features=features, labels=["ant"])
    tally = remembering._tally

    def meanwhile(*args: Any) -> Any:
        monkeypatch.setattr(remembering, "_tally", tally)
        model.memory = taught.memory
        return tally(*args)

    monkeypatch.setattr(remembering, "_tally", meanwhile)
    model.fingerprint_rows()
    assert model.datastore is not None
    assert taught.datastore is not None
    assert len(model.datastore) == len(taught.datastore)
    assert len(model.changes) == 1


def test_once_makes_a_value_once_and_again_after_an_error() -> None:
    calls = []

    def make() -> int:
        calls.append(0)
        time.sleep(0.02)
        if len(calls) == 1:
            raise ValueError("not yet")
        return len(calls)

    value = Once(make)
    with pytest.raises(ValueError, match="not yet"):
        value()
    assert at_once(lambda _: value()) == [2] * THREADS
    assert len(calls) == 2


def test_a_lock_is_free_in_a_copy_and_in_a_fork() -> None:
    lock = Lock()

    def is_free(other: Lock) -> bool:
        got = []

        def take() -> None:
            with other:
                got.append(True)

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        thread.join(1.0)
        return bool(got)

    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            done.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(10)
    try:
        assert not is_free(lock)
        assert is_free(copy.deepcopy(lock))
        assert is_free(pickle.loads(pickle.dumps(lock)))

        def use() -> None:
            with lock:
                pass

        assert os.waitpid(in_child(use), 0)[1] == 0
    finally:
        done.set()
        holder.join()


def test_a_store_can_be_searched_in_a_fork_while_its_index_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = Datastore.from_features(rows()[:50], torch.zeros(50).long(), index="flat")
    build, under_way, done = row_index.build_searcher, threading.Event(), threading.Event()

    def slowly(*args: Any) -> Any:
        under_way.set()
        done.wait(30)
        return build(*args)

    monkeypatch.setattr(row_index, "build_searcher", slowly)
    thread = threading.Thread(target=lambda: store.search(rows()[:2], 3))
    thread.start()
    assert under_way.wait(10)
    monkeypatch.setattr(row_index, "build_searcher", build)

    def search() -> None:
        assert_nearest(store.search(rows()[:2], 3), store, rows()[:2], 3)

    try:
        assert os.waitpid(in_child(search), 0)[1] == 0
    finally:
        done.set()
        thread.join()
    assert_nearest(store.search(rows()[:2], 3), store, rows()[:2], 3)
