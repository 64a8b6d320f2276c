"""What index a file of somebody else may ask for: one that is built unasked, or an exact search."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.stored import read_manifest, write_manifest
from torch import Tensor

from hf_knn.core.manifest import DatastoreError
from hf_knn.store.datastore import Datastore
from hf_knn.store.kinds import is_modest

ROWS, WIDTH = 300, 16

HOSTILE = [
    "OPQ16_64,IVF100,PQ16", "OPQ8,Flat", "RQ8x16", "IVF4,RQ64x12", "NSG64", "NSG4000,Flat",
    "IMI2x14,Flat", "IVF4,LSQ8x8", "LSQ8x8", "PLSQ2x4x8", "PRQ2x4x8", "ITQ,LSHt", "PQ16x24",
    "PQ16x16", "IDMap," * 3000 + "Flat", "IDMap2,Flat", "RCQ4x8,Flat", "HNSW4096", "HNSW65",
    "HNSW1", "HNSW0", "HNSW32_PQ8", "IVF4_HNSW2000,Flat", "IVF4(IVF4(IVF4)),Flat", "IVF5000,Flat",
    "Flat", "RaBitQ", "ZnLattice3x10_6", "PCA4,IVF4,Flat", "IVF0,Flat", "IVF٣,Flat", "IVF-4,Flat",
    "IVF4,RaBitQfs2", "IVF4,RaBitQfs,Refine(SQ8)", "IVF4,RaBitQfs9,Refine(SQfp16)", "SQfp16",
    "IVF4,RaBitQfs,Refine(SQfp16),Refine(SQfp16)", "HNSW65_SQfp16", "IVF4,SQfp160",
    "SQ8", "IVF4,Flat\n", " IVF4,Flat", "ivf4,flat", "AUTO", "", "\x00",
    "IVF" + "9" * 4000 + ",Flat",
]  # fmt: skip


def rows(seed: int, count: int = ROWS) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def make(index: str = "flat") -> Datastore:
    return Datastore.from_features(rows(0), [0] * ROWS, index=index)


def rename(folder: Path, **index: Any) -> None:
    """Signs a manifest that says something else about its index."""
    values = read_manifest(folder)
    write_manifest(folder, values | {"index": values["index"] | index})


def change_nothing(store: Datastore) -> Datastore:
    return store


def change_by_adding(store: Datastore) -> Datastore:
    store.search(rows(1, 2), 3)
    store.add(rows(2, 200), [0] * 200)
    return store


def change_by_removing(store: Datastore) -> Datastore:
    store.search(rows(1, 2), 3)
    store.remove(store.ids[:200])
    return store


def change_by_recentring(store: Datastore) -> Datastore:
    store.recenter()
    return store


def change_by_choosing(store: Datastore) -> Datastore:
    return store.subset(store.ids[:250])


CHANGES = [
    change_nothing, change_by_adding, change_by_removing, change_by_recentring, change_by_choosing,
]  # fmt: skip


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name[:24]))
@pytest.mark.parametrize("place", ["spec", "requested", "both"])
def test_an_index_that_nobody_asked_for_is_not_built(
    tmp_path: Path, name: str, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    make().save(tmp_path)
    rename(tmp_path, **{key: name for key in ("spec", "requested") if place in (key, "both")})
    for change in CHANGES:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            store = change(Datastore.load(tmp_path))
        assert "trust_faiss_index=True" in caplog.text
        twin = Datastore(store.features, store.labels, store.ids, store.mean)
        found, wanted = store.search(rows(1, 5), 7), twin.search(rows(1, 5), 7)
        assert torch.equal(found.ids, wanted.ids)
        assert (store.index.spec, store.index.requested) == ("flat", "flat")
    store.save(tmp_path / "again")
    assert read_manifest(tmp_path / "again")["index"]["requested"] == "flat"


CODES = "RaBitQfs,Refine(SQfp16)"
OURS = [
    "auto", "auto:latency", "flat", "IVF4,Flat", "IVF4,SQ8", "IVF4,SQfp16", "IVF4,RaBitQfs",
    f"IVF4,{CODES}",
]  # fmt: skip


@pytest.mark.parametrize("index", [*OURS, "HNSW8", "HNSW32,Flat", "HNSW16_SQfp16"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_we_build_ourselves_is_built_again(
    tmp_path: Path,
    index: str,
    change: Callable[[Datastore], Datastore],
    caplog: pytest.LogCaptureFixture,
) -> None:
    make(index).save(tmp_path)
    store = change(Datastore.load(tmp_path))
    store.search(rows(1, 5), 7)
    assert store.index.spec == ("flat" if index.startswith("auto") else index)
    assert "trust_faiss_index" not in caplog.text


@pytest.mark.parametrize("index", ["PCA8,IVF4,Flat", "OPQ4,IVF4,PQ4x4", "SQ8"])
def test_whoever_says_that_it_is_theirs_gets_their_index(tmp_path: Path, index: str) -> None:
    mine = make(index)
    mine.save(tmp_path)
    assert Datastore.load(tmp_path).index.spec == "flat"
    store = Datastore.load(tmp_path, trust_faiss_index=True)
    assert torch.equal(store.search(rows(1, 5), 7).ids, mine.search(rows(1, 5), 7).ids)
    assert store.index.spec == index


BAD_PARAMETERS: list[tuple[str, dict[str, Any]]] = [
    ("flat", {"nprobe": 1}), ("flat", {"ksub": 2**30}), ("IVF4,Flat", {"nprobe": 0}),
    ("IVF4,Flat", {"nprobe": 5}), ("IVF4,Flat", {"nprobe": 2**47}),
    ("IVF4,Flat", {"efSearch": 16}),
    ("IVF4,Flat", {"nprobe": 2, "verbose": 1}), ("HNSW8", {"nprobe": 1}),
    ("HNSW8", {"efSearch": 0}), ("IVF4,SQfp16", {"k_factor": 2}),
    (f"IVF4,{CODES}", {"k_factor": 0}), (f"IVF4,{CODES}", {"k_factor": 65}),
    (f"IVF4,{CODES}", {"nprobe": 5}),
    ("HNSW8", {"efSearch": 4097}), ("HNSW8", {"quantizer_nprobe": 2}), ("HNSW8", {"": 1}),
    ("IVF4,Flat", {"nprobe": True}), ("IVF4,Flat", {"nprobe": 2.0}), ("IVF4,Flat", {"nprobe": "2"}),
    ("IVF4,Flat", {"nprobe": float("nan")}), ("IVF4,Flat", {"nprobe": -1}),
    ("IVF4,Flat", {"nprobe": None}),
]  # fmt: skip


@pytest.mark.parametrize(("index", "parameters"), BAD_PARAMETERS)
def test_parameters_are_those_of_the_index_and_in_range(
    tmp_path: Path, index: str, parameters: dict[str, Any]
) -> None:
    make(index).save(tmp_path)
    rename(tmp_path, parameters=parameters)
    with pytest.raises(DatastoreError, match=r"`index\.parameters.*datastore\.json"):
        Datastore.load(tmp_path)


def test_lists_are_as_many_as_rows_are_worth() -> None:
    assert is_modest("IVF1024,Flat", 10)
    assert not is_modest("IVF1025,Flat", 10)
    assert is_modest("IVF16000,SQ8", 10**6)
    assert not is_modest("IVF16001,SQ8", 10**6)
    assert is_modest(f"IVF16000,{CODES}", 10**6)
    assert not is_modest(f"IVF16001,{CODES}", 10**6)
    assert is_modest("HNSW64", 10)
    assert is_modest("HNSW", 10)
    assert is_modest("auto", 0)
