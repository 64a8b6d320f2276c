"""Versions that trainings replaced: kept in order, put back, and rid of what is forgotten."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from store.test_storage_kills import die_at_step
from support.forks import outcome
from support.tiny import all_files, tiny_model

from hf_knn import KnnForImageClassification
from hf_knn.model.before import BEFORE_NAME, kept_versions
from hf_knn.model.versions import exchange_versions, mark_training, occupant_of

KEEP = 3


def opened(folder: Path) -> Any:
    return KnnForImageClassification.from_pretrained(folder)


def retrain(folder: Path, k: int, keep: int = KEEP, without: tuple[int, ...] = ()) -> None:
    """Another training on the same backbone and pictures, perhaps without some of them."""
    model = opened(folder)
    if without:
        model.datastore.remove(torch.tensor(without))
    model.memory = model.memory.started_with(model.datastore)
    model.config.k = k
    mark_training(model.datastore, "0" * 64)
    model.save_pretrained(folder, keep_replaced=keep)


def ks(folder: Path) -> list[int]:
    """Which versions there are, the present one first."""
    return [opened(place).config.k for place in (folder, *kept_versions(folder))]


def rows_in(folder: Path) -> list[int]:
    return [len(opened(place).datastore) for place in (folder, *kept_versions(folder))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Trained four times; the training between had two pictures less."""
    place = tmp_path / "place" / "model"
    tiny_model("vit", k=5).save_pretrained(place)
    retrain(place, 6)
    ids = opened(place).datastore.ids.tolist()
    full = shutil.copytree(place, tmp_path / "full")
    retrain(place, 7, without=(ids[3], ids[4]))
    model = opened(full)  # the rows come back with the next training
    model.memory = model.memory.started_with(model.datastore)
    model.config.k = 8
    model.save_pretrained(place, keep_replaced=KEEP)
    return place


def test_as_many_as_asked_for_are_kept_in_order(folder: Path) -> None:
    assert ks(folder) == [8, 7, 6, 5]
    retrain(folder, 9)
    assert ks(folder) == [9, 8, 7, 6]
    model = opened(folder)
    model.teach(features=torch.ones(1, 16), labels=["fox"])
    model.save_pretrained(folder)  # other saves hand all of them on
    assert ks(folder) == [9, 8, 7, 6]
    retrain(folder, 10, keep=2)
    assert ks(folder) == [10, 9, 8]
    retrain(folder, 11, keep=1)
    assert ks(folder) == [11, 10]


def test_what_falls_out_is_named(folder: Path) -> None:
    oldest = kept_versions(folder)[-1]
    model = opened(oldest)
    model.teach(features=torch.ones(2, 16), labels=["fox"] * 2)
    model.save_pretrained(oldest)
    assert "2 pictures were taught" not in str(occupant_of(folder, KEEP + 1))
    for keep in range(1, KEEP + 1):
        assert "in it 2 pictures were taught" in str(occupant_of(folder, keep))


def test_any_of_them_is_put_back_and_the_others_stay_in_order(folder: Path) -> None:
    prints = {k: opened(p).fingerprint_rows() for k, p in
              zip(ks(folder), (folder, *kept_versions(folder)), strict=True)}  # fmt: skip
    exchange_versions(folder, 3)
    assert ks(folder) == [5, 8, 7, 6]
    exchange_versions(folder)
    assert ks(folder) == [8, 5, 7, 6]
    for place in (folder, *kept_versions(folder)):
        model = opened(place)
        assert model.fingerprint_rows() == prints[model.config.k]
    with pytest.raises(ValueError, match=r"4 of them, but it keeps 3 only"):
        exchange_versions(folder, 4)
    assert ks(folder) == [8, 5, 7, 6]


def test_what_is_forgotten_is_erased_in_all_of_them(folder: Path) -> None:
    """Also behind a version that did not have it."""
    assert rows_in(folder) == [40, 38, 40, 40]
    store = opened(folder).datastore
    first = opened(kept_versions(folder)[0]).datastore.ids.tolist()
    (gone,) = [row for row in store.ids.tolist() if row not in first][:1]
    raw, path = store.rows_of([gone]).features[0].tobytes(), store.path_of(gone)
    assert sum(raw in (folder / name).read_bytes() for name in all_files(folder)) >= 2
    model = opened(folder)
    model.forget([gone])
    model.save_pretrained(folder)
    for name in all_files(folder):
        data = (folder / name).read_bytes()
        assert raw not in data, name
        assert not path or path.encode() not in data, name
    assert rows_in(folder) == [39, 38, 39, 39]
    assert ks(folder) == [8, 7, 6, 5]
    assert "an older version" in " ".join(opened(folder).changes[-1].notes)
    for back in (1, 2, 3):
        exchange_versions(folder, back)
        assert gone not in opened(folder).datastore.ids.tolist()


def test_a_version_that_goes_leaves_the_ones_before_it(folder: Path) -> None:
    (kept_versions(folder)[0] / "config.json").write_text("{")  # nobody can tell what it holds
    model = opened(folder)
    model.forget(model.datastore.ids[10:11])
    model.save_pretrained(folder)
    assert ks(folder) == [8, 6, 5]
    assert rows_in(folder) == [39, 39, 39]


def go_back(folder: Path) -> None:
    exchange_versions(folder, 2)


def forget_a_row(folder: Path) -> None:
    model = opened(folder)
    model.forget(model.datastore.ids[10:11])
    model.save_pretrained(folder)


@pytest.mark.parametrize("work", [go_back, forget_a_row])
@pytest.mark.parametrize("stride", [181, pytest.param(9, marks=pytest.mark.faults)])
def test_a_kill_at_any_step_leaves_all_versions_whole(
    folder: Path, work: Any, stride: int, tmp_path: Path
) -> None:
    place, template = folder.parent, shutil.copytree(folder.parent, tmp_path / "template")
    after = shutil.copytree(place, tmp_path / "after")
    work(after / "model")

    def versions_in(place: Path) -> list[tuple[int, str]]:
        models = [opened(one) for one in (place, *kept_versions(place))]
        return [(model.config.k, model.fingerprint_rows()) for model in models]

    wanted = [versions_in(template / "model"), versions_in(after / "model")]
    assert wanted[0] != wanted[1]
    found: list[int] = []
    end = ""
    while end != "InterruptedError: done":
        shutil.rmtree(place)
        shutil.copytree(template, place)

        def run(step: int = stride * len(found)) -> None:
            die_at_step(step, place)
            work(folder)
            raise InterruptedError("done")  # there was no such step

        end = outcome(run)
        assert end in (f"ended by {-signal.SIGKILL}", "InterruptedError: done")
        found.append(wanted.index(versions_in(folder)))
    commit = found.index(1)
    assert commit > 0
    assert found == [0] * commit + [1] * (len(found) - commit)
    assert {*os.listdir(folder)} >= {BEFORE_NAME, "config.json"}
