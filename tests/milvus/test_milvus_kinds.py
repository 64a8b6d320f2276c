"""The indexes and vector types of Milvus: what Lite has is run, what a server has is asked for.

A server is played by Milvus Lite that says another version. It gets the fields and indexes that it
has in place of those it was asked for, and float16 vectors as the float32 numbers that they are,
which is how Milvus compares them; what was asked for is written down.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.oracles import assert_nearest
from torch import Tensor

from hf_knn import Datastore, MilvusDatastore
from hf_knn.core.manifest import DatastoreError
from hf_knn.milvus import kinds
from hf_knn.milvus.about import About
from hf_knn.milvus.collection import MilvusCollection
from hf_knn.milvus.kinds import MilvusIndex
from hf_knn.milvus.load import describe
from hf_knn.milvus.search import _lost
from hf_knn.milvus.server import DatastoreRefusalError, MilvusServer

pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")

ROWS, DIM = 400, 8
LITE_HAS = ["flat", "ivf_flat", "ivf_sq8", "hnsw", "hnsw_sq", "autoindex"]
SERVER_ONLY = {"scann": "2.3", "ivf_rabitq": "2.6", "ivf_rabitq_fastscan": "3.0"}


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "rows.db")


def coarse_rows(count: int = ROWS, seed: int = 0) -> Tensor:
    """Many are equal or equally near."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, (count, DIM), generator=generator).float()


def embedded(features: Tensor, **options: Any) -> Datastore:
    labels = torch.arange(len(features)) % 4
    ids = torch.randperm(9 * len(features), generator=torch.Generator().manual_seed(1))
    return Datastore.from_features(features, labels, ids[: len(features)], index="flat", **options)


def load(store: Datastore, uri: str, **options: Any) -> MilvusDatastore:
    return MilvusDatastore.from_datastore(store, uri, "rows", progress=False, **options)


class Asked:
    """What a server was asked for, in the order of the calls."""

    def __init__(self) -> None:
        self.fields: list[Any] = []
        self.indexes: list[dict[str, Any]] = []
        self.searches: list[dict[str, Any]] = []
        self.written: list[Any] = []
        self.vectors: list[Any] = []


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Milvus Lite that says that it is a server of version 3.0.1, see the module."""
    asked, call = Asked(), MilvusServer.call
    schema, write, search = (getattr(MilvusCollection, name) for name in _CHANGED)

    def played_schema(self: MilvusCollection, width: int, vectors: str) -> Any:
        asked.fields.append(schema(self, width, vectors).to_dict()["fields"][-1])
        return schema(self, width, "float32")

    def played_write(self: MilvusCollection, rows: list[dict[str, Any]]) -> None:
        asked.written += [row["vector"] for row in rows]
        write(self, [row | {"vector": row["vector"].astype(np.float32)} for row in rows])

    def played_search(
        self: MilvusCollection, vectors: Any, count: int, where: str, fields: Any, parameters: Any
    ) -> Any:
        asked.vectors.append(vectors)
        asked.searches.append(parameters | {"limit": count})
        lite = {name: value for name, value in parameters.items() if name in ("nprobe", "ef")}
        return search(self, vectors.astype(np.float32), count, where, fields, lite)

    def played_call(self: MilvusServer, name: str, *args: Any, **options: Any) -> Any:
        if name == "get_server_version":
            return "v3.0.1"
        if name == "create_index" and args[0] == "rows":
            (found,) = (one.to_dict() for one in args[1])
            asked.indexes.append(found)
            kind = found["index_type"]
            kind = "IVF_FLAT" if kind.lower() in SERVER_ONLY else kind
            index = self.library.MilvusClient.prepare_index_params()
            index.add_index("vector", index_type=kind, metric_type="IP", params={"params": found})
            args = (args[0], index)
        return call(self, name, *args, **options)

    for name, played in zip(_CHANGED, (played_schema, played_write, played_search), strict=True):
        monkeypatch.setattr(MilvusCollection, name, played)
    monkeypatch.setattr(MilvusServer, "call", played_call)
    return asked


_CHANGED = ("row_schema", "upsert", "search")


# ---- which server has what ----------------------------------------------------------------------


@pytest.mark.parametrize("index", SERVER_ONLY)
def test_lite_refuses_what_it_does_not_have_before_anything_is_made(index: str, uri: str) -> None:
    with pytest.raises(ValueError, match=rf"one of \['flat'.*'hnsw_sq'.* {SERVER_ONLY[index]} or"):
        load(embedded(coarse_rows()), uri, index=index)
    assert MilvusServer(uri).call("list_collections") == []


OTHERS = [pytest.param(k, marks=pytest.mark.slow) for k in ("ivf_flat", "hnsw")]


@pytest.mark.parametrize("index", ["ivf_sq8", "hnsw_sq", *OTHERS])
def test_lite_is_given_what_it_builds_an_index_with(index: str, uri: str) -> None:
    inside = load(embedded(coarse_rows()), uri, index=index, min_recall=0.5)
    found = inside.collection.server.call("describe_index", "rows", "vector")
    assert found["params"] == kinds.build_parameters(index.upper(), ROWS, DIM)
    assert found["params"]


def test_an_unknown_index_is_refused_with_those_that_are_known(uri: str) -> None:
    with pytest.raises(ValueError, match="to be one of") as refused:
        load(embedded(coarse_rows()), uri, index="annoy")
    for name in [*LITE_HAS, *SERVER_ONLY]:
        assert f"'{name}'" in str(refused.value)
    assert sorted([*LITE_HAS, *SERVER_ONLY]) == sorted(kind.lower() for kind in MilvusIndex)


def test_what_is_said_of_lite_is_what_lite_has(uri: str) -> None:
    """Lite knows no other index of ours, and no vectors in float16."""
    from milvus_lite.index.factory import KNOWN_VECTOR_INDEX_TYPES

    assert {kind.lower() for kind in MilvusIndex if kind in KNOWN_VECTOR_INDEX_TYPES} == {*LITE_HAS}
    place = MilvusCollection(MilvusServer(uri), "rows")
    assert kinds.LITE in place.server.version
    with pytest.raises(DatastoreRefusalError, match="Float16Vector"):
        place.server.call("create_collection", "rows", schema=place.row_schema(DIM, "float16"))


@pytest.mark.parametrize(("index", "since"), SERVER_ONLY.items())
def test_a_server_that_is_too_old_is_named(index: str, since: str) -> None:
    before = {"2.3": "v2.2.16", "2.6": "2.5.14", "3.0": "v2.6.9-gpu"}[since]
    with pytest.raises(ValueError, match=rf"Milvus {since} or later .* is {before}"):
        kinds.check_offered(index.upper(), before, "http://here")
    for version in (f"v{since}.0", "3.1", "10.0.2", "a build of our own"):
        kinds.check_offered(index.upper(), version, "http://here")


@pytest.mark.parametrize(
    ("dtype", "metric", "version", "wanted"),
    [
        ("float16", "cosine", "v2.4.0", "float16"), ("float16", "cosine", "2.3.9", "float32"),
        ("float32", "cosine", "v3.0.0", "float32"), ("float16", "l2", "v3.0.0", "float32"),
        ("float16", "cosine", "milvus_lite-3.2.2", "float32"),
    ],
)  # fmt: skip
def test_vectors_are_float16_where_rows_and_server_are(
    dtype: str, metric: str, version: str, wanted: str
) -> None:
    assert kinds.vector_dtype(dtype, metric, version) == wanted


# ---- what a server is asked for -----------------------------------------------------------------

_LISTS = {"nlist": ROWS // 39}
_GRAPH = {"M": 16, "efConstruction": 200}


@pytest.mark.parametrize(
    ("index", "built", "searched"),
    [
        ("ivf_rabitq", _LISTS | {"refine": True, "refine_type": "FP16"}, {"refine_k": 4}),
        ("ivf_rabitq_fastscan", _LISTS | {"refine": True, "refine_type": "FP32"}, {"refine_k": 4}),
        ("scann", _LISTS | {"sub_dim": 2}, {}),
        pytest.param("ivf_sq8", _LISTS, {}, marks=pytest.mark.slow),
        pytest.param("ivf_flat", _LISTS, {}, marks=pytest.mark.slow),
        pytest.param("hnsw", _GRAPH, {}, marks=pytest.mark.slow),
        ("hnsw_sq", _GRAPH | {"sq_type": "SQ8"}, {}),
    ],
)
def test_what_a_server_is_asked_for(
    index: str, built: dict[str, Any], searched: dict[str, Any], server: Asked, uri: str
) -> None:
    inside = load(embedded(coarse_rows()), uri, index=index, min_recall=0.5)
    named = {"field_name": "vector", "index_name": "", "metric_type": "IP"}
    assert server.indexes == [named | {"index_type": index.upper()} | built]
    near = inside.index.recalls
    assert min(near["rows"], near["perturbed rows"]) >= 0.5
    server.searches.clear()
    inside.search(coarse_rows()[:3], 20)
    (sent,) = server.searches
    wanted = sent.pop("limit")
    if index == "scann":
        assert sent.pop("reorder_k") == wanted * max(4, sent["nprobe"] // 4)
    assert inside.index.parameters == ({"ef": 64} if "hnsw" in index else sent)
    assert sent == ({"ef": 64} if "hnsw" in index else searched | {"nprobe": sent["nprobe"]})


def test_the_fields_and_messages_are_of_float16(server: Asked, uri: str) -> None:
    """Checked in what pymilvus sends: the type of the field, the bytes of a row and of a query."""
    from pymilvus import DataType
    from pymilvus.client.prepare import Prepare
    from pymilvus.client.types import PlaceholderType

    store = embedded(coarse_rows())
    inside = load(store, uri)
    assert server.fields[0]["type"] == DataType.FLOAT16_VECTOR
    assert server.fields[0]["params"] == {"dim": DIM}
    assert {vector.dtype for vector in server.written} == {np.dtype(np.float16)}
    inside.search(coarse_rows()[:3], 5)
    (vectors,) = server.vectors
    group = Prepare._prepare_placeholder_str(list(vectors))
    from pymilvus.grpc_gen import common_pb2

    (sent,) = common_pb2.PlaceholderGroup.FromString(group).placeholders
    assert sent.type == PlaceholderType.FLOAT16_VECTOR
    assert [np.frombuffer(value, np.float16).tolist() for value in sent.values] == vectors.tolist()


def test_refinement_grows_with_what_is_searched() -> None:
    """One-bit codes that propose too few rows would miss some however many lists are read."""
    tried: list[int] = []

    def measure(effort: int) -> tuple[float, str]:
        tried.append(effort)
        return (1.0 if effort >= 64 else 0.5), "rows"

    effort = kinds.set_effort("IVF_RABITQ", 20_000, measure)
    assert (tried, effort) == ([4, 8, 16, 32, 64], 64)
    assert kinds.tuned("IVF_RABITQ", effort) == {"nprobe": 64, "refine_k": 16}
    with pytest.raises(ValueError, match=r"it reached 0\.5000 on rows"):
        kinds.set_effort("IVF_RABITQ", 20_000, lambda effort: (0.5, "rows"))


@pytest.mark.parametrize("kind", ["IVF_FLAT", "IVF_RABITQ", "SCANN"])
def test_the_lists_that_are_read_hold_what_is_asked_for(kind: str) -> None:
    """Else the answer to many neighbours, or behind a filter, is a reading of all rows."""
    lists = kinds.build_parameters(kind, 20_000, 64)["nlist"]
    assert lists == 20_000 // 39
    probes = [kinds.search_parameters(kind, 8, k, 20_000)["nprobe"] for k in (20, 200, 2000, 9000)]
    assert probes == [8, 21, 205, lists]
    assert kinds.search_parameters("HNSW", 64, 200, 20_000) == {"ef": 200}


@pytest.mark.parametrize(("width", "sub_dim"), [(384, 2), (385, 1)])
def test_the_parts_of_a_vector_divide_its_width(width: int, sub_dim: int) -> None:
    found = kinds.build_parameters("SCANN", 1000, width)["sub_dim"]
    assert found == sub_dim
    assert width % int(found) == 0


# ---- float16 vectors ----------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", ["l2_centered", "l2"])
def test_answers_are_exact_over_float16_vectors(
    normalization: str, server: Asked, uri: str
) -> None:
    """Rows that float16 cannot tell apart once they are normalised are ordered here."""
    close = coarse_rows(200, 3) + torch.randn(200, DIM) / 2**9
    store = embedded(torch.cat([coarse_rows(), close]), normalization=normalization)
    inside = load(store, uri)
    queries = torch.cat([coarse_rows()[:20], close[:20], torch.randn(20, DIM)])
    own = store.ids[:60].clone()
    own[20:] = -1
    for k, excluded in ((1, None), (20, own), (200, None)):
        found, wanted = inside.search(queries, k, excluded), store.search(queries, k, excluded)
        for mine, theirs in zip(found, wanted, strict=True):
            assert torch.equal(mine, theirs)
        assert_nearest(found, store, queries, k, None if excluded is None else excluded.numpy())
    assert {vectors.dtype for vectors in server.vectors} == {np.dtype(np.float16)}
    new = coarse_rows(30, 5) + 0.25
    for one in (store, inside):
        one.add(new, [1] * 30, range(10_000, 10_030))
        one.remove(store.ids[:5] if one is inside else store.ids[:5].clone())
    assert server.written[-1].dtype == np.float16


def test_products_are_off_by_no_more_than_is_said() -> None:
    """Also where values are below the smallest normal number of float16."""
    generator = np.random.default_rng(0)
    for scale in (1.0, 1e-3, 1e-5):
        rows = generator.standard_normal((2000, 64)) * np.where(np.arange(64) < 2, 1, scale)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        exact = rows.astype(np.float32)
        short = exact.astype(np.float16)
        queries = slice(0, 50)
        true = exact[queries].astype(np.float64) @ exact.astype(np.float64).T
        kept = short[queries].astype(np.float64) @ short.astype(np.float64).T
        off = np.abs(true - kept).max(axis=1)
        said = _lost(exact[queries], short[queries])
        assert (off <= said).all()
        assert (said < 3e-3).all()
        assert (_lost(exact[queries], exact[queries]) == 0).all()


def test_the_record_says_what_the_vectors_are_in(server: Asked, uri: str) -> None:
    inside = load(embedded(coarse_rows()), uri)
    about = inside.collection.read_about()
    assert about is not None
    assert about.vectors == "float16"
    assert json.loads(about.to_row()["facts"])["format"] == 3  # which older versions refuse
    assert MilvusDatastore.connect(uri, "rows").fingerprint == inside.fingerprint


def test_records_of_float32_are_those_of_before() -> None:
    about = describe(embedded(coarse_rows()))
    facts = json.loads(about.to_row()["facts"])
    assert facts["format"] == 1
    assert "vectors" not in facts
    assert About.from_row(about.to_row()).vectors == "float32"
    half = dataclasses.replace(about, vectors="float16")
    assert half.fingerprint == about.fingerprint
    lie = json.loads(half.to_row()["facts"])
    for name, value in {"vectors": "int8", "format": 1}.items():
        row = half.to_row() | {"facts": json.dumps(lie | {name: value})}
        with pytest.raises(DatastoreError, match=rf"about\.{name}"):
            About.from_row(row)


def test_a_load_goes_on_with_the_vectors_that_it_was_begun_with(
    server: Asked, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = embedded(coarse_rows())
    with monkeypatch.context() as patch:
        patch.setattr(MilvusCollection, "flush", _interrupted)
        patch.setattr("hf_knn.milvus.load.vector_dtype", lambda *of: "float32")
        with pytest.raises(KeyboardInterrupt):
            load(store, uri)
    inside = load(store, uri)
    assert inside.collection.read_about().vectors == "float32"  # type: ignore[union-attr]
    found, wanted = inside.search(coarse_rows()[:9], 20), store.search(coarse_rows()[:9], 20)
    assert torch.equal(found.ids, wanted.ids)


def _interrupted(self: MilvusCollection) -> None:
    raise KeyboardInterrupt
