"""References to rows that lie elsewhere, and the registry of those who open them."""

import json
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from support.stored import MANIFEST

from hf_knn import Datastore
from hf_knn.core.manifest import DatastoreError
from hf_knn.milvus.datastore import MilvusDatastore
from hf_knn.store import remote
from hf_knn.store.remote import (
    PENDING_NAME,
    DatastoreReference,
    RemoteConsent,
    explain_pending,
    is_pending,
    open_remote,
    read_manifest,
)


def reference(backend: str = "milvus") -> DatastoreReference:
    return DatastoreReference(
        "http://host:19530", "rows", 3, "a" * 64, 4, "float16", "cosine", "l2", backend=backend
    )


def written(folder: Path, backend: str) -> Path:
    (folder / MANIFEST).write_text(reference(backend).to_json())
    return folder / MANIFEST


class Elsewhere:
    """A back end that somebody else brings."""

    asked: ClassVar[list[Any]] = []
    rows: Datastore

    @classmethod
    def open(cls, reference: DatastoreReference, consent: RemoteConsent) -> Datastore:
        cls.asked.append((reference, consent))
        return cls.rows


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Elsewhere` as an installed package brings it, beside ours."""
    point = EntryPoint("elsewhere", f"{__name__}:Elsewhere", remote.ENTRY_POINTS)
    found = {remote.ENTRY_POINTS: [point]}
    monkeypatch.setattr(remote.metadata, "entry_points", lambda group: found[group])


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, "milvus")
    assert list(json.loads(path.read_text()))[:3] == ["format", "format_version", "backend"]
    assert read_manifest(path) == reference()


def test_a_back_end_comes_by_its_entry_point(tmp_path: Path, installed: None) -> None:
    found = read_manifest(written(tmp_path, "elsewhere"))
    assert found == reference("elsewhere")
    Elsewhere.rows = Datastore.from_features(torch.tensor([[1.0, 0.0]]), [0])
    consent = RemoteConsent(trusted=True)
    assert open_remote(reference("elsewhere"), consent) is Elsewhere.rows
    assert Elsewhere.asked == [(found, consent)]


def test_another_back_end_has_addresses_of_its_own(tmp_path: Path, installed: None) -> None:
    asked = replace(reference("elsewhere"), uri="lance://bucket/rows", collection="a/b c")
    (tmp_path / MANIFEST).write_text(asked.to_json())
    found = read_manifest(tmp_path / MANIFEST)
    assert isinstance(found, DatastoreReference)
    assert (found.uri, found.collection) == ("lance://bucket/rows", "a/b c")
    (tmp_path / MANIFEST).write_text(replace(asked, backend="milvus").to_json())
    with pytest.raises(DatastoreError, match="lance"):
        read_manifest(tmp_path / MANIFEST)


def test_a_back_end_that_nobody_brought(tmp_path: Path) -> None:
    path = written(tmp_path, "elsewhere")
    with pytest.raises(DatastoreError, match=r"`backend` .*'milvus' .*\[milvus\]'"):
        read_manifest(path)
    with pytest.raises(DatastoreError, match=r"'milvus', but .* 'elsewhere'; install the extra"):
        open_remote(reference("elsewhere"), RemoteConsent(trusted=True))


def test_ours_needs_no_installed_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote.metadata, "entry_points", lambda group: [])
    asked = []
    monkeypatch.setattr(MilvusDatastore, "open", lambda *arguments: asked.append(arguments))
    open_remote(reference(), RemoteConsent())
    assert asked == [(reference(), RemoteConsent())]


def test_ours_asks_for_consent() -> None:
    with pytest.raises(ValueError, match=r"consent to ask a server.*rows of Milvus at http://host"):
        open_remote(reference(), RemoteConsent())


def test_an_interrupted_change_is_seen(tmp_path: Path) -> None:
    assert not is_pending(tmp_path)
    (tmp_path / PENDING_NAME).touch()
    assert is_pending(tmp_path)
    assert f"run `hf-knn undo {tmp_path}`" in explain_pending(tmp_path)
