"""The stored datastore: lies in its manifest are refused before anything is read by them."""

import copy
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.stored import MANIFEST, NAMES_A_FILE, make_store, read_manifest, write_manifest

from hf_knn.core.manifest import Binding, DatastoreError, FileRecord, Manifest
from hf_knn.store import table as row_table
from hf_knn.store.datastore import Datastore


def changed(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    """Sets a field; the name is a path such as `blobs.0.size`."""

    def change(values: dict[str, Any]) -> Any:
        *parents, last = [int(part) if part.isdigit() else part for part in name.split(".")]
        place: Any = values
        for part in parents:
            place = place[part]
        if value is KeyError:
            del place[last]
        else:
            place[last] = value
        return values

    return change


LIES: list[Any] = [
    ("num_rows", 7, "7 x 3|(7, 3)"),
    ("num_rows", 5, r"\(5, 3\).*\(6, 3\)"),
    ("num_rows", 0, r"\(0, 3\).*\(6, 3\)"),
    ("dim", 2, r"\(6, 2\).*\(6, 3\)"),
    ("dim", 4, r"\(6, 4\).*\(6, 3\)"),
    ("dtype", "float32", r"float32.*float16"),
    ("dtype", "float64", r"`dtype`.*float64"),
    ("metric", "l1", r"`metric`.*cosine.*l1"),
    ("metric", 3, r"`metric`.*3"),
    ("normalization", "none", r"`normalization`.*'none'"),
    ("normalization", "max", r"`normalization`.*max"),
    ("index", "IVF16,Flat", "`index`.*object.*str"),
    ("index", None, "`index`.*object.*NoneType"),
    ("index.spec", 7, r"`index\.spec`.*7"),
    ("index.recall", 2.0, r"`index\.recall`.*2"),
    ("index.parameters", {"nprobe": -1}, r"`index\.parameters\.nprobe`.*-1"),
    ("format", "other", r"`format`.*hf_knn\.datastore.*other"),
    ("format_version", 2, "version 1, but got version 2; upgrade"),
    ("format_version", 0, "version 1, but got version 0"),
    ("format_version", "1", "`format_version`.*'1'"),
    ("format_version", True, "`format_version`.*True"),
    ("block_size", 1024, "`block_size`.*67108864.*1024"),
    ("num_rows", -1, "`num_rows`.*-1"),
    ("num_rows", 6.0, r"`num_rows`.*6\.0"),
    ("num_rows", "6", "`num_rows`.*'6'"),
    ("num_rows", 2**62, f"`num_rows`.*{2**62}"),
    ("num_rows", 2**47, rf"{2**47} x.*{2**47 * 6} bytes.*have \d+ bytes"),
    ("dim", 2**47, f"{2**47} float16"),
    ("blobs.0.size", 2**47, r"`blobs\[0\]\.blocks`"),
    ("blobs.0.size", 2**20, f"{2**20} bytes, but got"),
    ("blobs.0.size", -1, r"`blobs\[0\]\.size`.*-1"),
    ("blobs.0.blocks", [], r"`blobs\[0\]\.blocks`.*one hash per"),
    ("blobs.0.blocks", ["a" * 64] * 2, r"`blobs\[0\]\.blocks`.*one hash per"),
    ("blobs.0.blocks", ["A" * 64], r"`blobs\[0\]\.blocks`"),
    ("blobs.0.blocks", [3], r"`blobs\[0\]\.blocks`"),
    ("blobs.0.sha256", "0" * 64, "hash of the file, which is one block"),
    ("blobs.0.sha256", "0" * 63, r"`blobs\[0\]\.sha256`"),
    ("blobs.0.sha256", None, r"`blobs\[0\]\.sha256`"),
    ("blobs", [], "0 bytes"),
    ("blobs", {}, "`blobs`.*list"),
    ("blobs", [[]], r"blobs\[0\].*object.*list"),
    ("blobs", None, "`blobs`.*list.*None"),
    ("blobs", KeyError, "`blobs`"),
    ("blobs.0.name", KeyError, r"`blobs\[0\]\.name`"),
    ("num_rows", KeyError, "`num_rows`"),
    ("faiss_index", KeyError, "`faiss_index`"),
    ("faiss_index.name", "../datastore.faiss", r"`faiss_index\.name`"),
    ("source", [], "`source`"),
    ("source", {"dataset": 3}, "`source`"),
    ("binding", [], "binding.*object.*list"),
    ("binding", {}, "`binding.fingerprint`"),
] + [
    ("blobs.0.name", name, r"`blobs\[0\]\.name`")
    for name in (
        "../datastore-0123456789ab.safetensors",
        "/etc/passwd",
        "sub/datastore-0123456789ab.safetensors",
        "datastore-0123456789ab.safetensors\n",
        "datastore-0123456789AB.safetensors",
        "datastore-0123456789ab.safetensors\0",
        "datastore-0123456789ab.pkl",
        "model.safetensors",
        "",
        "..",
        7,
    )
]


@pytest.mark.parametrize(("name", "value", "message"), LIES)
def test_lies_in_the_manifest_are_refused(saved: Path, name: str, value: Any, message: str) -> None:
    write_manifest(saved, changed(name, value)(read_manifest(saved)))
    with pytest.raises(DatastoreError, match=message) as caught:
        Datastore.load(saved)
    assert NAMES_A_FILE.search(str(caught.value))


@pytest.mark.parametrize(
    ("name", "value"), [("num_rows", 2**40), ("dim", 2**40), ("blobs.0.size", 2**40)]
)
def test_huge_sizes_are_refused_before_a_file_is_opened(
    saved: Path, name: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = changed(name, value)(read_manifest(saved))
    if name == "blobs.0.size":
        values = changed("blobs.0.blocks", ["0" * 64] * (2**40 // 2**26))(values)
        values = changed("num_rows", 2**36)(values)
    write_manifest(saved, values)

    def refuse(*_: Any) -> None:
        raise AssertionError("a file was read")

    monkeypatch.setattr("hf_knn.core.manifest.hash_read_blocks", refuse)
    monkeypatch.setattr("hf_knn.store.row_files.load_file", refuse)
    with pytest.raises(DatastoreError, match=str(value)):
        Datastore.load(saved)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"null", id="null"),
        pytest.param(b'"text"', id="string"),
        pytest.param(b"{}", id="nothing in it"),
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(b'{"a":' * 100_000, id="deep objects"),
        pytest.param(b"\xff\xfe{}", id="not UTF-8"),
        pytest.param(b"\x80\x04N.", id="pickle"),
        pytest.param(b'{"format": NaN}', id="NaN"),
        pytest.param(
            b'{"format": ' + b"9" * 5000 + b"}", id="a number of 5000 digits",
        ),
    ],
)  # fmt: skip
def test_what_is_no_manifest_is_refused(saved: Path, text: bytes) -> None:
    (saved / MANIFEST).write_bytes(text)
    with pytest.raises(DatastoreError, match=r"datastore\.json"):
        Datastore.load(saved)


def test_a_huge_manifest_is_not_read(saved: Path) -> None:
    os.truncate(saved / MANIFEST, 65 * 2**20)  # sparse
    tracemalloc.start()
    try:
        with pytest.raises(DatastoreError, match=r"datastore\.json to have at most"):
            Datastore.load(saved)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_doubled_blob_is_refused(saved: Path) -> None:
    values = read_manifest(saved)
    values["blobs"] *= 2
    values["num_rows"] = 12
    write_manifest(saved, values)
    with pytest.raises(DatastoreError, match=r"unique `ids`"):
        Datastore.load(saved)


def test_blobs_in_another_order_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_table, "SHARD_BYTES", 18)
    make_store().save(folder)
    values = read_manifest(folder)
    assert len(values["blobs"]) == 2
    values["blobs"].reverse()
    write_manifest(folder, values)
    with pytest.raises(DatastoreError, match=r"datastore-.*`mean`"):
        Datastore.load(folder)


BINDING = Binding(
    "a" * 64, "b" * 64, "", "cls", "float32", [FileRecord("config.json", 1, "c" * 64, ["c" * 64])]
)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fingerprint", "short"),
        ("weights", None),
        ("processor", 3),
        ("pooling", "sum"),
        ("dtype", None),
        ("files", "config.json"),
        ("files.0.name", "../config.json"),
        ("files.0.name", "/config.json"),
        ("files.0.name", ".."),
        ("files.0.size", "1"),
    ],
)
def test_lies_in_the_binding_are_refused(folder: Path, name: str, value: Any) -> None:
    make_store().save(folder, binding=BINDING)
    write_manifest(folder, changed(f"binding.{name}", value)(read_manifest(folder)))
    with pytest.raises(DatastoreError, match=r"`binding\..*datastore\.json"):
        Datastore.load(folder)


def test_a_manifest_survives_its_own_json(saved: Path) -> None:
    manifest = Manifest.read(saved / MANIFEST)
    assert Manifest.parse(json.loads(manifest.to_json())) == manifest
    assert copy.deepcopy(manifest) == manifest
