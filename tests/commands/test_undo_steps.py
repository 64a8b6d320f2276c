"""`hf-knn undo CHECKPOINT N`: as many steps as N calls, all of them or none."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import hf_knn, wide_terminal  # noqa: F401
from support.tiny import LABELS, tiny_model

from hf_knn import KnnForImageClassification


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained twice, then taught twice and relabelled once."""
    folder = tmp_path_factory.mktemp("undo") / "model"
    tiny_model("vit", k=5).save_pretrained(folder)
    model = opened(folder)
    model.config.k = 7
    model.save_pretrained(folder, keep_replaced=True)
    for label in ("elk", "fox"):
        model = opened(folder)
        model.teach(features=torch.randn(2, 16), labels=[label] * 2)
        model.save_pretrained(folder)
    model.relabel(model.datastore.ids[:1], [LABELS[1]])
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


def opened(folder: Path) -> Any:
    return KnnForImageClassification.from_pretrained(folder)


def state_of(folder: Path) -> tuple[int, str, list[str]]:
    model = opened(folder)
    return model.config.k, model.fingerprint_rows(), model.config.class_names


def undo(folder: Path, *words: object) -> Any:
    done = hf_knn("undo", folder, *words, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_several_steps_are_several_calls(folder: Path, steps: int, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    for _ in range(steps):
        undo(other)
    receipts = undo(folder, steps)
    assert len(receipts) == steps
    assert state_of(folder) == state_of(other)
    assert [one["action"] for one in receipts] == ["undo"] * min(steps, 3) + (
        ["undo of a training"] if steps == 4 else []
    )
    assert opened(folder).config.k == (5 if steps == 4 else 7)


def test_more_steps_than_there_are_take_none(folder: Path) -> None:
    before = state_of(folder)
    done = hf_knn("undo", folder, 5)
    assert done.exit_code == 1
    assert "at most 4 steps back (3 changes and 1 kept versions)" in done.stderr
    assert state_of(folder) == before
    assert hf_knn("undo", folder, 0).exit_code == 2
    assert hf_knn("undo", folder, 2, "--training").exit_code == 2
    assert state_of(folder) == before


def test_what_was_forgotten_does_not_come_back_and_no_step_is_taken(folder: Path) -> None:
    model = opened(folder)
    gone = int(model.datastore.ids[5])
    model.forget([gone])
    model.save_pretrained(folder)
    model = opened(folder)
    model.relabel(model.datastore.ids[:1], [LABELS[2]])
    model.save_pretrained(folder)
    before = state_of(folder)
    done = hf_knn("undo", folder, 2)
    assert done.exit_code == 1
    assert "step 2 forgot 1 rows" in done.stderr
    assert state_of(folder) == before
    undo(folder)
    undo(folder, "--training")
    assert gone not in opened(folder).datastore.ids.tolist()


def test_each_step_is_said(folder: Path) -> None:
    done = hf_knn("undo", folder, 3)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("undo: ") == 3
    said = hf_knn("log", folder).stdout
    assert said.count("(taken back)") == 3


def test_versions_further_back_are_further_steps(folder: Path) -> None:
    model = opened(folder)
    model.memory = model.memory.started_with(model.datastore)
    model.config.k = 9
    model.save_pretrained(folder, keep_replaced=2)  # k was 7 before, and 5 before that
    said = hf_knn("log", folder).stdout
    assert "2 versions that trainings replaced are kept: behind the changes, a step each." in said
    receipts = undo(folder, 2)
    assert [one["action"] for one in receipts] == ["undo of a training"]
    assert opened(folder).config.k == 5
    assert len(undo(folder, 2)) == 1
    assert opened(folder).config.k == 7
