"""`hf-knn log`: receipts in plain words, and what `undo` would do."""

import json
import shutil
from pathlib import Path

import pytest
from support.commands import hf_knn, wide_terminal  # noqa: F401
from support.pictures import write_folder
from support.tiny import LABELS, tiny_model

from hf_knn import KnnForImageClassification
from hf_knn.model.receipts import CHANGES_NAME, Change, Receipt, history, standing


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("log") / "model"
    tiny_model("vit", k=5).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


def lines(folder: Path) -> list[str]:
    done = hf_knn("log", folder)
    assert done.exit_code == 0, done.output
    return done.stdout.splitlines()


def test_what_was_done_is_told_in_order(folder: Path, tmp_path: Path) -> None:
    assert lines(folder) == ["Nothing was changed since it was trained."]
    store = KnnForImageClassification.from_pretrained(folder).datastore
    first = store.ids[0].item()
    label = LABELS[int(store.labels[0])]
    other = LABELS[(int(store.labels[0]) + 1) % len(LABELS)]
    hf_knn("teach", folder, write_folder(tmp_path / "new", {"elk": 2, "[red]fox": 1}))
    hf_knn("relabel", folder, "--ids", first, "--label", other)
    assert lines(folder)[-1].endswith(f"undo {folder} takes number 2 back.")
    hf_knn("undo", folder)
    hf_knn("forget", folder, "--ids", first)
    said = lines(folder)
    assert [line[:4] for line in said[:4]] == ["  1 ", "  2 ", "  3 ", "  4 "]
    assert " UTC  taught 3 pictures: " in said[0]
    for part in ("2 of elk", "1 of [red]fox", "40 → 43 rows", "new classes: [red]fox, elk"):
        assert part in said[0]
    assert f"relabelled 1 picture: 1 of {label} → {other} (taken back)" in said[1]
    assert "took back number 2, 1 picture" in said[2]
    assert f"forgot 1 picture: 1 of {label}; 43 → 42 rows" in said[3]
    assert said[4] == "Number 4 cannot be taken back: no byte of those rows was kept here."
    found = json.loads(hf_knn("log", folder, "--json").stdout)
    assert [one["number"] for one in found] == [1, 2, 3, 4]
    assert [one["action"] for one in found] == ["teach", "relabel", "undo", "forget"]
    assert [one["is_taken_back"] for one in found] == [False, True, False, False]
    assert [one["takes_back"] for one in found] == [None, None, 2, None]
    assert found[3]["ids"] == [first]
    assert found[3]["in_words"].startswith("forgot 1 picture")


def test_a_version_that_is_kept_and_a_change_that_was_interrupted_are_named(folder: Path) -> None:
    model = KnnForImageClassification.from_pretrained(folder)
    model.save_pretrained(folder, keep_replaced=True)
    assert lines(folder)[-1].endswith("the one before the last training.")
    hf_knn("undo", folder)
    assert "put back the version that was kept of a training" in lines(folder)[0]
    (folder / "pending-change.safetensors").touch()
    assert lines(folder)[-1].startswith("The last change was interrupted")


def test_receipts_that_cannot_be_read_are_no_empty_history(folder: Path) -> None:
    (folder / CHANGES_NAME).write_text('[{"action": 3}]', encoding="utf-8")
    done = hf_knn("log", folder)
    assert done.exit_code == 1
    assert "Expected changes.json to hold receipts" in done.stderr


def test_history_knows_what_stands_as_undo_does() -> None:
    def receipt(action: Change) -> Receipt:
        return Receipt(action, [], [], 0, 0, "", "", "", "2026-11-30T12:00:00")

    done = {letter: Change[name] for letter, name in
            {"t": "TEACH", "f": "FORGET", "u": "UNDO", "x": "EXCHANGE"}.items()}  # fmt: skip
    for word in ("", "u", "tu", "ttuu", "tutu", "uttu", "txu", "tuuft", "ttfuut"):
        changes = [receipt(done[letter]) for letter in word]
        entries = history(changes)
        left = [one.receipt for one in entries
                if not one.is_taken_back and one.receipt.action != Change.UNDO]  # fmt: skip
        assert [id(one) for one in left] == [id(one) for one in standing(changes)], word
        assert sum(one.takes_back is not None for one in entries) == sum(
            one.is_taken_back for one in entries
        )
