"""Small stored datastores in which everything tells the version, and looks at their files."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_knn.core import manifest as manifest_module
from hf_knn.store import table as row_table
from hf_knn.store.datastore import Datastore
from support.oracles import assert_same_store

MANIFEST, FAISS = "datastore.json", "datastore.faiss"
NAMES_A_FILE = re.compile(
    r"datastore\.json|datastore-[0-9a-f]{12}\.safetensors|manifest|The datastore is not usable"
)
ROWS, DIM = 24, 3
QUERIES = torch.randn(5, DIM, generator=torch.Generator().manual_seed(99))
OWN_FILES = re.compile(r"datastore\.(json|faiss)|datastore-[0-9a-f]{12}\.safetensors")


def make_store(version: int = 0, count: int = 6, **options: Any) -> Datastore:
    """Rows in which everything tells the version."""
    features = torch.arange(count * 3).reshape(count, 3) % 7 + 1.0 + version
    labels = torch.full((count,), version)
    options = {"paths": [f"{version}/é {row}.png" for row in range(count)]} | options
    return Datastore.from_features(features, labels, torch.arange(count) + version, **options)


def version_of(store: Datastore) -> int:
    """The version of a store that is whole; fails for a mix of two."""
    version = int(store.labels[0])
    assert_same_store(store, make_store(version, len(store)))
    return version


def blob_of(folder: Path) -> Path:
    (blob,) = folder.glob("datastore-*.safetensors")
    return blob


def names_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def read_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())


def write_manifest(folder: Path, values: Any) -> None:
    if isinstance(values, dict):  # a lie that is signed, so that the checks behind it are reached
        values["checksum"] = manifest_module._checksum(
            {name: value for name, value in values.items() if name != "checksum"}
        )
    (folder / MANIFEST).write_text(json.dumps(values))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def blob_of_version(folder: Path, version: int) -> str:
    manifest = Datastore.load(folder).manifest
    assert manifest is not None
    assert version_of(Datastore.load(folder)) == version
    return manifest.blobs[0].name


def flipped(data: bytes, position: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 1 << bit
    return bytes(changed)


def cut_into_shards(patch: pytest.MonkeyPatch, most: int) -> None:
    """From now on no row file holds more than so many bytes of features."""
    patch.setattr(row_table, "SHARD_BYTES", most)


def assert_same_answers(found: Datastore, wanted: Datastore) -> None:
    for mine, others in zip(found.search(QUERIES, 4), wanted.search(QUERIES, 4), strict=True):
        assert torch.equal(mine, others)


def varied_store(version: int, index: str = "auto") -> Datastore:
    """Rows of their own in each version; the labels are the version."""
    generator = torch.Generator().manual_seed(version)
    store = Datastore.from_features(
        torch.randn(ROWS, DIM, generator=generator), torch.full((ROWS,), version),
        torch.arange(ROWS) * 3 + version, index=index,
        paths=[f"{version}/é {row}.png" for row in range(ROWS)],
    )  # fmt: skip
    store.build_index()  # before a fork, since faiss has threads
    return store


def two_shards(patch: pytest.MonkeyPatch) -> None:
    """From now on a varied store has two row files."""
    cut_into_shards(patch, ROWS // 2 * DIM * 2)  # of float16
