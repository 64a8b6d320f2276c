"""`hf-knn milvus` moves the rows of a checkpoint, and the other commands work with it."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.commands import hf_knn
from support.tiny import tiny_model

from hf_knn import KnnForImageClassification, MilvusDatastore
from hf_knn.commands.console import console
from hf_knn.commands.memory import teach_pictures
from milvus.test_milvus_store import Stopped, stop_after

pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "width", 400)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    tiny_model("vit").save_pretrained(folder)
    return folder


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "rows.db")


def test_the_rows_move_and_predict_finds_them(checkpoint, uri, tmp_path, monkeypatch):
    picture = tmp_path / "picture.png"
    Image.new("RGB", (40, 40), "teal").save(picture)
    before = json.loads(hf_knn("predict", checkpoint, picture, "--json").output)
    moved = hf_knn("milvus", checkpoint, "--uri", uri, "--collection", "rows")
    assert moved.exit_code == 0, moved.output
    assert "40 rows lie in the collection rows at" in moved.output
    assert not list(checkpoint.glob("datastore-*"))
    refused = hf_knn("predict", checkpoint, picture, "--json")
    assert refused.exit_code == 1
    assert "HF_KNN_MILVUS_URI" in refused.output
    monkeypatch.setenv("HF_KNN_MILVUS_URI", uri)
    answered = hf_knn("predict", checkpoint, picture, "--json")
    assert json.loads(answered.output) == before
    again = hf_knn("milvus", checkpoint, "--uri", uri, "--collection", "rows")
    assert again.exit_code == 1
    assert "refers to Milvus already" in again.output


def test_rows_that_lie_there_are_inspected(checkpoint, uri, tmp_path, monkeypatch):
    beside = hf_knn("inspect", checkpoint, "-o", tmp_path / "beside", "--json")
    assert hf_knn("milvus", checkpoint, "--uri", uri, "--collection", "seen").exit_code == 0
    monkeypatch.setenv("HF_KNN_MILVUS_URI", uri)
    there = hf_knn("inspect", checkpoint, "-o", tmp_path / "there", "--json")
    assert there.exit_code == 0, there.output
    found, wanted = json.loads(there.stdout), json.loads(beside.stdout)
    assert found["counts"] == wanted["counts"]
    for fact in ("rows", "width", "fingerprint of backbone"):
        assert found["checkpoint"][fact] == wanted["checkpoint"][fact]
    pages = [tmp_path / place / "findings.csv" for place in ("beside", "there")]
    assert pages[0].read_text() == pages[1].read_text()


def test_the_index_is_chosen_and_its_recall_said(checkpoint, uri):
    done = hf_knn("milvus", checkpoint, "--uri", uri, "--collection", "hnsw", "--index", "hnsw")
    assert done.exit_code == 0, done.stderr
    assert "searched by hnsw (ef 64, recall@20 1.0000 on " in done.stdout
    done = hf_knn("milvus", checkpoint, "--uri", uri, "--collection", "x", "--index", "annoy")
    assert done.exit_code == 1


def test_nobody_teaches_while_the_rows_move(checkpoint, uri, tmp_path, monkeypatch):
    """Who tries waits, and then teaches the rows in Milvus; it was lost before."""
    picture = tmp_path / "picture.png"
    Image.new("RGB", (40, 40), "teal").save(picture)
    load = MilvusDatastore.from_datastore
    teacher = threading.Thread(
        target=teach_pictures, args=(checkpoint, picture, "ant", "fail", True)
    )

    def slow(*args: Any, **options: Any) -> MilvusDatastore:
        teacher.start()
        teacher.join(1)
        return load(*args, **options)

    monkeypatch.setenv("HF_KNN_MILVUS_URI", uri)
    monkeypatch.setattr(MilvusDatastore, "from_datastore", slow)
    moved = hf_knn("milvus", checkpoint, "--uri", uri, "--collection", "rows")
    teacher.join()
    assert moved.exit_code == 0, moved.output
    store = KnnForImageClassification.from_pretrained(checkpoint).datastore
    assert (len(store), store.location is None) == (41, False)


def test_it_goes_on_where_it_was_stopped(checkpoint, uri, monkeypatch):
    command = ("milvus", checkpoint, "--uri", uri, "--collection", "rows", "--batch-size", 7)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert isinstance(hf_knn(*command).exception, Stopped)
    assert KnnForImageClassification.from_pretrained(checkpoint).datastore.location is None
    done = hf_knn(*command)
    assert done.exit_code == 0, done.output
    assert "40 rows lie in" in done.output


def test_what_cannot_be_moved(checkpoint, uri, tmp_path):
    missing = hf_knn("milvus", tmp_path / "no", "--uri", uri, "--collection", "rows")
    assert (missing.exit_code, "to be a checkpoint folder" in missing.output) == (1, True)
    address = hf_knn("milvus", checkpoint, "--uri", "ftp://x", "--collection", "rows")
    assert (address.exit_code, "like http://host:19530" in address.output) == (1, True)
    tiny_model("vit", rows=0).save_pretrained(tmp_path / "plain")
    plain = hf_knn("milvus", tmp_path / "plain", "--uri", uri, "--collection", "rows")
    assert (plain.exit_code, "it has none" in plain.output) == (1, True)
