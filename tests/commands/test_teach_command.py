"""Commands that change a checkpoint, as a user types them."""

import json
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.forks import Errand
from support.pictures import encoded, picture, write_folder
from support.tiny import LABELS, all_files, tiny_model
from typer.testing import CliRunner, Result

import hf_knn_cli
from hf_knn import KnnForImageClassification
from hf_knn.commands.memory import teach_pictures
from hf_knn.commands.rows import Wanted, forget_rows
from hf_knn.core.manifest import MANIFEST_NAME
from hf_knn.model import receipts
from hf_knn.model.receipts import CHANGES_NAME, read_changes, write_changes

NEW = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teach") / "model"
    tiny_model("vit", k=5).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("pictures") / "new", {"elk": 3, "fox": 2})


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(hf_knn_cli.app, [str(argument) for argument in arguments])


def receipt_of(*arguments: Any) -> dict[str, Any]:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def opened(folder: Path) -> Any:
    return KnnForImageClassification.from_pretrained(folder)


def manifest(folder: Path) -> bytes:
    return (folder / MANIFEST_NAME).read_bytes()


def test_a_folder_of_folders_is_taught(folder: Path, pictures: Path) -> None:
    receipt = receipt_of("teach", folder, pictures)
    model = opened(folder)
    assert receipt["new_classes"] == ["elk", "fox"]
    assert (receipt["rows_before"], receipt["rows_after"]) == (40, 45)
    assert len(model.datastore) == 45
    assert model.datastore.path_of(receipt["ids"][0]).endswith("elk/0.png")
    said = run("predict", folder, pictures / "elk" / "1.png", "--json").stdout
    assert "elk" in json.loads(said)[0]["neighbors"][0]["label"]


def test_a_picture_is_taught_a_name_that_is_text(folder: Path, pictures: Path) -> None:
    done = run("teach", folder, pictures / "elk" / "0.png", "--label", NEW)
    assert done.exit_code == 0, done.output
    assert f"1 of {NEW}" in done.stdout
    assert "Ids: " in done.stdout
    assert "hf-knn undo" in done.stdout
    assert opened(folder).config.class_names == [*LABELS, NEW]
    receipt = receipt_of("teach", folder, pictures / "fox", "--label", LABELS[0])
    assert receipt["labels"] == [LABELS[0]] * 2


def test_a_broken_picture_changes_nothing_unless_it_is_skipped(
    folder: Path, tmp_path: Path
) -> None:
    rows = write_folder(tmp_path / "rows", {"ant": 3})
    (rows / "ant" / "1.png").write_bytes(b"no picture")
    before = manifest(folder)
    done = run("teach", folder, rows)
    assert done.exit_code == 1
    assert "1.png" in done.output
    assert manifest(folder) == before
    done = run("teach", folder, rows / "ant", "--label", "elk")
    assert done.exit_code == 1
    assert "1.png" in done.output
    assert manifest(folder) == before
    done = run("teach", folder, rows, "--on-bad-image", "skip")
    assert done.exit_code == 0, done.output
    assert "Skipped" in done.stdout
    assert "--skip-bad-images" not in done.stderr
    assert len(opened(folder).datastore) == 42
    assert run("undo", folder).exit_code == 0
    done = run("teach", folder, rows / "ant", "--label", "elk", "--skip-bad-images", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["action"] == "teach"
    assert "Skipped" in done.stderr  # stdout is the receipt's
    assert "--skip-bad-images is now --on-bad-image skip" in done.stderr
    store = opened(folder).datastore
    assert [store.path_of(row_id) for row_id in store.ids[-2:].tolist()] == ["0.png", "2.png"]


def test_rows_are_forgotten_by_id_path_and_label(folder: Path) -> None:
    store = opened(folder).datastore
    row = store.subset(store.ids[:1])
    raw, path = row.features.numpy().tobytes(), row.paths[0]
    receipt = receipt_of("forget", folder, "--path", path, "--ids", int(store.ids[1]))
    assert sorted(receipt["ids"]) == sorted(store.ids[:2].tolist())
    data = [(folder / name).read_bytes() for name in all_files(folder)]
    assert not any(raw in found or path.encode() in found for found in data)
    done = run("forget", folder, "--label", LABELS[0])
    assert done.exit_code == 0
    assert "squash" in done.stdout
    assert LABELS.index(LABELS[0]) not in opened(folder).datastore.labels
    done = run("undo", folder)
    assert done.exit_code == 1
    assert "no byte of them" in " ".join(done.output.split())


def test_a_backup_brings_rows_back(folder: Path, tmp_path: Path) -> None:
    before = opened(folder)
    done = run("forget", folder, "--label", LABELS[1], "--backup", tmp_path / "kept")
    assert done.exit_code == 0, done.output
    assert "hf-knn merge" in done.stdout
    again = run("forget", folder, "--label", LABELS[2], "--backup", tmp_path / "kept")
    assert again.exit_code == 1
    assert "not to exist yet" in " ".join(again.output.split())
    receipt = receipt_of("merge", folder, tmp_path / "kept")
    after = opened(folder)
    assert set(receipt["labels"]) == {LABELS[1]}
    assert sorted(after.datastore.ids.tolist()) == sorted(before.datastore.ids.tolist())
    assert receipt["hash_after"] == after.changes[0].hash_before


def test_a_backup_knows_the_names_of_its_classes(folder: Path, tmp_path: Path) -> None:
    run("forget", folder, "--label", LABELS[1], "--backup", tmp_path / "rows")
    other = tiny_model("vit", k=5)
    other.config.id2label = dict(enumerate(reversed(LABELS)))
    other.config.label2id = {name: i for i, name in enumerate(reversed(LABELS))}
    other.save_pretrained(tmp_path / "other")
    receipt = receipt_of("merge", tmp_path / "other", tmp_path / "rows")
    assert set(receipt["labels"]) == {LABELS[1]}
    assert receipt["new_classes"] == []
    labels = opened(tmp_path / "other").datastore.subset(receipt["ids"]).labels
    assert labels.unique().tolist() == [len(LABELS) - 2]  # 1 where the backup was made


def test_old_changes_make_room_for_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = tiny_model("vit", k=5)
    for _ in range(4):
        model.relabel(model.datastore.ids[:2], [LABELS[0]] * 2)
    write_changes(model.changes, tmp_path)
    size = (tmp_path / CHANGES_NAME).stat().st_size
    assert read_changes(tmp_path / CHANGES_NAME) == model.changes
    monkeypatch.setattr(receipts, "_LARGEST_FILE", size - 1)
    write_changes(model.changes, tmp_path)
    assert (tmp_path / CHANGES_NAME).stat().st_size < size
    assert read_changes(tmp_path / CHANGES_NAME) == model.changes[1:]


def test_relabel_and_undo(folder: Path) -> None:
    store = opened(folder).datastore
    ids = store.ids[:2].tolist()
    receipt = receipt_of("relabel", folder, "--ids", ids[0], "--ids", ids[1], "--label", "new")
    assert receipt["old_labels"] == [LABELS[n] for n in store.labels[:2].tolist()]
    undone = receipt_of("undo", folder)
    assert undone["hash_after"] == receipt["hash_before"]
    model = opened(folder)
    assert model.config.class_names == list(LABELS)
    assert torch.equal(model.datastore.labels, store.labels)
    assert run("undo", folder).exit_code == 1


def test_processes_that_teach_and_forget_at_once_lose_nothing(folder: Path, tmp_path: Path) -> None:
    known = opened(folder).datastore.ids.tolist()
    pictures = write_folder(tmp_path / "rows", {"a": 3, "b": 3, "c": 3})

    def teach(label: str) -> None:
        teach_pictures(folder, pictures / label, label, "fail", json_output=True)

    def forget(row_id: int) -> None:
        forget_rows(folder, Wanted([(row_id, row_id)]), False, None, json_output=True)

    errands = [Errand.start(partial(teach, label)) for label in ("a", "b", "c")]
    errands += [Errand.start(partial(forget, row_id)) for row_id in known[:3]]
    assert [errand.outcome() for errand in errands] == [""] * 6
    store = opened(folder).datastore
    assert len(store) == len(known) + 3 * 3 - 3
    assert set(known[3:]) < set(store.ids.tolist())
    assert len(set(store.ids.tolist())) == len(store)


def test_two_teachers_at_once_lose_nothing(folder: Path, tmp_path: Path) -> None:
    pictures = write_folder(tmp_path / "rows", {"a": 3, "b": 3, "c": 3, "d": 3})

    def teach(label: str) -> None:
        teach_pictures(folder, pictures / label, label, "fail", json_output=True)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(teach, ["a", "b", "c", "d"]))
    model = opened(folder)
    assert len(model.datastore) == 52
    assert sorted(model.config.class_names[len(LABELS) :]) == ["a", "b", "c", "d"]
    assert len(model.changes) == 4
    assert not list(tmp_path.glob(".*"))


def test_a_difference_is_named(folder: Path, made: Path, pictures: Path) -> None:
    assert "Both are the same" in run("diff", made, folder).stdout
    store = opened(folder).datastore
    run("teach", folder, pictures / "elk", "--label", "elk")
    run("forget", folder, "--ids", int(store.ids[0]))
    run("relabel", folder, "--ids", int(store.ids[1]), "--label", "elk")
    found = json.loads(run("diff", made, folder, "--json").stdout)
    assert len(found["added"]) == 3
    assert found["removed"] == [int(store.ids[0])]
    old = LABELS[int(store.labels[1])]
    assert found["relabelled"] == [[int(store.ids[1]), old, "elk"]]
    assert found["new_classes"] == ["elk"]
    assert found["same_backbone"]
    assert found["same_head"]
    said = run("diff", made, folder).stdout
    for word in ("rows added", "rows removed", "rows relabelled", "new classes"):
        assert word in said
    other = tiny_model("vit", seed=3, k=7)
    other.save_pretrained(folder.parent / "other")
    found = json.loads(run("diff", made, folder.parent / "other", "--json").stdout)
    assert not found["same_backbone"]
    assert found["settings"]["k"] == [5, 7]
    refused = run("merge", made, folder.parent / "other")
    assert refused.exit_code == 1
    assert "backbone" in refused.output


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["forget", "{folder}"], "what to forget"),
        (["forget", "{folder}", "--ids", "5", "--label", "x"], "what to forget"),
        (["forget", "{folder}", "--label", "nobody"], "one of the classes"),
        (["forget", "{folder}", "--path", "nowhere.png"], "paths that the datastore knows"),
        (["forget", "{folder}", "--ids", "123456"], "does not have"),
        (["teach", "{folder}", "nowhere", "--label", "x"], "to be a picture"),
        (["teach", "nowhere", "{folder}"], "to be a checkpoint folder"),
        (["relabel", "{folder}", "--ids", "123456", "--label", "x"], "does not have"),
        (["undo", "{folder}"], "nothing was changed"),
    ],
)
def test_what_cannot_be_done_says_what_to_do(
    arguments: list[str], match: str, folder: Path
) -> None:
    before = manifest(folder)
    done = run(*(argument.format(folder=folder) for argument in arguments))
    assert done.exit_code == 1, done.output
    assert match in " ".join(done.output.split())
    assert manifest(folder) == before


def test_an_unreadable_journal_is_no_reason_to_fail(folder: Path) -> None:
    (folder / "changes.json").write_text('[{"action": 3}]', encoding="utf-8")
    assert opened(folder).changes == []


def written(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Which file each name is, and when it was written; to read it changes nothing."""
    facts = {name: (folder / name).stat() for name in all_files(folder)}
    return {name: (of.st_ino, of.st_size, of.st_ctime_ns) for name, of in facts.items()}


def test_what_is_stored_is_not_taught_twice(folder: Path, pictures: Path, tmp_path: Path) -> None:
    first = receipt_of("teach", folder, pictures)
    before = written(folder)
    done = run("teach", folder, pictures)
    assert done.exit_code == 0
    said = " ".join(done.stdout.split())
    assert "5 of 5 pictures are stored already and were left out: elk/0.png (row" in said
    assert "--again" in said
    assert "Nothing was changed." in said
    assert "hf-knn undo" not in said
    assert written(folder) == before
    receipt = receipt_of("teach", folder, pictures)
    assert (receipt["ids"], receipt["skipped"], receipt["scope"]) == (
        [],
        [0, 1, 2, 3, 4],
        "nothing",
    )
    # under other names, with a new one among them
    moved = Path(shutil.copytree(pictures, tmp_path / "moved"))
    (moved / "elk" / "0.png").rename(moved / "elk" / "zero.png")
    with Image.open(moved / "elk" / "1.png") as image:
        image.save(moved / "elk" / "1.png", compress_level=0)
    (moved / "fox" / "new.png").write_bytes(encoded(picture(3, 77)))
    receipt = receipt_of("teach", folder, moved)
    assert (receipt["labels"], len(receipt["skipped"])) == (["fox"], 5)
    assert opened(folder).datastore.path_of(receipt["ids"][0]) == "fox/new.png"
    again = receipt_of("teach", folder, pictures / "fox", "--label", "fox", "--again")
    assert (len(again["ids"]), again["skipped"]) == (2, [])
    assert receipt_of("undo", folder)["rows_after"] == len(first["ids"]) + 41


def test_what_is_stored_under_another_label_is_refused_with_the_command(
    folder: Path, pictures: Path, tmp_path: Path
) -> None:
    ids = receipt_of("teach", folder, pictures)["ids"]
    other = tmp_path / "other"
    shutil.copytree(pictures / "fox", other / "it's a fox")
    (other / "it's a fox" / "new.png").write_bytes(encoded(picture(3, 78)))
    before = manifest(folder)
    done = run("teach", folder, other)
    assert done.exit_code == 1
    assert manifest(folder) == before
    said = " ".join(done.output.split())
    assert "found 2 stored under another one: " in said
    assert f"0.png as 'fox' in row {ids[3]}, not" in said
    chosen = ["--ids", f"{ids[3]},{ids[4]}", "--label", "it's a fox"]
    words = ["hf-knn", "relabel", str(folder), *chosen]
    assert "".join(shlex.join(words).split()) in "".join(done.output.split())
    receipt = receipt_of("teach", folder, other, "--relabel")
    assert receipt["old_labels"] == ["fox", "fox"]
    assert receipt["labels"] == ["it's a fox"] * 3
    assert receipt["ids"][:2] == ids[3:]
    receipt_of("undo", folder)
    store = opened(folder)
    names = [store.config.class_names[n] for n in store.datastore.rows_of(ids).labels.tolist()]
    assert names == ["elk"] * 3 + ["fox"] * 2
    assert "it's a fox" not in store.config.class_names
    assert run(*words[1:]).exit_code == 0
    assert receipt_of("teach", folder, other)["skipped"] == [0, 1]


def test_rows_of_a_backup_and_of_another_checkpoint_are_known_again(
    folder: Path, pictures: Path, tmp_path: Path
) -> None:
    receipt_of("teach", folder, pictures)
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    run("forget", folder, "--label", "fox", "--backup", tmp_path / "kept")
    run("merge", folder, tmp_path / "kept")
    assert len(receipt_of("teach", folder, pictures)["skipped"]) == 5
    run("forget", folder, "--label", "elk")
    run("merge", folder, other)
    assert len(opened(folder).memory.contents) == 2 + 5
    assert len(receipt_of("teach", folder, pictures)["skipped"]) == 5
