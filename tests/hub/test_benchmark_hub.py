"""Tasks on the Hub: pinned, stored or streamed, and everything that can be wrong with one."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import ClassLabel
from support.hub_datasets import REPO, publish
from support.hub_server import Hub

from catalog.backbones import Backbone
from catalog.loading import load_task
from catalog.tasks import find_task
from study.cells import Cell
from study.runner import Options, Run
from verify import verify_backbone, verify_task


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", tmp_path / "modules")


def rows_of(loaded: Any) -> Iterator[tuple[int, int, bytes]]:
    for role, rows in loaded.chunks():
        for row in rows:
            yield role, row["label"], row["image"].tobytes()


def test_a_pinned_revision_stays_when_the_dataset_moves(hub: Hub) -> None:
    first = publish(hub)
    second = publish(hub, train=40)
    pinned = load_task(f"hub:{REPO}@{first}")
    assert (pinned.revision, pinned.label_names) == (first, ["disc", "ring"])
    assert [len(part) for part in pinned.parts()] == [20, 4, 16]
    newest = load_task(f"hub:{REPO}")
    assert newest.revision == second
    assert len(newest.train) + len(newest.validation) == 40


def test_a_stream_gives_the_same_pictures(hub: Hub) -> None:
    publish(hub)
    stored = load_task(f"hub:{REPO}", streaming=False)
    streamed = load_task(f"hub:{REPO}", streaming=True)
    assert streamed.is_streamed
    assert list(rows_of(streamed)) == list(rows_of(stored))
    with pytest.raises(ValueError, match="but they are streamed; do leave streaming out"):
        _ = streamed.rows


def test_stored_and_streamed_cells_have_the_same_numbers(hub: Hub, tmp_path: Path) -> None:
    publish(hub)
    name = f"hub:{REPO}"
    cell = Cell(name, "tiny-vit-digits", "knn", 0)
    frozen = Cell(name, str(frozen_folder(tmp_path)), "knn", 0)
    found = {}
    for streaming in (False, True):
        run = Run(tmp_path / f"out-{streaming}", Options(cache_dir=tmp_path, streaming=streaming))
        run.run("test", [frozen])
        assert run.failures == []
        (path,) = (run.folder / "cells").glob("*.json")
        found[streaming] = json.loads(path.read_text())
        assert found[streaming]["task"]["revision"] == hub.repo(REPO, "dataset").branches["main"]
    for arm, facts in found[False]["arms"].items():
        assert facts["test"] == found[True]["arms"][arm]["test"]
    run = Run(tmp_path / "scratch", Options(cache_dir=tmp_path, streaming=True))
    run.run("test", [cell])
    (failure,) = run.failures
    assert "are streamed" in str(failure[1])  # a backbone that is trained needs pictures again


def frozen_folder(tmp_path: Path) -> Path:
    from support.tiny import processor, tiny_backbone

    tiny_backbone("vit").save_pretrained(tmp_path / "backbone")
    processor().save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


def test_a_folder_of_results_refuses_a_moved_revision(hub: Hub, tmp_path: Path) -> None:
    first = publish(hub)
    options = Options(cache_dir=tmp_path, epochs=1)
    cells = [Cell(f"hub:{REPO}", "tiny-vit-digits", "knn", 0)]
    Run(tmp_path / "out", options).run("test", cells)
    second = publish(hub, train=40)
    with pytest.raises(ValueError, match=rf"at the revision {first}.*it is {second} now"):
        Run(tmp_path / "out", options).run("test", cells)


def test_what_is_missing_is_named(hub: Hub) -> None:
    publish(hub, label="species")
    with pytest.raises(ValueError, match=r"columns \['image', 'label'\].*\['label'\] is not among"):
        load_task(f"hub:{REPO}")
    with pytest.raises(ValueError, match=r"revision nowhere of org/shapes.*pin another"):
        load_task(f"hub:{REPO}@nowhere")


def test_a_closed_dataset_says_how_to_get_access(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(hub, private=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    with pytest.raises(PermissionError, match=r"accept its terms at https://.*set HF_TOKEN"):
        load_task(f"hub:{REPO}")


def test_a_folder_of_results_refuses_a_moved_backbone(hub: Hub, tmp_path: Path) -> None:
    """A run that goes on would mix weights, and the report would say so hours later."""
    publish(hub)
    options = Options(cache_dir=tmp_path)
    first = push_backbone(hub, 0)
    done = Run(tmp_path / "out", options)
    done.run("test", [Cell(f"hub:{REPO}", "org/backbone", "knn", 0)])
    assert done.failures == []
    document = json.loads((tmp_path / "out" / "run.json").read_text())
    assert document["models"] == {"org/backbone": first}
    second = push_backbone(hub, 1)
    moved = Run(tmp_path / "out", options)
    moved.run("test", [Cell(f"hub:{REPO}", "org/backbone", "knn", 1)])
    (failure,) = moved.failures
    assert re.search(f"at the revision {first} that .* but it is {second} now", str(failure[1]))


def push_backbone(hub: Hub, seed: int) -> str:
    """The commit that a backbone of other weights is pushed as."""
    from support.tiny import processor, tiny_backbone

    backbone = tiny_backbone("vit")
    with torch.no_grad():
        next(backbone.parameters()).add_(seed)
    backbone.push_to_hub("org/backbone")  # type: ignore[arg-type]
    processor().push_to_hub("org/backbone")
    return hub.repo("org/backbone").branches["main"]


def test_sizes_are_those_of_the_splits_that_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stanford Cars lies on the Hub with seven damaged copies of its test pictures."""
    entry = find_task("stanford-cars")
    sizes = {"train": 8_144, "test": 8_041, **{f"noise {n}": 8_041 for n in range(7)}}
    splits = {name: SimpleNamespace(num_examples=count) for name, count in sizes.items()}
    features = {"image": None, "label": ClassLabel(names=[str(n) for n in range(196)])}
    builder = SimpleNamespace(info=SimpleNamespace(splits=splits, features=features))
    monkeypatch.setattr("verify.load_dataset_builder", lambda *_, **__: builder)
    monkeypatch.setattr("verify.resolve_revision", lambda entry: entry.revision)
    assert verify_task(entry).problems == []
    (problem,) = verify_task(replace(entry, pictures=60_000)).problems
    assert problem == "16185 pictures, not about 60000"


def test_verify_finds_what_does_not_fit(hub: Hub) -> None:
    commit = publish(hub)
    entry = replace(find_task(f"hub:{REPO}"), splits=("train", None, "test"))
    good = verify_task(entry)
    assert good.revision == commit
    wrong = verify_task(replace(entry, label="species", classes=3, splits=("train", None, "dev")))
    assert good.problems == [] or "does not tell" in good.problems[0]
    assert len(wrong.problems) >= len(good.problems)
    gone = verify_task(replace(entry, location="org/nothing"))
    assert gone.revision == ""
    assert "org/nothing" in gone.problems[0]
    hub.create("org/backbone")
    assert verify_backbone(Backbone("b", "B", "org/backbone")).problems == []
    assert verify_backbone(Backbone("b", "B", "org/absent")).revision == ""
