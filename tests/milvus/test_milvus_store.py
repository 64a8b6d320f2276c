"""A datastore in Milvus Lite answers as the embedded one does, and fails loudly."""

import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.milvus_servers import free_port
from support.oracles import assert_nearest
from torch import Tensor

from hf_knn import Datastore, MilvusDatastore
from hf_knn.core.manifest import DatastoreError
from hf_knn.milvus import search as milvus_search
from hf_knn.milvus.collection import MilvusCollection
from hf_knn.milvus.load import describe
from hf_knn.milvus.server import DatastoreConnectionError, MilvusServer
from hf_knn.store.backend import SearchBackend, as_row_store
from hf_knn.store.remote import (
    DatastoreReference,
    RemoteConsent,
    check_uri,
    open_remote,
    read_manifest,
)
from hf_knn.store.table import sum_of

pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")

ROWS, DIM, CLASSES = 120, 6, 4
KINDS = [("cosine", "l2_centered"), ("cosine", "l2"), ("l2", "none"), ("l2", "l2_centered")]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A server of this process."""
    return str(tmp_path_factory.mktemp("milvus") / "rows.db")


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A collection of this test's own."""
    return f"c{abs(hash(request.node.nodeid))}"


def rows_of(count: int = ROWS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Coarse rows, so that many are equal or equally near."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randint(-2, 3, (count, DIM), generator=generator).float()
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    ids = torch.randperm(10 * count, generator=generator)[:count] + seed * 10_000
    return features, labels, ids


def embedded(metric: str = "cosine", normalization: str = "l2_centered") -> Datastore:
    features, labels, ids = rows_of()
    store = Datastore.from_features(
        features, labels, ids, metric=metric, normalization=normalization, index="flat",
        paths=[f"train/é {i}.png" for i in range(ROWS)],
    )  # fmt: skip
    store.source = {"dataset": "toys", "split": "train"}
    return store


def load(store: Datastore, uri: str, name: str, **options: Any) -> MilvusDatastore:
    return MilvusDatastore.from_datastore(store, uri, name, progress=False, **options)


@pytest.fixture
def pair(uri: str, name: str) -> tuple[Datastore, MilvusDatastore]:
    """The same rows, embedded and in Milvus."""
    store = embedded()
    return store, load(store, uri, name)


def queries(count: int = 9) -> Tensor:
    features, _, _ = rows_of()
    noise = torch.randn(count - 4, DIM, generator=torch.Generator().manual_seed(7))
    return torch.cat([features[:3], torch.zeros(1, DIM), noise])


def assert_same(found: SearchBackend, wanted: SearchBackend, k: int, **options: Any) -> None:
    """Bit-equal answers."""
    for mine, theirs in zip(
        found.search(queries(), k, **options), wanted.search(queries(), k, **options), strict=True
    ):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("metric", "normalization"), KINDS)
def test_the_neighbours_are_those_of_brute_force(metric, normalization, uri, name):
    store = embedded(metric, normalization)
    inside = load(store, uri, name)
    for k in (1, 7, ROWS, 10 * ROWS):
        assert_same(inside, store, k)
        assert_nearest(inside.search(queries(), k), store, queries(), k)
    own = store.ids[:9].clone()
    own[4] = -1
    assert_same(inside, store, 5, exclude_ids=own)
    assert_same(inside, store, ROWS, exclude_ids=own)


def test_ties_beyond_what_milvus_proposes_are_in_order(uri, name):
    """500 equal rows: Milvus returns some of them, and the answer is those with smallest ids."""
    features = torch.ones(500, DIM)
    ids = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    store = Datastore.from_features(features, torch.zeros(500).long(), ids, normalization="l2")
    inside = load(store, uri, name)
    hits = inside.search(torch.ones(2, DIM), 20)
    assert hits.ids.tolist() == [list(range(20))] * 2


def test_all_rows_are_read_where_milvus_cannot_return_enough(pair, monkeypatch, caplog):
    store, inside = pair
    monkeypatch.setattr(milvus_search, "LARGEST_ANSWER", 10)
    assert_same(inside, store, 20, exclude_ids=store.ids[:9])
    assert "all rows are read" in caplog.text


OTHERS = [pytest.param(k, marks=pytest.mark.slow) for k in ("ivf_sq8", "hnsw", "autoindex")]


@pytest.mark.parametrize("index", ["ivf_flat", "hnsw_sq", *OTHERS])
def test_an_approximate_index_has_the_recall_that_it_states(index, uri, name):
    """The oracle is an exact search of the embedded rows, on other queries than were measured."""
    centers = 4 * torch.randn(20, DIM, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(2000, DIM, generator=torch.Generator().manual_seed(2))
    rows = centers.repeat(100, 1) + noise
    store = Datastore.from_features(rows[:1900], torch.arange(1900) % 20, index="flat")
    inside = load(store, uri, name, index=index, min_recall=0.9)
    found, exact = inside.search(rows[1900:], 20), store.search(rows[1900:], 20)
    hits = (found.ids[:, :, None] == exact.ids[:, None, :]).any(2).double().mean()
    recalls = inside.index.recalls
    assert min(recalls["rows"], recalls["perturbed rows"]) >= 0.9
    assert float(hits) == pytest.approx(recalls["rows"], abs=0.08)
    assert inside.index.recall == min(recalls.values())
    assert inside.index.spec == index
    assert (inside.index.parameters == {}) == (index == "autoindex")
    again = MilvusDatastore.connect(uri, name)
    assert again.index == inside.index
    only = again.search(rows[1900:], 20, labels=[3])
    assert set(only.labels.unique().tolist()) == {3}
    assert only.ids.shape == (100, 20)
    assert len(again.search(rows[:2], 1900).ids.unique()) == 1900
    with pytest.raises(ValueError, match="was made for"):
        load(store, uri, name, index="flat")


@pytest.mark.slow
def test_a_recall_that_is_not_reached_leaves_no_whole_collection(uri, name, monkeypatch):
    monkeypatch.setattr("hf_knn.store.recall.recall_of", lambda found, wanted: 0.5)
    with pytest.raises(ValueError, match=r"it reached 0\.5000"):
        load(embedded(), uri, name, index="ivf_flat")
    with pytest.raises(DatastoreError, match="load was interrupted"):
        MilvusDatastore.connect(uri, name)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [({"index": "annoy"}, "'ivf_flat'"), ({"index": "hnsw", "min_recall": 1.5}, "min_recall")],
)
def test_bad_indexes(options, wanted, uri, name):
    with pytest.raises(ValueError, match=wanted):
        load(embedded(), uri, name, **options)


def test_filters(pair):
    store, inside = pair
    for labels in ([1], [0, 3], [99], torch.tensor([2, 2])):
        assert_same(inside, store, 8, labels=labels)
        assert_same(inside, store, ROWS, labels=labels, exclude_ids=store.ids[:9])
    assert_same(inside, store, 8, split="train")
    with pytest.raises(ValueError, match=r"no row of .* is of 'test'"):
        inside.search(queries(), 3, split="test")
    features, labels, ids = rows_of(30, seed=1)
    inside.add(features, labels, ids, split='te"st\\')
    assert_same(inside, store, 8, split="train")
    other = inside.to_datastore(split='te"st\\')
    assert sorted(other.ids.tolist()) == sorted(ids.tolist())
    hits = inside.search(queries(), 8, split='te"st\\')
    assert_nearest(hits, other, queries(), 8)


def test_changes_are_those_of_the_embedded_one(pair):
    store, inside = pair
    features, labels, ids = rows_of(20, seed=1)
    first = store.ids[:15].clone()
    for one in (store, inside):
        one.add(features, labels, ids, [f"new/{i}" for i in range(20)])
        one.remove(first)
        one.relabel(ids[:5], [3, 2, 1, 0, 3])
    assert len(inside) == len(store) == ROWS + 5
    assert_same(inside, store, 12)
    assert_same(inside, store, ROWS, labels=[3])
    order = store.ids.argsort()
    assert torch.equal(inside.ids, store.ids[order])
    assert torch.equal(inside.labels, store.labels[order])
    assert torch.equal(inside.features, store.features[order])
    assert inside.paths == [store.paths[i] for i in order]
    assert inside.path_of(int(ids[3])) == "new/3"
    inside.verify()
    again = MilvusDatastore.connect(inside.collection.server.uri, inside.collection.name)
    assert again.fingerprint == inside.fingerprint
    assert_same(again, store, 12)


def test_changes_that_cannot_be_are_refused_whole(pair):
    store, inside = pair
    before = inside.fingerprint
    features, labels, ids = rows_of(5, seed=1)
    taken = int(store.ids[0])
    with pytest.raises(ValueError, match=rf"does not have, but it has \[{taken}\]"):
        inside.add(features, labels, torch.cat([ids[:4], store.ids[:1]]))
    with pytest.raises(ValueError, match=r"does not have \[777777\]"):
        inside.remove([taken, 777777])
    with pytest.raises(ValueError, match="some are doubled"):
        inside.remove([taken, taken])
    with pytest.raises(ValueError, match="one of `labels` per id"):
        inside.relabel([taken], [1, 2])
    with pytest.raises(ValueError, match="that float16 can hold"):
        inside.add(features * 1e6, labels, ids)
    with pytest.raises(ValueError, match=r"that float16 can hold.*a row that the cast turns"):
        inside.add(inside.mean + 1e-5 * features, labels, ids)
    with pytest.raises(ValueError, match="finite"):
        inside.add(features * torch.inf, labels, ids)
    with pytest.raises(ValueError, match="that of row 0 is not"):
        inside.add(features[:1], labels[:1], ids[:1], ["bad-\udce9.png"])
    again = MilvusDatastore.connect(inside.collection.server.uri, inside.collection.name)
    assert again.fingerprint == before
    again.verify()


def test_new_ids_are_ones_that_no_row_ever_had(pair):
    store, inside = pair
    largest = int(store.ids.max())
    features, labels, _ = rows_of(3, seed=1)
    assert inside.add(features, labels).tolist() == [largest + 1, largest + 2, largest + 3]
    inside.remove([largest + 3])
    assert inside.add(features[:1], labels[:1]).tolist() == [largest + 4]


def test_where_no_larger_ids_are_left(uri, name):
    features, labels, ids = rows_of(4, seed=1)
    largest = torch.iinfo(torch.int64).max
    inside = load(Datastore.from_features(features, labels, ids), uri, name)
    inside.add(features[:1], labels[:1], [largest])
    inside.remove([largest])
    with pytest.raises(ValueError, match="no larger ones are left"):
        inside.add(features[:1], labels[:1])
    assert inside.add(features[:1], labels[:1], [3]).tolist() == [3]


def test_rows_too_long_for_the_scale_are_refused(uri, name):
    inside = load(embedded("l2", "none"), uri, name)
    with pytest.raises(ValueError, match="no longer than"):
        inside.add(torch.full((1, DIM), 1e3), [0])


def test_back_to_embedded(pair):
    store, inside = pair
    back = inside.to_datastore()
    order = store.ids.argsort()
    for attribute in ("features", "labels", "ids"):
        assert torch.equal(getattr(back, attribute), getattr(store, attribute)[order])
    assert torch.equal(back.mean, store.mean)
    assert back.paths == [store.paths[i] for i in order]
    assert back.source == store.source
    assert_same(back, store, 9)


def test_leave_one_out(pair):
    store, inside = pair
    mine = torch.cat([hits.ids for hits in inside.leave_one_out(5, 50)])
    theirs = torch.cat([hits.ids for hits in store.leave_one_out(5)])
    assert torch.equal(mine, theirs[store.ids.argsort()])


def test_an_empty_datastore(uri, name):
    store = Datastore.from_features(torch.empty(0, DIM), [])
    inside = load(store, uri, name)
    assert len(inside) == 0
    assert inside.search(queries(), 3).ids.shape == (9, 0)
    features, labels, ids = rows_of(4, seed=1)
    inside.add(features, labels, ids)
    assert inside.search(queries(), 3).ids.shape == (9, 3)


@pytest.mark.parametrize(("k", "wanted"), [(0, "whole number >= 1"), (True, "whole number >= 1")])
def test_bad_searches(pair, k, wanted):
    with pytest.raises(ValueError, match=wanted):
        pair[1].search(queries(), k)
    with pytest.raises(ValueError, match="width 6"):
        pair[1].search(torch.zeros(1, DIM + 1))


# ---- loads that were interrupted ----------------------------------------------------------------


class Stopped(Exception):
    """In the middle of a load."""


def stop_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Lets so many writes of rows through."""
    upsert, done = MilvusCollection.upsert, iter(range(calls))

    def limited(self: MilvusCollection, rows: list[dict[str, Any]]) -> None:
        if next(done, None) is None:
            raise Stopped
        upsert(self, rows)

    monkeypatch.setattr(MilvusCollection, "upsert", limited)


@pytest.mark.parametrize("calls", [0, 1, 5])
def test_a_load_goes_on_where_it_was_stopped(calls, uri, name, monkeypatch):
    store = embedded()
    with monkeypatch.context() as patch:
        stop_after(patch, calls)
        with pytest.raises(Stopped):
            load(store, uri, name, batch_size=20)
    with pytest.raises(DatastoreError, match=r"load was interrupted; call .*from_datastore again"):
        MilvusDatastore.connect(uri, name)
    written: list[int] = []
    upsert = MilvusCollection.upsert

    def counting(self: MilvusCollection, rows: list[dict[str, Any]]) -> None:
        written.append(len(rows))
        upsert(self, rows)

    monkeypatch.setattr(MilvusCollection, "upsert", counting)
    inside = load(store, uri, name, batch_size=20)
    assert sum(written) == ROWS - 20 * calls
    assert inside.collection.count() == ROWS
    assert_same(inside, store, 7)
    written.clear()
    assert load(store, uri, name).fingerprint == inside.fingerprint
    assert written == []


def test_other_rows_are_not_mixed_in(pair, uri, name):
    store, inside = pair
    other = embedded()
    other.relabel(other.ids[:1], [3 - int(other.labels[0])])
    with pytest.raises(ValueError, match=f"hold {ROWS} rows, fingerprint .* take another name"):
        load(other, uri, name)
    assert_same(inside, store, 5)


def test_rows_that_were_changed_on_the_way_are_found(uri, name, monkeypatch):
    store, upsert = embedded(), MilvusCollection.upsert

    def lossy(self: MilvusCollection, rows: list[dict[str, Any]]) -> None:
        upsert(self, [row | {"label": 1} for row in rows])

    monkeypatch.setattr(MilvusCollection, "upsert", lossy)
    with pytest.raises(DatastoreError, match=f"{ROWS} rows, fingerprint .*, but it holds {ROWS}, "):
        load(store, uri, name)
    with pytest.raises(DatastoreError, match="load was interrupted"):
        MilvusDatastore.connect(uri, name)


def test_a_change_that_was_interrupted_is_marked(pair, uri, name, monkeypatch):
    store, inside = pair
    features, labels, ids = rows_of(5, seed=1)
    with monkeypatch.context() as patch:
        stop_after(patch, 0)
        with pytest.raises(Stopped):
            inside.add(features, labels, ids)
    with pytest.raises(DatastoreError, match="a change of it was interrupted"):
        MilvusDatastore.connect(uri, name)
    with pytest.raises(DatastoreError, match="a change of it was interrupted"):
        load(store, uri, name)
    with pytest.raises(DatastoreError, match="somebody else changed it"):
        inside.remove(store.ids[:1])
    recovered = MilvusDatastore.connect(uri, name, recover=True)
    assert_same(recovered, store, 5)
    assert recovered.fingerprint == describe(store).fingerprint


def test_two_writers_are_noticed(pair, uri, name):
    store, inside = pair
    other = MilvusDatastore.connect(uri, name)
    other.remove(store.ids[:1])
    with pytest.raises(DatastoreError, match=rf"\({ROWS} rows\), but it is whole, {ROWS - 1} rows"):
        inside.remove(store.ids[1:2])
    inside.collection.delete(store.ids[1:2].tolist())  # by somebody who does not know the record
    with pytest.raises(DatastoreError, match=f"hold {ROWS - 1} rows, but it holds {ROWS - 2}"):
        MilvusDatastore.connect(uri, name)
    with pytest.raises(DatastoreError, match="has fewer now"):
        other.search(queries(), ROWS)
    with pytest.raises(DatastoreError, match=f"hold {ROWS - 1} rows.*, but it holds {ROWS - 2}"):
        other.verify()


def test_the_fingerprint_follows_each_row_and_no_order():
    store = embedded()
    rows = store.rows(slice(0, ROWS))
    order = np.random.default_rng(0).permutation(ROWS)
    mixed = store.subset(store.ids[torch.from_numpy(order)]).rows(slice(0, ROWS))
    assert sum_of(mixed) == sum_of(rows)
    for name, value in {"labels": 9, "ids": 123_456}.items():
        changed = getattr(rows, name).copy()
        changed[3] = value
        assert sum_of(rows._replace(**{name: changed})) != sum_of(rows)
    features = rows.features.copy()
    features[3, 0] += 1
    assert sum_of(rows._replace(features=features)) != sum_of(rows)
    parts = [sum_of(store.rows(slice(0, 50))), sum_of(store.rows(slice(50, ROWS)))]
    assert sum(parts) % 2**256 == sum_of(rows)


# ---- servers ------------------------------------------------------------------------------------


def test_nobody_there():
    place = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(DatastoreConnectionError, match=f"Expected Milvus at {place} to answer"):
        MilvusDatastore.connect(place, "rows", timeout=1, patience=0.5)


def test_a_server_that_never_answers():
    """It takes connections and says nothing: the timeout ends it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        place = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(DatastoreConnectionError, match="to answer `connect`"):
            MilvusServer(place, timeout=0.3, patience=0.2)


def test_an_error_that_can_pass_is_tried_again(pair, monkeypatch):
    """The client fails twice as it does when the server restarts, and then works."""
    from pymilvus.exceptions import MilvusException

    inside = pair[1]
    server, failures = inside.collection.server, iter(range(2))
    query = server.client.query

    def shaky(*args: Any, **options: Any) -> Any:
        if next(failures, None) is not None:
            raise MilvusException(2, "Fail connecting to server")
        return query(*args, **options)

    monkeypatch.setattr(server.client, "query", shaky)
    monkeypatch.setattr("hf_knn.milvus.server._FIRST_WAIT", 0.01)
    assert inside.collection.count() == ROWS
    assert next(failures, None) is None


def test_a_server_that_forgot_what_it_had_loaded(pair):
    """As Milvus Lite does when it is restarted."""
    store, inside = pair
    for _ in range(2):
        inside.collection.server.call("release_collection", inside.collection.name)
        assert_same(inside, store, 6)
    inside.collection.server.call("release_collection", inside.collection.name)
    inside.remove(store.ids[:2])
    assert len(inside.ids) == ROWS - 2


def test_an_error_that_stays_is_not_tried_again(pair):
    inside = pair[1]
    with pytest.raises(DatastoreConnectionError, match="refused `query`"):
        inside.collection.count("nonsense ===")


@pytest.mark.parametrize(
    ("uri", "wanted"),
    [
        ("ftp://host/x", "to be like http"),
        ("rows.sqlite", "to be like http"),
        ("https://me:secret@host:19530", "without user, password"),
        ("https://host:19530?token=abc", "without user, password"),
        ("file:///etc/x.db", "to be like http"),
        ("", "to be like http"),
    ],
)
def test_bad_addresses(uri, wanted):
    with pytest.raises(ValueError, match=wanted):
        check_uri(uri)


def test_without_pymilvus(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pymilvus", None)
    with pytest.raises(ImportError, match=r"pip install .*\[milvus\]"):
        MilvusDatastore.connect("http://127.0.0.1:1", "rows")


def test_bad_names(uri):
    with pytest.raises(ValueError, match="letters, digits and underscores"):
        MilvusDatastore.connect(uri, "a-b")
    with pytest.raises(DatastoreError, match="there is none"):
        MilvusDatastore.connect(uri, "nothing_here")


# ---- references ---------------------------------------------------------------------------------


def test_a_folder_holds_a_reference_only(pair, folder):
    store, inside = pair
    store.save(folder)
    inside.save(folder)
    assert [path.name for path in folder.iterdir()] == ["datastore.json"]
    text = (folder / "datastore.json").read_text()
    assert json.loads(text)["num_rows"] == ROWS
    assert read_manifest(folder / "datastore.json") == inside.reference()
    with pytest.raises(DatastoreError, match="refers to a vector database"):
        Datastore.load(folder)
    with pytest.raises(ValueError, match="Expected consent to ask a server"):
        MilvusDatastore.open(folder)
    assert_same(MilvusDatastore.open(folder, trust_remote_datastore=True), store, 5)
    store.save(folder)
    with pytest.raises(DatastoreError, match="holds the rows itself"):
        MilvusDatastore.open(folder)


def test_the_registry_opens_it_with_consent(pair):
    inside = pair[1]
    reference = inside.reference()
    assert isinstance(open_remote(reference, RemoteConsent(trusted=True)), MilvusDatastore)
    assert len(open_remote(reference, RemoteConsent(uri=reference.uri))) == ROWS
    with pytest.raises(ValueError, match="Expected consent to ask a server"):
        open_remote(reference, RemoteConsent())
    with pytest.raises(ValueError, match="Expected `consent` alone"):
        MilvusDatastore.open(reference, RemoteConsent(trusted=True), uri=reference.uri)
    assert as_row_store(inside) is inside
    with pytest.raises(ValueError, match=r"mean of the rows in the collection .* to stay"):
        inside.recenter()


def test_a_reference_to_rows_that_changed(pair, folder):
    store, inside = pair
    inside.save(folder)
    inside.relabel(store.ids[:1], [3 - int(store.labels[0])])
    with pytest.raises(DatastoreError, match=f"{ROWS} rows, fingerprint .*changed since"):
        MilvusDatastore.open(folder, trust_remote_datastore=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("uri", "http://me:secret@host"), ("uri", "ftp://host"), ("uri", 3),
        ("collection", "a b"), ("num_rows", -1), ("fingerprint", "x"), ("backend", "redis"),
        ("dim", "3"), ("metric", "dot"), ("format_version", 2), ("binding", []),
    ],
)  # fmt: skip
def test_lies_in_a_reference_are_refused(field, value, pair, folder):
    from hf_knn.core.manifest import _checksum

    pair[1].save(folder)
    values = json.loads((folder / "datastore.json").read_text()) | {field: value}
    with pytest.raises(DatastoreError, match=r"checksum|version"):
        DatastoreReference.parse(values)
    values["checksum"] = _checksum({k: v for k, v in values.items() if k != "checksum"})
    with pytest.raises(DatastoreError, match=r"datastore\.json"):
        DatastoreReference.parse(values)


def test_the_token_of_the_environment_goes_where_the_user_said(pair, monkeypatch):
    reference = pair[1].reference()
    monkeypatch.setenv("MILVUS_TOKEN", "secret")
    assert RemoteConsent(trusted=True).place_of(reference) == (reference.uri, "")
    assert RemoteConsent(True, None, "own").place_of(reference) == (reference.uri, "own")
    assert RemoteConsent(uri="http://mine").place_of(reference) == ("http://mine", "secret")
    monkeypatch.setenv("HF_KNN_MILVUS_URI", "http://other:1")
    assert RemoteConsent().place_of(reference) == ("http://other:1", "secret")


def test_a_local_file_in_a_missing_folder(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="make it first"):
        load(embedded(), str(tmp_path / "no" / "rows.db"), "rows")


def test_opening_makes_no_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        MilvusDatastore.connect(str(tmp_path / "rows.db"), "rows")
    assert list(tmp_path.iterdir()) == []
