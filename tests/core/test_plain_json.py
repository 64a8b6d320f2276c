"""JSON of a repository: one reader, and one error for what no writer of ours could have meant."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.tiny import pixels, tiny_model, tiny_store

from hf_knn import KnnForImageClassification
from hf_knn.core.manifest import DatastoreError
from hf_knn.core.plain_json import parse_json, read_json
from hf_knn.model.card import read_measured
from hf_knn.model.code import compare_code, legacy_code
from hf_knn.model.receipts import read_changes
from hf_knn.training.checkpoints import SEAL_NAME, problem_of

BAD: dict[str, bytes] = {
    "deep object": b'{"a":' * 60 + b"0" + b"}" * 60,
    "deep list": b"[" * 100_000,
    "deep and whole": b"[" * 900 + b"]" * 900,
    "deep in a list of many": b"[" + b"0," * 1000 + b"[" * 60 + b"]" * 60 + b"]",
    "huge number": b'{"a": ' + b"9" * 5000 + b"}",
    "said twice": b'{"a": 1, "a": 2}',
    "said twice inside": b'[{"b": {"a": 1, "a": 2}}]',
    "no text": b"\xff\xfe\xfa",
    "nothing": b"",
    "a word": b"word",
    "cut": b'{"a": [1, 2',
    "two": b"{}{}",
    "control": b'{"a": "\x00"}',
}

bad = pytest.mark.parametrize("text", BAD.values(), ids=BAD)


@bad
def test_one_error_for_all_that_is_bad(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "any.json"
    path.write_bytes(text)
    with pytest.raises(DatastoreError, match=r"Expected any\.json to be JSON") as caught:
        read_json(path)
    assert len(str(caught.value)) < 400


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "any.json"
    path.write_bytes(b" " * 100 + b"{}")
    assert read_json(path, 102) == {}
    with pytest.raises(DatastoreError, match=r"any\.json to have at most 101 bytes"):
        read_json(path, 101)


@pytest.mark.parametrize(
    "value",
    [
        None, 0, -1.5, "", "é\u2028", [], {}, [[1], {"a": [None, True]}], {"": {"a": [{}] * 1000}},
        json.loads("[" * 49 + "]" * 49), "\ud800",
    ],
)  # fmt: skip
def test_what_is_good_is_read(value: object) -> None:
    assert parse_json(json.dumps(value), "any") == value
    if value != "\ud800":
        assert parse_json(json.dumps(value, ensure_ascii=False).encode(), "any") == value


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model()
    model.datastore = tiny_store(model)
    model.teach(features=torch.ones(1, model.config.feature_dim), labels=["ant"])
    folder = tmp_path_factory.mktemp("whole")
    model.save_pretrained(folder)
    return folder


@bad
@pytest.mark.parametrize("name", ["datastore.json", "config.json", "preprocessor_config.json"])
def test_a_checkpoint_with_a_bad_file_is_refused_by_its_name(
    whole: Path, tmp_path: Path, name: str, text: bytes
) -> None:
    shutil.copytree(whole, tmp_path / "model")
    (tmp_path / "model" / name).write_bytes(text)
    for allow_stale in (False, True):
        with pytest.raises(DatastoreError, match=name.replace(".", r"\.")):
            KnnForImageClassification.from_pretrained(tmp_path / "model", allow_stale=allow_stale)


@bad
def test_files_that_a_checkpoint_can_do_without_are_passed_over(
    whole: Path, tmp_path: Path, text: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(whole, tmp_path / "model")
    for name in ("measured.json", "changes.json"):
        (folder / name).write_bytes(text)
    opened = KnnForImageClassification.from_pretrained(folder)
    assert opened.changes == []
    assert opened.measured is None
    assert "measured.json" in caplog.text
    assert "changes.json" in caplog.text
    with torch.inference_mode():
        assert opened(pixel_values=pixels(2)).logits.isfinite().all()


@pytest.mark.parametrize("rows", ["1e999", "-1e999", "NaN", '"8"', "null", "[8]"])
def test_numbers_that_are_none_are_passed_over(tmp_path: Path, rows: str) -> None:
    path = tmp_path / "measured.json"
    path.write_text('{"metrics": {"eval_blend_top1": 0.5}, "rows": ' + rows + "}")
    found = read_measured(path)
    assert found is None or found["rows"] == 8


@bad
def test_other_readers_say_it_too(tmp_path: Path, text: bytes) -> None:
    (tmp_path / SEAL_NAME).write_bytes(text)
    assert "damaged" in (problem_of(tmp_path) or "")
    (tmp_path / "changes.json").write_bytes(text)
    assert read_changes(tmp_path / "changes.json") == []
    try:
        decoded = text.decode()
    except UnicodeDecodeError:
        return
    read: Callable[[str], str | None] = {"config.json": decoded}.get
    assert any("config.json cannot be read" in problem for problem in compare_code(read))
    assert legacy_code(read) == set()
