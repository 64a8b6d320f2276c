"""`datastore.faiss`: written for users of faiss, parsed by us only for those who trust it."""

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from support.tiny import tiny_model
from torch import Tensor

from hf_knn import KnnForImageClassification
from hf_knn.core.manifest import FAISS_NAME, MANIFEST_NAME, DatastoreError, FileRecord, Manifest
from hf_knn.store import disk as persistence
from hf_knn.store.approximate import FaissApproximate
from hf_knn.store.datastore import Datastore

ROWS, WIDTH = 300, 8
CODES = "IVF4,RaBitQfs,Refine(SQfp16)"
LISTS = ["IVF4,Flat", "IVF4,SQ8", "IVF4,SQfp16", CODES, "IVF4,RaBitQfs"]
KINDS = ["flat", *LISTS, "HNSW8", "HNSW8_SQ8", "SQ8", "PCA4,IVF4,Flat"]


def rows(seed: int = 0, count: int = ROWS) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def make_store(index: str = "HNSW8", seed: int = 0, **options: Any) -> Datastore:
    return Datastore.from_features(rows(seed), [0] * ROWS, index=index, **options)


def saved(folder: Path, index: str, seed: int = 0, **options: Any) -> Datastore:
    store = make_store(index, seed, **options)
    store.save(folder)
    return store


def count_builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The specs that are built from rows, or filled with them, from now on."""
    built: list[str] = []
    for name in ("from_rows", "from_lists"):
        real = getattr(FaissApproximate, name).__func__

        def build(cls: type, spec: str, *values: Any, real: Any = real) -> Any:
            built.append(spec)
            return real(cls, spec, *values)

        monkeypatch.setattr(FaissApproximate, name, classmethod(build))
    return built


def put(folder: Path, index: Any) -> None:
    """Puts another index into the place of the saved one, rightly hashed."""
    faiss.write_index(index, str(folder / FAISS_NAME))
    rehash(folder)


def rehash(folder: Path) -> None:
    manifest = Manifest.read(folder / MANIFEST_NAME)
    object.__setattr__(manifest, "faiss_index", FileRecord.of(folder / FAISS_NAME))
    (folder / MANIFEST_NAME).write_text(manifest.to_json())


@pytest.mark.parametrize("index", KINDS)
def test_a_trusted_index_answers_as_the_one_that_was_saved(
    tmp_path: Path, index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = saved(tmp_path, index)
    built = count_builds(monkeypatch)
    loaded = Datastore.load(tmp_path, trust_faiss_index=True)
    hits, wanted = loaded.search(rows(1), 10), store.search(rows(1), 10)
    assert torch.equal(hits.ids, wanted.ids)
    assert torch.equal(hits.similarities, wanted.similarities)
    assert built == []
    assert loaded.index == store.index


@pytest.mark.parametrize("index", KINDS)
def test_without_trust_no_byte_is_parsed(
    tmp_path: Path, index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, index)
    (tmp_path / FAISS_NAME).write_bytes(b"no index at all")

    def refuse(*_: object) -> None:
        raise AssertionError("it was parsed")

    monkeypatch.setattr(faiss, "read_index", refuse)
    monkeypatch.setattr(faiss, "deserialize_index", refuse)
    hits = Datastore.load(tmp_path).search(rows(1), 10)
    assert len(hits.ids) == ROWS


def test_a_model_passes_the_trust_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    width = model.config.feature_dim
    features = torch.randn(50, width, generator=torch.Generator().manual_seed(0))
    model.datastore = Datastore.from_features(features, [0] * 50, index="HNSW8")
    model.save_pretrained(tmp_path / "model")
    built = count_builds(monkeypatch)
    for trust, wanted in ((True, []), (False, ["HNSW8"])):
        loaded = KnnForImageClassification.from_pretrained(
            tmp_path / "model", trust_faiss_index=trust
        )
        loaded(features=features[:3])
        assert built == wanted


@pytest.mark.parametrize("index", ["flat", "HNSW8"])
@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_a_damaged_file_is_found_before_it_is_parsed(
    tmp_path: Path, index: str, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, index)
    path = tmp_path / FAISS_NAME
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if damage == "flipped" else data[:-1])
    monkeypatch.setattr(faiss, "read_index", lambda *_: pytest.fail("it was parsed"))
    with pytest.raises(DatastoreError, match=FAISS_NAME):
        Datastore.load(tmp_path, trust_faiss_index=True)
    assert len(Datastore.load(tmp_path).search(rows(1), 3).ids) == ROWS


def built(spec: str, count: int = ROWS, width: int = WIDTH, metric: int = 0) -> Any:
    values = np.random.default_rng(0).standard_normal((count, width), dtype=np.float32)
    index = faiss.index_factory(width, spec, metric)
    index.train(values)
    index.add(values)
    return index


def with_ids(index: Any, ids: Any) -> Any:
    wrapped = faiss.IndexIDMap2(index)
    wrapped.add_with_ids(rows().numpy(), np.asarray(ids, np.int64))
    return wrapped


OTHERS: list[tuple[str, str, Callable[[], Any]]] = [
    ("HNSW8", "class", lambda: built("Flat")),
    ("HNSW8", "class", lambda: built("IVF4,Flat")),
    ("HNSW8", "class", lambda: built("HNSW8_SQ8")),
    ("HNSW8", "d", lambda: built("HNSW8", width=9)),
    ("HNSW8", "ntotal", lambda: built("HNSW8", count=299)),
    ("HNSW8", "metric", lambda: built("HNSW8", metric=faiss.METRIC_L2)),
    ("IVF4,Flat", "nlist", lambda: built("IVF8,Flat")),
    ("IVF4,Flat", "class", lambda: built("IVF4,SQ8")),
    ("IVF4,SQfp16", "code_size", lambda: built("IVF4,SQ8")),
    (CODES, "class", lambda: built("IVF4,RaBitQfs")),
    (CODES, "class", lambda: built("IVF4,RaBitQ,Refine(SQfp16)")),
    (CODES, "code_size", lambda: built("IVF4,RaBitQfs,Refine(SQ8)")),
    ("IVF4,Flat", "class", lambda: built("IVF4_HNSW8,Flat")),
    ("SQ8", "code_size", lambda: built("SQ4")),
    ("PCA4,IVF4,Flat", "d", lambda: built("PCA5,IVF4,Flat")),
    ("flat", "class", lambda: built("Flat")),
    ("flat", "ids", lambda: with_ids(faiss.IndexFlatIP(WIDTH), range(1, ROWS + 1))),
    ("flat", "metric", lambda: with_ids(faiss.IndexFlatL2(WIDTH), range(ROWS))),
]


@pytest.mark.parametrize(("index", "fact", "other"), OTHERS)
def test_another_index_is_refused_with_both_facts(
    tmp_path: Path, index: str, fact: str, other: Callable[[], Any]
) -> None:
    saved(tmp_path, index)
    put(tmp_path, other())
    store = Datastore.load(tmp_path, trust_faiss_index=True)
    with pytest.raises(DatastoreError, match=fact):
        store.search(rows(1), 3)


def links_of(index: Any) -> Any:
    return faiss.vector_to_array(index.hnsw.neighbors)


def test_a_graph_that_leaves_the_rows_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "HNSW8")
    for bad in (ROWS, -2):
        index = built("HNSW8")
        links = links_of(index)
        links[0] = bad
        faiss.copy_array_to_vector(links, index.hnsw.neighbors)
        put(tmp_path, index)
        with pytest.raises(DatastoreError, match=FAISS_NAME):
            Datastore.load(tmp_path, trust_faiss_index=True).search(rows(1), 3)


def test_lists_of_other_rows_are_refused_before_they_are_looked_for(tmp_path: Path) -> None:
    saved(tmp_path, CODES)
    for bad in (ROWS, -2, 2**40):
        index = built(CODES)
        lists: Any = faiss.extract_index_ivf(index).invlists
        faiss.rev_swig_ptr(lists.get_ids(1), lists.list_size(1))[0] = bad
        put(tmp_path, index)
        with pytest.raises(DatastoreError, match=r"ids in \[0, 300\)"):
            Datastore.load(tmp_path, trust_faiss_index=True).search(rows(1), 3)


@pytest.mark.parametrize(("name", "value"), [("entry_point", ROWS), ("max_level", 30)])
def test_a_graph_entered_from_outside_is_refused(tmp_path: Path, name: str, value: int) -> None:
    saved(tmp_path, "HNSW8")
    index = built("HNSW8")
    setattr(index.hnsw, name, value)
    put(tmp_path, index)
    with pytest.raises(DatastoreError, match=FAISS_NAME):
        Datastore.load(tmp_path, trust_faiss_index=True).search(rows(1), 3)


def test_huge_declared_sizes_are_refused_before_allocating(tmp_path: Path) -> None:
    saved(tmp_path, "flat")
    path = tmp_path / FAISS_NAME
    data = bytearray(path.read_bytes())
    size = (ROWS * WIDTH).to_bytes(8, "little")
    place = data.index(size)  # how many floats the index holds
    data[place : place + 8] = (2**36).to_bytes(8, "little")
    path.write_bytes(data)
    rehash(tmp_path)
    with pytest.raises(DatastoreError, match=FAISS_NAME):
        Datastore.load(tmp_path, trust_faiss_index=True).search(rows(1), 3)
    assert faiss.get_deserialization_vector_byte_limit() == 2**40  # as it was before


@pytest.mark.parametrize("change", ["add", "remove", "recenter"])
def test_a_change_ends_the_use_of_the_file(
    tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, "HNSW8")
    loaded = Datastore.load(tmp_path, trust_faiss_index=True)
    if change == "add":
        loaded.add(rows(5, 1), [0], [ROWS])
    elif change == "remove":
        loaded.remove([0])
    else:
        loaded.recenter()
    built = count_builds(monkeypatch)
    hits = loaded.search(rows(), 1)
    assert built == ["HNSW8"]
    assert (0 in hits.ids) == (change != "remove")


def test_where_there_is_nothing_to_read_a_message_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(persistence, "LARGEST_FAISS_FILE", 1)
    saved(tmp_path, "flat")
    assert not (tmp_path / FAISS_NAME).exists()
    Datastore.load(tmp_path, trust_faiss_index=True).search(rows(1), 3)
    assert "built from the rows" in caplog.text


def test_a_file_that_an_interrupted_save_took_away_is_built_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = saved(tmp_path, "flat")
    (tmp_path / FAISS_NAME).unlink()
    hits = Datastore.load(tmp_path, trust_faiss_index=True).search(rows(1), 3)
    assert torch.equal(hits.ids, store.search(rows(1), 3).ids)
    assert f"no {FAISS_NAME}" in caplog.text


def test_only_what_is_slow_to_build_is_written_at_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(persistence, "LARGEST_FAISS_FILE", 1)
    for index, written in (("flat", False), ("IVF4,Flat", False), ("HNSW8", True)):
        folder = tmp_path / index.replace(",", "-")
        saved(folder, index)
        assert (folder / FAISS_NAME).exists() == written


def test_users_of_faiss_can_read_what_was_written(tmp_path: Path) -> None:
    store = saved(tmp_path, "HNSW8", normalization="l2")
    index = faiss.read_index(str(tmp_path / FAISS_NAME))
    values = rows().numpy()
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    _, positions = index.search(values, 1)
    assert (positions[:, 0] == np.arange(ROWS)).mean() > 0.95
    assert len(store) == index.ntotal


def test_removed_rows_are_not_in_a_saved_graph(tmp_path: Path) -> None:
    store = make_store("HNSW8", normalization="l2")
    store.search(rows(1), 3)
    vector = rows()[7:8].numpy()
    vector = (vector.astype(np.float16).astype(np.float64)).astype(np.float64)
    vector = (vector / np.sqrt((vector**2).sum())).astype(np.float32)
    store.save(tmp_path / "before")
    assert vector.tobytes() in (tmp_path / "before" / FAISS_NAME).read_bytes()
    store.remove([7])
    store.save(tmp_path / "after")
    assert vector.tobytes() not in (tmp_path / "after" / FAISS_NAME).read_bytes()


def test_a_graph_built_anew_is_measured_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, "HNSW8")
    with caplog.at_level(logging.INFO, "hf_knn"):
        Datastore.load(tmp_path).search(rows(1), 3)
    assert "built in" in caplog.text
    assert re.search(r"recall@20 [\d.]+ on rows, [\d.]+ on perturbed rows, ", caplog.text)
    shutil.rmtree(tmp_path)
