"""A learned map in Milvus: what is searched is mapped, what is stored stays raw, and back again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import pixels, tiny_model

from hf_knn import Datastore, KnnForImageClassification, MilvusDatastore
from hf_knn.core.manifest import DatastoreError
from hf_knn.milvus import maps

pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")

DIM, WIDTH, ROWS = 12, 4, 90


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


QUERIES = drawn(7, DIM, seed=2)


def mapped_store(metric: str = "cosine", normalization: str = "l2_centered") -> Datastore:
    store = Datastore.from_features(
        drawn(ROWS, DIM) + 1, torch.arange(ROWS) % 4, metric=metric, normalization=normalization,
        index="flat",
    )  # fmt: skip
    store.remap(drawn(WIDTH, DIM, seed=1))
    return store


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("milvus") / "rows.db")


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return f"c{abs(hash(request.node.nodeid))}"


def assert_same(found: Any, wanted: Any, k: int = 7) -> None:
    for mine, theirs in zip(found.search(QUERIES, k), wanted.search(QUERIES, k), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("metric", "normalization"), [("cosine", "l2_centered"), ("l2", "none"), ("cosine", "l2")]
)
def test_the_answers_are_those_of_the_embedded_rows(
    metric: str, normalization: str, uri: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maps, "_VALUES", 7)  # several pieces
    store = mapped_store(metric, normalization)
    inside = MilvusDatastore.from_datastore(store, uri, name, progress=False)
    assert_same(inside, store)
    again = MilvusDatastore.connect(uri, name)
    assert again.learned_map is not None
    assert store.learned_map is not None
    assert torch.equal(again.learned_map.weight, store.learned_map.weight)
    assert_same(again, store)
    for one in (again, store):  # new rows are mapped too
        one.add(drawn(4, DIM, seed=3), [0, 1, 2, 3], [500, 501, 502, 503])
        one.remove([3, 7])
    assert_same(again, store)
    assert_same(MilvusDatastore.connect(uri, name), store)
    home = again.to_datastore()
    assert_same(home, store)
    assert torch.equal(home.features, store.features)  # raw
    assert home.learned_map is not None
    assert home.learned_map.sha256 == store.learned_map.sha256
    assert_same(again.subset(store.ids), store)


def test_the_record_of_mapped_rows_has_the_next_format(uri: str, name: str) -> None:
    store = mapped_store()
    inside = MilvusDatastore.from_datastore(store, uri, name, progress=False)
    row = inside._about.to_row()
    assert store.learned_map is not None
    facts = json.loads(row["facts"])
    assert (facts["format"], facts["learned_map"]) == (2, store.learned_map.sha256)
    store.remap(None)
    plain = MilvusDatastore.from_datastore(store, uri, f"{name}_plain", progress=False)
    facts = json.loads(plain._about.to_row()["facts"])
    assert facts["format"] == 1
    assert not {"learned_map", "map_width"} & facts.keys()
    assert plain.fingerprint != inside.fingerprint


def test_another_map_does_not_go_into_a_collection_that_is_there(uri: str, name: str) -> None:
    store = mapped_store()
    MilvusDatastore.from_datastore(store, uri, name, progress=False)
    store.remap(drawn(WIDTH, DIM, seed=5))
    with pytest.raises(ValueError, match="to be free, but it hold"):
        MilvusDatastore.from_datastore(store, uri, name, progress=False)
    assert_same(MilvusDatastore.connect(uri, name), mapped_store())


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [(0, None, "KeyError"), (1, "A" * 96, "with sha256"), (1, "!", "learned map of its rows")],
)
def test_a_map_that_was_tampered_with_is_refused(
    number: int, change: str | None, message: str, uri: str, name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(maps, "_VALUES", 30)
    inside = MilvusDatastore.from_datastore(mapped_store(), uri, name, progress=False)
    server, place = inside.collection.server, inside.collection.about_name
    key = maps._key(number)
    if change is None:
        server.call("delete", place, ids=[key])
    else:
        row = {"key": key, "facts": "{}", "mean": change, "vector": [0.0, 0.0]}
        server.call("upsert", place, [row])
    with pytest.raises(DatastoreError, match=message):
        MilvusDatastore.connect(uri, name)


def test_a_checkpoint_that_refers_to_mapped_rows(uri: str, name: str, tmp_path: Path) -> None:
    model = tiny_model()
    store = model.datastore
    assert isinstance(store, Datastore)
    store.remap(drawn(WIDTH, store.dim, seed=1))
    model.config.learned_metric = True
    with torch.no_grad():
        wanted = model(pixel_values=pixels(5)).logits
    model.datastore = MilvusDatastore.from_datastore(store, uri, name, progress=False)
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "datastore.json").read_text())
    assert store.learned_map is not None
    assert (values["format_version"], values["learned_map"]) == (2, store.learned_map.sha256)
    opened = KnnForImageClassification.from_pretrained(tmp_path, trust_remote_datastore=True)
    with torch.no_grad():
        assert torch.equal(opened(pixel_values=pixels(5)).logits, wanted)
