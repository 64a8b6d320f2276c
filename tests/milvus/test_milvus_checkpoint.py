"""A checkpoint whose rows lie in Milvus: what it holds, who is asked, and what happens if not."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.milvus_servers import free_port
from support.stored import content
from support.tiny import pixels, tiny_model
from transformers import AutoModelForImageClassification

from hf_knn import Datastore, KnnForImageClassification, MilvusDatastore
from hf_knn.core.manifest import DatastoreError, StaleDatastoreError, _checksum
from hf_knn.milvus.server import DatastoreConnectionError, MilvusServer
from hf_knn.model.card import make_card

pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")

TRUST: dict[str, Any] = {"trust_remote_datastore": True}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("milvus") / "rows.db")


@pytest.fixture
def made(
    uri: str, tmp_path: Path, request: pytest.FixtureRequest
) -> tuple[Path, KnnForImageClassification]:
    """A checkpoint with a reference, and the same model with its rows embedded."""
    model = tiny_model("vit")
    embedded = model.datastore
    assert isinstance(embedded, Datastore)
    name = f"c{abs(hash(request.node.nodeid))}"
    model.datastore = MilvusDatastore.from_datastore(embedded, uri, name, progress=False)
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    model.datastore = embedded
    return folder, model.eval()


def lie(folder: Path, **values: Any) -> None:
    """Changes what the reference says, and signs it."""
    path = folder / "datastore.json"
    found = json.loads(path.read_text()) | values
    found["checksum"] = _checksum({k: v for k, v in found.items() if k != "checksum"})
    path.write_text(json.dumps(found))


@pytest.fixture
def nobody_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a server was asked")

    monkeypatch.setattr(MilvusServer, "__init__", refuse)


@pytest.mark.parametrize("opener", [KnnForImageClassification, AutoModelForImageClassification])
def test_the_model_answers_as_with_embedded_rows(opener, made):
    folder, model = made
    again = opener.from_pretrained(folder, **TRUST).eval()
    assert isinstance(again.datastore, MilvusDatastore)
    with torch.inference_mode():
        mine = again(pixels(4), return_neighbors=True)
        theirs = model(pixels(4), return_neighbors=True)
    assert torch.equal(mine.logits, theirs.logits)
    assert torch.equal(mine.neighbors.ids, theirs.neighbors.ids)
    assert mine.neighbors.ids.shape[1] > 0


def test_it_holds_no_row_and_no_token(uri, made, tmp_path, monkeypatch):
    folder, model = made
    monkeypatch.setenv("MILVUS_TOKEN", "a-secret-token")
    again = KnnForImageClassification.from_pretrained(folder, datastore_uri=uri)
    other = tmp_path / "other"
    again.save_pretrained(other)
    again.save_pretrained(folder)  # in place
    for place in (folder, other):
        files = content(place)
        assert not [name for name in files if name.startswith("datastore-")]
        assert "datastore.faiss" not in files
        assert not any(b"a-secret-token" in data for data in files.values())
        assert json.loads(files["datastore.json"])["num_rows"] == len(model.datastore or [])
    assert len(KnnForImageClassification.from_pretrained(other, **TRUST).datastore) == 40


def test_embedded_again(made, tmp_path):
    folder, model = made
    again = KnnForImageClassification.from_pretrained(folder, **TRUST)
    again.datastore = again.datastore.to_datastore()
    again.save_pretrained(folder)
    plain = KnnForImageClassification.from_pretrained(folder)
    assert torch.equal(plain(pixels(3)).logits, model(pixels(3)).logits)


def test_nobody_is_asked_without_consent(made, nobody_asked):
    folder, _ = made
    with pytest.raises(ValueError, match=r"consent to ask a server.* Milvus at .*rows\.db"):
        KnnForImageClassification.from_pretrained(folder)
    for place in ("http://evil.example:19530", "/etc/evil.db"):
        lie(folder, uri=place)
        with pytest.raises(ValueError, match=f"consent to ask a server.*{place}"):
            KnnForImageClassification.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"trust_remote_datastore": True, "datastore_uri": "http://evil.example"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="consent to ask a server"):
        KnnForImageClassification.from_pretrained(folder, allow_stale=True)
    plain = KnnForImageClassification.from_pretrained(folder, load_datastore=False)
    assert plain.datastore is None


def test_the_user_may_name_the_address(uri, made, monkeypatch):
    folder, _ = made
    lie(folder, uri="http://moved.example:19530")
    found = KnnForImageClassification.from_pretrained(folder, datastore_uri=uri)
    assert len(found.datastore) == 40
    monkeypatch.setenv("HF_KNN_MILVUS_URI", uri)
    assert len(KnnForImageClassification.from_pretrained(folder).datastore) == 40


def test_a_server_that_is_away_is_no_head_alone(made, monkeypatch):
    folder, _ = made
    place = f"http://127.0.0.1:{free_port()}"
    lie(folder, uri=place)
    hurried = partial(MilvusServer, timeout=1, patience=0.1)
    monkeypatch.setattr(
        "hf_knn.milvus.datastore.MilvusServer", lambda uri, token, *_: hurried(uri, token)
    )
    with pytest.raises(DatastoreConnectionError, match=f"Milvus at {place} to answer"):
        KnnForImageClassification.from_pretrained(folder, **TRUST)


def test_without_pymilvus(made, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pymilvus", None)
    with pytest.raises(ImportError, match=r"pip install .*\[milvus\]"):
        KnnForImageClassification.from_pretrained(made[0], **TRUST)


def test_rows_that_changed_are_refused_with_both_numbers(uri, made):
    folder, _ = made
    opened = KnnForImageClassification.from_pretrained(folder, **TRUST)
    first = int(opened.datastore.ids[0])
    opened.datastore.remove([first])
    with pytest.raises(DatastoreError, match=r"hold 40 rows, fingerprint .* holds 39, "):
        KnnForImageClassification.from_pretrained(folder, **TRUST)
    opened.save_pretrained(folder)
    assert len(KnnForImageClassification.from_pretrained(folder, **TRUST).datastore) == 39


def test_rows_of_other_weights_are_stale(made):
    folder, model = made
    with torch.no_grad():
        next(model.backbone.parameters()).add_(1)
    model.datastore = None
    reference = (folder / "datastore.json").read_bytes()
    model.save_pretrained(folder)
    (folder / "datastore.json").write_bytes(reference)
    with pytest.raises(StaleDatastoreError, match="made by the backbone beside it"):
        KnnForImageClassification.from_pretrained(folder, **TRUST)


def test_rows_of_classes_that_the_model_lacks(made):
    folder, _ = made
    opened = KnnForImageClassification.from_pretrained(folder, **TRUST)
    opened.datastore.relabel([int(opened.datastore.ids[0])], [1000])
    with pytest.raises(ValueError, match="but got 1000"):
        opened.save_pretrained(folder)


def test_the_card_says_where_the_rows_are(made):
    folder, model = made
    opened = KnnForImageClassification.from_pretrained(folder, **TRUST)
    card = make_card(opened, "org/name")
    assert "The rows are not in this repository: they lie in the collection c" in card
    assert "rows\\.db" in card  # Markdown shows it without the backslash, and not as a link
    assert "The rows are not in this repository" not in make_card(model, "org/name")
