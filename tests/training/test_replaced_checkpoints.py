"""A run that saves a checkpoint again, or pushes its folder, while something else is under way."""

import os
from pathlib import Path
from typing import Any

import pytest
from support.forks import die, outcome
from support.pictures import random_features, small_model
from support.stored import names_in

from hf_knn import KnnTrainer, KnnTrainingArguments
from hf_knn.training import checkpoints, saving


def stage(run: Path, text: str) -> None:
    folder = checkpoints.start_staging(run) / "checkpoint-5"
    folder.mkdir()
    (folder / "weights").write_text(text)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    stage(tmp_path, "old")
    checkpoints.publish(tmp_path, "checkpoint-5")
    assert names_in(tmp_path) == {"checkpoint-5"}
    return tmp_path


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_checkpoint_is_saved_again_under_its_name(
    run: Path, exchanges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanges:
        monkeypatch.setattr(checkpoints, "exchange", lambda first, second: False)
    stage(run, "new")
    found = checkpoints.publish(run, "checkpoint-5")
    assert (found / "weights").read_text() == "new"
    assert checkpoints.newest_whole(run) == (found, [])
    assert names_in(run) == {"checkpoint-5"}


def test_a_kill_between_two_renames_leaves_the_old_checkpoint(run: Path) -> None:
    def killed() -> None:
        rename = os.rename

        def rename_and_die(source: Any, target: Any) -> None:
            rename(source, target)
            if Path(source) == run / "checkpoint-5":
                die()

        checkpoints.exchange = lambda first, second: False
        os.rename = rename_and_die  # type: ignore[assignment]
        stage(run, "new")
        checkpoints.publish(run, "checkpoint-5")

    assert outcome(killed) == "ended by -9"
    assert not (run / "checkpoint-5").exists()
    found, _ = checkpoints.newest_whole(run)
    assert found is not None
    assert (found / "weights").read_text() == "old"
    stage(run, "newest")
    checkpoints.publish(run, "checkpoint-5")
    assert (run / "checkpoint-5" / "weights").read_text() == "newest"
    assert names_in(run) == {"checkpoint-5"}


def test_a_push_waits_for_the_one_under_way_before_it_replaces_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = KnnTrainingArguments(str(tmp_path), freeze_backbone=True, report_to=[])
    rows = random_features([0, 1, 2] * 4)
    pushing = KnnTrainer(small_model(), arguments, train_dataset=rows)
    order: list[str] = []
    monkeypatch.setattr(pushing, "hub_model_id", "org/model")
    save = pushing._save

    def saved(*given: Any, **options: Any) -> None:
        order.append("saved")
        save(*given, **options)

    def prepared(*_: Any) -> Any:
        order.append("prepared")
        return lambda: order.append("pushed")

    monkeypatch.setattr(pushing, "_finish_current_push", lambda: order.append("waited"))
    monkeypatch.setattr(pushing, "_save", saved)
    monkeypatch.setattr(saving, "prepare_push", prepared)
    pushing.push_to_hub()
    assert order == ["waited", "saved", "prepared", "pushed"]
