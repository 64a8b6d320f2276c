"""`hf-knn cache`: what it lists and what it leaves."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import as_checkpoint
from support.pictures import dataset_of, small_model
from typer.testing import CliRunner

import hf_knn_cli
from hf_knn import Datastore, extract_features

LABELS = [0, 1, 2, 1]


def cache(*options: str) -> Any:
    done = CliRunner().invoke(hf_knn_cli.app, ["cache", *options])
    assert done.exit_code == 0, done.output
    return json.loads(done.output) if "--json" in options else done.output


@pytest.fixture
def filled(knn_cache: Path) -> Path:
    """Features of two models, one of them last used 40 days ago, and what else lies there."""
    for seed in (0, 1):
        rows = dataset_of(LABELS, broken=[3] if seed else [])
        extract_features(small_model(seed=seed), rows, on_bad_image="skip", progress=False)
    others = ("graphs/abc/graph.onnx", "backends/one.json", "search/one.json")
    for place in (*others, "tasks/openmoji/data.arrow"):
        path = knn_cache / place
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x" * 1000)
    (old,) = [
        path
        for path in (knn_cache / "features").glob("*/about.json")
        if cached_rows(path.parent) == len(LABELS)
    ]
    long_ago = time.time() - 40 * 86_400
    os.utime(old, (long_ago, long_ago))
    return knn_cache


def cached_rows(folder: Path) -> int:
    (entry,) = [e for e in cache("--json")["entries"] if e["name"] == folder.name]
    return int(entry["rows"])


def test_it_lists_what_there_is(filled: Path) -> None:
    entries = cache("--json")["entries"]
    assert [entry["kind"] for entry in entries].count("features") == 2
    assert {entry["kind"] for entry in entries} == {"features", "graph", "choices", "keys"}
    choices = {entry["name"] for entry in entries if entry["kind"] == "choices"}
    assert choices == {"backends", "search"}
    assert sorted(entry["rows"] for entry in entries if entry["kind"] == "features") == [3, 4]
    for entry in entries:
        if entry["kind"] == "features":
            files = [p for p in (filled / "features" / entry["name"]).iterdir() if p.is_file()]
            assert entry["bytes"] == sum(path.stat().st_size for path in files)
            assert (entry["model"], entry["backend"]) == ("ViTModel", "torch fp32")
            assert entry["pictures"] == "4 of ant, bee, cat …"
    assert entries[-1]["rows"] == 4  # the least recently used
    shown = cache()
    assert "ViTModel" in shown
    assert str(filled) in shown.replace("\n", "")


def test_it_clears_what_is_old_and_only_that(filled: Path) -> None:
    assert [entry["rows"] for entry in cache("--older-than", "30", "--json")["entries"]] == [4]
    cache("--clear", "--older-than", "30")
    left = cache("--json")["entries"]
    assert [entry["rows"] for entry in left if entry["kind"] == "features"] == [3]
    assert {"graph", "choices", "keys"} <= {entry["kind"] for entry in left}


def test_it_clears_everything_that_can_be_computed_again(filled: Path) -> None:
    cleared = cache("--clear", "--json")
    assert cleared["cleared"]
    assert len(cleared["entries"]) == 6
    assert cache("--json")["entries"] == []
    assert (filled / "tasks" / "openmoji" / "data.arrow").is_file()
    found = extract_features(small_model(), dataset_of(LABELS), progress=False)
    assert found.computed == len(LABELS)


def test_an_empty_cache(knn_cache: Path) -> None:
    assert cache("--json")["entries"] == []
    assert "0.0 MB" in cache()


def test_using_the_cache_counts_as_use(filled: Path) -> None:
    extract_features(small_model(), dataset_of(LABELS), progress=False)
    assert cache("--older-than", "30", "--json")["entries"] == []


def test_a_damaged_file_is_listed_without_rows(filled: Path) -> None:
    for path in filled.rglob("shard-*.safetensors"):
        path.write_bytes(b"x")
    for path in filled.rglob("about.json"):
        path.write_bytes(b"x")
    features = [entry for entry in cache("--json")["entries"] if entry["kind"] == "features"]
    assert [entry["rows"] for entry in features] == [0, 0]
    cache("--clear")
    assert cache("--json")["entries"] == []


@pytest.mark.parametrize("before", [None, "torch"])
def test_the_backend_option_is_for_one_command(
    before: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []
    monkeypatch.delenv("HF_KNN_BACKEND", raising=False)
    if before:
        monkeypatch.setenv("HF_KNN_BACKEND", before)
    monkeypatch.setattr(
        "hf_knn.commands.console.run",
        lambda *_, **__: seen.append(os.environ.get("HF_KNN_BACKEND")),
    )
    monkeypatch.setattr("hf_knn.features.backends.find_spec", lambda name: name)  # all are here
    checkpoint, pictures = as_checkpoint(tmp_path / "checkpoint"), tmp_path
    calls = [["train", pictures, "--backbone", checkpoint], ["evaluate", checkpoint, pictures]]
    calls += [["tune", checkpoint, pictures], ["teach", checkpoint, pictures]]
    calls += [["doctor", pictures, "--backbone", checkpoint]]
    for call in [[*map(str, each)] for each in calls]:
        done = CliRunner().invoke(hf_knn_cli.app, [*call, "--backend", "openvino"])
        assert done.exit_code == 0, done.output
        assert os.environ.get("HF_KNN_BACKEND") == before
    assert seen == ["openvino"] * len(calls)
    done = CliRunner().invoke(hf_knn_cli.app, ["doctor", ".", "--backend", "tensorrt"])
    assert done.exit_code == 2


def test_it_lists_and_clears_kept_indexes(
    knn_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_knn.store.index.MOMENT", 0.0)
    rows = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    Datastore.from_features(rows, [0] * 300, index="IVF4,Flat").save(tmp_path / "animals")
    wanted = Datastore.load(tmp_path / "animals").search(rows[:9], 5)
    (entry,) = (e for e in cache("--json")["entries"] if e["kind"] == "index")
    files = list((knn_cache / "indexes" / entry["name"]).iterdir())
    assert entry["kind"] == "index"
    assert entry["model"] == str(tmp_path / "animals")
    assert (entry["rows"], entry["backend"]) == (300, "IVF4,Flat")
    assert entry["bytes"] == sum(path.stat().st_size for path in files)
    assert "animals" in cache()
    (place,) = (path for path in files if path.name == "about.json")
    long_ago = time.time() - 40 * 86_400
    os.utime(place, (long_ago, long_ago))
    assert len(cache("--older-than", "30", "--json")["entries"]) == 1
    Datastore.load(tmp_path / "animals").search(rows[:9], 5)  # which is of use
    assert cache("--older-than", "30", "--json")["entries"] == []
    place.write_bytes(b"x")
    entries = cache("--json")["entries"]  # also what first passes took, as recall was measured
    assert [e["rows"] for e in entries if e["kind"] == "index"] == [0]
    cache("--clear")
    assert cache("--json")["entries"] == []
    found = Datastore.load(tmp_path / "animals").search(rows[:9], 5)
    assert torch.equal(found.ids, wanted.ids)
